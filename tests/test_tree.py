"""The shape of token trees against slow definitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from specdec.tree import CANDIDATE, FEED_ONLY, PADDING, TokenTree, Topology, chain, from_host, pad_rows, root_only


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
        for prefix in (1, 300, 7, 256, 0):
            assert torch.equal(topology.additive_mask(dtype, prefix), torch.nn.functional.pad(mask, (prefix, 0)))


@pytest.mark.parametrize("count", [1, 2, 9, 65])
def test_chain(count: int) -> None:
    topology = chain(count)
    assert topology.parents.tolist() == [[0, *range(count - 1)]]
    assert topology.max_depth == count - 1
    assert topology.depths.tolist() == [list(range(count))]
    assert torch.equal(topology.ancestors[0], torch.ones(count, count, dtype=torch.bool).tril())
    assert chain(count) is topology, "what derives from it is computed once"


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_from_host(count: int, narrow: bool) -> None:
    shapes = [random_parents(count, seed, narrow) for seed in range(3)]
    for rows in (shapes[:1], shapes, shapes[:1] * 3):
        topology, expected = from_host(rows), topology_of(rows)
        assert topology.max_depth == expected.max_depth
        assert torch.equal(topology.ancestors.expand(len(rows), -1, -1), expected.ancestors)
    assert from_host(shapes[:1] * 3) is from_host(np.array(shapes[:1])), "rows that agree share a shape, and it is kept"
    assert from_host(shapes[:1]).parents.shape == (1, count)


@pytest.mark.parametrize(
    "parents", [[[0, 1]], [[0, 0, 2]], [[1, 0]], [[0, -1]], [[0, 0], [0, 1]], [[0, 2, 1], [0, 0, 0]]]
)
def test_from_host_refuses_what_is_no_tree(parents: list[list[int]]) -> None:
    with pytest.raises(AssertionError, match="parent"):
        from_host(parents)


def test_pad_rows() -> None:
    root = torch.tensor([4, 0, 9])
    padded = pad_rows(root, [[7, 0, 7], [], [3]], [[0, 0, 1], [], [0]], sources=("a",))
    padded.check()
    assert padded.token_ids.tolist() == [[4, 7, 0, 7], [0, 0, 0, 0], [9, 3, 0, 0]]
    assert padded.parents.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert padded.role is not None
    assert padded.role.tolist() == [[CANDIDATE] * 4, [CANDIDATE] + [PADDING] * 3, [CANDIDATE] * 2 + [PADDING] * 2]
    assert (padded.topology.max_depth, padded.sources) == (2, ("a",))
    assert padded.candidates_by_depth().tolist() == [[2, 1], [0, 0], [1, 0]]


def test_pad_rows_where_nothing_is_padded() -> None:
    root = torch.tensor([4, 0])
    full = pad_rows(root, [[1, 2], [3, 5]], [[0, 1], [0, 1]])
    full.check()
    assert full.role is None
    assert full.topology is from_host([[0, 0, 1]])
    empty = pad_rows(root, [[], []], [[], []])
    assert empty.topology is chain(1, root.device)
    assert empty.token_ids.tolist() == [[4], [0]]


def test_root_only() -> None:
    tree = root_only(torch.tensor([4, 0]))
    tree.check()
    assert (tree.batch_size, tree.num_nodes, tree.token_ids.tolist()) == (2, 1, [[4], [0]])
    assert tree.candidates is None


def tree(parents: Sequence[int], tokens: Sequence[int], depth: int, role: Sequence[int] | None = None) -> TokenTree:
    roles = None if role is None else torch.tensor([role])
    return TokenTree(torch.tensor([tokens]), Topology(torch.tensor([parents]), depth), roles)


def test_check_passes() -> None:
    tree([0, 0, 0, 1], [5, 1, 2, 1], 2).check()
    tree([0, 0, 0, 1], [5, 5, 2, 5], 2).check()
    tree([0, 0, 0], [5, 1, 1], 1, [CANDIDATE, CANDIDATE, FEED_ONLY]).check()
    tree([0, 0, 0], [5, 0, 0], 1, [CANDIDATE, PADDING, PADDING]).check()
    tree([0, 0, 0], [5, 1, 2], 2).check()  # a bound on the depth will do
    per_row = Topology(torch.tensor([[0, 0, 1], [0, 0, 0]]), 2)
    TokenTree(torch.tensor([[1, 2, 2], [1, 2, 3]]), per_row).check()


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


def test_candidates_follow_a_new_role() -> None:
    proposed = tree([0, 0, 0], [5, 1, 2], 1, [CANDIDATE, CANDIDATE, CANDIDATE])
    assert proposed.candidates is not None and bool(proposed.candidates.all())  # noqa: PT018
    proposed.role = torch.tensor([[CANDIDATE, PADDING, CANDIDATE]])
    assert proposed.candidates.tolist() == [[True, False, True]]
