"""The law of the rules that look at how children were drawn: exact by enumeration, for definition and running code.

The wrong variants are those of other implementations. Each must fail the very check that the rules pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from law import (
    Coins,
    Context,
    Given,
    PlainDrafter,
    PlainEvent,
    PlainRule,
    PlainTree,
    accepted_law,
    boxes,
    code_law,
    completed,
    distance,
    emissions,
    enumerate_law,
    joint,
    law_of,
    mean_accepted,
    target_walk,
    toy_target,
)
from plain_rules import (
    UNNAMED,
    P,
    Plan,
    block,
    drawn_from,
    normalised,
    q_of,
    recursive_rejection,
    residual,
    sampled,
    traversal,
)
from specdec.interfaces import AcceptanceRule
from specdec.tree import POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT
from verifiers.block import Block
from verifiers.rejection import RecursiveRejection, TokenWise
from verifiers.traversal import Traversal

EXACT = 1e-12
WRONG = 1e-3
X, W, O = POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT  # noqa: E741 - chosen, with, without

PLANS: dict[str, Plan] = {
    "nothing": [],
    "chain": [[W], [W]],
    "chain of three": [[W], [X], [O]],
    "chain without events": [[UNNAMED], [W], [UNNAMED]],
    "independent": [[W, W, W]],
    "independent, deep": [[W, W], [W]],
    "without replacement": [[O, O], [O]],
    "all of q": [[O, O, O, O]],
    "two by two": [[O, O], [O, O]],
    "chosen": [[X, X], [X]],
    "chosen then drawn": [[X, O, O]],
    "drawn then chosen": [[W, X], [O, UNNAMED]],
    "every kind": [[X, O, W, O, UNNAMED]],
}
RULES: dict[str, tuple[PlainRule, AcceptanceRule]] = {
    "recursive_rejection": (recursive_rejection, RecursiveRejection()),
    "token_wise": (recursive_rejection, TokenWise()),
    "block": (block, Block()),
    "traversal": (traversal, Traversal()),
}
CHAINS = [name for name, plan in PLANS.items() if all(len(kinds) == 1 for kinds in plan)]
CASES = [
    (rule, plan, zeros)
    for rule in RULES
    for plan in PLANS
    for zeros in ("none", "p", "q")
    if (plan in CHAINS or rule not in ("token_wise", "block")) and (plan != "two by two" or zeros == "none")
]


@pytest.mark.parametrize(("rule", "plan", "zeros"), CASES)
def test_the_law_is_the_targets(rule: str, plan: str, zeros: str) -> None:
    definition, code = RULES[rule]
    p = toy_target(3, seed=5, zeros=zeros == "p")
    drafter = sampled(PLANS[plan], 3, own_q=zeros == "none", zeros=zeros == "q")
    length = len(PLANS[plan]) + 1
    expected = joint(p, length, 3)
    found = boxes(definition, drafter, p)
    plain = law_of(found)
    assert distance(completed(plain, p, length, 3), expected) < EXACT
    running = code_law(code, found, p, 3)
    assert distance(completed(running, p, length, 3), expected) < EXACT
    assert distance(running, plain) < EXACT, "and it accepts as much"


@pytest.mark.parametrize("definition", [recursive_rejection, traversal])
def test_the_law_over_several_steps(definition: PlainRule) -> None:
    p = toy_target(3, seed=8)

    def changing(context: Context, step: int, coins: Coins) -> PlainTree:
        plan = [[[W, W]], [[O], [X]], [[O, X]]][(step + sum(context)) % 3]
        return sampled(plan, 3)(context, step, coins)

    assert distance(enumerate_law(definition, changing, p, 3), joint(p, 3, 3)) < EXACT


def test_a_larger_vocabulary_on_one_level() -> None:
    p = toy_target(5, seed=6)
    for plan in ([[O, O, O]], [[X, W, O]]):
        for definition, code in (RULES["recursive_rejection"], RULES["traversal"]):
            law = code_law(code, boxes(definition, sampled(plan, 5), p), p, 5)
            assert distance(completed(law, p, 2, 5), joint(p, 2, 5)) < EXACT


def test_the_worked_example() -> None:
    """Of arXiv:2505.12398: p = (.3, .4, .3), q = (.6, .3, .1); first a, rejected with .5, then b with 4/9."""
    p, q = (0.3, 0.4, 0.3), (0.6, 0.3, 0.1)
    for second, accepted in ((1, 4 / 9), (2, 1.0)):
        tree = PlainTree([0, 0, 0], [0, 0, second], draws=[PlainEvent(1, O, q), PlainEvent(2, O, q)])
        law = accepted_law(recursive_rejection, lambda *_, t=tree: t, lambda _: p)
        by_child = [math.fsum(mass for e, mass in law.items() if len(e) == 2 and e[0] == t) for t in (0, second)]
        assert by_child[0] == pytest.approx(0.5, abs=EXACT)
        assert by_child[1] == pytest.approx(0.5 * accepted, abs=EXACT)


class Rolled(Coins):
    """Coins of a pseudo-random generator."""

    def __init__(self, seed: int) -> None:
        super().__init__(())
        self.random = random.Random(seed)

    def flip(self, probabilities: Sequence[float], at: tuple[str, int] | None = None) -> int:  # noqa: ARG002
        return self.random.choices(range(len(probabilities)), probabilities)[0]


@pytest.mark.parametrize("rule", RULES)
def test_code_and_definition_agree_on_random_numbers(rule: str) -> None:
    """A ragged batch: every row has a tree of its own shape, and does what it would do alone."""
    definition, code = RULES[rule]
    vocab, p = 6, toy_target(6, seed=4)
    wide: list[Plan] = [[[O, O, O], [O, O], [O]], [[W, W, X, W], [W, X, W]], [[X, X, O], [O, UNNAMED, O], [W, W]], []]
    narrow: list[Plan] = [[[W], [O], [X], [W], [W]], [[O]], [[W], [UNNAMED], [W]], []]
    plans: list[Plan] = narrow if rule in ("token_wise", "block") else wide
    trees = [sampled(plans[row % 4], vocab, own_q=row % 3 == 0)((), 0, Rolled(row)) for row in range(160)]
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(len(trees), 8, generator=generator, dtype=torch.float64)
    coins = torch.rand(len(trees), 60, generator=generator, dtype=torch.float64)
    got = emissions(code, trees, p, vocab, uniforms, coins)
    lengths = set()
    for tree, emitted, u, c in zip(trees, got, uniforms.tolist(), coins.tolist(), strict=True):
        words = tree.words()
        assert emitted == tuple(definition(tree, lambda node, w=words: p(w[node]), Given(u, c)))  # type: ignore[misc]
        lengths.add(len(emitted))
    assert len(lengths) >= 4


@pytest.mark.parametrize("seed", range(8))
def test_block_accepts_at_least_as_much_as_token_wise(seed: int) -> None:
    p, drafter = toy_target(3, seed=seed), sampled([[W], [W], [W]], 3)
    means = [mean_accepted(accepted_law(rule, drafter, p)) for rule in (recursive_rejection, block, traversal)]
    assert means[1] >= means[0] - EXACT
    assert means[2] == pytest.approx(means[1], abs=EXACT), "on a chain traversal is block verification"


@pytest.mark.parametrize("plan", [[[O, O], [O]], [[W, W], [W]], [[O, X], [W]]])
def test_traversal_accepts_at_least_as_much_as_recursive_rejection(plan: Plan) -> None:
    gains = []
    for seed in range(3):
        p, drafter = toy_target(3, seed=seed), sampled(plan, 3)
        gains.append(
            mean_accepted(accepted_law(traversal, drafter, p))
            - mean_accepted(accepted_law(recursive_rejection, drafter, p))
        )
    assert min(gains) >= -EXACT
    assert max(gains) > WRONG, "and more, where there is something to gain"


def test_inequalities_are_strict_somewhere() -> None:
    p, drafter = toy_target(3, seed=5, zeros=False), sampled([[W], [W], [W]], 3)
    gain = mean_accepted(accepted_law(block, drafter, p)) - mean_accepted(accepted_law(recursive_rejection, drafter, p))
    assert gain > WRONG


def test_chosen_children_bring_rejection_nothing_over_the_walk() -> None:
    """Recursive rejection of point masses accepts a path with the product of p along it, like the walk."""
    p = toy_target(3, seed=3)
    drafter = sampled([[X, X], [X]], 3)
    tree = drafter((), 0, Coins(()))
    products = [math.prod(p(word[:i])[token] for i, token in enumerate(word)) for word in tree.words()[1:]]
    for rule in (recursive_rejection, target_walk):
        assert mean_accepted(accepted_law(rule, drafter, p)) == pytest.approx(sum(products), abs=EXACT)


def test_without_replacement_accepts_more_than_independent_draws() -> None:
    for seed in range(4):
        p = toy_target(4, seed=seed)
        laws = [accepted_law(recursive_rejection, sampled([kinds], 4), p) for kinds in ([W, W, W], [O, O, O])]
        assert mean_accepted(laws[1]) > mean_accepted(laws[0])


# What goes wrong elsewhere, as rules. Trees of one level, children drawn without replacement unless it says otherwise.
Sequenced = Callable[[PlainTree, list[int]], list[int]]


def in_sequence(order: Sequenced, tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """Wrong: siblings in another order than they were drawn, q renormalised as the verification goes."""
    left, q = list(p(0)), list((tree.draws or [])[0].q) if tree.draws else []
    for node in order(tree, tree.children(0)):
        token = tree.tokens[node]
        share = min(1.0, left[token] / q[token])
        if coins.flip([share, 1 - share]) == 0:
            return [token, coins.flip(p(node))]
        left = normalised(residual(left, q))
        q[token] = 0.0
        q = normalised(q) if any(q) else q
    return [coins.flip(left)]


def by_q(tree: PlainTree, nodes: list[int]) -> list[int]:
    assert tree.draws
    q = tree.draws[0].q
    return sorted(nodes, key=lambda node: -q[tree.tokens[node]])


def not_renormalised(tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """Wrong: what was drawn is taken out of q, but q keeps its scale."""
    left = list(p(0))
    for number, (_, event) in enumerate(tree.events(0)):
        token = tree.tokens[event.child]
        gone = [tree.tokens[earlier.child] for _, earlier in tree.events(0)[:number]]
        q = [0.0 if t in gone else value for t, value in enumerate(event.q)]
        share = min(1.0, left[token] / q[token])
        if coins.flip([share, 1 - share]) == 0:
            return [token, coins.flip(p(event.child))]
        left = normalised(residual(left, q))
    return [coins.flip(left)]


def block_that_stops(tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """Wrong: block verification that ends at the first prefix whose test fails."""
    return _block_like(tree, p, coins, contiguous=True)


def block_of_tokens(tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """Wrong: the test of every single token, the longest that passes, and the residual of token-wise rejection."""
    return _block_like(tree, p, coins, single=True)


def block_with_plain_residual(tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """Wrong: the right tests, but y ~ (p - q)+ after a prefix."""
    return _block_like(tree, p, coins, scaled=False)


def _block_like(
    tree: PlainTree, p: P, coins: Coins, contiguous: bool = False, single: bool = False, scaled: bool = True
) -> list[int]:
    line = list(range(len(tree.parents)))
    tokens = [tree.tokens[node] for node in line]
    q = [drawn_from(tree, node, 0, 3) for node in line[:-1]]
    value, values, length, failed = 1.0, [1.0], 0, False
    for i in line[1:]:
        ratio = p(i - 1)[tokens[i]] / q[i - 1][tokens[i]]
        value = min(1.0, ratio if single else value * ratio)
        values.append(value)
        passing = value
        if i < line[-1] and not single:
            total = math.fsum(residual([value * v for v in p(i)], q[i]))
            passing = total / (total + 1 - value) if total + 1 - value > 0 else 1.0
        passed = coins.flip([passing, 1 - passing]) == 0
        failed |= not passed
        if passed and not (contiguous and failed):
            length = i
    scale = values[length] if scaled and not single else 1.0
    rest = p(length) if length == line[-1] else residual([scale * v for v in p(length)], q[length])
    rest = normalised(rest) if any(rest) else p(length)
    return [*tokens[1 : length + 1], coins.flip(rest)]


def traversal_without_update(tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """Wrong: leaves in order, each with the product of its ratios; a failed leaf changes nothing above it."""
    for leaf in (node for node in range(1, len(tree.parents)) if not tree.children(node)):
        path = [leaf]
        while path[0]:
            path.insert(0, tree.parents[path[0]])
        value = 1.0
        for parent, node in zip(path, path[1:], strict=False):
            q = drawn_from(tree, parent, 0, 3)
            value = min(1.0, value * p(parent)[tree.tokens[node]] / q[tree.tokens[node]])
        if coins.flip([value, 1 - value]) == 0:
            return [*(tree.tokens[node] for node in path[1:]), coins.flip(p(leaf))]
    return [coins.flip(normalised(residual(p(0), drawn_from(tree, 0, 0, 3))))]


WRONG_RULES: dict[str, tuple[PlainRule, Plan, int]] = {
    "siblings in reverse": (partial(in_sequence, lambda _, nodes: nodes[::-1]), [[O, O, O]], 4),
    "siblings sorted by q": (partial(in_sequence, by_q), [[O, O, O]], 4),
    "q not renormalised": (not_renormalised, [[O, O, O]], 4),
    "block stops at the first failure": (block_that_stops, [[W], [W]], 3),
    "block with the tests of single tokens": (block_of_tokens, [[W], [W]], 3),
    "block with the residual of token-wise rejection": (block_with_plain_residual, [[W], [W]], 3),
    "traversal whose parents lose nothing": (traversal_without_update, [[O, O], [O]], 3),
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_wrong_rules_fail_the_same_check(name: str) -> None:
    rule, plan, vocab = WRONG_RULES[name]
    p, length = toy_target(vocab, seed=5), len(plan) + 1
    law = completed(accepted_law(rule, sampled(plan, vocab), p), p, length, vocab)
    assert distance(law, joint(p, length, vocab)) > WRONG


def test_the_wrong_order_is_what_is_wrong() -> None:
    """The same function with the order of the draws is exact."""
    p = toy_target(4, seed=5)
    rule = partial(in_sequence, lambda _, nodes: nodes)
    law = completed(accepted_law(rule, sampled([[O, O, O]], 4), p), p, 2, 4)
    assert distance(law, joint(p, 2, 4)) < EXACT


# What goes wrong elsewhere, as drafters that do not say how they drew. One level.
Misdrawn = Callable[[tuple[float, ...], Coins], list[tuple[int, int, tuple[float, ...]]]]


def draw(count: int, q: Sequence[float], coins: Coins) -> list[int]:
    """Tokens drawn without replacement."""
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(coins.flip(normalised([0.0 if t in tokens else v for t, v in enumerate(q)])))
    return tokens


def top(count: int, q: Sequence[float]) -> list[int]:
    return sorted(range(len(q)), key=lambda token: -q[token])[:count]


def only(q: Sequence[float], tokens: Sequence[int]) -> tuple[float, ...]:
    return tuple(normalised([value if token in tokens else 0.0 for token, value in enumerate(q)]))


def sharpened(q: Sequence[float]) -> tuple[float, ...]:
    return tuple(normalised([value**2 for value in q]))


def misdrawn(listed: Misdrawn) -> PlainDrafter:
    def propose(context: Context, step: int, coins: Coins) -> PlainTree:  # noqa: ARG001 - the drafter's signature
        tree = PlainTree([0], [0], draws=[])
        made: dict[int, int] = {}
        for token, kind, q in listed(q_of(context, 4), coins):
            if token not in made:
                made[token] = len(tree.parents)
                tree.parents.append(0)
                tree.tokens.append(token)
            assert tree.draws is not None
            tree.draws.append(PlainEvent(made[token], kind, q))
        return tree

    return propose


WRONG_DRAWS: dict[str, Misdrawn] = {
    "events listed in reverse": lambda q, coins: [(t, O, q) for t in draw(3, q, coins)[::-1]],
    "events sorted by q": lambda q, coins: [(t, O, q) for t in sorted(draw(3, q, coins), key=lambda t: -q[t])],
    "draws without replacement listed as independent": lambda q, coins: [(t, W, q) for t in draw(3, q, coins)],
    "chosen children listed as drawn": lambda q, _: [(t, O, q) for t in top(2, q)],
    "chosen children listed as drawn among themselves": lambda q, _: [(t, O, only(q, top(2, q))) for t in top(2, q)],
    "drawn children listed as chosen": lambda q, coins: [*((t, X, q) for t in draw(2, q, coins)), (top(1, q)[0], W, q)],
    "a drawn child left out for being unlikely": lambda q, coins: [(t, W, q) for t in [coins.flip(q)] if q[t] > 0.25],
    "an equal draw left out, the others as independent": lambda q, coins: [
        (t, W, q) for t in dict.fromkeys(coins.flip(q) for _ in range(3))
    ],
    "another temperature than was drawn with": lambda q, coins: [(t, O, q) for t in draw(2, sharpened(q), coins)],
}
RIGHT_DRAWS: dict[str, Misdrawn] = {
    "as drawn": lambda q, coins: [(t, O, q) for t in draw(3, q, coins)],
    "a later child left out because of an earlier one": lambda q, coins: [
        (t, O, q) for t in (lambda tokens: tokens if tokens[0] > 1 else tokens[:1])(draw(2, q, coins))
    ],
    "an equal draw left out, the others as without replacement": lambda q, coins: [
        (t, O, q) for t in dict.fromkeys(coins.flip(q) for _ in range(3))
    ],
    "masked by the drafter itself": lambda q, coins: [
        (top(1, q)[0], X, q),
        *((t, O, r) for r in [only(q, top(4, q)[1:])] for t in draw(2, r, coins)),
    ],
}


@pytest.mark.parametrize("rule", ["recursive_rejection", "traversal"])
@pytest.mark.parametrize("name", [*WRONG_DRAWS, *RIGHT_DRAWS])
def test_draws_must_be_told_as_they_were(name: str, rule: str) -> None:
    p = toy_target(4, seed=5)
    drafter = misdrawn({**WRONG_DRAWS, **RIGHT_DRAWS}[name])
    definition, code = RULES[rule]
    law = completed(code_law(code, boxes(definition, drafter, p), p, 4), p, 2, 4)
    error = distance(law, joint(p, 2, 4))
    assert error > WRONG if name in WRONG_DRAWS else error < EXACT


def test_the_walk_does_not_mind_how_children_were_drawn() -> None:
    """Target sampling ignores the draws, so what is listed wrongly does no harm; leaving out by identity neither."""
    p = toy_target(4, seed=5)
    for listed in (*WRONG_DRAWS.values(), *RIGHT_DRAWS.values()):
        law = accepted_law(target_walk, misdrawn(listed), p)
        assert distance(completed(law, p, 2, 4), joint(p, 2, 4)) < EXACT
