"""Rows of a fixed length with several texts each, and the split of a corpus into two sides.

A row is what one line of a training batch holds: texts one after the other, positions that begin again with each, and
padding at the end, which is a text of its own that nobody wants predicted::

    token_ids  a a a a b b b 0     texts a and b, one padding token
    positions  0 1 2 3 0 1 2 0     a 0 starts a text
    wanted     . . x x . x x .     an assistant's tokens

Shapes: T tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from specdec.training.corpus import Document
from specdec.training.encoding import EncodedText


class PackedTexts(Dataset):
    """Texts in as few rows as best-fit packing finds, the longest first.

    Args:
        texts: none longer than ``length``.
        length: T.
        seed: of the order of the rows, and of which of two texts of one length comes first.
        pad: token id of the padding.

    Attributes:
        num_texts: how many texts there are.
        num_tokens: of all texts, padding not counted.
        num_wanted: of them those to be predicted.

    Raises:
        ValueError: no texts, or one that is empty or too long.
    """

    def __init__(self, texts: Sequence[EncodedText], length: int, seed: int = 0, pad: int = 0) -> None:
        sizes = np.array([len(text.token_ids) for text in texts], np.int64)
        if not len(texts) or sizes.min() < 1 or sizes.max() > length:
            got = f"{sizes.min()} to {sizes.max()} tokens" if len(texts) else "none"
            raise ValueError(f"expected texts of 1 to {length} tokens, got {got}")
        self.length, self.pad = length, pad
        self.num_texts, self.num_tokens = len(texts), int(sizes.sum())
        self.num_wanted = int(sum(text.wanted.sum() for text in texts))
        self._token_ids = np.concatenate([text.token_ids for text in texts])
        self._wanted = np.concatenate([text.wanted for text in texts])
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._rows = pack(sizes, length, seed)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row: ``token_ids`` and ``positions`` int64 ``[T]``, ``wanted`` bool ``[T]``."""
        token_ids = np.full(self.length, self.pad, np.int64)
        positions, wanted = np.zeros(self.length, np.int64), np.zeros(self.length, np.bool_)
        done = 0
        for text in self._rows[index]:
            first, last = self._starts[text], self._starts[text + 1]
            end = done + last - first
            token_ids[done:end], wanted[done:end] = self._token_ids[first:last], self._wanted[first:last]
            positions[done:end] = np.arange(end - done)
            done = end
        positions[done:] = np.arange(self.length - done)
        arrays = {"token_ids": token_ids, "positions": positions, "wanted": wanted}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is no padding."""
        return self.num_tokens / (len(self) * self.length)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the rows hold, in their order."""
        digest = hashlib.sha256(f"{self.length} {self.pad}".encode())
        for row in self._rows:
            digest.update(np.asarray(row, "<i8").tobytes() + b"|")
        for array in (self._token_ids.astype("<i4"), self._wanted, self._starts.astype("<i8")):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def pack(sizes: np.ndarray, length: int, seed: int) -> list[list[int]]:
    """Which texts go into which row: the longest first, each into the row where it leaves least room.

    Args:
        sizes: int64 ``[n]``, tokens of each text, at most ``length``.
        length: tokens of a row.
        seed: of the order.

    Returns:
        For each row the numbers of its texts.
    """
    order = np.random.default_rng(seed)
    shuffled = order.permutation(len(sizes))
    rows = list[list[int]]()
    # Rows by the room they have left; an entry of ``has_room`` says whether there is such a row.
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    has_room = np.zeros(length + 1, np.bool_)
    for text in shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist():
        size = int(sizes[text])
        room = size + int(has_room[size:].argmax())
        if has_room[room]:
            row = by_room[room].pop()
            has_room[room] = bool(by_room[room])
            rows[row].append(text)
        else:
            room, row = length, len(rows)
            rows.append([text])
        by_room[room - size].append(row)
        has_room[room - size] = True
    return [rows[index] for index in order.permutation(len(rows))]


def split(documents: Sequence[Document], share: float, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """Documents to learn from, and a share of them held out, by a hash of their content.

    A document's side depends on itself alone: lines that are added to a corpus move no other, and copies of a text
    never stand on both sides.

    Args:
        documents: those of a corpus.
        share: of the documents to be held out, on average; 0 = none.
        seed: another one draws another share.

    Raises:
        ValueError: a share outside of [0, 1).
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ValueError(f"expected the share held out to be at least 0 and below 1, got {share!r}")
    sides: tuple[list[Document], list[Document]] = [], []
    for document in documents:
        drawn = hashlib.sha256(f"{seed}/".encode() + document.digest).digest()
        sides[int.from_bytes(drawn[:8], "big") < share * 2**64].append(document)
    return sides
