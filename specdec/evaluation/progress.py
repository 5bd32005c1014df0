"""What a user sees while a run goes on: a live table on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from specdec.evaluation.methods import Method
from specdec.evaluation.records import STATELESS, Answer
from specdec.metrics import Throughput

if TYPE_CHECKING:
    from specdec.evaluation.runner import Setting

_LINE_EVERY = 10.0  # seconds between two lines where there is no terminal


@dataclass
class _Count:
    """One method so far."""

    label: str
    done: int
    failed: int
    speed: Throughput
    verifications: int = 0
    emitted: int = 0

    @property
    def accepted(self) -> str:
        """Running mean accepted tokens."""
        return f"{self.emitted / self.verifications:.2f}" if self.verifications else ""


class Progress:
    """Counts per method; use it as a context.

    Args:
        console: where to; a terminal gets a table that renews itself, anything else a line every ten seconds.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._counts: dict[int, _Count] = {}
        self._title, self._total, self._resumed = "", 0, 0
        self._started = self._spoke = time.monotonic()

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif any(count.done > self._resumed for count in self._counts.values()):
            self._line()

    def start(self, setting: Setting, methods: Sequence[Method], total: int, done: int) -> None:
        """A setting begins; ``done`` of its ``total`` questions were finished before."""
        how = "greedy" if setting.temperature == 0 else f"temperature {setting.temperature:g}"
        self._title, self._total, self._resumed = f"{how}, batch size {setting.batch_size}", total, done
        self._started = self._spoke = time.monotonic()
        self._counts = {id(method): _Count(label(method), done, 0, Throughput()) for method in methods}
        resumed = f", {done} of them finished before" if done else ""
        self.note(f"{self._title}: {total} questions{resumed}, {len(methods)} methods")

    def advance(self, method: Method, answers: Sequence[Answer], error: str | None) -> None:
        """A method has gone through some questions."""
        count = self._counts[id(method)]
        count.done += len(answers)
        if error is not None:
            count.failed += len(answers)
            names = ", ".join(str(answer.question_id) for answer in answers)
            self.note(f"{count.label} failed on {names}: {error.strip().splitlines()[-1]}")
        for choice in (choice for answer in answers for choice in answer.choices):
            count.speed.add(sum(choice.new_tokens), sum(choice.wall_time))
            count.verifications += len(choice.accept_lengths)
            count.emitted += sum(choice.accept_lengths)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif time.monotonic() - self._spoke > _LINE_EVERY and count is list(self._counts.values())[-1]:
            self._line()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def _left(self, count: _Count) -> str:
        """Time left: all methods go through the questions together, so it is the same question for each of them."""
        new = count.done - self._resumed
        if new == 0:
            return "?"
        seconds = (time.monotonic() - self._started) / new * (self._total - count.done)
        return str(timedelta(seconds=round(seconds)))

    def _line(self) -> None:
        self._spoke = time.monotonic()
        counts = list(self._counts.values())
        parts = [f"{c.label} {c.speed.rate:.0f} tok/s {c.accepted}".rstrip() for c in counts]
        slowest = min(counts, key=lambda count: count.done)
        head = f"[{slowest.done}/{self._total}] {self._left(slowest)} left"
        self.note(" | ".join([head, *parts]))

    def _table(self) -> Table:
        table = Table(title=self._title, title_justify="left")
        for name in ("method", "done", "left", "tokens/s", "accepted tokens", "failed"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for count in self._counts.values():
            done = f"{count.done}/{self._total}"
            failed = f"[red]{count.failed}[/red]" if count.failed else ""
            rate = f"{count.speed.rate:.0f}" if count.speed.seconds else ""
            table.add_row(escape(count.label), done, self._left(count), rate, count.accepted, failed)
        return table


def label(method: Method) -> str:
    """Name and state of a method."""
    return method.name if method.state == STATELESS else f"{method.name} ({method.state})"
