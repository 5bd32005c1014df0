"""How far a long task is: a bar with the time left on a terminal, a line now and then everywhere else."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY = 10.0  # seconds between two lines where there is no terminal


class Bar:
    """One task; use it as a context.

    Args:
        console: where to.
        what: is being done.
        unit: what is counted.
    """

    def __init__(self, console: Console, what: str, unit: str) -> None:
        self.console, self.what, self.unit = console, what, unit
        self._live: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{unit},"),
                TimeRemainingColumn(),
                TextColumn("left  {task.fields[said]}"),
            )
            self._live = Progress(*columns, console=console, transient=True)
            self._task = self._live.add_task(what, total=None, said="")
        self._total = self._done = self._resumed = 0
        self._said = ""
        self._started = self._spoke = time.monotonic()

    def __enter__(self) -> Bar:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._done > self._resumed:
            self._line()

    def start(self, total: int, done: int = 0) -> None:
        """It begins; ``done`` of ``total`` were done before."""
        self._total, self._done, self._resumed = total, done, done
        self._started = self._spoke = time.monotonic()
        if self._live is not None:
            self._live.reset(self._task, total=total, completed=done)

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self._done += count
        if self._live is not None:
            self._live.update(self._task, completed=self._done)
        elif time.monotonic() - self._spoke > _LINE_EVERY:
            self._line()

    def say(self, text: str) -> None:
        """What stands beside the bar from now on."""
        self._said = text
        if self._live is not None:
            self._live.update(self._task, said=escape(text))

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def _line(self) -> None:
        self._spoke = time.monotonic()
        new = self._done - self._resumed
        seconds = (self._spoke - self._started) / new * (self._total - self._done) if new else None
        left = "?" if seconds is None else str(timedelta(seconds=round(seconds)))
        self.note(f"{self.what}: {self._done}/{self._total} {self.unit}, {left} left  {self._said}".rstrip())
