"""The law of the emitted text is the target's: exactly, by enumeration, and once more through the real generate.

Rules that come later plug in as a ``PlainRule`` (and, where they draw by inverse CDF, as the code that runs); the wrong
rules below are what has been got wrong elsewhere, and must fail the very same check.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from drafters.token_recycling import TokenRecycling
from equality import tiny_llama
from law import (
    Coins,
    Context,
    Law,
    PlainDrafter,
    PlainRule,
    PlainTree,
    accepted_law,
    distance,
    enumerate_law,
    joint,
    target_walk,
    toy_target,
    uniform_law,
)
from scripted import Random
from specdec.generation import attach, restore
from specdec.interfaces import Walk
from specdec.tree import TokenTree
from verifiers.acceptance import TargetSampling
from verifiers.tree_attention import TreeVerifier

EXACT = 1e-12
WRONG = 1e-3  # every known mistake moves some probability by more than this
LENGTH = 3

# Rank paths turned into (parent, token) pairs; siblings hold distinct tokens.
SHAPES: dict[str, list[tuple[int, int]]] = {
    "root": [],
    "chain": [(0, 1), (1, 0), (2, 2)],
    "pair": [(0, 1), (1, 0)],
    "fork": [(0, 2), (0, 0), (1, 1)],
    "wide": [(0, 0), (0, 1), (0, 2)],
    "deep": [(0, 2), (1, 2), (2, 2), (3, 1), (4, 0)],
    "uneven": [(0, 2), (0, 0), (1, 1), (1, 2), (4, 0), (2, 1)],
    "full": [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2), (3, 0), (3, 1), (3, 2)],
}


def static(shape: str) -> PlainDrafter:
    """Proposes the same tree whatever came before."""
    pairs = SHAPES[shape]

    def propose(context: Context, step: int, coins: Coins) -> PlainTree:  # noqa: ARG001 - the drafter's signature
        return PlainTree([0, *(p for p, _ in pairs)], [context[-1] if context else 0, *(t for _, t in pairs)])

    return propose


def changing(context: Context, step: int, coins: Coins) -> PlainTree:
    """Another tree at every step, depending on the text."""
    names = sorted(SHAPES)
    return static(names[(step + sum(context)) % len(names)])(context, step, coins)


DRAFTERS: dict[str, PlainDrafter] = {**{name: static(name) for name in SHAPES}, "changing": changing}


def q_of(context: Context, vocab: int) -> Sequence[float]:
    """A draft distribution, unlike the target's."""
    return toy_target(vocab, seed=77)(context)


def sampling_children(count: int, vocab: int) -> PlainDrafter:
    """One level of ``count`` children drawn independently from q; equal ones share a node."""

    def propose(context: Context, step: int, coins: Coins) -> PlainTree:  # noqa: ARG001 - the drafter's signature
        q = q_of(context, vocab)
        drawn = list(dict.fromkeys(coins.flip(q) for _ in range(count)))
        return PlainTree([0] * (len(drawn) + 1), [0, *drawn], {0: q})

    return propose


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("vocab", [3, 4])
@pytest.mark.parametrize("name", DRAFTERS)
def test_target_sampling_is_exact(name: str, vocab: int, zeros: bool) -> None:
    p = toy_target(vocab, seed=1, zeros=zeros)
    expected = joint(p, LENGTH, vocab)
    assert distance(enumerate_law(target_walk, DRAFTERS[name], p, LENGTH), expected) < EXACT
    # The float32 softmax of the code moves its breakpoints, not the cells that the uniforms are taken from.
    assert distance(uniform_law(TargetSampling(), DRAFTERS[name], p, LENGTH, vocab), expected) < EXACT


def test_target_sampling_is_exact_for_sampled_children() -> None:
    p = toy_target(3, seed=2)
    for count in (1, 2):
        law = enumerate_law(target_walk, sampling_children(count, 3), p, 2)
        assert distance(law, joint(p, 2, 3)) < EXACT


@pytest.mark.parametrize("name", SHAPES)
def test_expected_accepted_length_is_the_sum_of_path_products(name: str) -> None:
    p = toy_target(3, seed=3)
    tree = DRAFTERS[name]((), 0, Coins(()))
    products = [math.prod(p(word[:place])[token] for place, token in enumerate(word)) for word in tree.words()]
    law = accepted_law(target_walk, DRAFTERS[name], p)
    mean = math.fsum((len(emitted) - 1) * mass for emitted, mass in law.items())
    assert mean == pytest.approx(sum(products[1:]), abs=EXACT)


def fresh_bonus(tree: PlainTree, p: Callable[[int], Sequence[float]], coins: Coins) -> list[int]:
    """Wrong: one independent target sample per node of each path; the best path wins, its bonus is drawn afresh."""
    samples = {node: coins.flip(p(node)) for node in range(len(tree.parents)) if tree.children(node)}
    best: list[int] = []
    for leaf in range(len(tree.parents)):
        path = _path(tree, leaf)
        right = [0]
        for parent, child in itertools.pairwise(path):
            if samples[parent] != tree.tokens[child]:
                break
            right.append(child)
        best = max(best, right, key=len)
    return [*(tree.tokens[node] for node in best[1:]), coins.flip(p(best[-1]))]


def _path(tree: PlainTree, node: int) -> list[int]:
    return [0] if node == 0 else [*_path(tree, tree.parents[node]), node]


def duplicates_count_twice(tree: PlainTree, p: Callable[[int], Sequence[float]], coins: Coins) -> list[int]:
    """Wrong: one coin against the running sum of sibling probabilities, a doubled sibling counted twice."""
    node = 0
    emitted: list[int] = []
    while True:
        here, children = p(node), tree.children(node)
        tokens = [tree.tokens[child] for child in children for _ in range(2)]  # every sibling merged in twice
        shares: list[float] = []
        for token in tokens:
            shares.append(min(here[token], 1 - sum(shares)))
        chosen = coins.flip([*shares, max(1 - sum(shares), 0.0)]) if tokens else 0
        if not tokens or chosen == len(tokens):
            rest = [0.0 if token in tokens else value for token, value in enumerate(here)]
            total = sum(rest)
            return [*emitted, coins.flip([value / total for value in rest] if total else here)]
        emitted.append(tokens[chosen])
        node = children[chosen // 2]


def rejecting(accept: Callable[[float, float], float], residual: Callable[[float, float], float]) -> PlainRule:
    """Children one by one: accept with ``accept(p, q)``, else go on with ``p <- normalised residual(p, q)``."""

    def rule(tree: PlainTree, p: Callable[[int], Sequence[float]], coins: Coins) -> list[int]:
        node = 0
        emitted: list[int] = []
        while True:
            left, following = list(p(node)), None
            for child in tree.children(node):
                q = tree.q.get(node) or [float(token == tree.tokens[child]) for token in range(len(left))]
                token = tree.tokens[child]
                share = min(1.0, accept(left[token], q[token]))
                if coins.flip([share, 1 - share]) == 0:
                    following = child
                    break
                left = [residual(value, other) for value, other in zip(left, q, strict=True)]
                total = sum(left)
                left = [value / total for value in left]
            if following is None:
                return [*emitted, coins.flip(left)]
            emitted.append(tree.tokens[following])
            node = following

    return rule


def ratio(p: float, q: float) -> float:
    return p / q if q else 1.0


# Leviathan et al.: accept with p/q, on rejection the positive part of p - q. Right for events drawn from that q.
token_wise = rejecting(ratio, lambda p, q: max(p - q, 0.0))


def test_rejection_rules_plug_in() -> None:
    p = toy_target(4, seed=5)
    assert distance(enumerate_law(token_wise, sampling_children(1, 4), p, 2), joint(p, 2, 4)) < EXACT
    # With one-point draws it is exact for every tree, like the walk.
    assert distance(enumerate_law(token_wise, static("uneven"), p, LENGTH), joint(p, LENGTH, 4)) < EXACT


def top_children(count: int, vocab: int) -> PlainDrafter:
    """The ``count`` likeliest tokens of q, deterministic, but carrying q as if they had been drawn from it."""

    def propose(context: Context, step: int, coins: Coins) -> PlainTree:  # noqa: ARG001 - the drafter's signature
        q = q_of(context, vocab)
        best = sorted(range(vocab), key=lambda token: -q[token])[:count]
        return PlainTree([0] * (count + 1), [0, *best], {0: q})

    return propose


def kept_if_likely(context: Context, step: int, coins: Coins) -> PlainTree:  # noqa: ARG001 - the drafter's signature
    """A sampled child, thrown away where its own q is small."""
    q = q_of(context, 4)
    drawn = coins.flip(q)
    return PlainTree([0, 0], [0, drawn], {0: q}) if q[drawn] > 0.25 else PlainTree([0], [0])


WRONG_RULES: dict[str, tuple[PlainRule, PlainDrafter]] = {
    "a fresh bonus after a rejected target sample": (fresh_bonus, static("pair")),
    "a fresh bonus over several paths": (fresh_bonus, static("fork")),
    "duplicate siblings counted twice": (duplicates_count_twice, static("chain")),
    "deterministic children verified with q": (token_wise, top_children(2, 4)),
    "no residual after a rejection": (rejecting(ratio, lambda p, q: p), sampling_children(1, 4)),  # noqa: ARG005
    "the residual of a sampled child taken as one-point": (rejecting(lambda p, q: p, lambda p, q: p), static("wide")),  # noqa: ARG005
    "a sampled child kept only where its own q is large": (token_wise, kept_if_likely),
    "an equal i.i.d. draw dropped without its event": (token_wise, sampling_children(2, 4)),
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_known_mistakes_fail_the_same_check(name: str) -> None:
    rule, drafter = WRONG_RULES[name]
    p = toy_target(4, seed=5)
    assert distance(enumerate_law(rule, drafter, p, 2), joint(p, 2, 4)) > WRONG


class Reusing(TargetSampling):
    """Wrong: when no child holds the draw, a fresh draw is emitted (here from the mirrored uniform)."""

    name = "reusing"

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:  # noqa: ARG002
        assert uniforms is not None
        walk = super().accept(tree, scores, uniforms)
        last = (walk.path >= 0).sum(-1) - 1
        rows = torch.arange(len(last))
        fresh = self.select(scores[rows, walk.path[rows, last]], (uniforms[rows, last] + 0.5) % 1)
        if tree.num_nodes > 1:
            walk.tokens[rows, last] = fresh
        return walk


class LooksAhead(TargetSampling):
    """Wrong: the draw depends on the uniform of the next position, which the next step uses again."""

    name = "looks_ahead"

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:  # noqa: ARG002
        assert uniforms is not None
        return super().accept(tree, scores, torch.cat([uniforms[:, 1:], uniforms[:, -1:]], dim=1))


@pytest.mark.parametrize("rule", [Reusing(), LooksAhead()])
def test_wrong_code_fails_the_same_check(rule: TargetSampling) -> None:
    p = toy_target(3, seed=1)
    assert distance(uniform_law(rule, DRAFTERS["chain"], p, LENGTH, 3), joint(p, LENGTH, 3)) > WRONG


# Through the real generate: every row of a big batch is one sample of a short text.
VOCAB, TOP_K, TEMPERATURE, SAMPLES = 6, 3, 0.9, 2500
PROMPT = [[2, 3, 5, 2, 3]]


@cache
def toy_model() -> Any:
    return tiny_llama(vocab_size=VOCAB, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, pad_token_id=0)


@cache
def exact_joint() -> Law:
    """By definition: temperature, then top-k, then softmax, in float64."""

    @cache
    def p(context: Context) -> list[float]:
        with torch.no_grad():
            logits = toy_model()(input_ids=torch.tensor([PROMPT[0] + list(context)])).logits[0, -1]
        logits = logits.double() / TEMPERATURE
        kept = logits.masked_fill(logits < logits.topk(TOP_K).values[-1], -math.inf)
        return kept.softmax(-1).tolist()

    return joint(p, LENGTH, VOCAB)


def sample(drafter: Any, rule: TargetSampling | None) -> Tensor:
    """``SAMPLES`` new texts of ``LENGTH`` tokens."""
    model = attach(toy_model(), drafter, TreeVerifier(rule))
    try:
        torch.manual_seed(0)
        text: Tensor = model.generate(
            input_ids=torch.tensor(PROMPT),
            attention_mask=torch.ones(1, 5, dtype=torch.int64),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            max_new_tokens=LENGTH,
            num_return_sequences=SAMPLES,
        )
        assert model.speculation.mean_accepted_tokens > 1, "something is accepted"
    finally:
        restore(model)
    return text[:, len(PROMPT[0]) :]


def p_value(text: Tensor) -> float:
    """Chi-square of the texts against the exact joint, cells with fewer than 5 expected pooled."""
    law = exact_joint()
    seen: dict[Context, int] = {}
    for row in text.tolist():
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert all(law[word] > 0 for word in seen), "outside the top k"
    cells = [(law[word] * len(text), seen.get(word, 0)) for word in law]
    large = [cell for cell in cells if cell[0] >= 5]
    pooled = [sum(values) for values in zip(*(cell for cell in cells if cell[0] < 5), strict=True)]
    if pooled and pooled[0] > 0:
        large.append((pooled[0], int(pooled[1])))
    statistic = sum((count - expected) ** 2 / expected for expected, count in large)
    return float(torch.special.gammaincc(torch.tensor((len(large) - 1) / 2), torch.tensor(statistic / 2)))


def drafters_to_try() -> dict[str, Callable[[], Any]]:
    return {
        "token_recycling": lambda: TokenRecycling(num_successors=4, paths=[[0], [1], [2], [0, 0], [0, 1], [1, 0]]),
        "random": lambda: Random(VOCAB, 2),
    }


@pytest.mark.parametrize("name", drafters_to_try())
def test_generate_samples_from_the_target(name: str) -> None:
    text = sample(drafters_to_try()[name](), None)
    assert len({tuple(row) for row in text.tolist()}) > 20
    assert p_value(text) > 1e-4


def test_chi_square_notices_a_wrong_rule() -> None:
    assert p_value(sample(drafters_to_try()["token_recycling"](), Reusing())) < 1e-9
