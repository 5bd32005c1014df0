"""Walks counted by rank and depth, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.interfaces import Verification
from specdec.templates import Template, best_first, chain_paths
from specdec.tuning.counts import AcceptanceCounts, DraftLengths, Layout


def outcome(paths: list[list[int]], finished: list[bool], offered: list[list[int]] | None = None) -> Verification:
    before = [not path for path in paths]
    return Verification(paths, [[0] * len(p) for p in paths], finished, before, torch.zeros(0), offered or [])


def test_by_definition() -> None:
    tree = best_first([[0.5, 0.4, 0.3], [0.4, 0.3]], 20, max_depth=3)
    template, layout, counts = Template.from_paths(tree), Layout.of(tree, is_chain=False), AcceptanceCounts(3, 3)
    paths = [(), *template.paths]
    taken, reached = np.zeros((3, 3)), np.zeros((3, 3))
    generator = np.random.default_rng(0)
    for _ in range(60):
        rows = []
        for _ in range(2):
            end = paths[generator.integers(len(paths))]
            rows.append([paths.index(end[:depth]) for depth in range(len(end) + 1)])
        finished = [False, bool(generator.random() < 0.3)]
        layout.count(outcome(rows, finished), counts)
        for row, done in zip(rows, finished, strict=True):
            if done:
                continue
            for depth, node in enumerate(row):
                for rank in range(3):
                    if depth < 3 and (*paths[node], rank) in paths:
                        reached[depth, rank] += 1
                if depth:
                    taken[depth - 1, paths[node][-1]] += 1
    assert counts.taken.tolist() == taken.tolist()
    assert counts.reached.tolist() == reached.tolist()
    prior = np.full((3, 3), 0.2)
    rates = counts.rates(prior, 5.0)
    assert (np.diff(rates, axis=1) <= 1e-12).all()
    assert (rates.sum(1) <= 1 + 1e-12).all()
    steep = counts.rates(np.array([[0.5, 0.2, 0.1]] * 3), 1e9)
    assert steep == pytest.approx(np.array([[0.5, 0.2, 0.1]] * 3), abs=1e-6), "a strong prior stands"
    again = AcceptanceCounts(3, 3)
    again.load_state_dict(counts.state_dict())
    counts.decay(0.5)
    assert counts.steps == again.steps / 2
    assert counts.taken == pytest.approx(again.taken / 2)


def test_deep_levels_lean_on_the_one_above() -> None:
    counts = AcceptanceCounts(3, 2)
    for _ in range(100):
        counts.add([0], [2, 2])
    rates = counts.own_rates(strength=4.0)
    assert rates[0].tolist() == pytest.approx([1.0, 0.0])
    assert rates[1][0] == pytest.approx(4 / 104)
    assert rates[2].tolist() == pytest.approx(rates[1].tolist())


def test_chains_with_siblings() -> None:
    layout, counts = Layout.of(chain_paths(3), is_chain=True), AcceptanceCounts(4, 2, is_chain=True)
    layout.count(outcome([[0, 1, 2]], [False]), counts)  # two of the chain
    layout.count(outcome([[0, 1, 5]], [False]), counts)  # one of the chain, then its sibling, which ends the walk
    layout.count(outcome([[0, 1, 2, 3]], [False]), counts)  # all
    layout.count(outcome([[0], []], [False, True]), counts)  # none; and a row that was over
    assert counts.taken.tolist() == [[3, 0], [2, 1], [1, 0], [0, 0]]
    assert counts.reached.tolist() == [[4, 4], [3, 3], [2, 2], [0, 0]]
    rates = counts.rates(np.array([[0.2, 0.5]] * 4), 2.0)
    assert rates[3].tolist() == [0.2, 0.5], "a sibling may be worth more than the chain"


def test_how_far_drafts_come() -> None:
    lengths = DraftLengths(4)
    lengths.add(outcome([[0], [0], []], [False] * 3, [[1, 1, 0], [2, 0, 0], [9, 9, 9]]), 3)
    assert lengths.offered(strength=0.0)[:3] == [1.0, 0.5, 0.0]
    lengths.add(outcome([[0]], [False], [[1]]), 1)
    shares = lengths.offered(strength=1e-9)
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-8), (
        "a shorter limit says nothing of what lies beyond it"
    )
    assert lengths.widths() == [pytest.approx(5 / 4)] * 4
    again = DraftLengths(4)
    again.load_state_dict(lengths.state_dict())
    again.decay(0.25)
    assert again.offered(1e-9) == pytest.approx(shares, abs=1e-8)
    assert DraftLengths(2).offered() == [1.0, 1.0]
