"""The definitions: what the kernels compute, in torch, to be read and to be checked against.

Shapes: B rows, n nodes of a pass, N nodes whose keys may be seen, P_b committed tokens of row b, K slots given, Hq and
Hkv heads of queries and of keys and values, D head size, W words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.visibility import packed_visibility


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the nodes of a tree over the committed tokens and their ancestors.

    Args:
        query: ``[B, Hq, n, D]``.
        key: ``[B, Hkv, K, D]``, committed tokens in slots ``0..P_b-1``, nodes behind them; what lies behind the nodes
            or in other slots that no node sees may be anything, NaN included.
        value: as ``key``; its heads may have another size.
        mask: int64 ``[B, 1, n, 3 + W]``, packed as ``specdec.visibility.packed_masks`` has it.
        scaling: factor of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 = they stay.
        sinks: ``[Hq]``, scores of one more key per head whose value is zero; None = there is none.

    Returns:
        ``[B, n, Hq, D of the values]`` in the dtype of ``query``; computed in float32, or float64 where that is given.
    """
    batch, heads, nodes, dim = query.shape
    groups = heads // key.shape[1]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    visible = packed_visibility(mask, key.shape[2])[:, None, None]  # [B, 1, 1, n, K]
    seen = visible.any(3)[..., None]
    keys = key.to(exact)[:, :, None].masked_fill(~seen, 0)
    values = value.to(exact)[:, :, None].masked_fill(~seen, 0)
    packed = query.to(exact).view(batch, -1, groups, nodes, dim)
    scores = packed @ keys.transpose(-1, -2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        one_more = sinks.to(exact).view(1, -1, groups, 1, 1).expand(batch, -1, -1, nodes, 1)
        scores = torch.cat([scores, one_more], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    result = weights.nan_to_num(0.0) @ values  # a node that sees nothing at all
    return result.view(batch, heads, nodes, -1).transpose(1, 2).contiguous().to(query.dtype)


def move(storages: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    """Copy slots ``source [B, m]`` to ``target [B, m]`` in every layer, as if all were read before any is written.

    Args:
        storages: ``[G, B, Hkv, S, D]`` each, together keys and values of all layers; written in place.
        source: int64, slots to read.
        target: int64, slots to write, all different within a row.
    """
    rows = torch.arange(source.shape[0], device=source.device)[:, None]
    for storage in storages:
        # Indices on both sides of the heads: [B, m, G, Hkv, D].
        storage[:, rows, :, target] = storage[:, rows, :, source].clone()
