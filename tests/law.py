"""The exact law of the tokens that a rule emits, on toy vocabularies: no statistics, no tolerance but rounding.

Two ways to take a rule in:

- as a *definition*: plain Python that draws by ``coins.flip(probabilities)``. ``enumerate_law`` replays it once per
  outcome of all coins, so drafters that sample, rejections and residuals need nothing special;
- as the *code that runs*: an ``AcceptanceRule`` whose outcome is piecewise constant in its uniforms. ``uniform_law``
  runs it on one point of every cell, with the uniforms placed per output position as the loop places them, so that what
  one step looks at and leaves for the next is part of the test.

Words: a *context* is the tuple of tokens emitted so far; ``p(context)`` the target's next-token distribution.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.interfaces import AcceptanceRule
from specdec.tree import TokenTree, Topology

Context = tuple[int, ...]
Target = Callable[[Context], Sequence[float]]
Law = dict[Context, float]


class Coins:
    """All the randomness of one run, answered from a script so that every outcome can be replayed."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = list(script)
        self.flips: list[tuple[int, list[int]]] = []
        self.probability = 1.0

    def flip(self, probabilities: Sequence[float]) -> int:
        """The index of one outcome; zero-probability outcomes never come up."""
        options = [index for index, value in enumerate(probabilities) if value > 0]
        place = len(self.flips)
        choice = self.script[place] if place < len(self.script) else options[0]
        self.flips.append((choice, options))
        self.probability *= probabilities[choice]
        return choice


@dataclass
class PlainTree:
    """A tree as plain values: ``parents`` and ``tokens`` of nodes 0..N-1, node 0 the root.

    Attributes:
        q: for sampled children, per node that has children the distribution they were drawn from.
    """

    parents: list[int]
    tokens: list[int]
    q: dict[int, Sequence[float]] = field(default_factory=dict)

    def children(self, node: int) -> list[int]:
        """Children of a node in order of proposal."""
        return [child for child in range(1, len(self.parents)) if self.parents[child] == node]

    def words(self) -> list[Context]:
        """The tokens from below the root to each node."""
        words: list[Context] = [()]
        for parent, token in zip(self.parents[1:], self.tokens[1:], strict=True):
            words.append((*words[parent], token))
        return words


PlainDrafter = Callable[[Context, int, Coins], PlainTree]
"""(context, number of the step, coins) -> tree. The root's token is the last of the context, or 0."""

PlainRule = Callable[[PlainTree, Callable[[int], Sequence[float]], Coins], list[int]]
"""(tree, p at a node, coins) -> emitted tokens, the bonus last."""


def target_walk(tree: PlainTree, p: Callable[[int], Sequence[float]], coins: Coins) -> list[int]:
    """The slow plain definition of target sampling: draw y ~ p, follow the child that holds y, else stop with y."""
    node, emitted = 0, []
    while True:
        token = coins.flip(p(node))
        emitted.append(token)
        following = [child for child in tree.children(node) if tree.tokens[child] == token]
        if not following:
            return emitted
        node = following[0]


def enumerate_law(rule: PlainRule, drafter: PlainDrafter, p: Target, length: int) -> Law:
    """Probability of every text of ``length`` tokens that ``rule`` emits over as many steps as it takes."""

    def run(coins: Coins) -> Context:
        context: Context = ()
        step = 0
        while len(context) < length:
            tree = drafter(context, step, coins)
            words = tree.words()
            context += tuple(rule(tree, lambda node, c=context, w=words: p(c + w[node]), coins))  # type: ignore[misc]
            step += 1
        return context[:length]

    return _enumerate(run)


def accepted_law(rule: PlainRule, drafter: PlainDrafter, p: Target) -> Law:
    """Probability of every emission of one step from the empty context, uncut."""

    def run(coins: Coins) -> Context:
        tree = drafter((), 0, coins)
        words = tree.words()
        return tuple(rule(tree, lambda node: p(words[node]), coins))

    return _enumerate(run)


def _enumerate(run: Callable[[Coins], Context]) -> Law:
    masses: dict[Context, list[float]] = defaultdict(list)
    scripts: list[list[int]] = [[]]
    while scripts:
        script = scripts.pop()
        coins = Coins(script)
        masses[run(coins)].append(coins.probability)
        made = [choice for choice, _ in coins.flips]
        for place in range(len(script), len(made)):
            options = coins.flips[place][1]
            scripts += [[*made[:place], other] for other in options if other != made[place]]
    return {outcome: math.fsum(parts) for outcome, parts in masses.items()}


def joint(p: Target, length: int, vocab: int) -> Law:
    """The target's own law of ``length`` tokens."""
    return {
        word: math.prod(p(word[:place])[token] for place, token in enumerate(word))
        for word in itertools.product(range(vocab), repeat=length)
    }


def distance(law: Law, other: Law) -> float:
    """Largest difference of any probability; the mass is checked to be one on the way."""
    assert abs(math.fsum(law.values()) - 1) < 1e-12, "total mass"
    return max(abs(law.get(word, 0.0) - other.get(word, 0.0)) for word in law.keys() | other.keys())


def toy_target(vocab: int, seed: int, zeros: bool = False) -> Target:
    """A next-token distribution for every context; with ``zeros`` one token per context is impossible."""
    known: dict[Context, list[float]] = {}

    def p(context: Context) -> list[float]:
        if context not in known:
            place = sum((token + 1) * (vocab + 1) ** index for index, token in enumerate(context))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
            values = -torch.rand(vocab, generator=generator, dtype=torch.float64).log() + 1e-3
            if zeros:
                values[place % vocab] = 0.0
            known[context] = (values / values.sum()).tolist()
        return known[context]

    return p


def uniform_law(rule: AcceptanceRule, drafter: PlainDrafter, p: Target, length: int, vocab: int) -> Law:
    """Law of the first ``length`` tokens under a real rule that draws by inverse CDF, exact over its uniforms.

    Uniform ``u[b, t]`` serves output position t. Its cells are bounded by the CDFs of all contexts of length t; each
    combination of cells is one row of a batch, stepped as the loop would step it.
    """
    points, weights = [], []
    for place in range(length):
        bounds = {0.0, 1.0}
        for word in itertools.product(range(vocab), repeat=place):
            bounds |= {min(total, 1.0) for total in itertools.accumulate(p(word))}
        edges = sorted(bounds)
        cells = [(low, high) for low, high in itertools.pairwise(edges) if high > low]
        # Where rounding drew one bound twice, the cell between them has no mass to speak of.
        points.append(torch.tensor([(low + high) / 2 for low, high in cells], dtype=torch.float64))
        weights.append(torch.tensor([high - low for low, high in cells], dtype=torch.float64))
    uniforms, weight = torch.cartesian_prod(*points), torch.cartesian_prod(*weights).prod(-1)
    texts: list[Context] = [()] * len(weight)
    step = 0
    while True:
        groups: dict[Context, list[int]] = defaultdict(list)
        for row, text in enumerate(texts):
            if len(text) < length:
                groups[text].append(row)
        if not groups:
            break
        for context, rows in groups.items():
            tree = drafter(context, step, Coins(()))
            for row, emitted in zip(rows, _walk(rule, tree, context, p, uniforms[rows]), strict=True):
                texts[row] = (context + emitted)[:length]
        step += 1
    masses: dict[Context, list[float]] = defaultdict(list)
    for text, mass in zip(texts, weight.tolist(), strict=True):
        masses[text].append(mass)
    return {text: math.fsum(parts) for text, parts in masses.items()}


def _walk(rule: AcceptanceRule, plain: PlainTree, context: Context, p: Target, uniforms: Tensor) -> list[Context]:
    """One step of the real rule for rows of one context: uniforms ``[B, T]`` by output position."""
    words = plain.words()
    depth = max(map(len, words))
    rows = uniforms.shape[0]
    ahead = torch.nn.functional.pad(uniforms[:, len(context) :], (0, depth + 1), value=0.5)[:, : depth + 1]
    topology = Topology(torch.tensor([plain.parents]), depth)
    tree = TokenTree(torch.tensor([plain.tokens]).expand(rows, -1), topology)
    scores = torch.tensor([p(context + word) for word in words], dtype=torch.float64).log()
    walk = rule.accept(tree, scores.expand(rows, -1, -1), ahead)
    return [
        tuple(token for token, node in zip(tokens, path, strict=True) if node >= 0)
        for tokens, path in zip(walk.tokens.tolist(), walk.path.tolist(), strict=True)
    ]
