"""Showing text as it is produced, each token coloured by who proposed it, and the table that compares two runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specdec.decoding import Step
from specdec.interfaces import DecodeState
from specdec.metrics import PHASES, SpeculationStats

PLAIN, DRAFTED, OWN = "white", "bold cyan", "bold yellow"

LOSSY = "[yellow]the acceptance rule is lossy by design: sampled texts do not follow the target's own law[/yellow]"


class TextView:
    """Prints the first row of a batch as it grows; time spent printing is kept apart from time spent decoding.

    Args:
        console: where to.
        tokenizer: turns ids into text.
    """

    def __init__(self, console: Console, tokenizer: Any) -> None:
        self.console, self.tokenizer = console, tokenizer
        self.seconds = 0.0
        self._ids: list[int] = []
        self._shown = ""

    def show(self, tokens: Sequence[tuple[int, str]]) -> None:
        """Print tokens with their styles; bytes of an unfinished character wait for their rest."""
        start = time.perf_counter()
        pieces = []
        for token, style in tokens:
            self._ids.append(token)
            text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                pieces.append((text[len(self._shown) :], style))
                # A few tokens of context are enough to know how the next one joins on.
                self._ids = self._ids[-4:]
                self._shown = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if pieces:
            self.console.print(Text.assemble(*pieces), end="", soft_wrap=True)
        self.seconds += time.perf_counter() - start

    def end(self) -> None:
        """Finish the paragraph."""
        self.console.print("\n")


class PlainStream(TextView):
    """A streamer of transformers: plain decoding, one colour."""

    def __init__(self, console: Console, tokenizer: Any) -> None:
        super().__init__(console, tokenizer)
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first and is not shown."""
        if self._prompt_seen:
            self.show([(int(value.flatten()[0]), PLAIN)])
        self._prompt_seen = True


class SpeculativeView(TextView):
    """An observer of the loop: drafted tokens in one colour, the target's own in another."""

    def observe(self, state: DecodeState, step: Step) -> None:  # noqa: ARG002 - the observer's signature
        """Show what one step emitted."""
        tokens, accepted = step.verification.tokens[0], step.verification.accepted[0]
        self.show([(token, DRAFTED if index < accepted else OWN) for index, token in enumerate(tokens)])


def legend(drafter: str) -> Text:
    """Which colour means what."""
    return Text.assemble(("■", DRAFTED), f" proposed by {drafter}, accepted   ", ("■", OWN), " the target's own token")


def comparison(plain_seconds: float, seconds: float, tokens: tuple[int, int], stats: SpeculationStats) -> Table:
    """The table under a demo: ``tokens`` emitted plainly and speculatively, wall clock without printing."""
    table = Table(title="model.generate, plain and speculative, same prompts", title_justify="left")
    for name in ("", "plain", stats.drafter):
        table.add_column(name, justify="right" if name else "left")
    plain_rate, rate = tokens[0] / plain_seconds, tokens[1] / seconds
    table.add_row("tokens per second", f"{plain_rate:.0f}", f"{rate:.0f}")
    table.add_row("speed-up", "1.00x", f"{rate / plain_rate:.2f}x", style="bold")
    table.add_row("mean accepted tokens (per target pass)", "1.00", f"{stats.mean_accepted_tokens:.2f}")
    total = sum(stats.seconds.values()) or 1.0
    for phase in PHASES:
        table.add_row(f"time in {phase}", "", f"{100 * stats.seconds[phase] / total:.0f} %")
    return table


def verdict(audit: Any, decode: Any) -> Sequence[Text]:
    """Lines that say whether the texts are identical, and where they part if not; ``decode`` turns an id into text."""
    rows = len(audit.rows)
    lines = [
        Text(f"identical texts: {audit.identical} of {rows}", style="bold green" if audit.identical == rows else "bold")
    ]
    for index, row in enumerate(audit.rows):
        if row.divergence is None:
            continue
        kind = "mismatch" if row in audit.mismatches else "near-tie"
        pair = " and ".join(decode(token) for token in (row.divergence.plain_token, row.divergence.speculative_token))
        lines.append(
            Text(
                f"  prompt {index + 1}: {kind} at token {row.divergence.position}: {pair}, {row.divergence.gap:.4f} "
                f"nats apart; rounding explains {audit.bound:.4f} (the same model, block against single scoring)",
                style="red" if kind == "mismatch" else "yellow",
            )
        )
    if audit.near_ties and not audit.mismatches:
        lines.append(Text("  near-ties are half-precision rounding; dtype=float32 shows exact equality"))
    return lines
