"""What a graph reads, in tensors that stay: it is traced, compiled or captured over them, and a pass fills them.

Shapes: B rows, n nodes of a pass, M nodes of its bucket (n <= M), K slots seen, C slots allocated, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.cache import TreeCache
from specdec.interfaces import Tap
from specdec.routing import Route

_SPAN = 64  # slots by which the seen part of the cache grows


@dataclass(frozen=True)
class PassShape:
    """Passes that share a graph.

    Attributes:
        batch: B; None = any number of rows from 2 to ``tracing.MOST_ROWS``, a symbol of the graph.
        nodes: M.
        route: what part of the model runs; states enter where ``route.lo > 0``.
        taps: states that it returns.
        attention: that layers use, told apart by name and code (``graphs.state.attention_key``).
        words: W of packed masks; 0 = masks are additive.
        cache: dtypes of the slabs, K and V by layer; a single one where they agree.
        autocast: to which torch casts on the way; None = it does not.
    """

    batch: int | None
    nodes: int
    route: Route
    taps: tuple[Tap, ...] = ()
    attention: str = ""
    words: int = 0
    cache: tuple[torch.dtype, ...] = ()
    autocast: torch.dtype | None = None

    @property
    def enters(self) -> bool:
        """Whether states are put in instead of tokens."""
        return self.route.lo > 0

    def __str__(self) -> str:
        route = self.route
        parts = f"{self.nodes} nodes x {'any number of' if self.batch is None else self.batch} rows"
        if route.hi is not None:
            parts += f", layers {route.lo} to {route.hi}"
        elif route.lo:
            parts += f", layers from {route.lo}"
        skipped = len(route.skip_attention) + len(route.skip_mlp)
        return parts + (f", {skipped} parts skipped" if skipped else "")


class Buffers:
    """The inputs of one graph over one cache.

    Nodes beyond a pass's own write into a slot that nobody reads (the last one, which the cache keeps free), and what
    they see is finite.

    Args:
        shape: of the passes.
        cache: K/V that they read and write.
        kinds: kinds of attention, each with a mask of its own.
        like: dtype and device of the masks.
        hidden: states that enter are ``[B, M, hidden]``; 0 = none do.

    Attributes:
        token_ids, positions, slots: int64 ``[B, M]``.
        masks: attention kind -> ``[B, 1, M, C]``, additive, or int64 ``[B, 1, M, 3 + W]``, packed.
        states: ``[B, M, H]``, or None.
        usable: most slots that a pass may see; graphs hold for K < C.
    """

    def __init__(self, shape: PassShape, cache: TreeCache, kinds: list[str], like: Tensor, hidden: int) -> None:
        batch = cache.layers[0].keys.shape[0]  # of this request, a number also where the graph has a symbol
        assert shape.batch in (batch, None), f"a graph for {shape.batch} rows, a request of {batch}"

        def ints() -> Tensor:
            return torch.zeros(batch, shape.nodes, dtype=torch.int64, device=like.device)

        self.token_ids, self.positions, self.slots = ints(), ints(), ints()
        self.low = torch.finfo(like.dtype).min
        size = (batch, 1, shape.nodes)
        if shape.words:
            empty = torch.zeros(*size, 3 + shape.words, dtype=torch.int64, device=like.device)
        else:
            empty = torch.full((*size, cache.capacity), self.low, dtype=like.dtype, device=like.device)
        self.masks = {kind: empty.clone() for kind in kinds}
        self.packed = shape.words > 0
        self.states = like.new_zeros(batch, shape.nodes, hidden) if hidden else None
        self.slabs = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
        self._extent = torch.zeros(cache.capacity, dtype=torch.int8, device=like.device)
        self.usable = cache.usable
        self._reached = 0  # columns that some pass has made visible

    def fill(self, inputs: Mapping[str, Any], cache: TreeCache, states: Tensor | None) -> list[Tensor]:
        """Write a pass over ``[B, n]`` and return what the graph takes, in its order (``graphs.tracing``).

        Args:
            inputs: keyword arguments of the ordinary pass.
            cache: the request's, which has begun the pass.
            states: ``[B, n, H]`` that enter, or None.
        """
        ids, nodes = inputs["input_ids"], inputs["input_ids"].shape[1]
        self.token_ids[:, :nodes] = ids
        self.positions[:, :nodes] = inputs["position_ids"]
        if isinstance(cache.slots, int):
            torch.arange(cache.slots, cache.slots + nodes, out=self.slots[0, :nodes])
            self.slots[1:, :nodes] = self.slots[0, :nodes]
        else:
            self.slots[:, :nodes] = cache.slots
        if nodes < self.slots.shape[1]:
            self.slots[:, nodes:] = cache.capacity - 1
        span = -(-cache.span // _SPAN) * _SPAN
        masks = inputs["attention_mask"]
        for kind, whole in self.masks.items():
            mask = masks[kind] if isinstance(masks, dict) else masks
            if self.packed:
                _fill_packed(whole, mask, nodes)
                continue
            whole[:, :, :nodes, : cache.span] = 0 if mask is None else mask
            whole[:, :, :nodes, cache.span : max(span, self._reached)] = self.low
        self._reached = max(cache.span, self._reached)
        if self.states is not None:
            assert states is not None, "this route starts from states"
            self.states[:, :nodes] = states
        return self.tensors(span)

    def tensors(self, span: int) -> list[Tensor]:
        """Everything the graph takes, for a pass that sees slots ``0..span-1``."""
        assert span <= self.usable, "the last slots are nobody's"
        entering = [] if self.states is None else [self.states]
        start = [self.token_ids, self.positions, self.slots, self._extent[:span]]
        return [*start, *self.masks.values(), *entering, *self.slabs[0], *self.slabs[1]]


def _fill_packed(whole: Tensor, mask: Tensor, nodes: int) -> None:
    """Nodes beyond the pass see the committed tokens that the first one sees, and no node."""
    columns = mask.shape[3]
    whole[:, :, :nodes, :columns] = mask
    whole[:, :, :nodes, columns:] = 0
    whole[:, :, nodes:, :3] = mask[:, :, :1, :3]
    whole[:, :, nodes:, 3:] = 0
