"""The files of a run: what is written comes back, an interrupted line does not, Spec-Bench's own lines are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec.evaluation import records
from specdec.evaluation.records import Answer, Choice, StepTrace, Summary, SummaryRow, Variant

ISSUE_KEYS = ["drafter", "task", "temperature", "batch_size", "mean_accepted_tokens", "tokens_per_second"]
ISSUE_KEYS += ["speedup_vs_plain", "speedup_vs_transformers", "draft_share", "acceptance_by_depth", "identical_rows"]
ISSUE_KEYS += ["rows", "lossless"]


def answer(question_id: int = 81, **changes: object) -> Answer:
    choice = Choice(
        turns=["a b"],
        decoding_steps=[1],
        new_tokens=[3],
        wall_time=[0.5],
        accept_lengths=[2],
        prefill_time=[0.1],
        ids=[[5, 6, 7]],
        tokens=[[("a", "prefill"), (" ", "token_recycling"), ("b", "target")]],
        looping=[False],
        identical=["identical"],
    )
    settings = {"method": "token_recycling", "state": "warm", "choices": [choice], **changes}
    return Answer(question_id, "writing", **settings)  # type: ignore[arg-type]


def test_answers_and_steps_come_back_as_they_were(tmp_path: Path) -> None:
    steps = StepTrace(
        81, 0, 0, "warm", drafted=[3], accepted=[1], ranks=[[0]], seconds={"prefill": 0.1, "draft": [1.0]}
    )
    records.append_lines(tmp_path / "answers" / "x.jsonl", [answer()])
    records.append_lines(tmp_path / "answers" / "x.jsonl", [answer(82)])
    records.append_lines(tmp_path / "steps" / "x.jsonl", [steps])
    assert records.read_answers(tmp_path / "answers" / "x.jsonl") == [answer(), answer(82)]
    assert records.read_steps(tmp_path / "steps" / "x.jsonl") == [steps]


def test_answers_have_the_keys_that_spec_bench_reads(tmp_path: Path) -> None:
    records.append_lines(tmp_path / "x.jsonl", [answer()])
    line = json.loads((tmp_path / "x.jsonl").read_text())
    assert {"question_id", "category", "answer_id", "model_id", "choices", "tstamp"} <= set(line)
    assert {"index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths"} <= set(line["choices"][0])


def test_a_line_of_spec_bench_is_read() -> None:
    theirs = {"index": 0, "turns": ["x"], "decoding_steps": [1], "new_tokens": [2], "wall_time": [1.0]}
    line = {"question_id": 81, "category": "qa", "answer_id": "A", "model_id": "vicuna", "tstamp": 1.0}
    read = records.answer_of({**line, "choices": [{**theirs, "accept_lengths": [2]}], "unknown": 1})
    assert read.variant.method == "vicuna"
    assert read.choices[0].accept_lengths == [2]


def test_a_cut_last_line_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    records.append_lines(path, [answer()])
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(records.read_answers(path)) == 1
    path.write_text(whole + whole[:40] + "\n" + whole)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: expected one JSON object"):
        records.read_answers(path)


def test_a_run_is_read_with_all_its_shards_and_failures(tmp_path: Path) -> None:
    records.append_lines(tmp_path / "answers" / "a.shard1of2.jsonl", [answer(1)])
    records.append_lines(tmp_path / "answers" / "a.shard2of2.jsonl", [answer(2)])
    records.append_lines(tmp_path / "failed" / "a.shard1of2.jsonl", [answer(2, error="old"), answer(3, error="x")])
    records.append_lines(tmp_path / "steps" / "a.shard1of2.jsonl", [StepTrace(1), StepTrace(9)])
    run = records.read_run(tmp_path)
    ((variant, answers),) = run.answers.items()
    assert variant == Variant("token_recycling", "drafter", "warm")
    assert set(answers) == {1, 2}
    assert set(run.failed[variant]) == {3}, "question 2 was answered in the end"
    assert [trace.question_id for trace in run.steps[variant]] == [1], "question 9 was never finished"


def test_the_stem_names_what_is_not_ordinary() -> None:
    assert Variant("none", "plain").stem == "none"
    assert Variant("a b/c", "drafter", "cold", 0.7, 4).stem == "a_b_c.cold.t0.7.b4"
    assert Variant("x", "drafter", "warm", 1.0).stem == "x.t1"


def test_summary(tmp_path: Path) -> None:
    rows = [
        SummaryRow("none", "overall", rows=3, accepted_lengths={"0": 3}),
        SummaryRow("x", "qa", job="0", overrides=[]),
    ]
    summary = Summary({"seed": 0}, rows)
    records.replace_text(tmp_path / "summary.json", records.summary_json(summary))
    assert records.read_summary(tmp_path / "summary.json") == summary
    plain = json.loads((tmp_path / "summary.json").read_text())
    assert list(plain["rows"][0])[: len(ISSUE_KEYS)] == ISSUE_KEYS
    assert "job" not in plain["rows"][0]
    assert set(plain["units"]) <= set(plain["rows"][0])
    assert not list(tmp_path.glob(".*")), "nothing left beside it"
