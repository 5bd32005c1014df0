"""The static trees of Medusa (2401.10774), which Hydra's heads fill too: those that its authors published, and the best
one for known accuracies.

All published trees have 63 nodes and need four heads (``vicuna_33b_stage1`` three). They were grown by adding, again
and again, the node most likely to be accepted according to the accuracies of one model's heads on one set of prompts;
``best_paths`` does the same for any accuracies and any size.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.checkpoints import Checkpoint
from specdec.templates import best_first

# Children by rank path of the parent; "-" is the root.
_PUBLISHED = {
    "mc_sim_7b_63": (
        "-:10 0:10 1:7 2:3 3:2 4:1 5:1 6:1 7:1 8:1 9:1 "
        "00:10 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 20:1 000:2"
    ),
    "vicuna_7b_stage1": (
        "-:10 0:10 1:7 2:4 3:3 4:2 5:2 6:1 7:1 8:1 9:1 "
        "00:9 01:3 02:2 03:1 04:1 05:1 10:2 20:1 000:1"
    ),
    "vicuna_7b_stage2": (
        "-:10 0:10 1:5 2:2 3:2 4:1 5:1 6:1 7:1 "
        "00:9 01:4 02:2 03:1 04:1 05:1 10:3 11:1 20:1 000:4 001:1 002:1 010:1"
    ),
    "vicuna_13b_stage1": (
        "-:10 0:10 1:7 2:4 3:2 4:2 5:1 6:1 7:1 8:1 "
        "00:10 01:4 02:2 03:1 04:1 05:1 10:2 11:1 20:1 000:1"
    ),
    "vicuna_13b_stage2": (
        "-:10 0:10 1:4 2:2 3:1 4:1 5:1 "
        "00:10 01:4 02:2 03:1 04:1 05:1 10:3 11:1 20:1 30:1 000:4 001:2 002:1 010:1 100:1"
    ),
    "vicuna_33b_stage1": (
        "-:10 0:10 1:8 2:5 3:3 4:2 5:2 6:1 7:1 8:1 9:1 "
        "00:9 01:3 02:2 03:1 04:1 10:2 20:1"
    ),
    "vicuna_33b_stage2": (
        "-:10 0:10 1:5 2:3 3:2 4:1 5:1 6:1 7:1 "
        "00:10 01:4 02:2 03:1 04:1 05:1 10:3 11:1 20:1 000:3 001:1 010:1"
    ),
    "zephyr_stage2": (
        "-:10 0:10 1:6 2:4 3:2 4:2 5:1 6:1 7:1 "
        "00:10 01:4 02:2 03:1 04:1 05:1 10:2 11:1 20:1 000:2 001:1"
    ),
}  # fmt: skip
PUBLISHED = tuple(_PUBLISHED)

# Top-1 accuracies of the published Vicuna-7B heads on ShareGPT, and the power of the rank by which the further ranks
# fall off so that the first five sum up to the published top-5 accuracies (.780, .563, .417, .340, .300).
_TOP_1 = (0.560, 0.316, 0.201, 0.147, 0.118)
_FALL = (2.17, 1.47, 1.17, 0.98, 0.83)
_RANKS = 10
# What was never right on a few texts is still a candidate, the last of all.
_RARE = 1e-6


def published_paths(name: str) -> list[tuple[int, ...]]:
    """The 63 rank paths of a published tree.

    Raises:
        ValueError: an unknown name; lists those there are.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"unknown tree {name!r}; known: {', '.join(PUBLISHED)}; or give its rank paths")
    children = (entry.split(":") for entry in _PUBLISHED[name].split())
    return [(*map(int, parent.strip("-")), rank) for parent, count in children for rank in range(int(count))]


def published_accuracies() -> list[list[float]]:
    """How often the token of rank r of head d is the right one, ``[d][r]``, for heads that have told nothing better."""
    return [[top * rank**-fall for rank in range(1, _RANKS + 1)] for top, fall in zip(_TOP_1, _FALL, strict=True)]


def remembered(checkpoint: Checkpoint, num_heads: int) -> list[list[float]] | None:
    """The accuracies in a checkpoint's config, ``[d][r]``, how often the token of rank r of head d was right, if any.

    Raises:
        ValueError: they are no shares, or not of this many heads.
    """
    rates = checkpoint.setting("acceptance", list[list[float]], None)
    if rates is None:
        return None
    if len(rates) != num_heads or not all(0 <= rate <= 1 for row in rates for rate in row):
        raise ValueError(
            f"{checkpoint.place}: expected 'acceptance' to have shares between 0 and 1 for each of the {num_heads} "
            f"heads, got {rates!r:.80}"
        )
    return rates


def best_paths(
    num_nodes: int, num_heads: int, num_choices: int, acceptance: Sequence[Sequence[float]] | None = None
) -> list[tuple[int, ...]]:
    """The rank paths of the tree with the most expected tokens.

    Args:
        num_nodes: nodes, the root not counted.
        num_heads: no node is deeper.
        num_choices: tokens that a head can propose; no rank is higher.
        acceptance: ``[d][r]``, how often the token of rank r of head d is the right one; None = as published.
    """
    accuracies = acceptance or published_accuracies()
    rates = [[max(rate, _RARE) for rate in row[:num_choices]] for row in accuracies]
    return best_first(rates, num_nodes, max_depth=num_heads)
