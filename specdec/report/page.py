"""The report of some runs: one HTML page that needs no network, and the charts as PNG files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from specdec.evaluation.records import SummaryRow, replace_text
from specdec.report.answers import Book, collect
from specdec.report.drawing import Pictures
from specdec.report.figures import ALL_ROWS, NON_LOOPING, OVERALL, Figures, Method, Setting, differing, task_name
from specdec.report.runs import Run, find_runs
from specdec.report.theme import css_variables

PAGE = "index.html"
_NONE = "–"
_COLUMNS = (
    "speedup_vs_plain", "speedup_vs_transformers", "tokens_per_second", "mean_accepted_tokens", "draft_share",
    "tree_nodes", "looping_share", "rows", "identical_rows", "near_ties", "bugs", "failed", "skipped",
)  # fmt: skip


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Read the runs in ``folders`` and write ``out/index.html`` and PNG files; returns what was written.

    Raises:
        ValueError: a folder that does not exist or holds no results, a malformed file (its line named).
    """
    figures = Figures(find_runs(folders))
    book = collect(figures)
    out.mkdir(parents=True, exist_ok=True)
    paths, sections = [out / PAGE], []
    for index, setting in enumerate(figures.settings):
        pictures = Pictures(figures, setting)
        paths += pictures.save(out, f"_{index + 1}" if index else "")
        sections.append(_section(figures, setting, pictures))
    replace_text(paths[0], _render(figures, book, sections))
    return paths


def _render(figures: Figures, book: Book, sections: Sequence[dict[str, Any]]) -> str:
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "times": _times,
        "fixed": _fixed,
        "percent": _percent,
        "count": _count,
        "breakable": _breakable,
    }
    return environment.get_template("page.html.jinja").render(
        style=Markup(_template("style.css")),
        script=Markup(_template("page.js")),
        light=Markup(css_variables(dark=False)),
        dark=Markup(css_variables(dark=True)),
        sections=sections,
        targets=_unique(figures.runs, "target"),
        dtypes=_unique(figures.runs, "dtype"),
        devices=_unique(figures.runs, "device"),
        mixed=_mixed(figures),
        runs=[_provenance(run) for run in figures.runs],
        units=figures.runs[0].summary.units,
        methods=len({(m.kind, m.recorded) for m in figures.methods}),
        any_lossy=not all(method.lossless for method in figures.methods),
        questions=len(book.questions),
        left_out={name: reason for run in figures.runs for name, reason in run.left_out.items()},
        interrupted=[run.folder.name for run in figures.runs if run.provenance.get("interrupted")],
        rows=_json(_all_rows(figures)),
        book=book.packed(),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _times(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}×"


def _fixed(value: float | None, digits: int = 2) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return _NONE if value is None else f"{100 * value:.{digits}f} %"


def _count(value: int | None) -> str:
    return _NONE if value is None else str(value)


def _breakable(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def _template(name: str) -> str:
    return resources.files("specdec.report").joinpath("templates", name).read_text(encoding="utf-8")


def _unique(runs: Sequence[Run], attribute: str) -> list[str]:
    return list(dict.fromkeys(getattr(run, attribute) for run in runs))


def _mixed(figures: Figures) -> list[str]:
    """What the runs do not share, in words; speeds then cannot be compared across settings."""
    shared = (("target", "targets"), ("dtype", "dtypes"), ("device", "devices"))
    found = [(plural, _unique(figures.runs, attribute)) for attribute, plural in shared]
    mixed = [f"different {plural} ({', '.join(values)})" for plural, values in found if len(values) > 1]
    asked = differing(run.workload for run in figures.runs)
    return mixed + ([f"different workloads ({', '.join(asked).replace('_', ' ')})"] if asked else [])


def _section(figures: Figures, setting: Setting, pictures: Pictures) -> dict[str, Any]:
    methods = figures.all_of(setting)
    return {
        "label": setting.label(figures.settings),
        "setting": setting,
        "pictures": pictures,
        "tiles": _tiles(figures, setting),
        "table": [line for method in methods for line in _table_lines(figures, method)],
        "tasks": [task_name(task) for task in figures.tasks(setting)],
        "variants": figures.variants_shown(setting),
    }


def _tiles(figures: Figures, setting: Setting) -> dict[str, Any]:
    """What the head of the page says in large type: the fastest drafter, and what losslessness came to."""
    lossless = [m for m in figures.of(setting) if m.kind == "drafter" and m.lossless]
    rows = [row for m in lossless for row in m.rows if row.task == OVERALL and row.subset == ALL_ROWS]
    judged = [row for row in rows if row.identical_rows is not None]
    every = [row for m in figures.all_of(setting) for row in m.rows if row.task == OVERALL and row.subset == ALL_ROWS]
    fastest = next((method for method in lossless if method.speedup() is not None), None)
    return {
        "fastest": fastest,
        "row": fastest.row() if fastest else None,
        "color": figures.color(fastest) if fastest else None,
        "judged": sum(row.rows for row in judged),
        "identical": sum(row.identical_rows or 0 for row in judged),
        "near_ties": sum(row.near_ties or 0 for row in judged),
        "bugs": sum(row.bugs or 0 for row in judged),
        "looping": next((row.looping_share for row in every if row.looping_share is not None), None),
        "failed": sum(row.failed for row in every),
        "skipped": max((row.skipped for row in every), default=0),
    }


def _table_lines(figures: Figures, method: Method) -> list[dict[str, Any]]:
    """One line per state of a method: figures of rows that do not loop, and of all."""
    states = dict.fromkeys(row.state for row in method.rows)
    lines = []
    for state in states:
        every, steady = (method.row(OVERALL, subset, state) for subset in (ALL_ROWS, NON_LOOPING))
        if every is None and steady is None:
            continue
        line = {"method": method, "color": figures.color(method), "state": state, "all": every, "steady": steady}
        lines.append({**line, "any": every or steady})
    return lines


def _all_rows(figures: Figures) -> dict[str, Any]:
    """Every row of every summary, for the table that the reader filters."""
    rows = []
    for method in figures.methods:
        label = method.setting.label(figures.settings) if len(figures.settings) > 1 else ""
        for row in method.rows:
            key = [method.label, figures.color(method), label, row.task, row.subset, row.state]
            rows.append([*key, *(_rounded(row, name) for name in _COLUMNS)])
    return {"columns": _COLUMNS, "rows": rows}


def _rounded(row: SummaryRow, name: str) -> float | int | None:
    value = getattr(row, name)
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _provenance(run: Run) -> dict[str, Any]:
    """What is known about a run: facts that fit on a line, and long ones (the configuration) folded."""
    facts, folded = [], []
    for key, value in run.provenance.items():
        if value is None or value == {} or key in ("left_out", "interrupted"):  # the latter are said elsewhere
            continue
        items = list(value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value])
        if any(isinstance(item, dict | list) for item in items):
            folded.append((key, json.dumps(value, indent=2, ensure_ascii=False, default=str)))
        elif isinstance(value, dict):
            facts.append((key, ", ".join(f"{name} {item}" for name, item in value.items())))
        else:
            facts.append((key, " ".join(map(str, items))))
    return {"name": run.folder.resolve().name, "overrides": run.overrides, "facts": facts, "folded": folded}


def _json(value: Any) -> Markup:
    """JSON that may stand inside a ``<script>`` element."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
