"""What a drafter gets right on calibration prompts, and what a step with it costs, seen from within real requests.

A run with a wide tree says how often each rank at each depth is the accepted one. A second run goes through trees of
several sizes, each for some steps, and says what drafting, and all that is neither drafting nor the target's pass,
costs by nodes and levels.

Shapes: M sizes, D depth, R ranks.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from specdec.decoding import Step
from specdec.generation import Speculation
from specdec.interfaces import DecodeState, Shaped
from specdec.templates import best_first, chain_paths
from specdec.tuning.choice import Paths, Profile
from specdec.tuning.counts import AcceptanceCounts, DraftLengths, Layout

_HOLD = 6  # steps with a tree before the next one: the first over another size is slower than those that follow

Generate = Callable[[Tensor], Any]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class StepCost:
    """One step: nodes computed (root included), levels offered, seconds of drafting and of everything."""

    nodes: int
    depth: int
    draft_s: float
    whole_s: float


class Watch:
    """An observer that counts walks and times steps, and may exchange the tree every few of them.

    Args:
        handle: the speculation that it watches; its drafter is ``Shaped``.
        counts: where walks are counted.
        shapes: trees to take in turn, each for some steps; None = leave the tree alone.
    """

    def __init__(self, handle: Speculation, counts: AcceptanceCounts, shapes: Iterable[Paths] | None = None) -> None:
        self.handle, self.counts = handle, counts
        drafter = handle.drafter
        assert isinstance(drafter, Shaped)
        self.drafter: Shaped = drafter
        self.costs: list[StepCost] = []
        self.lengths = DraftLengths(counts.depth)
        self._emitted = self._walks = 0
        self._shapes = None if shapes is None else itertools.cycle(list(shapes))
        self._held = 0
        self._layout = Layout.of(drafter.tree_paths, drafter.widest == 1)
        self._clock = self._drafted = 0.0

    def __call__(self, state: DecodeState, step: Step) -> None:  # noqa: ARG002 - the observer's signature
        """See one step."""
        now, drafted = time.perf_counter(), self.handle.last.seconds["draft"]
        if step.tree is not None:
            # Levels that hold a candidate: what a drafter leaves empty it has not drafted.
            depth = max((sum(map(bool, offered)) for offered in step.verification.offered), default=0)
            if self._shapes is None or self._held > 1:
                self.costs.append(StepCost(step.tree.num_nodes, depth, drafted - self._drafted, now - self._clock))
            self._layout.count(step.verification, self.counts)
            for tokens, done in zip(step.verification.tokens, step.verification.was_finished, strict=True):
                self._walks += not done
                self._emitted += 0 if done else len(tokens)
            if self._layout.length:
                self.lengths.add(step.verification, self._layout.length)
        if self._shapes is not None and self._held % _HOLD == 0:
            shape, self._held = next(self._shapes), 0
            self.drafter.reshape(shape)
            self._layout = Layout.of(shape, self.drafter.widest == 1)
        self._held += 1
        self._clock, self._drafted = time.perf_counter(), drafted

    @property
    def tokens_per_step(self) -> float:
        """Seen, the bonus included."""
        return self._emitted / self._walks if self._walks else 1.0

    def profile(self, rates: np.ndarray) -> Profile:
        """With these rates, and how far the drafts came that were seen."""
        rows = rates.tolist()
        if self.drafter.widest != 1:
            return Profile(rows)
        return Profile(rows, self.lengths.offered(), self.lengths.widths())


def wide_tree(widest: int, max_depth: int, num_nodes: int) -> Paths:
    """A tree to calibrate with: all ranks where walks mostly go, deeper and less likely places as far as it reaches."""
    if widest == 1:
        return chain_paths(max_depth)
    guess = [[0.75 * (rank + 1) ** -0.9 for rank in range(widest)]]
    return best_first(guess, num_nodes - 1, max_depth)


def calibrate(
    handle: Speculation,
    prompts: Sequence[Tensor],
    generate: Generate,
    counts: AcceptanceCounts,
    cold: bool,
    shapes: Iterable[Paths] | None = None,
    progress: Progress | None = None,
) -> Watch:
    """Decode the prompts with the drafter's tree as it is, or with several in turn, and watch.

    The drafter begins with nothing learnt. No prompt is decoded twice: what it learnt from a prompt would tell it the
    answer.

    Args:
        handle: the speculation.
        prompts: int64 ``[1, W]`` each.
        generate: decodes a prompt with this drafter.
        counts: where walks are counted.
        cold: forget before every prompt.
        shapes: trees to take in turn, each for some steps.
        progress: told (done, of, what).
    """
    watch = Watch(handle, counts, shapes)
    initial = handle.drafter.state_dict()
    handle.observers.append(watch)
    try:
        for index, prompt in enumerate(prompts, start=1):
            if index == 1 or cold:
                handle.drafter.reset()
                if initial:
                    handle.drafter.load_state_dict(initial)
            generate(prompt)
            if progress is not None:
                progress(index, len(prompts), "acceptance, cold" if cold else "acceptance, warm")
    finally:
        handle.observers.remove(watch)
        handle.drafter.reset()
        if initial:
            handle.drafter.load_state_dict(initial)
    return watch


def plain_seconds(handle: Speculation, prompts: Sequence[Tensor], generate: Generate) -> float:
    """Median seconds of a step of the plain loop.

    Args:
        handle: the speculation, with the drafter ``none``, in force.
        prompts: int64 ``[1, W]`` each.
        generate: decodes a prompt with it.
    """
    spent: list[float] = []
    clock = [0.0]

    def watch(state: DecodeState, step: Step) -> None:  # noqa: ARG001 - the observer's signature
        now = time.perf_counter()
        if step.tree is not None:
            spent.append(now - clock[0])
        clock[0] = time.perf_counter()

    handle.observers.append(watch)
    try:
        for prompt in prompts:
            generate(prompt)
    finally:
        handle.observers.remove(watch)
    if not spent:
        raise ValueError("no text came to a second token; expected longer answers (max_new_tokens)")
    return statistics.median(spent)


def fit_costs(costs: Sequence[StepCost], passes: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """Seconds of drafting (per step, node, level) and of the rest (per step, node), from steps of several sizes.

    Steps of one size count once, by their median: a page fault in one of them says nothing. Drafting costs nothing
    less with more nodes, so its coefficients are not negative. The rest may fall: what a drafter has computed of the
    target already, the pass need not.

    Args:
        costs: of single steps.
        passes: ``[M]``, seconds of the target's pass over 1..M nodes; larger steps are left out.
    """
    groups: dict[tuple[int, int], list[StepCost]] = defaultdict(list)
    for cost in costs:
        if cost.nodes <= len(passes):
            groups[cost.nodes, cost.depth].append(cost)
    if not groups:
        raise ValueError(f"no step over at most {len(passes)} nodes was seen; expected more prompts or longer answers")
    sizes = np.array(list(groups), float)
    weights = np.sqrt([len(group) for group in groups.values()])
    draft = np.array([statistics.median(cost.draft_s for cost in group) for group in groups.values()])
    rest = np.array([statistics.median(cost.whole_s - cost.draft_s for cost in group) for group in groups.values()])
    rest -= passes[sizes[:, 0].astype(int) - 1]
    ones = np.ones(len(sizes))
    fixed, node, level = _not_negative(np.stack([ones, sizes[:, 0] - 1, sizes[:, 1]], 1), draft, weights)
    spread = len({*sizes[:, 0].tolist()}) > 1
    design = np.stack([ones, sizes[:, 0] - 1], 1) if spread else ones[:, None]
    solved = np.linalg.lstsq(design * weights[:, None], rest * weights, rcond=None)[0]
    return (fixed, node, level), (float(solved[0]), float(solved[1]) if spread else 0.0)


def _not_negative(design: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Least squares with coefficients >= 0, of three unknowns: the best of all choices of which are 0."""
    best, least = np.zeros(3), float("inf")
    for count in range(1, 4):
        for chosen in itertools.combinations(range(3), count):
            part = design[:, chosen] * weights[:, None]
            solved = np.linalg.lstsq(part, wanted * weights, rcond=None)[0]
            error = float(((part @ solved - wanted * weights) ** 2).sum())
            if (solved >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(3), error
                best[list(chosen)] = solved
    return float(best[0]), float(best[1]), float(best[2])
