"""``specdec train`` as a user types it: what it writes, going on, refusing, and every recipe."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pupils import Pupil
from specdec import cli
from specdec.build import build, choices, config_dir
from specdec.commands import train
from specdec.training.trainer import DrafterTrainer

TRAINING = [
    name
    for name in choices("recipe")
    if "# specdec train " in (config_dir() / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
]
SMALL = (
    "threads=1", "dtype=float32", "length=64", "eval_share=0.3", "trainer.max_steps=4", "trainer.save_steps=2",
    "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2", "trainer.learning_rate=0.01",
)  # fmt: skip


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    turns = ((f"How much is {n} plus {n}?", f"{n} plus {n} is {2 * n}. The answer is {2 * n}.") for n in range(30))
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn\n")
    return path


@pytest.fixture(autouse=True)
def _set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def pupil(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest drafter that learns, in place of the configured one."""
    monkeypatch.setattr(train, "build_drafter", lambda _: Pupil())


def run(*arguments: str) -> int:
    """Run the command in this process; returns its exit code."""
    sys.argv = ["specdec"]
    try:
        cli.main(["train", *arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.mark.usefixtures("pupil")
def test_what_a_run_leaves(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert run(*SMALL, f"data.path={chats}", f"output={output}", "loss.dropout=0.2") == 0
    said = capsys.readouterr().err
    assert f"{chats}:31: expected one JSON object per line" in said
    assert "held-out tokens found" in said
    assert f"drafter.path={output / 'drafter'}" in said
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["step"] == 4
    assert [len(ranks) for ranks in metrics["acceptance"]] == [5, 5]
    drafter = json.loads((output / "drafter" / "config.json").read_text())
    assert drafter == {"heads": 2, "acceptance": metrics["acceptance"]}
    weights = torch.load(output / "drafter" / "weights.pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    losses = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "loss" in line] == [1, 2, 3, 4]
    for place in (output, output / "drafter", output / "checkpoint-4"):
        known = json.loads((place / "provenance.json").read_text())
        assert known["command"].startswith("specdec train threads=1")
        assert known["config"]["loss"] == {"dropout": 0.2}
        assert known["seed"] == 0
        assert known["step"] == 4
        assert {"torch", "transformers", "accelerate"} <= known["versions"].keys()
        assert known["texts"].keys() == {"train", "held_out"}
        assert known["texts"]["train"]["texts"] + known["texts"]["held_out"]["texts"] == 30
    assert OmegaConf.load(output / "config.yaml").loss.dropout == 0.2


@pytest.mark.usefixtures("pupil")
def test_a_folder_belongs_to_one_run(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    arguments = (*SMALL, f"data.path={chats}", f"output={output}")
    assert run(*arguments) == 0
    before = (output / "log.jsonl").read_text()
    assert run(*arguments) == 2
    assert "holds this very run: resume=true goes on with it" in capsys.readouterr().err
    assert run(*arguments, "resume=true") == 0
    assert "is finished; overwrite=true trains it anew" in capsys.readouterr().err
    assert run(*arguments, "trainer.learning_rate=0.02", "resume=true") == 2
    assert "another run (trainer.learning_rate: 0.01 -> 0.02)" in capsys.readouterr().err
    chats.write_text("\n".join(chats.read_text().splitlines()[:20]))
    assert run(*arguments, "resume=true") == 2
    assert "another run (texts_fingerprint: " in capsys.readouterr().err
    assert (output / "log.jsonl").read_text() == before
    (output / "notes.txt").write_text("mine")
    assert run(*arguments, "trainer.max_steps=2", "overwrite=true") == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint-2", "config.yaml", "drafter", "log.jsonl", "metrics.json", "notes.txt", "provenance.json",
    ]  # fmt: skip


@pytest.mark.usefixtures("pupil")
def test_control_c_can_be_gone_on_from(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = DrafterTrainer.training_step, [0]

    def pressed(self: DrafterTrainer, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    whole, output = tmp_path / "whole", tmp_path / "run"
    assert run(*SMALL, f"data.path={chats}", f"output={whole}") == 0
    arguments = (*SMALL, f"data.path={chats}", f"output={output}")
    monkeypatch.setattr(DrafterTrainer, "training_step", pressed)
    assert run(*arguments) == 130
    said = capsys.readouterr().err
    assert f"interrupted; the same command with output={output} resume=true goes on from checkpoint-2" in said
    assert not (output / "drafter").exists()
    monkeypatch.setattr(DrafterTrainer, "training_step", step)
    assert run(*arguments, "resume=true") == 0
    assert f"goes on from {output / 'checkpoint-2'}" in capsys.readouterr().err

    def losses(folder: Path) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    assert losses(output) == losses(whole)
    ours, theirs = (torch.load(folder / "drafter" / "weights.pt", weights_only=True) for folder in (output, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.usefixtures("pupil")
def test_states_are_kept_where_asked(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = tmp_path / "states"
    arguments = (*SMALL, f"data.path={chats}", "features.mode=cached", f"features.path={states}")
    assert run(*arguments, f"output={tmp_path / 'one'}") == 0
    said = capsys.readouterr().err
    assert "the target's states take " in said
    assert "1.02 kB per token" in said, "256 numbers of 4 bytes"
    assert {path.name for path in states.iterdir()} == {"train", "held_out"}
    assert run(*arguments, "trainer.learning_rate=0.02", f"output={tmp_path / 'two'}") == 0
    assert "0 bytes are still to be made" in capsys.readouterr().err
    assert run(*arguments, "length=32", f"output={tmp_path / 'three'}") == 2
    assert "holds the states of another run (texts: " in capsys.readouterr().err
    assert run(*arguments, "length=32", "features.overwrite=true", f"output={tmp_path / 'three'}") == 0


@pytest.mark.usefixtures("pupil")
def test_without_a_judge(chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(*SMALL, f"data.path={chats}", f"output={output}", "eval_share=0") == 0
    assert json.loads((output / "metrics.json").read_text()) == {"step": 4}
    assert json.loads((output / "drafter" / "config.json").read_text()) == {"heads": 2}


@pytest.mark.usefixtures("pupil")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["eval_share=0.0001"], "none of 30 texts is held out with eval_share=0.0001"),
        (["eval_share=2"], "at least 0 and below 1"),
        (["limit=0"], "expected limit to be a whole number"),
        (["loss.dropped=1"], "no option ['dropped']; known: dropout"),
        (["trainer.learning_rates=1"], "close to it: learning_rate"),
        (["trainer.output_dir=x"], "trainer.output_dir is decided by output=FOLDER"),
        (["features.mode=later"], "expected features.mode to be online or cached"),
        (["features.mode=cached"], "needs features.path=FOLDER"),
        (["features.mode=cached", "features.path=x", "features.shard_mb=0"], "features.shard_mb"),
        (["resume=true"], "holds no run to go on with; give its folder: output=FOLDER"),
        (["resume=true", "overwrite=true"], "expected one of them"),
    ],
)
def test_mistakes(
    arguments: list[str], expected: str, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SMALL, f"data.path={chats}", f"output={tmp_path / 'run'}", *arguments) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("pupil")
def test_a_path_that_is_not_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"output={tmp_path}") == 2
    assert "data=chat needs data.path=..." in capsys.readouterr().err


@pytest.mark.usefixtures("pupil")
def test_questions_are_no_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "data=demo", f"output={tmp_path}") == 2
    assert "data=demo holds questions without answers" in capsys.readouterr().err


def test_the_second_stage_needs_a_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe=medusa_2", "data.path=x", f"output={tmp_path}") == 2
    assert "Missing mandatory value: stage_1" in capsys.readouterr().err


def test_a_drafter_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("drafter=prompt_lookup", "data.path=x", f"output={tmp_path}") == 2
    said = capsys.readouterr().err
    assert "drafter 'prompt_lookup' has no weights to train; those that have: " in said
    assert "medusa" in said


def test_without_accelerate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "accelerate" else find(name, *rest)
    )
    assert run(f"output={tmp_path}") == 2
    assert "needs accelerate: pip install .[train]" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", TRAINING)
def test_every_recipe_makes_its_drafter(recipe: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        stage = ["stage_1=somewhere"] if recipe == "medusa_2" else []
        config = compose("train", overrides=[f"recipe={recipe}", "data.path=x", f"output={tmp_path}", *stage])
    drafter: Any = OmegaConf.to_container(config.drafter, resolve=True)
    assert hasattr(build(drafter), "lesson")
    # Else the heads that are shipped for the embedded target would be trained on, whatever the recipe's sizes.
    assert drafter["path"] == ("somewhere" if recipe == "medusa_2" else "new")
    assert config.data._target_ == "specdec.training.corpus.chat"
    assert 1e-6 < config.trainer.learning_rate < 1e-2
    assert config.trainer.eval_steps == config.trainer.save_steps


def test_the_papers_recipes_are_there() -> None:
    papers = {"medusa_1", "medusa_2", "medusa_2_distilled", "hydra", "hydra_plus_plus", "kangaroo"}
    assert papers | {"demo_medusa", "demo_hydra", "demo_kangaroo"} == set(TRAINING)
