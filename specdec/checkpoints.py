"""Weights of drafters on disk: any of the formats they are published in, every key of which is accounted for.

A checkpoint is a folder (or a hub repository) with a ``config.json`` and the weights, or a file of weights. Pickles are
read with ``weights_only=True``: one that needs more than tensors is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.identity import fingerprint
from specdec.loading import is_demo
from specdec.target import Target

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
BASE = "base_model_name_or_path"
FINGERPRINT = "base_fingerprint"
DEMO_NAME = "specdec/demo/target"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list[list[float]]: "a list of lists of numbers, none of them empty",
}
_NEEDED: Any = object()
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/[^/]+$")  # of the hub's cache
Kind = TypeVar("Kind")


class Checkpoint:
    """The weights of one drafter, taken key by key; ``close`` says what nobody asked for.

    Args:
        weights: name -> tensor.
        config: of the drafter, as published; empty where there is none.
        place: what errors call it.
        beside: names of a whole model's tensors, among which the drafter's lie and which were not read.
        ignored: what else the file holds, with the reason.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: Mapping[str, Any],
        place: str,
        beside: Sequence[str] = (),
        ignored: Sequence[str] = (),
    ) -> None:
        self._weights = dict(weights)
        self.config = dict(config)
        self.place = place
        self.in_whole_model = bool(beside)
        self.ignored = [f"{name} (of the whole model, not of the drafter)" for name in beside]
        self.ignored += ignored

    @overload
    def setting(self, key: str, kind: type[Kind], default: None, *, least: float | None = None) -> Kind | None: ...

    @overload
    def setting(self, key: str, kind: type[Kind], default: Kind = ..., *, least: float | None = None) -> Kind: ...

    def setting(self, key: str, kind: Any, default: Any = _NEEDED, *, least: float | None = None) -> Any:
        """An entry of the config, checked: anybody may have written it.

        Args:
            key: its name; ``outer.inner`` is an entry of an entry.
            kind: ``int``, ``float`` (whole numbers become one), ``str``, ``bool``, ``dict`` or ``list[list[float]]``,
                which is ``[K][R]`` with K >= 1 and every R >= 1.
            default: where the config has no such entry; without one there must be. With None, ``null`` is read as none.
            least: a number must not be below.

        Raises:
            ValueError: there is none, or of another kind; names file, key, what was got and what was expected.
        """
        what = _KINDS[kind] + (f" of at least {least}" if least is not None else "")
        value: Any = self.config
        for number, part in enumerate(parts := key.split(".")):
            if not isinstance(value, Mapping):
                where = ".".join(parts[:number])
                raise ValueError(f"{self.place}: expected {where!r} in its {CONFIG} to be an object, got {value!r:.60}")
            if part not in value:
                if default is _NEEDED:
                    raise ValueError(f"{self.place}: expected {key!r} in its {CONFIG}, {what}; got none")
                return default
            value = value[part]
        if value is None and default is None:
            return None
        fits = _is(value, kind)
        if not fits or (least is not None and value < least):
            raise ValueError(f"{self.place}: expected {key!r} in its {CONFIG} to be {what}, got {value!r:.60}")
        if kind is float:
            return float(value)
        return [[float(number) for number in row] for row in value] if kind == list[list[float]] else value

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
        ValueError: a file that is truncated or holds more than tensors, a config that is no JSON object, or a hub id
            that cannot be fetched.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise FileNotFoundError(f"no checkpoint at {path}; expected a folder with {' or '.join(files)}, or a file")
        if place.parent.is_dir():  # nobody who has the folder means a hub's user by it
            there = ", ".join(sorted(found.name for found in place.parent.iterdir())[:5]) or "nothing"
            raise FileNotFoundError(f"no checkpoint at {path}: {place.parent} is a folder here, and holds {there}")
        place = _download(path, files, within_model)
    folder = place if place.is_dir() else place.parent
    parts, beside = _parts(place, files, within_model) if place.is_dir() else ([place], [])
    weights: dict[str, Tensor] = {}
    ignored: list[str] = []
    for part in parts:
        found, others, odd = _tensors(part, within_model)
        weights |= found
        beside += others
        ignored += odd
    settings = _object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return Checkpoint(weights, settings, path, beside, ignored)


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
    name = DEMO_NAME if is_demo(target.model) else _known_as(getattr(target.model.config, "_name_or_path", ""))
    return {
        BASE: name,
        "base_hidden_size": target.hidden_size,
        "base_vocab_size": target.vocab_size,
        "base_num_layers": target.num_layers,
    }


def saved_base(target: Target) -> dict[str, Any]:
    """``base_of``, and the fingerprint by which the target is known again whatever its folder is called."""
    return base_of(target) | {FINGERPRINT: fingerprint(target)}


def why_other_base(config: Mapping[str, Any], target: Target) -> str | None:
    """Why a checkpoint with this config is not for this target; None where it may be.

    Compares what the config states: sizes, and the last part of the base model's name (folders are moved, and those of
    the hub's cache go by the name of their repository). Another name does where the weights are known to be the same.
    """
    base, ours = config.get(BASE), base_of(target)
    for key in ("base_hidden_size", "base_vocab_size", "base_num_layers"):
        if key in config and config[key] != ours[key]:
            name = key.removeprefix("base_")
            return f"a checkpoint for this model; this one is for {base} with {name}={config[key]!r}, not {ours[key]}"
    if isinstance(base, str) and base and ours[BASE] and _stem(base) != _stem(ours[BASE]):
        if FINGERPRINT in config and config[FINGERPRINT] == fingerprint(target):
            return None
        return (
            f"a checkpoint for {ours[BASE]}; this one is for {base} (if they are the same model, change {BASE} in its "
            f"{CONFIG})"
        )
    return None


def _stem(name: str) -> str:
    return os.path.basename(os.path.abspath(os.path.expanduser(_known_as(name)))).lower()


def _known_as(name: str) -> str:
    """A folder of the hub's cache by its repository's id; what depends on where one stands, as a whole path."""
    bare = name.rstrip("/")
    snapshot = _SNAPSHOT.search(bare)
    if snapshot:
        return snapshot[1].replace("--", "/")
    return os.path.abspath(bare) if bare.startswith(".") else bare


def _is(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a kind; booleans are no numbers, nor is what has no place on the line of them."""
    if kind == list[list[float]]:
        rows = isinstance(value, list) and value and all(isinstance(row, list) and row for row in value)
        return bool(rows) and all(_is(number, float) for row in value for number in row)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def _parts(folder: Path, files: Sequence[str], within_model: str | None) -> tuple[list[Path], list[str]]:
    """The files to read, and the names in those that need not be."""
    for name in files:
        if (folder / name).is_file():
            return [folder / name], []
    for name in _INDICES:
        if (folder / name).is_file():
            file_of = _object(folder / name).get("weight_map")
            if not isinstance(file_of, dict) or not all(isinstance(part, str) for part in file_of.values()):
                raise ValueError(f"{folder / name}: expected a weight_map, tensor to file; got {file_of!r:.60}")
            wanted = {file_of[key] for key in _wanted(file_of, within_model)}
            return [folder / part for part in sorted(wanted)], [key for key in file_of if file_of[key] not in wanted]
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"no weights in {folder}: expected {' or '.join(files)}, found {there}")


def _wanted(names: Iterable[str], within_model: str | None) -> list[str]:
    """The drafter's among these names: all of them, unless some are marked as lying within a whole model."""
    names = list(names)
    return [name for name in names if within_model is not None and name.startswith(within_model)] or names


def _tensors(file: Path, within_model: str | None) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The drafter's tensors in one file, the names of the others, and what is no tensor, with the reason."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the index of this checkpoint names it")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                found = {name: opened.get_tensor(name) for name in _wanted(names, within_model)}
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
        return found, [name for name in names if name not in found], []
    try:
        # Mapped where the format allows it, so that only what is taken is read.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise ValueError(
            f"{file}: expected a pickle of tensors alone, whole; what needs more is not loaded, because it could run "
            f"any code ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    flat = dict(_flat(loaded))
    named = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    if not named:
        raise ValueError(f"{file}: expected named tensors, got {type(loaded).__name__}")
    found = {name: named[name] for name in _wanted(named, within_model)}
    odd = [f"{name} (no tensor but {type(value).__name__})" for name, value in flat.items() if name not in named]
    return found, [name for name in named if name not in found], odd


def _flat(loaded: Any) -> Iterator[tuple[str, Any]]:
    """What a pickle holds by name; the weights of a whole training state stand beside the rest of it."""
    if isinstance(loaded, Mapping):
        for name, value in loaded.items():
            if name in ("state_dict", "model") and isinstance(value, Mapping):
                yield from _flat(value)
            else:
                yield str(name), value


def _download(path: str, files: Sequence[str], within_model: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetched(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(path, allow_patterns=patterns))
        except Exception as error:  # whatever the hub's client and what it stands on raise
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{path} is no folder here, and the hub did not give it ({type(error).__name__}: {reason}); expected a "
                f"folder with {' or '.join(files)}, or the id of a repository that can be reached"
            ) from error

    folder = fetched([CONFIG, *files, *_INDICES])
    parts, _ = _parts(folder, files, within_model)
    missing = [part.name for part in parts if not part.is_file()]
    return fetched(missing) if missing else folder
