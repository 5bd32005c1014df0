"""The chosen tree against all trees there are, and the smoothing of what is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from specdec.templates import Template, chain_length, chain_paths, kept_template
from specdec.tuning.choice import Costs, Paths, Profile, choose, envelope, expect, falling

RANKS, DEPTH, NODES = 3, 3, 5


def closed_trees(max_nodes: int, max_depth: int) -> Iterator[Paths]:
    """All trees of 1..max_nodes nodes with up to RANKS children each, by growing one node at a time."""
    seen: set[frozenset[tuple[int, ...]]] = {frozenset()}
    layer = seen
    for _ in range(max_nodes):
        grown = set()
        for tree in layer:
            for parent in [(), *tree]:
                rank = sum(path[:-1] == parent for path in tree if path)
                if rank < RANKS and len(parent) < max_depth:
                    grown.add(tree | {(*parent, rank)})
        yield from (sorted(tree) for tree in grown)
        layer = grown


def random_profile(generator: np.random.Generator) -> Profile:
    rates = np.sort(generator.random((DEPTH, RANKS)) * 0.6, axis=1)[:, ::-1]
    return Profile((rates / np.maximum(rates.sum(1, keepdims=True), 1)).tolist())


def random_costs(generator: np.random.Generator, per_level: float) -> Costs:
    steps = generator.random(NODES + 1) * (generator.random(NODES + 1) < 0.5)
    passes = 1 + np.cumsum(steps) * 0.6
    draft = (float(generator.random()), float(generator.random() * 0.1), per_level)
    return Costs(passes, plain=float(passes[0]), draft=draft, rest=(0.1, float(generator.random() * 0.05)))


def by_definition(paths: Paths, profile: Profile, costs: Costs) -> float:
    tokens = 1.0
    for path in paths:
        value = 1.0
        for depth, rank in enumerate(path):
            value *= profile.rates[depth][rank]
        tokens += value
    below, levels = len(paths), max(map(len, paths))
    seconds = costs.passes[below] + costs.draft[0] + costs.draft[1] * below + costs.draft[2] * levels
    return tokens / (seconds + costs.rest[0] + costs.rest[1] * below)


@pytest.mark.parametrize("max_depth", [None, 2])
@pytest.mark.parametrize("per_level", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("seed", range(6))
def test_no_tree_promises_more(seed: int, per_level: float, max_depth: int | None) -> None:
    generator = np.random.default_rng(seed)
    profile, costs = random_profile(generator), random_costs(generator, per_level)
    trees = list(closed_trees(NODES, max_depth or DEPTH))
    best = max(by_definition(tree, profile, costs) for tree in trees)
    chosen = choose(profile, costs, NODES + 1, max_depth or DEPTH)
    Template.from_paths(chosen.paths)
    assert chosen.rate == pytest.approx(best)
    assert by_definition(chosen.paths, profile, costs) == pytest.approx(best)
    quick = choose(profile, costs, NODES + 1, max_depth or DEPTH, quick=True)
    assert by_definition(quick.paths, profile, costs) == pytest.approx(quick.rate)
    assert best / 1.05 <= quick.rate <= best * (1 + 1e-9)
    for tree in trees[::37]:
        assert expect(tree, profile, costs).rate == pytest.approx(by_definition(tree, profile, costs))


def test_only_allowed_sizes() -> None:
    generator = np.random.default_rng(1)
    profile, costs = random_profile(generator), random_costs(generator, 0.0)
    for sizes in ({3}, {2, 6}):
        chosen = choose(profile, costs, NODES + 1, DEPTH, sizes)
        assert len(chosen.paths) + 1 in sizes
        best = max(by_definition(t, profile, costs) for t in closed_trees(NODES, DEPTH) if len(t) + 1 in sizes)
        assert chosen.rate == pytest.approx(best)
    levels = Costs(costs.passes, 1.0, (0.1, 0.0, 5.0))
    flat = choose(Profile([[0.5, 0.3]] * 3), levels, NODES + 1, DEPTH, {5})
    assert len(flat.paths) == 4, "not a shallower tree of two nodes, which is no size allowed"
    lone = Profile([[0.5]])
    few = choose(lone, costs, NODES + 1, 2, {6})
    rates = [expect(chain_paths(length), lone, costs).rate for length in (1, 2)]
    assert few.rate == max(rates), "no tree has six nodes of any worth"


def test_a_flat_device_takes_all_and_a_steep_one_little() -> None:
    profile = Profile([[0.5, 0.2, 0.1]] * 4)
    assert len(choose(profile, Costs(np.ones(64), 1.0), 64, 4).paths) == 63
    steep = Costs(np.arange(1.0, 65.0), plain=1.0)
    chosen = choose(profile, steep, 64, 4)
    assert chosen.paths == [(0,)]
    assert chosen.rate < 1 / steep.plain, "plain decoding is faster"


def test_nothing_beyond_what_was_measured() -> None:
    assert len(choose(Profile([[0.5, 0.3]] * 9), Costs(np.ones(5), 1.0), 64, 9).paths) == 4
    with pytest.raises(ValueError, match="worth anything"):
        choose(Profile([[0.0]]), Costs(np.ones(5), 1.0), 5, 3)
    with pytest.raises(ValueError, match="worth anything"):
        choose(Profile([[0.5]]), Costs(np.ones(5), 1.0), 1, 3)


def simulated_chain(length: int, profile: Profile, costs: Costs) -> float:
    """Over all lengths of drafts and all outcomes, one by one."""
    assert profile.offered is not None
    come = [1.0, *profile.offered, 0.0]
    tokens, reached = 1.0, 1.0
    for depth in range(length):
        tokens += reached * sum(profile.rates[depth])
        reached *= profile.rates[depth][0]
    seconds = 0.0
    for drafted in range(len(come) - 1):
        share, cut = come[drafted] - come[drafted + 1], min(drafted, length)
        nodes = sum(profile.widths[:cut])
        lower, part = int(nodes), nodes - int(nodes)
        pass_s = costs.passes[lower] * (1 - part) + costs.passes[min(lower + 1, len(costs.passes) - 1)] * part
        fixed = pass_s + costs.draft[0] + costs.rest[0]
        seconds += share * (fixed + costs.draft[1] * nodes + costs.draft[2] * cut + costs.rest[1] * nodes)
    return tokens / seconds


@pytest.mark.parametrize("seed", range(4))
def test_the_length_of_a_chain(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rates = [[0.7 * generator.random() + 0.2, 0.1 * generator.random()] for _ in range(6)]
    offered = np.sort(generator.random(6))[::-1].tolist()
    profile = Profile(rates, offered, [1.0, 1.5, 1.0, 2.0, 1.0, 1.0])
    costs = Costs(1 + 0.1 * np.arange(12.0), 1.0, (0.1, 0.02, 0.15), (0.05, 0.01))
    rated = {length: simulated_chain(length, profile, costs) for length in range(1, 7)}
    for length, rate in rated.items():
        assert expect(chain_paths(length), profile, costs).rate == pytest.approx(rate)
    best = max(rated, key=lambda length: rated[length])
    assert choose(profile, costs, 12).paths == chain_paths(best)
    assert choose(profile, costs, 12, max_depth=1).paths == chain_paths(1)


def test_a_comb_has_no_more_nodes_than_a_tree_may() -> None:
    profile = Profile([[0.9, 0.05]] * 20, [1.0] * 20, [3.0] * 20)
    chosen = choose(profile, Costs(np.ones(64), 1.0), 32)
    assert len(chosen.paths) == 10, "three nodes to a level"
    assert len(choose(profile, Costs(np.ones(64), 1.0), 3).paths) == 1, "one level at least"


def test_never_falling_never_rising() -> None:
    assert envelope([1.0, 3.0, 2.0, 4.0]).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert falling([0.5, 0.2, 0.4, 0.1], [1, 1, 3, 1]) == pytest.approx([0.5, 0.35, 0.35, 0.1])
    assert falling([], []) == []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        values, weights = generator.random(5), generator.random(5)
        found = np.array(falling(values.tolist(), weights.tolist()))
        assert (np.diff(found) <= 1e-12).all()
        error = (weights * (found - values) ** 2).sum()
        for other in itertools.combinations_with_replacement(np.linspace(1, 0, 11), 5):
            assert error <= (weights * (np.array(other) - values) ** 2).sum() + 1e-12


def test_chains_and_kept_templates() -> None:
    assert chain_length([(0, 0), (0,)], "x") == 2
    for wrong in ([], [[1]], [[0], [1]], [[0], [0, 0], [0, 0]]):
        with pytest.raises(ValueError, match="x drafts chains.*got"):
            chain_length(wrong, "x")
    first = kept_template(((0,), (1,), (0, 0)), torch.device("cpu"))
    assert first is kept_template(((0,), (1,), (0, 0)), torch.device("cpu"))
    assert first.paths == [(0,), (1,), (0, 0)]
    with pytest.raises(ValueError, match="at least one node"):
        kept_template((), torch.device("cpu"))
