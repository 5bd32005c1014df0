"""Rows of several texts, and the split: nothing lost, nothing torn, the same every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from specdec.training.corpus import Document
from specdec.training.encoding import EncodedText
from specdec.training.objectives import wanted_ahead
from specdec.training.packing import PackedTexts, pack, split


def text(*ids: int, wanted: int = 1) -> EncodedText:
    """A text whose last tokens are wanted."""
    return EncodedText(np.array(ids, np.int32), np.arange(len(ids)) >= len(ids) - wanted)


def some(count: int, longest: int, seed: int = 0) -> list[EncodedText]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest + 1, count)
    return [text(*rng.integers(1, 90, size).tolist(), wanted=int(rng.integers(0, size + 1))) for size in sizes]


def texts_in(packed: PackedTexts) -> list[tuple[list[int], list[bool]]]:
    """The texts of all rows, told apart by their positions; padding left out."""
    found = []
    for index in range(len(packed)):
        row = packed[index]
        starts = torch.where(row["positions"] == 0)[0].tolist()
        for first, last in zip(starts, [*starts[1:], packed.length], strict=True):
            assert row["positions"][first:last].tolist() == list(range(last - first))
            found.append((row["token_ids"][first:last].tolist(), row["wanted"][first:last].tolist()))
    return [item for item in found if set(item[0]) != {packed.pad}]


def test_the_worked_example() -> None:
    packed = PackedTexts([text(5, 6, 7, 8, wanted=2), text(9, 10, 11, wanted=2)], length=8)
    row = packed[0]
    assert row["token_ids"].tolist() == [5, 6, 7, 8, 9, 10, 11, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert row["wanted"].tolist() == [False, False, True, True, False, True, True, False]
    assert {name: value.dtype for name, value in row.items()} == {
        "token_ids": torch.int64,
        "positions": torch.int64,
        "wanted": torch.bool,
    }
    assert (len(packed), packed.num_texts, packed.num_tokens, packed.num_wanted) == (1, 2, 7, 4)
    assert packed.fill == 7 / 8
    assert PackedTexts([text(5, 6)], length=5)[0]["positions"].tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("longest", [1, 7, 32])
def test_every_text_is_whole_and_there_once(longest: int) -> None:
    texts = some(300, longest)
    packed = PackedTexts(texts, length=32)
    expected = sorted((item.token_ids.tolist(), item.wanted.tolist()) for item in texts)
    assert sorted(texts_in(packed)) == expected
    assert packed.num_tokens == sum(len(item.token_ids) for item in texts)


def test_padding_is_never_wanted_and_never_seen_ahead() -> None:
    packed = PackedTexts(some(40, 9), length=16, pad=93)
    for index in range(len(packed)):
        row = packed[index]
        pad = row["token_ids"] == 93
        assert not row["wanted"][pad].any()
        for steps in (1, 2):
            ahead = wanted_ahead(row["positions"][None], row["wanted"][None], steps)[0]
            for place in torch.where(ahead)[0].tolist():
                assert row["positions"][place + steps] == row["positions"][place] + steps
                assert not pad[place]


def test_best_fit_as_its_definition_says() -> None:
    sizes = np.random.default_rng(3).integers(1, 40, 500)
    rows = pack(sizes, 64, seed=1)
    loads = sorted(sum(int(sizes[text]) for text in row) for row in rows)
    room: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        best = min((index for index, left in enumerate(room) if left >= size), key=lambda i: room[i], default=None)
        if best is None:
            room.append(64 - size)
        else:
            room[best] -= size
    assert loads == sorted(64 - left for left in room)
    assert len(rows) <= 1.02 * np.ceil(sizes.sum() / 64)


def test_the_seed_decides_the_order() -> None:
    texts = some(60, 9)
    first, again, other = (PackedTexts(texts, 16, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert sorted(texts_in(first)) == sorted(texts_in(other))
    assert all(torch.equal(first[3][name], again[3][name]) for name in first[3])


def test_the_fingerprint_is_of_everything_that_a_row_holds() -> None:
    texts = some(20, 9)
    mine = PackedTexts(texts, 16).fingerprint
    other_ids = [EncodedText(texts[0].token_ids + 1, texts[0].wanted), *texts[1:]]
    other_wanted = [EncodedText(texts[0].token_ids, ~texts[0].wanted), *texts[1:]]
    assert len({mine, *(PackedTexts(made, 16).fingerprint for made in (other_ids, other_wanted))}) == 3
    assert PackedTexts(texts, 17).fingerprint != mine
    assert PackedTexts(texts, 16, pad=1).fingerprint != mine
    joined = EncodedText(np.array([1, 2, 3, 4], np.int32), np.zeros(4, np.bool_))
    halves = [EncodedText(joined.token_ids[part], joined.wanted[part]) for part in (slice(0, 2), slice(2, 4))]
    assert PackedTexts([joined], 4).fingerprint != PackedTexts(halves, 4).fingerprint


@pytest.mark.parametrize(
    ("texts", "got"), [([], "got none"), ([text(*range(1, 10))], "got 9 to 9 tokens"), ([text()], "got 0 to 0 tokens")]
)
def test_texts_that_do_not_fit(texts: list[EncodedText], got: str) -> None:
    with pytest.raises(ValueError, match=f"expected texts of 1 to 8 tokens, {got}"):
        PackedTexts(texts, 8)


def documents(count: int) -> list[Document]:
    return [Document(text=f"text number {index}", document_id=index) for index in range(count)]


def test_the_split_stays_when_lines_come_and_go() -> None:
    every = documents(2000)
    train, held = split(every, 0.1)
    assert len(train) + len(held) == 2000
    assert 150 < len(held) < 250
    some_train, some_held = split(every[::3], 0.1)
    assert some_held == [document for document in every[::3] if document in held]
    assert some_train == [document for document in every[::3] if document in train]
    assert split(every, 0.1) == (train, held)
    assert split(every, 0.1, seed=1)[1] != held


def test_copies_of_a_text_are_on_one_side() -> None:
    twice = [*documents(200), *(Document(text=document.text, document_id="again") for document in documents(200))]
    train, held = split(twice, 0.5)
    assert held
    assert not {document.text for document in train} & {document.text for document in held}
    assert split(twice, 0) == (twice, [])


@pytest.mark.parametrize("share", [-0.1, 1, "a", True, float("nan")])
def test_a_share_out_of_range(share: Any) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1, got"):
        split(documents(3), share)
