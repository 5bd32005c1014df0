"""The exact law of the tokens that a rule emits, on toy vocabularies: no statistics, no tolerance but rounding.

Three ways to take a rule in:

- as a *definition*: plain Python that draws by ``coins.flip(probabilities)``. ``enumerate_law`` replays it once per
  outcome of all coins, so drafters that sample, rejections and residuals need nothing special;
- as the *code that runs*: an ``AcceptanceRule`` whose outcome is piecewise constant in its uniforms. ``uniform_law``
  runs it on one point of every cell, with the uniforms placed per output position as the loop places them, so that what
  one step looks at and leaves for the next is part of the test;
- as *both*: where a definition says which coin or uniform each flip stands for, every run of it is a box in the space
  of coins and uniforms. ``code_law`` runs the code on points of every box, and weighs what it emits there with the mass
  of the box. Code and definition may only differ on the boundaries, which have none.

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
from specdec.tree import CANDIDATE, PADDING, POINT, Draws, TokenTree, Topology

Context = tuple[int, ...]
Target = Callable[[Context], Sequence[float]]
Law = dict[Context, float]
Place = tuple[str, int]
"""``("uniform", depth)`` or ``("coin", index)``."""


class Coins:
    """All the randomness of one run, answered from a script so that every outcome can be replayed."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = list(script)
        self.flips: list[tuple[int, list[int]]] = []
        self.probability = 1.0
        self.cells: dict[Place, tuple[float, float]] = {}

    def flip(self, probabilities: Sequence[float], at: Place | None = None) -> int:
        """The index of one outcome; zero-probability outcomes never come up.

        Args:
            probabilities: of the outcomes.
            at: the random number that decides by inverse CDF, where it is one that a rule is given.
        """
        options = [index for index, value in enumerate(probabilities) if value > 0]
        place = len(self.flips)
        choice = self.script[place] if place < len(self.script) else options[0]
        self.flips.append((choice, options))
        self.probability *= probabilities[choice]
        if at is not None:
            assert at not in self.cells, "a random number decides once"
            low = math.fsum(probabilities[:choice])
            self.cells[at] = (low, low + probabilities[choice])
        return choice


class Given(Coins):
    """Coins that come up as given random numbers say."""

    def __init__(self, uniforms: Sequence[float], coins: Sequence[float]) -> None:
        super().__init__(())
        self.numbers = {"uniform": uniforms, "coin": coins}

    def flip(self, probabilities: Sequence[float], at: Place | None = None) -> int:
        """The outcome in whose share of the sum the number lies."""
        assert at is not None
        bar, total = self.numbers[at[0]][at[1]] * math.fsum(probabilities), 0.0
        for index, value in enumerate(probabilities):
            total += value
            if bar < total:
                return index
        raise AssertionError("the sum is above every uniform below one")


@dataclass
class PlainEvent:
    """How a child was proposed: by which kind of event, and from which distribution (before any removal)."""

    child: int
    kind: int
    q: tuple[float, ...]


@dataclass
class PlainTree:
    """A tree as plain values: ``parents`` and ``tokens`` of nodes 0..N-1, node 0 the root.

    Attributes:
        q: for sampled children, per node that has children the distribution they were drawn from.
        draws: the events in order; None where the drafter does not say.
    """

    parents: list[int]
    tokens: list[int]
    q: dict[int, Sequence[float]] = field(default_factory=dict)
    draws: list[PlainEvent] | None = None

    def events(self, node: int) -> list[tuple[int, PlainEvent]]:
        """The numbered events at a node, in order."""
        return [(e, event) for e, event in enumerate(self.draws or []) if self.parents[event.child] == node]

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
            coins.cells.clear()  # every step has random numbers of its own
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


def tree_of(plains: Sequence[PlainTree], vocab: int) -> TokenTree:
    """One batch of plain trees, each a row; smaller ones end in padding, of nodes and of events."""
    nodes = max(len(plain.parents) for plain in plains)
    fill = [nodes - len(plain.parents) for plain in plains]
    parents = torch.tensor([plain.parents + [0] * more for plain, more in zip(plains, fill, strict=True)])
    tokens = torch.tensor([plain.tokens + [0] * more for plain, more in zip(plains, fill, strict=True)])
    role = torch.tensor([[CANDIDATE] * (nodes - more) + [PADDING] * more for more in fill])
    topology = Topology(parents, max(len(word) for plain in plains for word in plain.words()))
    tree = TokenTree(tokens, topology, role if any(fill) else None)
    if any(plain.draws is not None for plain in plains):
        tree.draws = _draws_of(plains, vocab)
    return tree


def _draws_of(plains: Sequence[PlainTree], vocab: int) -> Draws:
    count = max(len(plain.draws or []) for plain in plains)
    tables = [list(dict.fromkeys(event.q for event in plain.draws or [])) for plain in plains]
    rows = max(1, *map(len, tables))
    q = torch.tensor([[*table, *[(0.0,) * vocab] * (rows - len(table))] for table in tables], dtype=torch.float64)
    entries = [
        [[event.child, event.kind, table.index(event.q)] for event in plain.draws or []]
        + [[-1, POINT, 0]] * (count - len(plain.draws or []))
        for plain, table in zip(plains, tables, strict=True)
    ]
    node, kind, q_row = torch.tensor(entries).view(len(plains), count, 3).unbind(-1)
    return Draws(node, kind, q_row, q)


def scores_of(plains: Sequence[PlainTree], p: Target, vocab: int) -> Tensor:
    """float64 ``[B, N, V]``: log p at every node."""
    longest = max(len(plain.parents) for plain in plains)
    known = [[p(word) for word in plain.words()] + [p(())] * (longest - len(plain.parents)) for plain in plains]
    return torch.tensor(known, dtype=torch.float64).view(len(plains), longest, vocab).log()


def emissions(
    rule: AcceptanceRule, plains: Sequence[PlainTree], p: Target, vocab: int, uniforms: Tensor, coins: Tensor
) -> list[Context]:
    """What the code emits for a batch of trees; it is given as many of the numbers as it says it wants."""
    tree = tree_of(plains, vocab)
    wanted = rule.num_coins(tree)
    ahead = uniforms[:, : tree.topology.max_depth + 1]
    walk = rule.accept(tree, scores_of(plains, p, vocab), ahead, coins[:, :wanted] if wanted else None)
    taken = [
        [(token, node) for token, node in zip(tokens, path, strict=True) if node >= 0]
        for tokens, path in zip(walk.tokens.tolist(), walk.path.tolist(), strict=True)
    ]
    for plain, row in zip(plains, taken, strict=True):
        nodes = [node for _, node in row]
        assert [0, *(plain.parents[node] for node in nodes[1:])] == [nodes[0], *nodes[:-1]], "a path from the root"
        assert [plain.tokens[node] for node in nodes[1:]] == [token for token, _ in row][:-1], "its own tokens"
    return [tuple(token for token, _ in row) for row in taken]


@dataclass
class Box:
    """One run of a definition: its tree, what it emitted, its mass, and the numbers for which it runs so."""

    tree: PlainTree
    emitted: Context
    mass: float
    cells: dict[Place, tuple[float, float]]


def boxes(rule: PlainRule, drafter: PlainDrafter, p: Target) -> list[Box]:
    """Every run of one step from the empty context."""
    found: list[Box] = []

    def run(coins: Coins) -> Context:
        tree = drafter((), 0, coins)
        words = tree.words()
        emitted = tuple(rule(tree, lambda node: p(words[node]), coins))
        found.append(Box(tree, emitted, coins.probability, coins.cells))
        return emitted

    _enumerate(run)
    return found


def law_of(found: Sequence[Box]) -> Law:
    """Law of one step of the definition, uncut."""
    masses: dict[Context, list[float]] = defaultdict(list)
    for box in found:
        masses[box.emitted].append(box.mass)
    return {outcome: math.fsum(parts) for outcome, parts in masses.items()}


def code_law(rule: AcceptanceRule, found: Sequence[Box], p: Target, vocab: int, points: int = 2) -> Law:
    """Law of one step of the code, uncut, by its values on points of the boxes of its definition.

    Numbers that a box leaves open are random. What the code emits must be the same all over a box.
    """
    known = [box for box in found if _width(box) > 1e-9]
    assert math.fsum(box.mass for box in known) > 1 - 1e-13, "what is left out is rounding"
    plains = [box.tree for box in known]
    generator = torch.Generator().manual_seed(0)
    depth = max(len(word) for plain in plains for word in plain.words())
    count = max(max(len(plain.parents), len(plain.draws or [])) for plain in plains)
    emitted: list[list[Context]] = []
    for _ in range(points):
        numbers = {
            "uniform": torch.rand(len(known), depth + 1, generator=generator, dtype=torch.float64),
            "coin": torch.rand(len(known), count, generator=generator, dtype=torch.float64),
        }
        for row, box in enumerate(known):
            for (stream, index), (low, high) in box.cells.items():
                inside = 0.001 + 0.998 * float(numbers[stream][row, index])
                numbers[stream][row, index] = low + (high - low) * inside
        emitted.append(emissions(rule, plains, p, vocab, numbers["uniform"], numbers["coin"]))
    masses: dict[Context, list[float]] = defaultdict(list)
    for outcomes, box in zip(zip(*emitted, strict=True), known, strict=True):
        assert len(set(outcomes)) == 1, "the code changes its mind inside a box"
        masses[outcomes[0]].append(box.mass)
    return {outcome: math.fsum(parts) for outcome, parts in masses.items()}


def _width(box: Box) -> float:
    return min((high - low for low, high in box.cells.values()), default=1.0)


def completed(law: Law, p: Target, length: int, vocab: int) -> Law:
    """Law of the first ``length`` tokens, when what follows one step is drawn from p."""
    masses: dict[Context, list[float]] = defaultdict(list)
    for emitted, mass in law.items():
        start = emitted[:length]
        for rest, share in joint(lambda word, s=start: p(s + word), length - len(start), vocab).items():  # type: ignore[misc]
            masses[start + rest].append(mass * share)
    return {word: math.fsum(parts) for word, parts in masses.items()}


def mean_accepted(law: Law) -> float:
    """Expected number of accepted tokens of a law of uncut emissions."""
    return math.fsum((len(emitted) - 1) * mass for emitted, mass in law.items())
