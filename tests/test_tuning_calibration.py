"""What is seen of a drafter within real requests: counts that are known beforehand, costs that are put in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from drafters.base import BaseDrafter
from equality import VOCAB, new_text, prompt, tiny_llama
from specdec.interfaces import DecodeState, Needs
from specdec.templates import Template, chain_paths, kept_template
from specdec.tree import TokenTree
from specdec.tuning.calibration import StepCost, Watch, calibrate, fit_costs, plain_seconds, wide_tree
from specdec.tuning.choice import Costs, Profile, choose, expect
from specdec.tuning.counts import AcceptanceCounts

TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]


class Scripted(BaseDrafter):
    """Knows the text; hides the right token at a rank of its choosing, by a plan of ranks per depth (None = nowhere).

    Args:
        plans: one per step, in turn.
    """

    name = "scripted"
    widest, deepest = 3, None

    def __init__(self, plans: Sequence[Sequence[int | None]]) -> None:
        self.plans, self.text, self.step = plans, list[int](), 0
        self.needs = Needs(max_nodes=16)
        self.reshape(TREE)

    @property
    def tree_paths(self) -> list[tuple[int, ...]]:
        return self.template.paths

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        self.template: Template = kept_template(tuple(map(tuple, paths)), torch.device("cpu"))

    def reset(self) -> None:
        self.step = 0

    def propose(self, state: DecodeState) -> TokenTree:
        plan, ahead = self.plans[self.step % len(self.plans)], [*self.text[state.emitted[0] :], *[0] * 8]
        self.step += 1
        tokens = [int(state.root[0])]
        for path in self.template.paths:
            right = all(rank == wanted for rank, wanted in zip(path, plan, strict=False)) and len(path) <= len(plan)
            # Wrong ones differ from the right one and from each other.
            tokens.append(ahead[len(path) - 1] if right else (ahead[len(path) - 1] + 1 + path[-1]) % VOCAB)
        return TokenTree(torch.tensor([tokens]), self.template.topology, rank=self.template.ranks[None])


@pytest.fixture
def scripted() -> tuple[Any, Scripted]:
    model, drafter = tiny_llama(), Scripted([[0, 0, 0], [1], [0, 1], [2], [None], [1, 0]])
    text = model.generate(**prompt(), max_new_tokens=40, do_sample=False)
    drafter.text = new_text(text, prompt())[0]
    return specdec.speculate(model, drafter), drafter


def generate(model: Any, ids: torch.Tensor, tokens: int = 40) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)


def test_counts_that_are_known_beforehand(scripted: tuple[Any, Scripted]) -> None:
    model, drafter = scripted
    handle, counts = specdec.speculation_of(model), AcceptanceCounts(3, 3)
    watch = calibrate(handle, [prompt()["input_ids"]], lambda ids: generate(model, ids), counts, cold=False)
    # 39 tokens after the prefill's; a round of the plans emits 4 + 2 + 3 + 2 + 1 + 3 = 15: two rounds and four steps
    # (4 + 2 + 3 emit all that is left), the last of which stops and does not count.
    assert watch.tokens_per_step == 39 / 15
    assert counts.steps == 14
    assert counts.taken.tolist() == [[5, 5, 2], [5, 2, 0], [3, 0, 0]]
    #                                 depth 1: all steps; depth 2 below rank 0 two children, below rank 1 one
    assert counts.reached.tolist() == [[14, 14, 14], [10, 5, 0], [3, 0, 0]]
    assert not handle.observers
    assert {(cost.nodes, cost.depth) for cost in watch.costs} == {(8, 3)}
    assert all(0 < cost.draft_s < cost.whole_s for cost in watch.costs)
    profile = watch.profile(counts.own_rates())
    assert not profile.is_chain
    assert profile.rates[0] == pytest.approx([5 / 14, 5 / 14, 2 / 14])


def test_another_tree_every_few_steps(scripted: tuple[Any, Scripted]) -> None:
    model, drafter = scripted
    handle, counts = specdec.speculation_of(model), AcceptanceCounts(3, 3)
    shapes: list[Any] = [[(0,)], TREE, chain_paths(3)]
    ids = prompt()["input_ids"]
    watch = calibrate(handle, [ids], lambda ids: generate(model, ids), counts, cold=True, shapes=shapes)
    sizes = [cost.nodes for cost in watch.costs]
    assert sizes[:16] == [*[2] * 5, *[8] * 5, *[4] * 5, 2], "the first step over another size is not timed"
    assert counts.reached[0, 1] < counts.steps, "chains have no room for a second child"


class Learning(Scripted):
    """Counts what it was told, as a drafter that learns does."""

    def __init__(self, told: int = 0) -> None:
        super().__init__([[None]])
        self.told, self.seen = told, list[int]()

    def start(self, *_: Any) -> None:
        self.seen.append(self.told)
        self.told += 1

    def reset(self) -> None:
        self.told = 0

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.told}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.told = saved["told"]


@pytest.mark.parametrize(("cold", "expected"), [(False, [5, 6, 7]), (True, [5, 5, 5])])
def test_what_was_learnt(cold: bool, expected: list[int]) -> None:
    drafter = Learning(told=5)
    model = specdec.speculate(tiny_llama(), drafter)
    handle = specdec.speculation_of(model)
    prompts, counts = [prompt()["input_ids"]] * 3, AcceptanceCounts(1, 1)
    calibrate(handle, prompts, lambda ids: generate(model, ids, 4), counts, cold)
    assert drafter.seen == expected, "what it began with stays; what a prompt taught it only where it is warm"
    assert drafter.told == 5


def test_drafts_of_a_chain() -> None:
    model = specdec.speculate(tiny_llama(), "prompt_lookup", num_draft_tokens=6)
    handle, counts = specdec.speculation_of(model), AcceptanceCounts(6, 2, is_chain=True)
    offered: list[int] = []
    handle.observers.append(
        lambda _, step: offered.append(0 if step.tree is None else sum(step.verification.offered[0]))
    )
    watch = calibrate(handle, [prompt()["input_ids"]], lambda ids: generate(model, ids), counts, cold=False)
    profile = watch.profile(counts.own_rates())
    assert profile.is_chain
    assert profile.offered is not None
    drafts = offered[1:]
    for depth, share in enumerate(profile.offered, start=1):
        assert share == pytest.approx(sum(draft >= depth for draft in drafts) / len(drafts), abs=1 / len(drafts))
    assert profile.widths == [1.0] * 6
    assert isinstance(watch, Watch)


def test_costs_that_were_put_in() -> None:
    generator = np.random.default_rng(0)
    passes = np.linspace(1.0, 3.0, 40)
    steps = []
    for nodes, depth in ((3, 1), (8, 2), (8, 4), (20, 3), (33, 6), (33, 2)):
        for _ in range(9):
            draft = 0.2 + 0.01 * (nodes - 1) + 0.05 * depth
            hiccup = 3.0 * (generator.random() < 0.2)
            steps.append(StepCost(nodes, depth, draft, draft + passes[nodes - 1] + 0.4 - 0.005 * (nodes - 1) + hiccup))
    draft_s, rest_s = fit_costs([*steps, StepCost(90, 3, 9.0, 9.0)], passes)
    assert draft_s == pytest.approx((0.2, 0.01, 0.05))
    assert rest_s == pytest.approx((0.4, -0.005), rel=0.01)
    alone, rest_s = fit_costs([StepCost(8, 3, 0.5, 2.0)], passes)
    assert alone == pytest.approx((0.5, 0.0, 0.0)), "one size tells of no slope"
    assert rest_s == pytest.approx((1.5 - passes[7], 0.0))
    assert fit_costs([StepCost(n, 1, 1.0 - n / 50, 2.0) for n in (2, 9, 20)], passes)[0][1] == 0.0, "never negative"
    with pytest.raises(ValueError, match="at most 40 nodes"):
        fit_costs([StepCost(90, 3, 9.0, 9.0)], passes)


@pytest.mark.parametrize("other", [20, 24, 28, 33])
@pytest.mark.parametrize("error", [-0.02, -0.01, 0.01, 0.02])
def test_sizes_that_lie_side_by_side_say_nothing_of_the_slope(other: int, error: float) -> None:
    # Milliseconds as they are measured; the tree of 25 and another one are in use, whose times are off by a little.
    passes = np.interp(np.arange(1, 65), [1, 8, 16, 25, 64], [6.5, 7.0, 8.2, 9.3, 14.0])
    steps = [
        StepCost(nodes, 5, 0.3, (passes[nodes - 1] + 1.0) * (1 + off)) for nodes, off in ((25, 0.0), (other, error))
    ] * 40
    _, rest = fit_costs(steps, passes)
    truth, believed = Costs(passes, 7.5, rest=(1.0, 0.0)), Costs(passes, 7.5, rest=rest)
    profile = Profile([[0.46, 0.1, 0.05, 0.03]] * 6)
    chosen = choose(profile, believed, 64).paths
    assert expect(chosen, profile, truth).rate > 0.98 * choose(profile, truth, 64).rate


def test_wide_trees() -> None:
    wide = wide_tree(8, 6, 128)
    Template.from_paths(wide)
    assert len(wide) == 127
    assert {path[0] for path in wide} == set(range(8))
    assert max(map(len, wide)) >= 4
    assert wide_tree(1, 5, 128) == chain_paths(5)
    assert max(map(len, wide_tree(8, 2, 128))) == 2


def test_plain_steps() -> None:
    model = specdec.speculate(tiny_llama(), "none")
    handle = specdec.speculation_of(model)
    assert plain_seconds(handle, [prompt()["input_ids"]], lambda ids: generate(model, ids, 5)) > 0
    assert not handle.observers
    with pytest.raises(ValueError, match="second token"):
        plain_seconds(handle, [prompt()["input_ids"]], lambda ids: generate(model, ids, 1))
