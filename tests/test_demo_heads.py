"""The weights that are shipped for the demo target: the contract on a model that means something."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import specdec
from specdec.checkpoints import CONFIG, WEIGHTS
from specdec.loading import DEMO_FOLDER, Loaded, demo_target

PROMPTS = (
    "Tom has 3 boxes with 12 apples each. He gives 7 apples to Anna. How many apples does he have left?",
    "Write a Python function `get_name(self)`: Return the name.",
    "Write a Python function `def is_empty(self)`: Return True if the queue is empty.",
)
# Drafter, its options, and the mean accepted tokens that it must not fall below on these prompts.
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("medusa", {}, 1.5),
    ("hydra_heads", {}, 1.5),
    ("kangaroo", {}, 1.3),
    ("kangaroo", {"shape": "top_k", "num_draft_tokens": 4, "width": 4, "num_nodes": 24}, 1.3),
]


@cache
def demo() -> Loaded:
    return demo_target("float32", "cpu")


@cache
def inputs(rows: int) -> dict[str, Tensor]:
    """The first prompts, left-padded."""
    ids = [demo().encode(text)[0] for text in PROMPTS[:rows]]
    width = max(map(len, ids))
    padded = [torch.nn.functional.pad(row, (width - len(row), 0)) for row in ids]
    mask = [(torch.arange(width) >= width - len(row)).long() for row in ids]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(mask)}


def generate(rows: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return demo().model.generate(**inputs(rows), max_new_tokens=40, **options)


@cache
def plain(rows: int) -> list[list[int]]:
    return generate(rows).tolist()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("drafter", "options", "least"), CASES)
def test_text_is_the_targets_own_and_comes_in_fewer_passes(
    drafter: str, options: dict[str, Any], least: float, rows: int
) -> None:
    model = demo().model
    specdec.speculate(model, drafter, **options)
    try:
        assert generate(rows).tolist() == plain(rows)
        if rows == len(PROMPTS):
            assert model.speculation.mean_accepted_tokens > least
    finally:
        specdec.restore(model)


@pytest.mark.parametrize(("drafter", "options", "least"), CASES)
def test_sampled_text_does_not_depend_on_the_drafter(drafter: str, options: dict[str, Any], least: float) -> None:  # noqa: ARG001
    model, texts = demo().model, []
    for name, chosen in (("none", {}), (drafter, options)):
        specdec.speculate(model, name, **chosen)
        try:
            texts.append(generate(2, do_sample=True, temperature=0.8).tolist())
        finally:
            specdec.restore(model)
    assert texts[0] == texts[1]


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
