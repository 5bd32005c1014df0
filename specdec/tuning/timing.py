"""What a pass of this target costs on this device, by the number of nodes.

Sizes take turns, so that a drift of the machine hits all alike; the median of each counts; first passes do not. A pass
here is what the loop runs: inputs and masks made, the whole tree computed, the device waited for.

Shapes: B rows, N nodes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch

from specdec.interfaces import Context, Tap
from specdec.target import Target
from specdec.tree import TokenTree, from_host
from specdec.tuning.choice import envelope

_BRANCHING = 3  # of the trees that are timed: as bushy as drafters' trees are
_COARSE = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128)


def graph_sizes(target: Target) -> list[int] | None:
    """The sizes to which a compiled target pads its passes, ascending; None where passes are as they are."""
    return None if target.graphs is None else list(target.graphs.buckets)


def sizes_up_to(max_nodes: int, compiled: Sequence[int] | None = None, coarse: bool = False) -> list[int]:
    """The sizes worth timing, ascending; ``max_nodes`` is the last.

    Args:
        max_nodes: of the largest tree, the root included.
        compiled: sizes that graphs are made for, where passes are compiled: nothing in between has a time of its own.
        coarse: few of them, for a measurement that a request waits for.
    """
    if compiled is not None:
        sizes = [size for size in compiled if size <= max_nodes]
        return sizes or [max_nodes]
    every = _COARSE if coarse else (*range(1, 33), *range(34, 65, 2), *range(68, max_nodes + 1, 4))
    return sorted({*(size for size in every if size < max_nodes), max_nodes})


def pass_seconds(
    target: Target,
    context: Context,
    sizes: Sequence[int],
    repeats: int,
    taps: Sequence[Tap] = (),
    limit_s: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, float]:
    """Median seconds of a pass over trees of each size.

    Args:
        target: whose pass.
        context: a request under way; nothing is committed to it.
        sizes: N, the root included.
        repeats: timed passes per size.
        taps: states that the drafter will have recorded.
        limit_s: for a measurement that a request waits for: after so many seconds nothing more is timed. Sizes that
            were not come to are left out, never the smallest and the largest; only the largest one is warmed up. Where
            passes run as graphs every size is warmed up and timed, since its first pass makes the graph. Warming up is
            not counted.
        progress: told (done, of) rounds.
    """
    trees = {size: _tree(size, target, len(context.lengths)) for size in sizes}
    spent: dict[int, list[float]] = {size: [] for size in sizes}
    for size in sizes if limit_s is None or target.graphs is not None else sizes[-1:]:
        target.run(context, trees[size], taps=taps)
    _wait(target.device)
    begun, needed = perf_counter(), {sizes[0], sizes[-1]} if target.graphs is None else {*sizes}
    for turn in range(repeats):
        # There and back again: a pass that profits from its neighbour has another one the next time.
        order = sizes if turn % 2 else sizes[::-1]
        for size in sorted(order, key=lambda size: size not in needed) if limit_s is not None and not turn else order:
            late = limit_s is not None and perf_counter() - begun > limit_s
            if late and all(spent[one] for one in needed):
                break
            _wait(target.device)
            start = perf_counter()
            target.run(context, trees[size], taps=taps)
            _wait(target.device)
            spent[size].append(perf_counter() - start)
        if progress is not None:
            progress(turn + 1, repeats)
    return {size: statistics.median(times) for size, times in spent.items() if times}


def curve(times: dict[int, float], stairs: bool = False) -> np.ndarray:
    """float64 ``[M]``: seconds of a pass over 1..M nodes that never fall, M the largest size timed.

    Args:
        times: size -> seconds.
        stairs: passes are padded to the next size timed; else what lies between two sizes lies on a line.
    """
    sizes = np.array(sorted(times))
    seconds = envelope([times[int(size)] for size in sizes])
    every = np.arange(1, sizes[-1] + 1)
    if stairs:
        return seconds[np.searchsorted(sizes, every)]
    return np.interp(every, sizes, seconds)


def _tree(nodes: int, target: Target, rows: int) -> TokenTree:
    parents = [max(node - 1, 0) // _BRANCHING for node in range(nodes)]
    ids = torch.arange(nodes, device=target.device).remainder(target.vocab_size).expand(rows, -1).clone()
    return TokenTree(ids, from_host([parents], target.device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
