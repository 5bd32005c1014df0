"""The tree search of ADED: visits are shared out by prior, visit count and value (arXiv:2407.12021).

A pair of tokens has children, its successors with their tri-gram scores P, the best first. An iteration walks down from
the root to the child with the largest

    W / N + (c1 + ln((M + c2 + 1) / c2)) * P * sqrt(M) / (1 + N)

(N visits and W sum of values of the child, M visits of its parent; a child not visited yet comes first), gives the node
where it stops its children, goes on by chance in proportion to the scores until the sentence has ``depth`` tokens, and
adds 1 + the sum of the sentence's scores to W of every node passed. What counts in the end are the visits.

``plain_search`` is that, iteration by iteration. ``ExpectedSearch`` computes the visits instead: over many iterations
the children of a node share them such that the scores of all those that get more than their first visit are equal,

    N_i = (c1 + ln(...)) * sqrt(M) * P_i / (level - Q_i) - 1,    the sum of N_i = M,    Q_i = the mean value of child i,

so each node costs one equation for its level, solved where it is needed: the most visited node first. The mean values
follow from the same shares one level further down.

The loops here are over the k successors of one pair (12 by default, in at most 12 rounds of the equation), and over the
``num_paths`` kept nodes (24) with ``num_greedy`` successors each (3). They are Python's and over plain floats, because
so few numbers take arrays longer: the equation 5 times as long at k = 4, twice as long at k = 12, as long at k = 48.
A draft whose every pair has several successors took 3 times as long with it in numpy, and proposed the same. Nodes
cannot be taken together either: which one is next is known when the visits of those before it have been shared out.

Differences from the authors' code: their sum of scores looks each one up under the wrong half of the next pair, which
leaves W / N close to 1; children come in the order of a hash map there, and expansion goes down to the last of them.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Successors = Callable[[int, int], tuple[list[int], list[float]]]
"""Successors of a pair of tokens and their scores, the best first."""

Path = tuple[int, ...]
Pair = tuple[int, int]

_ROUNDS, _PRECISE = 12, 1e-3  # of the equation for the level
_MANY = 75  # visits that are worth a second round, in which shares and values settle


@dataclass(frozen=True)
class SearchSettings:
    """The constants of the search.

    Attributes:
        iterations: of the search; all visits start at the root.
        depth: tokens of a sentence of the search.
        num_paths: most visited nodes that are kept.
        num_greedy: best successors that each kept node is extended by, one after the other; the published value is 1.
        c1, c2: weight of the prior, and how slowly it grows with the visits.

    Raises:
        ValueError: settings that leave nothing to search.
    """

    iterations: int = 150
    depth: int = 3
    num_paths: int = 24
    num_greedy: int = 3
    c1: float = 32.0
    c2: float = 8.0

    def __post_init__(self) -> None:
        if min(self.iterations, self.depth, self.num_paths) < 1 or self.num_greedy < 0 or self.c1 < 0 or self.c2 <= 0:
            raise ValueError(
                f"expected iterations, depth and num_paths >= 1, num_greedy and c1 >= 0, c2 > 0; got {self}"
            )

    def weight(self, visits: float) -> float:
        """Factor of ``P / (1 + N)`` under a parent with so many visits."""
        return (self.c1 + math.log((visits + self.c2 + 1) / self.c2)) * math.sqrt(visits)


class _Node:
    """A node of the plain search: ``N``, ``W``, ``P`` and its children, None until it has been expanded."""

    def __init__(self, pair: Pair, prior: float) -> None:
        self.pair, self.prior = pair, prior
        self.visits, self.total = 0, 0.0
        self.children: list[_Node] | None = None

    def best(self, settings: SearchSettings) -> _Node:
        assert self.children
        weight = settings.weight(self.visits)

        def score(child: _Node) -> float:
            if child.visits == 0:
                return math.inf
            return child.total / child.visits + weight * child.prior / (1 + child.visits)

        return max(self.children, key=score)  # the first of equals


def plain_search(
    successors: Successors, pair: Pair, settings: SearchSettings, generator: torch.Generator
) -> dict[Path, int]:
    """The search by its definition, one iteration after the other: path of tokens below ``pair`` -> visits."""
    root = _Node(pair, 0.0)
    for _ in range(settings.iterations):
        walked = [root]
        while len(walked) <= settings.depth and walked[-1].children:
            walked.append(walked[-1].best(settings))
        leaf = walked[-1]
        if len(walked) <= settings.depth and leaf.children is None:
            tokens, scores = successors(*leaf.pair)
            leaf.children = [_Node((leaf.pair[1], t), s) for t, s in zip(tokens, scores, strict=True)]
            walked += leaf.children[:1]
        value = 1.0 + sum(node.prior for node in walked)
        last = walked[-1].pair
        for _ in range(settings.depth + 1 - len(walked)):
            tokens, scores = successors(*last)
            if not tokens:
                break
            chosen = int(torch.multinomial(torch.tensor(scores), 1, generator=generator))
            value, last = value + scores[chosen], (last[1], tokens[chosen])
        for node in walked:
            node.visits += 1
            node.total += value
    visits: dict[Path, int] = {}
    stack: list[tuple[Path, _Node]] = [((), root)]
    while stack:
        path, node = stack.pop()
        visits[path] = node.visits
        stack += [((*path, child.pair[1]), child) for child in node.children or [] if child.visits]
    return visits


class Visited(NamedTuple):
    """A node of the expected search.

    Attributes:
        pair: its token, behind its parent's.
        visits: expected number.
        parent: its index in the list of nodes, -1 is the root.
        place: its rank among its siblings.
    """

    pair: Pair
    visits: float
    parent: int
    place: int


class ExpectedSearch:
    """The expected visits of the search. Look-ups are remembered, so make a new one when the table has changed.

    Args:
        successors: of the table.
        settings: the constants.
    """

    def __init__(self, successors: Successors, settings: SearchSettings) -> None:
        self._look_up, self._settings = successors, settings
        self._known: dict[Pair, tuple[list[Pair], list[float]]] = {}

    def children(self, pair: Pair) -> tuple[list[Pair], list[float]]:
        """The pairs that follow, and their scores."""
        known = self._known.get(pair)
        if known is None:
            tokens, scores = self._look_up(*pair)
            second = pair[1]
            known = self._known[pair] = [(second, token) for token in tokens], scores
        return known

    def most_visited(self, pair: Pair, count: int) -> list[Visited]:
        """The ``count`` nodes with the most visits below the root ``pair``, parents before children."""
        found: list[Visited] = []
        heap: list[tuple[float, int, int, int, Pair]] = []
        self._push(heap, pair, float(self._settings.iterations), 0, -1)
        while heap and len(found) < count:
            negative, depth, parent, place, node = heapq.heappop(heap)
            found.append(Visited(node, -negative, parent, place))
            # The first child of a node is visited once before it has children of its own.
            self._push(heap, node, -negative - (place == 0), depth, len(found) - 1)
        return found

    def draft(self, pair: Pair, num_nodes: int) -> tuple[list[int], list[int]]:
        """The tree below ``pair``: the most visited nodes and their greedy extensions, the most visited of them all.

        An extension has the share of its parent's visits that chance would give it.

        Returns:
            tokens and parents of at most ``num_nodes`` nodes, parents first; parent 0 is the root, 1 the first node.
        """
        nodes = self.most_visited(pair, self._settings.num_paths)
        worst = nodes[num_nodes - 1].visits if len(nodes) >= num_nodes else 0.0
        goes_on = {node.parent for node in nodes if node.place == 0}
        for index in range(len(nodes)):
            if index not in goes_on:
                self._extend(nodes, index, worst)
        # Sorting is stable and no child is visited more than its parent, so parents stay in front.
        order = sorted(range(len(nodes)), key=lambda index: -nodes[index].visits)[:num_nodes]
        number = {index: count for count, index in enumerate(order, start=1)}
        number[-1] = 0
        return [nodes[index].pair[1] for index in order], [number[nodes[index].parent] for index in order]

    def _extend(self, nodes: list[Visited], index: int, worst: float) -> None:
        """Add the best successor, its best successor, ... as long as they are visited more than ``worst``."""
        pair, visits = nodes[index].pair, nodes[index].visits
        for _ in range(self._settings.num_greedy):
            pairs, scores = self.children(pair)
            if not pairs:
                return
            visits *= scores[0] / sum(scores)
            if visits <= worst:
                return
            pair = pairs[0]
            nodes.append(Visited(pair, visits, index, 0))
            index = len(nodes) - 1

    def _push(self, heap: list[tuple[float, int, int, int, Pair]], pair: Pair, visits: float, *where: int) -> None:
        """Put the children of a node that passes on so many visits on the heap; ``where`` = its depth and index."""
        depth, index = where
        levels = self._settings.depth - depth
        if levels > 0 and visits > 0.0:
            shares = self._share(pair, visits, levels)[0]
            for place, child in enumerate(self.children(pair)[0]):
                if shares[place] <= 0.0:
                    break  # so have all after it
                heapq.heappush(heap, (-shares[place], depth + 1, index, place, child))

    def _share(self, pair: Pair, visits: float, levels: int) -> tuple[list[float], list[float]]:
        """Expected visits of the children of a node that passes on ``visits``, and what a visit scores from there on.

        ``levels``: of children below the node.
        """
        pairs, scores = self.children(pair)
        count = len(scores)
        if levels == 1:
            return share_visits(scores, scores, visits, self._settings), scores
        # Values depend on the visits and visits on the values: start from the scores alone. Children that are visited
        # once or less are not looked up; below them it is taken to be as below the last one that was.
        shares, values = share_visits(scores, scores, visits, self._settings), scores
        for _ in range(2 if visits > _MANY else 1):
            values, below = [], 0.0
            for place, (child, score, share) in enumerate(zip(pairs, scores, shares, strict=True)):
                if share > 1.0 or place == 0:
                    below = self._value(child, share, levels - 1, place == 0)
                values.append(score + below)
            if not 1 < count < visits:
                break  # the visits do not depend on the values
            shares = share_visits(scores, values, visits, self._settings)
        return shares, values

    def _value(self, pair: Pair, visits: float, levels: int, is_first: bool) -> float:
        """Mean score below a node visited so often."""
        passed_on = visits - 1.0 if is_first else visits
        total = self._by_chance(pair, levels) if is_first else 0.0
        if passed_on > 0.0:
            if levels == 1:
                scores = self.children(pair)[1]
                total += _last_step(scores, passed_on, self._settings)
            else:
                shares, values = self._share(pair, passed_on, levels)
                total += sum(map(operator.mul, shares, values))
        return total / max(visits, 1.0)

    def _by_chance(self, pair: Pair, levels: int) -> float:
        """Expected score of going on by chance; beyond the first step by the best successor, which is close enough."""
        total = 0.0
        for _ in range(levels):
            pairs, scores = self.children(pair)
            if not scores:
                break
            total += sum(map(operator.mul, scores, scores)) / sum(scores)
            pair = pairs[0]
        return total


def _last_step(scores: Sequence[float], visits: float, settings: SearchSettings) -> float:
    """Sum of the scores that so many visits to children without children of their own collect."""
    count = len(scores)
    if visits > count:
        return sum(map(operator.mul, share_visits(scores, scores, visits, settings), scores))
    whole = int(visits)
    return sum(scores[:whole]) + ((visits - whole) * scores[whole] if whole < count else 0.0)


def share_visits(
    scores: Sequence[float], values: Sequence[float], visits: float, settings: SearchSettings
) -> list[float]:
    """How children share the visits of their parent, once each before the search compares them.

    Args:
        scores: P of the children, the best first; positive.
        values: Q, the mean value of each.
        visits: M of the parent, those it passes on; may be a fraction, as all expected visits may.
    """
    count = len(scores)
    if count <= 1:
        return [visits] * count
    if visits <= count:
        return [min(max(visits - place, 0.0), 1.0) for place in range(count)]
    weight = settings.weight(visits)
    priors = [weight * score for score in scores]
    # From below: at this level the child that alone decides it already has all visits that the others leave.
    most = visits - count + 2.0
    level = max(value + prior / most for value, prior in zip(values, priors, strict=True))
    for _ in range(_ROUNDS):
        # Newton's method for 1 / (sum of prior / (level - value)), which is nearly a straight line.
        wanted, total, slope = visits, 0.0, 0.0
        for value, prior in zip(values, priors, strict=True):
            ratio = prior / (level - value)
            if ratio > 2.0:  # it gets more than its first visit
                total, slope, wanted = total + ratio, slope + ratio / (level - value), wanted + 1.0
            else:
                wanted -= 1.0
        step = total * (total / wanted - 1.0) / slope if slope else 0.0
        level += step
        if abs(step) < _PRECISE * level:
            break
    return [max(prior / (level - value) - 1.0, 1.0) for value, prior in zip(values, priors, strict=True)]
