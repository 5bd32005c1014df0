"""What a user sees of long work: a bar on a terminal, a line now and then everywhere else."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LINE_EVERY = 10.0  # seconds between two lines where there is no terminal


class Bar:
    """Done, of how many, and the time left; use it as a context.

    Args:
        console: where to.
        what: is being done.
        total: of the things to do.
        done: of them before this start; the time left is reckoned from the others.
    """

    def __init__(self, console: Console, what: str, total: int, done: int = 0) -> None:
        self.console, self.what, self.total, self.done = console, what, total, done
        self._before, self._said = done, ""
        self._started = self._spoke = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task(what, total=total, completed=done, said="")

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > self._before:
            self._line()

    def advance(self, count: int, said: str = "") -> None:
        """So many more are done; ``said`` stands behind the time left."""
        self.done, self._said = self.done + count, said
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, said=escape(self._figures()))
        elif time.monotonic() - self._spoke > _LINE_EVERY:
            self._line()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def _figures(self) -> str:
        seconds, new = time.monotonic() - self._started, self.done - self._before
        left = str(timedelta(seconds=round(seconds / new * (self.total - self.done)))) if new else "?"
        return ", ".join(filter(None, [f"{left} left", self._said]))

    def _line(self) -> None:
        self._spoke = time.monotonic()
        self.note(f"{self.what}: {self.done}/{self.total}, {self._figures()}")
