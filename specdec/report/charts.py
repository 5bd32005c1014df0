"""The charts: each takes plain values and a width in pixels, and returns a figure.

Sizes are in CSS pixels throughout, one of which is one unit of the SVG's view box. A narrow chart (below ``NARROW``)
puts names above their bars instead of beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from specdec.metrics import PHASES
from specdec.report.theme import MARKERS, Theme

NARROW = 520
PARTS = (*PHASES, "decode", "other")
"""Of the time of a call: the phases of our loop, the decoding of other loops, and the rest."""

_PIXEL = 1 / 72  # of an inch, at the 72 dots per inch of matplotlib's SVG


@dataclass(frozen=True)
class Bar:
    """One method in a bar chart.

    Attributes:
        label: its name.
        color: index of its colour; None is no drafter of ours.
        value: length of the bar, over rows that do not loop where there are such figures.
        all_rows: the same over all rows; None where it is not known.
        cold: the same from a cold start; None where it is not known.
        note: shown after the value.
    """

    label: str
    color: int | None
    value: float
    all_rows: float | None = None
    cold: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One series: ``points`` are (x, y) in order of x."""

    label: str
    color: int | None
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Split:
    """One method's seconds by phase, in the order of ``PARTS``."""

    label: str
    color: int | None
    seconds: Sequence[float]


@dataclass(frozen=True)
class Histogram:
    """How many passes accepted how many draft tokens; ``mean`` counts the bonus token too."""

    label: str
    color: int | None
    counts: dict[int, int]
    mean: float | None = None


@dataclass(frozen=True)
class Panel:
    """A titled group of bars."""

    title: str
    bars: Sequence[Bar] = field(default_factory=tuple)


def reach(bar: Bar) -> float:
    """The furthest that a bar or one of its marks goes."""
    return max(value for value in (bar.value, bar.all_rows, bar.cold) if value is not None)


def speedup_bars(bars: Sequence[Bar], width: int, theme: Theme) -> Figure:
    """Horizontal bars sorted by length, with a line at 1.0x."""
    narrow = width < NARROW
    pitch = 36 if narrow else 26
    figure, axes = _axes(theme, width, _heights(len(bars), pitch), _label_margin([b.label for b in bars], narrow))
    _draw_bars(axes, bars, theme, pitch, _value_space([] if narrow else bars, axes))
    axes.set_xlabel("speed-up against plain decoding")
    return figure


def task_panels(panels: Sequence[Panel], columns: int, width: int, theme: Theme, longest: float = 0.0) -> Figure:
    """One small bar chart per task; all share one scale, which reaches ``longest`` at least."""
    pitch, titles = 30, 34
    rows = -(-len(panels) // columns)
    tallest = [max(len(panel.bars) for panel in panels[row * columns : (row + 1) * columns]) for row in range(rows)]
    heights = [count * pitch + titles + 26 for count in tallest]
    figure = _figure(theme, width, sum(heights))
    longest = max([longest, *(reach(bar) for panel in panels for bar in panel.bars)])
    column = width / columns
    for index, panel in enumerate(panels):
        row = index // columns
        top = sum(heights[:row]) + titles
        box = (index % columns * column + 8, top, column - 24, len(panel.bars) * pitch)
        axes = _place(figure, theme, box)
        _draw_bars(axes, panel.bars, theme, pitch, 0.34, longest, inside=True)
        axes.set_title(panel.title, loc="left", fontsize=12.5, fontweight="bold", color=theme.ink, pad=6)
    return figure


def histograms(
    data: Sequence[Histogram], columns: int, width: int, theme: Theme, among: Sequence[Histogram] = ()
) -> Figure:
    """Share of passes by accepted draft tokens, one small chart per method on one scale, that of ``among`` too."""
    rows, height = -(-len(data) // columns), 168
    figure = _figure(theme, width, rows * height)
    longest = max(max(item.counts) for item in [*data, *among])
    highest = max(max(item.counts.values()) / sum(item.counts.values()) for item in [*data, *among])
    column = width / columns
    for index, item in enumerate(data):
        box = (index % columns * column + 38, index // columns * height + 34, column - 54, height - 34 - 40)
        axes = _place(figure, theme, box)
        total = sum(item.counts.values())
        lengths = sorted(item.counts)
        shares = [item.counts[length] / total for length in lengths]
        axes.bar(lengths, shares, width=0.82, **_fill(theme, item.color))
        axes.set_xlim(-0.6, max(longest, 4) + 0.6)
        axes.set_ylim(0, highest * 1.16)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.grid(axis="y", color=theme.grid, linewidth=1)
        axes.annotate(
            item.label, (0, 1), (-34, 10), xycoords="axes fraction", textcoords="offset points", fontsize=12,
            fontweight="bold", color=theme.ink,
        )  # fmt: skip
        if item.mean is not None:
            axes.text(
                *(0.985, 0.97), f"mean {item.mean:.2f} with bonus",
                transform=axes.transAxes, ha="right", va="top", fontsize=10, color=theme.muted,
            )  # fmt: skip
        axes.set_xlabel("draft tokens accepted in a pass", fontsize=10)
    return figure


def line_chart(lines: Sequence[Line], labels: tuple[str, str], kind: str, width: int, theme: Theme) -> Figure:
    """Lines with markers, named beside the chart where there is room and below it where there is not.

    Args:
        lines: the series.
        labels: of the two axes.
        kind: ``share`` (y from 0 to 1), ``speedup`` (a line at 1.0x) or ``tokens`` (from 1.0).
        width: in pixels.
        theme: the colours.
    """
    narrow = width < NARROW
    longest = max(len(line.label) for line in lines)
    columns = 2 if narrow and longest <= 20 else 1
    names = 17 * -(-len(lines) // columns) + 12 if narrow else 0
    right = 14 if narrow else 64 + int(longest * 6.8)
    height = 240 if narrow else max(280, 19 * len(lines) + 24)
    total = height + 66 + names
    figure = _figure(theme, width, total)
    axes = _place(figure, theme, (56, 14, width - 56 - right, height))
    # From top to bottom as the lines begin.
    for line in sorted(lines, key=lambda line: -line.points[0][1]):
        axes.plot(
            *zip(*line.points, strict=True), color=theme.color(line.color), marker=_marker(lines, line), markersize=6.5,
            linewidth=2, linestyle="--" if _repeats(theme, line.color) else "-", markeredgecolor=theme.surface,
            markeredgewidth=0.8, label=line.label, clip_on=False, zorder=3,
        )  # fmt: skip
    _scale(axes, kind, lines, theme)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(color=theme.grid, linewidth=1)
    axes.set_axisbelow(True)
    place = (0.0, (names - 2) / total) if narrow else (1 - (right - 12) / width, 1 - 10 / total)
    figure.legend(
        loc="upper left", bbox_to_anchor=place, ncols=columns, frameon=False, fontsize=11, labelcolor=theme.ink,
        handlelength=2, borderpad=0, borderaxespad=0, labelspacing=0.5, columnspacing=1.2,
    )  # fmt: skip
    return figure


def time_split(splits: Sequence[Split], width: int, theme: Theme) -> Figure:
    """Seconds by phase, stacked, one bar per method."""
    narrow = width < NARROW
    pitch, legend = (38, 58) if narrow else (28, 34)
    left = _label_margin([split.label for split in splits], narrow)
    figure = _figure(theme, width, legend + len(splits) * pitch + 48)
    axes = _place(figure, theme, (left, legend, width - left - 16, len(splits) * pitch))
    _bar_axis(axes, [split.label for split in splits], theme, pitch, narrow)
    longest = max((sum(split.seconds) for split in splits), default=1.0) or 1.0
    axes.set_xlim(0, longest * (1.24 if narrow else 1.12))
    thickness = 14 / pitch if narrow else 0.62
    for row, split in enumerate(splits):
        start = 0.0
        for color, seconds in zip(theme.phases, split.seconds, strict=True):
            seconds = max(seconds, 0.0)  # the rest is a difference of clocks
            axes.barh(row, seconds, left=start, height=thickness, color=color, linewidth=0)
            start += seconds
        axes.text(start + longest * 0.012, row, f"{start:.3g} s", va="center", fontsize=11, color=theme.ink)
    axes.set_xlabel("seconds, all rows")
    used = [any(split.seconds[index] > 0 for split in splits) for index in range(len(PARTS))]
    parts = [item for item, there in zip(zip(PARTS, theme.phases, strict=True), used, strict=True) if there]
    handles = [Patch(facecolor=color, label=name) for name, color in parts]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=3 if narrow else 6, frameon=False,
        fontsize=11, labelcolor=theme.ink, handlelength=1.2, handleheight=0.9, columnspacing=1.6,
    )  # fmt: skip
    return figure


def _draw_bars(
    axes: Axes, bars: Sequence[Bar], theme: Theme, pitch: int, room: float, longest: float = 0.0, inside: bool = False
) -> None:
    narrow = inside or axes.get_figure().get_figwidth() / _PIXEL < NARROW  # type: ignore[union-attr]
    _bar_axis(axes, [bar.label for bar in bars], theme, pitch, narrow)
    furthest = max([longest, 1.05, *(reach(bar) for bar in bars)])
    axes.set_xlim(0, furthest * (1 + room))
    thickness = (11 if inside else 13) / pitch if narrow else 0.6
    for row, bar in enumerate(bars):
        axes.barh(row, bar.value, height=thickness, zorder=2, **_fill(theme, bar.color))
        for value, marker, size in ((bar.all_rows, "D", 5.5), (bar.cold, "|", 12)):
            if value is not None:
                axes.plot(
                    [value], [row], marker=marker, markersize=size, markerfacecolor=theme.surface,
                    markeredgecolor=theme.ink, markeredgewidth=1.4, linestyle="none", zorder=4,
                )  # fmt: skip
        text = axes.annotate(
            f"{bar.value:.2f}x", (reach(bar), row), (8, 0), textcoords="offset points", va="center",
            fontsize=11, fontweight="bold", color=theme.ink, bbox=_behind(theme), zorder=5,
        )  # fmt: skip
        if bar.note and not narrow:
            axes.annotate(
                bar.note, (1, 0.5), (8, 0), xycoords=text, textcoords="offset points", va="center",
                fontsize=10.5, color=theme.muted, bbox=_behind(theme), zorder=5,
            )  # fmt: skip
    axes.axvline(1.0, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if narrow else 8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_times))


def _times(value: float, _: Any) -> str:
    return f"{value:g}x"


def _heights(count: int, pitch: int) -> tuple[int, int, int]:
    return 6, count * pitch, 40


def _value_space(bars: Sequence[Bar], axes: Axes) -> float:
    """Room after the longest bar for its value and note, as a share of that bar."""
    characters = 7 + max((len(bar.note) for bar in bars), default=0)
    pixels = axes.get_position().width * axes.get_figure().get_figwidth() / _PIXEL  # type: ignore[union-attr]
    needed = 6.4 * characters + 14
    return needed / max(pixels - needed, 40)


def _label_margin(labels: Sequence[str], narrow: bool) -> int:
    return 8 if narrow else 14 + int(max((len(label) for label in labels), default=0) * 6.9)


def _figure(theme: Theme, width: float, height: float) -> Figure:
    return Figure((width * _PIXEL, height * _PIXEL), dpi=72, facecolor=theme.surface)


def _axes(theme: Theme, width: int, heights: tuple[int, int, int], left: int) -> tuple[Figure, Axes]:
    top, inner, bottom = heights
    figure = _figure(theme, width, top + inner + bottom)
    return figure, _place(figure, theme, (left, top, width - left - 14, inner))


def _place(figure: Figure, theme: Theme, box: tuple[float, float, float, float]) -> Axes:
    """Axes at ``(left, top, width, height)`` in pixels, without a frame."""
    width, height = (size / _PIXEL for size in figure.get_size_inches())
    left, top, wide, tall = box
    axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
    axes.set_facecolor("none")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=10.5, labelcolor=theme.muted, pad=5)
    axes.xaxis.label.set(color=theme.muted, fontsize=11)
    axes.yaxis.label.set(color=theme.muted, fontsize=11)
    return axes


def _bar_axis(axes: Axes, labels: Sequence[str], theme: Theme, pitch: int, narrow: bool) -> None:
    """A row per label, the first on top; narrow: the label above its bar."""
    axes.grid(axis="x", color=theme.grid, linewidth=1)
    axes.set_axisbelow(True)
    if not narrow:
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", labelsize=11.5, labelcolor=theme.ink)
        return
    lift = 9 / pitch  # bars sit below the middle of their row
    axes.set_ylim(len(labels) - 0.5 - lift, -0.5 - lift)
    axes.set_yticks([])
    for row, label in enumerate(labels):
        axes.annotate(
            label, (0, row), (0, 8), textcoords="offset points", va="bottom", fontsize=11, color=theme.ink, zorder=5,
            bbox=_behind(theme),
        )  # fmt: skip


def _behind(theme: Theme) -> dict[str, Any]:
    """What keeps lines from running through a text."""
    return {"facecolor": theme.surface, "edgecolor": "none", "pad": 1}


def _repeats(theme: Theme, color: int | None) -> bool:
    return color is not None and color >= len(theme.series)


def _fill(theme: Theme, color: int | None) -> dict[str, Any]:
    """Fill of a bar; hatched where the colours have come round again."""
    hatch = {"hatch": "////", "edgecolor": theme.surface} if _repeats(theme, color) else {}
    return {"facecolor": theme.color(color), "linewidth": 0, **hatch}


def _marker(lines: Sequence[Line], line: Line) -> str:
    """The drafter's own; lines of one colour differ by theirs."""
    alike = [other for other in lines if other.color == line.color]
    first = len(MARKERS) // 2 if line.color is None else line.color
    return MARKERS[(first + 5 * alike.index(line)) % len(MARKERS)]


def _scale(axes: Axes, kind: str, lines: Sequence[Line], theme: Theme) -> None:
    xs = sorted({x for line in lines for x, _ in line.points})
    if len(xs) <= 10 and all(b - a >= 0.06 * (xs[-1] - xs[0]) for a, b in pairwise(xs)):
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if kind == "share":
        highest = max(y for line in lines for _, y in line.points)
        axes.set_ylim(0, min(highest * 1.06, 1.01) or 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        return
    highest = max((y for line in lines for _, y in line.points), default=1.0)
    axes.set_ylim(0, max(highest * 1.08, 1.2))
    axes.axhline(1.0, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    if kind == "speedup":
        axes.yaxis.set_major_formatter(FuncFormatter(_times))
