"""Medusa's heads, trees and lesson: what the method promises, against definitions written out plainly.

Shapes: B rows, T tokens, K heads, L blocks, H hidden size, V vocabulary, N nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import specdec
from drafters.medusa import Medusa
from drafters.medusa_heads import MedusaHeads, MedusaLesson, new_heads
from drafters.medusa_trees import PUBLISHED, best_paths, published_accuracies, published_paths
from specdec import capabilities
from specdec.decoding import Step
from specdec.interfaces import DecodeState
from specdec.learning import Trainable
from specdec.target import Target
from specdec.templates import Template
from zoo import HIDDEN, PAD, VOCAB, build, untrained
from zoo import prompts as random_prompts

pytestmark = untrained("medusa")

CHAIN = [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]
CLOSE = 1e-4

# Nodes at depths 1, 2, ... of the published trees.
DEPTHS = {
    "mc_sim_7b_63": [10, 28, 23, 2],
    "vicuna_7b_stage1": [10, 32, 20, 1],
    "vicuna_7b_stage2": [10, 23, 23, 7],
    "vicuna_13b_stage1": [10, 29, 23, 1],
    "vicuna_13b_stage2": [10, 19, 25, 9],
    "vicuna_33b_stage1": [10, 34, 19],
    "vicuna_33b_stage2": [10, 24, 24, 5],
    "zephyr_stage2": [10, 27, 23, 3],
}


@cache
def model_of(family: str) -> Any:
    return build(family).requires_grad_(False)


def target_of(model: Any) -> Target:
    """As a drafter gets it: tried out."""
    target = Target(model)
    capabilities.check(target)
    return target


def inputs_of(batch: int) -> dict[str, Tensor]:
    ids, mask = random_prompts(batch, VOCAB, 3)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def fitted(model: Any, **options: Any) -> Medusa:
    drafter = Medusa(**options)
    assert drafter.fit(target_of(model)) is None
    return drafter


def heads_of(drafter: Medusa) -> MedusaHeads:
    assert drafter.heads is not None
    return drafter.heads


@torch.no_grad()
def shake(heads: MedusaHeads, scale: float = 0.3, seed: int = 0) -> MedusaHeads:
    """Random weights in place of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)
    return heads


@torch.no_grad()
def final_states(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """What the output head receives, ``[B, T, H]``."""
    with Target(model).router.taps(("final",)) as recorded:
        model(input_ids=ids, use_cache=False, **inputs)
    return recorded["final"][0]


def plain_head(heads: MedusaHeads, head: int, x: Tensor) -> Tensor:
    """By the definition: x + SiLU(W x + b), block after block."""
    for block in heads.each_block():
        x = x + F.silu(x @ block.weight[head].T + block.bias[head])
    return x


def test_published_trees() -> None:
    assert set(PUBLISHED) == set(DEPTHS)
    for name, depths in DEPTHS.items():
        paths = published_paths(name)
        assert len(paths) == len(set(paths)) == 63
        assert [count for _, count in sorted(Counter(map(len, paths)).items())] == depths
        assert max(rank for path in paths for rank in path) < 10
        Template.from_paths(paths)
    with pytest.raises(ValueError, match=r"unknown tree 'mc_sim'; known: mc_sim_7b_63, vicuna_7b_stage1"):
        Medusa(tree="mc_sim")


def test_accuracies_behind_the_default_tree() -> None:
    rates = published_accuracies()
    assert [row[0] for row in rates] == [0.560, 0.316, 0.201, 0.147, 0.118]
    for row, top_5 in zip(rates, (0.780, 0.563, 0.417, 0.340, 0.300), strict=True):
        assert sum(row[:5]) == pytest.approx(top_5, abs=0.002)
        assert row == sorted(row, reverse=True)
    for count in (1, 5, 24, 63):
        paths = best_paths(count, 4, VOCAB)
        assert len(paths) == count
        assert max(map(len, paths)) <= 4
        Template.from_paths(paths)
    assert max(map(len, best_paths(63, 2, VOCAB))) == 2
    assert max(rank for path in best_paths(30, 4, 3) for rank in path) == 2


def test_trees_follow_the_accuracies_that_heads_remember() -> None:
    target = target_of(model_of("llama"))
    drafter = fitted(model_of("llama"), num_nodes=4)
    drafter.acceptance = [[0.9, 0.05], [0.9, 0.05], [0.9, 0.05], [0.9, 0.05]]
    assert drafter.fit(target) is None
    assert drafter.template.topology.parents.tolist() == [[0, 0, 1, 2, 3]]
    drafter.acceptance = [[0.3, 0.29, 0.28, 0.01], [0.1]]
    assert drafter.fit(target) is None
    assert drafter.template.topology.parents.tolist() == [[0, 0, 0, 0, 1]]
    assert drafter.needs.max_nodes == 5
    # Of a few held-out texts none may have had the token of some rank: the tree is full all the same.
    drafter.acceptance = [[0.0, 0.1], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert drafter.fit(target) is None
    assert drafter.template.num_nodes == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tree": CHAIN, "num_heads": 3}, "at most 3 levels, one for each of its heads; got one of 4"),
        ({"tree": "mc_sim_7b_63", "num_heads": 2}, "at most 2 levels.* got one of 4"),
        ({"tree": [[rank] for rank in range(VOCAB + 1)]}, f"ranks below {VOCAB}.* got rank {VOCAB}"),
    ],
)
def test_trees_that_the_heads_cannot_fill(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"does not fit LlamaForCausalLM: it needs a tree of .*{said}"):
        specdec.speculate(model_of("llama"), Medusa(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"tree": [[0], [2]]}, r"\[2\] needs \[1\]"),
    ],
)
def test_wrong_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Medusa(**options)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_new_heads_say_what_the_target_says(family: str) -> None:
    """Exactly: W = b = 0 leaves x + SiLU(0) = x, and the output head is the target's, soft-cap and bias included."""
    model = model_of(family)
    target, ids = target_of(model), torch.arange(2, 26).view(2, 12)
    states = final_states(model, ids)
    heads = new_heads(target, 3, 2, own_head=False)
    assert torch.equal(heads(states), states.unsqueeze(-2).expand(-1, -1, 3, -1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for head in range(3):
            assert torch.equal(target.head(heads.one(head, states)), expected)
        last = states[:, -1]
        assert torch.equal(heads.logits(last, target, 3), target.head(last[:, None].repeat(1, 3, 1)))


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_new_output_heads_are_copies_of_the_targets(family: str) -> None:
    """Of the target's output head's weight and bias."""
    model = model_of(family)
    target, states = target_of(model), final_states(model, torch.arange(2, 26).view(2, 12))
    heads = new_heads(target, 3, 1, own_head=True)
    with torch.no_grad():
        for head in range(3):
            assert torch.equal(heads.logits_of(head, states[0], target), target.head(states[:1])[0])
        torch.testing.assert_close(
            heads.logits(states[:, -1], target, 2), target.head(states[:, -1:]).expand(-1, 2, -1), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_no_copy_of_an_output_head_says_what_a_soft_cap_or_scale_makes_of_it(family: str, tmp_path: Path) -> None:
    target = target_of(model_of(family))
    assert "own_head=false: " in str(Medusa(own_head=True).fit(target))
    shared = Medusa(path="new")
    assert shared.fit(target) is None
    with pytest.raises(ValueError, match="expected layout specdec or medusa_v2, which share the output head, and own_"):
        shared.save(tmp_path, "medusa")
    shared.save(tmp_path)


@pytest.mark.parametrize("own_head", [False, True])
def test_all_heads_at_once_are_each_head_alone(own_head: bool) -> None:
    model = model_of("llama")
    target = target_of(model)
    heads = shake(new_heads(target, 4, 3, own_head))
    states = final_states(model, torch.arange(2, 26).view(2, 12))
    with torch.no_grad():
        expected = torch.stack([plain_head(heads, head, states) for head in range(4)], dim=-2)
        torch.testing.assert_close(heads(states), expected, atol=CLOSE, rtol=CLOSE)
        torch.testing.assert_close(heads(states, 2), expected[..., :2, :], atol=CLOSE, rtol=CLOSE)
        one = torch.stack([heads.one(head, states) for head in range(4)], dim=-2)
        torch.testing.assert_close(one, expected, atol=CLOSE, rtol=CLOSE)
        logits = torch.stack([heads.logits_of(head, states[:, -1], target) for head in range(4)], dim=1)
        torch.testing.assert_close(heads.logits(states[:, -1], target, 4), logits, atol=1e-3, rtol=CLOSE)


def test_blocks_of_a_head_are_different_parameters() -> None:
    heads = MedusaHeads(2, 3, HIDDEN)
    parameters = [part for block in heads.each_block() for part in (block.weight, block.bias)]
    assert len({parameter.data_ptr() for parameter in parameters}) == 6
    assert sum(parameter.numel() for parameter in heads.parameters()) == 2 * 3 * (HIDDEN**2 + HIDDEN)
    own = MedusaHeads(2, 1, HIDDEN, VOCAB)
    assert sum(parameter.numel() for parameter in own.parameters()) == 2 * (HIDDEN**2 + HIDDEN + VOCAB * HIDDEN)


class Watch:
    """After every step: the states that the heads read, and what they proposed from them, by the definitions."""

    def __init__(self, model: Any, drafter: Medusa, paths: Sequence[Sequence[int]]) -> None:
        self.model, self.drafter = model, drafter
        self.paths = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        self.states: Tensor | None = None
        self.trees = 0

    def __call__(self, state: DecodeState, step: Step) -> None:
        if step.tree is not None and self.states is not None:
            self._check_tree(step)
        rows = [state.history.row(row)[:-1].tolist() for row in range(state.batch_size)]
        # The newest token is the next root, which has not been read yet.
        self.states = torch.stack([final_states(self.model, torch.tensor([row]))[0, -1] for row in rows])
        if step.tree is not None:
            assert self.drafter._state is not None
            for row, finished in enumerate(state.finished):
                if not finished:
                    torch.testing.assert_close(self.drafter._state[row], self.states[row], atol=CLOSE, rtol=CLOSE)

    def _check_tree(self, step: Step) -> None:
        assert step.tree is not None
        assert self.states is not None
        self.trees += 1
        for row, done in enumerate(step.verification.was_finished):
            if done:
                continue
            for head in range(4):
                with torch.no_grad():
                    state = plain_head(heads_of(self.drafter), head, self.states[row])
                    scores = self.model.get_output_embeddings()(state)
                for node, path in enumerate(self.paths, start=1):
                    if len(path) == head + 1:
                        token = int(step.tree.token_ids[row, node])
                        better = int((scores > scores[token] + CLOSE).sum())
                        at_most = int((scores >= scores[token] - CLOSE).sum())
                        assert better <= path[-1] < at_most


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("llama", 3), ("gemma3_text", 3), ("gpt2", 3)])
def test_states_and_tokens_of_every_step(family: str, batch: int) -> None:
    model, inputs = model_of(family), inputs_of(batch)
    paths = published_paths("vicuna_7b_stage2")
    drafter = fitted(model, tree="vicuna_7b_stage2", num_layers=2)
    shake(heads_of(drafter), 0.1)
    watch = Watch(model, drafter, paths)
    specdec.speculate(model, drafter)
    try:
        specdec.speculation_of(model).observers.append(watch)
        text = model.generate(**inputs, max_new_tokens=20)
    finally:
        specdec.restore(model)
    assert watch.trees > 10
    assert text.tolist() == model.generate(**inputs, max_new_tokens=20).tolist()
    assert drafter._state is None, "the request is over"


def test_heads_beyond_the_tree_are_not_computed() -> None:
    model = model_of("llama")
    drafter = fitted(model, tree=[[0], [1]], num_heads=3)
    asked: list[Any] = []
    heads = heads_of(drafter)
    heads.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    specdec.speculate(model, drafter)
    try:
        model.generate(**inputs_of(1), max_new_tokens=6)
    finally:
        specdec.restore(model)
    assert set(asked) == {1}


# Two texts in the first row, one and padding (a text of its own, unwanted) in the second.
POSITIONS = [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]]
WANTED = [[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]]


def batch_of(model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
    positions, wanted = torch.tensor(POSITIONS), torch.tensor(WANTED).bool()
    return ids, positions, wanted, final_states(model, ids, position_ids=positions)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("labels", ["text", "teacher"])
def test_the_lesson_is_its_definition(labels: str, own_head: bool) -> None:
    model = model_of("llama")
    drafter = fitted(model, num_layers=2, own_head=own_head)
    shake(heads_of(drafter))
    lesson = drafter.lesson(target_of(model), decay=0.7, labels=labels)
    assert isinstance(drafter, Trainable)
    assert lesson.taps == ("final",)
    ids, positions, wanted, states = batch_of(model)
    got = lesson(ids, positions, wanted, {"final": states})
    heads, total = heads_of(drafter), torch.zeros(())
    for head in range(4):
        losses, ranks = [], []
        for row in range(2):
            for t in range(12 - head - 2):
                ahead = t + head + 2
                if not wanted[row, ahead] or positions[row, ahead] != positions[row, t] + head + 2:
                    continue
                label = int(ids[row, ahead])
                if labels == "teacher":
                    label = int(model.get_output_embeddings()(states[row, ahead - 1]).argmax())
                state = plain_head(heads, head, states[row, t])
                output = model.get_output_embeddings().weight if heads.output is None else heads.output[head]
                scores = (output @ state).log_softmax(-1)
                losses.append(-scores[label])
                ranks.append(int((scores > scores[label]).sum()))
        total = total + 0.7 ** (head + 1) * torch.stack(losses).mean()
        assert int(got["counted"][head]) == len(losses) > 0
        assert got["hits"][head].tolist() == [sum(rank < best for rank in ranks) for best in range(1, 6)]
    torch.testing.assert_close(got["loss"], total, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(("family", "own_head"), [("llama", False), ("llama", True), ("gemma2", False), ("phi", True)])
def test_only_the_heads_learn(family: str, own_head: bool) -> None:
    model = build(family).requires_grad_(False)
    drafter = fitted(model, num_layers=2, own_head=own_head)
    lesson = drafter.lesson(target_of(model))
    assert isinstance(lesson, MedusaLesson)
    assert {id(part) for part in lesson.parameters()} == {id(part) for part in heads_of(drafter).parameters()}
    assert not list(lesson.buffers())
    ids, positions, wanted, states = batch_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.SGD(lesson.parameters(), lr=0.1)
    first = lesson(ids, positions, wanted, {"final": states})["loss"]
    first.backward()
    assert all(part.grad is None for part in model.parameters())
    for name, part in lesson.named_parameters():
        assert part.grad is not None
        assert float(part.grad.abs().sum()) > 0, name
    optimiser.step()
    assert float(lesson(ids, positions, wanted, {"final": states})["loss"].detach()) < float(first.detach())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_batch_without_wanted_tokens() -> None:
    model = model_of("llama")
    lesson = fitted(model, own_head=True).lesson(target_of(model))
    ids, positions, wanted, states = batch_of(model)
    got = lesson(ids, positions, torch.zeros_like(wanted), {"final": states})
    got["loss"].backward()
    assert float(got["loss"].detach()) == 0
    assert got["counted"].tolist() == [0] * 4
    assert got["hits"].tolist() == [[0] * 5] * 4
    assert isinstance(lesson, MedusaLesson)
    assert all(part.grad is not None and not part.grad.any() for part in lesson.parameters())


def test_lesson_options() -> None:
    model = model_of("llama")
    drafter, target = fitted(model), target_of(model)
    for options, said in (
        ({"decya": 1}, "takes no decya; it takes: joint, decay, labels"),
        ({"decay": 0.0}, "expected 0 < decay <= 1, got 0.0"),
        ({"labels": "student"}, "unknown labels 'student'; known: text, teacher"),
        ({"joint": True, "labels": "text"}, "takes no labels; it takes: joint, decay, weight, schedule, distill"),
    ):
        with pytest.raises(ValueError, match=said):
            drafter.lesson(target, **options)
    with pytest.raises(ValueError, match="bound to no target"):
        Medusa().lesson(target)


def learn(lesson: Any, batch: dict[str, Tensor], states: dict[Any, Tensor], steps: int = 400) -> None:
    """Until every head is right everywhere, and clearly so."""
    optimiser = torch.optim.Adam(lesson.parameters(), lr=0.02)
    for _ in range(steps):
        got = lesson(**batch, states=states)
        if torch.equal(got["hits"][:, 0], got["counted"]) and float(got["loss"].detach()) < 0.2:
            return
        optimiser.zero_grad()
        got["loss"].backward()
        optimiser.step()
    raise AssertionError(f"{got['hits'][:, 0].tolist()} of {got['counted'].tolist()} after {steps} steps")


def one_text(model: Any, new_tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A prompt, and the batch that teaches the model's own answer to it."""
    inputs = inputs_of(1)
    text = model.generate(**inputs, max_new_tokens=new_tokens)
    wanted = torch.arange(text.shape[1])[None] >= inputs["input_ids"].shape[1]
    return inputs, {"token_ids": text, "positions": torch.arange(text.shape[1])[None], "wanted": wanted}


def answered(model: Any, drafter: Medusa, inputs: dict[str, Tensor], new_tokens: int) -> Any:
    specdec.speculate(model, drafter)
    try:
        return model.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True)
    finally:
        specdec.restore(model)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_that_know_one_text_are_accepted_to_the_last(family: str, own_head: bool) -> None:
    """Head k learns x_{t+2+k}: any other offset would leave the chain of best tokens unaccepted."""
    model = build(family).requires_grad_(False)
    inputs, batch = one_text(model, 5 * 5 + 1)
    drafter = fitted(model, tree=CHAIN, num_layers=2, own_head=own_head)
    states = final_states(model, batch["token_ids"])
    learn(drafter.lesson(target_of(model)), batch, {"final": states})
    output = answered(model, drafter, inputs, 26)
    assert output.sequences.tolist() == batch["token_ids"].tolist()
    assert output.speculation.accepted_lengths == {4: 5}


def test_learning_in_float32_beside_a_target_in_half_precision() -> None:
    model = build("llama", seed=1, dtype=torch.bfloat16).requires_grad_(False)
    inputs, batch = one_text(model, 16)
    drafter = fitted(model, tree=CHAIN, num_layers=2)
    states = {"final": final_states(model, batch["token_ids"])}
    lesson = drafter.lesson(target_of(model))
    assert {part.dtype for part in heads_of(drafter).parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        learn(lesson, batch, states)
    # The text may part from this one at a near-tie of bfloat16, its beginning does not.
    output = answered(model, drafter, inputs, 6)
    assert output.sequences[0].tolist() == batch["token_ids"][0, : output.sequences.shape[1]].tolist()
    assert output.speculation.accepted_lengths == {4: 1}
    assert {part.dtype for part in heads_of(drafter).parameters()} == {torch.float32}


def test_what_was_learnt_stays_with_the_model() -> None:
    model = model_of("llama")
    drafter = fitted(model)
    shake(heads_of(drafter))
    kept = {name: tensor.clone() for name, tensor in heads_of(drafter).state_dict().items()}
    specdec.restore(specdec.speculate(model, drafter))
    assert all(torch.equal(kept[name], tensor) for name, tensor in heads_of(drafter).state_dict().items())
    drafter.acceptance, drafter.ignored = [[0.9]] * 4, ["something"]
    specdec.restore(specdec.speculate(build("gpt2"), drafter))
    assert not any(tensor.any() for tensor in heads_of(drafter).state_dict().values()), "another model, new heads"
    assert (drafter.acceptance, drafter.ignored) == (None, []), "and nothing of the old ones"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_follow_the_targets_dtype(dtype: str) -> None:
    model = build("llama", dtype=getattr(torch, dtype))
    for options in ({}, {"own_head": True, "num_layers": 0}):
        drafter = fitted(model, **options)
        assert {part.dtype for part in heads_of(drafter).parameters()} == {model.dtype}
        specdec.speculate(model, drafter)
        output = model.generate(**inputs_of(3), max_new_tokens=8, return_dict_in_generate=True)
        assert output.speculation.drafted_nodes >= 24
