"""The weights that are shipped for the demo target: what they gain, and what their cards say.

That the text stays the target's own is a matter of the contract (``tests/test_contract.py``); here are other options.
"""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import specdec
from specdec.checkpoints import CONFIG, WEIGHTS
from specdec.demo.heldout import is_heldout
from specdec.loading import DEMO_FOLDER
from test_contract import DEMO_TEXTS, demo, left_padded

# What no training has seen: questions made up for this test, and functions whose names are held out.
QUESTIONS = (
    "A baker sells 24 loaves in the morning and half as many in the afternoon. Each loaf costs $3. How much money does "
    "he earn that day?",
    "Mia reads 15 pages every day. Her book has 240 pages. How many days does she need to read half of the book?",
    "A bus carries 38 passengers. At the first stop 12 get off and 9 get on. At the second stop 5 get off. How many "
    "passengers are left?",
)
FUNCTIONS = {
    "delete_row(self, from_, to=None)": "Delete the rows between from_ and to.",
    "is_reading(self)": "Return True if the transport is receiving.",
    "read1(self, size=-1)": "Read at most size bytes.",
}
# Drafter, its options, and the mean accepted tokens that it must not fall below on these prompts.
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("medusa", {}, 1.5),
    ("hydra_heads", {}, 1.5),
    ("kangaroo", {}, 1.3),
    ("kangaroo", {"shape": "top_k", "num_draft_tokens": 4, "width": 4, "num_nodes": 24}, 1.3),
]


OTHERS = [(drafter, options) for drafter, options, _ in CASES if options]  # than the recipes, which the contract tests


@cache
def inputs(rows: int) -> dict[str, Tensor]:
    """The first prompts, left-padded."""
    return left_padded(DEMO_TEXTS[:rows])


def generate(rows: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return demo().model.generate(**inputs(rows), max_new_tokens=40, **options)


def speculative(rows: int, drafter: str, options: dict[str, Any], **generating: Any) -> tuple[list[list[int]], float]:
    """Text and mean accepted tokens; the model is plain again."""
    model = specdec.speculate(demo().model, drafter, **options)
    try:
        return generate(rows, **generating).tolist(), model.speculation.mean_accepted_tokens
    finally:
        specdec.restore(model)


@pytest.mark.parametrize(("drafter", "options", "least"), CASES)
def test_text_comes_in_fewer_passes(drafter: str, options: dict[str, Any], least: float) -> None:
    assert speculative(3, drafter, options)[1] > least


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("drafter", "options"), OTHERS)
def test_text_is_the_targets_own(drafter: str, options: dict[str, Any], rows: int) -> None:
    assert speculative(rows, drafter, options)[0] == generate(rows).tolist()


@pytest.mark.parametrize(("drafter", "options"), OTHERS)
def test_sampled_text_does_not_depend_on_the_drafter(drafter: str, options: dict[str, Any]) -> None:
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.8}
    assert speculative(2, drafter, options, **sampled)[0] == speculative(2, "none", {}, **sampled)[0]


def test_heads_that_read_the_draft_beat_those_that_do_not() -> None:
    """At one tree, on texts that neither has seen: Hydra++ has more accepted than Medusa, and not by a hair."""
    assert all(is_heldout("def " + signature.partition("(")[0]) for signature in FUNCTIONS)
    asked = [f"Write a Python function `{signature}`: {summary}" for signature, summary in FUNCTIONS.items()]
    held_out, model, accepted = left_padded([*QUESTIONS, *asked]), demo().model, {}
    for drafter in ("medusa", "hydra_heads"):
        specdec.speculate(model, drafter, tree="mc_sim_7b_63")
        try:
            model.generate(**held_out, max_new_tokens=32)
            accepted[drafter] = model.speculation.mean_accepted_tokens
        finally:
            specdec.restore(model)
    assert accepted["hydra_heads"] > accepted["medusa"] + 0.1 > 1.6


@pytest.mark.parametrize("drafter", ["medusa", "hydra_heads", "kangaroo"])
def test_what_is_shipped(drafter: str) -> None:
    """In half precision, small, and without a folder of the machine that trained it."""
    folder = DEMO_FOLDER.parent / drafter
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        kinds = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118 - not a mapping
    assert kinds == {torch.bfloat16}
    assert (folder / WEIGHTS).stat().st_size < 8e6
    for file in folder.iterdir():
        if file.suffix == ".json":
            assert '"/' not in file.read_text(encoding="utf-8"), file.name
    assert "specdec/demo/target" in (folder / CONFIG).read_text(encoding="utf-8")


def test_model_cards_say_what_the_files_say() -> None:
    """The figures of a card are those of the run that made the weights beside it."""
    for drafter in ("medusa", "hydra_heads", "kangaroo"):
        folder = DEMO_FOLDER.parent / drafter
        card = (folder / "README.md").read_text(encoding="utf-8")
        known = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        recipe = next(option for option in known["overrides"] if option.startswith("recipe="))
        assert f"specdec train {recipe} data.path=answers.jsonl" in card
        assert "specdec/demo/target/README.md" in card
        assert card.startswith("---\nlicense: other\n")
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            sizes = [math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
        assert f"{sum(sizes):,} parameters" in card
        assert f"{known['metrics']['step']} steps" in card
        for depth, rates in enumerate(known["metrics"]["acceptance"], start=1):
            top = [f"{known['metrics'][f'depth_{depth}/top_{rank}']:.3f}" for rank in (1, 5)]
            assert f"| {depth} | {' | '.join(top)} |" in card
            assert rates[0] == pytest.approx(known["metrics"][f"depth_{depth}/top_1"], abs=1e-6)
