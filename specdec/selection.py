"""argmax and top-k over a vocabulary, the two reductions that every step pays for.

On a CPU torch reduces a long row of half-precision numbers one by one; reducing blocks first is vectorised and several
times faster (25 rows of 8,192 bfloat16: argmax 1.1 ms, in blocks 0.09 ms on one core). Elsewhere torch's own serve.
"""

from __future__ import annotations

from torch import Tensor

_BLOCK = 64
_WORTH_IT = 1024


def argmax(scores: Tensor) -> Tensor:
    """Index of the largest entry of each row, the first among equals: ``[..., V]`` -> int64 ``[...]``."""
    if not _in_blocks(scores):
        return scores.float().argmax(-1)
    blocks = scores.float().unflatten(-1, (-1, _BLOCK))
    # The first block that holds the maximum, and the first place of it in there.
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(-2, best.unsqueeze(-1).expand(*best.shape, _BLOCK)).squeeze(-2).argmax(-1, keepdim=True)
    return (best * _BLOCK + inside).squeeze(-1)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of each row, largest first: ``[..., V]`` -> int64 ``[..., k]``."""
    if not _in_blocks(scores) or k * _BLOCK >= scores.shape[-1]:
        return scores.topk(k).indices
    blocks = scores.float().unflatten(-1, (-1, _BLOCK))
    # The k largest entries lie in the k blocks with the largest maxima.
    best = blocks.amax(-1).topk(k).indices
    short = blocks.gather(-2, best.unsqueeze(-1).expand(*best.shape, _BLOCK)).flatten(-2)
    place = short.topk(k).indices
    return best.gather(-1, place // _BLOCK) * _BLOCK + place % _BLOCK


def _in_blocks(scores: Tensor) -> bool:
    size = scores.shape[-1]
    return scores.device.type == "cpu" and size >= _WORTH_IT and size % _BLOCK == 0
