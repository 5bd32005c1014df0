"""Training on several processes: what they agree on, and that together they are one process with larger batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hydra import compose, initialize_config_dir
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.utils.data import BatchSampler, SequentialSampler

from pupils import ResidualLesson, Rows, target_of, trainer_in
from specdec import cli
from specdec.build import build_drafter, config_dir
from specdec.commands import train
from specdec.training import objectives, ranks
from specdec.training.features import Frozen
from specdec.training.ranks import Ranks
from specdec.training.scores import Even, Scores, once
from specdec.training.trainer import training_arguments

MEDUSA = ("drafter=medusa", "drafter.path=new", "drafter.num_heads=2")
SETTINGS = (
    "threads=1", "dtype=float32", "length=64", "eval_share=0.3", "trainer.save_steps=2", "trainer.logging_steps=1",
    "trainer.learning_rate=0.01", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0",
)  # fmt: skip
TRAIN = (*SETTINGS, "target.device=cpu", *MEDUSA)


def everywhere(work: Callable[[Ranks], Any], size: int = 2) -> list[Any]:
    """What ``work`` returns, or raises, on each of several ranks, which are threads here."""
    store, found = HashStore(), [None] * size

    def one(rank: int) -> None:
        try:
            found[rank] = work(Ranks(rank, size, store))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - handed to the test
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it waits for one that does not come"
    return found


def test_what_the_first_one_says_counts() -> None:
    def work(mine: Ranks) -> list[Any]:
        with mine.together():
            if mine.is_first:
                time.sleep(0.2)
        return [mine.share({"of": mine.rank}), mine.share(None), mine.is_first]

    assert everywhere(work, 3) == [[{"of": 0}, None, rank == 0] for rank in range(3)]
    alone = Ranks()
    with alone.together():
        assert alone.share("a") == "a"
    with pytest.raises(ValueError, match="mine"), alone.together():
        raise ValueError("mine")


@pytest.mark.parametrize("who", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_what_fails_on_one_fails_on_all(who: set[int], kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_LAST_WORDS", 0.0)

    def work(mine: Ranks) -> None:
        with mine.together():
            if mine.rank in who:
                raise kind(f"bad input on {mine.rank}")

    first, second = everywhere(work)
    if 0 in who:
        assert (type(first), str(first)) == (kind, "bad input on 0")
    else:
        assert isinstance(first, ValueError)
        assert str(first).startswith("process 1 of 2: ")
        assert "bad input on 1" in str(first)
    if who == {1} and kind is TypeError:
        assert isinstance(second, TypeError), "a bug shows where it is"
    else:
        assert isinstance(second, SystemExit)
        assert second.code == 2


def test_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.launched_rank() is None
    assert Ranks.launched().size == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.launched_rank() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.launched_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert ranks.launched_rank() == 3


def batch(rows: list[dict[str, Tensor]], frozen: Frozen) -> dict[str, Any]:
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return inputs | {"states": frozen(inputs["token_ids"], inputs["positions"])}


def test_losses_of_parts_are_the_loss_of_the_whole() -> None:
    """However unevenly the wanted tokens lie, up to a part without any; gradients too."""
    target = target_of()
    frozen, rows = Frozen(target, ("final",)), Rows(4).items
    rows[2]["wanted"][:17] = False
    for row, keep in ((rows[0], 0), (rows[1], 0), (rows[3], 24)):
        row["wanted"][keep:] = False
    lesson = ResidualLesson(target, dropout=0.0)
    for parameter in lesson.parameters():
        nn.init.normal_(parameter, std=0.1)
    whole = lesson(**batch(rows, frozen))
    whole["loss"].backward()
    expected = [parameter.grad.clone() for parameter in lesson.parameters() if parameter.grad is not None]
    halves = [batch(rows[:2], frozen), batch(rows[2:], frozen)]
    counts = torch.stack([lesson(**half)["counted"] for half in halves]).float()
    assert counts[0].sum() == 0
    assert counts[1].min() > 0
    lesson.zero_grad()
    losses = []
    with objectives.of_step(dict(zip(lesson.steps_ahead, counts.mean(0), strict=True))):
        for half in halves:
            losses.append(lesson(**half)["loss"] / 2)
            losses[-1].backward()
    assert float(torch.stack(losses).sum().detach()) == pytest.approx(float(whole["loss"].detach()), rel=1e-6)
    for parameter, gradient in zip(lesson.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    alone = lesson(**halves[1])["loss"].detach()
    assert float(alone) == pytest.approx(float(losses[1].detach())), "a batch is a step of its own otherwise"


def test_rows_that_fill_up_the_last_batch_count_for_nothing() -> None:
    target = target_of()
    frozen, lesson, rows = Frozen(target, ("final",)), ResidualLesson(target), Rows(5)
    even = Even(rows, 4)
    assert len(even) == 8
    assert len(Even(rows, 5)) == 5
    scores = []
    for dataset, size in ((rows, 5), (even, 4)):
        scores.append(Scores())
        for start in range(0, len(dataset), size):
            with torch.no_grad():
                scores[-1].add(lesson(**batch([dataset[index] for index in range(start, start + size)], frozen)))
    assert scores[0].rates() == pytest.approx(scores[1].rates())
    assert scores[0].acceptance() == scores[1].acceptance()
    assert rows[0]["wanted"].any(), "a copy was emptied"


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("name", ["medusa.Medusa", "hydra_heads.Hydra", "kangaroo.Kangaroo"])
def test_a_batch_in_which_nothing_is_wanted(name: str, family: str) -> None:
    """It teaches nothing, and every weight has a gradient of zeros for the other processes."""
    target, drafter = target_of(family), build_drafter({"_target_": f"drafters.{name}", "path": "new"})
    assert drafter.fit(target) is None
    lesson, rows = drafter.lesson(target), Rows(2).items  # type: ignore[attr-defined]
    for row in rows:
        row["wanted"][:] = False
    found = lesson(**batch(rows, Frozen(target, lesson.taps)))
    found["loss"].backward()
    assert (float(found["loss"].detach()), int(found["counted"].sum()), int(found["hits"].sum())) == (0, 0, 0)
    for key, parameter in lesson.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_the_head_of_no_states(family: str) -> None:
    target = target_of(family)
    assert target.head_is_all == (family == "llama")
    passes: list[Any] = []
    target.layers[0].register_forward_pre_hook(lambda *_: passes.append(None))
    counts = []
    for length in (3, 0):
        states = torch.randn(1, length, target.hidden_size, requires_grad=True)
        logits = target.head(states)
        assert (logits.shape, logits.dtype) == ((1, length, target.vocab_size), torch.float32)
        logits.sum().backward()
        assert states.grad is not None
        counts.append(len(passes))
        passes.clear()
    assert counts[0] == counts[1], "layers that are cut up are put together by all processes at once"


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_an_epoch_shows_each_row_once(batch_size: int, size: int, split: bool) -> None:
    """Whatever accelerate fills the last batches up with."""
    for count in range(1, 20):
        rows = Rows(count)
        wanted: list[int] = []
        for rank in range(size):
            dealt = BatchSampler(SequentialSampler(rows), batch_size * (size if split else 1), drop_last=False)
            mine = list(BatchSamplerShard(dealt, size, rank, split_batches=split) if size > 1 else dealt)
            *before, last = [{"row": torch.tensor(chosen), "wanted": torch.ones(len(chosen), 3)} for chosen in mine]
            for part in (*before, once(last, count, rank, size) if size > 1 else last):
                wanted += part["row"][part["wanted"].all(1)].tolist()
            assert last["wanted"].all(), "a copy was emptied"
        assert sorted(wanted) == list(range(count))


@pytest.mark.parametrize("option", [{"even_batches": False}, {"dispatch_batches": True}])
def test_other_ways_to_deal_batches_out(
    option: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, ((name, value),) = target_of(), option.items()

    def arguments(**options: bool) -> Any:
        return training_arguments({"accelerator_config": options}, tmp_path, 0, target, evaluates=False)

    arguments(**option)
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    arguments(split_batches=True)
    with pytest.raises(ValueError, match=f"accelerator_config.{name}={str(value).lower()} deals batches .* left out"):
        arguments(**option)


def test_parting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wraps the lesson goes before the group of processes that it speaks to."""
    trainer = trainer_in(tmp_path)
    wrapper = nn.ModuleList([trainer.model])
    gone, there = weakref.ref(wrapper), []
    trainer.model_wrapped = wrapper
    trainer.accelerator._models.append(wrapper)
    monkeypatch.setattr(trainer.accelerator, "end_training", lambda: there.append(gone()))
    del wrapper
    trainer.end()
    assert there == [None]


def test_several_processes_cannot_share_a_target(tmp_path: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        overrides = [*TRAIN, "data.path=x", f"output={tmp_path}", "++target.device_map=auto"]
        config = compose("train", overrides=overrides)
    with pytest.raises(ValueError, match="of several processes each has its own target"):
        train._prepared(config, tmp_path, 2, Console(quiet=True))


def write_chats(path: Path) -> None:
    turns = ((f"How much is {n} plus {n}?", f"{n} plus {n}" + f" is {2 * n}" * (1 + n % 5)) for n in range(40))
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def launch(
    folder: Path, *arguments: str, settings: tuple[str, ...] = TRAIN, module: str = "specdec.cli"
) -> subprocess.CompletedProcess[str]:
    """The command on two processes, as a user starts it in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    if "target.device=cpu" in settings:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # FSDP and DeepSpeed take what they find
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", module, "train", *settings, "data.path=chats.jsonl", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=300
    )


def curve(folder: Path) -> list[tuple[int, dict[str, float]]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss")
    found = [(line["step"], {name: line[name] for name in kept if name in line}) for line in lines]
    return [(step, figures) for step, figures in found if figures]


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started, gone on with and refused, by torchrun, in batches of one; against one process with batches of four."""
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path / "chats.jsonl")
    cli.main(
        ["train", *TRAIN, "data.path=chats.jsonl", "output=one", "trainer.per_device_train_batch_size=4",
         "trainer.max_steps=4", "trainer.per_device_eval_batch_size=4"]
    )  # fmt: skip
    small = (
        "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2",
        "trainer.per_device_eval_batch_size=4",
    )  # fmt: skip
    cached = ("features.mode=cached", "features.path=states", "features.shard_mb=0.1")
    begun = launch(tmp_path, *small, *cached, "trainer.max_steps=2")
    assert begun.returncode == 0, begun.stderr
    assert begun.stderr.count("held-out tokens found") + begun.stdout.count("held-out tokens found") == 1
    assert begun.stderr.count("the target's states take ") == 1
    (folder,) = (tmp_path / "outputs" / "train").iterdir()
    assert {place.name for place in tmp_path.iterdir()} == {"chats.jsonl", "one", "outputs", "states"}
    assert {place.name for place in folder.iterdir()} == {
        "checkpoint-2", "config.yaml", "drafter", "log.jsonl", "metrics.json", "provenance.json",
    }  # fmt: skip
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {place.name for place in (folder / "checkpoint-2").iterdir()}

    again = (*small, *cached, "trainer.max_steps=4", f"output={folder}")
    refused = launch(tmp_path, *again)
    assert refused.returncode != 0
    assert refused.stderr.count("holds this very run: resume=true goes on with it") == 1
    finished = launch(tmp_path, *again, "resume=true")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count(f"goes on from {folder / 'checkpoint-2'}") == 1
    assert "0 bytes are still to be made" in finished.stderr

    assert [step for step, _ in curve(folder)] == [step for step, _ in curve(tmp_path / "one")] == [1, 2, 2, 3, 4, 4]
    for (_, ours), (_, theirs) in zip(curve(folder), curve(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (json.loads((place / "metrics.json").read_text()) for place in (folder, tmp_path / "one"))
    assert ours.pop("acceptance") == theirs.pop("acceptance"), "sums over the processes"
    assert ours == pytest.approx(theirs, rel=1e-4)
    made, expected = (load_file(place / "drafter" / "model.safetensors") for place in (folder, tmp_path / "one"))
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_the_target_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medusa-2 over an epoch whose last step has too few rows for both processes."""
    pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path / "chats.jsonl")
    joint = (*TRAIN, "loss.joint=true", "loss.rank=4", "loss.dropout=0", "limit=12", "trainer.num_train_epochs=1",
             "trainer.per_device_eval_batch_size=4")  # fmt: skip
    cli.main(["train", *joint, "data.path=chats.jsonl", "output=one", "trainer.per_device_train_batch_size=4"])
    made = launch(tmp_path, "output=two", "trainer.per_device_train_batch_size=2", settings=joint)
    assert made.returncode == 0, made.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    assert json.loads((one / "provenance.json").read_text())["texts"]["train"]["rows"] == 5
    assert [step for step, _ in curve(two)] == [step for step, _ in curve(one)] == [1, 2, 2]
    for (_, ours), (_, theirs) in zip(curve(two), curve(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for part in ("drafter", "checkpoint-2"):
        found, expected = (load_file(place / part / "model.safetensors") for place in (two, one))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4)
