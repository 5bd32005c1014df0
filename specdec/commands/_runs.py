"""The folder of one training: whose it is, what stands in it, and from where a later start goes on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from specdec.evaluation.records import replace_text
from specdec.evaluation.store import differences

CONFIG, METRICS, LOSSES, DRAFTER, PROVENANCE = "config.yaml", "metrics.json", "log.jsonl", "drafter", "provenance.json"
CHECKPOINT = re.compile(r"checkpoint-\d+")
_MARK = "texts_fingerprint"  # in the config of every training, and of nothing else
PROCESSES = "processes"  # a batch has so many parts
# What may differ between two starts of one run, and how long it lasts.
_VOLATILE = ("output", "overwrite", "resume", "threads", "features", "layout")
_LASTS = ("max_steps", "num_train_epochs")


def claim(folder: Path, resolved: Mapping[str, Any]) -> bool:
    """Make sure that the folder is this run's; done by one process alone.

    Args:
        folder: to be.
        resolved: the config, with the fingerprint of the texts and the number of processes.

    Returns:
        whether the run is finished already; as long as it has this length, nothing is to be done.

    Raises:
        ValueError: it holds another run, this one although nobody said whether to go on, or what is no run at all.
    """
    if resolved["resume"] and resolved["overwrite"]:
        raise ValueError("resume=true goes on with a run, overwrite=true drops it; expected one of them")
    found = known(folder)
    others = [name for name in (METRICS, DRAFTER, *_checkpoints(folder)) if (folder / name).exists()]
    if found is None and others:
        raise ValueError(
            f"{folder} holds {', '.join(others[:3])}, but no {CONFIG} of a training, so it is not overwritten; give "
            "another output=FOLDER"
        )
    if resolved["overwrite"]:
        _clear(folder)
    elif found is None and resolved["resume"]:
        raise ValueError(f"{folder} holds no run to go on with; give its folder: output=FOLDER")
    elif found is not None:
        _check_same(folder, found, resolved)
        if (folder / METRICS).is_file():
            if _length(found) == _length(resolved):
                return True
            (folder / METRICS).unlink()  # no longer finished
    replace_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(resolved))))
    return False


def known(folder: Path) -> dict[str, Any] | None:
    """The config of the run that a folder holds; None where there is none.

    Raises:
        ValueError: there is a config, of something else.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException):
        found = None
    if not isinstance(found, dict) or _MARK not in found:
        raise ValueError(f"{path} is no config of a training; give another output=FOLDER")
    return {str(key): value for key, value in found.items()}


def finished(folder: Path) -> dict[str, Any]:
    """The figures of a run that came to its end."""
    figures: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return figures


def _check_same(folder: Path, found: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    if changed := sorted(set(differences(_stable(found), _stable(resolved)))):
        raise ValueError(
            f"{folder} holds another run ({'; '.join(changed[:4])}); use overwrite=true or another output=FOLDER"
        )
    if (folder / LOSSES).is_file() and not resolved["resume"]:  # more than a start that was refused
        raise ValueError(f"{folder} holds this very run: resume=true goes on with it, overwrite=true starts anew")


def _clear(folder: Path) -> None:
    """Drop what a run left, and nothing else."""
    for place in [folder / name for name in (METRICS, CONFIG, LOSSES, PROVENANCE, DRAFTER, *_checkpoints(folder))]:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[str]:
    there = folder.iterdir() if folder.is_dir() else []
    return sorted(path.name for path in there if CHECKPOINT.fullmatch(path.name) and path.is_dir())


def _stable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run this one; how long it lasts does not, so that it can be extended."""
    kept = {PROCESSES: 1} | {key: value for key, value in config.items() if key not in _VOLATILE}
    trainer = {key: value for key, value in (config.get("trainer") or {}).items() if key not in _LASTS}
    return kept | {"trainer": trainer}


def _length(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (config.get("trainer") or {}).get(key) for key in _LASTS}
