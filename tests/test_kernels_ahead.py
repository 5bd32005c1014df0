"""Every line of the launch table compiles for GPUs that are not there: no spills, the matrix units, whole accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton (extra 'kernels')")

ROOT = Path(__file__).resolve().parent.parent
SHARED = 99 * 1024  # what GPUs of consumers have for a block
AMPERE, HOPPER = 80, 90
THREADS = 128
SPILLED = {  # bytes per thread, of the tiles that need a few registers more than there are: GPU, dtype, head size, rows
    (AMPERE, "fp32", 256, 64): 8,
    (HOPPER, "fp32", 256, 64): 8,
    (AMPERE, "bf16", 80, 32): 8,
    (AMPERE, "bf16", 96, 32): 8,
}


def compiled(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In a process of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "kernels_ahead.py"), json.dumps(cases)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def attention(arch: int, rows: int, dim: int = 128, dtype: str = "bf16", **options: Any) -> dict[str, Any]:
    return {"kernel": "attention", "arch": arch, "rows": rows, "dim": dim, "dtype": dtype, **options}


def check_attention(case: dict[str, Any], answer: dict[str, Any], spilled: int = 0) -> None:
    assert answer["spilled"] <= spilled, (case, answer)
    assert answer["shared"] <= SHARED, (case, answer)
    assert answer["whole_lines"], (case, answer)
    hopper = case["arch"] == HOPPER and case["rows"] > 32 and case["dtype"] != "fp32"
    assert answer["mma"] == ("wgmma.mma_async" if hopper else "mma.sync"), (case, answer)


def test_the_usual_tiles() -> None:
    """A single node, and a tree of 64 nodes with four heads to a key head; merge and move."""
    cases = [attention(arch, rows) for arch in (AMPERE, HOPPER) for rows in (4, 256)]
    others: list[dict[str, Any]] = [
        {"kernel": "merge", "arch": AMPERE, "dim": 128, "dtype": "bf16"},
        {"kernel": "move", "arch": AMPERE, "path": 8, "row": 256},
    ]
    *attentions, merge, move = compiled(cases + others)
    for case, answer in zip(cases, attentions, strict=True):
        check_attention(case, answer)
    assert merge["spilled"] == 0
    check_move(move)


def check_move(answer: dict[str, Any], few: bool = False, spilled: int = 0) -> None:
    """``few``: bytes, so that a thread takes less than the 16 of a whole access."""
    assert answer["spilled"] <= spilled
    assert answer["whole_lines"] or few
    assert answer["barrier"]
    assert not answer["loads_after_last_barrier"], "the whole path is read"
    assert not answer["stores_before_last_barrier"], "before anything is written"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [AMPERE, HOPPER])
def test_the_whole_table(arch: int) -> None:
    cases = [attention(arch, rows, dim) for dim in (64, 128, 256) for rows in (4, 32, 64, 256)]
    cases += [attention(arch, rows, dim, "fp16") for dim in (80, 96) for rows in (4, 256)]
    cases += [attention(arch, rows, dim) for dim in (80, 96) for rows in (4, 32, 64, 256)]
    cases += [attention(arch, rows, 128, capped=True) for rows in (4, 64, 256)]
    cases += [attention(arch, 64, dim, "fp32") for dim in (64, 80, 96, 128, 256)]
    for case, answer in zip(cases, compiled([dict(case) for case in cases]), strict=True):
        check_attention(case, answer, SPILLED.get((arch, case["dtype"], case["dim"], case["rows"]), 0))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [AMPERE, HOPPER])
def test_moves_and_merges_of_any_size(arch: int) -> None:
    moves: list[dict[str, Any]] = [
        {"kernel": "move", "arch": arch, "path": path, "row": row}
        for path in (1, 8, 64, 128)
        for row in (128, 256, 1024)
    ]
    # Of odd sizes: word by word, whatever a word is.
    moves += [
        {"kernel": "move", "arch": arch, "path": path, "row": 260, "word": word, "whole": False}
        for path in (8, 128)
        for word in (1, 2, 4)
    ]
    merges = [
        {"kernel": "merge", "arch": arch, "dim": dim, "dtype": dtype, "sinks": sinks}
        for dim, dtype, sinks in ((64, "fp16", False), (256, "bf16", True), (96, "fp32", False))
    ]
    answers = compiled(moves + merges)
    for case, answer in zip(moves, answers, strict=False):
        few = not case.get("whole", True) or case["path"] * case["row"] < THREADS * 16
        # Single bytes (8-bit numbers, an odd head size) are put together on the stack.
        check_move(answer, few, spilled=32 if case.get("word") == 1 else 0)
    assert all(answer["spilled"] == 0 for answer in answers[len(moves) :])
