"""The move of accepted keys and values in Triton: all layers, rows and heads in one launch, whatever slabs they lie in.

Definition: ``verifiers.kernels.plain.move``. A table on the device says where each slab lies and how it is cut, so that
slabs of other head numbers, head sizes and dtypes join the same launch; numbers are moved as words of bits, whatever
they mean. One program holds a whole path of one head in registers before it writes a slot, so a path may be moved onto
itself; the words of a head may be split among programs, the path may not. Other programs touch other heads or other
words of a head, so nothing else is to be ordered.

Shapes: G tensors of a slab (keys and values), B rows, Hkv heads, S slots, D head size, m slots of a path, T slabs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.transfer import upload

_HELD = 4096  # words of a path that one program holds
_COLUMNS = tl.constexpr(5)
_LINE = 16  # bytes of a whole access


@triton.jit(do_not_specialize=["slots", "BATCH"])
def _move(
    TABLE,
    SOURCE,
    TARGET,
    slots,
    BATCH,
    BYTES: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """Grid ``(most pairs, words / BW, T)``; SOURCE and TARGET ``[B, m]``, ``slots`` = m, words of BYTES bytes."""
    entry = TABLE + tl.program_id(2) * _COLUMNS
    pair = tl.program_id(0).to(tl.int64)
    address, pairs, heads = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    words, per_pair = tl.load(entry + 3), tl.load(entry + 4)
    if BYTES == 4:
        base = address.to(tl.pointer_type(tl.int32))
    elif BYTES == 2:
        base = address.to(tl.pointer_type(tl.int16))
    else:
        base = address.to(tl.pointer_type(tl.int8))
    if WHOLE:  # what the table holds, the compiler cannot know
        base = tl.multiple_of(base, 16)
        words, per_pair = tl.multiple_of(words, 16 // BYTES), tl.multiple_of(per_pair, 16 // BYTES)
    row = (pair // heads) % BATCH
    path = tl.arange(0, BM)
    place = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = path < tl.where(pair < pairs, slots, 0)  # other slabs may have more pairs
    both = inside[:, None] & (place < words)[None, :]
    source = tl.load(SOURCE + row * slots + path, mask=inside, other=0)
    target = tl.load(TARGET + row * slots + path, mask=inside, other=0)
    base += pair * per_pair
    held = tl.load(base + source[:, None] * words + place[None, :], mask=both, other=0)
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(base + target[:, None] * words + place[None, :], held, mask=both)


@dataclass(frozen=True)
class SlabTable:
    """Slabs of one device, as a launch takes them.

    Attributes:
        entries: int64 ``[T, 5]`` on their device: address, pairs (G * B * Hkv), Hkv, words of a slot, words of a pair.
        batch: B.
        pairs: of the slab that has most.
        words: of the longest slot.
        word_bytes: 4, 2 or 1, what all slots are made of.
        whole: whether everything lies at multiples of 16 bytes.
    """

    entries: Tensor
    batch: int
    pairs: int
    words: int
    word_bytes: int
    whole: bool


def table_of(storages: Sequence[Tensor]) -> SlabTable:
    """The table of contiguous slabs ``[G, B, Hkv, S, D]`` of one device; it holds while they lie where they are."""
    device, batch = storages[0].device, storages[0].shape[1]
    lengths = [slab.shape[4] * slab.itemsize for slab in storages]  # bytes of a slot
    word = math.gcd(4, *lengths)
    entries = []
    for slab, length in zip(storages, lengths, strict=True):
        groups, rows, heads, slots, _ = slab.shape
        assert slab.is_contiguous() and slab.device == device and rows == batch, "slabs of one cache on one device"
        entries.append([slab.data_ptr(), groups * rows * heads, heads, length // word, slots * length // word])
    whole = math.gcd(_LINE, *lengths, *(entry[0] for entry in entries)) == _LINE
    pairs, words = (max(entry[column] for entry in entries) for column in (1, 3))
    return SlabTable(upload(entries, device), batch, pairs, words, word, whole)


def tile_for(path: int, words: int) -> int:
    """Words of a slot that one program moves of a path of m slots."""
    return min(triton.next_power_of_2(words), max(_HELD // triton.next_power_of_2(path), 16))


def move(table: SlabTable, source: Tensor, target: Tensor) -> None:
    """``verifiers.kernels.plain.move`` of the slabs in a table, in one launch."""
    path, entries = source.shape[1], table.entries
    assert source.shape == target.shape == (table.batch, path), "one path per row"
    tile = tile_for(path, table.words)
    with torch.cuda.device_of(entries):
        _move[(table.pairs, triton.cdiv(table.words, tile), len(entries))](
            entries, source.to(entries.device).contiguous(), target.to(entries.device).contiguous(), path, table.batch,
            BYTES=table.word_bytes, WHOLE=table.whole, BM=triton.next_power_of_2(path), BW=tile, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
