"""The audit tells rounding from bugs: on hand-made logits, and on a model with a drafter that lies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.audit import Audit, Divergence, Pair, Row, audit, first_difference


class Scripted:
    """A "model" whose block logits are its step logits plus noise; tokens do not matter to it."""

    def __init__(self, steps: Tensor, noise: float) -> None:
        self.steps, self.noise = steps, noise

    def __call__(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        emitted = input_ids.shape[1] - PROMPT.shape[1] + 1  # the last token of the text is not fed
        logits = torch.cat([torch.zeros(PROMPT.shape[1] - 1, self.steps.shape[1]), self.steps[:emitted]])
        shaken = logits + self.noise * torch.tensor([1.0, -1.0, 0.0])
        return SimpleNamespace(logits=shaken[None])


STEPS = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.05, -3.0], [0.0, 3.0, 0.0]])
PROMPT = torch.tensor([[7, 8]])
PLAIN = torch.tensor([[7, 8, 0, 1, 1]])


def judged(ours: list[int], noise: float) -> Audit:
    text = torch.tensor([[7, 8, *ours]])
    return audit(Scripted(STEPS, noise), [Pair(2, PLAIN, STEPS, text)])


def test_identical_texts() -> None:
    result = judged([0, 1, 1], noise=0.0)
    assert (result.identical, len(result.near_ties), len(result.mismatches)) == (1, 0, 0)


def test_a_near_tie_is_explained_by_the_control() -> None:
    """Tokens 0 and 1 are 0.05 nats apart at position 1; the control moves their gap by 0.06."""
    result = judged([0, 0, 1], noise=0.03)
    assert (result.identical, len(result.near_ties), len(result.mismatches)) == (0, 1, 0)
    divergence = result.rows[0].divergence
    assert divergence is not None
    assert (divergence.position, divergence.plain_token, divergence.speculative_token) == (1, 1, 0)
    assert divergence.gap == pytest.approx(0.05, abs=1e-6)
    assert result.control_flips == 1


def test_the_same_difference_without_rounding_is_a_bug() -> None:
    assert len(judged([0, 0, 1], noise=0.0).mismatches) == 1


@pytest.mark.parametrize("ours", [[2, 1, 1], [0, 2, 1], [0, 1]])
def test_wrong_tokens_and_short_texts_are_bugs(ours: list[int]) -> None:
    assert len(judged(ours, noise=0.03).mismatches) == 1


def test_first_difference() -> None:
    assert first_difference([0, 1], [0, 1]) is None
    assert first_difference([0, 1, 1], [0, 1]) == first_difference([0, 1], [0, 1, 1]) == 2


def test_the_bound_is_the_largest_rounding_of_any_row() -> None:
    rows = [Row(None, 0.0, 0.01, 0), Row(Divergence(0, 1, 2, 0.05), 0.0, 0.04, 1)]
    assert Audit(rows).bound == pytest.approx(0.08)
    assert len(Audit(rows).near_ties) == 1
