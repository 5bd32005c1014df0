"""Questions: every source, what is chosen of it, and the line a mistake is on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdec.evaluation import data
from specdec.evaluation.data import Question, Selection


def write(path: Path, *lines: Any) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return str(path)


def test_spec_bench_as_it_is(tmp_path: Path) -> None:
    lines = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 401, "category": "math_reasoning", "turns": ["c"], "reference": ["9"]},
    ]
    assert data.spec_bench(write(tmp_path / "question.jsonl", *lines)) == [
        Question(81, "writing", ("a", "b")),
        Question(401, "math_reasoning", ("c",)),
    ]


def test_any_file(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    path = write(
        tmp_path / "mine.jsonl", {"prompt": "a"}, {"turns": ["b", "c"], "category": "t"}, "", {"messages": talk}
    )
    assert data.jsonl(path) == [
        Question(1, "mine", ("a",)),
        Question(2, "t", ("b", "c")),
        Question(3, "mine", ("z",), tuple(talk[:2])),
    ]
    named = write(tmp_path / "named.jsonl", {"q": "a", "level": 3, "id": "one"})
    assert data.jsonl(named, prompt="q", category="level", question_id="id") == [Question("one", "3", ("a",))]


BROKEN = {
    "no JSON": ('{"prompt": ', r"f\.jsonl:2: expected one JSON object per line"),
    "no object": ("[1]", r"f\.jsonl:2: expected a JSON object, got list"),
    "no text": ({"text": "a"}, r"f\.jsonl:2: expected one of the fields 'turns', 'messages', 'prompt', got 'text'"),
    "empty turn": ({"turns": ["a", " "]}, r"f\.jsonl:2: expected turns to be texts"),
    "turns that are no list": ({"turns": "a"}, r"f\.jsonl:2: expected turns"),
    "no turns": ({"turns": []}, r"f\.jsonl:2: expected turns"),
    "a number": ({"prompt": 3}, r"f\.jsonl:2: expected turns"),
    "odd role": ({"messages": [{"role": "robot", "content": "a"}]}, r"f\.jsonl:2: expected messages with a role"),
    "odd end": ({"messages": [{"role": "assistant", "content": "a"}]}, r"f\.jsonl:2: expected the last message"),
    "odd id": ({"prompt": "a", "question_id": [1]}, r"f\.jsonl:2: expected 'question_id'"),
    "twice": ({"prompt": "b", "question_id": 7}, "each question_id once, got 7"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named(case: str, tmp_path: Path) -> None:
    line, expected = BROKEN[case]
    with pytest.raises(ValueError, match=expected):
        data.jsonl(write(tmp_path / "f.jsonl", {"prompt": "a", "question_id": 7}, line))


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hemingkx/Spec-Bench"):
        data.spec_bench(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(FileNotFoundError, match="data.gsm8k=FILE"):
        data.heldout(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="got an empty file"):
        data.jsonl(write(tmp_path / "empty.jsonl", ""))


def test_demo_questions_are_two_dozen_in_two_categories() -> None:
    questions = data.demo()
    assert len(questions) == 24
    assert [question.category for question in questions].count("math") == 12
    assert {question.category for question in questions} == {"math", "code"}
    assert any(len(question.turns) == 2 for question in questions)


def test_heldout_alternates(tmp_path: Path) -> None:
    lines = [{"question": f"How many are {number} and 1?", "answer": "2"} for number in range(200)]
    questions = data.heldout(write(tmp_path / "train.jsonl", *lines))
    assert [question.category for question in questions[:4]] == ["math", "code", "math", "code"]
    assert questions[1].turns[0].startswith("Write a Python function")
    assert len({question.question_id for question in questions}) == len(questions)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_dataset_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "set.jsonl", {"ask": "a", "kind": "x"}, {"ask": "b", "kind": "y"})
    options = {"split": "train", "data_files": path, "prompt": "ask", "category": "kind"}
    assert data.hf("json", **options) == [Question(1, "x", ("a",)), Question(2, "y", ("b",))]
    with pytest.raises(ValueError, match="row 1: expected one of the fields"):
        data.hf("json", split="train", data_files=path)


QUESTIONS = [Question(number, "abc"[number % 3], ("x",)) for number in range(12)]


def ids(selection: Selection) -> list[int | str]:
    return [question.question_id for question in selection(QUESTIONS)]


def test_selection() -> None:
    assert ids(Selection()) == list(range(12))
    assert ids(Selection(categories=["a", "c"])) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert ids(Selection(per_category=2)) == [0, 1, 2, 3, 4, 5]
    assert ids(Selection(categories=["b"], limit=2)) == [1, 4]


def test_a_sample_is_drawn_by_its_seed_and_keeps_the_order() -> None:
    first, again, other = (ids(Selection(limit=5, sample=True, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first == sorted(first, key=int)
    assert len({QUESTIONS[int(i)].category for i in ids(Selection(per_category=1, sample=True))}) == 3


def test_shards_share_out_the_selection() -> None:
    shards = [ids(Selection(limit=7, sample=True, shard=f"{index}/3")) for index in (1, 2, 3)]
    assert sorted(sum(shards, []), key=int) == ids(Selection(limit=7, sample=True))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_malformed_shard(shard: str) -> None:
    with pytest.raises(ValueError, match="expected shard=i/n"):
        ids(Selection(shard=shard))


def test_a_category_that_does_not_exist_lists_them() -> None:
    with pytest.raises(ValueError, match="unknown category 'd'; known: a, b, c"):
        ids(Selection(categories=["a", "d"]))
    with pytest.raises(ValueError, match="expected limit"):
        ids(Selection(limit=0))


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes('\ufeff{"prompt": "a\u2028b\x85c"}\r\n\n{"prompt": "d"}'.encode())
    assert [question.turns for question in data.jsonl(str(file))] == [("a\u2028b\x85c",), ("d",)]
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="q.jsonl:2: expected UTF-8, got byte 0xff"):
        data.jsonl(str(file))
