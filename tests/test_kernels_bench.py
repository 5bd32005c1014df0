"""The table of attention alone: right answers are timed, wrong ones and missing methods are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from verifiers.kernels import bench, plain
from verifiers.kernels.bench import Shape, attention_table, copy_bandwidth

TINY = Shape(batch=2, heads=4, kv_heads=2, dim=16, dtype=torch.float32)


def table(**options: Any) -> list[dict[str, Any]]:
    return attention_table("cpu", contexts=(33,), nodes=(1, 6), shape=TINY, repeats=2, **options)


def test_every_method_has_its_rows() -> None:
    told: list[tuple[int, int]] = []
    rows = table(methods=("sdpa", "plain"), progress=lambda done, of: told.append((done, of)))
    assert [(row["method"], row["nodes"]) for row in rows] == [("sdpa", 1), ("plain", 1), ("sdpa", 6), ("plain", 6)]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for row in rows:
        assert row["difference"] <= 2e-6
        moved = (2 * 2 * 2 * (33 + row["nodes"]) * 16 + 2 * 2 * 4 * row["nodes"] * 16) * 4
        assert row["gb_per_s"] == pytest.approx(moved / row["microseconds"] / 1e3)
        assert row["share"] > 0


def test_the_kernel_is_one_of_them() -> None:
    pytest.importorskip("triton", reason="the kernels need Triton (extra 'kernels')")
    (row,) = attention_table("cpu", (9,), (3,), Shape(1, 2, 1, 16, torch.float32), ("triton",), repeats=1)
    assert row["difference"] <= 2e-6
    assert row["microseconds"] > 0


def test_a_wrong_answer_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = plain.tree_attention, []

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(args)
        return right(*args, **options) + (0.1 if len(calls) > 1 else 0.0)  # the first is what the others are held to

    monkeypatch.setattr(plain, "tree_attention", wrong)
    (row,) = attention_table("cpu", (9,), (3,), TINY, ("plain",), repeats=1)
    assert row["microseconds"] is None
    assert "differs from the definition" in row["reason"]


def test_a_method_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no such device\nand more")

    monkeypatch.setitem(bench._METHODS, "sdpa", broken)
    assert {row["reason"] for row in table(methods=("sdpa",))} == {"RuntimeError: no such device"}


def test_an_unknown_method_lists_the_known() -> None:
    with pytest.raises(ValueError, match="known: triton, sdpa, flex, plain"):
        table(methods=("flash",))


def test_a_copy_has_a_rate() -> None:
    assert copy_bandwidth("cpu", size=2**20, repeats=3) > 1e6


@pytest.mark.gpu
def test_all_methods_on_a_gpu() -> None:
    rows = attention_table("cuda", contexts=(2048,), nodes=(1, 64), repeats=5)
    assert all(row["microseconds"] is not None for row in rows), rows
