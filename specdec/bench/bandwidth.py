"""How fast this device reads memory: what a pass that only had to read its weights would be bound by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from specdec.bench.clock import in_turns, timed

_COLUMNS = 4096


def read_bandwidth(num_bytes: int, device: torch.device, repeats: int = 12) -> dict[str, float]:
    """Bytes per second read from a buffer of ``num_bytes``, the best lap of each of several readers.

    A buffer as large as the weights it stands for lies where they lie: small ones in a CPU's caches.

    Args:
        num_bytes: of the buffer, rounded down to whole rows.
        device: whose memory.
        repeats: laps of each reader.

    Returns:
        Bytes per second by reader: sums and matrix-vector products; on CUDA a copy too, which counts what it reads and
        what it writes.
    """
    rows = max(num_bytes // (4 * _COLUMNS), 1)
    wide = torch.ones(rows, _COLUMNS, device=device)
    half = wide.view(torch.bfloat16)  # of the same memory
    readers: dict[str, tuple[Callable[[], Tensor], int]] = {
        "sum, float32": (wide.sum, wide.nbytes),
        "matrix-vector product, float32": (lambda: wide @ wide[0], wide.nbytes),
        "matrix-vector product, bfloat16": (lambda: half @ half[0], half.nbytes),
    }
    if device.type == "cuda":
        other = torch.empty_like(wide)
        readers["copy, read and written"] = (lambda: other.copy_(wide), 2 * wide.nbytes)
    seconds = in_turns({name: partial(timed, read, device) for name, (read, _) in readers.items()}, repeats)
    return {name: size / min(seconds[name]) for name, (_, size) in readers.items()}
