"""Drafters without trained weights say so, once and by name; where the user asked for new ones nothing is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import specdec
from specdec.loading import demo_target
from zoo import build

LEARNERS = ("medusa", "hydra_heads", "kangaroo")


def said(model: Any, drafter: str, **options: Any) -> list[str]:
    """What is warned of while a model speculates with a drafter, and again with the very same object."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        specdec.speculate(model, drafter, **options)
        again = specdec.speculation_of(model).drafter
        specdec.restore(model)
        specdec.restore(specdec.speculate(model, again))
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("drafter", [*LEARNERS, "draft_model"])
def test_a_target_for_which_nothing_was_trained(drafter: str) -> None:
    found = said(build("llama"), drafter)
    assert found
    assert found[0].startswith(f"drafter {drafter!r} has no trained weights for LlamaForCausalLM: ")
    assert "hardly a draft will be accepted; give path=FOLDER_OR_HUB_ID" in found[0]
    assert drafter == "draft_model" or len(found) == 1, "bound again, its weights stay"


@pytest.mark.parametrize("drafter", LEARNERS)
def test_new_ones_that_were_asked_for(drafter: str) -> None:
    assert said(build("llama"), drafter, path="new") == []


@pytest.mark.parametrize("drafter", [*LEARNERS, "draft_model"])
def test_the_demo_target_has_shipped_ones(drafter: str) -> None:
    assert said(demo_target("float32", "cpu").model, drafter) == []
