"""Texts to learn from: every source, the lines it leaves out, and how a mistake is said."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from specdec.demo.heldout import heldout_gsm8k, is_heldout
from specdec.training import corpus
from specdec.training.corpus import Corpus, Document

TALK = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]


def write(path: Path, lines: Iterable[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_messages_and_sharegpt(tmp_path: Path) -> None:
    theirs = [{"from": "system", "value": "s"}, {"from": "human", "value": "How many?"}, {"from": "gpt", "value": "2"}]
    path = write(
        tmp_path / "chats.jsonl",
        [{"id": "a", "messages": TALK}, "", {"conversations": theirs}, {"messages": TALK, "finished": False, "id": 7}],
    )
    said = corpus.chat(path)
    assert said.skipped == []
    assert said.notes() == []
    assert said.documents[0] == Document(tuple(TALK), document_id="a")
    assert [turn["role"] for turn in said.documents[1].messages] == ["system", "user", "assistant"]
    assert said.documents[1].messages[2]["content"] == "2"
    assert said.documents[2] == Document(tuple(TALK), finished=False, document_id=7)


def test_a_bad_line_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    bad: list[tuple[Any, str]] = [
        ('{"messages": [', ":2: expected one JSON object per line"),
        ([1], ":3: expected a JSON object, got list"),
        ({"messages": []}, ":4: expected a list of turns, got []"),
        ({"messages": "hello"}, ":5: expected a list of turns, got 'hello'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, ":6: turn 1: expected 'role' to be one of system, user,"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, ":7: turn 2: expected a text in 'content'"),
        ({"messages": TALK[:1]}, ":8: expected an assistant turn, got none"),
        ({"messages": TALK, "finished": "no"}, ":9: expected 'finished' to be true or false, got 'no'"),
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            ":10: turn 1: expected 'from' to be one of system, human",
        ),
        ({"text": "a"}, ":11: expected 'messages', 'conversations' or 'text' with a 'prompt', got 'text'"),
        ({"text": "ab", "prompt": "b"}, ":12: expected the text to begin with its prompt"),
        ("[" * 100_000, ":13: expected one JSON object per line (nested too deeply)"),
    ]
    write(path, [{"messages": TALK}, *(line for line, _ in bad), {"messages": TALK}])
    path.write_bytes(path.read_bytes() + b'{"messages": "\xff"}\n')
    said = corpus.chat(str(path))
    assert len(said.documents) == 2
    for (_, expected), reason in zip(bad, said.skipped, strict=False):
        assert reason.startswith(f"{path}{expected}")
    assert said.skipped[-1] == f"{path}:15: expected UTF-8, got byte 0xff"
    assert len(said.skipped) == len(bad) + 1
    assert said.notes()[-1] == "left out 13 of 15 texts"
    assert said.notes(most=3)[:4] == [*said.skipped[:3], "... and 10 more"]


def test_a_file_may_be_one_array(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text("\ufeff" + json.dumps([{"messages": TALK}, {"nothing": 1}, {"messages": TALK}], indent=1))
    said = corpus.chat(str(path))
    assert len(said.documents) == 2
    assert said.skipped[0].startswith(f"{path}, entry 2: expected 'messages'")


def test_several_files_a_pattern_and_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.shard.jsonl", [{"id": name, "messages": TALK}])
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")

    def ids(path: str | list[str]) -> list[Any]:
        return [document.document_id for document in corpus.chat(path).documents]

    assert ids(str(tmp_path)) == ["a", "b"]
    assert ids(str(tmp_path / "*.shard.jsonl")) == ["a", "b"]
    assert ids([str(tmp_path / "b.shard.jsonl"), str(tmp_path)]) == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "expected one JSON object per line, got an empty file"),
        ("\n \n", "expected one JSON object per line, got an empty file"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "expected an assistant turn in at least one of 1 lines"),
        ("nonsense\nmore\n", "at least one of 2 lines, found none. The first: .*:1: expected one JSON object per line"),
    ],
)
def test_nothing_to_learn_from(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=expected):
        corpus.chat(str(path))


def test_of_a_folder_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"messages": TALK}])
    (tmp_path / "a.jsonl.provenance.json").write_text('{"command": "specdec distill"}')
    (tmp_path / "README.md").write_text("About these chats.")
    assert (len(corpus.chat(str(tmp_path)).documents), corpus.chat(str(tmp_path)).skipped) == (1, [])
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"a\xffb")
    said = corpus.text(str(tmp_path))
    assert [document.text for document in said.documents] == ["About these chats."]
    assert [reason.partition(": expected")[0].rpartition("/")[2] for reason in said.skipped[1:]] == [
        "empty.txt",
        "latin.txt",
    ]
    (tmp_path / "README.md").unlink()
    with pytest.raises(ValueError, match="expected a field 'text' in at least one of 1 lines"):
        corpus.text(str(tmp_path))


def test_no_such_file(tmp_path: Path) -> None:
    for path in (str(tmp_path / "missing.jsonl"), str(tmp_path / "*.jsonl"), str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="no file of texts at .*; give data.path=FILE"):
            corpus.chat(path)
    with pytest.raises(FileNotFoundError, match="GSM8K's train.jsonl"):
        corpus.demo_corpus(str(tmp_path / "train.jsonl"))


def test_plain_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\n \n\nthree\n".encode())

    def texts(**options: str) -> list[str]:
        return [document.text for document in corpus.text(str(path), **options).documents]

    assert texts() == ["one\ntwo\n \n\nthree\n"]
    assert texts(sample_by="paragraph") == ["one\ntwo", "three\n"]
    assert texts(sample_by="line") == ["one", "two", "three"]
    with pytest.raises(ValueError, match="document, paragraph, line; got 'word'"):
        texts(sample_by="word")
    path.write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="got an empty file"):
        texts()
    path.write_bytes(b"a\xffb")
    with pytest.raises(ValueError, match="expected UTF-8, got byte 0xff"):
        texts()


def test_texts_in_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [
            {"body": "one", "prompt": "another's field"},
            {"text": "x"},
            {"body": "two", "prompt": "t", "finished": False},
        ],
    )
    said = corpus.text(path, field="body")
    assert said.documents == [Document(text="one"), Document(text="two", prompt="t", finished=False)]
    assert said.skipped == [f"{path}:2: expected a text in 'body', got 'text'"]
    with pytest.raises(ValueError, match="expected a field 'nope' in at least one of 3 lines"):
        corpus.text(path, field="nope")


def test_what_the_demo_target_was_trained_on(tmp_path: Path) -> None:
    asked = [f"Ada has {count} apples and eats {count // 2}. How many are left?" for count in range(2, 60)]
    path = write(tmp_path / "train.jsonl", [{"question": text, "answer": "<<1+1=2>>2\n#### 2"} for text in asked])
    held = heldout_gsm8k(Path(path))
    assert held, "none is held out of these: choose others"
    said = corpus.demo_corpus(path)
    by_id = {document.document_id: document for document in said.documents}
    assert len(by_id) == len(said.documents)
    math = [document for name, document in by_id.items() if str(name).startswith("math-")]
    assert [document.messages[0]["content"] for document in math] == [text for text in asked if text not in held]
    assert math[0].messages[1]["content"] == "2\n#### 2"
    assert [str(document.document_id) for document in said.documents[:4]] == ["math-1", "code-1", "math-2", "code-2"]
    code = [document for name, document in by_id.items() if str(name).startswith("code-")]
    assert len(code) > 1000
    for document in code:
        source = document.messages[1]["content"] if document.messages else document.text
        name = source[source.index("def ") :].split("(")[0]
        assert not is_heldout(name)
    assert {bool(document.messages) for document in code} == {True, False}


def test_the_digest_is_of_the_content() -> None:
    document = Document(tuple(TALK), document_id=3)
    assert document.digest == Document(tuple(dict(turn) for turn in TALK), document_id="x").digest
    others = [Document(tuple(TALK), finished=False), Document(tuple(TALK[:1])), Document(text="x"), Document(text="y")]
    assert len({document.digest, *(other.digest for other in others)}) == 5
    assert Corpus([document]).skipped == []


def test_half_a_character_is_named_and_left_out(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    turns = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in ("\ud83d", "Hello")
    ]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns), encoding="utf-8")
    found = corpus.chat(str(file))
    assert len(found.documents) == 1
    assert "chats.jsonl:1" in found.skipped[0]
    assert "whole characters" in found.skipped[0]
