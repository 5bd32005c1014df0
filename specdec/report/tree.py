"""The picture of a tree file: what a pass costs, what is accepted, and the tokens per second of every size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from specdec.report.theme import MARKERS, PRINT, Theme
from specdec.tuning.choice import choose, expect
from specdec.tuning.files import TreeFile

_RANKS = 5  # drawn at most


def draw(file: TreeFile, path: Path, theme: Theme = PRINT) -> None:
    """Write a PNG with three panels."""
    figure = Figure(figsize=(13, 4.2), facecolor=theme.surface, layout="constrained")
    times, rates, speeds = figure.subplots(1, 3)
    _passes(times, file, theme)
    _acceptance(rates, file, theme)
    _speeds(speeds, file, theme)
    where = ", ".join(str(file.made_on[key]) for key in ("target", "dtype", "device") if key in file.made_on)
    figure.suptitle(f"{file.drafter} on {where}", color=theme.ink, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=120, facecolor=theme.surface)


def _passes(axes: Axes, file: TreeFile, theme: Theme) -> None:
    by_context = file.more.get("pass_seconds_by_context", {})
    for index, (context, times) in enumerate(by_context.items()):
        sizes = sorted(times)
        values = [1e3 * times[size] for size in sizes]
        axes.plot(sizes, values, ".", color=theme.series[index % 12], label=f"median behind {context} tokens")
    every = np.arange(1, file.costs.max_nodes + 1)
    axes.plot(every, 1e3 * file.costs.passes, color=theme.ink, linewidth=1, label="what is reckoned with")
    _dress(axes, theme, "What a pass costs", "nodes, the root included", "milliseconds")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink)


def _acceptance(axes: Axes, file: TreeFile, theme: Theme) -> None:
    rates = np.array(file.profile.rates)
    depths = np.arange(1, len(rates) + 1)
    names = ["next of the chain", "beside it"] if file.profile.is_chain else [f"rank {rank}" for rank in range(_RANKS)]
    for rank, name in enumerate(names[: rates.shape[1]]):
        axes.plot(depths, rates[:, rank], color=theme.series[rank], marker=MARKERS[rank], markersize=4, label=name)
    _dress(axes, theme, "What is accepted", "depth", "share, once the parent was accepted")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink)


def _speeds(axes: Axes, file: TreeFile, theme: Theme) -> None:
    profile, costs = file.profile, file.costs
    if profile.is_chain:
        trees = [[(0,) * depth for depth in range(1, n + 1)] for n in range(1, len(profile.rates) + 1)]
        found = [expect(tree, profile, costs) for tree in trees]
    else:
        depth = len(profile.rates)
        sized = [(n, choose(profile, costs, costs.max_nodes, depth, {n})) for n in range(2, costs.max_nodes + 1)]
        found = [choice for n, choice in sized if len(choice.paths) + 1 == n]
    sizes = [len(choice.paths) + 1 for choice in found]
    axes.plot(sizes, [choice.rate for choice in found], color=theme.series[0], label="best tree of this size")
    for name, mark in (("chosen", "o"), ("published", "s")):
        if name in file.expected:
            at = file.expected[name]
            axes.plot(at["nodes"], at["tokens_per_second"], mark, color=theme.series[1], label=name)
    axes.axhline(1 / costs.plain, color=theme.muted, linewidth=1, linestyle="--", label="plain decoding")
    _dress(axes, theme, "Expected speed", "nodes, the root included", "tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink)


def _dress(axes: Axes, theme: Theme, title: str, across: str, up: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=theme.ink)
    axes.set_xlabel(across, color=theme.muted, fontsize=9)
    axes.set_ylabel(up, color=theme.muted, fontsize=9)
    axes.tick_params(colors=theme.muted, labelsize=8)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor(theme.surface)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
