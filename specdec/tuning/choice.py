"""The tree with the most expected tokens per second, from acceptance rates and measured costs. Numbers in, paths out.

A node is worth the product of the acceptance rates on its path, the probability that the walk comes to it; a tree is
worth 1 (the bonus) + the sum over its nodes, in expected tokens per step. Where rates fall with rank the best n nodes
are a best-first expansion (``specdec.templates.ranked_paths``), the same as Sequoia's dynamic programme
(arXiv:2402.12374), and nested in n: so one expansion gives the best tree of every size, and the size is the n with the
most tokens per second of a whole step, drafting included.

Shapes: M sizes measured, D depth, R ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np

from specdec.templates import chain_paths, ranked_paths

Paths = list[tuple[int, ...]]
_LEVELS_MATTER = 0.05  # share of a step of one node that all levels together must cost for a quick choice to see them
SECONDS_AT_LEAST = 1e-9  # of a step; a fit of noisy times may say less


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, by the size of its tree.

    Attributes:
        passes: float64 ``[M]``, of the target's pass over 1..M nodes, the root included; never falling.
        draft: of the drafter: per step, per node below the root, per level.
        rest: what a step takes beyond pass and draft: per step, per node below the root.
        plain: of a plain step, without a drafter.
        corrections: float64 ``[M]``, by which factor steps with a tree of 1..M nodes turned out to be longer; None = 1.
    """

    passes: np.ndarray
    plain: float
    draft: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rest: tuple[float, float] = (0.0, 0.0)
    corrections: np.ndarray | None = None

    @property
    def max_nodes(self) -> int:
        """M, the largest tree whose cost is known, the root included."""
        return len(self.passes)

    def seconds(self, nodes: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Of steps over trees of so many nodes (the root included, fractions are averages) and levels."""
        below = np.asarray(nodes, float) - 1
        passes = np.interp(nodes, np.arange(1, self.max_nodes + 1), self.passes)
        draft = self.draft[0] + self.draft[1] * below + self.draft[2] * np.asarray(depth, float)
        return np.maximum(passes + draft + self.rest[0] + self.rest[1] * below, SECONDS_AT_LEAST)

    def padded(self, sizes: Sequence[int] | None) -> Costs:
        """Where passes are padded to these sizes: a file may know of some in between that no graph is made for."""
        if sizes is None:
            return self
        ends = np.minimum([*sizes, self.max_nodes], self.max_nodes)
        every = np.arange(1, self.max_nodes + 1)
        return replace(self, passes=self.passes[ends[np.searchsorted(ends, every)] - 1])

    def correction(self, sizes: np.ndarray) -> np.ndarray | float:
        """Of trees of so many nodes, the root included."""
        return 1.0 if self.corrections is None else self.corrections[np.minimum(sizes, self.max_nodes) - 1]


@dataclass(frozen=True)
class Profile:
    """What a drafter gets right.

    Attributes:
        rates: ``[d][r]``, probability that the child of rank r at depth d + 1 is the one accepted, given its parent
            was; falling in r. Of a chain ``[d] = [chain, beside]``: the next node of the chain, and any sibling of it.
        offered: of a chain, ``[d]``: the share of steps whose draft comes to depth d + 1 if it may, falling in d;
            None for trees, which are always whole.
        widths: of a chain, ``[d]``: nodes at depth d + 1 where the draft comes to it, on average.
    """

    rates: Sequence[Sequence[float]]
    offered: Sequence[float] | None = None
    widths: Sequence[float] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        """Whether only the length can be chosen."""
        return self.offered is not None


@dataclass(frozen=True)
class Choice:
    """A tree with what it promises.

    Attributes:
        paths: of its nodes, root not counted.
        tokens: expected per step, the bonus included.
        seconds: of a step.
    """

    paths: Paths
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds


def choose(
    profile: Profile,
    costs: Costs,
    max_nodes: int,
    max_depth: int | None = None,
    sizes: Collection[int] | None = None,
    quick: bool = False,
) -> Choice:
    """The tree, or the length of the chain, with the most expected tokens per second.

    Args:
        profile: what the drafter gets right.
        costs: of a step.
        max_nodes: of the tree, the root included; nothing larger than what was measured is chosen either.
        max_depth: no deeper than this; None = no limit.
        sizes: the only node counts allowed for trees, the root included; None = any. Where no tree of any worth has
            such a size, any size is.
        quick: in a tenth of the time, a tree that may promise less, by 5 % at most: flatter ones are not searched for
            where all levels together cost less than that.

    Raises:
        ValueError: no node has any worth, or fits.
    """
    below = min(max_nodes, costs.max_nodes) - 1
    if profile.is_chain:
        nodes = np.cumsum([*profile.widths[:below], *[1.0] * (below - len(profile.widths))])
        longest = max(int((nodes <= below).sum()), min(below, 1))
        tokens, seconds = _chains(profile, costs, min(longest, len(profile.rates), max_depth or below))
        lengths = [int(np.argmax(tokens / seconds))] if len(tokens) else []
        found = [Choice(chain_paths(at + 1), float(tokens[at]), float(seconds[at])) for at in lengths]
    else:
        # An expansion for every depth is worth its time only where a drafter works level by level.
        deepest = min(max_depth or below, below)
        least = _LEVELS_MATTER * costs.seconds(np.ones(1), np.zeros(1))[0] if quick else 0.0
        by_level = costs.draft[2] * deepest > least
        caps = range(1, deepest + 1) if by_level else [deepest]
        found = [best for cap in caps if (best := _best_of_depth(profile, costs, below, cap, sizes)) is not None]
        if not found and sizes is not None:
            return choose(profile, costs, max_nodes, max_depth, quick=quick)
    if not found:
        raise ValueError(f"no tree of at most {max_nodes} nodes is worth anything: {profile.rates}")
    return max(found, key=lambda choice: choice.rate)


def _best_of_depth(
    profile: Profile, costs: Costs, below: int, max_depth: int, sizes: Collection[int] | None
) -> Choice | None:
    ranked = ranked_paths(profile.rates, below, max_depth)
    if not ranked:
        return None
    every = range(1, len(ranked) + 1)
    allowed = [*every] if sizes is None else [n for n in every if n + 1 in sizes]
    if not allowed:
        return None
    tokens = 1 + np.cumsum([value for _, value in ranked])
    depth = np.array(list(accumulate((len(path) for path, _ in ranked), max)))
    chosen = np.array(allowed)
    seconds = costs.seconds(chosen + 1, depth[chosen - 1]) * costs.correction(chosen + 1)
    best = int(np.argmax(tokens[chosen - 1] / seconds))
    count = allowed[best]
    return Choice([path for path, _ in ranked[:count]], float(tokens[count - 1]), float(seconds[best]))


def expect(paths: Sequence[Sequence[int]], profile: Profile, costs: Costs) -> Choice:
    """What any tree promises; ranks and depths beyond the profile's are worth nothing."""
    tree = [tuple(path) for path in paths]
    if profile.is_chain:
        length = min(len(tree), len(profile.rates))
        of_tokens, of_seconds = _chains(profile, costs, length)
        return Choice(tree, float(of_tokens[length - 1]), float(of_seconds[length - 1]))
    rates, above, tokens, levels = np.array(profile.rates), np.ones(1), 1.0, _levels(tuple(tree))
    for row, (parents, ranks) in zip(rates, levels, strict=False):
        above = above[parents] * np.where(ranks < len(row), row[np.minimum(ranks, len(row) - 1)], 0.0)
        tokens += float(above.sum())
    size = np.array(len(tree) + 1)
    return Choice(tree, tokens, float(costs.seconds(size, np.array(len(levels))) * costs.correction(size)))


@lru_cache(maxsize=256)
def _levels(paths: tuple[tuple[int, ...], ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each level its nodes' parents, counted within the level above, and their ranks."""
    levels: list[tuple[np.ndarray, np.ndarray]] = []
    above: dict[tuple[int, ...], int] = {(): 0}
    for depth in range(1, max(map(len, paths), default=0) + 1):
        nodes = [path for path in paths if len(path) == depth]
        levels.append((np.array([above[path[:-1]] for path in nodes]), np.array([path[-1] for path in nodes])))
        above = {path: index for index, path in enumerate(nodes)}
    return levels


def _chains(profile: Profile, costs: Costs, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds of a step, float64 ``[longest]`` each, with chains of 1 to ``longest`` draft tokens."""
    assert profile.offered is not None
    rates = np.array(profile.rates[:longest])
    if not longest:
        return np.zeros(0), np.zeros(0)
    reached = np.append(1.0, rates[:-1, 0].cumprod())
    come, wide = np.zeros(longest + 1), np.ones(longest)
    come[0], wide[: len(profile.widths)] = 1.0, profile.widths[:longest]
    come[1 : 1 + len(profile.offered)] = profile.offered[:longest]
    nodes = 1 + np.append(0.0, wide.cumsum())
    each = costs.seconds(nodes, np.arange(longest + 1))
    # A draft ends before its greatest length, with a probability for every length, or comes to it.
    shorter = ((come[:-1] - come[1:]) * each[:-1]).cumsum()
    seconds = shorter + come[1:] * each[1:]
    return 1 + (reached * rates.sum(1)).cumsum(), seconds * costs.correction(np.arange(2, longest + 2))


def envelope(seconds: Sequence[float]) -> np.ndarray:
    """The closest curve that never falls: where a larger tree was measured as cheaper, both cost the same."""
    return np.array(falling([*seconds][::-1], [1.0] * len(seconds))[::-1])


def falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The closest sequence that never rises, by weighted squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights, strict=True):
        pool = (value, max(weight, 1e-12), 1)
        while pools and pools[-1][0] < pool[0]:
            mean, before, count = pools.pop()
            whole = before + pool[1]
            pool = ((mean * before + pool[0] * pool[1]) / whole, whole, count + pool[2])
        pools.append(pool)
    return [mean for mean, _, count in pools for _ in range(count)]
