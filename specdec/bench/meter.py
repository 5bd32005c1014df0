"""Peak memory of a request beyond weights and K/V, by part of the request and per step.

On CUDA the allocator's own high-water mark. On a CPU torch keeps none, so its profiler records every allocation and
release of torch's allocator, and tracemalloc those of Python and numpy; their peaks are told apart and not added, since
they need not fall together. What a library of kernels takes from the system by itself is in neither.

Shapes: B rows, P committed tokens.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from specdec.decoding import Request, decode
from specdec.generation import Speculation
from specdec.metrics import SpeculationStats

_MARK = "specdec bench: "
_PREFILL, _STEPS = "prefill", "steps"


@dataclass
class Peaks:
    """Bytes, of one request.

    Attributes:
        kv: slabs of K/V.
        prefill: most that torch held at a time until the first tree was verified, beyond the K/V of that moment.
        steps: most that torch held at a time in the steps after it, beyond the K/V.
        python: most that Python and numpy held at a time in those steps, above what they held before the request; None
            on CUDA.
    """

    kv: int
    prefill: int
    steps: int
    python: int | None


def held(build: Any) -> tuple[Any, int]:
    """Call ``build`` and see how many bytes of torch's memory its result goes on holding: (result, bytes)."""
    gc.collect()  # what hangs in cycles is nobody's
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        made = build()
        gc.collect()
        return made, torch.cuda.memory_allocated() - before
    with _recorded() as sizes:
        made = build()
        gc.collect()
    return made, sum(size for _, size in sizes())


def request_peaks(handle: Speculation, request: Request, prompt_kv: int, steps: int) -> Peaks:
    """Run a request for some steps and see what it holds.

    Args:
        handle: whose loop.
        request: as ``generate`` made it; it is used up.
        prompt_kv: bytes of the K/V that the prompt's own pass leaves.
        steps: verifications to look at, at most.
    """
    on_cuda = handle.target.device.type == "cuda"
    run = _on_cuda if on_cuda else _on_cpu
    return run(handle, request, prompt_kv, steps)


def _on_cpu(handle: Speculation, request: Request, prompt_kv: int, steps: int) -> Peaks:
    tracemalloc.start()
    try:
        with _recorded() as sizes:
            for stage, slabs in _stages(handle, request, steps):
                if stage == _STEPS:
                    tracemalloc.reset_peak()
                kv = slabs
            python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    peaks, stage, kept = {"": 0, _PREFILL: 0, _STEPS: 0}, "", 0
    for name, size in sizes():
        stage = name or stage
        kept += size
        peaks[stage] = max(peaks[stage], kept)
    # Before the first mark the prompt's pass ran, then its K/V moved into the slabs.
    first = max(peaks[""] - prompt_kv, peaks[_PREFILL] - kv)
    return Peaks(kv, max(first, 0), max(peaks[_STEPS] - kv, 0), python)


def _on_cuda(handle: Speculation, request: Request, prompt_kv: int, steps: int) -> Peaks:
    device = handle.target.device
    torch.cuda.synchronize(device)
    before, peaks, last = torch.cuda.memory_allocated(device), dict[str, int](), ""
    torch.cuda.reset_peak_memory_stats(device)
    for stage, slabs in _stages(handle, request, steps):
        peaks[last] = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        last, kv = stage, slabs
    peaks[last] = torch.cuda.max_memory_allocated(device) - before
    first = max(peaks[""] - prompt_kv, peaks.get(_PREFILL, 0) - kv)
    return Peaks(kv, max(first, 0), max(peaks.get(_STEPS, 0) - kv, 0), None)


def _stages(handle: Speculation, request: Request, steps: int) -> Iterator[tuple[str, int]]:
    """Run the request; yields (stage that begins, bytes of the slabs) after the prefill and after the first step."""
    loop: Any = decode(handle.target, handle.drafter, handle.verifier, request, SpeculationStats())
    with torch.no_grad():
        state, _ = next(loop)
        _mark(_PREFILL)
        yield _PREFILL, 0
        for number, (state, _) in enumerate(loop):
            assert state.context is not None
            if number == 0:
                _mark(_STEPS)
                yield _STEPS, state.context.cache.nbytes
            if number == steps:
                break
        loop.close()


def _mark(stage: str) -> None:
    with torch.profiler.record_function(_MARK + stage):
        pass


@contextmanager
def _recorded() -> Iterator[Any]:
    """What torch's CPU allocator does in the block, to be asked for after it: (stage that begins or "", bytes)."""
    events: list[tuple[str, int]] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # it tells of every start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield lambda: events
    results: Any = profiler.profiler
    found = [
        (event.start_ns(), event.name().removeprefix(_MARK) if event.name().startswith(_MARK) else "", event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]" or event.name().startswith(_MARK)
    ]
    events += [(stage, 0 if stage else size) for _, stage, size in sorted(found, key=lambda entry: entry[0])]
