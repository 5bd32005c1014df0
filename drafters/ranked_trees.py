"""How a draft model grows a tree level by level, and the shape that ranks what it has scored.

``drafters.sampled_trees`` has the shapes that can draw their children. Deterministic trees are point masses: no draws.

Shapes: B rows, N nodes, M scored nodes, n nodes of a level, w of the next one, k children of a node, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.selection import argmax, top_k
from specdec.tree import CANDIDATE, PADDING, TokenTree, Topology

Uniforms = Callable[..., Tensor]
"""``uniforms(*shape)`` -> float64 in [0, 1), on the device of the scores."""


class Passes(Protocol):
    """The draft model as the shapes see it. Nodes that were run are counted from 0, the root."""

    def root(self) -> Tensor:
        """Scores after the root, ``[B, 1, V]``: log-probabilities of q up to a constant."""
        ...

    def expand(self, tokens: Tensor, parents: Tensor | tuple[int, ...]) -> Tensor:
        """Run ``tokens [B, w]`` below nodes ``parents [1 or B, w]`` -> scores ``[B, w, V]``."""
        ...


@dataclass
class Grown:
    """A tree and which of its nodes the draft model has run.

    Attributes:
        tree: the proposal.
        run: int64 ``[1 or B, N]``, the number of the node among those that were run; -1 = it was not.
    """

    tree: TokenTree
    run: Tensor


class Shape(Protocol):
    """A rule by which trees grow.

    Attributes:
        depth: of its deepest node.
        max_nodes: of its largest tree, root included.
        widest: most children of a node.
        level: most nodes that the draft model runs at once.
    """

    @property
    def depth(self) -> int: ...

    @property
    def max_nodes(self) -> int: ...

    @property
    def widest(self) -> int: ...

    @property
    def level(self) -> int: ...

    def grow(self, root: Tensor, passes: Passes, depth: int, uniforms: Uniforms | None) -> Grown:
        """One tree per row.

        Args:
            root: int64 ``[B]``.
            passes: the draft model.
            depth: levels to grow, at least one and at most ``self.depth``.
            uniforms: what samples are drawn by; None = take the most likely tokens.
        """
        ...


def best_children(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens and their log-probabilities: ``[B, n, V]`` -> int64 and float32 ``[B, n, k]``."""
    tokens = argmax(scores).unsqueeze(-1) if count == 1 else top_k(scores, count)
    # Rounding must not make a child worth more than its parent.
    return tokens, (scores.gather(-1, tokens) - scores.logsumexp(-1, keepdim=True)).clamp_(max=0.0)


def roles(dead: Tensor) -> Tensor:
    """Roles of ``[B, N-1]`` nodes below the root."""
    return pad(dead.long() * PADDING, (1, 0), value=CANDIDATE)


def run_until(nodes: int, count: int, device: torch.device) -> Tensor:
    """``run`` of a tree whose first ``count`` nodes were run in their own order."""
    node = torch.arange(nodes, device=device)
    return torch.where(node < count, node, -1)[None]


@dataclass(frozen=True)
class TopK:
    """The tree of EAGLE-2 (arXiv:2406.16858): expand the best, then keep the best of all that was scored.

    A node is worth the product of the draft probabilities on its path. On every level the ``width`` best nodes are
    expanded by ``width`` children each; in the end the ``num_nodes`` best of all levels stay. No child is worth more
    than its parent, so they are closed under ancestors. (EAGLE-2 calls one level less its depth.)
    """

    depth: int
    width: int
    num_nodes: int

    @property
    def max_nodes(self) -> int:
        return min(self.num_nodes, self._scored(self.depth)) + 1

    @property
    def widest(self) -> int:
        return self.width

    @property
    def level(self) -> int:
        return self.width

    def _scored(self, depth: int) -> int:
        return self.width + self.width**2 * (depth - 1)

    def grow(self, root: Tensor, passes: Passes, depth: int, uniforms: Uniforms | None) -> Grown:  # noqa: ARG002
        width, batch, device = self.width, root.shape[0], root.device
        tokens, values = (part.flatten(1) for part in best_children(passes.root(), width))
        parents = torch.full_like(tokens, -1)  # index of the parent among all scored nodes; -1 = root
        pools, runs = [(tokens, values, parents)], []
        beam = torch.arange(width, device=device).expand(batch, -1)  # the nodes to expand, among all scored ones
        below: Tensor | tuple[int, ...] = (0,) * width
        for level in range(1, depth):
            runs.append(beam)
            scores = passes.expand(tokens, below)
            following, steps = best_children(scores, width)
            reached = (values[..., None] + steps).flatten(1)
            pools.append((following.flatten(1), reached, beam.repeat_interleave(width, 1)))
            values, chosen = reached.topk(width)
            tokens = following.flatten(1).gather(1, chosen)
            beam = chosen + (width + width**2 * (level - 1))
            below = chosen // width + (1 + width * (level - 1))
        run = torch.full((batch, self._scored(depth)), -1, device=device)
        if runs:
            order = torch.arange(1, width * len(runs) + 1, device=device)
            run.scatter_(1, torch.cat(runs, 1), order.expand(batch, -1))
        return self._rerank(root, [torch.cat(parts, 1) for parts in zip(*pools, strict=True)], run, depth)

    def _rerank(self, root: Tensor, pool: Sequence[Tensor], run: Tensor, depth: int) -> Grown:
        """The tree of the best of all scored nodes: tokens, values and parents ``[B, M]``."""
        tokens, values, parents = pool
        count = min(self.num_nodes, tokens.shape[1])
        # Stable: of equal values the one on the upper level is the better, so the chosen ones stay closed.
        best = values.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        numbers = torch.arange(1, count + 1, device=root.device).expand_as(best)
        place = torch.zeros_like(tokens).scatter_(1, best, numbers)
        above = parents.gather(1, best)
        above = place.gather(1, above.clamp(min=0)).masked_fill_(above < 0, 0)
        # Nothing on the host knows how deep the chosen ones reach; ``depth`` bounds it.
        topology = Topology(pad(above, (1, 0)), depth)
        tree = TokenTree(
            torch.cat([root[:, None], tokens.gather(1, best)], 1),
            topology,
            roles(values.gather(1, best) == -torch.inf),
            rank=pad(best % self.width, (1, 0)),
        )
        return Grown(tree, pad(run.gather(1, best), (1, 0)))
