"""REST against brute force: the longest suffix, its continuations, the datastore on disk and the script that makes it.

Shapes: T tokens of a text, H occurrences.
"""

from __future__ import annotations

import json
import random
import re
import runpy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from drafters import datastore
from drafters.datastore import Datastore, Meta, sort_suffixes, sort_suffixes_by_doubling, write_meta, write_shard
from drafters.rest import Rest
from specdec.interfaces import DecodeState, History
from specdec.loading import DEMO_FOLDER, demo_target
from specdec.target import Target
from test_contract import generate, model_of, prompts
from zoo import VOCAB

ROOT = Path(__file__).resolve().parent.parent
build_datastore: Callable[[Sequence[str]], None] = runpy.run_path(str(ROOT / "scripts" / "build_datastore.py"))["main"]

Documents = list[list[int]]


@pytest.mark.parametrize("sort", [sort_suffixes, sort_suffixes_by_doubling])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_suffixes_are_sorted(sort: Callable[[np.ndarray], np.ndarray], dtype: type) -> None:
    generator = np.random.default_rng(0)
    for symbols in (1, 2, 5, 60_000):
        for size in (0, 1, 2, 3, 17, 200):
            # Steps of 257 so that the order of the bytes matters.
            tokens: np.ndarray = (generator.integers(symbols, size=size) * 257 % 65_000).astype(dtype)
            order = sort(tokens)
            assert order.dtype == np.int32
            assert order.tolist() == sorted(range(size), key=lambda at: tokens[at:].tolist())


def stored(documents: Documents, shards: int = 1, vocab_size: int = VOCAB) -> Datastore:
    parts = [documents[index::shards] for index in range(shards)]
    arrays = []
    for part in parts:
        flat = [stored for document in part for stored in [*(token + 1 for token in document), 0]]
        arrays.append(np.array(flat, dtype=np.uint16))
    tokens = sum(map(len, documents))
    meta = Meta("a tokenizer", vocab_size, "", shards, tokens, len(documents))
    return Datastore(meta, [(array, sort_suffixes(array)) for array in arrays])


def brute_force(documents: Documents, text: list[int], shortest: int, longest: int, depth: int) -> tuple[int, Any]:
    """By the definition: length of the longest suffix that occurs, and how often each prefix of what follows does."""
    for size in range(min(longest, len(text)), shortest - 1, -1):
        follows = [
            document[at + size : at + size + depth]
            for document in documents
            for at in range(len(document) - size)
            if document[at : at + size] == text[len(text) - size :]
        ]
        if follows:
            return size, Counter(tuple(path[:n]) for path in follows for n in range(1, len(path) + 1))
    return 0, Counter()


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*paths[parent], token))
    assert len(set(paths)) == len(paths), "siblings hold distinct tokens"
    return paths[1:]


@pytest.mark.parametrize("shards", [1, 3])
def test_trie_equals_brute_force(shards: int) -> None:
    source = random.Random(shards)
    drafter, matched = Rest(num_nodes=7, depth=3, max_match=5, min_match=1), 0
    for symbols in (2, 3, 6):
        for _ in range(60):
            documents = [[source.randrange(symbols) for _ in range(source.randrange(12))] for _ in range(5)]
            drafter.corpus = stored(documents, shards)
            text = [source.randrange(symbols) for _ in range(source.randrange(1, 9))]
            size, counts = brute_force(documents, text, 1, 5, 3)
            length, rows = drafter.corpus.continuations(np.array(text), 1, 5, 3)
            assert length == size
            assert len(rows) == sum(
                document[at : at + size] == text[len(text) - size :]
                for document in documents
                for at in range(len(document) - size)
            ) * (size > 0)
            paths = paths_of(*drafter.lookup(np.array(text)))
            best = sorted(counts.values(), reverse=True)[:7]
            assert [counts[path] for path in sorted(paths, key=lambda path: -counts[path])] == best
            matched += size > 1
    assert matched > 50


def test_own_text_equals_a_datastore_of_it() -> None:
    source = random.Random(1)
    for _ in range(200):
        text = [source.randrange(3) for _ in range(source.randrange(1, 30))]
        drafter = Rest(num_nodes=500, depth=3, max_match=4, min_match=2)
        _, counts = brute_force([text], text, 2, 4, 3)
        assert sorted(paths_of(*drafter.lookup(np.array(text)))) == sorted(counts)


def test_the_more_recent_goes_first_among_equals() -> None:
    text = np.array([1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2])
    assert Rest(num_nodes=1).lookup(text) == ([5], [0])
    assert sorted(Rest(num_nodes=2, depth=1).lookup(text)[0]) == [4, 5]
    text = np.array([1, 2, 3, 1, 2, 3, 1, 2, 5, 1, 2])
    assert Rest(num_nodes=1).lookup(text) == ([3], [0]), "a count before recency"


def test_of_many_occurrences_an_even_sample() -> None:
    store = stored([[1, token] for token in range(5, 95)])
    _, rows = store.continuations(np.array([1]), 1, 4, 1, max_hits=9)
    assert rows[:, 0].tolist() == list(range(5, 95, 10))


def state_of(rows: Documents, finished: list[bool]) -> DecodeState:
    root = torch.tensor([row[-1] for row in rows])
    return DecodeState(None, History(rows), root, [1] * len(rows), finished, torch.Generator())  # type: ignore[arg-type]


def test_a_trie_per_row() -> None:
    drafter = Rest(num_nodes=3, min_match=1)
    drafter.corpus = stored([[1, 2, 3], [1, 2, 3], [1, 2, 4], [0, 0]])
    tree = drafter.propose(state_of([[9, 1], [2], [7], [1], [0]], [False, False, False, True, False]))
    tree.check()
    assert tree.role is not None
    assert tree.token_ids.where(tree.role == 0, -1).tolist() == [
        [1, 2, 3, 4],
        [2, 3, 4, -1],
        [7, -1, -1, -1],
        [1, -1, -1, -1],
        [0, 0, -1, -1],
    ]
    assert tree.parents[:2].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert tree.sources == ("rest",)
    assert drafter.needs.max_nodes == 4


class Bare:
    """As much of a target as ``fit`` looks at."""

    def __init__(self, vocab_size: int, path: str = "") -> None:
        self.vocab_size, self.model = vocab_size, SimpleNamespace(config=SimpleNamespace(_name_or_path=path))


def reason(drafter: Rest, vocab_size: int, path: str = "") -> str:
    return str(drafter.fit(cast(Target, Bare(vocab_size, path))))


def test_a_datastore_of_another_vocabulary_is_refused_by_name() -> None:
    drafter = Rest()
    assert drafter.fit(cast(Target, Bare(5))) is None
    drafter.corpus = stored([[1, 2]], vocab_size=4000)
    assert drafter.fit(cast(Target, Bare(4096))) is None, "models pad their vocabulary"
    for size in (3999, 50_000):
        assert f"'a tokenizer' of 4000 tokens; the target has {size}" in reason(drafter, size)
    assert "other tokens or other ids" in reason(drafter, 4096, str(DEMO_FOLDER))


@pytest.fixture
def built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """A datastore of the demo target's tokenizer, and what its making said."""
    lines = [json.dumps({"question": f"def add_{n}(a, b):", "turns": ["    return a + b", "pass"]}) for n in range(40)]
    lines[3:3] = ["{broken", "[1]", json.dumps({"question": 3, "turns": []}), json.dumps({"turns": "x"}), ""]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("the quick brown fox\n" * 20, encoding="utf-8")
    files = [str(tmp_path / name) for name in ("records.jsonl", "notes.txt")]
    build_datastore([*files, "--tokenizer", str(DEMO_FOLDER), "--output", str(tmp_path / "store")]
        + ["--fields", "question", "turns", "--shard-tokens", "300"])  # fmt: skip
    return tmp_path / "store", capsys.readouterr().err


def test_the_script_streams_names_and_counts_malformed_lines(built: tuple[Path, str]) -> None:
    folder, said = built
    for line, why in ((4, "Expecting property name"), (5, "expected an object, got list"), (6, "expected a string")):
        assert f"records.jsonl:{line}: " in said
        assert why in said
    assert "records.jsonl:7: no field 'question'; it has turns" in said
    assert "41 documents" in said
    assert "4 malformed line(s) skipped" in said
    store = Datastore.open(folder)
    assert store.meta.documents == 41
    assert store.meta.shards == len(store.shards) > 1
    assert sum(len(tokens) for tokens, _ in store.shards) == store.meta.tokens + 41
    assert all(tokens.base is not None for tokens, _ in store.shards), "mapped, not read"
    tokenizer = demo_target().tokenizer
    text = np.array(tokenizer("def add_77(a, b):\n    return", add_special_tokens=False)["input_ids"])
    _, rows = store.continuations(text, 1, 16, 3)
    assert len(rows) == 4, "7, 17, 27 and 37 end likewise"
    assert tokenizer.decode(rows[0]) == " a + b"


def test_drafting_from_disk_keeps_the_text(tmp_path: Path) -> None:
    loaded = demo_target("float32")
    inputs = {"input_ids": loaded.encode("def add_5(a, b):", chat=False)}
    expected, _ = generate(loaded.model, "none", inputs)
    (tmp_path / "known.txt").write_text(loaded.tokenizer.decode(expected.sequences[0]), encoding="utf-8")
    store = str(tmp_path / "store")
    build_datastore([str(tmp_path / "known.txt"), "--tokenizer", str(DEMO_FOLDER), "--output", store])
    drafter = Rest(path=store, min_match=1)
    output, _ = generate(loaded.model, drafter, inputs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.speculation.mean_accepted_tokens > 4, "the store knows the text"
    with pytest.raises(ValueError, match="the target has 97"):
        generate(model_of("llama"), drafter, prompts(1))


def test_the_script_refuses(built: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes, new = str(tmp_path / "notes.txt"), str(tmp_path / "new")
    (tmp_path / "empty.jsonl").write_text("nothing\n", encoding="utf-8")
    for arguments, message in (
        ([notes, "--output", str(built[0])], "holds a datastore"),
        ([str(tmp_path / "gone"), "--output", new], "no such file"),
        ([notes, "--output", new, "--shard-tokens", "0"], "expected 1 to"),
        ([str(tmp_path / "empty.jsonl"), "--output", new], "no document in .*empty.jsonl .1 malformed"),
    ):
        with pytest.raises(SystemExit) as error:
            build_datastore([*arguments, "--tokenizer", str(DEMO_FOLDER)])
        assert error.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(message, said)


def test_without_the_library_numpy_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.array([3, 1, 2, 3, 1, 0], dtype=np.uint16)
    expected = sort_suffixes(tokens)
    monkeypatch.setattr(datastore, "divsufsort", None)
    assert sort_suffixes(tokens).tolist() == expected.tolist()


def test_broken_datastores_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no datastore in .*; build one with scripts/build_datastore"):
        Rest(path=str(tmp_path / "gone"))
    write_shard(tmp_path, 0, np.array([1, 2, 0], np.uint16))
    with pytest.raises(ValueError, match="an unfinished datastore"):
        Rest(path=str(tmp_path))
    for meta, message in (
        (Meta("t", 9, "", 2, 2, 1), "lacks .*tokens-0001.npy"),
        (Meta("t", 9, "", 1, 2, 1, format=7), "format 7, expected 1"),
    ):
        write_meta(tmp_path, meta)
        with pytest.raises(ValueError, match=message):
            Datastore.open(tmp_path)
    for text in ("{", '{"tokens": 1}', "[]"):
        (tmp_path / "meta.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="does not describe a datastore"):
            Datastore.open(tmp_path)
    write_meta(tmp_path, Meta("t", 9, "", 1, 2, 1))
    np.save(tmp_path / "suffixes-0000.npy", np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="differ in number"):
        Datastore.open(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"num_nodes": 0}, {"depth": 0}, {"max_hits": 0}, {"min_match": 0}, {"min_match": 17}]
)
def test_settings_that_allow_no_draft(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected num_nodes, depth"):
        Rest(**settings)
