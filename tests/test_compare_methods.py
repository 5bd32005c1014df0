"""The paired comparison of two methods of a run, on answers whose figures are known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from specdec.evaluation.records import Answer, Choice, write_lines

SCRIPT = Path(__file__).parent.parent / "scripts" / "compare_methods.py"


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


def compare(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(run), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPT.parent.parent)


def test_difference_ratio_and_interval(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    for method, extra, seconds in (("none", 0, 4.0), ("good", 2, 1.0), ("fair", 1, 2.0)):
        # The last text loops, and would turn everything round.
        calm = [answer(number, method, [1 + extra] * 4, seconds) for number in range(6)]
        loop = answer(6, method, [9 - 4 * extra] * 50, 1.0, looping=method == "none")
        write_lines(tmp_path / "answers" / f"{method}.jsonl", [*calm, loop])
    done = compare(tmp_path, "good", "fair")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["texts"] == 6
    assert found["accepted_tokens_difference"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert found["speed_ratio"]["value"] == round(13 / 9 * 2, 4)
    whole = json.loads(compare(tmp_path, "good", "fair", "--all-texts").stdout)
    low, high = whole["accepted_tokens_difference"]["interval"]
    assert whole["texts"] == 7
    assert low < 0 < high


def test_a_method_that_the_run_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    write_lines(tmp_path / "answers" / "none.jsonl", [answer(0, "none", [1], 1.0)])
    done = compare(tmp_path, "none", "medusa")
    assert done.returncode == 2
    assert "no answers of medusa; it has: none" in done.stderr
