"""The move of accepted keys and values in Triton: all layers, rows and heads in one launch.

Definition: ``verifiers.kernels.plain.move``. One program holds a whole path of one head in registers before it writes
a slot, so a path may be moved onto itself; head numbers may be split among programs, the path may not. Other programs
touch other heads or other numbers of a head, so nothing else is to be ordered.

Shapes: G tensors (keys and values of all layers), B rows, Hkv heads, S slots, D head size, m slots of a path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HELD = 8192  # numbers of a path that one program holds


@triton.jit(do_not_specialize=["slots", "BATCH"])
def _move(
    STORE,
    SOURCE,
    TARGET,
    per_pair,
    slots,
    BATCH,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid ``(G * B * Hkv, D / BD)``; SOURCE and TARGET ``[B, m]``, ``slots`` = m, ``per_pair`` = S * D."""
    pair = tl.program_id(0).to(tl.int64)
    row = (pair // HKV) % BATCH
    path = tl.arange(0, BM)
    dims = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = path < slots
    both = inside[:, None] & (dims < D)[None, :]
    source = tl.load(SOURCE + row * slots + path, mask=inside, other=0)
    target = tl.load(TARGET + row * slots + path, mask=inside, other=0)
    base = STORE + pair * per_pair
    held = tl.load(base + source[:, None] * D + dims[None, :], mask=both, other=0.0)
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(base + target[:, None] * D + dims[None, :], held, mask=both)


def tile_for(path: int, dim: int) -> int:
    """Head numbers that one program moves of a path of m slots."""
    return min(triton.next_power_of_2(dim), max(_HELD // triton.next_power_of_2(path), 16))


def move(storage: Tensor, source: Tensor, target: Tensor) -> None:
    """``verifiers.kernels.plain.move`` in one launch; takes the same arguments.

    ``storage`` is contiguous.
    """
    groups, batch, heads, capacity, dim = storage.shape
    assert storage.is_contiguous() and source.shape == target.shape == (batch, source.shape[1]), "one path per row"
    path = triton.next_power_of_2(source.shape[1])
    tile = tile_for(source.shape[1], dim)
    with torch.cuda.device_of(storage):
        _move[(groups * batch * heads, triton.cdiv(dim, tile))](
            storage, source.contiguous(), target.contiguous(), capacity * dim, source.shape[1], batch,
            HKV=heads, D=dim, BM=path, BD=tile, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
