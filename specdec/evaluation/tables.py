"""A summary as CSV, as Markdown and on a terminal. Computes nothing.

Cells with two figures: texts whose plain greedy text does not end in a loop, and in brackets all texts.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from specdec.evaluation.records import STATELESS, SUMMARY, Summary, SummaryRow, replace_text, summary_json
from specdec.evaluation.summary import OVERALL
from specdec.metrics import shared

COLUMNS = {
    "mean_accepted_tokens": "accepted tokens",
    "tokens_per_second": "tokens/s",
    "speedup_vs_plain": "vs plain loop",
    "speedup_vs_transformers": "vs transformers",
    "draft_share": "drafting time",
}
LOSSY = "**lossy**"
WIDE = 130  # columns that the whole table needs


def write_summary(folder: Path, summary: Summary) -> None:
    """``summary.json``, ``summary.csv`` and ``summary.md``, each in one move."""
    replace_text(folder / "summary.csv", to_csv(summary))
    replace_text(folder / "summary.md", to_markdown(summary))
    replace_text(folder / SUMMARY, summary_json(summary))


def to_csv(summary: Summary) -> str:
    """One line per row, a column per key; lists and tables within a cell are JSON."""
    rows = [asdict(row) for row in summary.rows]
    text = io.StringIO()
    if rows:
        joined = any(row["job"] is not None for row in rows)
        names = [name for name in rows[0] if joined or name not in ("job", "overrides")]
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return text.getvalue()


def to_markdown(summary: Summary) -> str:
    """A table of all methods per setting and job, then speed-ups by task."""
    parts = []
    for title, rows in _tables(summary):
        head, body = overall(rows)
        parts += [f"### {title}", _markdown(head, body), note(rows) + _mixed(summary, rows[0].job)]
        tasks = [row.task for row in rows if row.task != OVERALL]
        if len(set(tasks)) > 1:
            parts += [f"Speed-up {_baseline(rows)} by task", _markdown(*by_task(rows))]
    return "\n\n".join(parts) + "\n"


def show(summary: Summary) -> None:
    """Print the table of all methods per setting and job to standard output."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width that lines would have to be broken for
        console = Console(width=160)
    for title, rows in _tables(summary):
        head, body = overall(rows) if console.width >= WIDE else _narrow(*overall(rows))
        table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(head):
            table.add_column(name, justify="right" if index else "left", overflow="fold")
        for cells in body:
            table.add_row(*(escape(cell).replace(LOSSY, "[bold red]lossy[/bold red]") for cell in cells))
        console.print(table)
        console.print(note(rows), highlight=False)


def _narrow(head: Sequence[str], body: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The same for 80 columns: brackets on a line of their own, verdicts in one column, no drafting time."""
    short = ["method", "accepted", "tok/s", "vs\nplain", "vs\ntransf.", "same/\ntie/bug", "texts", "failed"]
    kept = [0, 1, 2, 3, 4, None, 9, 10]
    assert [head[index] for index in (0, 9, 10)] == ["method", "texts", "failed"]
    lines = []
    for cells in body:
        verdicts = "/".join(cells[6:9]) if cells[6] else ""
        lines.append([verdicts if index is None else cells[index] for index in kept])
        lines[-1][1:5] = [cell.replace(" (", "\n(") for cell in lines[-1][1:5]]
    return short, lines


def overall(rows: Sequence[SummaryRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: every method over all tasks."""
    head = ["method", *COLUMNS.values(), "identical", "near-ties", "bugs", "texts", "failed"]
    body = []
    for row, calm in _pairs(rows, OVERALL):
        cells = [_name(row), *(_two(row, calm, key) for key in COLUMNS)]
        counts = ["" if value is None else str(value) for value in (row.identical_rows, row.near_ties, row.bugs)]
        body.append([*cells, *counts, str(row.rows), str(row.failed) if row.failed else ""])
    return head, body


def by_task(rows: Sequence[SummaryRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the speed-up of every method on every task."""
    key = "speedup_vs_plain" if any(row.speedup_vs_plain for row in rows) else "speedup_vs_transformers"
    tasks = list(dict.fromkeys(row.task for row in rows))
    body: dict[str, list[str]] = {}
    for task in tasks:
        for row, calm in _pairs(rows, task):
            body.setdefault(_name(row), []).append(_two(row, calm, key))
    return ["method", *tasks], [[name, *cells] for name, cells in body.items()]


def note(rows: Sequence[SummaryRow]) -> str:
    """What the figures stand for."""
    row = next(row for row in rows if row.task == OVERALL and row.subset == "all")
    share = f"{100 * (row.looping_share or 0):.0f} % of the texts end in a loop"
    skipped = f"; {row.skipped} turns beyond the context were skipped" if row.skipped else ""
    return (
        f"Outside the brackets: texts that do not end in a loop; in brackets: all texts ({share}){skipped}. "
        "Accepted tokens are a mean per target pass, bonus included; speed-ups are of whole calls, prefill included. "
        "Greedy texts are compared with the plain loop's, those of the plain loop (none) with transformers'."
    )


def _mixed(summary: Summary, job: str | None) -> str:
    """A warning where the processes of a run, or of a job, were not alike."""
    known = summary.provenance if job is None else summary.provenance.get("jobs", {}).get(job, {})
    mixed = known.get("mixed")
    return f" **The processes of this run differ in {', '.join(mixed)}**: see its provenance." if mixed else ""


def _tables(summary: Summary) -> list[tuple[str, list[SummaryRow]]]:
    """Rows by job and setting, with a title each."""
    found: dict[str, list[SummaryRow]] = {}
    everywhere = shared(row.overrides or [] for row in summary.rows)
    for row in summary.rows:
        how = "greedy" if row.temperature == 0 else f"temperature {row.temperature:g}"
        own = ", ".join(override for override in row.overrides or [] if override not in everywhere)
        job = "" if row.job is None else f"job {row.job} ({own}): " if own else f"job {row.job}: "
        found.setdefault(f"{job}{how}, batch size {row.batch_size}", []).append(row)
    return list(found.items())


def _pairs(rows: Sequence[SummaryRow], task: str) -> list[tuple[SummaryRow, SummaryRow | None]]:
    """Each row over all texts with its twin over those that do not loop."""
    twins = {(row.drafter, row.state): row for row in rows if row.task == task and row.subset == "non_looping"}
    return [(row, twins.get((row.drafter, row.state))) for row in rows if row.task == task and row.subset == "all"]


def _two(row: SummaryRow, calm: SummaryRow | None, key: str) -> str:
    if getattr(row, key) is None:
        return ""
    return f"{_one(None if calm is None else getattr(calm, key), key)} ({_one(getattr(row, key), key)})"


def _one(value: Any, key: str) -> str:
    if value is None:
        return "–"
    if key == "draft_share":
        return f"{100 * value:.0f} %"
    return f"{value:.0f}" if key == "tokens_per_second" else f"{value:.2f}"


def _name(row: SummaryRow) -> str:
    name = row.drafter if row.state == STATELESS else f"{row.drafter} ({row.state})"
    return name if row.lossless else f"{name} {LOSSY}"


def _baseline(rows: Sequence[SummaryRow]) -> str:
    return "against the plain loop" if any(row.speedup_vs_plain for row in rows) else "against transformers"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)
