"""Tree attention in Triton: split over the committed tokens without a mask, a bit mask over the nodes, then a merge.

The tokens before the tree are seen by all its nodes (but for windows), so the long part of the keys needs no mask at
all; only the N keys of the tree are tested against one bit per pair. Heads that share keys are packed into the rows
of one tile. The number of committed tokens is read on the device: one launch shape serves a growing text and ragged
rows, under CUDA graphs as well. Definition: ``verifiers.kernels.plain``; facts: Flash-Decoding (split-KV), DeFT
(arXiv:2404.00242, bit masks), LeanAttention (arXiv:2405.10480, the merge is associative).

Shapes: B rows, n nodes of a pass, N nodes whose keys may be seen, P_b committed tokens of row b, Hq and Hkv heads,
G = Hq / Hkv, D head size, M = n * G packed rows, S splits of the committed tokens, W words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = 1.4426950408889634
_HEADER = tl.constexpr(3)  # columns of a packed mask before its words
_LOW = tl.constexpr(float("-inf"))
_MAX_SPLITS = 32
_PARTS = 64  # room for all of them and the tree: one merge kernel however far the text has grown
_SLOTS_PER_SPLIT = 256  # fewer are not worth a program
_MERGED_ROWS = 4


class Launch(NamedTuple):
    """How a tile is run: packed rows and keys of a tile, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _rows_of(pointers, inside, dims, D: tl.constexpr, BD: tl.constexpr):
    """Load ``[rows, BD]`` where ``inside``, zeros elsewhere and beyond D."""
    if D == BD:
        return tl.load(pointers[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
    return tl.load(pointers[:, None] + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _whole_rows_of(pointers, dims, D: tl.constexpr, BD: tl.constexpr):
    """Load ``[rows, BD]``, zeros beyond D."""
    if D == BD:
        return tl.load(pointers[:, None] + dims[None, :])
    return tl.load(pointers[:, None] + dims[None, :], mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _scores(q, k, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 logarithms of unnormalised weights, ``[BM, BN]``."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (1 + e^2x); an e^2x beyond float32 leaves 1.
        scores = cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * 1.4426950408889634))))
    return scores


@triton.jit
def _add_tile(scores, v, acc, peak, total, PRECISION: tl.constexpr):
    """Online softmax: one more tile of keys. Rows that have seen nothing keep peak -inf and total 0."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(higher == _LOW, 0.0, higher)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(peak - safe)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit(do_not_specialize=["mask_batch", "mask_node", "nodes"])  # else variants that differ in nothing
def _partial(
    Q, K, V, MASK, OUT, LSE,
    q_batch, q_head, q_node, k_batch, k_head, k_slot, v_batch, v_head, v_slot, mask_batch, mask_node,
    nodes, scale, cap,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows over one split of the committed tokens, or (the last program) over the tree.

    Grid ``(M / BM, B * Hkv, S + 1)``. Writes normalised ``OUT [B * Hkv, S + 1, M, D]`` and ``LSE [B * Hkv, S + 1, M]``
    (base 2) in float32; an empty split writes LSE = -inf and no OUT.
    """
    pair, split, last = tl.program_id(1), tl.program_id(2), tl.num_programs(2) - 1
    batch, head = (pair // HKV).to(tl.int64), (pair % HKV).to(tl.int64)
    TN: tl.constexpr = min(BN, 32)
    count = nodes * G
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    real = rows < count
    node = tl.where(real, rows, 0) // G
    dims, cols = tl.arange(0, BD), tl.arange(0, BN)
    k_base, v_base = K + batch * k_batch + head * k_head, V + batch * v_batch + head * v_head
    mask_base = MASK + batch * mask_batch
    committed = tl.load(mask_base).to(tl.int32)
    first = tl.load(mask_base + node * mask_node + 2).to(tl.int32)
    lowest = tl.minimum(tl.min(first, 0), committed)

    if split == last:
        begin, end = committed, committed + tl.load(mask_base + 1).to(tl.int32)
        clear, even = end, begin
    else:
        # A window hides what lies below ``first``; from the highest of them to the last whole tile nothing is hidden.
        low = lowest // BN * BN
        share = tl.cdiv(tl.cdiv(committed - low, BN), last) * BN
        begin = low + split * share
        end = tl.minimum(begin + share, committed)
        clear = tl.cdiv(tl.max(first, 0), BN) * BN
        even = end // BN * BN
    out_row = (pair.to(tl.int64) * (last + 1) + split) * count + rows

    if begin >= end:
        tl.store(LSE + out_row, tl.full([BM], float("-inf"), tl.float32), mask=real)
    else:
        acc = tl.zeros([BM, BD], tl.float32)
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        q = _rows_of(Q + batch * q_batch + (head * G + rows % G) * q_head + node * q_node, real, dims, D, BD)
        if split == last:
            # Narrower tiles: the bit test needs registers of its own.
            few = tl.arange(0, TN)
            for at in tl.range(begin, end, TN, num_stages=1):
                slots = at + few
                inside = slots < end
                k = _rows_of(k_base + slots * k_slot, inside, dims, D, BD)
                v = _rows_of(v_base + slots * v_slot, inside, dims, D, BD)
                bit = at - begin
                words = tl.load(mask_base + node * mask_node + _HEADER + bit // 64) >> (bit % 64)
                visible = (words.to(tl.int32)[:, None] >> few[None, :]) & 1
                scores = tl.where(visible != 0, _scores(q, k, scale, cap, CAPPED, PRECISION), _LOW)
                acc, peak, total = _add_tile(scores, v, acc, peak, total, PRECISION)
        else:
            for at in tl.range(begin, tl.minimum(clear, end), BN, num_stages=1):
                slots = at + cols
                inside = (slots >= lowest) & (slots < end)
                k = _rows_of(k_base + slots * k_slot, inside, dims, D, BD)
                v = _rows_of(v_base + slots * v_slot, inside, dims, D, BD)
                visible = inside[None, :] & (slots[None, :] >= first[:, None])
                scores = tl.where(visible, _scores(q, k, scale, cap, CAPPED, PRECISION), _LOW)
                acc, peak, total = _add_tile(scores, v, acc, peak, total, PRECISION)
            for at in tl.range(tl.maximum(begin, clear), even, BN):
                slots = at + cols
                k = _whole_rows_of(k_base + slots * k_slot, dims, D, BD)
                v = _whole_rows_of(v_base + slots * v_slot, dims, D, BD)
                scores = _scores(q, k, scale, cap, CAPPED, PRECISION)
                acc, peak, total = _add_tile(scores, v, acc, peak, total, PRECISION)
            for at in tl.range(tl.maximum(tl.maximum(begin, clear), even), end, BN, num_stages=1):
                slots = at + cols
                inside = slots < end
                k = _rows_of(k_base + slots * k_slot, inside, dims, D, BD)
                v = _rows_of(v_base + slots * v_slot, inside, dims, D, BD)
                scores = tl.where(inside[None, :], _scores(q, k, scale, cap, CAPPED, PRECISION), _LOW)
                acc, peak, total = _add_tile(scores, v, acc, peak, total, PRECISION)
        some = tl.where(total > 0, total, 1.0)
        tl.store(LSE + out_row, tl.where(total > 0, peak + tl.log2(some), _LOW), mask=real)
        result = acc / some[:, None]
        tl.store(OUT + out_row[:, None] * D + dims[None, :], result, mask=real[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["count", "parts"])
def _merge(
    OUT, LSE, SINKS, RESULT, count, parts,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    WITH_SINKS: tl.constexpr,
):  # fmt: skip
    """Join the parts of every packed row: weights are softmax over LSE. Grid ``(M / BR, B * Hkv)``.

    Writes ``RESULT [B, n, Hq, D]``. A row that sees nothing becomes zeros.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // HKV, pair % HKV
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    real = rows < count
    dims, all_parts = tl.arange(0, BD), tl.arange(0, BS)
    row = pair * parts * count + rows
    known = real[:, None] & (all_parts < parts)[None, :]
    lse = tl.load(LSE + row[:, None] + all_parts[None, :] * count, mask=known, other=float("-inf"))
    peak = tl.max(lse, 1)
    if WITH_SINKS:
        sink = tl.load(SINKS + head * G + rows % G).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    safe = tl.where(peak == _LOW, 0.0, peak)
    total = tl.sum(tl.exp2(lse - safe[:, None]), 1)
    if WITH_SINKS:
        total += tl.exp2(sink - safe)
    acc = tl.zeros([BR, BD], tl.float32)
    for part in tl.range(0, parts):
        at = row + part * count
        weight = tl.exp2(tl.load(LSE + at, mask=real, other=float("-inf")) - safe)
        wanted = (real & (weight > 0))[:, None] & (dims < D)[None, :]
        acc += weight[:, None] * tl.load(OUT + at[:, None] * D + dims[None, :], mask=wanted, other=0.0)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = ((batch * (count // G) + rows // G) * HKV + head) * G + rows % G
    result = acc.to(RESULT.dtype.element_ty)
    tl.store(RESULT + place[:, None] * D + dims[None, :], result, mask=real[:, None] & (dims < D)[None, :])


INTERPRETED = not isinstance(_partial, JITFunction)  # TRITON_INTERPRET=1 when triton was imported: no GPU is needed


def padded_dim(dim: int) -> int:
    """The head size of a tile: matrix units want at least 16, and powers of two."""
    return max(16, triton.next_power_of_2(dim))


def launch_for(rows: int, dim: int, dtype: torch.dtype, generation: int) -> Launch:
    """The tile for M packed rows of head size D.

    No tile needs more than 99 KB of shared memory, so that one table serves every GPU since Ampere, and none spills
    registers but two, of two registers each: float32 at head size 256, and 32 rows of 16-bit numbers at head sizes 80
    and 96 on sm80 (``tests/test_kernels_ahead.py`` compiles all of them). float32 goes through the matrix units in
    three parts, which keeps its precision. In the interpreter a tile costs the same whatever its size.

    Args:
        generation: major compute capability of the GPU.
    """
    if INTERPRETED:
        return Launch(max(16, triton.next_power_of_2(rows)), 64, 1, 1)
    wide = padded_dim(dim) > 128
    if dtype == torch.float32:
        return Launch(16, 16, 8, 1) if wide else Launch(16, 32, 4, 2)
    if rows <= 16:
        return Launch(16, 32 if wide else 64, 4, 2)
    if rows <= 32:
        return Launch(32, 32 if wide else 64, 4, 2)
    if wide:
        return Launch(64, 32, 8, 2)
    if rows <= 64:
        return Launch(64, 64, 4, 2)
    return Launch(128, 64 if generation >= 9 else 32, 8, 2)


def num_splits(programs: int, rows: int, span: int, units: int) -> int:
    """S, in how many parts the committed tokens are read.

    Enough for one and a half waves of programs, but none shorter than 256 slots, and no more than keep the partial
    results (2 * S * M numbers per head size, written and read) within half of what the keys and values are.

    Args:
        programs: tiles of packed rows times B * Hkv.
        rows: M.
        span: a bound on the slots that are seen; the true number is on the device.
        units: multiprocessors of the device.
    """
    wanted = -(-3 * units // (2 * programs))
    return max(1, min(wanted, _MAX_SPLITS, -(-span // _SLOTS_PER_SPLIT), span // (4 * rows)))


class _Machine(NamedTuple):
    units: int  # multiprocessors
    generation: int  # major compute capability


@lru_cache(maxsize=16)
def _machine(device: torch.device) -> _Machine:
    if device.type != "cuda":
        return _Machine(1, 0)
    properties = torch.cuda.get_device_properties(device)
    return _Machine(properties.multi_processor_count, properties.major)


# In float32 a product of matrix units is put together from three, as exact as float32's own but for the last bit.
PRECISION = "tf32x3" if torch.version.hip is None else "ieee"


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    splits: int | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """``verifiers.kernels.plain.tree_attention`` in two launches; takes the same arguments.

    Args:
        splits: S; None = as suits the device and the number of slots given.
        launch: the tile; None = as the table has it (always so in a compiled graph).

    Raises:
        ValueError: shapes or dtypes that do not belong together or that the kernel does not take.
    """
    reason = why_not(query, key, value)
    if reason is not None:
        raise ValueError(reason)
    query = query.to(key.dtype)
    if torch.compiler.is_compiling():
        return _op(query, key, value, mask, scaling, softcap, sinks, splits)
    return _launch(query, key, value, mask, scaling, softcap, sinks, splits, launch)


def why_not(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What about these ``[B, H, n, D]`` the kernel does not take; None where it takes them."""
    if key.dtype not in DTYPES or value.dtype != key.dtype:
        got = f"keys in {_short(key.dtype)} and values in {_short(value.dtype)}"
        return f"{got}; the kernel takes both in float32, float16 or bfloat16"
    if not query.shape[3] == key.shape[3] == value.shape[3]:
        got = f"heads of {query.shape[3]} (queries), {key.shape[3]} (keys) and {value.shape[3]} (values)"
        return f"{got}; the kernel takes one size"
    if query.shape[3] > MAX_HEAD_DIM:
        return f"heads of {query.shape[3]}; the kernel takes up to {MAX_HEAD_DIM}"
    if query.shape[1] % key.shape[1] or key.shape != value.shape or key.shape[0] != query.shape[0]:
        got = f"queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)}"
        return f"{got}; expected [B, Hq, n, D] and twice [B, Hkv, K, D] with Hq a multiple of Hkv"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
    splits: int | None,
    launch: Launch | None = None,
) -> Tensor:
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, nodes, dim = query.shape
    kv_heads = key.shape[1]
    assert mask.dtype == torch.int64 and mask.shape[:3] == (batch, 1, nodes), f"mask {mask.dtype} {tuple(mask.shape)}"
    groups = heads // kv_heads
    rows, pairs, padded = nodes * groups, batch * kv_heads, padded_dim(dim)
    machine = _machine(query.device)
    launch = launch or launch_for(rows, dim, query.dtype, machine.generation)
    blocks = triton.cdiv(rows, launch.rows)
    parts = 1 + (splits or num_splits(blocks * pairs, rows, key.shape[2], machine.units))
    partial = torch.empty(pairs, parts, rows, dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(pairs, parts, rows, dtype=torch.float32, device=query.device)
    result = torch.empty(batch, nodes, heads, dim, dtype=query.dtype, device=query.device)
    scale, cap = (scaling / softcap, softcap * LOG2_E) if softcap else (scaling * LOG2_E, 0.0)
    merged = launch.rows if INTERPRETED else _MERGED_ROWS
    # Triton launches on the current device, which is not the layer's where a model is spread over several.
    with torch.cuda.device_of(query):
        _partial[(blocks, pairs, parts)](
            query, key, value, mask, partial, lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], mask.stride(0), mask.stride(2),
            nodes, scale, cap,
            HKV=kv_heads, G=groups, D=dim, BD=padded, BM=launch.rows, BN=launch.keys,
            CAPPED=bool(softcap), PRECISION=PRECISION,
            num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
        )  # fmt: skip
        _merge[(triton.cdiv(rows, merged), pairs)](
            partial, lse, lse if sinks is None else sinks, result, rows, parts,
            HKV=kv_heads, G=groups, D=dim, BD=padded, BR=merged, BS=max(_PARTS, triton.next_power_of_2(parts)),
            WITH_SINKS=sinks is not None, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return result


@torch.library.custom_op("specdec::tree_attention", mutates_args=())
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
    splits: int | None,
) -> Tensor:
    """The same for a compiler, which sees one opaque operation."""
    return _launch(query, key, value, mask, scaling, softcap, sinks, splits)


@_op.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    batch, heads, nodes, dim = query.shape
    return query.new_empty(batch, nodes, heads, dim)
