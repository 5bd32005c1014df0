"""Train a drafter's weights for a target, on the texts of `data`, by a recipe; resume=true goes on after a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from specdec.build import build_drafter, build_verifier, choices, load
from specdec.checkpoints import CONFIG as DRAFTER_CONFIG
from specdec.commands._data import choice
from specdec.commands._session import Session
from specdec.commands._texts import Texts, texts_of, with_states
from specdec.evaluation.provenance import now, provenance
from specdec.evaluation.records import replace_text
from specdec.evaluation.store import differences
from specdec.generation import attach, restore, speculation_of
from specdec.interfaces import Trainable
from specdec.target import Target
from specdec.training.features import Frozen, check_packed

CONFIG, METRICS, LOSSES, DRAFTER, PROVENANCE = "config.yaml", "metrics.json", "log.jsonl", "drafter", "provenance.json"
# What may differ between two starts of one run.
_VOLATILE = ("output", "overwrite", "resume", "threads", "features", "layout")
INTERRUPTED = 130
OPEN_PARTS = ("loss", "trainer")  # whose options are named by the lesson and by transformers


@dataclass(frozen=True)
class Pupil:
    """A drafter bound to its frozen target, and the lesson that its weights learn from."""

    drafter: Any
    target: Target
    lesson: Any


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


def run(config: DictConfig) -> float | int | None:
    """Train. Returns the held-out loss to sweepers; outside a sweep exit code 130 where it was interrupted."""
    _need_accelerate()
    from specdec.training.trainer import training_arguments

    drafter, console = _trainable(config), Console(stderr=True)
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # the target's too
    session, folder = Session(config), _folder(config)
    settings = session.config
    target = _frozen_target(session, drafter)
    arguments = training_arguments(
        settings["trainer"] or {}, folder, settings["seed"], target, evaluates=bool(settings["eval_share"])
    )
    check_packed(target)
    pupil = Pupil(drafter, target, drafter.lesson(target, **(settings["loss"] or {})))
    if not (settings["loss"] or {}).get("joint"):
        with tempfile.TemporaryDirectory() as scratch:  # a layout that cannot be is known now, not after the training
            drafter.save(Path(scratch), settings["layout"])
    frozen = Frozen(target, pupil.lesson.taps)
    texts = texts_of(config, session, console)
    resolved = {**settings, "texts_fingerprint": texts.fingerprint}
    said = provenance(session.loaded, _command(), resolved, None, _overrides()) | {"texts": texts.said}
    with arguments.main_process_first(desc="claiming the folder"):
        this = Run(folder, _claim(folder, resolved, arguments.process_index == 0), said, console)
        if config.resume and (folder / METRICS).is_file():
            this.say(f"{folder} is finished; overwrite=true trains it anew")
            return _result(json.loads((folder / METRICS).read_text(encoding="utf-8")))
        texts = with_states(texts, frozen, settings["features"], arguments.per_device_eval_batch_size, console)
    metrics = _train(pupil, frozen, texts, arguments, this)
    if metrics is None:
        if _in_sweep():
            raise KeyboardInterrupt
        return INTERRUPTED
    return _result(metrics)


def _train(pupil: Pupil, frozen: Frozen, texts: Texts, arguments: Any, this: Run) -> dict[str, Any] | None:
    """Train, save and say how it went; returns the figures, None where it was interrupted."""
    from specdec.training.callbacks import LossCurve, Provenance, Told
    from specdec.training.trainer import DrafterTrainer, last_checkpoint

    if this.checkpoint is not None:
        this.say(f"goes on from {this.checkpoint}")
    told = Told(this.console)
    callbacks = [LossCurve(this.folder / LOSSES), told, Provenance(this.said)]
    trainer = DrafterTrainer(pupil.lesson, arguments, frozen, texts.train, texts.held_out, callbacks)
    try:
        with told:
            metrics: dict[str, Any] = trainer.learn(this.checkpoint)
    except KeyboardInterrupt:
        reached = last_checkpoint(this.folder)
        where = f"from {reached.name}" if reached else "from the beginning: there is no checkpoint yet"
        this.say(f"interrupted; the same command with output={this.folder} resume=true goes on {where}")
        return None
    if trainer.is_world_process_zero():
        metrics |= {"step": trainer.state.global_step}
        metrics |= {"acceptance": trainer.scores.acceptance()} if texts.held_out is not None else {}
        _save(pupil, this, metrics)
    return metrics


def _save(pupil: Pupil, this: Run, metrics: dict[str, Any]) -> None:
    """Write the drafter and the figures, the latter last: they say that the run is finished."""
    from specdec.training.callbacks import write_provenance

    folder, config = this.folder / DRAFTER, this.said["config"]
    pupil.drafter.save(folder, config["layout"])
    if "acceptance" in metrics:
        path = folder / DRAFTER_CONFIG
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        replace_text(path, json.dumps({**known, "acceptance": metrics["acceptance"]}, indent=1) + "\n")
    said = {**this.said, "finished": now(), "metrics": metrics}
    for place in (this.folder, folder):
        write_provenance(place, said, metrics["step"])
    replace_text(this.folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    if "acceptance" in metrics:
        this.console.print(_table(metrics))
    this.say(f"written to {folder}; use it: {_use(folder, config, pupil.drafter.name)}")


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
        if all(hasattr(made, method) for method in ("lesson", "save")):
            yield name


def _frozen_target(session: Session, drafter: Any) -> Target:
    """Bind the drafter as decoding would; the model generates plainly afterwards and learns nothing."""
    attach(session.model, drafter, build_verifier(session.config["verifier"]))
    target = speculation_of(session.model).target
    restore(session.model)
    session.model.requires_grad_(False)
    return target


def _claim(folder: Path, resolved: Mapping[str, Any], is_first: bool) -> Path | None:
    """Make sure that the folder is this run's; returns the checkpoint to go on from.

    Raises:
        ValueError: it holds another run, or this one although nobody said whether to go on.
    """
    from specdec.training.trainer import last_checkpoint

    if resolved["resume"] and resolved["overwrite"]:
        raise ValueError("resume=true goes on with a run, overwrite=true drops it; expected one of them")
    if not is_first:  # the first process has settled it
        return last_checkpoint(folder) if resolved["resume"] else None
    path = folder / CONFIG
    found = _stable(OmegaConf.to_container(OmegaConf.load(path))) if path.is_file() else None
    if resolved["overwrite"]:
        _clear(folder)
    elif found is not None:
        if changed := sorted(set(differences(found, _stable(resolved)))):
            raise ValueError(
                f"{folder} holds another run ({'; '.join(changed[:4])}); use overwrite=true or another output=FOLDER"
            )
        if (folder / LOSSES).is_file() and not resolved["resume"]:  # more than a start that was refused
            raise ValueError(f"{folder} holds this very run: resume=true goes on with it, overwrite=true starts anew")
    elif resolved["resume"]:
        raise ValueError(f"{folder} holds no run to go on with; give its folder: output=FOLDER")
    elif any((folder / name).exists() for name in (METRICS, DRAFTER)):
        raise ValueError(f"{folder} holds a drafter without its {CONFIG}; use overwrite=true or another output=FOLDER")
    replace_text(path, OmegaConf.to_yaml(OmegaConf.create(dict(resolved))))
    return last_checkpoint(folder) if resolved["resume"] else None


def _clear(folder: Path) -> None:
    """Drop what a run left, and nothing else."""
    places = [folder / name for name in (METRICS, CONFIG, LOSSES, PROVENANCE, DRAFTER)]
    for place in [*places, *folder.glob("checkpoint-*")]:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _stable(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE}


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
