"""argmax and top-k in blocks against torch's own."""

import pytest
import torch

from specdec import selection
from specdec.selection import argmax, top_k


@pytest.mark.parametrize("by_numpy", [False, True])
@pytest.mark.parametrize("size", [97, 1024, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_is_the_first_of_the_largest(
    size: int, dtype: torch.dtype, by_numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "on_host", lambda _: by_numpy)
    generator = torch.Generator().manual_seed(size)
    # Rounding to few values makes ties; the float32 argmax of plain generate is the reference.
    scores = torch.randn(3, 7, size, generator=generator).mul(2).round().to(dtype)
    assert torch.equal(argmax(scores), scores.float().argmax(-1))


@pytest.mark.parametrize("size", [97, 1024, 5000, 8192, 16384, 20000])
def test_top_k_in_order(size: int) -> None:
    scores = torch.randn(3, 7, size, generator=torch.Generator().manual_seed(size))
    assert torch.equal(top_k(scores, 8), scores.topk(8).indices)


def test_a_row_of_equal_scores() -> None:
    assert argmax(torch.zeros(2, 2048)).tolist() == [0, 0]
    assert argmax(torch.full((1, 2048), -torch.inf)).tolist() == [0]


def test_a_slice_of_wider_scores() -> None:
    scores = torch.randn(8, 5, 8192, generator=torch.Generator().manual_seed(0))[:, -1:]
    assert torch.equal(argmax(scores), scores.argmax(-1))
    assert torch.equal(top_k(scores, 6), scores.topk(6).indices)
