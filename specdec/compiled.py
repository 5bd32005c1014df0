"""The target's full pass over a tree as a compiled graph: one per batch size and bucket of nodes.

A pass over a small model is bound by the dispatch of its operations, which a graph does not pay. What makes a graph
worth its compilation is that its shapes recur: trees are padded to a bucket, inputs lie in buffers that are written in
place, and the number of slots is a symbol of the graph, so that a growing text recompiles nothing.

Shapes: B rows, N nodes, M nodes of the bucket, K slots seen, C slots allocated, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.cache import TreeCache
from specdec.interfaces import Context, Tap

BACKEND = "inductor"
_SPAN = 64  # slots by which the seen part of the cache grows
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_UNDERSTOOD = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}  # of a template


class _Graphs(dict[tuple[int, int], Any]):
    """(Rows, nodes) -> graph, and the weights that the graphs were made with."""

    weights: tuple[tuple[int, int], ...] = ()


# Whoever speculates with a model, its passes are the same.
_GRAPHS: weakref.WeakKeyDictionary[Any, _Graphs] = weakref.WeakKeyDictionary()


class _Inputs:
    """What changes from pass to pass, in tensors that stay.

    Attributes:
        token_ids, positions, slots: int64 ``[B, M]``.
        masks: attention kind -> ``[B, 1, M, C]``, additive; nodes beyond the tree see nothing in particular.
        seen: attention kind -> its first K columns.
    """

    def __init__(
        self, cache: TreeCache, batch: int, bucket: int, masks: dict[str, Tensor | None], like: Tensor
    ) -> None:
        def ints() -> Tensor:
            return torch.zeros(batch, bucket, dtype=torch.int64, device=like.device)

        self.token_ids, self.positions, self.slots = ints(), ints(), ints()
        shape, low = (batch, 1, bucket, cache.capacity), torch.finfo(like.dtype).min
        self.masks = {kind: torch.full(shape, low, dtype=like.dtype, device=like.device) for kind in masks}
        self.seen = dict(self.masks)
        self.low = low

    @property
    def span(self) -> int:
        """K."""
        return next(iter(self.seen.values())).shape[-1]

    def fill(self, inputs: dict[str, Any], slots: int | Tensor, masks: dict[str, Tensor | None], columns: int) -> None:
        """Write a pass over ``[B, N]``; ``columns`` = slots that its masks cover."""
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        nodes, bucket = ids.shape[1], self.slots.shape[1]
        self.token_ids[:, :nodes] = ids
        self.positions[:, :nodes] = positions
        if isinstance(slots, int):
            torch.arange(slots, slots + bucket, out=self.slots[0])
            self.slots[1:] = self.slots[0]
        else:
            self.slots[:, :nodes] = slots
            spare = torch.arange(1, bucket - nodes + 1, device=slots.device)
            self.slots[:, nodes:] = slots[:, -1:] + spare
        span = min(-(-(columns + bucket - nodes) // _SPAN) * _SPAN, self.masks[next(iter(masks))].shape[-1])
        for kind, mask in masks.items():
            whole = self.masks[kind]
            whole[:, :, :nodes, :columns] = 0 if mask is None else mask
            whole[:, :, :nodes, columns:span] = self.low
            self.seen[kind] = whole[..., :span]
            torch._dynamo.maybe_mark_dynamic(self.seen[kind], 3)


class _Layer(CacheLayerMixin):
    """K/V of one decoder layer for a graph: writes the nodes' slots in place, shows as many as the masks cover."""

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, inputs: _Inputs) -> None:
        super().__init__()
        self.keys, self.values, self.inputs = keys, values, inputs
        self.is_initialized = True
        for store in (keys, values):
            torch._dynamo.maybe_mark_dynamic(store, 2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        raise AssertionError("a layer of a graph stands on slabs that exist")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        slots, span = self.inputs.slots, self.inputs.span
        return _written(self.keys, slots, key_states, span), _written(self.values, slots, value_states, span)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - transformers' signature
        return self.inputs.span, 0

    def get_seq_length(self) -> int:
        return self.inputs.span - self.inputs.slots.shape[1]

    def get_max_length(self) -> int:
        return -1


def _written(store: Tensor, slots: Tensor, states: Tensor, span: int) -> Tensor:
    batch, heads, capacity, dim = store.shape
    first = torch.arange(batch * heads, device=store.device).view(batch, heads, 1) * capacity
    rows = (first + slots[:, None]).view(-1)
    store.view(-1, dim).index_copy_(0, rows, states.reshape(-1, dim).to(store.dtype))
    return store[:, :, :span]


def _forward(decoder: Any, head: Any, inputs: _Inputs, by_layer: bool, cache: Cache) -> tuple[Tensor, Tensor | None]:
    """Final states ``[B, M, H]``, and logits ``[B, M, V]`` where a head is given."""
    states = decoder(
        input_ids=inputs.token_ids,
        position_ids=inputs.positions,
        attention_mask=inputs.seen if by_layer else next(iter(inputs.seen.values())),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return states, None if head is None else head(states)


def _fresh(function: Any) -> FunctionType:
    """The same function as code of its own: the compiler counts the graphs of each code object, whoever runs it."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _constant_weights() -> AbstractContextManager[Any]:
    # Weights that a graph holds as constants can be laid out for a CPU's matrix units, which takes a third off a pass
    # over 25 nodes of the demo target. When they change the graphs are made anew, see ``CompiledPass._weights``.
    import torch._inductor.config as inductor

    return inductor.patch(freezing=True)


class CompiledPass:
    """Runs full passes over trees as graphs.

    Args:
        model: the target's model; what leaves its decoder is what its output head receives.
        head: the output embedding where the logits are its product and nothing comes after it, else None.
        max_nodes: N of the largest tree to come, a bucket of its own.
        announce: told what is being compiled, and how long it took.
    """

    def __init__(self, model: Any, head: Any, max_nodes: int, announce: Callable[[str], None]) -> None:
        self.decoder, self.head, self.announce = model.get_decoder(), head, announce
        self.name = type(model).__name__
        self.buckets = sorted({max_nodes, *(size for size in _SIZES if size < max_nodes)})
        self.failure: str | None = None
        self._graphs = _GRAPHS.setdefault(model, _Graphs())
        self._on_cpu = next(model.parameters()).device.type == "cpu"
        self._views: dict[tuple[int, int], tuple[_Inputs, Cache]] = {}
        self._of: tuple[Callable[[], TreeCache | None], int] = (lambda: None, 0)

    def takes(self, context: Context, num_nodes: int, taps: Sequence[Tap]) -> bool:
        """Whether a full pass over so many nodes can run as a graph."""
        template = context.template
        return (
            self.failure is None
            and num_nodes <= self.buckets[-1]
            and template.keys() <= _UNDERSTOOD
            and not template.get("output_hidden_states")
            and not template.get("output_attentions")
            and template["position_ids"].dim() == 2
            and all(tap == "final" for tap in taps)
        )

    def bucket(self, num_nodes: int) -> int:
        """M for a tree of N nodes."""
        return next(size for size in self.buckets if size >= num_nodes)

    def __call__(self, context: Context, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        """Final states ``[B, N, H]`` and logits ``[B, N, V]`` (None without a head) of a pass.

        Args:
            context: the request; its cache has begun the pass and has room for the bucket.
            inputs: keyword arguments of an ordinary pass over ``[B, N]``.

        Returns:
            None where the graph cannot be made; ``failure`` says why, and nothing is tried again.
        """
        batch, nodes = inputs["input_ids"].shape
        key = (batch, self.bucket(nodes))
        masks = inputs["attention_mask"]
        by_layer = isinstance(masks, dict)
        masks = masks if by_layer else {"all": masks}
        filled, cache = self._view(context, key, masks)
        filled.fill(inputs, context.cache.slots, masks, context.cache.span)
        first = key not in self._graphs
        if first:
            self._graphs[key] = torch.compile(_fresh(_forward), dynamic=False, backend=BACKEND)
            self.announce(f"compiling {self.name} for {key[1]} nodes x {batch} rows ...")
        start = time.perf_counter()
        try:
            with torch.no_grad(), _constant_weights() if first and self._on_cpu else nullcontext():
                states, logits = self._graphs[key](self.decoder, self.head, filled, by_layer, cache)
        except Exception as error:  # noqa: BLE001 - whatever a compiler may throw, ordinary passes go on
            lines = str(error).strip().splitlines() or [""]
            self.failure = f"{type(error).__name__}: {lines[0]}"
            return None
        if first:
            self.announce(
                f"compiled {self.name} for {key[1]} nodes x {batch} rows in {time.perf_counter() - start:.0f} s"
            )
        return states[:, :nodes], None if logits is None else logits[:, :nodes]

    def _weights(self) -> tuple[tuple[int, int], ...]:
        """What tells that a weight was replaced or written to."""
        known = (*self.decoder.parameters(), *(() if self.head is None else self.head.parameters()))
        return tuple((weight.data_ptr(), -1 if weight.is_inference() else weight._version) for weight in known)

    def _view(self, context: Context, key: tuple[int, int], masks: dict[str, Tensor | None]) -> tuple[_Inputs, Cache]:
        """The inputs of a graph, and the request's cache as its layers see it."""
        cache = context.cache
        if self._of[0]() is not cache or self._of[1] != cache.capacity:  # another request, or slabs that have grown
            self._views.clear()
            self._of = weakref.ref(cache), cache.capacity
            weights = self._weights()
            if self._graphs.weights != weights:
                self._graphs.clear()
                self._graphs.weights = weights
        if key not in self._views:
            like = torch.empty(0, dtype=context.dtype, device=context.template["position_ids"].device)
            inputs = _Inputs(cache, *key, masks, like)
            layers = [_Layer(layer.keys, layer.values, inputs) for layer in cache.layers]
            self._views[key] = inputs, Cache(layers=layers)
        return self._views[key]
