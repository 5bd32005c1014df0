"""From the config's `data` to packed texts: read, split into two sides, encoded, and their states kept where asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from specdec.commands._data import corpus_of
from specdec.commands._session import Session
from specdec.training.encoding import Encoder
from specdec.training.features import CachedTexts, Frozen, check_room, size
from specdec.training.packing import PackedTexts, split
from specdec.training.progress import Bar


@dataclass(frozen=True)
class Texts:
    """What a drafter learns from and what it is judged by.

    Attributes:
        train: packed texts.
        held_out: packed texts; None where nothing is held out.
        said: counts and fingerprints, for provenance.
    """

    train: Any
    held_out: Any | None
    said: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of both sides."""
        sides = [side["fingerprint"] for side in self.said.values()]
        return hashlib.sha256(" ".join(sides).encode()).hexdigest()[:16]


def check_length(session: Session) -> None:
    """The length of a row, which is the longest that a text may be, is one that the target reads.

    Raises:
        ValueError: it is not.
    """
    length, context = session.config["length"], session.loaded.context_length
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"expected length to be a whole number of at least 2, got {length!r}")
    if context is not None and length > context:
        raise ValueError(f"expected length to be at most {context}, which {session.loaded.name} reads; got {length}")


def check_features(features: Mapping[str, Any], frozen: Frozen) -> None:
    """Whether states can be had in the way that ``features`` asks for.

    Raises:
        ValueError: an unknown mode, no path, or nothing to keep.
    """
    mode, path, shard = features["mode"], features["path"], features["shard_mb"]
    if mode not in ("online", "cached"):
        raise ValueError(f"expected features.mode to be online or cached, got {mode!r}")
    if mode == "online":
        return
    if not frozen.taps:
        raise ValueError(
            "features.mode=cached keeps the states of a frozen target, and this loss reads none: the target learns "
            "too, so that its states change with every step; expected features.mode=online"
        )
    if path is None:
        raise ValueError("features.mode=cached needs features.path=FOLDER to keep the target's states in")
    if isinstance(shard, bool) or not isinstance(shard, int | float) or shard <= 0:
        raise ValueError(f"expected features.shard_mb to be a number above 0, got {shard!r}")


def texts_of(source: DictConfig, session: Session, console: Console) -> Texts:
    """Read, split, encode and pack what the config names.

    Args:
        source: the config, for its ``data``.
        session: the target, and the same config: ``limit``, ``chat``, ``length``, ``eval_share``, ``seed``.
        console: where lines and texts that are left out are named.

    Raises:
        ValueError: bad input; nothing to learn from; nothing held out although ``eval_share`` asks for it.
    """
    config = session.config
    limit = config["limit"]
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"expected limit to be a whole number of at least 1, got {limit!r}")
    corpus = corpus_of(source)
    _note(console, corpus.notes())
    documents = corpus.documents[:limit]
    learnt, judged = split(documents, config["eval_share"], config["seed"])
    if config["eval_share"] and not judged:
        raise ValueError(
            f"none of {len(documents)} texts is held out with eval_share={config['eval_share']}; expected more texts, "
            "a larger share, or eval_share=0, which trains without judging"
        )
    if not learnt:
        raise ValueError(f"all of {len(documents)} texts are held out (eval_share={config['eval_share']})")
    encoder, length = Encoder.of(session.loaded, config["chat"]), config["length"]
    sides: dict[str, PackedTexts] = {}
    for name, side in {"train": learnt, "held_out": judged}.items():
        if side:
            with Bar(console, f"texts encoded ({name})", len(side)) as bar:
                encoded = encoder.encode(side, length, bar.advance)
            _note(console, [f"{name}: {note}" for note in encoded.notes(length)])
            sides[name] = PackedTexts(encoded.texts, length, config["seed"], _padding(session))
    said = {name: _counts(side) for name, side in sides.items()}
    for name, counts in said.items():
        console.print(
            f"{name}: {counts['texts']:,} texts, {counts['tokens']:,} tokens ({counts['wanted']:,} to predict) in "
            f"{counts['rows']:,} rows of {length}, {counts['fill']:.0%} full",
            highlight=False,
        )
    return Texts(sides["train"], sides.get("held_out"), said)


def with_states(texts: Texts, frozen: Frozen, features: Mapping[str, Any], batch_size: int, console: Console) -> Texts:
    """The same texts with the target's states on disk, where ``features.mode`` is ``cached``.

    Args:
        texts: the packed ones.
        frozen: whose states.
        features: ``mode``, ``path``, ``shard_mb`` and ``overwrite``.
        batch_size: rows that the target reads at once.
        console: where the size is said before it starts, and the progress.

    Raises:
        ValueError: what ``check_features`` says, a folder with the states of something else, or too little room.
        OSError: the disk is full.
    """
    check_features(features, frozen)
    if features["mode"] == "online":
        return texts
    place, sides = Path(features["path"]).expanduser(), {"train": texts.train, "held_out": texts.held_out}
    made: dict[str, Any] = {
        name: CachedTexts(side, frozen, place / name, int(features["shard_mb"] * 2**20), features["overwrite"])
        for name, side in sides.items()
        if side is not None
    }
    total, missing = (sum(getattr(side, of) for side in made.values()) for of in ("num_bytes", "missing_bytes"))
    rows = sum(len(side) for side in made.values())
    with Bar(console, "rows", rows, rows - sum(side.missing_rows for side in made.values())) as bar:
        bar.note(
            f"the target's states take {size(total)} in {place}: {size(frozen.bytes_per_token)} per token, "
            f"{total // frozen.bytes_per_token:,} tokens, padding included; {size(missing)} are still to be made"
        )
        check_room(place, missing)  # of both sides, before the first is made
        for side in made.values():
            side.fill(batch_size, bar.advance)
    return replace(texts, **made)


def _counts(side: PackedTexts) -> dict[str, Any]:
    counts = {"texts": side.num_texts, "tokens": side.num_tokens, "wanted": side.num_wanted, "rows": len(side)}
    return counts | {"fill": round(side.fill, 3), "fingerprint": side.fingerprint[:16]}


def _padding(session: Session) -> int:
    tokenizer = session.loaded.tokenizer
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _note(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
