"""argmax and top-k over a vocabulary, the two reductions that every step pays for.

On a CPU torch reduces a long row of half-precision numbers one by one; reducing blocks first is vectorised and several
times faster (25 rows of 8,192 bfloat16: argmax 1.1 ms, in blocks 0.09 ms on one core). Elsewhere torch's own serve.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_BLOCK = 64
_WORTH_IT = 16 * 1024  # entries in all; a single row is quicker in one go


def argmax(scores: Tensor) -> Tensor:
    """Index of the largest entry of each row, the first among equals: ``[..., V]`` -> int64 ``[...]``."""
    if not _in_blocks(scores):
        return scores.float().argmax(-1)
    blocks, maxima = _blocks(scores)
    # The first block that holds the maximum, and the first place of it in there.
    best = maxima.argmax(-1, keepdim=True)
    inside = _take(blocks, best).argmax(-1, keepdim=True)
    return (best * _BLOCK + inside).view(scores.shape[:-1])


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of each row, largest first: ``[..., V]`` -> int64 ``[..., k]``."""
    if not _in_blocks(scores) or k * _BLOCK >= scores.shape[-1]:
        return scores.topk(k).indices
    blocks, maxima = _blocks(scores)
    # The k largest entries lie in the k blocks with the largest maxima.
    best = maxima.topk(k).indices
    place = _take(blocks, best).topk(k).indices
    chosen = best.gather(1, place // _BLOCK) * _BLOCK + place % _BLOCK
    return chosen.view(*scores.shape[:-1], k)


def _blocks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """All blocks ``[R * V/block, block]`` of the R rows, and their maxima ``[R, V/block]``."""
    # A slice of wider scores reshapes into a view that cannot be flattened again.
    blocks = scores.float().contiguous().view(-1, scores.shape[-1] // _BLOCK, _BLOCK)
    return blocks.view(-1, _BLOCK), blocks.amax(-1)


def _take(blocks: Tensor, best: Tensor) -> Tensor:
    """The entries of the blocks ``best [R, m]`` of each row, ``[R, m * block]``."""
    rows, count = best.shape
    index = best if rows == 1 else best + _first_blocks(rows, blocks.shape[0] // rows)
    return blocks.index_select(0, index.view(-1)).view(rows, count * _BLOCK)


@lru_cache(maxsize=64)
def _first_blocks(rows: int, per_row: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(0, rows * per_row, per_row, device="cpu")[:, None]


def _in_blocks(scores: Tensor) -> bool:
    size = scores.shape[-1]
    return scores.device.type == "cpu" and scores.numel() >= _WORTH_IT and size >= 1024 and size % _BLOCK == 0
