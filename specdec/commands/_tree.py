"""Find the tree that suits a drafter, a target and a device: measure, choose, look again with what was chosen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.build import shaped_names
from specdec.commands._session import Session
from specdec.decoding import Step
from specdec.generation import Speculation, speculation_of, using
from specdec.interfaces import DecodeState, Shaped
from specdec.templates import chain_paths, ranked_paths
from specdec.tuning.calibration import StepCost, Watch, calibrate, fit_costs, plain_seconds, why_none, wide_tree
from specdec.tuning.choice import Choice, Costs, Paths, Profile, choose, expect
from specdec.tuning.counts import AcceptanceCounts
from specdec.tuning.files import TreeFile, described
from specdec.tuning.timing import curve, graph_sizes, pass_seconds, sizes_up_to

_GRAPHS = (4, 8, 12, 16, 24, 32, 48, 64)  # sizes of trees considered where passes run as graphs
_SHAPES = (4, 8, 16, 24, 32, 48, 64, 96)  # nodes of the trees that drafting is timed with
_AGAIN = 16.0  # walks that the first look is worth beside a second one
_LOOKS = 2  # at most, with trees chosen by what the look before saw
STATES = ("warm", "cold")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        max_nodes: of the largest tree considered, the root included. Where passes run as graphs, trees of this size, of
            the published one's and of some sizes between are considered, each of which a graph is made for.
        max_depth: of the deepest one, where the drafter sets no limit.
        max_width: ranks considered.
        calibration_nodes: of the wide tree that acceptance is counted with.
        contexts: tokens known when passes are timed; the mean over them counts.
        repeats: timed passes per size and context.
        state: whose acceptance counts: ``warm``, which keeps what it learns from prompt to prompt, or ``cold``.

    Raises:
        ValueError: a number out of range, an unknown state.
    """

    max_nodes: int = 128
    max_depth: int = 12
    max_width: int = 12
    calibration_nodes: int = 128
    contexts: Sequence[int] = field(default=(256,))
    repeats: int = 15
    state: str = "warm"

    def __post_init__(self) -> None:
        numbers = (self.max_depth, self.max_width, self.repeats, *self.contexts)
        if not all(isinstance(n, int) and n >= 1 for n in numbers) or not self.contexts:
            raise ValueError(
                f"expected max_depth, max_width, repeats and contexts to be whole numbers >= 1; got {self}"
            )
        if min(self.max_nodes, self.calibration_nodes) < 2:
            raise ValueError(f"expected max_nodes and calibration_nodes >= 2, the root included; got {self}")
        if self.state not in STATES:
            raise ValueError(f"unknown state {self.state!r}; known: {', '.join(STATES)}")


@dataclass(frozen=True)
class _Look:
    """A tree with the tokens per step seen with it and the seconds reckoned, and what else was seen."""

    choice: Choice
    profile: Profile
    steps: Sequence[StepCost]


class TreeTuner:
    """One drafter on one target.

    Args:
        session: both; the drafter begins with its own tree.
        ids: calibration prompts, int64 ``[1, W]`` each.
        plan: how much is measured.
        progress: told (done, of, what is being done).

    Raises:
        ValueError: the drafter has no tree that can be chosen, or a context is longer than the model reads.
    """

    def __init__(
        self, session: Session, ids: Sequence[Tensor], plan: Plan, progress: Callable[[int, int, str], None]
    ) -> None:
        self.session, self.ids, self.plan, self.progress = session, ids, plan, progress
        session.attach("none")
        self.plain: Speculation = speculation_of(session.model)
        session.attach(session.config["drafter"])
        self.handle: Speculation = speculation_of(session.model)
        drafter = self.handle.drafter
        if not isinstance(drafter, Shaped):
            raise ValueError(f"drafter {drafter.name!r} has no tree to tune; these have: {', '.join(shaped_names())}")
        if drafter.widest < 1:
            raise ValueError(f"drafter {drafter.name!r} has no tree to tune as it is set up: {why_none(drafter)}")
        self.drafter: Shaped = drafter
        self.published = drafter.tree_paths
        self.is_chain = drafter.widest == 1
        self.depth = max(plan.max_depth, *map(len, self.published)) if self.is_chain else plan.max_depth
        self.depth = min(self.depth, drafter.deepest or self.depth)
        self.width = min(plan.max_width, drafter.widest)
        self.largest = max(plan.max_nodes, len(self.published) + 1)
        target = self.handle.target
        if (graphs := target.graphs) is not None:
            # Only sizes that are graphs have a time of their own; the chosen tree will be one.
            sizes = (*_GRAPHS, len(self.published) + 1)
            compiling = None if graphs.compiler is None else self._say
            target.use_graphs(self.largest, compiling, graphs.capture is not None, sizes)
        self.graphs = graph_sizes(target)
        context = session.loaded.context_length
        if context is not None and max(plan.contexts) + self.largest > context:
            raise ValueError(
                f"contexts={list(plan.contexts)} and trees of {self.largest} nodes go beyond the {context} tokens that "
                f"{session.loaded.name} reads"
            )

    def run(self) -> TreeFile:
        """Everything; the drafter has its own tree again afterwards."""
        times = self._times()
        curves = [curve(each, stairs=self.graphs is not None) for each in times.values()]
        passes = np.mean(curves, axis=0)
        try:
            rates, more = self._acceptance()
            first: Profile = more.pop("profile")
            costs = self._costs(passes, first)
            looks, costs = self._looks(first, rates, costs)
            costs = self._with_plain(costs)
        finally:
            self.drafter.reshape(self.published)
        best = max(looks, key=lambda look: look.choice.rate)
        more |= {"pass_seconds_by_context": times, "looked_at": [described(look.choice) for look in looks]}
        plain = {"nodes": 1, "levels": 0, "tokens_per_step": 1.0, "ms_per_step": round(1e3 * costs.plain, 3)}
        expected = {
            "chosen": described(best.choice),
            "published": described(looks[0].choice),
            "plain": {**plain, "tokens_per_second": round(1 / costs.plain, 1)},
        }
        target = self.handle.target
        name = self.handle.drafter.name
        return TreeFile(name, target.vocab_size, best.choice.paths, best.profile, costs, {}, expected, more)

    def _choose(self, profile: Profile, costs: Costs) -> Choice:
        return choose(profile, costs, self.plan.max_nodes, self.depth, self.graphs)

    def _times(self) -> dict[int, dict[int, float]]:
        """Context -> size -> seconds."""
        text = torch.cat(list(self.ids), dim=1)
        target, plan, found = self.handle.target, self.plan, dict[int, dict[int, float]]()
        sizes = sizes_up_to(self.largest, self.graphs)
        for tokens in plan.contexts:

            def probe(state: DecodeState, step: Step, tokens: int = tokens) -> None:
                if step.tree is None or tokens in found:
                    return
                assert state.context is not None
                found[tokens] = pass_seconds(
                    target,
                    state.context,
                    sizes,
                    plan.repeats,
                    self.handle.drafter.needs.taps,
                    progress=lambda done, of: self.progress(done, of, f"passes behind {tokens} tokens"),
                )

            repeated = text.repeat(1, -(-tokens // text.shape[1]))[:, :tokens]
            self.handle.observers.append(probe)
            try:
                # Until the loop has verified once; an end of the text must not come before.
                self.session.model.generate(
                    repeated,
                    attention_mask=torch.ones_like(repeated),
                    max_new_tokens=max(4, self.depth),
                    do_sample=False,
                    eos_token_id=None,
                )
            finally:
                self.handle.observers.remove(probe)
        return found

    def _acceptance(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Rates of the state that counts; under ``more`` the profile, all rates and the counts."""
        self.drafter.reshape(wide_tree(self.drafter.widest if self.is_chain else self.width, self.depth, self._wide()))
        learns, found, more = True, dict[str, tuple[Watch, np.ndarray]](), dict[str, Any]()
        for state in STATES:
            if state == "cold" and not learns:
                continue
            counts = self._new_counts()
            watch = self._watch(counts, cold=state == "cold")
            learns = bool(self.handle.drafter.state_dict())
            found[state] = watch, counts.own_rates()
            more[f"rates_{state}"] = np.round(found[state][1], 5).tolist()
            more[f"walks_{state}"] = int(counts.steps)
        if max(counts for name, counts in more.items() if name.startswith("walks")) < 1:
            raise ValueError("no text came to a step that went on; expected longer answers (max_new_tokens)")
        watch, rates = found.get(self.plan.state) or found["warm"]
        return rates, {**more, "profile": watch.profile(rates)}

    def _costs(self, passes: np.ndarray, profile: Profile) -> Costs:
        most = min(len(passes), self.plan.max_nodes) - 1
        if self.is_chain:
            shapes: list[Paths] = [chain_paths(length) for length in {1, 2, 4, 8, self.depth} if length <= self.depth]
        else:
            deep = [path for path, _ in ranked_paths(profile.rates, most, self.depth)]
            flat = [path for path, _ in ranked_paths(profile.rates, most, max(self.depth // 4, 1))]
            shapes = [some[:size] for some in (deep, flat) for size in (*_SHAPES, most) if size <= len(some)]
        watch = self._watch(self._new_counts(), shapes=shapes)
        draft, rest = fit_costs(watch.costs, passes)
        return Costs(passes, float(passes[0]), draft, rest)

    def _with_plain(self, costs: Costs) -> Costs:
        """Costs with those of a plain step, as a share of a step with the drafter's own tree just before it.

        The machine may have been another one, for its speed, when all else was timed minutes ago.
        """
        self.drafter.reshape(self.published)
        shares, steps = list[float](), list[StepCost]()
        for ids in self.ids[: max(len(self.ids) // 4, 1)]:
            seen = calibrate(self.handle, [ids], self.session.generate, self._new_counts(), cold=False).costs
            if not seen:
                continue
            with using(self.session.model, self.plain):
                plain = plain_seconds(self.plain, [ids], self.session.generate)
            shares.append(plain / statistics.median(step.whole_s for step in seen))
            steps += seen
        if not steps:
            raise ValueError("no text came to a second token; expected longer answers (max_new_tokens)")
        own = float(costs.seconds(*np.mean([(step.nodes, step.depth) for step in steps], 0)))
        return replace(costs, plain=statistics.median(shares) * own)

    def _looks(self, profile: Profile, rates: np.ndarray, costs: Costs) -> tuple[list[_Look], Costs]:
        """What is seen with the published tree, then with the best one by the wide tree's rates, and so on.

        A drafter that learns from the nodes of its trees learns more from larger ones, so rates hold for trees of about
        the size that they were counted with. Each look gives rates of its own and the tree that they recommend; of all
        trees looked at the one with the most tokens seen per second counts. The steps seen also correct the costs, by
        what decoding with one tree takes more than was reckoned, on average: looks come minutes apart, so the times of
        a single one tell as much of the machine as of the tree.
        """
        looks = [self._look(self.published, profile, rates, costs)]
        for seen in (profile, *(None,) * _LOOKS):
            costs = self._corrected(costs, looks)
            paths = self._choose(seen or looks[-1].profile, costs).paths
            if any(set(paths) == set(look.choice.paths) for look in looks):
                break
            looks.append(self._look(paths, profile, rates, costs))
        costs = self._corrected(costs, looks)
        seconds = [expect(look.choice.paths, look.profile, costs).seconds for look in looks]
        choices = [replace(look.choice, seconds=each) for look, each in zip(looks, seconds, strict=True)]
        return [replace(look, choice=choice) for look, choice in zip(looks, choices, strict=True)], costs

    def _corrected(self, costs: Costs, looks: Sequence[_Look]) -> Costs:
        """Costs whose fixed share is what was seen on average over the looks."""
        beyond = [
            statistics.median(step.whole_s for step in look.steps)
            - float(costs.seconds(*np.mean([(step.nodes, step.depth) for step in look.steps], 0)))
            for look in looks
            if look.steps
        ]
        fixed, node = costs.rest
        return replace(costs, rest=(fixed + float(np.mean(beyond or [0.0])), node))

    def _look(self, paths: Paths, profile: Profile, rates: np.ndarray, costs: Costs) -> _Look:
        counts = self._new_counts()
        self.drafter.reshape(paths)
        watch = self._watch(counts, cold=self.plan.state == "cold")
        if not self.is_chain:
            profile = Profile(counts.rates(rates, _AGAIN).tolist())
        choice = replace(expect(paths, profile, costs), tokens=watch.tokens_per_step)
        return _Look(choice, profile, watch.costs)

    def _watch(self, counts: AcceptanceCounts, cold: bool = False, shapes: Sequence[Paths] | None = None) -> Watch:
        return calibrate(self.handle, self.ids, self.session.generate, counts, cold, shapes, self.progress)

    def _new_counts(self) -> AcceptanceCounts:
        return AcceptanceCounts(self.depth, 2 if self.is_chain else self.width, self.is_chain)

    def _wide(self) -> int:
        return max(self.plan.calibration_nodes, self.depth + 1)

    def _say(self, text: str) -> None:
        self.progress(0, 1, text)
