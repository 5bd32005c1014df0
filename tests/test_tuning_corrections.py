"""What costs turn out to be: by comparisons at a change of trees, whatever the pace of the machine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from specdec.tuning.choice import Costs, Profile, choose, expect
from specdec.tuning.corrections import CostCorrections

EXPECTED = {1: 1.0, 8: 1.4, 16: 2.0, 32: 3.0}


def decode(seen: CostCorrections, truth: dict[int, float], sizes: list[int], steps: int, pace: float = 1.0) -> None:
    """Steps with one tree after another; ``pace`` is by what each step is slower than the one before."""
    noise, slow = np.random.default_rng(0), 1.0
    for size in sizes:
        for step in range(steps):
            slow *= pace
            hit = 3.0 if noise.random() < 0.1 or step < 2 else 1.0
            seen.see(size, slow * hit * truth[size] * noise.normal(1, 0.02), EXPECTED[size])


def test_a_cost_that_was_wrong_is_put_right() -> None:
    seen = CostCorrections(8)
    assert seen.is_empty
    decode(seen, EXPECTED | {1: 1.3, 16: 1.7}, [8, 1, 8, 16, 8, 1, 16, 8, 1, 8], 14)
    assert seen.plain == pytest.approx(1.3, rel=0.05)
    factors = seen.factors(40)
    assert factors[7] == 1.0, "others are compared with this one"
    assert factors[15] == pytest.approx(1.7 / 2.0, rel=0.05)
    assert factors[15] < factors[11] < 1.0, "between two sizes lies what lies between them"
    assert factors[39] == factors[15], "sizes that nobody tried are like the nearest"
    assert factors[0] == 1.0, "of trees; plain decoding is none"


def test_the_pace_of_the_machine_says_nothing() -> None:
    seen = CostCorrections(8)
    decode(seen, EXPECTED, [8, 1, 8, 32, 8, 1, 8, 32] * 2, 20, pace=1.002)
    assert seen.plain == pytest.approx(1.0, abs=0.06), "though steps take twice as long in the end"
    assert seen.factors(32) == pytest.approx(1.0, abs=0.06)


def test_few_steps_say_nothing_and_one_comparison_not_everything() -> None:
    seen = CostCorrections(8)
    decode(seen, EXPECTED | {1: 2.0}, [8, 1] * 6, 8)
    assert seen.is_empty
    decode(seen, EXPECTED | {1: 1.5}, [8, 1], 14)
    assert 1.3 < seen.plain < 1.5
    decode(seen, EXPECTED | {1: 100.0}, [8, 1] * 9, 14)
    assert seen.plain == pytest.approx(2.0), "no comparison is believed beyond twice"


def test_what_looked_costly_is_believed_again_in_time() -> None:
    seen = CostCorrections(8)
    decode(seen, EXPECTED | {1: 2.0}, [8, 1], 14)
    factor, doubt = seen.plain, seen._known[1][1]
    seen.fade(600)
    assert math.log(seen.plain) == pytest.approx(math.log(factor) / 2)
    assert seen._known[1][1] > doubt
    seen.fade(10_000)
    assert seen.plain == pytest.approx(1.0, abs=1e-3)
    seen.interrupt()
    decode(seen, EXPECTED, [8, 1], 14)
    assert seen.plain == pytest.approx(1.0, abs=0.05)


def test_what_lies_apart_is_not_compared() -> None:
    seen = CostCorrections(8)
    decode(seen, EXPECTED, [8], 14)
    seen.interrupt()
    decode(seen, EXPECTED | {1: 2.0}, [1], 14)
    assert seen.is_empty
    decode(seen, EXPECTED, [8], 14)
    assert seen.plain > 1.5


def test_saved_and_loaded() -> None:
    seen, again = CostCorrections(8), CostCorrections(8)
    decode(seen, EXPECTED | {1: 1.4}, [8, 1, 8, 16], 13)
    again.load_state_dict(seen.state_dict())
    assert again.state_dict() == seen.state_dict()
    for each in (seen, again):
        decode(each, EXPECTED, [16, 1], 13)
    assert again.plain == seen.plain != 1.0


def test_corrected_costs_choose_another_tree() -> None:
    profile, costs = Profile([[0.6, 0.2]] * 4), Costs(np.ones(32), 1.0)
    whole = choose(profile, costs, 32, 4)
    factors = np.exp(np.linspace(0, 1, 32))
    corrected = Costs(np.ones(32), 1.0, corrections=factors)
    chosen = choose(profile, corrected, 32, 4)
    assert len(chosen.paths) < len(whole.paths)
    for tree in (chosen, whole):
        size = len(tree.paths)
        assert expect(tree.paths, profile, corrected).seconds == pytest.approx(math.exp(size / 31))
    chain = Profile([[0.9, 0.0]] * 20, [1.0] * 20, [1.0] * 20)
    assert len(choose(chain, costs, 32).paths) == 20
    shorter = choose(chain, corrected, 32)
    assert len(shorter.paths) < 20
    assert shorter.seconds == pytest.approx(factors[len(shorter.paths)])
