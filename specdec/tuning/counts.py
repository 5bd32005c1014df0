"""How often a child of each rank at each depth was the accepted one: counted per step, turned into rates.

Shapes: D depth, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from specdec.tuning.choice import falling


class Walked(Protocol):
    """What is counted of a ``Verification``."""

    @property
    def path(self) -> Sequence[Sequence[int]]: ...

    @property
    def finished(self) -> Sequence[bool]: ...

    @property
    def was_finished(self) -> Sequence[bool]: ...

    @property
    def offered(self) -> Sequence[Sequence[int]]: ...


class AcceptanceCounts:
    """Counters of accepted children by depth and rank, and of the nodes that had room for such a child.

    A child that the drafter could not fill counts as one that was not accepted: its place was paid for.

    Args:
        depth: D, levels counted; what lies deeper is ignored.
        width: R, ranks counted; likewise.
        is_chain: ranks are the next node of a chain and whatever stands beside it (``Profile.rates``), so that the
            rates need not fall with them.
    """

    def __init__(self, depth: int, width: int, is_chain: bool = False) -> None:
        self.depth, self.width, self.is_chain = depth, width, is_chain
        # Lists: a step adds to a handful of entries, which numpy takes ten times as long over.
        self._rooms = [[0.0] * (width + 1) for _ in range(depth)]  # by how many children the node has room for
        self._taken = [[0.0] * width for _ in range(depth)]

    def add(self, ranks: Sequence[int], rooms: Sequence[int]) -> None:
        """Count the walk of one row: the ranks of its accepted nodes, and the children that each of its nodes has room
        for, the root first (one more than there are ranks).
        """
        for depth in range(min(len(rooms), self.depth)):
            self._rooms[depth][min(rooms[depth], self.width)] += 1.0
            if depth < len(ranks) and ranks[depth] < self.width:
                self._taken[depth][ranks[depth]] += 1.0

    @property
    def taken(self) -> np.ndarray:
        """float64 ``[D, R]``: accepted children."""
        return np.array(self._taken)

    @property
    def reached(self) -> np.ndarray:
        """float64 ``[D, R]``: accepted nodes at depth d that had room for a child of rank r."""
        rooms = np.array(self._rooms)
        return rooms[:, ::-1].cumsum(1)[:, ::-1][:, 1:]

    @property
    def steps(self) -> float:
        """Walks counted."""
        return sum(self._rooms[0])

    def decay(self, factor: float) -> None:
        """Let what was counted weigh less."""
        self._rooms = [[count * factor for count in row] for row in self._rooms]
        self._taken = [[count * factor for count in row] for row in self._taken]

    def rates(self, prior: np.ndarray, strength: float) -> np.ndarray:
        """float64 ``[D, R]``: acceptance rates, falling in rank.

        Args:
            prior: ``[D, R]``, what to believe where little was counted.
            strength: counts that the prior is worth.
        """
        reached = self.reached
        mixed = (self.taken + strength * prior) / np.maximum(reached + strength, 1e-12)
        return self._sound(mixed, reached + strength)

    def own_rates(self, strength: float = 4.0) -> np.ndarray:
        """float64 ``[D, R]``: rates whose prior is the level above, so that deep levels, seen seldom, lean on it."""
        taken, reached = self.taken, self.reached
        rows, prior = [], np.zeros(self.width)
        for depth in range(self.depth):
            weight = strength if depth else 0.0
            prior = (taken[depth] + weight * prior) / np.maximum(reached[depth] + weight, 1e-12)
            rows.append(prior)
        return self._sound(np.array(rows), reached + strength)

    def _sound(self, rates: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """At most one child of a node accepted; falling in rank where ranks are such."""
        rising = (np.diff(rates, axis=1) > 0).any(1) & (not self.is_chain)
        for depth in np.flatnonzero(rising):
            rates[depth] = falling(rates[depth].tolist(), weights[depth].tolist())
        return rates / np.maximum(rates.sum(1, keepdims=True), 1.0)

    def state_dict(self) -> dict[str, list[list[float]]]:
        """A copy."""
        return {"rooms": [list(row) for row in self._rooms], "taken": [list(row) for row in self._taken]}

    def load_state_dict(self, saved: dict[str, list[list[float]]]) -> None:
        """Put back a copy."""
        self._rooms = [list(map(float, row)) for row in saved["rooms"]]
        self._taken = [list(map(float, row)) for row in saved["taken"]]


class DraftLengths:
    """How far drafts come that may be as long as a chain allows, and how many nodes they hang there.

    Args:
        depth: D, levels counted.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._came, self._could = [0.0] * depth, [0.0] * depth
        self._nodes = self._levels = 0.0

    def add(self, verification: Walked, length: int) -> None:
        """Count the drafts of the rows that were not finished; they might have had ``length`` levels."""
        for offered, done in zip(verification.offered, verification.was_finished, strict=True):
            if done:
                continue
            reached = sum(map(bool, offered))
            for level in range(min(length, self.depth)):
                self._could[level] += 1.0
                self._came[level] += level < reached
            self._nodes += sum(offered)
            self._levels += reached

    def decay(self, factor: float) -> None:
        """Let what was counted weigh less."""
        self._came = [count * factor for count in self._came]
        self._could = [count * factor for count in self._could]
        self._nodes, self._levels = self._nodes * factor, self._levels * factor

    def offered(self, strength: float = 1.0) -> list[float]:
        """``Profile.offered``: of each level, the share of drafts that come to it; unseen levels are like the last."""
        shares, last = list[float](), 1.0
        for came, could in zip(self._came, self._could, strict=True):
            last = min((came + strength * last) / max(could + strength, 1e-12), last)
            shares.append(last)
        return shares

    def widths(self) -> list[float]:
        """``Profile.widths``, the same at every level."""
        return [max(self._nodes / self._levels, 1.0) if self._levels else 1.0] * self.depth

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return {"came": list(self._came), "could": list(self._could), "nodes": self._nodes, "levels": self._levels}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back a copy."""
        self._came, self._could = list(saved["came"]), list(saved["could"])
        self._nodes, self._levels = saved["nodes"], saved["levels"]


@dataclass(frozen=True)
class Layout:
    """What counting needs to know of a shape, made once per shape.

    Attributes:
        ranks: of every node in breadth-first order, the root first; None for chains.
        rooms: children of every node, likewise; None for chains.
        length: most nodes of a chain, root not counted; 0 for trees.
    """

    ranks: tuple[int, ...] | None
    rooms: tuple[int, ...] | None
    length: int = 0

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]], is_chain: bool) -> Layout:
        """Of rank paths."""
        if is_chain:
            return cls(None, None, len(paths))
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        rooms = dict.fromkeys([(), *ordered], 0)
        for path in ordered:
            rooms[path[:-1]] += 1
        return cls((0, *(path[-1] for path in ordered)), tuple(rooms.values()))

    def count(self, verification: Walked, counts: AcceptanceCounts) -> None:
        """Add the walks of the rows that went on; of one that stopped it is not known how far it would have come."""
        for path, done in zip(verification.path, verification.finished, strict=True):
            if done or not path:
                continue
            if self.ranks is not None and self.rooms is not None:
                counts.add([self.ranks[node] for node in path[1:]], [self.rooms[node] for node in path])
                continue
            # The nodes of a chain are numbered by depth; a node beside it ends the walk.
            ranks = [0 if node == depth else 1 for depth, node in enumerate(path)][1:]
            rooms = [2 if depth < self.length else 0 for depth in range(len(path))]
            if ranks and ranks[-1]:
                rooms.pop()
            counts.add(ranks, rooms)
