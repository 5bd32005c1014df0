"""The builder of tri-gram tables against counting by hand: shares, bounds, bad lines, determinism."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from drafters.trigram import Trigram
from drafters.trigram_table import TrigramTable
from specdec.loading import DEMO_FOLDER

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import build_trigram
from build_trigram import Corpus, Counts, main

TEXTS = ["def add(a, b):\n    return a + b", "def sub(a, b):\n    return a - b", "x", "Tom has 3 apples. Tom has 4."]


def ids_of(texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_FOLDER)(texts, add_special_tokens=False)["input_ids"]


def by_hand(documents: list[list[int]]) -> Counter[tuple[int, int, int]]:
    return Counter(trigram for ids in documents for trigram in zip(ids, ids[1:], ids[2:], strict=False))


def check_table(table: TrigramTable, trigrams: Counter[tuple[int, int, int]], num_successors: int) -> None:
    pairs = {trigram[:2] for trigram in trigrams}
    assert len(table) == len(pairs)
    for pair in pairs:
        follow = {third: count for (*head, third), count in trigrams.items() if tuple(head) == pair}
        total = sum(follow.values())
        best = sorted(follow, key=lambda third: (-follow[third], third))[:num_successors]
        tokens, scores = table.successors(*pair)
        assert tokens == best
        assert scores == pytest.approx([follow[third] / total for third in best])


@pytest.mark.parametrize("chunk", [5, 2**22])
def test_counts_equal_counting_by_hand(chunk: int) -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(6, size=generator.integers(0, 60)).tolist() for _ in range(40)]
    counts = Counts(most=10**6, chunk=chunk)
    for ids in documents:
        counts.add(ids)
    table = TrigramTable(4)
    table.load_state_dict(counts.table(4, 10**6))
    check_table(table, by_hand(documents), 4)
    assert counts.documents == 40
    assert counts.tokens == sum(map(len, documents))
    assert counts.seen == by_hand(documents).total()
    assert counts.dropped == 0


def test_pruning_bounds_memory_and_keeps_the_frequent() -> None:
    generator = np.random.default_rng(0)
    counts, frequent = Counts(most=400, chunk=100), [1, 2, 3, 4, 5]
    for _ in range(300):
        counts.add(frequent)
        counts.add(generator.integers(10, 2000, size=30).tolist())
        assert len(counts._codes) <= 400
    state = counts.table(12, 10**6)
    table = TrigramTable()
    table.load_state_dict(state)
    assert table.successors(1, 2) == ([3], [1.0])
    assert counts.dropped > 0
    assert counts.dropped + int(counts._counts.sum()) == counts.seen
    assert state["pairs"][:3].tolist() == [(a << 32) + a + 1 for a in (1, 2, 3)], "the most frequent first"
    assert len(counts.table(12, 2)["pairs"]) == 2


def test_token_ids_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="below 2097152, got 2097152"):
        Counts(10).add([1, 2, 2**21])
    Counts(10).add([1, 2, 2**21 - 1])
    with pytest.raises(ValueError, match="no document of three tokens"):
        Counts(10).table(12, 5)


def run(tmp_path: Path, files: dict[str, str], *options: str) -> tuple[Path, dict[str, Any]]:
    paths = []
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        paths.append(str(tmp_path / name))
    output = tmp_path / "made" / "table.safetensors"
    main([*paths, "--tokenizer", "demo", "--output", str(output), *options])
    with safe_open(output, "pt") as file:
        return output, json.loads(file.metadata()["provenance"])


def test_bad_lines_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps({"text": text}) for text in TEXTS]
    bad = ["{broken", json.dumps(["no object"]), json.dumps({"other": 1}), json.dumps({"text": 7})]
    lines = [good[0], bad[0], good[1], "", bad[1], bad[2], good[2], bad[3], good[3]]
    output, about = run(tmp_path, {"corpus.jsonl": "\n".join(lines)})
    printed = capsys.readouterr().err.replace("\n", "")
    for number in (2, 5, 6, 8):
        assert f"corpus.jsonl:{number}: " in printed
    assert "no field 'text'; it has: other" in printed
    assert (about["bad_lines"], about["documents"]) == (4, 4)
    drafter = Trigram(path=str(output))
    check_table(drafter.table, by_hand(ids_of(TEXTS)), 12)


def test_fields_lists_and_messages(tmp_path: Path) -> None:
    rows = [
        {"q": "Tom has 3 apples.", "a": ["He eats one.", "Two are left."]},
        {"q": [{"role": "user", "content": "Hello you there"}], "a": "Yes, I am."},
    ]
    text = "\n".join(map(json.dumps, rows))
    output, about = run(tmp_path, {"c.jsonl": text}, "--field", "q", "--field", "a", "--num-successors", "2")
    documents = ["Tom has 3 apples.\nHe eats one.\nTwo are left.", "Hello you there\nYes, I am."]
    drafter = Trigram(path=str(output))
    check_table(drafter.table, by_hand(ids_of(documents)), 2)
    assert about["fields"] == ["q", "a"]


@pytest.mark.parametrize("whole", [False, True])
def test_text_files(tmp_path: Path, whole: bool) -> None:
    files = {"a.txt": "def add(a, b):\n    return a + b\n", "b.py": "\nx = 1 + 2 + 3\n"}
    output, about = run(tmp_path, files, *(["--whole"] if whole else []))
    lines = ["def add(a, b):", "    return a + b", "x = 1 + 2 + 3"]
    check_table(Trigram(path=str(output)).table, by_hand(ids_of(list(files.values()) if whole else lines)), 12)
    assert about["documents"] == (2 if whole else 3)


def test_the_same_corpus_gives_the_same_file(tmp_path: Path) -> None:
    text = {"c.jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS * 3)}
    first, about = run(tmp_path, text, "--max-trigrams", "12", "--max-pairs", "4")
    data, tables = first.read_bytes(), load_file(first)
    second, again = run(tmp_path, text, "--max-trigrams", "12", "--max-pairs", "4")
    assert second.read_bytes() == data
    assert about == again
    assert len(tables["pairs"]) <= 4
    assert about["trigrams_dropped"] > 0
    assert len(about["corpus_sha256"]) == 64


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        main([str(tmp_path / "nothing.txt"), "--tokenizer", "demo", "--output", str(tmp_path / "t.safetensors")])
    for options in (["--output", "t.pt"], ["--output", "t.safetensors", "--max-pairs", "0"]):
        with pytest.raises(SystemExit):
            main(["c.txt", "--tokenizer", "demo", *options])
    assert "end in .safetensors" in capsys.readouterr().err


def test_streams_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("one\n\ntwo\r\nthree", encoding="utf-8")
    sizes: list[int] = []
    documents = iter(Corpus([path], ["text"], False, sizes.append))
    assert next(documents) == "one"
    assert sizes == [4], "no further than it had to"
    assert list(documents) == ["two", "three"]
    assert sum(sizes) == path.stat().st_size
    assert [len(batch) for batch in build_trigram.batches(iter(["x"] * 600))] == [256, 256, 88]
