"""How fast attention alone is over a long text and a tree: the kernel, sdpa with a mask, FlexAttention, and the limit.

What is timed is one attention call of one layer, keys and values out of memory: calls go over copies of them that do
not fit into the cache of the device together, as the layers of a model do. On CUDA a graph of calls is replayed, so
that no launch is waited for. The limit is a copy of memory on the same device, in the same unit.

Shapes: B rows, P committed tokens, N nodes, Hq and Hkv heads, D head size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from specdec.tree import Topology, from_host
from specdec.visibility import FULL, AttentionKinds, packed_masks, packed_visibility
from verifiers.kernels import plain

CONTEXTS = (512, 2048, 8192, 32768)
NODES = (1, 16, 32, 64, 128)
METHODS = ("triton", "sdpa", "flex", "plain")
_COLD = 256 * 1024 * 1024  # bytes of keys and values that the calls go over at least on CUDA, beyond any cache
_MOST_COPIES = 64
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Shape:
    """One layer's attention: B rows, Hq and Hkv heads, D, in the dtype of keys and values."""

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One method at one context and tree.

    Attributes:
        method: of ``METHODS``.
        context, nodes: P and N.
        microseconds: of one call, median over the repeats; None where the method cannot run.
        gb_per_s: bytes of keys, values, queries and results (1e9 bytes) that such a call has to move, per second.
        share: of what a copy of memory moves per second on this device.
        difference: largest one from the definition, which is computed in float32.
        reason: why there is no time.
    """

    method: str
    context: int
    nodes: int
    microseconds: float | None
    gb_per_s: float | None
    share: float | None
    difference: float | None
    reason: str | None = None


@dataclass
class _Problem:
    """Queries and several copies of keys and values, with the masks that each method wants."""

    query: Tensor
    copies: list[tuple[Tensor, Tensor]]
    packed: Tensor
    scaling: float

    @property
    def bytes(self) -> int:
        """Read and written once by the best of all kernels: the keys and values that are seen, queries, results."""
        batch, kv_heads, _, dim = self.copies[0][0].shape
        seen = int(self.packed[0, 0, 0, 0]) + int(self.packed[0, 0, 0, 1])
        return (2 * batch * kv_heads * seen * dim + 2 * self.query.numel()) * self.query.element_size()


def attention_table(
    device: torch.device | str,
    contexts: Sequence[int] = CONTEXTS,
    nodes: Sequence[int] = NODES,
    shape: Shape | None = None,
    methods: Sequence[str] = ("triton", "sdpa", "flex"),
    repeats: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time every method at every context and tree.

    Args:
        device: CUDA for figures; on a CPU only the interpreter runs the kernel, which says nothing about speed.
        contexts: P, in tokens.
        nodes: N, trees of random shape.
        shape: of the layer; None = that of Llama-3-8B.
        methods: of ``METHODS``.
        repeats: timed runs, of which the median counts.
        progress: told (done, of) after every row.

    Returns:
        ``Row`` as a dict, one per method, context and tree; a method that cannot run says why.

    Raises:
        ValueError: an unknown method (lists those there are).
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; known: {', '.join(METHODS)}")
    device, shape = torch.device(device), shape or Shape()
    limit = copy_bandwidth(device, repeats=repeats)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        for count in nodes:
            problem = _problem(device, shape, context, count)
            expected = _definition(problem)
            for method in methods:
                rows.append(asdict(_row(method, problem, expected, limit, repeats)))
                if progress is not None:
                    progress(len(rows), len(contexts) * len(nodes) * len(methods))
    return rows


def copy_bandwidth(device: torch.device | str, size: int | None = None, repeats: int = 20) -> float:
    """Bytes per second (read and written) of a copy within the device's memory.

    Args:
        size: bytes of the copy; None = 1 GiB on CUDA, 64 MiB on a CPU.
        repeats: timed runs, of which the median counts.
    """
    device = torch.device(device)
    size = size or (2**30 if device.type == "cuda" else 2**26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device, repeats)


def random_tree(nodes: int, seed: int = 0) -> Topology:
    """A tree of N nodes, every parent drawn from the nodes before."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.rand(1, nodes, generator=generator) * torch.arange(nodes)
    return from_host(parents.long().numpy())


def _problem(device: torch.device, shape: Shape, context: int, nodes: int) -> _Problem:
    generator = torch.Generator(device).manual_seed(context * 1000 + nodes)
    slots = context + nodes

    def numbers(heads: int, length: int) -> Tensor:
        size = (shape.batch, heads, length, shape.dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)

    one = 2 * shape.batch * shape.kv_heads * slots * shape.dim * shape.dtype.itemsize
    count = min(-(-_COLD // one), _MOST_COPIES) if device.type == "cuda" else 1
    copies = [(numbers(shape.kv_heads, slots), numbers(shape.kv_heads, slots)) for _ in range(count)]
    topology = random_tree(nodes).to(device)
    packed = packed_masks(AttentionKinds({FULL: 0}, False), topology, slice(0, nodes), [context] * shape.batch)
    return _Problem(numbers(shape.heads, nodes), copies, packed, shape.dim**-0.5)


def _definition(problem: _Problem) -> Tensor:
    key, value = (tensor.float() for tensor in problem.copies[0])
    return plain.tree_attention(problem.query.float(), key, value, problem.packed, problem.scaling)


def _row(method: str, problem: _Problem, expected: Tensor, limit: float, repeats: int) -> Row:
    key = problem.copies[0][0]
    context, nodes = int(problem.packed[0, 0, 0, 0]), problem.query.shape[2]
    try:
        attend = _METHODS[method](problem)
        result = attend(*problem.copies[0]).float()
        calls = [partial(attend, *copy) for copy in problem.copies]
        seconds = _seconds(lambda: [call() for call in calls], key.device, repeats) / len(calls)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [""]
        return Row(method, context, nodes, None, None, None, None, f"{type(error).__name__}: {lines[0]}")
    difference = float((result - expected).abs().max())
    if not difference <= TOLERANCE[key.dtype]:
        return Row(method, context, nodes, None, None, None, difference, "wrong: it differs from the definition")
    rate = problem.bytes / seconds
    return Row(method, context, nodes, seconds * 1e6, rate / 1e9, rate / limit, difference)


def _triton(problem: _Problem) -> Callable[[Tensor, Tensor], Tensor]:
    from verifiers.kernels.tree_attention import tree_attention  # Triton need not be there

    return lambda key, value: tree_attention(problem.query, key, value, problem.packed, problem.scaling)


def _plain(problem: _Problem) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda key, value: plain.tree_attention(problem.query, key, value, problem.packed, problem.scaling)


def _sdpa(problem: _Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """As transformers calls it with a mask: an additive one, keys and values repeated for the heads that share them."""
    query, key = problem.query, problem.copies[0][0]
    visible = packed_visibility(problem.packed, key.shape[2])[:, None]
    mask = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
    mask.masked_fill_(~visible, torch.finfo(query.dtype).min)
    shared = query.shape[1] // key.shape[1]

    def attend(key: Tensor, value: Tensor) -> Tensor:
        if shared > 1:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        result = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=problem.scaling
        )
        return result.transpose(1, 2)

    return attend


def _flex(problem: _Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """Compiled, with the ancestors as a captured tensor and a block mask that is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key = problem.query, problem.copies[0][0]
    context = int(problem.packed[0, 0, 0, 0])
    related = packed_visibility(problem.packed, key.shape[2])[0, :, context:].contiguous()

    def visible(batch: Tensor, head: Tensor, node: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001 - its signature
        return (slot < context) | related[node, (slot - context).clamp(min=0)]

    blocks = create_block_mask(visible, None, None, query.shape[2], key.shape[2], device=str(query.device))

    def attend(key: Tensor, value: Tensor) -> Tensor:
        result = flex_attention(query, key, value, block_mask=blocks, scale=problem.scaling, enable_gqa=True)
        assert isinstance(result, Tensor)
        return result.transpose(1, 2)

    # Code of its own: the compiler gives up on code of which it has made many graphs.
    own = FunctionType(attend.__code__.replace(), attend.__globals__, "attend", None, attend.__closure__)
    return torch.compile(own, dynamic=False)


_METHODS: dict[str, Callable[[_Problem], Callable[[Tensor, Tensor], Tensor]]] = {
    "triton": _triton,
    "sdpa": _sdpa,
    "flex": _flex,
    "plain": _plain,
}


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of ``run`` in seconds; on CUDA of a graph of it, by the device's own clock."""
    if device.type != "cuda":
        run()
        return statistics.median(_timed(run) for _ in range(repeats))
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is compiled or allocated lazily is, before the capture
            run()
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(repeats + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[2:])


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
