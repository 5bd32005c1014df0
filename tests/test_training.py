"""The Trainer around a lesson: what is learnt, logged, saved and gone on with, after a kill as well."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

import zoo
from drafters.medusa import Medusa
from pupils import LENGTH, OPTIONS, ResidualLesson, Rows, curve, target_of, trainer_in
from specdec.templates import best_first
from specdec.training.callbacks import LossCurve, Told
from specdec.training.features import CachedTexts, Frozen
from specdec.training.scores import Scores
from specdec.training.trainer import DrafterTrainer, last_checkpoint, training_arguments

SCRIPT = Path(__file__).with_name("pupils.py")


def arguments(folder: Path, options: dict[str, Any], dtype: torch.dtype = torch.float32, evaluates: bool = True) -> Any:
    return training_arguments(options, folder, 3, target_of(dtype=dtype), evaluates)


def test_a_drafter_learns_and_only_it(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, held_out=Rows(22), max_steps=60, learning_rate=0.1, save_steps=60, eval_steps=60)
    target = trainer.frozen.target
    before = {name: parameter.clone() for name, parameter in target.model.named_parameters()}
    first = trainer.evaluate()
    metrics = trainer.learn()
    assert metrics["loss"] < 0.6 * first["eval_loss"]
    assert metrics["depth_1/top_1"] > first["eval_depth_1/top_1"] + 0.2
    for name, parameter in target.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_rates_are_counted_over_all_held_out_tokens(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    metrics = trainer.evaluate()
    lesson, frozen = trainer.model, trainer.frozen
    lesson.eval()
    hits, counted = torch.zeros(2, 5), torch.zeros(2)
    for row in Rows(6, seed=1):  # type: ignore[attr-defined]
        inputs = {name: value[None] for name, value in row.items()}
        outputs = lesson(**inputs, states=frozen(inputs["token_ids"], inputs["positions"]))
        hits, counted = hits + outputs["hits"], counted + outputs["counted"]
    assert counted.tolist() == [6 * (3 + 5 + 7), 6 * (2 + 4 + 6)]
    for depth in (1, 2):
        for rank in range(1, 6):
            expected = float(hits[depth - 1, rank - 1] / counted[depth - 1])
            assert metrics[f"eval_depth_{depth}/top_{rank}"] == pytest.approx(expected)
    acceptance = trainer.scores.acceptance()
    assert [len(ranks) for ranks in acceptance] == [5, 5]
    for depth, ranks in enumerate(acceptance, start=1):
        tops = [0.0, *(metrics[f"eval_depth_{depth}/top_{rank}"] for rank in range(1, 6))]
        exact = [max(top - before, 0.5 / float(counted[depth - 1])) for before, top in itertools.pairwise(tops)]
        assert ranks == pytest.approx(exact, abs=1e-6)
    assert len(best_first(acceptance, 4)) == 4, "the form that trees are made from"


def test_scores_by_hand() -> None:
    scores = Scores()
    for hits, counted, loss in (([[1, 2, 3], [0, 0, 1]], [4, 2], 1.0), ([[0, 1, 1], [0, 0, 0]], [1, 0], 6.0)):
        scores.add({"hits": torch.tensor(hits), "counted": torch.tensor(counted), "loss": torch.tensor(loss)})
    rates = scores.rates()
    assert rates["loss"] == pytest.approx((4 * 1.0 + 1 * 6.0) / 5)
    assert [rates[f"depth_1/top_{rank}"] for rank in (1, 2, 3)] == pytest.approx([0.2, 0.6, 0.8])
    assert scores.acceptance() == [[0.2, 0.4, 0.2], [0.25, 0.25, 0.5]]
    shallow = Scores()
    shallow.add({"hits": torch.ones(2, 3), "counted": torch.tensor([4, 0]), "loss": torch.tensor(1.0)})
    assert shallow.acceptance() is None, "drafters remember rates of all their heads or of none"
    none = Scores()
    none.add({"hits": torch.zeros(2, 5), "counted": torch.zeros(2), "loss": torch.tensor(0.0)})
    with pytest.raises(ValueError, match="no token of the held-out texts is wanted"):
        none.rates()
    assert none.acceptance() is None


def test_what_is_logged(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=8)
    trainer.learn()
    lines = curve(tmp_path)
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [3, 4, 6, 8], "every third step, and whatever is saved"
    assert all({"grad_norm", "learning_rate", "size", "epoch"} <= line.keys() for line in losses)
    assert losses[0]["size"] < losses[-1]["size"], "the lesson's own figure"
    assert [line["progress"] for line in losses] == pytest.approx([1 / 8, 3 / 8, 13 / 24, 6.5 / 8])
    assert [line["step"] for line in lines if "eval_loss" in line] == [8]
    assert (tmp_path / "checkpoint-8" / "provenance.json").is_file()
    assert json.loads((tmp_path / "checkpoint-4" / "provenance.json").read_text()) == {"command": "test", "step": 4}


def test_a_checkpoint_holds_what_learns_and_nothing_else(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=4)
    trainer.model.frozen_part = nn.Linear(2, 2).requires_grad_(False)
    trainer.learn()
    held = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert held.keys() == {"heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias"}
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    other = trainer_in(tmp_path, max_steps=8)
    other.model.heads = nn.ModuleList([other.model.heads[0]])
    with pytest.raises(ValueError, match=r"checkpoint is of another drafter: it lacks nothing and has heads.1.bias"):
        other.learn(tmp_path / "checkpoint-4")


def test_cached_states_teach_the_same(tmp_path: Path) -> None:
    trainer_in(tmp_path / "online", max_steps=4).learn()
    frozen = Frozen(target_of(), ("final",))
    sides = {}
    for name, rows in {"train": Rows(22), "held_out": Rows(6, seed=1)}.items():
        sides[name] = CachedTexts(rows, frozen, tmp_path / name, shard_bytes=4 * 32 * 4 * LENGTH)
        sides[name].fill(4, lambda _: None)
    cached = trainer_in(tmp_path / "cached", **sides, max_steps=4)
    cached.frozen = None  # nobody asks the target
    cached.learn()
    for online, other in zip(curve(tmp_path / "online"), curve(tmp_path / "cached"), strict=True):
        assert online == pytest.approx(other, rel=1e-4)


def test_a_run_goes_on_with_the_same_loss_curve(tmp_path: Path) -> None:
    whole = trainer_in(tmp_path / "whole")
    expected = whole.learn()
    trainer = trainer_in(tmp_path / "stopped")
    save = trainer._save_checkpoint

    def interrupted(*arguments: Any) -> None:
        save(*arguments)
        if trainer.state.global_step == 8:
            raise KeyboardInterrupt

    trainer._save_checkpoint = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.learn()
    again = trainer_in(tmp_path / "stopped")
    metrics = again.learn(last_checkpoint(tmp_path / "stopped"))
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole"), "to the last bit"
    assert {name: value for name, value in metrics.items() if "/" in name} == {
        name: value for name, value in expected.items() if "/" in name
    }
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name))


def test_a_finished_run_makes_no_further_step(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=5)
    metrics = trainer.learn()
    weights = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    again = trainer_in(tmp_path, max_steps=5)
    repeated = again.learn(last_checkpoint(tmp_path))
    assert again.state.global_step == 5
    assert repeated["loss"] == metrics["loss"]
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.slow  # the command itself is killed in tests/test_train_command.py
def test_killed_in_the_middle_it_goes_on_with_the_same_loss_curve(tmp_path: Path) -> None:
    """SIGKILL, which no process can answer, at a moment between two checkpoints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, SCRIPT, whole], env=environment, check=True, capture_output=True, timeout=300)
    command = [sys.executable, str(SCRIPT), str(killed)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 300
        while not (killed / "log.jsonl").is_file() or not any(line["step"] >= 9 for line in curve_so_far(killed)):
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert curve_so_far(killed)[-1]["step"] < OPTIONS["max_steps"], "it was still running"
    checkpoint = last_checkpoint(killed)
    assert checkpoint is not None
    subprocess.run(
        [sys.executable, SCRIPT, killed, checkpoint], env=environment, check=True, capture_output=True, timeout=300
    )
    assert curve(killed) == curve(whole)
    assert [line["step"] for line in curve(whole) if "loss" in line][-1] == OPTIONS["max_steps"]
    ours, theirs = (load_file(folder / "checkpoint-24" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def curve_so_far(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of a curve that somebody is writing."""
    text = (folder / "log.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_a_checkpoint_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in ((4, '{"global_step": 4}'), (12, '{"global_step": 12}'), (16, '{"global_st'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    for name, state in (("checkpoint-24", "[]"), ("checkpoint-28", '{"global_step": null}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    (tmp_path / "checkpoint-32").write_text("a plain file")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-12", "checkpoint-32", "checkpoint-4", "checkpoint-best",
    ]  # fmt: skip


class Grouped(ResidualLesson):
    """The second head learns four times as fast."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        first, second = (list(head.parameters()) for head in self.heads)
        return [{"params": first, "lr": lr}, {"params": second, "lr": 4 * lr}]


def test_a_lesson_may_have_learning_rates_of_its_own(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, weight_decay=0.1)
    trainer.model.__class__ = Grouped
    optimizer = trainer.create_optimizer()
    lesson = trainer.model
    found = [(group["lr"], group["weight_decay"], group["params"]) for group in optimizer.param_groups]
    assert [(lr, decay) for lr, decay, _ in found] == [(0.03, 0.1), (0.03, 0.0), (0.12, 0.1), (0.12, 0.0)]
    expected = [part for head in lesson.heads for part in (head.weight, head.bias)]
    assert all(params == [part] for (_, _, params), part in zip(found, expected, strict=True))
    trainer.learn()
    rates = [line["learning_rate"] for line in curve(tmp_path) if "loss" in line]
    assert rates[0] == pytest.approx(0.03, rel=0.05), "the base rate is what is logged"


def test_a_lesson_without_parameters_is_refused(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    lesson = ResidualLesson(target_of()).requires_grad_(False)
    with pytest.raises(ValueError, match="ResidualLesson has no parameter that learns"):
        DrafterTrainer(lesson, trainer.args, trainer.frozen, Rows(2))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_target_that_learns_may_recompute_its_layers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    if name == "activation_checkpointing" and not hasattr(TrainingArguments, name):
        pytest.skip("transformers calls it gradient_checkpointing only")

    def trained(folder: Path, **options: Any) -> tuple[list[dict[str, Any]], int, Any]:
        model, passes = zoo.build("llama"), [0]
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
        drafter, target = Medusa(num_heads=2, path="new"), target_of(model=model)
        assert drafter.fit(target) is None
        lesson: Any = drafter.lesson(target, joint=True, rank=4, dropout=0.1)
        few = OPTIONS | {"max_steps": 3, "gradient_accumulation_steps": 1} | options
        made = training_arguments(few, folder, 0, target, evaluates=False)
        trainer = DrafterTrainer(
            lesson, made, Frozen(target, lesson.taps), Rows(8), None, [LossCurve(folder / "log.jsonl")]
        )
        trainer.learn()
        return curve(folder), passes[0], {key: value.clone() for key, value in lesson.state_dict().items()}

    plain, passes, weights = trained(tmp_path / "plain")
    saving, more, others = trained(tmp_path / "saving", **{name: True})
    assert more == passes + 3, "one pass more for every step"
    assert len(plain) == len(saving) > 0
    for ours, theirs in zip(plain, saving, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(torch.allclose(tensor, others[key], atol=1e-6) for key, tensor in weights.items())


def test_recomputing_means_nothing_where_the_target_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recomputes the layers .* frozen; it serves loss.joint=true"):
        trainer_in(tmp_path, gradient_checkpointing=True)


def test_half_precision_trains_under_autocast_with_float32_weights(tmp_path: Path) -> None:
    target = target_of(dtype=torch.bfloat16)
    lesson = ResidualLesson(target)
    seen = []
    lesson.heads[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    made = training_arguments({**OPTIONS, "max_steps": 4}, tmp_path, 0, target, True)
    trainer = DrafterTrainer(lesson.bfloat16(), made, Frozen(target, ("final",)), Rows(22), Rows(4))
    metrics = trainer.learn()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in lesson.parameters()} == {torch.float32}
    assert 0 < metrics["loss"] < 100


def test_arguments_follow_the_target(tmp_path: Path) -> None:
    made = arguments(tmp_path, {"learning_rate": 1e-2})
    assert (made.output_dir, made.seed, made.use_cpu, made.learning_rate) == (str(tmp_path), 3, True, 1e-2)
    assert not made.bf16
    assert not made.fp16
    assert made.eval_strategy == "steps"
    assert arguments(tmp_path, {}, torch.bfloat16).bf16
    assert not arguments(tmp_path, {"bf16": False}, torch.bfloat16).bf16
    assert not arguments(tmp_path, {}, torch.float16).fp16, "autocast on a CPU knows bfloat16"
    assert arguments(tmp_path, {}, evaluates=False).eval_strategy == "no"
    assert arguments(tmp_path, {"save_strategy": "epoch"}).eval_strategy == "epoch"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"learning_rat": 1}, r"trainer.learning_rat is no option of .*; close to it: learning_rate"),
        ({"zzz": 1}, r"trainer.zzz is no option of transformers' TrainingArguments$"),
        ({"seed": 1}, "trainer.seed is decided by seed="),
        ({"output_dir": "x"}, "trainer.output_dir is decided by output=FOLDER"),
        ({"save_strategy": "never"}, "never"),
        ({"fsdp": True}, "trainer.fsdp cuts a drafter up over several processes, and this is one; expected torchrun"),
    ],
)
def test_wrong_options_of_the_trainer(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        arguments(tmp_path, options)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_says_how_much_is_left(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.training.progress._LINE_EVERY", -1.0)
    with (tmp_path / "said").open("w", encoding="utf-8") as file:
        told = Told(Console(file=file, force_terminal=terminal, width=120, color_system=None))
        trainer = trainer_in(tmp_path, max_steps=8)
        trainer.add_callback(told)
        with told:
            trainer.learn()
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert "step 8, held out: loss " in said
    assert "top-1 by depth " in said
    if terminal:
        assert "8/8" in said
    else:
        assert "steps: 7/8, 0:00:0" in said
        assert "left, loss " in said
