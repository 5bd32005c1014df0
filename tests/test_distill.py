"""``specdec distill`` as a user types it: the target's own answers, gone on with, and read back as training data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from specdec import cli
from specdec.build import config_dir
from specdec.commands._data import corpus_of
from specdec.evaluation.data import Question
from specdec.loading import Loaded, demo_target
from specdec.training import corpus
from specdec.training.corpus import Corpus, Document
from specdec.training.distillation import Answered, Distiller, Plan, Task, selected, tasks_of
from specdec.training.encoding import Encoder

SMALL = ("threads=1", "dtype=float32", "max_new_tokens=12", "batch_size=3")
QUESTIONS = [
    {"question_id": f"q{number}", "turns": [f"Nina has {number} boxes with 3 pencils each. How many pencils?"]}
    for number in range(2, 9)
]
IDS = [f"q{number}" for number in range(2, 9)]


def distill(*arguments: Any) -> int:
    """Run the command in this process; returns its exit code."""
    sys.argv = ["specdec"]
    try:
        cli.main(["distill", *map(str, arguments)])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _same_arguments_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return demo_target("float32", "cpu")


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """Overrides that name seven questions."""
    return questions(tmp_path, QUESTIONS)


def questions(folder: Path, records: Sequence[Any]) -> list[str]:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["data=jsonl", f"data.path={path}", *SMALL]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain(demo: Loaded, messages: list[Any], new_tokens: int = 12) -> tuple[list[int], str]:
    """What ``generate`` says, without a drafter and alone: ids and text."""
    ids = demo.encode(messages)
    made = demo.model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=new_tokens, do_sample=False)
    new = made[0, ids.shape[1] :].tolist()
    return new, demo.tokenizer.decode(new, skip_special_tokens=True)


def provenance(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.name}.provenance.json").read_text(encoding="utf-8"))


def test_the_answers_are_the_targets_own_and_read_back(
    tmp_path: Path, asked: list[str], demo: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "answers.jsonl"
    assert distill(*asked, f"output={output}", "max_new_tokens=100") == 0
    made = lines(output)
    assert sorted(record["id"] for record in made) == IDS
    read = corpus.chat(str(output))
    assert read.skipped == []
    encoder, ends = Encoder.of(demo), list[bool]()
    for record, document in zip(made, read.documents, strict=True):
        ids, said = plain(demo, record["messages"][:-1], 100)
        assert record["messages"][-1] == {"role": "assistant", "content": said}
        assert record["finished"] == (ids[-1] == demo.tokenizer.eos_token_id)
        (text,) = encoder(document)
        wanted = text.token_ids[text.wanted].tolist()
        end = [demo.tokenizer.eos_token_id] if record["finished"] else []
        assert demo.tokenizer.decode(wanted) == said + demo.tokenizer.decode(end)
        assert wanted[len(wanted) - len(end) :] == end
        assert not text.wanted[: demo.encode(record["messages"][:-1]).shape[1]].any()
        ends.append(record["finished"])
    assert any(ends), "longer answers, so that some of them end"
    known = provenance(output)
    assert known["command"].startswith("specdec distill data=jsonl")
    assert known["claimed"]["max_new_tokens"] == 100
    (start,) = known["starts"]
    assert (start["answers"], start["cut"], start["failed"]) == (7, ends.count(False), 0)
    assert {"torch", "transformers"} <= set(start["versions"])
    shown = capsys.readouterr().err
    assert f"written to {output}: 7 answers, {ends.count(False)} of them cut at the token limit" in shown
    assert "mean accepted tokens" in shown
    assert "answering: 7/7, 0:00:00 left" in shown


def test_it_goes_on_behind_a_torn_line(tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "answers.jsonl"
    assert distill(*asked, f"output={output}", "limit=4") == 0
    whole = output.read_bytes()
    output.write_bytes(whole[:-7])
    assert distill(*asked, f"output={output}", "batch_size=2") == 0
    after = output.read_bytes()
    kept = whole[: whole[:-1].rfind(b"\n") + 1]
    assert after.startswith(kept)
    assert sorted(record["id"] for record in lines(output)) == IDS
    assert "3 of 7 prompts were answered before" in capsys.readouterr().err
    assert [start["answers"] for start in provenance(output)["starts"]] == [4, 4]
    alone = tmp_path / "alone.jsonl"
    assert distill(*asked, f"output={alone}") == 0
    assert sorted(lines(alone), key=itemgetter("id")) == sorted(lines(output), key=itemgetter("id"))
    assert distill(*asked, f"output={output}") == 0
    assert output.read_bytes() == after


def test_killed_at_any_moment(tmp_path: Path, asked: list[str]) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = [*asked, f"output={output}", "batch_size=1", "max_new_tokens=24"]
    code = f"import sys; sys.argv = ['specdec', 'distill', *{arguments!r}]; from specdec.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output.is_file() and output.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    before = lines(output)
    assert distill(*arguments) == 0
    after = lines(output)
    assert after[: len(before)] == before
    assert sorted(record["id"] for record in after) == IDS


def test_interrupted(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "answers.jsonl"
    answer, calls = Distiller.answer, list[int]()

    def interrupted(self: Distiller, tasks: Sequence[Task]) -> list[Answered]:
        calls.append(len(tasks))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, tasks)

    monkeypatch.setattr(Distiller, "answer", interrupted)
    assert distill(*asked, f"output={output}") == 130
    assert len(lines(output)) == 3
    assert provenance(output)["starts"][0]["interrupted"] is True
    assert distill(*asked, f"output={output}") == 0
    assert len(lines(output)) == 7


def test_another_configuration_is_refused(tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "answers.jsonl"
    run = [*asked, f"output={output}", "limit=1"]
    assert distill(*run) == 0
    assert distill(*run, "max_new_tokens=9") == 2
    assert "holds other answers (max_new_tokens: 12 -> 9); use overwrite=true" in capsys.readouterr().err
    questions(tmp_path, QUESTIONS[:5])
    assert distill(*run) == 2
    assert "prompts_sha256" in capsys.readouterr().err
    assert len(lines(output)) == 1
    assert distill(*run, "max_new_tokens=9", "overwrite=true") == 0
    assert len(lines(output)) == 1
    output.with_name("answers.jsonl.provenance.json").write_text("{}")
    assert distill(*run) == 2
    assert "answers.jsonl.provenance.json is no provenance of answers" in capsys.readouterr().err
    output.with_name("answers.jsonl.provenance.json").unlink()
    for option in ("overwrite=false", "overwrite=true"):
        assert distill(*run, option) == 2
        assert "holds lines without their answers.jsonl.provenance.json" in capsys.readouterr().err
    assert len(lines(output)) == 1, "they may be anybody's"


def test_shards_write_files_of_their_own(tmp_path: Path, asked: list[str]) -> None:
    output = tmp_path / "answers.jsonl"
    for shard in ("1/2", "2/2"):
        assert distill(*asked, f"output={output}", f"shard={shard}") == 0
    read = corpus.chat(str(tmp_path / "answers.shard*of2.jsonl"))
    assert sorted(str(document.document_id) for document in read.documents) == IDS
    assert not output.exists()


def test_a_failure_takes_no_neighbour_with_it(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    answer = Distiller.answer

    def failing(self: Distiller, tasks: Sequence[Task]) -> list[Answered]:
        if any(task.task_id == "q5" for task in tasks):
            raise RuntimeError("out of memory\nand more")
        return answer(self, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "answer", failing)
        assert distill(*asked, f"output={output}") == 1
    said = capsys.readouterr().err
    assert "q5 failed: RuntimeError: out of memory" in said
    assert "1 prompts failed; the same command asks them again" in said
    assert sorted(record["id"] for record in lines(output)) == ["q2", "q3", "q4", "q6", "q7", "q8"]
    assert distill(*asked, f"output={output}") == 0
    assert len(lines(output)) == 7


def test_a_full_disk_says_how_to_go_on(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    opened = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "a" and output.is_file() and output.stat().st_size:
            raise OSError(28, "No space left on device")
        return opened(self, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        assert distill(*asked, f"output={output}") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert len(lines(output)) == 3
    assert distill(*asked, f"output={output}") == 0
    assert len(lines(output)) == 7


def test_each_turn_is_answered_in_turn(tmp_path: Path, demo: Loaded) -> None:
    turns = [
        "Write a Python function `__len__(self)`: Return the length.",
        "Write a Python function `close(self)`: Close the file.",
    ]
    talks = [{"question_id": 1, "turns": turns}, {"question_id": 2, "turns": [QUESTIONS[0]["turns"][0], "And twice?"]}]
    output = tmp_path / "answers.jsonl"
    asked = [*questions(tmp_path, talks), f"output={output}", "max_new_tokens=60"]
    assert distill(*asked) == 0
    for record in lines(output):
        messages = record["messages"]
        for end in range(2, len(messages) + 1, 2):
            assert messages[end - 1]["content"] == plain(demo, messages[: end - 1], 60)[1]
    by_id = {record["id"]: record for record in lines(output)}
    assert [turn["content"] for turn in by_id[1]["messages"][::2]] == turns
    assert by_id[1]["finished"]
    assert distill(*asked, "max_new_tokens=2", "overwrite=true") == 0
    assert [len(record["messages"]) for record in lines(output)] == [2, 2], "nobody asks on behind a cut answer"
    assert not any(record["finished"] for record in lines(output))


def test_users_turns_of_chats_are_answered_anew(tmp_path: Path, demo: Loaded) -> None:
    head = [{"role": "system", "content": "You are a helpful assistant."}]
    chats = [{"messages": [*head, *({"role": role, "content": "Who?"} for role in ("user", "assistant"))]}] * 2
    path = tmp_path / "chats.jsonl"
    path.write_text("nonsense\n" + "".join(json.dumps(chat) + "\n" for chat in chats))
    output = tmp_path / "answers.jsonl"
    assert distill("data=chat", f"data.path={path}", f"output={output}", *SMALL) == 0
    made = lines(output)
    assert sorted(record["id"] for record in made) == [1, 2]
    for record in made:
        assert record["messages"][:2] == [*head, {"role": "user", "content": "Who?"}]
        assert record["messages"][2]["content"] == plain(demo, record["messages"][:2])[1]


def test_plain_texts_go_on(tmp_path: Path, demo: Loaded) -> None:
    sources = ["def get_name(self):\n    return self._name\n", "def grüße(öl):\n    '''→ ü𝛼'''\n    return öl\n"]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": source}) + "\n" for source in sources))
    output = tmp_path / "answers.jsonl"
    run = ("data=text", f"data.path={path}", f"output={output}", *SMALL, "prompt_tokens=5", "max_new_tokens=30")
    assert distill(*run) == 0
    for record in lines(output):
        assert record["text"].startswith(record["prompt"])
        assert any(source.startswith(record["prompt"]) for source in sources)
        ids = demo.tokenizer(record["prompt"], return_tensors="pt")["input_ids"]
        made = demo.model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=30, do_sample=False)
        assert record["text"] == demo.tokenizer.decode(made[0].tolist(), skip_special_tokens=True).rstrip("\ufffd")
        assert record["finished"] == (made[0, -1].item() == demo.tokenizer.eos_token_id)
    encoder = Encoder.of(demo)
    read = corpus.chat(str(output))
    assert [document.prompt for document in read.documents] == [record["prompt"] for record in lines(output)]
    assert read.documents == corpus.text(str(output)).documents
    for document in read.documents:
        (text,) = encoder(document)
        first = int(np.flatnonzero(text.wanted)[0])
        written = demo.tokenizer.decode(text.token_ids[text.wanted].tolist(), skip_special_tokens=True)
        assert document.text.endswith(written)
        given = demo.tokenizer.decode(text.token_ids[:first].tolist())
        assert given.startswith(document.prompt)


def test_sampled_answers_follow_the_seed(tmp_path: Path, asked: list[str]) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = tmp_path / f"{name}.jsonl"
        run = [*asked, f"output={output}", "temperature=1", f"seed={seed}", "limit=3", "top_p=0.9"]
        assert distill(*run) == 0
        texts.append([record["messages"][-1]["content"] for record in lines(output)])
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_that_does_not_fit_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [*QUESTIONS[:2], {"question_id": "long", "turns": ["a b " * 1100]}]
    output = tmp_path / "answers.jsonl"
    assert distill(*questions(tmp_path, records), f"output={output}") == 0
    assert len(lines(output)) == 2
    said = capsys.readouterr().err
    assert "long left out: " in said
    assert "1 prompts were left out" in said


def test_a_distiller_without_a_command(demo: Loaded) -> None:
    """A cut answer holds no part of a character; texts and talks may share a batch."""
    plan = Plan(batch_size=4, max_new_tokens=3, options={"do_sample": False})
    distiller = Distiller(demo, plan)
    tasks = [Task(1, ("Who?",)), Task(2, text="def total(items): return"), Task(3, ("How many are left?", "Why?"))]
    assert [len(batch) for batch in distiller.batches(tasks * 3)] == [4, 4, 1]
    assert [batch[0].task_id for batch in distiller.batches(tasks * 3)] == [3, 1, 2]
    (outcome,) = distiller.run(distiller.batches(tasks), lambda: None)
    assert [len(answer.messages) for answer in outcome.answers] == [2, 2, 0]
    assert outcome.seconds > 0
    assert outcome.answers[2].record.keys() == {"id", "text", "prompt", "finished"}
    assert all(answer.num_tokens == 3 for answer in outcome.answers if not answer.finished)


def test_an_option_that_suits_nobody_is_an_error_at_once(demo: Loaded) -> None:
    distiller = Distiller(demo, Plan(options={"no_such_option": 1}))
    with pytest.raises(ValueError, match="demo cannot be asked: .*no_such_option"):
        list(distiller.run([[Task(1, ("Who?",))]], lambda: None))


def test_tasks() -> None:
    answer = {"role": "assistant", "content": "x"}
    chats = Corpus(
        [
            Document((answer, {"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"})),
            Document((answer,), document_id="no user"),
            Document(text="t", document_id=1),
            Document(text="u", document_id=1),
        ]
    )
    assert tasks_of(chats) == [Task(1, ("a", "b"), (answer,)), Task("1#2", text="t"), Task("1#3", text="u")]
    assert tasks_of([Question(4, "c", ("a",))]) == [Task(4, ("a",))]
    with pytest.raises(ValueError, match="no user's turn to answer in 1 texts"):
        tasks_of(Corpus([Document((answer,))]))
    tasks = [Task(number, ("a",)) for number in range(5)]
    assert [task.task_id for task in selected(tasks, 4, "2/2")] == [1, 3]
    with pytest.raises(ValueError, match="nothing is left to answer: 5 prompts, limit=1, shard=2/2"):
        selected(tasks, 1, "2/2")


def test_a_command_that_learns_asks_for_texts(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}) + "\n")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        questions_only = compose("distill")
        texts = compose("distill", overrides=["data=chat", f"data.path={path}"])
    assert len(corpus_of(texts).documents) == 1
    with pytest.raises(ValueError, match="expected texts to learn from: chat, demo_corpus, text "):
        corpus_of(questions_only)


MISTAKES = {
    "no output": (["distill"], "output=answers.jsonl"),
    "no path": (["distill", "data=chat", "output=x"], "data=chat needs data.path=..."),
    "no answers": (
        ["distill", "data=chat", "data.path=PROMPTS", "output=x"],
        "found none (prompts without answers are read by data=jsonl",
    ),
    "no file": (["distill", "data=chat", "data.path=nowhere.jsonl", "output=x"], "no file of texts at nowhere.jsonl"),
    "no batch": (["distill", "output=x", "batch_size=0"], "batch_size to be a whole number of at least 1, got 0"),
    "no prompt": (["distill", "output=x", "prompt_tokens=a"], "prompt_tokens to be a whole number of at least 1"),
    "no limit": (["distill", "output=x", "limit=0"], "limit to be a whole number of at least 1, got 0"),
    "no shard": (["distill", "output=x", "shard=3/2"], "expected shard=i/n"),
    "temperature": (["distill", "output=x", "temperature=-1"], "temperature >= 0"),
    "folder": (["distill", "output=."], "is no file"),
    "texts as questions": (["evaluate", "data=chat", "data.path=CHATS"], "expected questions: demo, heldout, hf"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("CHATS").write_text(json.dumps({"messages": talk}) + "\n")
    Path("PROMPTS").write_text(json.dumps({"messages": talk[:1]}) + "\n")
    arguments, expected = MISTAKES[mistake]
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert not Path("x").exists()
