"""Trees that a draft model draws: independent chains, RSD-C and RSD-S, with the law of every draw on record.

Every child is drawn from the draft distribution q of its parent, and the events are recorded in ``Draws``, which
rejection rules replay. Without uniforms the same shapes take the most likely tokens instead.

Sampling without replacement is done as a race instead of by Gumbel noise over the whole vocabulary (Gumbel top-k; Kool
et al., arXiv:1903.06059): token x finishes at an exponential time of rate q(x), so the first to finish is a draw from
q, the next one a draw from q without it, and the k-th gap is exponential with the mass that is left as its rate. With
``G = -log(time)`` this is the same law, and takes two uniforms per child in place of V.

Shapes: B rows, n nodes of a level, w nodes of the next one, k children of a node, V vocabulary, R rows of q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafters.ranked_trees import Grown, Passes, Shape, Uniforms, best_children, roles, run_until
from specdec.tree import WITH_REPLACEMENT, WITHOUT_REPLACEMENT, Draws, TokenTree, Topology, chain


def draw_distinct(q: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw k tokens one after the other, none of them twice.

    Args:
        q: float32 ``[B, n, V]``.
        uniforms: float64 ``[B, n, k]``.

    Returns:
        int64 ``[B, n, k]`` in the order of the draws, and float64 ``[B, n, k]``, the mass that was left before each; 0
        where nothing was (the token means nothing then).
    """
    weights = q.to(torch.float64, copy=True)
    tokens: list[Tensor] = []
    left: list[Tensor] = []
    for draw in range(uniforms.shape[-1]):
        if draw:
            weights.scatter_(-1, tokens[-1], 0.0)
        cdf = weights.cumsum(-1)
        tokens.append(_inverse(cdf, uniforms[..., draw : draw + 1]))
        left.append(cdf[..., -1:])
    return torch.cat(tokens, -1), torch.cat(left, -1)


def draw_independent(q: Tensor, uniforms: Tensor) -> Tensor:
    """Draw k tokens independently: q ``[B, n, V]``, uniforms ``[B, n, k]`` -> int64 ``[B, n, k]``."""
    return _inverse(q.double().cumsum(-1), uniforms)


def _inverse(cdf: Tensor, uniforms: Tensor) -> Tensor:
    total = cdf[..., -1:].contiguous()
    token = torch.searchsorted(cdf, uniforms * total, right=True)
    # Rounding can leave u * total on the last step; the last token with mass is then the right one.
    return torch.minimum(token, torch.searchsorted(cdf, total)).clamp_(max=cdf.shape[-1] - 1)


@dataclass(frozen=True)
class Branching:
    """RSD-C (arXiv:2402.14160): a fixed number of children per level, drawn without replacement.

    Attributes:
        branching: children of every node of level 0, 1, ...
    """

    branching: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.branching)

    @property
    def max_nodes(self) -> int:
        return _static(self.branching, torch.device("cpu")).run.shape[1]

    @property
    def widest(self) -> int:
        return max(self.branching)

    @property
    def level(self) -> int:
        return math.prod(self.branching[:-1])

    def grow(self, root: Tensor, passes: Passes, depth: int, uniforms: Uniforms | None) -> Grown:
        static = _static(self.branching[:depth], root.device)
        tokens, dead, laws = [root[:, None]], [torch.zeros_like(root, dtype=torch.bool)[:, None]], []
        for level, count in enumerate(self.branching[:depth]):
            scores = passes.expand(tokens[-1], static.levels[level - 1]) if level else passes.root()
            if uniforms is None:
                drawn, values = best_children(scores, count)
                none_left = values == -torch.inf
            else:
                laws.append(scores.softmax(-1))
                drawn, left = draw_distinct(laws[-1], uniforms(*scores.shape[:2], count))
                none_left = left <= 0
            tokens.append(drawn.flatten(1))
            dead.append((none_left | dead[-1][..., None]).flatten(1))
        gone = torch.cat(dead[1:], 1)
        tree = TokenTree(torch.cat(tokens, 1), static.topology, roles(gone), rank=static.rank)
        if laws:
            tree.draws = _one_event_each(tree, gone, torch.cat(laws, 1), self.widest)
        return Grown(tree, static.run)


@dataclass(frozen=True)
class _Static:
    """What every tree of one ``Branching`` shares: parents of levels 1.. on the host, then as in ``Grown``."""

    levels: tuple[tuple[int, ...], ...]
    topology: Topology
    rank: Tensor
    run: Tensor


@lru_cache(maxsize=64)
def _static(branching: tuple[int, ...], device: torch.device) -> _Static:
    levels: list[tuple[int, ...]] = []
    ranks, first, width = [0], 0, 1
    for count in branching:
        levels.append(tuple(node for node in range(first, first + width) for _ in range(count)))
        ranks += [*range(count)] * width
        first, width = first + width, width * count
    parents = torch.tensor([[0, *(node for level in levels for node in level)]], device=device)
    rank = torch.tensor([ranks], device=device)
    return _Static(tuple(levels), Topology(parents, len(branching)), rank, run_until(len(ranks), first, device))


@dataclass(frozen=True)
class Beam:
    """RSD-S (arXiv:2402.14160): stochastic beam search, ``width`` nodes per level over all parents.

    The race runs over whole paths: a path's time has rate q(path), the first child to finish does so at its parent's
    time, the k-th gap among siblings has rate q(parent) times the mass left, and the ``width`` earliest of a level
    stay. A sibling's time depends on those before it and not on which token it is, so leaving the late ones out says
    nothing about their tokens, and recursive rejection over the others stays exact. Without uniforms: beam search.
    """

    depth: int
    width: int

    @property
    def max_nodes(self) -> int:
        return self.width * self.depth + 1

    @property
    def widest(self) -> int:
        return self.width

    @property
    def level(self) -> int:
        return self.width

    def grow(self, root: Tensor, passes: Passes, depth: int, uniforms: Uniforms | None) -> Grown:
        width = self.width
        step = _MostLikely(root) if uniforms is None else _Race(root, uniforms)
        tokens: list[Tensor] = []
        dead: list[Tensor] = []
        parents, ranks = [torch.zeros_like(root)[:, None]], [torch.zeros_like(root)[:, None]]
        below: Tensor | tuple[int, ...] = (0,) * width
        for level in range(depth):
            scores = passes.expand(tokens[-1], below) if level else passes.root()
            drawn, chosen = step(scores, width)
            tokens.append(drawn.flatten(1).gather(1, chosen))
            dead.append(step.dead)
            ranks.append(chosen % width)
            if level:
                below = chosen // width + (1 + width * (level - 1))
            parents.append(below if isinstance(below, Tensor) else torch.zeros_like(chosen))
        above, gone = torch.cat(parents, 1), torch.cat(dead, 1)
        token_ids = torch.cat([root[:, None], *tokens], 1)
        tree = TokenTree(token_ids, Topology(above, depth), roles(gone), rank=torch.cat(ranks, 1))
        if isinstance(step, _Race):
            tree.draws = _one_event_each(tree, gone, torch.cat(step.laws, 1), width)
        return Grown(tree, run_until(above.shape[1], above.shape[1] - width, root.device))


class _MostLikely:
    """One level of a beam search by log-probability."""

    def __init__(self, root: Tensor) -> None:
        self.values = torch.zeros(root.shape[0], 1, device=root.device)
        self.dead = self.values > 0

    def __call__(self, scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Children ``[B, n, k]`` of the level's nodes and the places ``[B, w]`` among all of them that stay."""
        tokens, steps = best_children(scores, width)
        self.values, chosen = (self.values[..., None] + steps).flatten(1).topk(width)
        self.dead = self.values == -torch.inf
        return tokens, chosen


class _Race:
    """One level of a stochastic beam search; remembers q of every node it has seen."""

    def __init__(self, root: Tensor, uniforms: Uniforms) -> None:
        self.uniforms = uniforms
        self.laws: list[Tensor] = []
        self.chance = torch.ones(root.shape[0], 1, dtype=torch.float64, device=root.device)
        self.time = torch.zeros_like(self.chance)
        self.dead = self.time > 0

    def __call__(self, scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """As of ``_MostLikely``."""
        q = scores.softmax(-1)
        self.laws.append(q)
        which, when = self.uniforms(2, *scores.shape[:2], width)
        tokens, left = draw_distinct(q, which)
        gaps = -torch.log1p(-when) / (self.chance[..., None] * left).clamp_(min=1e-300)
        gaps.masked_fill_(left <= 0, torch.inf)
        gaps[..., 0] = self.time
        self.time, chosen = gaps.cumsum(-1).flatten(1).topk(width, largest=False)
        chances = self.chance[..., None] * q.gather(-1, tokens)
        self.chance = chances.flatten(1).gather(1, chosen)
        self.dead = self.time == torch.inf
        return tokens, chosen


@dataclass(frozen=True)
class Chains:
    """``width`` chains drawn independently of each other; where they coincide they share nodes (SpecInfer's way).

    One chain is the classical draft (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318). Without
    uniforms: the best chain, or the beam search of that width.
    """

    depth: int
    width: int = 1

    @property
    def max_nodes(self) -> int:
        return self.width * self.depth + 1

    @property
    def widest(self) -> int:
        return self.width

    @property
    def level(self) -> int:
        return self.width

    def grow(self, root: Tensor, passes: Passes, depth: int, uniforms: Uniforms | None) -> Grown:
        if uniforms is None:
            greedy: Shape = Branching((1,) * depth) if self.width == 1 else Beam(depth, self.width)
            return greedy.grow(root, passes, depth, None)
        width, batch = self.width, root.shape[0]
        own = torch.arange(width, device=root.device).expand(batch, -1)
        tokens: list[Tensor] = []
        laws: list[Tensor] = []
        shared = [torch.zeros_like(own)]
        for level in range(depth):
            below = tuple(range(1 + width * (level - 2), 1 + width * (level - 1))) if level > 1 else (0,) * width
            scores = passes.expand(tokens[-1], below) if level else passes.root()
            laws.append(scores.softmax(-1))
            tokens.append(draw_independent(laws[-1], uniforms(*scores.shape[:2], width // scores.shape[1])).flatten(1))
            same = (tokens[-1][:, :, None] == tokens[-1][:, None]) & (shared[-1][:, :, None] == shared[-1][:, None])
            shared.append(same.long().argmax(-1))  # the first chain that is at the same node
        return self._tree(root, tokens, shared, torch.cat(laws, 1))

    def _tree(self, root: Tensor, tokens: list[Tensor], shared: list[Tensor], q: Tensor) -> Grown:
        width, depth, device = self.width, len(tokens), root.device
        first = torch.arange(depth, device=device).repeat_interleave(width) * width + 1  # first node of each level
        node = torch.cat(shared[1:], 1) + first
        parents = pad(node[:, :-width], (width + 1, 0))
        topology = chain(depth + 1, device) if width == 1 else Topology(parents, depth)
        numbers = torch.arange(1, node.shape[1] + 1, device=device)
        role = None if width == 1 else roles(node != numbers)
        q_row = (numbers - width).clamp_(min=0).expand_as(node)
        kind = torch.full_like(node, WITH_REPLACEMENT)
        draws = Draws(node, kind, q_row, q, width, frozenset({WITH_REPLACEMENT}))
        tree = TokenTree(torch.cat([root[:, None], *tokens], 1), topology, role, draws=draws)
        return Grown(tree, run_until(tree.num_nodes, tree.num_nodes - width, device))


def _one_event_each(tree: TokenTree, gone: Tensor, q: Tensor, width: int) -> Draws:
    """Every node drawn once without replacement, from the row of q that its parent's number names."""
    numbers = torch.arange(1, tree.num_nodes, device=gone.device)
    node = torch.where(gone, -1, numbers)
    kind = torch.full_like(node, WITHOUT_REPLACEMENT)
    return Draws(node, kind, tree.parents[:, 1:], q, width, frozenset({WITHOUT_REPLACEMENT}))
