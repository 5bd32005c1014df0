"""Training that is cut up over processes, by FSDP and by DeepSpeed: the same losses, and drafters that are whole."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zoo
from drafters.medusa import Medusa
from pupils import ResidualLesson, target_of
from specdec import capabilities, cli
from specdec.build import build_drafter
from specdec.identity import fingerprint, remember
from specdec.loading import demo_target
from specdec.target import Target
from specdec.training import sharding
from test_distributed import MEDUSA, SETTINGS, curve, launch, write_chats

HYDRA = ("drafter=hydra_heads", "drafter.path=new", "drafter.num_heads=2", "drafter.num_layers=1", "loss.dropout=0")
KANGAROO = ("drafter=kangaroo", "drafter.path=new")
PARTS = (
    "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2",
    "trainer.per_device_eval_batch_size=4",
)  # fmt: skip
ON_CPU = (*SETTINGS, "target.device=cpu")


def asked(**options: Any) -> Any:
    """Arguments of a training, as far as they are looked at."""
    known = {"fsdp": None, "fsdp_config": None, "deepspeed_plugin": None, "world_size": 2, "use_cpu": False}
    return SimpleNamespace(**(known | options))


def test_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = [SimpleNamespace(zero_stage=stage) for stage in range(4)]
    assert [sharding.kind(asked(deepspeed_plugin=plugin)) for plugin in zero] == [None, None, None, "ZeRO-3"]
    assert sharding.kind(asked()) is None
    assert sharding.kind(asked(fsdp=True)) == "FSDP"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert sharding.kind(asked()) is None
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert sharding.kind(asked()) is None
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert sharding.kind(asked()) == "ZeRO-3"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding.kind(asked()) == "FSDP"


def test_what_options_leave_open() -> None:
    assert sharding.completed({}) == {}
    given: dict[str, Any] = {"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}
    assert sharding.completed(given) == {"fsdp_config": {"version": 2, "reshard_after_forward": False}}
    assert sharding.completed({"fsdp": True, "fsdp_config": "a.json", "deepspeed": "b.json"}) == {}
    given = {"deepspeed": {"zero_optimization": {"stage": 3}, "gradient_clipping": 2.0}}
    made = sharding.completed(given)["deepspeed"]
    assert made["zero_optimization"] == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert (made["gradient_clipping"], made["gradient_accumulation_steps"]) == (2.0, "auto")
    assert made["bf16"] == made["fp16"] == {"enabled": "auto"}
    assert made["bf16"] is not made["fp16"], "each is filled in by itself"
    assert given["deepspeed"]["zero_optimization"] == {"stage": 3}, "what the user wrote stays"


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="over several processes, and this is one"):
        sharding.check(asked(fsdp=True, world_size=1))
    with pytest.raises(ValueError, match="FSDP of version 1 .*; expected version 2"):
        sharding.check(asked(fsdp=True, fsdp_config={"version": 1}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP of version 1"):
        sharding.check(asked())
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharding.check(asked())
    for there in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        if there:
            with pytest.raises(ValueError, match="this machine's accelerators; expected a target on one"):
                sharding.check(asked(use_cpu=True))
        else:
            sharding.check(asked(use_cpu=True))


def test_a_lesson_that_learns_through_the_target_is_refused() -> None:
    target = target_of()
    sharding.check_lesson(asked(fsdp=True), ResidualLesson(target), target)
    pytest.importorskip("peft")
    target, drafter = target_of(model=zoo.build("llama")), Medusa(num_heads=2, path="new")
    assert drafter.fit(target) is None
    lesson = drafter.lesson(target, joint=True, rank=4)
    for arguments, name in (
        (asked(fsdp=True), "FSDP"),
        (asked(deepspeed_plugin=SimpleNamespace(zero_stage=3)), "ZeRO-3"),
    ):
        with pytest.raises(ValueError, match=f"{name} cuts up what a lesson holds, .*; expected plain torchrun"):
            sharding.check_lesson(arguments, lesson, target)
    sharding.check_lesson(asked(deepspeed_plugin=SimpleNamespace(zero_stage=2)), lesson, target)


def test_a_fingerprint_is_remembered() -> None:
    model = zoo.build("llama")
    before = fingerprint(Target(model))
    remember(Target(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert fingerprint(Target(model)) == before
    assert fingerprint(target_of(model=zoo.build("llama", seed=1))) != before


def one_process(folder: Path, steps: int, drafter: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that it is held to."""
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.chdir(folder)
    write_chats(folder / "chats.jsonl")
    batches = ("trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=4")
    cli.main(
        ["train", *ON_CPU, *drafter, *batches, "data.path=chats.jsonl", "output=one", f"trainer.max_steps={steps}"]
    )
    return folder / "one"


def check(ours: Path, theirs: Path, name: str) -> None:
    """Two runs learnt the same, and what the first made is a drafter."""
    assert [step for step, _ in curve(ours)] == [step for step, _ in curve(theirs)]
    for (_, mine), (_, other) in zip(curve(ours), curve(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    last = sorted(ours.glob("checkpoint-*"), key=lambda place: int(place.name.rpartition("-")[2]))[-1]
    for part in ("drafter", f"{last.name}/drafter", last.name):
        made, expected = (load_file(run / part / "model.safetensors") for run in (ours, theirs))
        assert made.keys() == expected.keys()
        for key, tensor in made.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-4)
    rates = [json.loads((run / "metrics.json").read_text())["acceptance"] for run in (ours, theirs)]
    assert rates[0] == rates[1]
    loaded: Any = build_drafter({"_target_": f"drafters.{name}", "path": str(ours / "drafter")})
    target = Target(demo_target("float32", "cpu").model)
    capabilities.check(target)
    assert loaded.fit(target) is None


def test_fsdp_trains_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = one_process(tmp_path, 2, HYDRA, monkeypatch)
    options = (*PARTS, "trainer.fsdp=true", "output=cut", "trainer.max_steps=2")
    made = launch(tmp_path, *options, settings=(*ON_CPU, *HYDRA))
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "cut" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file(), "it was cut up"
    check(tmp_path / "cut", one, "hydra_heads.Hydra")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "drafter", "option"),
    [
        ("medusa.Medusa", MEDUSA, "trainer.fsdp=true"),
        ("kangaroo.Kangaroo", KANGAROO, "trainer.fsdp=true"),
        ("medusa.Medusa", MEDUSA, "trainer.deepspeed.zero_optimization.stage=1"),
        ("hydra_heads.Hydra", HYDRA, "trainer.deepspeed.zero_optimization.stage=2"),
        ("kangaroo.Kangaroo", KANGAROO, "trainer.deepspeed.zero_optimization.stage=2"),
        ("medusa.Medusa", MEDUSA, "trainer.deepspeed.zero_optimization.stage=3"),
        ("hydra_heads.Hydra", HYDRA, "trainer.deepspeed.zero_optimization.stage=3"),
    ],
)
def test_a_run_in_parts_goes_on(
    name: str, drafter: tuple[str, ...], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun, gone on with, and once more where only its result is missing, as after a kill at the end."""
    if "deepspeed" in option:
        pytest.importorskip("deepspeed")
    one = one_process(tmp_path, 4, drafter, monkeypatch)
    options = (*PARTS, f"++{option}", "output=cut")
    for steps, more in ((2, ()), (4, ("resume=true",))):
        made = launch(tmp_path, *options, f"trainer.max_steps={steps}", *more, settings=(*ON_CPU, *drafter))
        assert made.returncode == 0, made.stderr
    cut = tmp_path / "cut"
    check(cut, one, name)
    shutil.rmtree(cut / "drafter")
    (cut / "metrics.json").unlink()
    before = curve(cut)
    made = launch(tmp_path, *options, "trainer.max_steps=4", "resume=true", settings=(*ON_CPU, *drafter))
    assert made.returncode == 0, made.stderr
    assert curve(cut)[: len(before)] == before
    ours, theirs = (load_file(run / "drafter" / "model.safetensors") for run in (cut, one))
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["trainer.fsdp=true", "trainer.deepspeed.zero_optimization.stage=3"])
def test_on_two_devices(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    if "deepspeed" in option:
        pytest.importorskip("deepspeed")
    one = one_process(tmp_path, 2, HYDRA, monkeypatch)
    made = launch(tmp_path, *PARTS, f"++{option}", "output=cut", "trainer.max_steps=2", settings=(*SETTINGS, *HYDRA))
    assert made.returncode == 0, made.stderr
    check(tmp_path / "cut", one, "hydra_heads.Hydra")
