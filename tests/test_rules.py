"""Acceptance rules one by one: what they refuse, what they reduce to, and the lossy one by its own definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from equality import tiny_llama
from law import Coins, PlainTree, emissions, scores_of, toy_target, tree_of
from plain_rules import Plan, sampled
from scripted import Sampled
from specdec.build import build, choices, load
from specdec.interfaces import AcceptanceRule
from specdec.tree import POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT, Draws, TokenTree, Topology, chain
from test_acceptance import random_tree
from test_rejection_law import Rolled
from verifiers.acceptance import Greedy, TargetSampling
from verifiers.block import Block
from verifiers.rejection import RecursiveRejection, TokenWise
from verifiers.traversal import Traversal
from verifiers.tree_attention import TreeVerifier
from verifiers.typical import Typical

VOCAB = 8
X, W, O = POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT  # noqa: E741 - chosen, with, without
SAMPLING = [name for name in choices("acceptance") if name != "greedy"]


def rule_of(name: str) -> AcceptanceRule:
    rule: AcceptanceRule = build(load("acceptance", name))
    return rule


def drafter(*plans: Plan) -> Sampled:
    q = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2)) + 0.1
    return Sampled(q / q.sum(-1, keepdim=True), plans)


def generate(made: Any, rule: AcceptanceRule | str | None, **settings: Any) -> tuple[Tensor, Any]:
    model = tiny_llama(vocab_size=VOCAB, pad_token_id=0)
    if isinstance(rule, str):
        specdec.speculate(model, made, acceptance=rule)
    else:
        specdec.speculate(model, made, TreeVerifier(rule))
    ids = torch.tensor([[1, 2, 3, 4], [4, 4, 6, 1]])
    torch.manual_seed(0)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=True, **settings)
    return text, model.speculation


@pytest.mark.parametrize("name", choices("acceptance"))
def test_every_recipe_is_a_rule_of_that_name(name: str) -> None:
    rule = rule_of(name)
    assert isinstance(rule, AcceptanceRule)
    assert rule.name == name
    assert rule.lossless == (name != "typical")
    assert rule.samples == (name != "greedy")


REFUSALS: list[tuple[str, Plan, str]] = [
    ("token_wise", [[W, W]], "it branches.*recursive_rejection or traversal"),
    ("block", [[X], [O, O]], "it branches.*recursive_rejection or traversal"),
    ("rejection_with_replacement", [[O]], "without replacement.*acceptance=recursive_rejection"),
    ("rejection_without_replacement", [[W, W]], "with replacement.*acceptance=recursive_rejection"),
]


@pytest.mark.parametrize(("name", "plan", "reason"), REFUSALS)
def test_a_tree_that_does_not_fit_is_refused_by_name(name: str, plan: Plan, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' does not fit the trees of sampled.*{reason}"):
        generate(drafter(plan), name)


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("made", ["none", "prompt_lookup"])
def test_proposals_that_were_not_drawn_fit_every_rule(name: str, made: str) -> None:
    """A point mass is a draw from a distribution of one point; ``prompt_lookup`` proposes chains."""
    text, stats = generate(made, name)
    assert text.shape == (2, 12)
    assert stats.lossless == (name != "typical")
    if name not in ("block", "traversal", "typical"):
        expected, _ = generate(made, None)
        assert text.tolist() == expected.tolist(), "and rejection is then the walk of target sampling"


@pytest.mark.parametrize("name", [name for name in SAMPLING if name != "target_sampling"])
def test_processors_that_keep_state_refuse_rules_off_the_walk(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' needs p off the walk, which RepetitionPenalty.*default rule"):
        generate("prompt_lookup", name, repetition_penalty=1.2)


def test_several_draws_of_one_node_are_no_chain() -> None:
    tree = TokenTree(torch.tensor([[0, 3]]), chain(2))
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    tree.draws = Draws(zeros + 1, zeros + W, zeros, torch.full((1, 1, VOCAB), 1 / VOCAB))
    tree.check()
    for rule in (TokenWise(), Block()):
        assert "several draws" in str(rule.refuse(tree))
    assert RecursiveRejection("with").refuse(tree) is None


def test_what_is_a_chain() -> None:
    forked = Topology(torch.tensor([[0, 0, 0]]), 1)
    ragged = Topology(torch.tensor([[0, 0, 1], [0, 0, 0]]), 2)
    tokens = torch.tensor([[0, 1, 2], [0, 1, 2]])
    padded = torch.tensor([[0, 0, 0], [0, 0, 2]])
    for rule in (TokenWise(), Block()):
        assert rule.refuse(TokenTree(tokens, forked)) is not None
        assert rule.refuse(TokenTree(tokens, ragged)) is not None
        assert rule.refuse(TokenTree(tokens, ragged, padded)) is None, "padding hangs anywhere"
        assert rule.refuse(TokenTree(tokens[:, :1], chain(1))) is None


def test_what_replacement_may_be() -> None:
    with pytest.raises(ValueError, match="one of any, with, without; got 'maybe'"):
        RecursiveRejection("maybe")


@pytest.mark.parametrize("name", SAMPLING)
def test_one_point_distributions_make_every_rule_greedy(name: str) -> None:
    """The limit of low temperature: whatever was drawn, the walk is along the argmaxes."""
    plan: Plan = [[W], [O], [X]] if name in ("token_wise", "block") else [[O, O, X], [W, W]]
    trees = [sampled(plan, 4)((), 0, Rolled(seed)) for seed in range(60)]
    p = toy_target(4, seed=3)
    tree, scores = tree_of(trees, 4), scores_of(trees, p, 4)
    expected = Greedy().accept(tree, scores, None)
    rule = rule_of(name)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(60, 40, generator=generator, dtype=torch.float64)
    cold = (scores * 1e6).to(torch.float32)
    walk = rule.accept(tree, cold, numbers[:, : len(plan) + 1], numbers[:, -rule.num_coins(tree) :])
    assert walk.path.tolist() == expected.path.tolist()
    there = expected.path >= 0
    assert walk.tokens[there].tolist() == expected.tokens[there].tolist()
    assert int(there.sum(-1).max()) > 1, "something is accepted"


@pytest.mark.parametrize("rule", [RecursiveRejection(), Traversal()])
def test_candidates_in_other_roles_are_out_of_reach(rule: AcceptanceRule) -> None:
    """Random trees without draws, feed-only and padding nodes among them: the accepted path is of candidates."""
    generator = torch.Generator().manual_seed(4)
    longest = 0
    for seed in range(30):
        tree = random_tree(seed)
        scores = torch.randn(*tree.token_ids.shape, 3, generator=generator)
        uniforms = torch.rand(3, tree.topology.max_depth + 1, generator=generator, dtype=torch.float64)
        coins = torch.rand(3, tree.num_nodes, generator=generator, dtype=torch.float64)
        walk = rule.accept(tree, scores, uniforms, coins)
        longest = max(longest, int((walk.path >= 0).sum(-1).max()))
        if tree.candidates is not None:
            taken = tree.candidates.gather(1, walk.path.clamp(min=0)) | (walk.path <= 0)
            assert bool(taken.all())
    assert longest > 2


def test_scores_that_are_no_distribution_emit_no_token() -> None:
    tree = tree_of([sampled([[W], [W]], 4)((), 0, Rolled(seed)) for seed in range(3)], 4)
    numbers = torch.rand(3, 3, dtype=torch.float64)
    for name in SAMPLING:
        rule = rule_of(name)
        coins = numbers[:, : rule.num_coins(tree)]
        walk = rule.accept(tree, torch.full((3, 3, 4), math.nan), numbers, coins)
        assert walk.path.tolist() == [[0, -1, -1]] * 3, name
        assert walk.tokens[:, 0].tolist() == [-1] * 3, name


def test_float32_scores_and_drafts_agree_with_float64() -> None:
    """What runs in production rounds p and q, and decides alike but for a hair."""
    trees = [sampled([[O, O], [O]], 5)((), 0, Rolled(seed)) for seed in range(300)]
    tree, scores = tree_of(trees, 5), scores_of(trees, toy_target(5, seed=9), 5)
    generator = torch.Generator().manual_seed(0)
    uniforms, numbers = (torch.rand(300, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    assert tree.draws is not None
    for rule in (RecursiveRejection(), Traversal()):
        coins = numbers[:, : rule.num_coins(tree)]
        wide = rule.accept(tree, scores, uniforms, coins)
        draws = Draws(tree.draws.node, tree.draws.kind, tree.draws.q_row, tree.draws.q.float(), width=2)
        narrow = TokenTree(tree.token_ids, tree.topology, tree.role, draws=draws)
        walk = rule.accept(narrow, scores.float(), uniforms, coins)
        assert (walk.path == wide.path).all(-1).double().mean() > 0.99


# Typical acceptance.
def slow_typical(tree: PlainTree, rows: list[list[float]], epsilon: float, delta: float) -> list[int]:
    """By the definition: the longest path of passing tokens, the likeliest of several, and the argmax after it."""

    def passes(node: int) -> bool:
        p = rows[tree.parents[node]]
        entropy = -sum(value * math.log(value + 1e-5) for value in p)
        return p[tree.tokens[node]] > min(epsilon, delta * math.exp(-entropy))

    best: tuple[int, float, list[int]] = (0, 0.0, [])
    for node in range(1, len(tree.parents)):
        path = [node]
        while tree.parents[path[0]]:
            path.insert(0, tree.parents[path[0]])
        if all(map(passes, path)):
            likelihood = sum(math.log(rows[tree.parents[n]][tree.tokens[n]]) for n in path)
            best = max(best, (len(path), likelihood, path))
    last = rows[best[2][-1] if best[2] else 0]
    return [*(tree.tokens[n] for n in best[2]), last.index(max(last))]


@pytest.mark.parametrize(("epsilon", "delta"), [(0.09, 0.3), (0.3, 0.09), (0.5, 1.0), (0.0, 0.0)])
def test_typical_acceptance_by_its_definition(epsilon: float, delta: float) -> None:
    p = toy_target(6, seed=7)
    trees = [sampled([[O, O, X], [O, X], [W]], 6)((), 0, Rolled(seed)) for seed in range(120)]
    got = emissions(Typical(epsilon, delta), trees, p, 6, torch.zeros(120, 4, dtype=torch.float64), torch.zeros(120, 1))
    lengths = set()
    for tree, emitted in zip(trees, got, strict=True):
        rows = [list(p(word)) for word in tree.words()]
        assert list(emitted) == slow_typical(tree, rows, epsilon, delta)
        lengths.add(len(emitted))
    assert lengths == {4} if delta < 0.1 else len(lengths) > 1, "without a bar all that is possible is accepted"


def test_typical_acceptance_bounds_its_bar() -> None:
    p = torch.rand(50, 30, generator=torch.Generator().manual_seed(0)).pow(6)
    p /= p.sum(-1, keepdim=True)
    bar = Typical().threshold(p)
    assert 0 < float(bar.min()) < float(bar.max()) <= 0.09 + 1e-7
    sharp = torch.zeros(1, 30).index_fill(1, torch.tensor([4]), 1.0)
    assert float(Typical().threshold(sharp)) == pytest.approx(0.09)
    flat = torch.full((1, 30), 1 / 30)
    assert float(Typical().threshold(flat)) == pytest.approx(0.3 / 30, rel=1e-3), "the exponent of the entropy is 1/V"


def test_typical_acceptance_is_deterministic_but_for_a_sampled_bonus() -> None:
    trees = [sampled([[X, X]], 6)((), 0, Coins(()))] * 40
    p = toy_target(6, seed=7)
    uniforms = torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert len(set(emissions(Typical(), trees, p, 6, uniforms, uniforms))) == 1
    drawn = emissions(Typical(sample_bonus=True), trees, p, 6, uniforms, uniforms)
    assert len({emitted[:-1] for emitted in drawn}) == 1
    assert len(set(drawn)) > 2


def test_typical_acceptance_says_that_it_is_lossy() -> None:
    _, stats = generate(drafter([[O, O]]), "typical")
    assert not stats.lossless
    assert stats.as_dict()["lossless"] is False
    _, stats = generate(drafter([[O, O]]), None)
    assert stats.lossless


def test_typical_acceptance_takes_sensible_constants_only() -> None:
    with pytest.raises(ValueError, match=r"epsilon in \[0, 1\), got 1.5"):
        Typical(epsilon=1.5)
    with pytest.raises(ValueError, match="delta >= 0, got -1"):
        Typical(delta=-1)


def test_the_default_replays_draws_and_walks_otherwise() -> None:
    """Chosen by the tree at hand; drafts of the likeliest token alone make the same text as no drafts at all."""
    plain, _ = generate("none", None)
    chosen, stats = generate(drafter([[X, X], [X]]), None)
    assert chosen.tolist() == plain.tolist()
    assert stats.mean_accepted_tokens > 1
    drawn, _ = generate(drafter([[O, O]]), None)
    again, _ = generate(drafter([[O, O]]), RecursiveRejection())
    walked, _ = generate(drafter([[O, O]]), TargetSampling())
    assert drawn.tolist() == again.tolist() != plain.tolist()
    assert walked.tolist() == plain.tolist()
