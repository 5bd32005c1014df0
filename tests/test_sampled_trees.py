"""Shapes of draft trees, grown from tables in place of a model: what is proposed, and the law that it leads to.

Shapes: B rows, N nodes, V vocabulary, C codes of contexts.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from drafters.ranked_trees import Grown, Shape, TopK
from drafters.sampled_trees import Beam, Branching, Chains, draw_distinct
from law import Context, Law, distance, joint, toy_target
from specdec.tree import PADDING, WITHOUT_REPLACEMENT, TokenTree

VOCAB = 3
EXACT, WRONG = 1e-12, 1e-3

# Quarters only, so that few cells of the uniforms tell all draws apart; two of them run out of tokens.
LAWS = [(0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5), (0.0, 0.25, 0.75), (0.0, 1.0, 0.0)]


def code_of(word: Context, vocab: int) -> int:
    code = 0
    for token in word:
        code = code * (vocab + 1) + token + 1
    return code


class Table:
    """Passes of a draft model that is a table: log q of every context of at most ``depth`` tokens, ``[C, V]``."""

    def __init__(self, table: Tensor, batch: int) -> None:
        self.table, self.codes = table, torch.zeros(batch, 1, dtype=torch.int64)
        self.runs = 0

    def root(self) -> Tensor:
        self.runs += 1
        return self.table[self.codes]

    def expand(self, tokens: Tensor, parents: Tensor | tuple[int, ...]) -> Tensor:
        above = torch.tensor([parents]) if isinstance(parents, tuple) else parents
        new = self.codes.gather(1, above.expand_as(tokens)) * (self.table.shape[1] + 1) + tokens + 1
        self.codes = torch.cat([self.codes, new], dim=1)
        self.runs += 1
        return self.table[new]


def random_table(vocab: int, depth: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn((vocab + 1) ** depth, vocab, generator=generator, dtype=torch.float64) * 2
    return scores.log_softmax(-1)


@cache
def quarters(depth: int, first: int) -> Tensor:
    """Another law of LAWS for every context, ``first`` at the root."""
    count = (VOCAB + 1) ** depth
    return torch.tensor([LAWS[(first + 3 * code) % len(LAWS)] for code in range(count)], dtype=torch.float64).log()


def rand(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)


class Cells:
    """Uniforms of which every row of a batch holds one combination of cells; ``weights [B]`` are their masses.

    In a cell every draw from a law of quarters, whatever was drawn before, comes out the same. The times of a race
    (asked for together with the draws) are no matter of cells: they are the same numbers in every row.
    """

    def __init__(self, shape: Shape, depth: int, table: Tensor, seed: int) -> None:
        wanted: list[tuple[int, ...]] = []

        def note(*size: int) -> Tensor:
            wanted.append(size)
            return torch.zeros(size, dtype=torch.float64)

        shape.grow(torch.zeros(1, dtype=torch.int64), Table(table, 1), depth, note)
        self.timed = [s[0] == 2 and len(s) == 4 for s in wanted]
        sizes = [s[1:] if timed else s for s, timed in zip(wanted, self.timed, strict=True)]
        independent = isinstance(shape, Chains)
        kinds = [0 if independent else place % size[-1] for size in sizes for place in range(math.prod(size))]
        cells = [_cells_of(kind) for kind in kinds]
        points = torch.cartesian_prod(*(torch.tensor([p for p, _ in c], dtype=torch.float64) for c in cells))
        masses = torch.cartesian_prod(*(torch.tensor([m for _, m in c], dtype=torch.float64) for c in cells))
        self.weights = masses.view(len(points), -1).prod(-1)
        self.batch = len(points)
        parts = points.view(self.batch, -1).split([math.prod(size) for size in sizes], dim=1)
        self._parts = [part.reshape(self.batch, *size[1:]) for part, size in zip(parts, sizes, strict=True)]
        self._times = rand(seed)
        self._next = 0

    def __call__(self, *shape: int) -> Tensor:
        part, timed = self._parts[self._next], self.timed[self._next]
        self._next += 1
        if timed:
            part = torch.stack([part, self._times(1, *part.shape[1:]).expand_as(part)])
        assert part.shape == shape
        return part


def _cells_of(number: int) -> list[tuple[float, float]]:
    """Middle and mass of the cells in which the ``number``-th draw without replacement is the same."""
    bounds = {0.0, 1.0}
    for law in LAWS:
        for gone in itertools.combinations(range(VOCAB), number):
            left = [0.0 if token in gone else value for token, value in enumerate(law)]
            if sum(left):
                bounds |= {total / sum(left) for total in itertools.accumulate(left)}
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(sorted(bounds)) if high - low > 1e-9]


Events = dict[int, list[tuple[int, int, list[float]]]]
"""Parent -> (child, kind, q) in order."""


def events_of(tree: TokenTree, row: int) -> Events:
    assert tree.draws is not None
    draws, events = tree.draws, defaultdict(list)
    parents = tree.parents[row].tolist()
    for node, kind, q_row in zip(draws.node[row], draws.kind[row], draws.q_row[row], strict=True):
        if node >= 0:
            events[parents[int(node)]].append((int(node), int(kind), draws.q[row, int(q_row)].tolist()))
    return events


def rejection_law(tokens: Sequence[int], events: Events, p: Callable[[Context], Sequence[float]]) -> Law:
    """What recursive rejection emits for one tree, by its definition and without random numbers."""

    def below(node: int, word: Context) -> Law:
        law: dict[Context, float] = defaultdict(float)
        left, mass = list(p(word)), 1.0
        gone: set[int] = set()
        for child, kind, law_of_draw in events.get(node, []):
            q = [0.0 if token in gone else value for token, value in enumerate(law_of_draw)]
            q = [value / math.fsum(q) for value in q]
            token = tokens[child]
            share = min(1.0, left[token] / q[token])
            for rest, value in below(child, (*word, token)).items():
                law[(token, *rest)] += mass * share * value
            mass *= 1 - share
            left = [max(a - b, 0.0) for a, b in zip(left, q, strict=True)]
            if math.fsum(left) <= 0:
                return law  # nothing is ever rejected here
            left = [value / math.fsum(left) for value in left]
            if kind == WITHOUT_REPLACEMENT:
                gone.add(token)
        for token, value in enumerate(left):
            law[(token,)] += mass * value
        return law

    return below(0, ())


def text_law(
    grown: Grown, weights: Tensor, length: int, change: Callable[[Events], Events] = lambda events: events
) -> Law:
    """Law of the first tokens: the trees' emissions, continued by the target itself."""
    p = toy_target(VOCAB, seed=5)
    masses: dict[Context, list[float]] = defaultdict(list)
    for row, weight in enumerate(weights.tolist()):
        law = rejection_law(grown.tree.token_ids[row].tolist(), change(events_of(grown.tree, row)), p)
        for word, mass in law.items():
            masses[word].append(weight * mass)
    whole: dict[Context, list[float]] = defaultdict(list)
    for word, parts in masses.items():
        for rest in itertools.product(range(VOCAB), repeat=length - len(word)):
            full = word + rest
            chance = math.prod(p(full[:place])[full[place]] for place in range(len(word), length))
            whole[full].append(math.fsum(parts) * chance)
    return {word: math.fsum(parts) for word, parts in whole.items()}


SAMPLED: dict[str, Shape] = {
    "chain": Chains(3),
    "two chains": Chains(2, 2),
    "three chains": Chains(1, 3),
    "RSD-C 2, 1": Branching((2, 1)),
    "RSD-C 1, 2": Branching((1, 2)),
    "RSD-C 2, 2": Branching((2, 2)),
    "RSD-C 3": Branching((3,)),
    "RSD-S 2": Beam(2, 2),
    "RSD-S 3": Beam(1, 3),
}


@pytest.mark.parametrize("first", [0, 3, 4])
@pytest.mark.parametrize("name", SAMPLED)
def test_drawn_trees_lead_to_the_targets_law(name: str, first: int) -> None:
    shape = SAMPLED[name]
    table, depth = quarters(shape.depth, first), shape.depth
    for seed in range(2 if isinstance(shape, Beam) else 1):
        cells = Cells(shape, depth, table, seed)
        assert float(cells.weights.sum()) == pytest.approx(1, abs=EXACT)
        grown = shape.grow(torch.zeros(cells.batch, dtype=torch.int64), Table(table, cells.batch), depth, cells)
        grown.tree.check()
        expected = joint(toy_target(VOCAB, seed=5), depth + 1, VOCAB)
        assert distance(text_law(grown, cells.weights, depth + 1), expected) < EXACT


def _reversed(events: Events) -> Events:
    return {node: children[::-1] for node, children in events.items()}


def _another_q(events: Events) -> Events:
    return {node: [(c, kind, [1 / VOCAB] * VOCAB) for c, kind, _ in children] for node, children in events.items()}


@pytest.mark.parametrize("change", [_reversed, _another_q])
@pytest.mark.parametrize("name", ["RSD-C 2, 1", "RSD-S 2"])
def test_other_records_of_the_draws_fail_the_same_check(name: str, change: Callable[[Events], Events]) -> None:
    shape, table = SAMPLED[name], quarters(2, 0)
    cells = Cells(shape, 2, table, 0)
    grown = shape.grow(torch.zeros(cells.batch, dtype=torch.int64), Table(table, cells.batch), 2, cells)
    assert distance(text_law(grown, cells.weights, 3, change), joint(toy_target(VOCAB, seed=5), 3, VOCAB)) > WRONG


def test_pruning_by_token_fails_the_same_check() -> None:
    shape, table = Branching((2,)), quarters(1, 0)
    cells = Cells(shape, 1, table, 0)
    grown = shape.grow(torch.zeros(cells.batch, dtype=torch.int64), Table(table, cells.batch), 1, cells)
    tree = grown.tree
    assert tree.draws is not None
    # As a builder would that ranks by probability: of two drawn siblings the likelier stays.
    values = tree.draws.q[:, 0].gather(1, tree.token_ids[:, 1:])
    tree.draws.node = torch.where(values == values.amax(1, keepdim=True), tree.draws.node, -1)
    assert distance(text_law(grown, cells.weights, 2), joint(toy_target(VOCAB, seed=5), 2, VOCAB)) > WRONG


def test_stochastic_beam_search_draws_paths_without_replacement() -> None:
    batch, table = 40_000, random_table(VOCAB, 2, 1) / 2
    shape = Beam(2, 3)
    tree = shape.grow(torch.zeros(batch, dtype=torch.int64), Table(table, batch), 2, rand(0)).tree
    assert tree.role is None or not bool((tree.role == PADDING).any())
    pairs = tree.token_ids.gather(1, tree.parents[:, 4:6]) * VOCAB + tree.token_ids[:, 4:6]
    q = table.softmax(-1)
    path = {a * VOCAB + b: float(q[0, a] * q[a + 1, b]) for a in range(VOCAB) for b in range(VOCAB)}
    expected = {(a, b): path[a] * path[b] / (1 - path[a]) * batch for a in path for b in path if a != b}
    seen = Counter(map(tuple, pairs.tolist()))
    assert seen.keys() <= expected.keys()
    statistic = sum((seen[pair] - count) ** 2 / count for pair, count in expected.items())
    p_value = torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), torch.tensor(statistic / 2))
    assert min(expected.values()) > 5
    assert float(p_value) > 1e-4


def test_draws_end_where_the_mass_does() -> None:
    q = torch.tensor([[[0.0, 0.75, 0.0, 0.25]]])
    tokens, left = draw_distinct(q, torch.tensor([[[0.9, 0.999, 0.5]]], dtype=torch.float64))
    assert tokens.tolist()[0][0][:2] == [3, 1]
    assert left.tolist() == [[[1.0, 0.75, 0.0]]]
    first, _ = draw_distinct(q, torch.tensor([[[0.0]]], dtype=torch.float64))
    last, _ = draw_distinct(q, torch.tensor([[[1 - 2**-53]]], dtype=torch.float64))
    assert (int(first), int(last)) == (1, 3), "tokens without mass are never drawn"


def paths_of(grown: Grown, row: int) -> dict[int, Context]:
    """Tokens from below the root to each node that is no padding."""
    tree = grown.tree
    parents, tokens = tree.parents[row].tolist(), tree.token_ids[row].tolist()
    words: dict[int, Context] = {0: ()}
    for node in range(1, tree.num_nodes):
        words[node] = (*words[parents[node]], tokens[node])
    alive = tree.candidates
    return {node: word for node, word in words.items() if node and (alive is None or alive[row, node])}


def value_of(word: Context, table: Tensor) -> float:
    return sum(float(table[code_of(word[:place], table.shape[1]), token]) for place, token in enumerate(word))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("depth", "width", "nodes"), [(3, 2, 6), (3, 4, 9), (1, 3, 2), (2, 3, 50), (4, 2, 1)])
def test_top_k_by_its_definition(depth: int, width: int, nodes: int, seed: int) -> None:
    vocab, batch = 5, 2
    table = random_table(vocab, depth, seed)
    shape = TopK(depth, width, nodes)
    roots = torch.arange(batch)
    passes = Table(table, batch)
    grown = shape.grow(roots, passes, depth, None)
    grown.tree.check()
    assert passes.runs == depth
    level: list[Context] = [()]
    scored: list[Context] = []
    for _ in range(depth):
        children = []
        for word in level:
            order = sorted(range(vocab), key=lambda token, w=word: -value_of((*w, token), table))  # type: ignore[misc]
            children += [(*word, token) for token in order[:width]]
        scored += children
        level = sorted(children, key=lambda word: -value_of(word, table))[:width]
    best = sorted(scored, key=lambda word: (-value_of(word, table), len(word)))[:nodes]
    assert shape.max_nodes == min(nodes, width + width**2 * (depth - 1)) + 1 >= grown.tree.num_nodes
    for row in range(batch):
        assert sorted(paths_of(grown, row).values()) == sorted(best)
    check_runs(grown, passes, vocab)


def check_runs(grown: Grown, passes: Table, vocab: int) -> None:
    """A node that says it was run is the one that was."""
    run = grown.run.expand(grown.tree.batch_size, -1)
    for row in range(grown.tree.batch_size):
        assert int(run[row, 0]) == 0
        for node, word in paths_of(grown, row).items():
            if run[row, node] >= 0:
                assert int(passes.codes[row, run[row, node]]) == code_of(word, vocab)
        parents = grown.tree.parents[row].tolist()
        assert all(run[row, parents[node]] >= 0 for node in paths_of(grown, row)), (
            "children are known of run nodes only"
        )


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_by_its_definition(seed: int) -> None:
    vocab, depth, width = 4, 3, 3
    table = random_table(vocab, depth, seed)
    passes = Table(table, 1)
    grown = Beam(depth, width).grow(torch.zeros(1, dtype=torch.int64), passes, depth, None)
    grown.tree.check()
    level: list[Context] = [()]
    expected: list[Context] = []
    for _ in range(depth):
        children = [(*word, token) for word in level for token in range(vocab)]
        level = sorted(children, key=lambda word: -value_of(word, table))[:width]
        expected += level
    assert list(paths_of(grown, 0).values()) == expected
    assert grown.tree.draws is None
    check_runs(grown, passes, vocab)


def test_most_likely_children_by_level() -> None:
    table = random_table(4, 3, 0)
    grown = Branching((2, 1, 2)).grow(torch.zeros(1, dtype=torch.int64), Table(table, 1), 3, None)
    grown.tree.check()
    for node, word in paths_of(grown, 0).items():
        order = table[code_of(word[:-1], 4)].argsort(descending=True).tolist()
        assert grown.tree.rank is not None
        assert order[int(grown.tree.rank[0, node])] == word[-1]
    assert grown.tree.num_nodes == Branching((2, 1, 2)).max_nodes == 1 + 2 + 2 + 4
    chain = Chains(3).grow(torch.zeros(1, dtype=torch.int64), Table(table, 1), 3, None).tree
    assert chain.parents.tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "shape", [Chains(3), Chains(3, 2), TopK(3, 2, 20), Branching((2, 2, 1)), Beam(3, 2)], ids=lambda s: type(s).__name__
)
def test_shallower_trees_cost_fewer_passes(shape: Shape, depth: int) -> None:
    for uniforms in (None, rand(0)):
        passes = Table(random_table(4, 3, 0), 2)
        grown = shape.grow(torch.zeros(2, dtype=torch.int64), passes, depth, uniforms)
        grown.tree.check()
        assert passes.runs == depth == grown.tree.topology.max_depth
        assert grown.tree.num_nodes <= shape.max_nodes
        assert (grown.tree.draws is not None) == (uniforms is not None and not isinstance(shape, TopK))
        check_runs(grown, passes, 4)


def test_impossible_tokens_are_padding() -> None:
    table = quarters(2, 4)  # one token at the root
    for shape in (TopK(2, 3, 12), Branching((3, 2)), Beam(2, 3)):
        for uniforms in (None, rand(1)):
            grown = shape.grow(torch.zeros(1, dtype=torch.int64), Table(table, 1), 2, uniforms)
            grown.tree.check()
            words = set(paths_of(grown, 0).values())
            assert {word[0] for word in words} == {1}
            assert all(value_of(word, table) > -math.inf for word in words)
