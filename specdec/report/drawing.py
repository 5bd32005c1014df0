"""Figures as inline SVG that follows the reader's colour scheme, and as PNG files.

The SVG keeps its text as text, in the page's font; colours become CSS variables, and ids are made unique in the page.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from specdec.report import charts
from specdec.report.figures import Figures, Setting
from specdec.report.theme import ON_PAGE, PLACEHOLDERS, PRINT, Theme

WIDE, NARROW, PANEL = 1000, 324, 340
_DOTS_PER_INCH = 144
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "specdec", "font.family": ["DejaVu Sans"]}
_counter = itertools.count()

_MARKS = "bars: rows that do not loop; diamonds: all rows; ticks: from a cold start"
_TITLES = {
    "speedup": ("Speed-up against plain decoding", _MARKS),
    "speedup_by_task": ("Speed-up against plain decoding, by task", _MARKS),
    "accepted_lengths": ("Draft tokens accepted in a pass", "share of the passes, on rows that do not loop"),
    "acceptance_by_depth": ("Acceptance by depth", "share of all passes that accepted at least this many draft tokens"),
    "conditional_acceptance_by_depth": (
        "Acceptance by depth, once reached",
        "of the passes that had a candidate there",
    ),
    "time_split": ("Where the time goes", "drafting includes what drafters learn after a pass"),
    "speedup_by_tree_size": ("Speed-up by tree size", "nodes of the target's pass, the root included"),
    "speedup_by_batch_size": ("Speed-up by batch size", "against plain decoding at the same batch size"),
}

Draw = Callable[[int, Theme], Figure]


class Pictures:
    """The charts of one setting, by name; a chart without data is not there.

    Args:
        figures: of the report.
        setting: whose charts.
    """

    def __init__(self, figures: Figures, setting: Setting) -> None:
        self._setting = f"{setting.target}, {setting.dtype}, {setting.label([setting])}"
        self._whole: dict[str, Draw] = {}
        self._panels: dict[str, list[Draw]] = {}
        bars, panels = figures.bars(setting), figures.panels(setting)
        histograms, splits = figures.histograms(setting), figures.splits(setting)
        if bars:
            self._whole["speedup"] = partial(charts.speedup_bars, bars)
        if panels:
            self._whole["speedup_by_task"] = partial(charts.task_panels, panels, 3)
            longest = max(charts.reach(bar) for panel in panels for bar in panel.bars)
            self._panels["speedup_by_task"] = [
                partial(charts.task_panels, [panel], 1, longest=longest) for panel in panels
            ]
        if histograms:
            self._whole["accepted_lengths"] = partial(charts.histograms, histograms, 3)
            self._panels["accepted_lengths"] = [
                partial(charts.histograms, [item], 1, among=histograms) for item in histograms
            ]
        if splits:
            self._whole["time_split"] = partial(charts.time_split, splits)
        depth, accepted = "depth in the tree", "share of passes that accepted it"
        self._lines("acceptance_by_depth", figures.depths(setting, False), (depth, accepted), "share")
        accepted = "share accepted, once reached"
        self._lines("conditional_acceptance_by_depth", figures.depths(setting, True), (depth, accepted), "share")
        self._lines("speedup_by_tree_size", figures.by_tree_size(setting), ("nodes per pass", "speed-up"), "speedup")
        self._lines("speedup_by_batch_size", figures.by_batch_size(setting), ("batch size", "speed-up"), "speedup")

    def _lines(self, name: str, lines: list[charts.Line], labels: tuple[str, str], kind: str) -> None:
        if lines:
            self._whole[name] = partial(charts.line_chart, lines, labels, kind)

    def __contains__(self, name: str) -> bool:
        return name in self._whole

    def wide(self, name: str) -> str:
        """The SVG for desktops."""
        return svg(self._whole[name](WIDE, ON_PAGE))

    def narrow(self, name: str) -> str:
        """The SVG for phones."""
        return svg(self._whole[name](NARROW, ON_PAGE))

    def panels(self, name: str) -> list[str]:
        """A chart's panels as SVG each, which the page sets in columns."""
        return [svg(draw(PANEL, ON_PAGE)) for draw in self._panels[name]]

    def save(self, folder: Path, suffix: str) -> list[Path]:
        """Write every chart as ``NAME{suffix}.png`` for print, with its title and the setting."""
        paths = []
        for name, draw in self._whole.items():
            path = folder / f"{name}{suffix}.png"
            with matplotlib.rc_context(_STYLE):
                figure = draw(WIDE, PRINT)
                title, words = _TITLES[name]
                for text, lift, size, weight in (
                    (title, 40, 17, "bold"),
                    (f"{self._setting}; {words}", 22, 11, "normal"),
                ):
                    place = offset_copy(figure.transFigure, figure, x=8, y=lift, units="points")
                    figure.text(
                        0,
                        1,
                        text,
                        transform=place,
                        va="center",
                        fontsize=size,
                        fontweight=weight,
                        color=PRINT.ink if size > 12 else PRINT.muted,
                    )
                figure.savefig(path, dpi=_DOTS_PER_INCH, facecolor=PRINT.surface, bbox_inches="tight", pad_inches=0.2)
            paths.append(path)
        return paths


def svg(figure: Figure) -> str:
    """An ``<svg>`` element to be put into a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2]
    text = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width} {height}" role="img">', text, count=1)
    for name, placeholder in PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    text = re.sub(r"font: ([a-z0-9 ]*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r"(\d+\.\d{2})\d+", r"\1", text)
    own = f"f{next(_counter)}-"
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{own}", text)
    return re.sub(r"\n\s*", "\n", text)
