"""Trees of a fixed shape; the best one against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from specdec.templates import Template, best_first


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
