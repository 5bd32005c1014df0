"""A pass of the unmodified model as a graph of tensor operations.

The model's own forward is traced by ``torch.export`` under the same patches and hooks as an ordinary pass
(``specdec.routing``), so layer ranges, skipped parts, stored states and taps need no graph of their own kind, and
soft-caps, scalings and whatever else lies between decoder and logits is in it.

Shapes: B rows, M nodes, K slots seen, C slots allocated, H hidden size, V vocabulary. K and C are symbols of the
graph, so that a growing text, and slabs that grow with it, need no other one. So is B where there are several rows; a
single row has a graph of its own, which is the quicker for knowing it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.graphs.buffers import Buffers, PassShape
from specdec.interfaces import Tap
from specdec.routing import Router

MODEL = "model"  # under which name the traced module holds the model
_MOST_SLOTS = 1 << 20
MOST_ROWS = 256  # what a GPU's kernel cannot count in 32 bits under these bounds it counts in 64


class TracedLayer(CacheLayerMixin):
    """K/V of one decoder layer inside a graph: writes the nodes' slots in place, shows the K first."""

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, span: int) -> None:
        super().__init__()
        self.keys, self.values, self.slots, self.span = keys, values, slots, span
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        raise AssertionError("a layer of a graph stands on slabs that exist")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._written(self.keys, key_states), self._written(self.values, value_states)

    def _written(self, store: Tensor, states: Tensor) -> Tensor:
        batch, heads, capacity, dim = store.shape
        torch._check(self.span <= capacity)
        first = torch.arange(batch * heads, device=store.device).view(batch, heads, 1) * capacity
        rows = (first + self.slots.to(store.device)[:, None]).view(-1)
        store.view(-1, dim).index_copy_(0, rows, states.reshape(-1, dim).to(store.dtype))
        return store[:, :, : self.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - transformers' signature
        return self.span, 0

    def get_seq_length(self) -> int:
        return self.span - self.slots.shape[1]

    def get_max_length(self) -> int:
        return -1


class PassModule(nn.Module):
    """One shape of passes as a module that takes and returns tensors only.

    Args:
        model: the causal LM.
        router: of its layers.
        shape: of the passes.
        kinds: kinds of attention in the order of the masks; None = the model takes one mask, not a dict.
    """

    def __init__(self, model: Any, router: Router, shape: PassShape, kinds: list[str] | None) -> None:
        super().__init__()
        self.add_module(MODEL, model)
        self.router, self.shape, self.kinds = router, shape, kinds

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """``Buffers.tensors`` in; out: logits ``[B, M, V]`` where the route has any, then ``[B, M, H]`` per tap."""
        token_ids, positions, slots, extent, *rest = tensors
        span = extent.shape[0]
        count = 1 if self.kinds is None else len(self.kinds)
        masks = rest[:count] if self.shape.words else [mask[..., :span] for mask in rest[:count]]
        states = rest[count] if self.shape.enters else None
        slabs = rest[count + self.shape.enters :]
        half = len(slabs) // 2
        pairs = zip(slabs[:half], slabs[half:], strict=True)
        route, taps = self.shape.route, self.shape.taps
        with self.router.route(route, states), self.router.taps(taps) as recorded:
            outputs = self._modules[MODEL](  # type: ignore[misc]
                input_ids=token_ids,
                position_ids=positions,
                attention_mask=masks[0] if self.kinds is None else dict(zip(self.kinds, masks, strict=True)),
                past_key_values=Cache(layers=[TracedLayer(keys, values, slots, span) for keys, values in pairs]),
                use_cache=True,
                return_dict=True,
            )
        return [*([outputs.logits] if route.logits else []), *(recorded[tap][0] for tap in taps)]


def unpack(shape: PassShape, outputs: list[Tensor], nodes: int) -> tuple[Tensor | None, dict[Tap, Tensor]]:
    """Logits and taps of the first ``nodes`` nodes from what ``PassModule.forward`` returned."""
    found = [output[:, :nodes] for output in outputs]
    logits = found.pop(0) if shape.route.logits else None
    return logits, dict(zip(shape.taps, found, strict=True))


def trace(module: PassModule, buffers: Buffers) -> torch.export.ExportedProgram:
    """The graph of a module over inputs like these.

    Args:
        module: what to trace.
        buffers: only their shapes count; nothing is computed or written.
    """
    capacity = torch.export.Dim("capacity", min=3, max=_MOST_SLOTS)
    seen = torch.export.Dim("seen", min=2, max=_MOST_SLOTS - 1)
    rows = {0: torch.export.Dim("rows", min=2, max=MOST_ROWS)} if module.shape.batch is None else {}
    masks, slabs = len(buffers.masks), 2 * len(buffers.slabs[0])
    entering = 0 if buffers.states is None else 1
    sizes: list[dict[int, Any]] = [rows, rows, rows, {0: seen}]
    sizes += [rows if buffers.packed else rows | {3: capacity}] * masks + [rows] * entering
    sizes += [rows | {2: capacity}] * slabs
    # Any two different sizes: they become the symbols K and C.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tracer's own deprecations
        return torch.export.export(
            module, tuple(buffers.tensors(buffers.usable // 2)), dynamic_shapes=(tuple(sizes),), strict=False
        )
