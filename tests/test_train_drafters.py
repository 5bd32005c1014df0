"""``specdec train`` with the drafters that learn, by their recipes: two steps on the demo target, then its text.

What two steps teach is next to nothing; that every part fits the next one is what is asked here. What is learnt in
earnest, ``test_demo_heads`` asks of the weights that are shipped.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import specdec
from specdec import cli
from specdec.loading import Loaded, demo_target

pytest.importorskip("peft")

PROMPT = "How much is 3 plus 4?"
NEW_TOKENS = 24
# So little that it takes seconds, whatever the recipe says.
SMALL = (
    "threads=1", "dtype=float32", "length=64", "eval_share=0.3", "trainer.max_steps=2", "trainer.save_steps=2",
    "trainer.per_device_train_batch_size=2", "trainer.warmup_steps=0", "++trainer.gradient_accumulation_steps=1",
)  # fmt: skip
RECIPES = [
    ("hydra_heads", ["recipe=demo_hydra", "drafter.arch=mlp", "drafter.num_layers=1"]),
    ("hydra_heads", ["recipe=demo_hydra"]),
    ("kangaroo", ["recipe=demo_kangaroo"]),
    pytest.param("medusa", ["recipe=medusa_1"], marks=pytest.mark.slow),
    pytest.param("hydra_heads", ["recipe=hydra"], marks=pytest.mark.slow),
    pytest.param("hydra_heads", ["recipe=hydra_plus_plus"], marks=pytest.mark.slow),
    pytest.param("kangaroo", ["recipe=kangaroo", "drafter.exit_layer=3"], marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "answers.jsonl"
    turns = ((f"How much is {n} plus {n}?", f"{n} plus {n} is {2 * n}. The answer is {2 * n}.") for n in range(12))
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments: str) -> int:
    """Run a command in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["specdec"])
        patch.setenv("COLUMNS", "200")
        try:
            cli.main(list(arguments))
        except SystemExit as left:
            return int(left.code or 0)
    return 0


def trained(chats: Path, output: Path, *arguments: str) -> Path:
    """Where ``specdec train`` has put the drafter."""
    assert run("train", *arguments, *SMALL, f"data.path={chats}", f"output={output}") == 0
    return output / "drafter"


@pytest.fixture(scope="module")
def demo_medusa(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two tests: heads to decode with, and to start the second stage from."""
    return trained(chats, tmp_path_factory.mktemp("medusa") / "run", "recipe=demo_medusa")


@cache
def demo() -> Loaded:
    return demo_target("float32", "cpu")


@cache
def plain_text() -> list[int]:
    return text()[0]


def text(**drafter: Any) -> tuple[list[int], Any]:
    """The demo target's answer in float32, with a drafter or without, and what its drafts were worth."""
    model, ids = demo().model, demo().encode(PROMPT)
    if drafter:
        specdec.speculate(model, **drafter)
    try:
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS)
        return made[0].tolist(), model.speculation if drafter else None
    finally:
        specdec.restore(model)


def check(drafter: str, folder: Path) -> None:
    """The text with what was trained is the target's own; its config knows what it is and how good."""
    config = json.loads((folder / "config.json").read_text())
    assert (config["drafter"], config["base_model_name_or_path"]) == (drafter, "specdec/demo/target")
    assert config["acceptance"] == json.loads((folder.parent / "metrics.json").read_text())["acceptance"]
    made, drafted = text(drafter=drafter, path=str(folder))
    assert made == plain_text()
    assert drafted.drafted_nodes > 0


def test_what_the_first_recipe_makes_is_decoded_with(demo_medusa: Path) -> None:
    check("medusa", demo_medusa)


@pytest.mark.parametrize(("drafter", "recipe"), RECIPES)
def test_what_a_recipe_makes_is_decoded_with(drafter: str, recipe: list[str], chats: Path, tmp_path: Path) -> None:
    check(drafter, trained(chats, tmp_path / "run", *recipe))


def generated(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``specdec generate`` says of a target that was trained with its heads, compared with its plain text."""
    capsys.readouterr()
    command = [f"target.path={folder}", "drafter=medusa", f"drafter.path={folder}", f"prompt={PROMPT}"]
    settings = ["dtype=float32", "threads=1", "target=hf", "compare=true", f"max_new_tokens={NEW_TOKENS}"]
    assert run("generate", *command, *settings) == 0
    return capsys.readouterr().out


def test_medusa_2_from_stage_to_stage(
    demo_medusa: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads alone, then heads and target together, then text of the target that came out, all by the commands."""
    stage = ["recipe=medusa_2", f"stage_1={demo_medusa}", "trainer.learning_rate=0.01"]
    second = trained(chats, tmp_path / "run", *stage)
    heads, whole = (load_file(folder / "model.safetensors") for folder in (demo_medusa, second))
    started = {f"medusa_head.{name}" for name in heads}
    assert started <= whole.keys()
    assert any(not torch.equal(whole[f"medusa_head.{name}"], tensor) for name, tensor in heads.items())
    before = demo().model.state_dict()
    moved = [name for name in whole.keys() & before.keys() if not torch.equal(whole[name], before[name])]
    assert len(moved) == 7 * 8 + 1, "every linear map of eight layers, and the output head"
    assert "identical texts: 1 of 1" in generated(second, capsys)


@pytest.mark.slow
def test_medusa_2_in_one_stage(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(chats, tmp_path / "run", "recipe=medusa_2_distilled")
    assert "identical texts: 1 of 1" in generated(folder, capsys)
