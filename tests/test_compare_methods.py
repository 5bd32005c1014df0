"""The paired comparison of two methods of a run, on answers whose figures are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compare_methods
from specdec.evaluation.records import Answer, Choice, write_lines


def answer(number: int, method: str, lengths: list[int], seconds: float, looping: bool = False) -> Answer:
    choice = Choice(
        decoding_steps=[len(lengths)],
        new_tokens=[sum(lengths) + 1],
        wall_time=[seconds],
        accept_lengths=lengths,
        looping=[looping],
        identical=[None],
    )
    return Answer(
        number, "math", choices=[choice], method=method, method_kind="plain" if method == "none" else "drafter"
    )


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the script on a folder: what it printed."""

    def run(*arguments: Any) -> Any:
        monkeypatch.setattr(sys, "argv", ["compare_methods.py", *map(str, arguments)])
        compare_methods.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_difference_ratio_and_interval(tmp_path: Path, compare: Callable[..., Any]) -> None:
    (tmp_path / "answers").mkdir()
    for method, extra, seconds in (("none", 0, 4.0), ("good", 2, 1.0), ("fair", 1, 2.0)):
        # The last text loops, and would turn everything round.
        calm = [answer(number, method, [1 + extra] * 4, seconds) for number in range(6)]
        loop = answer(6, method, [9 - 4 * extra] * 50, 1.0, looping=method == "none")
        write_lines(tmp_path / "answers" / f"{method}.jsonl", [*calm, loop])
    found = compare(tmp_path, "good", "fair")
    assert found["texts"] == 6
    assert found["accepted_tokens_difference"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert found["speed_ratio"]["value"] == round(13 / 9 * 2, 4)
    whole = compare(tmp_path, "good", "fair", "--all-texts")
    low, high = whole["accepted_tokens_difference"]["interval"]
    assert whole["texts"] == 7
    assert low < 0 < high


def test_a_method_that_the_run_does_not_have(
    tmp_path: Path, compare: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "answers").mkdir()
    write_lines(tmp_path / "answers" / "none.jsonl", [answer(0, "none", [1], 1.0)])
    with pytest.raises(SystemExit) as left:
        compare(tmp_path, "none", "medusa")
    assert left.value.code == 2
    assert "no answers of medusa; it has: none" in capsys.readouterr().err
