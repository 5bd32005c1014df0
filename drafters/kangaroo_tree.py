"""Kangaroo's tree: the best nodes of every level are expanded, and every node that was expanded is verified.

EAGLE-2 (2406.16858) ranks all scored nodes in the end and keeps the best, some expanded ones not among them. Here the
lower layers of the target have read the expanded nodes in their own slots of its cache, so these nodes keep their
places and their numbers, and the best of the others, leaves all of them, come behind. Nothing moves, and no layer reads
a node twice.

Shapes: B rows, N nodes, w nodes expanded per level, M leaves to choose from, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drafters.ranked_trees import best_children, roles
from specdec.transfer import upload
from specdec.tree import TokenTree, Topology, root_only

Scores = Callable[[TokenTree, slice], Tensor]
"""``scores(tree, nodes)`` runs the newest nodes of a growing tree -> float32 ``[B, n, V]``: log q up to a constant."""


@dataclass(frozen=True)
class _Level:
    """Nodes that were scored, ``[B, m]`` each: tokens, log of the path's probability, parents, rank among siblings."""

    tokens: Tensor
    values: Tensor
    parents: Tensor
    ranks: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.tokens, self.values, self.parents, self.ranks

    def at(self, chosen: Tensor) -> _Level:
        return _Level(*(part.gather(1, chosen) for part in self.parts))


@dataclass(frozen=True)
class ExpandedTree:
    """``width`` nodes expanded per level by ``width`` children each, up to ``depth`` levels and ``num_nodes`` in all.

    Attributes:
        depth: of the deepest node.
        width: nodes expanded per level, and children of each.
        num_nodes: of the tree, root not counted.
    """

    depth: int
    width: int
    num_nodes: int

    @property
    def max_nodes(self) -> int:
        """N of the largest tree."""
        return self.num_nodes + 1

    def grow(
        self, root: Tensor, scores: Scores, depth: int, threshold: float, active: list[bool]
    ) -> tuple[TokenTree, int]:
        """One tree per row.

        Args:
            root: int64 ``[B]``.
            scores: the draft.
            depth: levels to grow, at least one and at most ``self.depth``.
            threshold: a row grows no further where the token that ends its best path is less likely than this under
                the draft, given the path before it; that level stays. 0 = never, and nothing is read off the device.
            active: rows to draft for; the others get padding.

        Returns:
            the tree, and how many of its nodes have been run: the first ones.
        """
        growing = upload(active, root.device)[:, None]
        first = torch.zeros_like(root[:, None])
        run = [_Level(root[:, None], first.float(), first, first)]
        level, sure = self._children(scores(root_only(root), slice(0, 1)), run[0], 0, growing)
        leaves: list[_Level] = []
        for reached in range(1, depth):
            if threshold > 0:
                growing = growing & (sure.exp() >= threshold)
                if not growing.any():
                    break
            chosen = level.values.topk(self.width).indices
            if reached > 1:  # of the first level all are expanded
                leaves.append(_Level(level.tokens, level.values.scatter(1, chosen, -torch.inf), *level.parts[2:]))
            start = sum(part.tokens.shape[1] for part in run)
            run.append(level.at(chosen))
            scored = scores(_tree_of(run, reached), slice(start, start + self.width))
            level, sure = self._children(scored, run[-1], start, growing)
        return self._with_leaves(run, [*leaves, level])

    def _children(self, scores: Tensor, parents: _Level, start: int, growing: Tensor) -> tuple[_Level, Tensor]:
        """Children of the nodes numbered from ``start`` on, and log q of the one that ends the best path ``[B, 1]``."""
        batch, count = parents.tokens.shape
        tokens, steps = best_children(scores, self.width)
        values = (parents.values[..., None] + steps).flatten(1)
        sure = steps.flatten(1).gather(1, values.argmax(1, keepdim=True))
        above = torch.arange(start, start + count, device=tokens.device).repeat_interleave(self.width)
        ranks = torch.arange(self.width, device=tokens.device).repeat(count)
        values = values.masked_fill(~growing, -torch.inf)
        return _Level(tokens.flatten(1), values, above.expand(batch, -1), ranks.expand(batch, -1)), sure

    def _with_leaves(self, run: list[_Level], pools: list[_Level]) -> tuple[TokenTree, int]:
        count = sum(level.tokens.shape[1] for level in run)
        pool = _joined(pools)
        known = sum(level.tokens.shape[1] for level in pools) - self.width * (len(pools) - 1)
        best = pool.values.topk(min(self.num_nodes + 1 - count, known)).indices
        whole = _joined([*run, pool.at(best)])
        tree = _tree_of([whole], len(run))
        tree.role = roles(whole.values[:, 1:] == -torch.inf)
        tree.rank = whole.ranks
        return tree, count


def _joined(levels: list[_Level]) -> _Level:
    return _Level(*(torch.cat(parts, 1) for parts in zip(*(level.parts for level in levels), strict=True)))


def _tree_of(levels: list[_Level], depth: int) -> TokenTree:
    whole = _joined(levels)
    return TokenTree(whole.tokens, Topology(whole.parents, depth))
