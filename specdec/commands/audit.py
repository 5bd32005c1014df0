"""Is the output really the target's own? Plain against speculative text, with a rounding control."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec.audit import audit
from specdec.commands._session import Session
from specdec.demo.view import LOSSY, verdict
from specdec.generation import speculation_of


def run(config: DictConfig) -> int:
    """Audit every prompt. Returns 1 where a token is neither the argmax nor a near-tie."""
    session, console = Session(config), Console()
    if session.options()["do_sample"]:
        raise ValueError(f"the audit compares greedy texts; got temperature={config.temperature}, expected 0")
    ids = [session.loaded.encode(prompt, config.chat) for prompt in session.prompts()]
    session.speculate()
    session.without_processors()
    bar = track(ids, "auditing", console=Console(stderr=True), transient=True)
    result = audit(session.model, (session.pair(row, session.generate(row)) for row in bar))
    stats = speculation_of(session.model).stats
    table = Table(
        title=f"audit of {stats.drafter} on {session.loaded.name}, {session.model.dtype}",
        title_justify="left",
        show_header=False,
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("rows", str(len(result.rows)))
    table.add_row("identical to plain decoding", str(result.identical), style="bold")
    table.add_row("different by a near-tie", str(len(result.near_ties)))
    table.add_row("mismatches", str(len(result.mismatches)), style="red" if result.mismatches else None)
    table.add_row("gap that rounding explains, from the control", f"{result.bound:.2e} nats")
    table.add_row("positions that flip in the control, no drafter involved", str(result.control_flips))
    table.add_row("mean accepted tokens", f"{stats.mean_accepted_tokens:.2f}")
    console.print(table)
    for line in verdict(result, session.show_token):
        console.print(line)
    if not stats.lossless:
        console.print(LOSSY)
    if config.output is not None:
        report = {
            **result.as_dict(),
            "drafter": stats.drafter,
            "lossless": stats.lossless,
            "target": session.loaded.name,
            "dtype": str(session.model.dtype),
        }
        Path(config.output).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 1 if result.mismatches else 0
