"""What steps take, learnt while decoding: beside what a tree file says, or without one."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import numpy as np

from specdec.tuning.calibration import StepCost, fit_costs
from specdec.tuning.choice import Costs

_ENOUGH = 10  # steps with a tree that make it worth comparing
_KEPT = 24  # of the last steps with a tree, the nearest to those with the next one
_WARM = 2  # steps after a change that are slower than those that follow
_DOUBT = 0.15**2  # variance of the logarithm of a factor that nobody has seen
_NOISE = 0.04**2  # of a comparison of two medians
_FACTOR = math.log(2.0)  # that is believed at most, up or down
_REMEMBERED = 96  # steps whose times are kept
_HALF_LIFE = 600.0  # steps after which a factor is believed half, so that what looked costly is tried again


class CostCorrections:
    """Factors by the size of the tree, 1 for plain decoding, with which costs are to be multiplied.

    Two sizes are compared where one gives way to the other: the last steps with the former and the first with the
    latter lie side by side, so that a drift of the machine, which is common to both, says nothing. A comparison moves
    what is believed of both, in logarithms and each by its share of the doubt: a Kalman filter in which doubts are
    independent. One size is what others are compared with and stays at 1. All others fade with time.

    Args:
        anchor: that size, the root included.
    """

    def __init__(self, anchor: int) -> None:
        self.anchor = anchor
        self._known: dict[int, tuple[float, float]] = {anchor: (0.0, 0.0)}  # logarithm, variance
        self._before: tuple[int, float] | None = None
        self._size, self._seen = anchor, list[float]()

    def see(self, size: int, seconds: float, expected: float) -> bool:
        """One step; whether two sizes were compared.

        Args:
            size: nodes of the tree in force, the root included; 1 = plain decoding.
            seconds: that it took.
            expected: seconds that it should have taken.
        """
        if size != self._size:
            if len(self._seen) >= _WARM + _ENOUGH:
                self._before = self._size, statistics.median(self._seen[-_KEPT:])
            self._size, self._seen = size, []
        seen = self._seen
        seen.append(math.log(max(seconds, 1e-9) / expected))
        if len(seen) == _WARM + _ENOUGH and self._before is not None and self._before[0] != size:
            self._compare(*self._before, size, statistics.median(seen[_WARM:]))
            return True
        if len(seen) > 2 * _KEPT:
            del seen[:-_KEPT]
        return False

    def _compare(self, former: int, before: float, latter: int, now: float) -> None:
        (a, doubt_a), (b, doubt_b) = (self._known.get(size, (0.0, _DOUBT)) for size in (former, latter))
        error, whole = (now - before) - (b - a), doubt_a + doubt_b + _NOISE
        for size, value, doubt, way in ((former, a, doubt_a, -error), (latter, b, doubt_b, error)):
            moved = value + way * doubt / whole
            self._known[size] = min(max(moved, -_FACTOR), _FACTOR), doubt * (1 - doubt / whole)

    def interrupt(self) -> None:
        """What comes is not beside what was: another request, or steps of which nobody told."""
        self._before, self._seen = None, []

    def fade(self, steps: int) -> None:
        """So many steps have passed since the last time."""
        left = 0.5 ** (steps / _HALF_LIFE)
        for size, (value, doubt) in self._known.items():
            if size != self.anchor:
                self._known[size] = value * left, _DOUBT + (doubt - _DOUBT) * left

    @property
    def plain(self) -> float:
        """Of a plain step."""
        return math.exp(self._known.get(1, (0.0, 0.0))[0])

    def factors(self, max_nodes: int) -> np.ndarray:
        """float64 ``[M]``: of trees of 1..M nodes; what lies between two sizes seen lies between their factors."""
        sizes = sorted(size for size in self._known if size > 1)
        return np.exp(np.interp(np.arange(1, max_nodes + 1), sizes, [self._known[size][0] for size in sizes]))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was compared yet."""
        return len(self._known) == 1

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        known = {size: [*entry] for size, entry in self._known.items()}
        before = None if self._before is None else [*self._before]
        return {"known": known, "before": before, "size": self._size, "seen": [*self._seen]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back a copy."""
        self._known = {int(size): (float(value), float(doubt)) for size, (value, doubt) in saved["known"].items()}
        self._before = None if saved["before"] is None else (int(saved["before"][0]), float(saved["before"][1]))
        self._size, self._seen = int(saved["size"]), [*map(float, saved["seen"])]


class FittedCosts:
    """Costs fitted to the last steps, by batch size.

    Args:
        every: steps between two fits: one takes about as long as a choice, and costs change slower than texts.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.recent: dict[int, deque[StepCost]] = {}
        self._fitted: dict[int, tuple[tuple[float, float, float], tuple[float, float]]] = {}
        self._fitted_at = dict[int, int]()

    def see(self, rows: int, cost: StepCost) -> None:
        """One step."""
        self.recent.setdefault(rows, deque(maxlen=_REMEMBERED)).append(cost)

    def renew(self, rows: int) -> None:
        """Fit anew the next time: another tree is in force, of which little was known."""
        self._fitted.pop(rows, None)

    def costs(self, rows: int, passes: np.ndarray, step: int) -> Costs:
        """Of a step, by now.

        Args:
            rows: B.
            passes: ``Costs.passes``, measured over as many rows.
            step: its number.
        """
        due = rows not in self._fitted or step - self._fitted_at[rows] >= self.every
        if due and self.recent.get(rows):
            self._fitted[rows], self._fitted_at[rows] = fit_costs(self.recent[rows], passes), step
        draft, rest = self._fitted.get(rows, ((0.0, 0.0, 0.0), (0.0, 0.0)))
        return Costs(passes, float(passes[0]) + max(rest[0], 0.0), draft, rest)

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return {
            "recent": {
                rows: [[cost.nodes, cost.depth, cost.draft_s, cost.whole_s] for cost in costs]
                for rows, costs in self.recent.items()
            },
            "fitted": {rows: [*draft, *rest] for rows, (draft, rest) in self._fitted.items()},
            "fitted_at": dict(self._fitted_at),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back a copy."""
        for rows, costs in saved["recent"].items():
            kept = (StepCost(int(nodes), int(depth), draft, whole) for nodes, depth, draft, whole in costs)
            self.recent[int(rows)] = deque(kept, maxlen=_REMEMBERED)
        for rows, (draft_s, node_s, level_s, rest_s, more_s) in saved["fitted"].items():
            self._fitted[int(rows)] = (draft_s, node_s, level_s), (rest_s, more_s)
        self._fitted_at = {int(rows): int(step) for rows, step in saved["fitted_at"].items()}
