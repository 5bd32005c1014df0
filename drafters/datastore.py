"""Token corpora under suffix arrays, on disk: where a text's end occurs in them, and what follows there.

A datastore is a folder of shards, each a token array and the order of its suffixes, mapped into memory when opened.
Shards bound the memory that building takes; a search asks all of them. ``scripts/build_datastore.py`` makes one.

Layout: ``meta.json`` (what it was built from), ``tokens-0000.npy`` (unsigned, token + 1; 0 ends a document),
``suffixes-0000.npy`` (int32, the positions in order of the text that begins there), ...
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from specdec.target import Target

try:
    from pydivsufsort import divsufsort
except ImportError:  # the extra "retrieval"; suffixes are then sorted by numpy
    divsufsort = None

FORMAT = 1
HAS_LIBRARY = divsufsort is not None
MAX_HITS = 500
_PADDED_VOCABULARY = 1024  # models have up to so many logits more than their tokenizer has tokens


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` says.

    Attributes:
        tokenizer: its name or path when the datastore was built.
        vocab_size: its number of tokens.
        vocabulary: fingerprint of its tokens and their ids.
        shards: number of shards.
        tokens: tokens in all, ends of documents not counted.
        documents: documents in all.
        format: version of the layout.
    """

    tokenizer: str
    vocab_size: int
    vocabulary: str
    shards: int
    tokens: int
    documents: int
    format: int = FORMAT


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 over tokens and ids, the same for every copy of a tokenizer."""
    ordered = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()


def sort_suffixes(tokens: np.ndarray) -> np.ndarray:
    """Order of the suffixes of ``tokens`` (integers ``[T]``, T < 2^31): int32 ``[T]``.

    By ``pydivsufsort`` where it is installed, else by ``sort_suffixes_by_doubling``, several times slower.
    """
    if divsufsort is None or not len(tokens):
        return sort_suffixes_by_doubling(tokens)
    return divsufsort(tokens).astype(np.int32, copy=False)


def sort_suffixes_by_doubling(tokens: np.ndarray) -> np.ndarray:
    """The same in numpy alone: ranks of prefixes of length 1, 2, 4, ... until all differ (Manber and Myers 1990)."""
    size = len(tokens)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    order = np.argsort(rank, kind="stable")
    width = 1
    while width < size and int(rank[order[-1]]) < size - 1:
        behind = np.zeros(size, dtype=np.int64)  # 0 = the text has ended
        behind[: size - width] = rank[width:] + 1
        key = rank * (size + 1) + behind
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        rank[order] = np.concatenate(([0], (ordered[1:] != ordered[:-1]).cumsum()))
        width *= 2
    return order.astype(np.int32)


def write_shard(folder: Path, index: int, tokens: np.ndarray) -> None:
    """Sort and store one shard: ``tokens [T]`` as stored, the last one an end of document."""
    assert len(tokens) and tokens[-1] == 0, "a shard ends with its last document"
    np.save(folder / f"tokens-{index:04}.npy", tokens)
    np.save(folder / f"suffixes-{index:04}.npy", sort_suffixes(tokens))


def write_meta(folder: Path, meta: Meta) -> None:
    """Store ``meta.json``; written last, it says that the datastore is complete."""
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")


class Datastore:
    """A token corpus that can be searched; the arrays stay on disk until touched.

    Args:
        meta: what it was built from.
        shards: tokens and suffixes of each shard, as stored.
        name: its folder, for messages.
    """

    def __init__(self, meta: Meta, shards: list[tuple[np.ndarray, np.ndarray]], name: str = "in memory") -> None:
        self.meta, self.shards, self.name = meta, shards, name

    @classmethod
    def open(cls, path: str | Path) -> Datastore:
        """Map a datastore into memory.

        Raises:
            ValueError: there is none in this folder, it is incomplete or of another format.
        """
        folder = Path(path).expanduser()
        if not (folder / "meta.json").is_file():
            state = "an unfinished datastore" if any(folder.glob("tokens-*.npy")) else "no datastore"
            raise ValueError(f"{state} in {folder} (no meta.json); build one with scripts/build_datastore.py")
        try:
            meta = Meta(**json.loads((folder / "meta.json").read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / 'meta.json'} does not describe a datastore: {error}") from None
        if meta.format != FORMAT:
            raise ValueError(f"{folder} has format {meta.format}, expected {FORMAT}; build it anew")
        names = [[folder / f"{kind}-{i:04}.npy" for kind in ("tokens", "suffixes")] for i in range(meta.shards)]
        missing = [str(path) for pair in names for path in pair if not path.is_file()]
        if missing:
            raise ValueError(f"the datastore lacks {', '.join(missing)}; build it anew")
        # Plain views: indexing a memmap object costs more than the search itself.
        shards = [tuple(np.load(path, mmap_mode="r").view(np.ndarray) for path in pair) for pair in names]
        if any(tokens.shape != suffixes.shape for tokens, suffixes in shards):
            raise ValueError(f"tokens and suffixes in {folder} differ in number; build it anew")
        return cls(meta, shards, str(folder))

    def why_not(self, target: Target) -> str | None:
        """Why its tokens are not the target's; None where nothing speaks against it."""
        built = f"the datastore {self.name} was built with the tokenizer {self.meta.tokenizer!r}"
        spare = target.vocab_size - self.meta.vocab_size
        if not 0 <= spare <= _PADDED_VOCABULARY:
            return f"{built} of {self.meta.vocab_size} tokens; the target has {target.vocab_size}; build it anew"
        theirs = _local_vocabulary(getattr(target.model.config, "_name_or_path", ""))
        if theirs is not None and theirs != self.meta.vocabulary:
            return f"{built}, the target's tokenizer has other tokens or other ids; build it anew"
        return None

    def continuations(
        self, text: np.ndarray, min_match: int, max_match: int, depth: int, max_hits: int = MAX_HITS
    ) -> tuple[int, np.ndarray]:
        """What follows the occurrences of the text's longest suffix that occurs other than at a document's end.

        Args:
            text: int64 ``[T]``.
            min_match: shortest suffix that counts.
            max_match: longest suffix looked up.
            depth: tokens of each continuation.
            max_hits: occurrences per shard; of more, evenly spaced ones are taken, so that shares stay what they are.

        Returns:
            the length of the suffix (0 where none occurs) and int64 ``[H, depth]``, -1 past the end of a document.
        """
        wanted = (text[max(len(text) - max_match, 0) :] + 1).tolist()
        low, high, best = min_match, len(wanted), (0, [(0, 0)] * len(self.shards))
        while low <= high:  # a suffix of a suffix that occurs occurs, so lengths can be bisected
            length = (low + high) // 2
            found = [_interval(*shard, wanted[len(wanted) - length :]) for shard in self.shards]
            if any(stop > start for start, stop in found):
                low, best = length + 1, (length, found)
            else:
                high = length - 1
        length, found = best
        rows = [
            _read(tokens, suffixes[_spread(*interval, max_hits)] + length, depth)
            for (tokens, suffixes), interval in zip(self.shards, found, strict=True)
        ]
        return length, np.concatenate(rows)


def _interval(tokens: np.ndarray, suffixes: np.ndarray, wanted: list[int]) -> tuple[int, int]:
    """Where in ``suffixes`` those lie that begin with ``wanted`` and go on; the ends of documents sort before those."""
    length = len(wanted)
    start = bisect_left(suffixes, [*wanted, 1], key=lambda at: tokens[at : at + length + 1].tolist())
    return start, bisect_right(suffixes, wanted, lo=start, key=lambda at: tokens[at : at + length].tolist())


def _spread(start: int, stop: int, limit: int) -> np.ndarray:
    count = min(stop - start, limit)
    return start + np.arange(count) * (stop - start) // max(count, 1)


def _read(tokens: np.ndarray, positions: np.ndarray, depth: int) -> np.ndarray:
    """int64 ``[H, depth]``: the tokens from each position on, -1 from the end of its document on."""
    columns = np.minimum(positions[:, None] + np.arange(depth), len(tokens) - 1)  # the last entry ends a document
    stored = tokens[columns].astype(np.int64)
    stored[np.logical_or.accumulate(stored == 0, axis=1)] = 0
    return stored - 1


def _local_vocabulary(path: str) -> str | None:
    """Fingerprint of the tokenizer in a local folder; None where there is none to look at."""
    if not path or not (Path(path) / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return vocabulary_fingerprint(AutoTokenizer.from_pretrained(path).get_vocab())
    except (ValueError, OSError):  # one that needs code of its own, or an incomplete copy: nothing to compare with
        return None
