"""``specdec train`` as a user types it: what it writes, going on, refusing, and every recipe."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

import zoo
from pupils import Pupil
from specdec import cli
from specdec.build import build, build_drafter, choices, config_dir, load
from specdec.commands import train
from specdec.loading import DEMO_FOLDER, demo_target
from specdec.target import Target
from specdec.training import features
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


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of a loss curve, which somebody may be writing."""
    text = (folder / "log.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses of a run."""
    return [(line["step"], line["loss"]) for line in lines_of(folder) if "loss" in line]


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
    for step in (2, 4):  # each holds the drafter as it was then, with its own figures
        kept = json.loads((output / f"checkpoint-{step}" / "drafter" / "config.json").read_text())
        assert (kept == drafter) == (step == 4)
        assert [len(ranks) for ranks in kept["acceptance"]] == [5, 5]
        assert (output / f"checkpoint-{step}" / "drafter" / "provenance.json").is_file()
    last = torch.load(output / "checkpoint-4" / "drafter" / "weights.pt", weights_only=True)
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights.items())
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
    assert "is finished, at step 4; trainer.max_steps=N resume=true goes on" in capsys.readouterr().err
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
@pytest.mark.parametrize("ours", ["drafter", "checkpoint-7", "metrics.json", "config.yaml"])
def test_only_what_a_training_left_is_overwritten(
    ours: str, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    place = output / ours / "weights" if ours in ("drafter", "checkpoint-7") else output / ours
    place.parent.mkdir(parents=True)
    place.write_text("model: mine")
    assert run(*SMALL, f"data.path={chats}", f"output={output}", "overwrite=true") == 2
    said = capsys.readouterr().err
    assert "give another output=FOLDER" in said
    assert ours in said
    assert place.read_text() == "model: mine"


@pytest.mark.usefixtures("pupil")
@pytest.mark.parametrize("steps", [2, 4], ids=["the last one", "one to go on from"])
def test_a_checkpoint_that_a_kill_left_without_its_drafter_gets_it(steps: int, chats: Path, tmp_path: Path) -> None:
    output, arguments = tmp_path / "run", (*SMALL, f"data.path={chats}")
    assert run(*arguments, f"output={output}", "trainer.max_steps=2") == 0
    bare = output / "checkpoint-2"
    expected = torch.load(bare / "drafter" / "weights.pt", weights_only=True)
    shutil.rmtree(bare / "drafter")
    for file in (bare / "provenance.json", output / "metrics.json"):
        file.unlink()
    assert run(*arguments, f"output={output}", f"trainer.max_steps={steps}", "resume=true") == 0
    made = torch.load(bare / "drafter" / "weights.pt", weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())
    for place in (bare, bare / "drafter"):
        assert json.loads((place / "provenance.json").read_text())["step"] == 2


def test_what_it_starts_from_is_said(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*SMALL, "drafter=hydra_heads", "target.device=cpu", f"data.path={chats}", "trainer.max_steps=1")
    assert run(*arguments, f"output={tmp_path / 'shipped'}") == 0
    shipped = DEMO_FOLDER.parent / "hydra_heads"
    assert (
        f"starts from the weights at {shipped}, which are shipped; drafter.path=new starts" in capsys.readouterr().err
    )
    assert run(*arguments, f"output={tmp_path / 'other'}", "drafter.arch=mlp") == 2
    said = capsys.readouterr().err
    assert "arch=mlp, which path=new makes new ones with" in " ".join(said.split())
    assert run(*arguments, f"output={tmp_path / 'new'}", "drafter.path=new", "drafter.arch=mlp") == 0
    assert "starts from new weights" in capsys.readouterr().err


def test_that_nothing_was_trained_yet_is_no_news_to_a_training() -> None:
    """Warnings are errors here."""
    session: Any = SimpleNamespace(model=zoo.build("llama"), config={"verifier": load("verifier", "tree_attention")})
    drafter = build_drafter("medusa")
    train._frozen_target(session, drafter)
    assert vars(drafter)["loaded_from"] is None


def test_a_layout_that_a_joint_run_cannot_have_is_known_before(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("drafter=medusa", "drafter.path=new", "drafter.own_head=true", "loss.joint=true", "layout=medusa_v2")
    assert run(*SMALL, *arguments, f"data.path={chats}", f"output={tmp_path / 'run'}") == 2
    assert "layout 'medusa_v2' shares the target's output head" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.usefixtures("pupil")
def test_a_run_can_be_extended_and_cut_short(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*SMALL, f"data.path={chats}", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0")
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert run(*arguments, f"output={whole}") == 0
    assert run(*arguments, f"output={output}", "trainer.max_steps=2") == 0
    for name in ("checkpoint-keep", "checkpoint-9.txt"):
        (output / name).write_text("somebody's")
    assert run(*arguments, f"output={output}", "resume=true") == 0
    assert f"goes on from {output / 'checkpoint-2'}" in capsys.readouterr().err
    assert losses(output) == losses(whole)
    assert (output / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    assert OmegaConf.load(output / "config.yaml").trainer.max_steps == 4
    # What stands in the last checkpoint becomes a result, wherever a run was stopped.
    assert run(*arguments, f"output={output}", "trainer.max_steps=3", "resume=true") == 0
    assert json.loads((output / "metrics.json").read_text())["step"] == 4
    assert (output / "checkpoint-keep").read_text() == "somebody's"


@pytest.mark.usefixtures("pupil")
def test_the_best_checkpoint_is_what_is_kept(chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = (*SMALL, f"data.path={chats}", "trainer.load_best_model_at_end=true")
    worst = ("trainer.metric_for_best_model=loss", "trainer.greater_is_better=true")  # the first of them, then
    assert run(*arguments, *worst, f"output={output}") == 0
    judged = {line["step"]: line for line in lines_of(output) if "eval_loss" in line}
    assert judged.keys() == {2, 4}
    assert judged[2]["eval_loss"] > judged[4]["eval_loss"]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["step"] == 2
    assert metrics["loss"] == judged[2]["eval_loss"]
    assert metrics["depth_1/top_1"] == judged[2]["eval_depth_1/top_1"]
    kept, first = (output / place for place in ("drafter", "checkpoint-2/drafter"))
    assert (kept / "config.json").read_text() == (first / "config.json").read_text()
    ours, theirs = (torch.load(place / "weights.pt", weights_only=True) for place in (kept, first))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert json.loads((kept / "provenance.json").read_text())["step"] == 2
    # Moved, and finished a second time: the best one is still found, and its absence is no silence.
    moved = output.rename(tmp_path / "moved")
    (moved / "metrics.json").unlink()
    assert run(*arguments, *worst, f"output={moved}", "resume=true") == 0
    assert json.loads((moved / "metrics.json").read_text()) == metrics


@pytest.mark.usefixtures("pupil")
def test_a_full_disk_says_how_to_go_on(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert run(*SMALL, f"data.path={chats}", f"output={whole}") == 0
    save = DrafterTrainer._save_optimizer_and_scheduler

    def full(self: DrafterTrainer, folder: str) -> None:
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(DrafterTrainer, "_save_optimizer_and_scheduler", full)
    assert run(*SMALL, f"data.path={chats}", f"output={output}") == 2
    said = capsys.readouterr().err
    assert f"the disk is full; whole checkpoints in {output} are kept: free some space" in said
    assert "Traceback" not in said
    monkeypatch.setattr(DrafterTrainer, "_save_optimizer_and_scheduler", save)
    assert run(*SMALL, f"data.path={chats}", f"output={output}", "resume=true") == 0
    assert losses(output) == losses(whole)


def test_killed_in_the_middle_it_goes_on_with_the_same_loss_curve(chats: Path, tmp_path: Path) -> None:
    """The command itself and a real drafter, under SIGKILL at a moment between two checkpoints."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = (
        *SMALL, "drafter=medusa", "drafter.path=new", "drafter.num_heads=2", "target.device=cpu", f"data.path={chats}",
        "trainer.max_steps=9", "trainer.save_steps=4", "eval_share=0.1",
    )  # fmt: skip
    assert run(*arguments, f"output={whole}") == 0
    command = [sys.executable, "-m", "specdec.cli", "train", *arguments, f"output={killed}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not (killed / "log.jsonl").is_file() or all(step < 5 for step, _ in losses(killed)):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert losses(killed)[-1][0] < 9, "it was still running"
    assert not (killed / "metrics.json").exists()
    kept = build_drafter("medusa", path=str(killed / "checkpoint-4" / "drafter"))
    assert kept.fit(Target(demo_target("float32", "cpu").model)) is None, "what it had reached can be used"
    assert run(*arguments, f"output={killed}", "resume=true") == 0
    assert losses(killed) == losses(whole)
    ours, theirs = (load_file(folder / "drafter" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_states_of_a_target_that_learns_cannot_be_kept(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("drafter=medusa", "drafter.path=new", "drafter.num_heads=1", "loss.joint=true", f"data.path={chats}")
    cached = ("features.mode=cached", f"features.path={tmp_path / 'states'}", f"output={tmp_path / 'run'}")
    assert run(*SMALL, *arguments, *cached) == 2
    assert "keeps the states of a frozen target" in capsys.readouterr().err
    assert not (tmp_path / "states").exists()


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

    assert losses(output) == losses(whole)
    ours, theirs = (torch.load(folder / "drafter" / "weights.pt", weights_only=True) for folder in (output, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.usefixtures("pupil")
def test_control_c_while_states_are_made(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = features.write_shard

    def pressed(path: Path, tensors: Any) -> None:
        if "00001" in path.name:
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(features, "write_shard", pressed)
    states = ("features.mode=cached", f"features.path={tmp_path / 'states'}", "features.shard_mb=0.2")
    arguments = (*SMALL, f"data.path={chats}", f"output={tmp_path / 'run'}", *states)
    assert run(*arguments) == 130
    assert "interrupted; the same command goes on with the target's states" in capsys.readouterr().err
    shard = tmp_path / "states" / "train" / "shard-00000.safetensors"
    made = shard.stat().st_mtime_ns
    monkeypatch.setattr(features, "write_shard", write)
    assert run(*arguments) == 0
    assert shard.stat().st_mtime_ns == made


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
        (["length=4096", "data.path=nowhere.jsonl"], "expected length to be at most 2048, which demo reads; got 4096"),
        (["length=1"], "expected length to be a whole number of at least 2, got 1"),
        (["trainer.gradient_checkpointing=true"], "are frozen; it serves loss.joint=true"),
        (["trainer.fsdp=true"], "cuts a drafter up over several processes, and this is one; expected torchrun"),
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
def test_a_lesson_that_does_not_say_what_it_is_about(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Pupil.lesson

    def without(self: Pupil, target: Target, **options: Any) -> Any:
        lesson = made(self, target, **options)
        del lesson.steps_ahead
        return lesson

    monkeypatch.setattr(Pupil, "lesson", without)
    assert run(*SMALL, f"data.path={chats}", f"output={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert "the lesson of drafter 'pupil', ResidualLesson, has no steps_ahead; expected what specdec.learning" in said
    assert not list((tmp_path / "run").glob("*")), "nothing is written"


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
