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
from specdec.transfer import upload
from specdec.tree import Topology
from specdec.visibility import FULL, AttentionKinds, attention_masks

_EVERYTHING = AttentionKinds({FULL: 0}, by_layer=False)


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

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor | None, rows: GrowingRows | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``[B, n, H]``.
            positions: int64 ``[1 or B, n]``.
            visible: bool, or an additive mask of the dtype of ``x``, ``[1 or B, 1, n, T]``; None = every key.
            rows: the earlier keys and values, to which the new ones are written; None = the new ones are all.

        Returns:
            ``[B, n, H]``.
        """
        angles = self._angles(positions, x.dtype)
        q, (k, v) = _rotate(self._split(self.q_proj(x)), *angles), self._keys_and_values(x, angles)
        if rows is not None:
            k, v = rows.write(k, v)
        if q.shape[2] == 1:
            # On CPUs torch takes longer over one bfloat16 query than over two (300 keys: 0.19 and 0.12 ms).
            q = q.expand(-1, -1, 2, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != self.kv_heads)
        return self.o_proj(mixed[:, :, : x.shape[1]].transpose(1, 2).flatten(2))

    def remember(self, x: Tensor, positions: Tensor, rows: GrowingRows) -> None:
        """Write the keys and values of ``x [B, n, H]`` and no more: what a text already read leaves behind."""
        rows.write(*self._keys_and_values(x, self._angles(positions, x.dtype)))

    def _keys_and_values(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _rotate(self._split(self.k_proj(x)), *angles), self._split(self.v_proj(x))

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
        positions = self._place(count, ahead)
        visible = torch.arange(self._seen, device=positions.device) <= positions[..., None]
        return positions, visible.unsqueeze(1)

    def begin_nodes(self, topology: Topology, nodes: slice) -> tuple[Tensor, Tensor | None]:
        """Announce the states of a stretch of a tree whose root comes next; node i takes slot i behind the committed.

        Returns:
            positions, by the depths of the nodes, and what they see (the committed states, their ancestors and
            themselves), for ``CausalAttention``.
        """
        self._place(nodes.stop - nodes.start, nodes.start)
        topology = topology.to(self._keys.device)
        first = self.lengths[:1] if len(set(self.lengths)) == 1 else self.lengths
        positions = topology.depths[:, nodes] + upload(first, self._keys.device)[:, None]
        return positions, attention_masks(_EVERYTHING, topology, nodes, self.lengths, self._keys.dtype)

    def _place(self, count: int, ahead: int) -> Tensor:
        """Choose the slots of the next states ``[1 or B, n]`` and make room for them."""
        device = self._keys.device
        self._seen = max(self.lengths) + ahead + count
        if self._seen > self._keys.shape[2]:
            more = max(self._seen, 2 * self._keys.shape[2]) - self._keys.shape[2]
            self._keys, self._values = (F.pad(x, (0, 0, 0, more)) for x in (self._keys, self._values))
        if len(set(self.lengths)) == 1:
            self._slots = self.lengths[0] + ahead
            return torch.arange(self._slots, self._seen, device=device)[None]
        starts = upload(self.lengths, device)[:, None]
        self._slots = starts + torch.arange(ahead, ahead + count, device=device)
        return self._slots

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

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit the states of ``paths[b]``, numbered as they were written behind the committed ones, in that order."""
        longest = max(len(path) for path in paths)
        if any(list(path) != list(range(len(path))) for path in paths):
            # Short rows are filled up with moves of a slot onto itself.
            moves = [
                [[length + node for node in (*path, *range(len(path), longest))], [*range(length, length + longest)]]
                for length, path in zip(self.lengths, paths, strict=True)
            ]
            source, target = upload(moves, self._keys.device).unbind(1)
            rows = torch.arange(len(paths), device=self._keys.device)[:, None]
            for store in (self._keys, self._values):
                store[rows, :, target] = store[rows, :, source]
        self.commit([len(path) for path in paths])


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
