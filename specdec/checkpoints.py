"""Weights of drafters on disk: any of the formats they are published in, every key of which is accounted for.

A checkpoint is a folder (or a hub repository) with a ``config.json`` and the weights, or a file of weights. Pickles are
read with ``weights_only=True``: one that needs more than tensors is refused.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.loading import is_demo
from specdec.target import Target

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
BASE = "base_model_name_or_path"
DEMO_NAME = "specdec/demo/target"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Checkpoint:
    """The weights of one drafter, taken key by key; ``close`` says what nobody asked for.

    Args:
        weights: name -> tensor.
        config: of the drafter, as published; empty where there is none.
        place: what errors call it.
        beside: names of a whole model's tensors, among which the drafter's lie and which were not read.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], config: Mapping[str, Any], place: str, beside: Sequence[str] = ()
    ) -> None:
        self._weights = dict(weights)
        self.config = dict(config)
        self.place = place
        self.in_whole_model = bool(beside)
        self.ignored = [f"{name} (of the whole model, not of the drafter)" for name in beside]

    @property
    def keys(self) -> list[str]:
        """The names not taken yet."""
        return list(self._weights)

    def count(self, pattern: str) -> int:
        """One more than the largest number that the first group of ``pattern`` matches at the start of a key; or 0."""
        found = (re.match(pattern, key) for key in self._weights)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor that has not been taken yet.

        Raises:
            ValueError: there is no such key.
        """
        return tuple(self._get(key).shape)

    def take(self, key: str, shape: Sequence[int]) -> Tensor:
        """The tensor of this name, which must have this shape.

        Raises:
            ValueError: there is no such key, or it has another shape.
        """
        found = self._get(key)
        if tuple(found.shape) != tuple(shape):
            raise ValueError(f"{self.place}: expected {key} of shape {list(shape)}, got {list(found.shape)}")
        return self._weights.pop(key)

    def fill(self, module: nn.Module, names: Mapping[str, str] | None = None, prefix: str = "") -> None:
        """Copy into every parameter of a module.

        Args:
            module: to be filled.
            names: parameter -> key; None = the key is ``prefix`` and the parameter's name.
            prefix: see ``names``.
        """
        for name, parameter in module.named_parameters():
            key = prefix + name if names is None else names[name]
            with torch.no_grad():
                parameter.copy_(self.take(key, parameter.shape))

    def ignore(self, pattern: str, why: str) -> None:
        """Let go of the keys that ``pattern`` matches in full, and remember them with the reason."""
        for key in [key for key in self._weights if re.fullmatch(pattern, key)]:
            del self._weights[key]
            self.ignored.append(f"{key} ({why})")

    def close(self) -> None:
        """Every key must have been taken or ignored.

        Raises:
            ValueError: some have not; names them.
        """
        if self._weights:
            left = ", ".join(sorted(self._weights)[:5])
            more = f" and {len(self._weights) - 5} more" if len(self._weights) > 5 else ""
            raise ValueError(f"{self.place}: keys that this drafter does not know: {left}{more}")

    def _get(self, key: str) -> Tensor:
        if key not in self._weights:
            near = ", ".join(sorted(self._weights)[:5]) or "none"
            raise ValueError(f"{self.place}: expected a key {key}; the file has: {near}, ...")
        return self._weights[key]


def read(
    path: str, files: Sequence[str] = (WEIGHTS, "pytorch_model.bin"), within_model: str | None = None
) -> Checkpoint:
    """Open a checkpoint.

    Args:
        path: a folder, a file of weights (``config.json`` is looked for beside it), or a hub id.
        files: names of the weights in a folder, in the order in which they are looked for; sharded ones are found
            besides by their index.
        within_model: what the drafter's names start with where they may lie in one checkpoint with a whole model. If
            any name starts with it, the others are ignored, and neither fetched nor read into memory.

    Raises:
        FileNotFoundError: no such folder or weights; lists what there is.
        ValueError: a file that is truncated or holds more than tensors.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise FileNotFoundError(f"no checkpoint at {path}; expected a folder with {' or '.join(files)}, or a file")
        place = _download(path, files, within_model)
    folder = place if place.is_dir() else place.parent
    parts, beside = _parts(place, files, within_model) if place.is_dir() else ([place], [])
    weights: dict[str, Tensor] = {}
    for part in parts:
        found, others = _tensors(part, within_model)
        weights |= found
        beside += others
    config = folder / CONFIG
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return Checkpoint(weights, settings, path, beside)


def save(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], file: str = WEIGHTS) -> None:
    """Write weights and config into ``folder``, each file replaced at once; ``.pt`` and ``.bin`` names make pickles."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in weights.items()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch)
        if file.endswith(".safetensors"):
            save_file(plain, made / file, metadata={"format": "pt"})
        else:
            torch.save(plain, made / file)
        (made / CONFIG).write_text(json.dumps(dict(config), indent=1) + "\n", encoding="utf-8")
        for name in (file, CONFIG):
            (made / name).chmod(0o644)
            os.replace(made / name, folder / name)


def base_of(target: Target) -> dict[str, Any]:
    """What a saved drafter remembers of the target that it was trained for."""
    # Of the embedded target no folder of this machine.
    name = DEMO_NAME if is_demo(target.model) else getattr(target.model.config, "_name_or_path", "")
    return {
        BASE: name,
        "base_hidden_size": target.hidden_size,
        "base_vocab_size": target.vocab_size,
        "base_num_layers": target.num_layers,
    }


def why_other_base(config: Mapping[str, Any], target: Target) -> str | None:
    """Why a checkpoint with this config is not for this target; None where it may be.

    Compares what the config states: sizes, and the last part of the base model's name (folders are moved).
    """
    base, ours = config.get(BASE), base_of(target)
    for key in ("base_hidden_size", "base_vocab_size", "base_num_layers"):
        if key in config and config[key] != ours[key]:
            name = key.removeprefix("base_")
            return f"a checkpoint for this model; this one is for {base} with {name}={config[key]}, not {ours[key]}"
    if isinstance(base, str) and base and ours[BASE] and _stem(base) != _stem(ours[BASE]):
        return (
            f"a checkpoint for {ours[BASE]}; this one is for {base} (if they are the same model, change {BASE} in its "
            f"{CONFIG})"
        )
    return None


def _stem(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _parts(folder: Path, files: Sequence[str], within_model: str | None) -> tuple[list[Path], list[str]]:
    """The files to read, and the names in those that need not be."""
    for name in files:
        if (folder / name).is_file():
            return [folder / name], []
    for name in _INDICES:
        if (folder / name).is_file():
            file_of = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
            wanted = {file_of[key] for key in _wanted(file_of, within_model)}
            return [folder / part for part in sorted(wanted)], [key for key in file_of if file_of[key] not in wanted]
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"no weights in {folder}: expected {' or '.join(files)}, found {there}")


def _wanted(names: Iterable[str], within_model: str | None) -> list[str]:
    """The drafter's among these names: all of them, unless some are marked as lying within a whole model."""
    names = list(names)
    return [name for name in names if within_model is not None and name.startswith(within_model)] or names


def _tensors(file: Path, within_model: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The drafter's tensors in one file, and the names of the others."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the index of this checkpoint names it")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                found = {name: opened.get_tensor(name) for name in _wanted(names, within_model)}
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
        return found, [name for name in names if name not in found]
    try:
        # Mapped where the format allows it, so that only what is taken is read.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise ValueError(
            f"{file}: expected a pickle of tensors alone, whole; what needs more is not loaded, because it could run "
            f"any code ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    named = dict(_flat(loaded))
    if not named:
        raise ValueError(f"{file}: expected named tensors, got {type(loaded).__name__}")
    found = {name: named[name] for name in _wanted(named, within_model)}
    return found, [name for name in named if name not in found]


def _flat(loaded: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(loaded, Mapping):
        for name, value in loaded.items():
            if isinstance(value, Tensor):
                yield str(name), value
            elif name in ("state_dict", "model"):
                yield from _flat(value)


def _download(path: str, files: Sequence[str], within_model: str | None) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(path, allow_patterns=[CONFIG, *files, *_INDICES]))
    parts, _ = _parts(folder, files, within_model)
    missing = [part.name for part in parts if not part.is_file()]
    return Path(snapshot_download(path, allow_patterns=missing)) if missing else folder
