"""``bench.json`` as pictures, for print and for the page: step time by nodes, growth, profile, memory, speed-ups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from specdec.bench.profiling import PARTS
from specdec.bench.texts import ALL, CALM
from specdec.report.theme import MARKERS, Theme

Draw = Callable[[Theme], Figure]
_WIDTH, _PIXEL, _PITCH = 860, 1 / 72, 28
_NAMES = {"raw_ms": "raw forward", "step_ms": "our step", "compiled_ms": "compiled", "limit_ms": "byte limit"}
_AXES = {"context": "tokens of context", "rows": "batch size", "nodes": "nodes of the tree, root included"}


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def pictures(content: Mapping[str, Any]) -> dict[str, tuple[str, Draw]]:
    """Title and drawing of every picture there are figures for, by file name."""
    sections, found = content["sections"], dict[str, tuple[str, Draw]]()
    if rows := sections.get("step", {}).get("rows"):
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            draw = partial(_lines, _by(own, "nodes"), _AXES["nodes"])
            found[f"step_{model}"] = (f"A step of {model} by nodes", draw)
    if rows := sections.get("growth", {}).get("rows"):
        for axis, words in _AXES.items():
            series = _growing(rows, axis)
            if series:
                found[f"growth_{axis}"] = (f"How a step grows with {words}", partial(_lines, series, words))
    if rows := sections.get("profile", {}).get("rows"):
        found["profile"] = ("Who takes what in one step", partial(_stacked, rows))
    if rows := sections.get("memory", {}).get("rows"):
        bars = sorted(((row["drafter"], row["step_bytes"] / 1e6) for row in rows), key=lambda bar: bar[1])
        found["memory"] = ("Peak beyond weights and K/V in the steps", partial(_bars, bars, "MB"))
    if rows := sections.get("end_to_end", {}).get("rows"):
        for batch in dict.fromkeys(row["batch_size"] for row in rows):
            speeds = _speeds([row for row in rows if row["batch_size"] == batch])
            title = f"Speed-up against the faster generate, batch size {batch}"
            found[f"end_to_end_{batch}"] = (title, partial(_bars, speeds, "x"))
    return found


def _speeds(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    calm = [row for row in rows if row["subset"] == CALM] or [row for row in rows if row["subset"] == ALL]
    found = [(row["method"], row["vs_generate"]) for row in calm if row["vs_generate"] is not None]
    return sorted(found, key=lambda bar: -bar[1])


def _by(rows: Iterable[Mapping[str, Any]], axis: str, suffix: str = "") -> list[Series]:
    """A line per kind of time that the rows have."""
    ordered = sorted(rows, key=lambda row: row[axis])
    lines = []
    for key, name in _NAMES.items():
        points = [(row[axis], _value(row[key])) for row in ordered if key in row]
        if points:
            lines.append(Series(name + suffix, points, dashed=key == "limit_ms"))
    return lines


def _growing(rows: Sequence[Mapping[str, Any]], axis: str) -> list[Series]:
    """The rows in which the other two stay at their first values; for context and batch a set of lines per tree."""
    others = [name for name in _AXES if name != axis and name != "nodes"]
    still = [row for row in rows if all(row[name] == rows[0][name] for name in others)]
    if axis == "nodes":
        lines = _by(still, axis)
    else:
        groups = {size: [row for row in still if row["nodes"] == size] for size in {row["nodes"]: 0 for row in still}}
        lines = [
            line
            for size, own in groups.items()
            if len(own) > 1
            for line in _by(own, axis, f", {size} node{'s' * (size > 1)}")
        ]
    return [line for line in lines if len(line.points) > 1]


def _value(time: Any) -> float:
    return time["median"] if isinstance(time, Mapping) else time


def _lines(series: Sequence[Series], label: str, theme: Theme) -> Figure:
    figure, axes = _canvas(theme, 320, left=64, right=230)
    for index, line in enumerate(series):
        axes.plot(
            *zip(*line.points, strict=True), color=theme.color(index), marker=MARKERS[index % len(MARKERS)],
            linewidth=2, markersize=6, linestyle="--" if line.dashed else "-", label=line.label,
        )  # fmt: skip
    places = sorted({x for line in series for x, _ in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.minorticks_off()
    highest = max(y for line in series for _, y in line.points)
    lowest = min(y for line in series for _, y in line.points)
    if highest > 20 * lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
    else:
        axes.set_ylim(0, highest * 1.08)
    axes.set_xlabel(label)
    axes.set_ylabel("ms, median")
    axes.grid(color=theme.grid, linewidth=1)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=11, labelcolor=theme.ink, handlelength=2.2
    )
    return figure


def _bars(bars: Sequence[tuple[str, float]], unit: str, theme: Theme) -> Figure:
    figure, axes = _canvas(theme, len(bars) * _PITCH, left=230, right=70)
    _names(axes, [name for name, _ in bars], theme)
    colors = [theme.color(None if name == "none" or name.startswith("transformers") else 0) for name, _ in bars]
    axes.barh(range(len(bars)), [value for _, value in bars], height=0.6, color=colors, linewidth=0)
    for row, (_, value) in enumerate(bars):
        axes.annotate(
            f"{value:.2f}{unit if unit == 'x' else ' ' + unit}", (value, row), (6, 0), textcoords="offset points",
            va="center", fontsize=11, color=theme.ink,
        )  # fmt: skip
    if unit == "x":
        axes.axvline(1.0, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)))
    return figure


def _stacked(rows: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    said = [", compiled" * row.get("compiled", False) for row in rows]
    labels = [f"{row['model']}, {row['nodes']} x {row['rows']}{more}" for row, more in zip(rows, said, strict=True)]
    figure, axes = _canvas(theme, len(rows) * _PITCH, left=230, right=220)
    _names(axes, labels, theme)
    used = [part for part in PARTS if any(row["parts_ms"].get(part) for row in rows)]
    starts = [0.0] * len(rows)
    for index, part in enumerate(used):
        shares = [row["parts_ms"].get(part, 0.0) / row["step_ms"] for row in rows]
        own: dict[str, Any] = {"color": theme.color(index), "linewidth": 0, "label": part}
        if index >= len(theme.series):
            own |= {"hatch": "////", "edgecolor": theme.surface}
        axes.barh(range(len(rows)), shares, left=starts, height=0.62, **own)
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.02, 1.04), frameon=False, fontsize=10, labelcolor=theme.ink,
        labelspacing=0.25, handlelength=1.2,
    )  # fmt: skip
    return figure


def _names(axes: Axes, labels: Sequence[str], theme: Theme) -> None:
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=theme.ink, labelsize=11)
    axes.grid(axis="x", color=theme.grid, linewidth=1)


def _canvas(theme: Theme, inner: int, left: int, right: int) -> tuple[Figure, Axes]:
    """Axes of a height in pixels without a frame, with room for names on both sides."""
    top, bottom = 12, 48
    inner = max(inner, 300 if right == 220 else 60)  # a legend of all parts stands beside
    height = top + inner + bottom
    figure = Figure((_WIDTH * _PIXEL, height * _PIXEL), dpi=72, facecolor=theme.surface)
    box = (left / _WIDTH, bottom / height, (_WIDTH - left - right) / _WIDTH, inner / height)
    axes = figure.add_axes(box)
    axes.set_facecolor("none")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=10.5, labelcolor=theme.muted)
    axes.xaxis.label.set(color=theme.muted, fontsize=11)
    axes.yaxis.label.set(color=theme.muted, fontsize=11)
    axes.set_axisbelow(True)
    return figure, axes
