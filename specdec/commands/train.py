"""Train a drafter's weights for a target, on the texts of `data`, by a recipe; resume=true goes on after a kill.

One process per device: ``torchrun --nproc-per-node 8 -m specdec.cli train ...``. The first one claims the folder,
writes and speaks; what is refused on one ends all of them. Every checkpoint holds the drafter as it was then, so that
what a killed run has reached can be used: ``drafter.path=RUN/checkpoint-N/drafter``. (Not where the target learns too,
which would be saved whole each time: ``resume=true trainer.max_steps=N`` makes a result of its last checkpoint, N.)

Where FSDP or DeepSpeed cut up the weights, all processes put them together whenever a drafter is saved.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from specdec.build import build_drafter, build_verifier, choices, load
from specdec.checkpoints import CONFIG as DRAFTER_CONFIG
from specdec.commands import _runs
from specdec.commands._data import choice
from specdec.commands._runs import DRAFTER, LOSSES, METRICS, PROCESSES
from specdec.commands._session import Session, say_ignored
from specdec.commands._texts import Texts, check_features, check_length, texts_of, with_states
from specdec.evaluation.provenance import now, provenance
from specdec.evaluation.records import replace_text
from specdec.generation import attach, restore, speculation_of
from specdec.learning import Trainable
from specdec.target import Target
from specdec.training.features import Frozen, check_packed
from specdec.training.ranks import Ranks, launched_rank

INTERRUPTED = 130
OPEN_PARTS = ("loss", "trainer")  # whose options are named by the lesson and by transformers
_LITTLE = 16 * 2**20  # bytes; a disk with no more than that is full


@dataclass(frozen=True)
class Pupil:
    """A drafter bound to its frozen target, and the lesson that its weights learn from."""

    drafter: Any
    target: Target
    lesson: Any

    @property
    def is_joint(self) -> bool:
        """Whether the target learns too."""
        return any(parameter.requires_grad for parameter in self.target.model.parameters())

    def save(self, folder: Path, layout: str, acceptance: list[list[float]] | None) -> None:
        """Write the drafter, with how often its guesses were right."""
        self.drafter.save(folder, layout)
        if acceptance is not None:
            path = folder / DRAFTER_CONFIG
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            replace_text(path, json.dumps({**config, "acceptance": acceptance}, indent=1) + "\n")


@dataclass(frozen=True)
class Run:
    """Where a training writes, what it goes on from and what is said of it."""

    folder: Path
    checkpoint: Path | None
    said: dict[str, Any]
    console: Console

    def say(self, line: str) -> None:
        """A line for the user."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def extra_overrides() -> list[str]:
    """What the command line lacks: of several processes the first alone makes the folder, which the others are told."""
    return ["hydra.run.dir=."] if launched_rank() else []


def run(config: DictConfig) -> float | int | None:
    """Train. Returns the held-out loss to sweepers; outside a sweep exit code 130 where it was interrupted."""
    ranks = Ranks.launched()
    console = Console(stderr=True, quiet=not ranks.is_first)
    folder = Path(ranks.share(str(_folder(config))))  # its name may hold the time, which each process would read anew
    with ranks.together():
        pupil, frozen, texts, arguments, this = _prepared(config, folder, ranks.size, console)
    with ranks.together():
        claimed = _claimed(this, config) if ranks.is_first else None
    done, checkpoint = ranks.share(claimed)
    if done:
        return _result(_runs.finished(this.folder))
    if checkpoint is None:
        _say_start(pupil.drafter, this)
    this = replace(this, checkpoint=None if checkpoint is None else Path(checkpoint))
    try:
        for mine in (ranks.is_first, not ranks.is_first):  # the first one makes what the others find
            with ranks.together():
                if mine:
                    batch = arguments.per_device_eval_batch_size
                    texts = with_states(texts, frozen, this.said["config"]["features"], batch, console)
    except KeyboardInterrupt:
        this.say("interrupted; the same command goes on with the target's states from where it stopped")
        metrics = None
    else:
        metrics = _train(pupil, frozen, texts, arguments, this)
    if metrics is None:
        if _in_sweep():
            raise KeyboardInterrupt
        return INTERRUPTED
    return _result(metrics)


def _prepared(
    config: DictConfig, folder: Path, processes: int, console: Console
) -> tuple[Pupil, Frozen, Texts, Any, Run]:
    """Everything that can be known before the folder is touched; each process does it for itself."""
    _need_accelerate()
    from specdec.training.sharding import check_lesson
    from specdec.training.trainer import training_arguments

    if processes > 1 and _in_sweep():
        raise ValueError("a sweep trains in one process, one run after the other; start several processes for each run")
    if processes > 1 and OmegaConf.select(config, "target.device_map") is not None:
        raise ValueError(
            "target.device_map spreads one target over devices; of several processes each has its own target"
        )
    drafter = _trainable(config)
    if processes > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # the target's too
    session = Session(config)
    settings = session.config
    check_length(session)
    target = _frozen_target(session, drafter)
    arguments = training_arguments(
        settings["trainer"] or {}, folder, settings["seed"], target, evaluates=bool(settings["eval_share"])
    )
    check_packed(target)
    with tempfile.TemporaryDirectory() as scratch:  # a layout that cannot be is known now, not after the training
        drafter.save(Path(scratch), settings["layout"])
    pupil = Pupil(drafter, target, _lesson(drafter, target, settings["loss"] or {}))
    check_lesson(arguments, pupil.lesson, target)
    frozen = Frozen(target, pupil.lesson.taps)
    check_features(settings["features"], frozen)
    texts = texts_of(config, session, console)
    resolved = {**settings, "texts_fingerprint": texts.fingerprint, PROCESSES: processes}
    resolved["drafter"] = settings["drafter"] | drafter.settled()
    said = provenance(session.loaded, _command(), resolved, None, _overrides()) | {"texts": texts.said}
    return pupil, frozen, texts, arguments, Run(folder, None, said, console)


def _claimed(this: Run, config: DictConfig) -> tuple[bool, str | None]:
    """Whether the run is finished, and the checkpoint to go on from."""
    from specdec.training.trainer import last_checkpoint

    if _runs.claim(this.folder, this.said["config"]):
        step = _runs.finished(this.folder).get("step")
        this.say(
            f"{this.folder} is finished, at step {step}; trainer.max_steps=N resume=true goes on to a later step N, "
            "overwrite=true trains it anew"
        )
        return True, None
    checkpoint = last_checkpoint(this.folder) if config.resume else None
    if config.resume:
        this.say(
            f"goes on from {checkpoint}" if checkpoint else "starts from the beginning: there is no checkpoint yet"
        )
    if checkpoint is not None and (this.said["config"]["trainer"] or {}).get("save_only_model"):
        this.say("without the optimizer's state (trainer.save_only_model=true): its losses will differ for a while")
    return False, None if checkpoint is None else str(checkpoint)


def _train(pupil: Pupil, frozen: Frozen, texts: Texts, arguments: Any, this: Run) -> dict[str, Any] | None:
    """Train, save and say how it went; returns the figures, None where it was interrupted."""
    from specdec.training.callbacks import AtCheckpoints, LossCurve, Provenance, Told
    from specdec.training.trainer import DrafterTrainer, last_checkpoint

    told = Told(this.console)
    callbacks = [LossCurve(this.folder / LOSSES), told, Provenance(this.said)]
    trainer = DrafterTrainer(pupil.lesson, arguments, frozen, texts.train, texts.held_out, callbacks)
    if not pupil.is_joint:
        layout = this.said["config"]["layout"]
        trainer.add_callback(AtCheckpoints(partial(_keep, pupil, trainer, layout), DRAFTER, trainer.whole))
    try:
        with told, _told_when_full(this.folder):
            metrics: dict[str, Any] = trainer.learn(this.checkpoint)
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            reached = last_checkpoint(this.folder)
            where = f"from {reached.name}" if reached else "from the beginning: there is no checkpoint yet"
            this.say(f"interrupted; the same command with output={this.folder} resume=true goes on {where}")
        return None
    acceptance = trainer.acceptance()
    metrics |= {"step": trainer.reached} | ({} if acceptance is None else {"acceptance": acceptance})
    with trainer.whole(), _told_when_full(this.folder):
        if trainer.is_world_process_zero():
            _save(pupil, this, metrics)
    trainer.end()
    return metrics


def _say_start(drafter: Any, this: Run) -> None:
    """Say which weights are trained, since those that are shipped or given are taken up without being asked for."""
    place = getattr(drafter, "loaded_from", None)
    if place is None:
        this.say("starts from new weights")
    else:
        asked = getattr(drafter, "path", None) is not None
        more = "" if asked else ", which are shipped; drafter.path=new starts from new ones"
        this.say(f"starts from the weights at {place}{more}")
    say_ignored(drafter, this.say)


def _keep(pupil: Pupil, trainer: Any, layout: str, checkpoint: Path) -> None:
    """Put the drafter as it is now into a checkpoint, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=checkpoint) as scratch:
        made = Path(scratch) / DRAFTER
        pupil.save(made, layout, trainer.acceptance())
        shutil.copyfile(checkpoint / _runs.PROVENANCE, made / _runs.PROVENANCE)
        shutil.rmtree(checkpoint / DRAFTER, ignore_errors=True)
        made.replace(checkpoint / DRAFTER)


def _save(pupil: Pupil, this: Run, metrics: dict[str, Any]) -> None:
    """Write the drafter and the figures, the latter last: they say that the run is finished."""
    from specdec.training.callbacks import write_provenance

    folder, config = this.folder / DRAFTER, this.said["config"]
    pupil.save(folder, config["layout"], metrics.get("acceptance"))
    said = {**this.said, "finished": now(), "metrics": metrics}
    for place in (this.folder, folder):
        write_provenance(place, said, metrics["step"])
    replace_text(this.folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    if "acceptance" in metrics:
        this.console.print(_table(metrics))
    this.say(f"written to {folder}; use it: {_use(folder, config, pupil.drafter.name)}")


@contextmanager
def _told_when_full(folder: Path) -> Iterator[None]:
    """Within the block a full disk is an error that says how to go on, whoever wrote."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and shutil.disk_usage(folder).free > _LITTLE:
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full; whole checkpoints in {folder} are kept: free some space, and the same command with "
            f"output={folder} resume=true goes on from the last (trainer.save_total_limit= keeps fewer of them)",
        ) from error


def _use(folder: Path, config: Mapping[str, Any], name: str) -> str:
    """The command that decodes with the result. What was trained together with its target brings that along."""
    path, kind = config["target"].get("path"), choice("target", "demo")
    if (folder / DRAFTER_CONFIG).is_file():
        known = json.loads((folder / DRAFTER_CONFIG).read_text(encoding="utf-8"))
        path, kind = (str(folder), "hf") if "architectures" in known else (path, kind)
    words = ["specdec generate", *([f"target={kind}"] if kind != "demo" else [])]
    words += [f"target.path={path}"] if path else []
    return " ".join([*words, f"drafter={choice('drafter', name)}", f"drafter.path={folder}", 'prompt="..."'])


def _table(metrics: Mapping[str, Any]) -> Table:
    """How often the held-out token is among the draft's best, by depth."""
    ranks = range(1, 1 + len(metrics["acceptance"][0]))
    table = Table("depth", *(f"top {rank}" for rank in ranks), title="held-out tokens found", title_justify="left")
    for depth in range(1, 1 + len(metrics["acceptance"])):
        table.add_row(str(depth), *(f"{metrics[f'depth_{depth}/top_{rank}']:.3f}" for rank in ranks))
    return table


def _trainable(config: DictConfig) -> Any:
    """The configured drafter, before anything large is loaded.

    Raises:
        ValueError: it has no weights to train; names those that have.
    """
    plain = OmegaConf.to_container(config.drafter, resolve=True)
    assert isinstance(plain, dict)
    drafter: Any = build_drafter({str(key): value for key, value in plain.items()})
    if not isinstance(drafter, Trainable):
        raise ValueError(
            f"drafter {drafter.name!r} has no weights to train; those that have: {', '.join(_learners()) or 'none'}"
        )
    return drafter


def _learners() -> Iterator[str]:
    for name in choices("drafter"):
        made = get_object(load("drafter", name)["_target_"])
        if all(hasattr(made, method) for method in ("lesson", "settled", "save")):
            yield name


def _lesson(drafter: Any, target: Target, options: Mapping[str, Any]) -> Any:
    """What the drafter's weights learn from.

    Raises:
        ValueError: an option that its loss does not have, or a lesson that does not say what it is about.
    """
    lesson = drafter.lesson(target, **options)
    if missing := [name for name in ("taps", "steps_ahead") if not hasattr(lesson, name)]:
        raise ValueError(
            f"the lesson of drafter {drafter.name!r}, {type(lesson).__name__}, has no {' and no '.join(missing)}; "
            "expected what specdec.learning.Lesson has"
        )
    return lesson


def _frozen_target(session: Session, drafter: Any) -> Target:
    """Bind the drafter as decoding would; the model generates plainly afterwards and learns nothing."""
    with warnings.catch_warnings():
        # Untrained is what a drafter may be before its training.
        warnings.filterwarnings("ignore", message="drafter .* has no trained weights")
        attach(session.model, drafter, build_verifier(session.config["verifier"]))
    target = speculation_of(session.model).target
    restore(session.model)
    session.model.requires_grad_(False)
    return target


def _need_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("specdec train runs on transformers' Trainer, which needs accelerate: pip install .[train]")


def _result(metrics: Mapping[str, Any]) -> float | None:
    return metrics.get("loss") if _in_sweep() else None


def _folder(config: DictConfig) -> Path:
    """Hydra's folder of this job, which is ``output`` outside a sweep."""
    return Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else config.output)


def _command() -> list[str]:
    return ["specdec", "train", *(_overrides() if _in_sweep() else sys.argv[1:])]


def _overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
