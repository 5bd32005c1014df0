"""A causal attention layer that belongs to a drafter: over packed texts in training, over growing rows in decoding.

Kangaroo's adapter and Hydra++'s prefix layer are built of it. Parameters are named and shaped as Llama's, so that
published checkpoints fit.

Shapes: B rows, n new states, T keys seen, A heads, G key-value heads, d head size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.interfaces import Prefill, Tap


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (Zhang and Sennrich, 1910.07467)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class CausalAttention(nn.Module):
    """Attention with rotary positions (Su et al., 2104.09864), halves rotated as Llama does.

    Args:
        hidden: H.
        heads: A.
        kv_heads: G, a divisor of A.
        head_dim: d.
        rope_theta: base of the rotary frequencies.
    """

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, rope_theta: float = 10000.0) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = head_dim, kv_heads
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.rope_theta = rope_theta

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor, rows: GrowingRows | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``[B, n, H]``.
            positions: int64 ``[1 or B, n]``.
            visible: bool ``[1 or B, 1, n, T]``.
            rows: the earlier keys and values, to which the new ones are written; None = the new ones are all.

        Returns:
            ``[B, n, H]``.
        """
        q, k, v = (self._split(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = self._angles(positions, x.dtype)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if rows is not None:
            k, v = rows.write(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != self.kv_heads)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        angles = positions[..., None].float() * self.rope_theta**-half
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class GrowingRows:
    """Keys and values of one layer for the rows of one request, each row as long as its own text.

    Slot i of a row holds its i-th state, and i is its position. What is written stays only where ``commit`` says so:
    the next ``begin`` starts behind the committed states.

    Args:
        batch: B.
        attention: the layer.
        reserve: slots to make at first; more are made when they are needed.
    """

    def __init__(self, batch: int, attention: CausalAttention, reserve: int = 256) -> None:
        like = attention.k_proj.weight
        shape = (batch, attention.kv_heads, reserve, attention.head_dim)
        self._keys, self._values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.lengths = [0] * batch
        self._slots: int | Tensor = 0
        self._seen = 0

    def begin(self, count: int, ahead: int = 0) -> tuple[Tensor, Tensor]:
        """Announce ``count`` states per row, ``ahead`` slots behind the committed ones.

        Returns:
            positions int64 ``[1 or B, n]`` and ``visible`` bool ``[1 or B, 1, n, T]``, for ``CausalAttention``.
        """
        device = self._keys.device
        self._seen = max(self.lengths) + ahead + count
        if self._seen > self._keys.shape[2]:
            more = max(self._seen, 2 * self._keys.shape[2]) - self._keys.shape[2]
            self._keys, self._values = (F.pad(x, (0, 0, 0, more)) for x in (self._keys, self._values))
        if len(set(self.lengths)) == 1:
            self._slots = self.lengths[0] + ahead
            positions = torch.arange(self._slots, self._seen, device=device)[None]
        else:
            starts = torch.tensor(self.lengths, device=device)[:, None]
            positions = self._slots = starts + torch.arange(ahead, ahead + count, device=device)
        visible = torch.arange(self._seen, device=device) <= positions[..., None]
        return positions, visible.unsqueeze(1)

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values ``[B, G, n, d]`` into the announced slots; returns all that are seen ``[B, G, T, d]``."""
        for store, new in ((self._keys, k), (self._values, v)):
            if isinstance(self._slots, int):
                store[:, :, self._slots : self._slots + new.shape[2]] = new
            else:
                rows = torch.arange(new.shape[0], device=new.device)[:, None]
                store[rows, :, self._slots] = new.transpose(1, 2)
        return self._keys[:, :, : self._seen], self._values[:, :, : self._seen]

    def commit(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` states written for row b behind those it has."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]


def prompt_states(prefill: Prefill, tap: Tap) -> tuple[Tensor, list[int]]:
    """The states of the prompt without its left padding.

    Returns:
        ``[B, W', H]``, every row's own from column 0 on (what follows them is of no meaning), and how many they are.
    """
    states, width = prefill.states[tap], prefill.token_ids.shape[1]
    columns = states.shape[1]
    counts = [min(width - pad, columns) if width else columns for pad in prefill.padding]
    if min(counts) == columns:
        return states, counts
    shift = torch.tensor([columns - count for count in counts], device=states.device)[:, None]
    column = (torch.arange(columns, device=states.device) + shift) % columns
    return states[torch.arange(len(counts), device=states.device)[:, None], column], counts
