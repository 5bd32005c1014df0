"""The folder of a run: whose it is, what an interruption leaves of it, what a full disk says."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from specdec.evaluation import records, store
from specdec.evaluation.records import Answer, StepTrace, Variant
from specdec.evaluation.store import RunFolder

NONE, DRAFTER = Variant("none", "plain"), Variant("x", "drafter", "warm")
BOTH = (NONE, DRAFTER)


def add(folder: RunFolder, variant: Variant, *ids: int, error: str | None = None) -> None:
    settings = {"method": variant.method, "method_kind": variant.kind, "state": variant.state}
    answers = [Answer(identity, "qa", error=error, **settings) for identity in ids]  # type: ignore[arg-type]
    traces = [StepTrace(identity) for identity in ids]
    folder.add(variant, [] if error else answers, answers if error else [], traces)


def test_finished_is_what_all_methods_have_answered(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.resume(BOTH, [[1], [2]]) == set()
    add(folder, NONE, 1, 2)
    add(folder, DRAFTER, 1)
    assert folder.resume(BOTH, [[1], [2]]) == {1}
    kept = records.read_answers(tmp_path / "answers" / "none.jsonl")
    assert [answer.question_id for answer in kept] == [1], "question 2 will be asked again, of both"
    assert [trace.question_id for trace in records.read_steps(tmp_path / "steps" / "none.jsonl")] == [1]


def test_a_batch_is_finished_as_a_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for variant in BOTH:
        add(folder, variant, 1, 2, 3)
    assert folder.resume(BOTH, [[1, 2], [3, 4]]) == {1, 2}


def test_failed_questions_are_asked_again_and_skipped_ones_are_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for variant in BOTH:
        add(folder, variant, 1)
        skipped = Answer(
            2, "qa", method=variant.method, method_kind=variant.kind, state=variant.state, skipped=["long"]
        )
        folder.add(variant, [], [skipped], [])
    add(folder, NONE, 3, error=None)
    add(folder, DRAFTER, 3, error="Traceback")
    assert folder.resume(BOTH, [[1], [2], [3]]) == {1, 2}
    assert not [answer for answer in records.read_answers(tmp_path / "failed" / "x.jsonl") if answer.error]


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for variant in BOTH:
        add(folder, variant, 1)
    with (tmp_path / "answers" / "x.jsonl").open("a") as file:
        file.write('{"question_id": 2, "cat')
    add(folder, NONE, 2)
    assert folder.resume(BOTH, [[1], [2]]) == {1}
    assert (tmp_path / "answers" / "x.jsonl").read_text().count("\n") == 1


def test_shards_have_files_of_their_own(tmp_path: Path) -> None:
    for shard, identity in (("1/2", 1), ("2/2", 2)):
        add(RunFolder(tmp_path, shard), NONE, identity)
    assert RunFolder(tmp_path, "1/2").resume([NONE], [[1]]) == {1}
    assert set(records.read_run(tmp_path).answers[NONE]) == {1, 2}
    with pytest.raises(ValueError, match="would drop the other shards"):
        RunFolder(tmp_path, "1/2").claim(None, {}, overwrite=True)


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    one, two = ({"measured": ["none"], "limit": limit} for limit in (1, 2))
    folder.claim(None, one, overwrite=False)
    add(folder, NONE, 1)
    folder.claim(one, one, overwrite=False)
    with pytest.raises(ValueError, match=r"another run \(limit: 1 -> 2\); use overwrite=true"):
        folder.claim(one, two, overwrite=False)
    with pytest.raises(ValueError, match="results without their config.yaml"):
        folder.claim(None, one, overwrite=False)
    with pytest.raises(ValueError, match="config.yaml is not a run's"):
        folder.claim({"some": "project"}, one, overwrite=True)
    (tmp_path / "mine.txt").write_text("kept")
    folder.claim(one, two, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"], "only what a run wrote is dropped"


def test_what_a_method_learnt_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.load_state(DRAFTER) is None
    folder.save_state(DRAFTER, {"matrix": torch.arange(3)})
    saved = folder.load_state(DRAFTER)
    assert saved is not None
    assert saved["matrix"].tolist() == [0, 1, 2]
    folder.drop_state(BOTH)
    assert folder.load_state(DRAFTER) is None
    assert not (tmp_path / "state").exists()


def test_a_full_disk_says_how_to_go_on(tmp_path: Path) -> None:
    """The device that is always full."""
    folder = RunFolder(tmp_path)
    add(folder, NONE, 1)
    (tmp_path / "answers" / "none.jsonl").rename(tmp_path / "kept")
    (tmp_path / "answers" / "none.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"disk is full; finished questions in {tmp_path} are kept") as raised:
        add(folder, NONE, 2)
    assert raised.value.errno == errno.ENOSPC
    (tmp_path / "answers" / "none.jsonl").unlink()
    (tmp_path / "kept").rename(tmp_path / "answers" / "none.jsonl")
    assert folder.resume([NONE], [[1], [2]]) == {1}


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(PermissionError), store.told_when_full(Path()):
        raise PermissionError
