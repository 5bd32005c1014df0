"""Drafters that sample, through the real generate: chi-square of the text against the exact law of the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from equality import tiny_llama
from law import Context, Law, joint
from scripted import Sampled
from specdec import sampling
from specdec.build import build, choices, load
from specdec.generation import attach, restore
from specdec.interfaces import AcceptanceRule
from specdec.tree import POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT
from verifiers.acceptance import TargetSampling
from verifiers.block import Block
from verifiers.rejection import RecursiveRejection, TokenWise
from verifiers.traversal import Traversal
from verifiers.tree_attention import TreeVerifier

VOCAB, LENGTH, SAMPLES = 6, 4, 1500
PROMPT = [[2, 3, 5, 2, 3]]
X, W, O = POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT  # noqa: E741 - chosen, with, without

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.7, "top_k": 0},
    "top_k": {"temperature": 0.9, "top_k": 3},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "repetition_penalty": {"repetition_penalty": 1.4, "top_k": 3},
    "min_length": {"min_new_tokens": 3, "top_k": 4, "eos_token_id": 4, "pad_token_id": 0},
}
"""What the request asks for; the last two keep state, so that p is given along the walk only."""


@cache
def model() -> Any:
    return tiny_llama(vocab_size=VOCAB, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, pad_token_id=0)


@cache
def logits_after(length: int) -> Tensor:
    """float64 ``[V, ..., V]``: the logits after every continuation of the prompt by ``length`` tokens."""
    words = (
        torch.cartesian_prod(*[torch.arange(VOCAB)] * length).view(-1, length) if length else torch.empty(1, 0).long()
    )
    with torch.no_grad():
        ids = torch.cat([torch.tensor(PROMPT).expand(len(words), -1), words], dim=1)
        return model()(input_ids=ids).logits[:, -1].double().view(*[VOCAB] * length, VOCAB)


def p_of(settings: dict[str, Any]) -> Callable[[Context], list[float]]:
    """The definition of each setting, in float64; after the end of the text comes padding."""

    @cache
    def p(context: Context) -> list[float]:
        if settings.get("eos_token_id") in context:
            return [float(token == settings["pad_token_id"]) for token in range(VOCAB)]
        ids = PROMPT[0] + list(context)
        logits = logits_after(len(context))[context].clone()
        penalty = settings.get("repetition_penalty", 1.0)
        for token in set(ids):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        if len(context) < settings.get("min_new_tokens", 0):
            logits[settings["eos_token_id"]] = -math.inf
        logits /= settings.get("temperature", 1.0)
        if settings.get("top_k"):
            logits[logits < logits.topk(settings["top_k"]).values[-1]] = -math.inf
        values, order = logits.softmax(-1).sort(descending=True)
        values[values.cumsum(0) - values >= settings.get("top_p", 1.0)] = 0.0
        return torch.zeros_like(values).scatter(0, order, values / values.sum()).tolist()

    return p


def drafter(*plans: Sequence[Sequence[int]]) -> Sampled:
    """Its q is unlike the target's, and one token it never drafts."""
    q = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)).softmax(-1)
    q[:, 5] = 0.0
    return Sampled(q / q.sum(-1, keepdim=True), plans)


def sample(made: Sampled, rule: AcceptanceRule | None, settings: dict[str, Any], samples: int = SAMPLES) -> Tensor:
    """New texts of ``LENGTH`` tokens, every row of one batch a sample; several steps end inside of them."""
    speculating = attach(model(), made, TreeVerifier(rule))
    try:
        torch.manual_seed(0)
        text: Tensor = speculating.generate(
            input_ids=torch.tensor(PROMPT),
            attention_mask=torch.ones(1, 5, dtype=torch.int64),
            do_sample=True,
            max_new_tokens=LENGTH,
            num_return_sequences=samples,
            **settings,
        )
        stats = speculating.speculation
        assert stats.mean_accepted_tokens > 1.05, "something is accepted"
        assert stats.passes > 1, "and a step ends inside the text"
    finally:
        restore(model())
    return text[:, len(PROMPT[0]) :]


def p_value(text: Tensor, law: Law) -> float:
    """Chi-square of the texts against their law, cells with fewer than 5 expected pooled."""
    seen: dict[Context, int] = {}
    for row in text.tolist():
        word = tuple(row) + (0,) * (LENGTH - len(row))
        seen[word] = seen.get(word, 0) + 1
    assert all(law[word] > 0 for word in seen), "an impossible text"
    cells = [(mass * len(text), seen.get(word, 0)) for word, mass in law.items() if mass > 0]
    large = [cell for cell in cells if cell[0] >= 5]
    pooled = [sum(values) for values in zip(*(cell for cell in cells if cell[0] < 5), strict=True)]
    if pooled and pooled[0] > 0:
        large.append((pooled[0], int(pooled[1])))
    statistic = sum((count - expected) ** 2 / expected for expected, count in large)
    return float(torch.special.gammaincc(torch.tensor((len(large) - 1) / 2), torch.tensor(statistic / 2)))


CASES: dict[str, tuple[AcceptanceRule | None, str, list[list[list[int]]]]] = {
    "default, one kind per step": (None, "top_k", [[[O, O], [O]], [[W, W]], [[X, O]]]),
    "default, hot": (None, "temperature", [[[O, O, O]]]),
    "default, nucleus": (None, "top_p", [[[X, W, O], [O]]]),
    "target sampling": (TargetSampling(), "top_k", [[[O, O]]]),
    "token-wise": (TokenWise(), "top_k", [[[W], [W], [W]], [[W]]]),
    "with replacement": (RecursiveRejection("with"), "top_p", [[[W, W], [W]]]),
    "without replacement": (RecursiveRejection("without"), "top_k", [[[O, O], [O]]]),
    "block": (Block(), "top_k", [[[W], [W], [W]], [[X], [W]]]),
    "block, hot": (Block(), "temperature", [[[W], [W]]]),
    "traversal": (Traversal(), "top_k", [[[O, O], [O]], [[W, W], [X]]]),
    "traversal, nucleus": (Traversal(), "top_p", [[[O, O], [W]]]),
}


@pytest.mark.parametrize("case", CASES)
def test_generate_samples_from_the_target(case: str) -> None:
    rule, name, plans = CASES[case]
    settings = SETTINGS[name]
    law = joint(p_of(settings), LENGTH, VOCAB)
    assert p_value(sample(drafter(*plans), rule, settings), law) > 1e-4


@pytest.mark.parametrize("name", ["repetition_penalty", "min_length"])
def test_processors_that_keep_state_fall_back_to_target_sampling(name: str) -> None:
    settings = SETTINGS[name]
    law = joint(p_of(settings), LENGTH, VOCAB)
    text = sample(drafter([[O, O], [O]], [[W, W]]), None, settings, samples=300)
    assert p_value(text, law) > 1e-4
    again = sample(drafter([[W], [X]]), TargetSampling(), settings, samples=300)
    assert text.tolist() == again.tolist(), "under target sampling the text does not depend on the proposals"


class Liar(Sampled):
    """Says that it drew from another q than it did."""

    def propose(self, state: Any) -> Any:
        tree = super().propose(state)
        if tree.draws is not None:
            tree.draws.q = torch.where(tree.draws.q > 0, tree.draws.q.sqrt(), 0.0)
        return tree


def test_chi_square_notices_a_drafter_that_lies() -> None:
    honest = drafter([[W], [W]])
    law = joint(p_of(SETTINGS["top_k"]), LENGTH, VOCAB)
    assert p_value(sample(Liar(honest.q, honest.plans), None, SETTINGS["top_k"]), law) < 1e-6


def test_chi_square_notices_coins_that_are_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that reuses the coins of the step before knows how they fell: it was a rejection that began it."""
    taken = sampling.Coins.take
    monkeypatch.setattr(sampling.Coins, "take", lambda self, starts, *rest: taken(self, [0 for _ in starts], *rest))
    law = joint(p_of(SETTINGS["top_k"]), LENGTH, VOCAB)
    assert p_value(sample(drafter([[W]]), None, SETTINGS["top_k"], samples=3000), law) < 1e-6


def test_no_coin_serves_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running row stands further on at every step, and coins of different positions are different streams."""
    taken, stood = sampling.Coins.take, list[list[int]]()

    def spy(self: Any, starts: Sequence[int], *rest: Any) -> Tensor:
        stood.append(list(starts))
        return taken(self, starts, *rest)

    monkeypatch.setattr(sampling.Coins, "take", spy)
    sample(drafter([[O, O], [O]], [[W, W, W]]), None, SETTINGS["top_k"], samples=300)
    assert len(stood) == LENGTH - 1, "some row had everything rejected"
    for before, after in zip(stood, stood[1:], strict=False):
        assert all(new > old or old == LENGTH for old, new in zip(before, after, strict=True))


def test_coins_are_a_stream_per_row_and_step() -> None:
    cpu = torch.device("cpu")
    coins = sampling.Coins(3, seed=11)
    few, many = coins.take([4, 9, 9], 5, cpu), coins.take([4, 9, 9], 4000, cpu)
    assert few.dtype == torch.float64
    assert torch.equal(few, many[:, :5]), "asking for more changes none"
    assert torch.equal(sampling.Coins(1, seed=11).take([4], 5, cpu), few[:1]), "neighbours change none"
    assert bool((many >= 0).all() and (many < 1).all())
    streams = torch.cat([many, coins.take([5, 8, 10], 4000, cpu), sampling.Coins(3, 12).take([4, 9, 9], 4000, cpu)])
    uniforms = sampling.Uniforms(3, seed=11).take([0, 0, 0], 4000, cpu)
    streams = torch.cat([streams, uniforms])
    assert len(set(streams.flatten().tolist())) == streams.numel()
    error = streams.corrcoef() - torch.eye(len(streams))
    assert float(error.abs().max()) < 5 / math.sqrt(4000)
    assert bool(((streams.mean(1) - 0.5).abs() < 5 * math.sqrt(1 / 12 / 4000)).all())


@pytest.mark.parametrize("name", choices("acceptance"))
def test_greedy_decoding_is_greedy_under_every_rule(name: str) -> None:
    """Draws are ignored, and so is the rule, processors with state included."""
    made = drafter([[O, O], [O]], [[W], [X]])
    ids = torch.tensor([[2, 3, 5, 2, 3], [1, 1, 4, 2, 5]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False}
    for processors in ({}, {"repetition_penalty": 1.3}):
        plain = model().generate(ids, **arguments, **processors)
        speculating = attach(model(), made, TreeVerifier(build(load("acceptance", name))))
        try:
            text = speculating.generate(ids, **arguments, **processors)
            assert speculating.speculation.lossless == (name != "typical")
        finally:
            restore(model())
        assert text.tolist() == plain.tolist()
