"""What a run of the benchmark leaves for readers: Markdown tables, one HTML page that needs no network, PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from specdec.bench.plots import pictures
from specdec.bench.tables import conditions, markdown, tables
from specdec.evaluation.records import replace_text
from specdec.report.drawing import svg
from specdec.report.theme import ON_PAGE, PRINT, css_variables

TABLES, PAGE = "performance_tables.md", "index.html"
_DOTS_PER_INCH = 144


def write_page(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    """Write ``performance_tables.md``, ``index.html`` and the PNG files; returns what was written."""
    paths, drawn = [folder / TABLES, folder / PAGE], dict[str, list[tuple[str, Markup]]]()
    for name, (title, draw) in pictures(content).items():
        paths.append(folder / f"{name}.png")
        draw(PRINT).savefig(paths[-1], dpi=_DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.15)
        section = max((known for known in content["sections"] if name.startswith(known)), key=len)
        # The drawing is ours, its texts are escaped by matplotlib.
        drawn.setdefault(section, []).append((title, Markup(svg(draw(ON_PAGE)))))
    replace_text(folder / TABLES, markdown(content))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("specdec.bench").joinpath("templates", "page.html.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        light=Markup(css_variables(dark=False)),
        dark=Markup(css_variables(dark=True)),
        conditions=conditions(content),
        command=content["provenance"]["command"],
        tables=tables(content),
        drawn={name: drawn.get(name, []) for name in content["sections"]},
    )
    replace_text(folder / PAGE, text)
    return paths
