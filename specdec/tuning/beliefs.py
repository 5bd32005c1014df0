"""What a drafter gets right lately: counts that fade, over what was believed before anything was seen.

Shapes: D depth, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from specdec.tuning.choice import Profile
from specdec.tuning.counts import AcceptanceCounts, DraftLengths, Layout

_GUESS, _FALL = 0.45, 1.4  # rates of a drafter that nobody has measured: the best child's, and the power of the rank
_CHAIN_GUESS = (0.6, 0.05)
_SCALES = (0.2, 4.0)  # by which what is seen may move what is not
_CHANCE = 2.0  # standard errors by which the mean walk may differ from what was expected
_SPREAD = 0.5  # of the lengths of walks, in tokens, at least
_DEEPER = 0.9  # what to expect of a level of a chain, where nobody says it, over the rate of the level above


class Seen(NamedTuple):
    """Of one step what is counted later; not its logits, which are large. As in ``Verification``, and:

    Attributes:
        own: the tree was the drafter's own, as a whole.
        nodes: computed, the root included.
        draft_s: seconds of drafting.
        whole_s: seconds of everything.
    """

    path: list[list[int]]
    finished: list[bool]
    was_finished: list[bool]
    offered: list[list[int]]
    own: bool
    nodes: int
    draft_s: float
    whole_s: float

    @property
    def depth(self) -> int:
        """Levels that hold a candidate, in the row that has most."""
        return max((sum(map(bool, offered)) for offered in self.offered), default=0)


@dataclass
class Walks:
    """Tokens of some walks: how many walks, their sum, their squares' sum."""

    count: int = 0
    tokens: int = 0
    squares: int = 0

    def add(self, seen: Seen) -> None:
        """Those of the rows that went on."""
        for path, done in zip(seen.path, seen.finished, strict=True):
            if path and not done:
                length = len(path)
                self.count, self.tokens, self.squares = self.count + 1, self.tokens + length, self.squares + length**2

    def differ(self, expected: float) -> bool:
        """Whether their mean lies beyond chance from what was expected; without any nobody can say."""
        if not self.count:
            return False
        mean = self.tokens / self.count
        spread = max(math.sqrt(max(self.squares / self.count - mean**2, 0.0)), _SPREAD)
        return abs(mean - expected) > _CHANCE * spread / math.sqrt(self.count)


class Beliefs:
    """Rates by depth and rank.

    Args:
        known: ``[d][r]`` of a tree file or of the drafter; None = a guess.
        depth: D.
        width: R.
        is_chain: ranks are as ``AcceptanceCounts`` has them for chains.
        strength: steps that what was believed before is worth.
    """

    def __init__(
        self, known: Sequence[Sequence[float]] | None, depth: int, width: int, is_chain: bool, strength: float
    ) -> None:
        self.strength, self.is_chain, self._known = strength, is_chain, len(known or [()])
        self.counts, self.lengths = AcceptanceCounts(depth, width, is_chain), DraftLengths(depth)
        self.prior = _prior(known, depth, width, is_chain)

    def add(self, seen: Seen, layout: Layout) -> None:
        """One step with a tree."""
        layout.count(seen, self.counts)
        if self.is_chain:
            self.lengths.add(seen, layout.length)

    def decay(self, factor: float) -> None:
        """Let what was counted weigh less."""
        self.counts.decay(factor)
        self.lengths.decay(factor)

    def profile(self) -> Profile:
        """What to expect."""
        taken, reached, strength = self.counts.taken, self.counts.reached, self.strength
        seen = (taken.sum() + strength) / ((reached * self.prior).sum() + strength)
        scaled = np.minimum(self.prior * np.clip(seen, *_SCALES), 0.98)
        if not self.is_chain:
            return Profile(self.counts.rates(scaled, strength).tolist())
        # Of levels that nobody knows the one above says more than a guess.
        right, room, prior = taken[:, 0].tolist(), reached[:, 0].tolist(), scaled[:, 0].tolist()
        for level in range(self._known, len(prior)):
            above = (right[level - 1] + strength * prior[level - 1]) / (room[level - 1] + strength)
            prior[level] = max(prior[level], _DEEPER * above)
        scaled[:, 0] = prior
        rates = self.counts.rates(scaled, strength).tolist()
        return Profile(rates, self.lengths.offered(), self.lengths.widths())

    def state_dict(self) -> dict[str, Any]:
        """A copy of what was counted."""
        return {"counts": self.counts.state_dict(), "lengths": self.lengths.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back a copy."""
        self.counts.load_state_dict(saved["counts"])
        self.lengths.load_state_dict(saved["lengths"])


def _prior(known: Sequence[Sequence[float]] | None, depth: int, width: int, is_chain: bool) -> np.ndarray:
    """float64 ``[D, R]``."""
    guess = np.array(_CHAIN_GUESS) if is_chain else _GUESS * np.arange(1.0, width + 1) ** -_FALL
    if not known:
        return np.tile(guess, (depth, 1))
    rows = [np.asarray(row, float)[:width] for row in known]
    # Ranks beyond those that are known fall as the guess does; levels beyond repeat the last one, a little worse.
    rows = [np.append(row, row[-1] * guess[len(row) :] / guess[len(row) - 1]) for row in rows]
    rows += [rows[-1] * 0.9**more for more in range(1, depth - len(rows) + 1)]
    return np.stack(rows[:depth])
