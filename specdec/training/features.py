"""States of the frozen target to learn from: computed as they are needed, or once and kept on disk.

On disk they are safetensors shards of whole rows beside an ``index.json`` that says whose they are. A shard appears
under its name when it is complete, so whatever stops the writing, what stands there is whole and is not made again.

Shapes: B rows of a batch, T tokens of a row, H hidden size.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from specdec.evaluation.records import replace_text
from specdec.identity import fingerprint
from specdec.interfaces import Tap
from specdec.routing import Route
from specdec.target import Target

INDEX = "index.json"
_LEAK = 0.05  # of the states' size; bfloat16 alone makes 0.01


class Texts(Protocol):
    """Packed texts: items are ``token_ids``, ``positions`` int64 ``[T]`` and ``wanted`` bool ``[T]``."""

    @property
    def fingerprint(self) -> str:
        """Of the content and its order."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class Frozen:
    """The target as a teacher: its states over packed texts, in its own dtype and without gradients.

    Args:
        target: in evaluation mode.
        taps: the states that are asked for; layers above the last of them do not run, nor does the head.
    """

    def __init__(self, target: Target, taps: Sequence[Tap]) -> None:
        self.target, self.taps = target, tuple(dict.fromkeys(taps))
        last = None if "final" in self.taps else max((tap for tap in self.taps if tap != "final"), default=0)
        self._route = Route(hi=last, logits=False)

    @torch.no_grad()
    def __call__(self, token_ids: Tensor, positions: Tensor) -> dict[Tap, Tensor]:
        """States of int64 ``[B, T]`` tokens at int64 ``[B, T]`` positions: tap -> ``[B, T, H]``.

        Texts do not see each other: given positions and neither a mask nor a cache, transformers masks across them.
        """
        if not self.taps:
            return {}
        router, device = self.target.router, self.target.device
        with router.route(self._route), router.taps(self.taps) as recorded:
            self.target.model(
                input_ids=token_ids.to(device), position_ids=positions.to(device), use_cache=False, return_dict=True
            )
        return {tap: parts[0] for tap, parts in recorded.items()}

    @property
    def bytes_per_token(self) -> int:
        """What the states of one token take."""
        return len(self.taps) * self.target.hidden_size * self.target.dtype.itemsize


def check_packed(target: Target) -> None:
    """Hold two texts in one row to each of them alone.

    Raises:
        ValueError: the model lets packed texts see each other.
    """
    ids = torch.linspace(0.1, 0.9, 14).mul(target.vocab_size).long()[None]
    positions, cut = torch.cat((torch.arange(6), torch.arange(8)))[None], 6
    final = Frozen(target, ("final",))
    packed = final(ids, positions)["final"].float()
    alone = [final(ids[:, part], positions[:, part])["final"] for part in (slice(cut), slice(cut, None))]
    expected = torch.cat(alone, dim=1).float()
    difference = (packed - expected).norm() / expected.norm()
    if not difference < _LEAK:
        raise ValueError(
            f"{target.name} lets texts that are packed into one row see each other (its states differ by "
            f"{float(difference):.0%} from those of each text alone); expected a model that masks by position_ids"
        )


class CachedTexts(Dataset[dict[str, Any]]):
    """Packed texts with the target's states over them on disk; items gain ``states``, tap -> ``[T, H]``.

    Args:
        texts: what the states are of.
        frozen: whose states; run for the shards that are missing.
        folder: made where it is missing.
        shard_bytes: size of a shard, in whole rows; at least one.
        overwrite: drop what the folder holds of other texts, another target or other taps.

    Raises:
        ValueError: the folder holds others' states and ``overwrite`` is off.
    """

    def __init__(
        self, texts: Texts, frozen: Frozen, folder: Path, shard_bytes: int = 256 * 2**20, overwrite: bool = False
    ) -> None:
        self.texts, self.frozen, self.folder = texts, frozen, folder
        length = texts[0]["token_ids"].shape[0]
        self._identity = {
            "texts": texts.fingerprint,
            "rows": len(texts),
            "length": length,
            "target": fingerprint(frozen.target),
            "taps": [str(tap) for tap in frozen.taps],
            "dtype": str(frozen.target.dtype).removeprefix("torch."),
        }
        self.row_bytes: int = length * frozen.bytes_per_token
        index = self._claim(overwrite) or {"rows_per_shard": max(shard_bytes // self.row_bytes, 1)}
        self.rows_per_shard: int = index["rows_per_shard"]
        self._names = {tap: str(tap) for tap in frozen.taps}

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = divmod(index, self.rows_per_shard)
        # Opened for each row: an open file cannot travel to the workers of a data loader.
        with safe_open(self._file(shard), framework="pt") as opened:
            states = {tap: opened.get_slice(name)[row : row + 1][0] for tap, name in self._names.items()}
        return {**self.texts[index], "states": states}

    @property
    def missing(self) -> list[int]:
        """Shards that are still to be made."""
        count = -(-len(self) // self.rows_per_shard)
        return [shard for shard in range(count) if not self._is_whole(shard)]

    @property
    def num_bytes(self) -> int:
        """What all shards take."""
        return len(self) * self.row_bytes

    @property
    def missing_rows(self) -> int:
        """Rows of the shards that are still to be made."""
        return sum(len(self._rows(shard)) for shard in self.missing)

    @property
    def missing_bytes(self) -> int:
        """What is still to be written."""
        return self.missing_rows * self.row_bytes

    def fill(self, batch_size: int, progress: Callable[[int], None]) -> None:
        """Make the missing shards.

        Args:
            batch_size: rows that the target reads at once.
            progress: told how many rows were made since it was told last.

        Raises:
            ValueError: there is too little room for them; says how much there is.
            OSError: the disk is full nevertheless.
        """
        self._drop_leftovers()
        check_room(self.folder, self.missing_bytes)
        text = json.dumps({**self._identity, "rows_per_shard": self.rows_per_shard}, indent=1)
        with _told_when_full(self.folder):
            replace_text(self.folder / INDEX, text + "\n")
            for shard in self.missing:
                write_shard(self._file(shard), self._compute(self._rows(shard), batch_size, progress))

    def _compute(self, rows: range, batch_size: int, progress: Callable[[int], None]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in self._names.values()}
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            batch = default_collate([self.texts[row] for row in chosen])
            for tap, states in self.frozen(batch["token_ids"], batch["positions"]).items():
                parts[self._names[tap]].append(states.cpu())
            progress(len(chosen))
        return {name: torch.cat(pieces) for name, pieces in parts.items()}

    def _claim(self, overwrite: bool) -> dict[str, Any] | None:
        path = self.folder / INDEX
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("rows_per_shard"), int):
            raise ValueError(f"{path} is no index of states; use another features.path=FOLDER")
        changed = [key for key, value in self._identity.items() if found.get(key) != value]
        if not changed:
            return found
        if not overwrite:
            what = "; ".join(f"{key}: {found.get(key)} -> {self._identity[key]}" for key in changed)
            raise ValueError(
                f"{self.folder} holds the states of another run ({what}); use features.overwrite=true or another "
                "features.path=FOLDER"
            )
        for file in self.folder.glob("shard-*.safetensors"):
            file.unlink()
        self._drop_leftovers()
        path.unlink()
        return None

    def _drop_leftovers(self) -> None:
        """Remove what a killed process had begun to write; nobody else writes here now."""
        for file in self.folder.glob(".shard-*.safetensors.*"):
            file.unlink(missing_ok=True)

    def _rows(self, shard: int) -> range:
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, len(self)))

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def _is_whole(self, shard: int) -> bool:
        if not (file := self._file(shard)).is_file():
            return False
        try:
            with safe_open(file, framework="pt") as opened:
                rows = {opened.get_slice(name).get_shape()[0] for name in self._names.values()}
        except SafetensorError:  # a disk that lost what it had promised to keep
            return False
        return rows == {len(self._rows(shard))}


def check_room(folder: Path, needed: int) -> None:
    """Whether a folder, made where it is missing, takes so many bytes more.

    Raises:
        ValueError: it does not; says how many it takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the target's states need {size(needed)} in {folder}, where {size(free)} are free; expected another "
            "features.path=FOLDER, or features.mode=online, which needs none"
        )


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in one move: it is there when it is whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # As bytes, because safetensors' own writer does not say why it failed.
        beside.write_bytes(save(dict(tensors)))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def size(num_bytes: int) -> str:
    """Bytes as people read them, ``1.5 GB``."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


@contextmanager
def _told_when_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk is full; finished shards in {folder} are kept: free some space and start the same command "
            "again, and it goes on from there (or use features.mode=online, which needs no space)",
        ) from error
