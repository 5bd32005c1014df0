"""Training that is cut up over processes, by FSDP and by DeepSpeed: the same losses, and drafters that are whole."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

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
    known = {"fsdp": None, "fsdp_config": None, "deepspeed_plugin": None, "world_size": 2, "use_cpu": False,
             "save_only_model": False}  # fmt: skip
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
    assert not {"bf16", "fp16"} & made.keys(), "it would hold the weights in half precision"
    assert given["deepspeed"]["zero_optimization"] == {"stage": 3}, "what the user wrote stays"


@pytest.fixture
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")) or name == "LOCAL_RANK"]:
        monkeypatch.delenv(name)


def halves(options: dict[str, Any], **said: Any) -> Any:
    return sharding.half_precision(options | said, said)


ZERO: dict[str, Any] = {"zero_optimization": {"stage": 2}}
NONE, BF16, FP16 = ({"bf16": name == "bf16", "fp16": name == "fp16"} for name in ("none", "bf16", "fp16"))


@pytest.mark.usefixtures("not_launched")
def test_half_precision_is_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.bfloat16
    assert halves({"bf16": True, "fsdp": None, "deepspeed": None}) == ({}, None)
    assert halves({"bf16": True, "fsdp": True}) == ({}, half)
    assert halves({"fp16": True, "fsdp": True}) == ({}, torch.float16)
    assert halves({"fsdp": True, "use_cpu": True}, fp16=True) == ({}, None), "nobody scales its gradients"
    assert halves({"bf16": False, "deepspeed": ZERO}) == (NONE, None)
    assert halves({"deepspeed": ZERO}, bf16=True) == halves({"bf16": True, "deepspeed": ZERO}) == (NONE, half)
    auto, own, off = ({**ZERO, "bf16": {"enabled": enabled}} for enabled in ("auto", True, False))
    assert halves({"bf16": True, "deepspeed": auto}) == (NONE, half)
    (tmp_path / "own.json").write_text(json.dumps(own))
    for config in (own, str(tmp_path / "own.json")):
        assert halves({"bf16": False, "deepspeed": config}) == (BF16, half)
    assert halves({"deepspeed": own}, bf16=True) == (BF16, half)
    assert halves({"bf16": True, "deepspeed": off}) == halves({"deepspeed": off}, bf16=False) == (NONE, None)
    scaled = {**ZERO, "fp16": {"enabled": True}}
    assert halves({"bf16": True, "deepspeed": scaled}) == (FP16, torch.float16), "the target's dtype is overridden"
    for launched in ("bf16", "fp16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        assert halves({"deepspeed": own}) == (BF16, half), "the config's own mode wins"


@pytest.mark.usefixtures("not_launched")
def test_half_precision_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is wished for, no mode of DeepSpeed's own."""
    half = torch.bfloat16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert halves({}) == ({}, None)
    assert halves({"fsdp": True}) == ({}, half)
    assert halves({"deepspeed": ZERO}) == (NONE, half)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert halves({}) == (NONE, half)
    for enabled, expected in ((True, (BF16, half)), (False, (NONE, None)), ("auto", (NONE, half))):
        (tmp_path / "config.json").write_text(json.dumps({**ZERO, "bf16": {"enabled": enabled}}))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "config.json"))
        assert halves({}) == expected
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    for launched, refusal in (
        ("fp16", "float16 needs its loss scaled"),
        ("fp8", "in bf16, fp16 or float32; got .*=fp8"),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        with pytest.raises(ValueError, match=refusal):
            halves({})
    with pytest.raises(ValueError, match="expected trainer.bf16=true, or trainer.deepspeed.fp16.enabled=true"):
        halves({"fp16": True})


@pytest.mark.usefixtures("not_launched")
@pytest.mark.parametrize(
    ("said", "config", "expected"),
    [
        ({"bf16": True, "fp16": True}, {}, "bf16=true and trainer.fp16=true are two precisions; expected one"),
        ({"bf16": False}, {"bf16": True}, "trainer.bf16=false, and DeepSpeed's config has bf16.enabled=true; expected"),
        ({"bf16": True}, {"bf16": False}, "trainer.bf16=true, and DeepSpeed's config has bf16.enabled=false"),
        ({"bf16": True}, {"fp16": True}, "trainer.bf16=true, and DeepSpeed's config has fp16.enabled=true"),
        ({"fp16": True}, {"fp16": False}, "trainer.fp16=true, and DeepSpeed's config has fp16.enabled=false"),
        ({"fp16": True}, {"fp16": "auto"}, "float16 needs its loss scaled, which DeepSpeed does in its own mode only"),
    ],
)
def test_half_precision_in_two_minds(said: dict[str, bool], config: dict[str, Any], expected: str) -> None:
    zero = ZERO | {name: {"enabled": enabled} for name, enabled in config.items()}
    with pytest.raises(ValueError, match=expected):
        halves({"deepspeed": zero}, **said)


@pytest.mark.parametrize(("chosen", "expected"), [(NONE, "no"), (BF16, "bf16"), (FP16, "fp16")])
def test_a_launchers_word_is_taken_back(chosen: dict[str, bool], expected: str) -> None:
    """Transformers and accelerate have written it down by then."""
    config: dict[str, Any] = {"bf16": {"enabled": True}, "fp16": {"loss_scale": 0}}
    arguments = asked(**chosen, mixed_precision="bf16", deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    sharding.settle(arguments)
    assert arguments.mixed_precision == expected
    assert {name: config[name]["enabled"] for name in chosen} == chosen
    assert config["fp16"]["loss_scale"] == 0
    plain = asked(mixed_precision="bf16")
    sharding.settle(plain)
    assert plain.mixed_precision == "bf16"


@pytest.mark.slow
@pytest.mark.usefixtures("not_launched")
@pytest.mark.parametrize("options", [{}, {"deepspeed": ZERO}])
def test_a_launchers_word_in_arguments(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers' and accelerate's own classes: by launcher, and by option under a launcher's precision."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    if not options:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | sharding.completed(options)
    instead, autocast = sharding.half_precision(given, {})
    arguments = TrainingArguments(**given | instead)
    assert (autocast, arguments.mixed_precision) == (torch.bfloat16, "bf16"), "it would be passed on"
    sharding.settle(arguments)
    plugin: Any = arguments.deepspeed_plugin
    plugin.set_mixed_precision(arguments.mixed_precision)  # as accelerate does where it begins
    assert not plugin.deepspeed_config["bf16"]["enabled"]
    assert not plugin.deepspeed_config["fp16"]["enabled"]


@pytest.mark.usefixtures("not_launched")
@pytest.mark.parametrize(
    ("name", "options"),
    [("FSDP", {"fsdp": True}), ("DeepSpeed", {"deepspeed_plugin": SimpleNamespace(zero_stage=2)})],
)
def test_what_neither_takes(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sharding.check(asked(use_cpu=True, world_size=1, save_only_model=True))
    one_is_few = f"trainer.{name.lower()} cuts a drafter up over several processes, and this is one"
    with pytest.raises(ValueError, match=one_is_few):
        sharding.check(asked(**options, world_size=1))
    with pytest.raises(ValueError, match=f"save_only_model=true leaves nothing from which {name} goes on"):
        sharding.check(asked(**options, save_only_model=True))
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        if name == "FSDP":
            with pytest.raises(ValueError, match=one_is_few):
                sharding.check(asked(**options, world_size=1))
        else:
            sharding.check(asked(**options, world_size=1))
    for there in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        sharding.check(asked(**options))
        if there:
            with pytest.raises(ValueError, match=f"{name} cuts up over this machine's accelerators; expected a target"):
                sharding.check(asked(**options, use_cpu=True))
        else:
            sharding.check(asked(**options, use_cpu=True))


@pytest.mark.usefixtures("not_launched")
def test_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = {"deepspeed_plugin": SimpleNamespace(zero_stage=2)}
    monkeypatch.delattr("torch.distributed.fsdp.fully_shard")
    sharding.check(asked(**zero))
    with pytest.raises(ImportError, match="FSDP needs torch 2.6 or later here; this is"):
        sharding.check(asked(fsdp=True))
    monkeypatch.delattr("torch.accelerator")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sharding.check(asked(**zero, use_cpu=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="DeepSpeed cuts up over this machine's accelerators"):
        sharding.check(asked(**zero, use_cpu=True))


def test_fsdp_of_version_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="FSDP of version 1 .*; expected version 2"):
        sharding.check(asked(fsdp=True, fsdp_config={"version": 1}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP of version 1"):
        sharding.check(asked())
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharding.check(asked())


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


def one_process(folder: Path, steps: int, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that it is held to."""
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.chdir(folder)
    write_chats(folder / "chats.jsonl")
    batches = ("trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=4")
    cli.main(["train", *settings, *batches, "data.path=chats.jsonl", "output=one", f"trainer.max_steps={steps}"])
    return folder / "one"


def check_cut(folder: Path, option: str, step: int, dtype: torch.dtype = torch.float32) -> None:
    """The run in ``cut`` was what ``option`` says, its weights in float32 under autocast where ``dtype`` is another."""
    for rank in (0, 1):
        place = folder / f"watched-{rank}.json"
        word = json.loads(place.read_text())
        place.unlink()  # the next start leaves its own
        assert word["weights"] == ["torch.float32"]
        assert word["precisions"] == ["plain" if dtype == torch.float32 else str(dtype)]
        if "fsdp" in option:
            assert (word["lesson"], word["layers"], word["head"]) == (["DTensor"], ["DTensor"], ["Parameter"])
        else:
            assert (word["engine"], word["stage"]) == ("DeepSpeedEngine", int(option[-1]))
            assert word["in_parts"] == [option[-1] == "3"]
    checkpoint = folder / "cut" / f"checkpoint-{step}"
    assert (checkpoint / ("pytorch_model_fsdp.bin" if "fsdp" in option else f"global_step{step}")).exists()
    for part in (checkpoint, checkpoint / "drafter"):
        weights = load_file(part / "model.safetensors")
        assert weights
        assert all(tensor.numel() for tensor in weights.values())


def check_curves(ours: Path, theirs: Path, rel: float) -> None:
    assert [step for step, _ in curve(ours)] == [step for step, _ in curve(theirs)]
    for (_, mine), (_, other) in zip(curve(ours), curve(theirs), strict=True):
        assert mine == pytest.approx(other, rel=rel)


def check(ours: Path, theirs: Path, name: str) -> None:
    """Two runs learnt the same, and what the first made is a drafter."""
    check_curves(ours, theirs, 1e-4)
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


@pytest.mark.slow
def test_fsdp_trains_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = one_process(tmp_path, 2, (*ON_CPU, *HYDRA), monkeypatch)
    options = (*PARTS, "trainer.fsdp=true", "output=cut", "trainer.max_steps=2")
    made = launch(tmp_path, *options, settings=(*ON_CPU, *HYDRA), module="watched")
    assert made.returncode == 0, made.stderr
    check_cut(tmp_path, "trainer.fsdp=true", 2)
    check(tmp_path / "cut", one, "hydra_heads.Hydra")


@pytest.mark.parametrize(
    "option",
    [
        "trainer.fsdp=true",
        pytest.param("trainer.deepspeed.zero_optimization.stage=2", marks=pytest.mark.slow),
        pytest.param("trainer.deepspeed.zero_optimization.stage=3", marks=pytest.mark.slow),
    ],
)
def test_half_precision_as_one_process(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Hydra++, whose prefix layer reads float32; weights that nobody rounds."""
    if "deepspeed" in option:
        pytest.importorskip("deepspeed")
    settings = tuple("dtype=bfloat16" if part == "dtype=float32" else part for part in (*ON_CPU, *HYDRA))
    one = one_process(tmp_path, 2, settings, monkeypatch)
    options = (*PARTS, f"++{option}", "output=cut", "trainer.max_steps=2")
    made = launch(tmp_path, *options, settings=settings, module="watched")
    assert made.returncode == 0, made.stderr
    check_cut(tmp_path, option, 2, torch.bfloat16)
    check_curves(tmp_path / "cut", one, 2e-2)
    for name, tensor in load_file(tmp_path / "cut" / "checkpoint-2" / "model.safetensors").items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} was rounded"


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
    one = one_process(tmp_path, 4, (*ON_CPU, *drafter), monkeypatch)
    options = (*PARTS, f"++{option}", "output=cut")
    for steps, more in ((2, ()), (4, ("resume=true",))):
        options_now = (*options, f"trainer.max_steps={steps}", *more)
        made = launch(tmp_path, *options_now, settings=(*ON_CPU, *drafter), module="watched")
        assert made.returncode == 0, made.stderr
        check_cut(tmp_path, option, steps)
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
    one = one_process(tmp_path, 2, (*ON_CPU, *HYDRA), monkeypatch)
    options = (*PARTS, f"++{option}", "output=cut", "trainer.max_steps=2")
    made = launch(tmp_path, *options, settings=(*SETTINGS, *HYDRA), module="watched")
    assert made.returncode == 0, made.stderr
    check_cut(tmp_path, option, 2)
    check(tmp_path / "cut", one, "hydra_heads.Hydra")
