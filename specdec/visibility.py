"""Which cache slots a node of a tree may see: committed prefix, own ancestors, window or chunk.

The topology says who is whose ancestor (``tree.py``); this file says how that becomes the attention masks of a model,
by the same rule by which transformers picks a mask per layer type.

Worked example, P = 3 committed tokens and the tree of ``tree.py``, full attention (columns are slots)::

    node 0   1 1 1  1 . . . .
    node 1   1 1 1  1 1 . . .
    node 3   1 1 1  1 1 . 1 .

A window of w shows slots whose *position* (committed: slot; node: P + depth) is above position - w; a chunk of c shows
positions with the same quotient by c.

The same as a *packed mask*, for attention that tells by itself what a node sees: int64 ``[B, 1, n, 3 + W]`` with, for
every node, the number of committed tokens, the number of nodes whose keys may be seen, the first committed slot that it
sees, and one bit per node, 64 to a word. It has four dimensions like the other kind, so models hand it on unread; it
does not grow with the text, and all that changes from pass to pass is on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.transfer import upload
from specdec.tree import Topology, packed_bits

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
KNOWN_LAYER_TYPES = (FULL, SLIDING, CHUNKED)


@dataclass(frozen=True)
class AttentionKinds:
    """The kinds of attention in a model.

    Attributes:
        sizes: kind -> window or chunk in tokens (0 for full attention).
        by_layer: whether the model wants a dict of masks by layer type, else one mask for all layers.
    """

    sizes: dict[str, int]
    by_layer: bool

    @classmethod
    def of(cls, config: Any) -> AttentionKinds:
        """Read a text config by transformers' own rule: layer types, else a window, else a chunk, else full."""
        window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        sizes = {FULL: 0, SLIDING: window or 0, CHUNKED: chunk or 0}
        if hasattr(config, "layer_types"):
            # Types that are no attention we know are left in, for the capability check to name.
            return cls({kind: sizes.get(kind, 0) for kind in dict.fromkeys(config.layer_types)}, True)
        kind = SLIDING if window is not None else CHUNKED if chunk is not None else FULL
        return cls({kind: sizes[kind]}, False)


def attention_masks(
    kinds: AttentionKinds, topology: Topology, nodes: slice, lengths: Sequence[int], dtype: torch.dtype
) -> Any:
    """Additive masks of a pass over ``nodes`` of a tree.

    Args:
        kinds: the model's kinds of attention.
        topology: of the tree.
        nodes: the stretch that runs; its keys reach from slot 0 to node ``nodes.stop - 1``.
        lengths: P_b of each row.
        dtype: of the masks.

    Returns:
        ``[B, 1, n, K]`` with K = max(P_b) + nodes.stop, or None where everything is visible (one node, rows of one
        length); as a dict by layer type where the model wants one.
    """
    masks = {kind: _mask(kind, size, topology, nodes, lengths, dtype) for kind, size in kinds.sizes.items()}
    return masks if kinds.by_layer else next(iter(masks.values()))


def _mask(
    kind: str, size: int, topology: Topology, nodes: slice, lengths: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    uniform, longest = len(set(lengths)) == 1, max(lengths)
    reaches_all = kind == FULL or (kind == SLIDING and longest + topology.max_depth < size)
    if uniform and reaches_all:
        if nodes.stop == 1:
            return None
        mask = topology.additive_mask(dtype, longest)
        if nodes.stop - nodes.start < topology.num_nodes:
            mask = mask[:, :, nodes, : longest + nodes.stop]
        return mask if len(mask) == len(lengths) else mask.expand(len(lengths), -1, -1, -1)
    visible = _visible(kind if not reaches_all else FULL, size, topology, nodes, lengths)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def _visible(kind: str, size: int, topology: Topology, nodes: slice, lengths: Sequence[int]) -> Tensor:
    """The definition: bool ``[B, n, K]``."""
    device = topology.parents.device
    committed = upload(lengths, device)[:, None]
    slots = torch.arange(max(lengths) + nodes.stop, device=device)[None]
    rows = len(lengths)
    node = slots - committed  # [B, K], negative = committed prefix
    inside = node.clamp(0, nodes.stop - 1)
    depths = topology.depths.expand(rows, -1)
    ancestors = topology.ancestors[:, nodes].expand(rows, -1, -1)
    related = ancestors.gather(2, inside[:, None].expand(-1, ancestors.shape[1], -1))
    visible = torch.where((node < 0)[:, None], True, related & (node < nodes.stop)[:, None])
    if kind == FULL:
        return visible
    query = (committed + depths[:, nodes])[:, :, None]
    key = torch.where(node < 0, slots, committed + depths.gather(1, inside))[:, None]
    near = key > query - size if kind == SLIDING else key // size == query // size
    return visible & near


def packed_masks(kinds: AttentionKinds, topology: Topology, nodes: slice, lengths: Sequence[int]) -> Any:
    """Packed masks of a pass over ``nodes`` of a tree; arguments as for ``attention_masks``.

    Returns:
        int64 ``[B, 1, n, 3 + W]``; as a dict by layer type where the model wants one.
    """
    masks = {kind: _packed(kind, size, topology, nodes, lengths) for kind, size in kinds.sizes.items()}
    return masks if kinds.by_layer else next(iter(masks.values()))


def _packed(kind: str, size: int, topology: Topology, nodes: slice, lengths: Sequence[int]) -> Tensor:
    rows, stop, device = len(lengths), nodes.stop, topology.parents.device
    words = topology.words[:, nodes, : -(-stop // 64)]
    packed = torch.empty(rows, 1, words.shape[1], 3 + words.shape[2], dtype=torch.int64, device=device)
    uniform = len(set(lengths)) == 1
    committed: int | Tensor = lengths[0] if uniform else upload(lengths, device)[:, None]
    packed[:, 0, :, 0] = committed
    packed[:, 0, :, 1] = stop
    if kind == FULL or (kind == SLIDING and max(lengths) + topology.max_depth < size):
        packed[:, 0, :, 2] = 0
    else:
        positions = committed + topology.depths[:, :stop]
        queries = positions[:, nodes]
        first = queries - size + 1 if kind == SLIDING else queries // size * size
        packed[:, 0, :, 2] = first.clamp(min=0)
        if kind == CHUNKED or topology.max_depth >= size:  # ancestors may be out of sight themselves
            near = positions[:, None] >= first[:, :, None]
            words = packed_bits(topology.ancestors[:, nodes, :stop] & near)
    packed[:, 0, :, 3:] = words
    return packed


def packed_visibility(mask: Tensor, slots: int) -> Tensor:
    """The definition of a packed mask: which of ``slots`` every node sees, bool ``[B, n, slots]``."""
    slot = torch.arange(slots, device=mask.device)
    committed, stop, first = (mask[:, 0, :, column, None] for column in range(3))
    node = slot - committed
    word = (node.clamp(min=0) // 64).clamp(max=mask.shape[3] - 4)
    related = mask[:, 0, :, 3:].gather(2, word) >> (node % 64) & 1 > 0
    return torch.where(node < 0, slot >= first, related & (node < stop))
