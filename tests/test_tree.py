"""The shape of token trees against slow definitions, and the builders of trees against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from specdec.tree import CANDIDATE, FEED_ONLY, PADDING, Template, TokenTree, Topology, best_first, chain, root_only


def random_parents(count: int, seed: int, narrow: bool) -> list[int]:
    """``narrow`` trees are deep: a parent is one of the last two nodes."""
    generator = torch.Generator().manual_seed(seed)
    lowest = [max(node - 2, 0) if narrow else 0 for node in range(count)]
    return [0, *(int(torch.randint(lowest[node], node, (1,), generator=generator)) for node in range(1, count))]


def slow_path(parents: Sequence[int], node: int) -> list[int]:
    return [0] if node == 0 else [*slow_path(parents, parents[node]), node]


def topology_of(rows: Sequence[Sequence[int]]) -> Topology:
    deepest = max(len(slow_path(row, node)) - 1 for row in rows for node in range(len(row)))
    return Topology(torch.tensor(rows), deepest)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 33, 65])
def test_topology(count: int, rows: int, narrow: bool) -> None:
    shapes = [random_parents(count, seed, narrow) for seed in range(rows)]
    topology = topology_of(shapes)
    assert topology.num_nodes == count
    for row, parents in enumerate(shapes):
        paths = [slow_path(parents, node) for node in range(count)]
        assert topology.depths[row].tolist() == [len(path) - 1 for path in paths]
        assert topology.ancestors[row].tolist() == [[other in path for other in range(count)] for path in paths]
        width = topology.max_depth + 1
        assert topology.paths[row].tolist() == [path + [-1] * (width - len(path)) for path in paths]
    for dtype in (torch.float32, torch.bfloat16):
        mask = topology.additive_mask(dtype)
        assert mask.dtype == dtype
        assert mask.shape == (rows, 1, count, count)
        assert torch.equal(mask[:, 0] == 0, topology.ancestors)
        assert bool((mask[:, 0][~topology.ancestors] == torch.finfo(dtype).min).all())


@pytest.mark.parametrize("count", [1, 2, 9, 65])
def test_chain(count: int) -> None:
    topology = chain(count)
    assert topology.parents.tolist() == [[0, *range(count - 1)]]
    assert topology.max_depth == count - 1
    assert topology.depths.tolist() == [list(range(count))]
    assert torch.equal(topology.ancestors[0], torch.ones(count, count, dtype=torch.bool).tril())
    assert chain(count) is topology, "what derives from it is computed once"


def test_root_only() -> None:
    tree = root_only(torch.tensor([4, 0]))
    tree.check()
    assert (tree.batch_size, tree.num_nodes, tree.token_ids.tolist()) == (2, 1, [[4], [0]])
    assert tree.candidates is None


def test_template() -> None:
    template = Template.from_paths([(0, 0), (1,), (0,), (0, 1), (0, 0, 0), (2,), (1, 0)])
    #        root  0  1  2  00 01 10 000
    parents = [0, 0, 0, 0, 1, 1, 2, 4]
    assert template.topology.parents.tolist() == [parents]
    assert template.ranks.tolist() == [0, 0, 1, 2, 0, 1, 0, 0]
    levels = [(above.tolist(), ranks.tolist()) for above, ranks in template.levels]
    assert levels == [([0, 0, 0], [0, 1, 2]), ([0, 0, 1], [0, 1, 0]), ([0], [0])]
    assert (template.num_nodes, template.width, template.topology.max_depth) == (8, 3, 3)
    assert template.to(torch.device("cpu")).topology is template.topology
    alone = Template.from_paths([])
    assert (alone.num_nodes, alone.levels, alone.topology.max_depth) == (1, (), 0)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (0,)], r"\[0\] twice"),
        ([(0,), ()], "the root"),
        ([(1,)], r"\[1\] needs \[0\]"),
        ([(0,), (0, 1)], r"\[0, 1\] needs \[0, 0\]"),
        ([(0,), (1, 0)], r"\[1, 0\] needs \[1\]"),
        ([(0,), (2,)], r"\[2\] needs \[1\]"),
        ([(-1,)], r"\[-1\]"),
    ],
)
def test_template_errors(paths: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template.from_paths(paths)


def expected_tokens(paths: Sequence[tuple[int, ...]], acceptance: Sequence[Sequence[float]]) -> float:
    """Sum over nodes of the probability that the walk accepts them."""
    total = 0.0
    for path in paths:
        value = 1.0
        for depth, rank in enumerate(path):
            value *= acceptance[min(depth, len(acceptance) - 1)][rank]
        total += value
    return total


def closed(paths: Sequence[tuple[int, ...]]) -> bool:
    needed = {path[:-1] for path in paths} | {(*path[:-1], path[-1] - 1) for path in paths if path[-1] > 0}
    return needed <= {(), *paths}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_depth", [None, 2])
def test_best_first_is_the_best_tree(seed: int, max_depth: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    acceptance = [sorted((torch.rand(3, generator=generator) * 0.6).tolist(), reverse=True) for _ in range(2)]
    limit = max_depth or 4
    nodes = [path for depth in range(1, limit + 1) for path in itertools.product(range(3), repeat=depth)]
    nodes = [path for path in nodes if sum(path) + len(path) <= 4]  # no closed tree of 4 nodes holds another
    for budget in (1, 2, 3, 4):
        trees = filter(closed, itertools.combinations(nodes, budget))
        best = max(expected_tokens(paths, acceptance) for paths in trees)
        chosen = best_first(acceptance, budget, max_depth)
        assert len(chosen) == len(set(chosen)) == budget
        assert closed(chosen)
        assert max(map(len, chosen)) <= limit
        assert expected_tokens(chosen, acceptance) == pytest.approx(best)
        Template.from_paths(chosen)


def test_best_first_stops_where_nothing_is_left() -> None:
    assert best_first([[0.5, 0.0]], 10, max_depth=3) == [(0,), (0, 0), (0, 0, 0)]
    assert best_first([[0.0]], 5) == []
    assert best_first([[0.5, 0.4]], 0) == []
    assert best_first([[0.9], [0.5, 0.5]], 4) == [(0,), (0, 0), (0, 1), (0, 0, 0)], "the last row serves greater depths"


def tree(parents: Sequence[int], tokens: Sequence[int], depth: int, role: Sequence[int] | None = None) -> TokenTree:
    roles = None if role is None else torch.tensor([role])
    return TokenTree(torch.tensor([tokens]), Topology(torch.tensor([parents]), depth), roles)


def test_check_passes() -> None:
    tree([0, 0, 0, 1], [5, 1, 2, 1], 2).check()
    tree([0, 0, 0, 1], [5, 5, 2, 5], 2).check()
    tree([0, 0, 0], [5, 1, 1], 1, [CANDIDATE, CANDIDATE, FEED_ONLY]).check()
    tree([0, 0, 0], [5, 0, 0], 1, [CANDIDATE, PADDING, PADDING]).check()
    per_row = Topology(torch.tensor([[0, 0, 1], [0, 0, 0]]), 2)
    TokenTree(torch.tensor([[1, 2, 2], [1, 2, 3]]), per_row).check()
    tree([0, 0, 0], [5, 1, 2], 2).check()  # a bound on the depth will do


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (tree([0, 2, 0], [5, 1, 2], 2), "precede"),
        (tree([0, 1], [5, 1], 1), "precede"),
        (tree([1, 0], [5, 1], 1), "precede"),
        (tree([0, 0, 0], [5, 1, 1], 1), "distinct"),
        (tree([0, 0, 1, 1], [5, 1, 2, 2], 2), "distinct"),
        (tree([0, 0], [5, -1], 1), "never a token id"),
        (tree([0, 0, 1, 2], [5, 1, 2, 3], 2), "depth"),
        (tree([0, 0, 1], [5, 1, 2], 1), "depth"),
        (TokenTree(torch.tensor([[5, 1]] * 3), Topology(torch.tensor([[0, 0]] * 2), 1)), "one shape"),
        (TokenTree(torch.tensor([[5, 1]], dtype=torch.int32), chain(2)), "int64"),
        (TokenTree(torch.tensor([[5, 1]]), chain(3)), "one token per node"),
    ],
)
def test_check_fails(wrong: TokenTree, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        wrong.check()


def test_check_fails_in_any_row() -> None:
    with pytest.raises(AssertionError, match="distinct"):
        TokenTree(torch.tensor([[1, 2, 3], [1, 2, 2]]), Topology(torch.tensor([[0, 0, 0]]), 1)).check()
