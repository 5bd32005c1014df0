"""The step of a Llama of 8 B parameters on CUDA: eager transformers against our passes as graphs, and the byte limit.

Where there is no CUDA, or a mode that this build does not have, the figure is a sentence that says so; nothing is
estimated.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec.bench.bandwidth import read_bandwidth
from specdec.bench.clock import in_turns, milliseconds
from specdec.bench.records import NOT_MEASURED
from specdec.bench.sections import Bar
from specdec.bench.stepping import RawForward, Stepper
from specdec.bench.subjects import Subject, random_llama

VARIANTS: dict[str, dict[str, Any]] = {
    "sdpa + CUDA graph": {"cuda_graphs": True},
    "Triton + CUDA graph + compile": {"attention": "triton", "cuda_graphs": True, "compile": True},
}
"""Beside eager transformers: modes of ``specdec.speculate``."""

_WARM_UP = 5
_BANDWIDTH_BYTES = 4 * 2**30


@dataclass(frozen=True)
class GpuOptions:
    """Of the section ``gpu``.

    Attributes:
        shape: arguments of ``LlamaConfig``.
        dtype: of the weights.
        contexts: committed tokens.
        nodes: N.
        accepted: draft tokens that stand in every step.
        repeats: rounds that count.
    """

    shape: Mapping[str, Any]
    dtype: str
    contexts: Sequence[int]
    nodes: Sequence[int]
    accepted: int
    repeats: int

    def count(self) -> int:
        """Measurements."""
        return len(self.contexts) * len(self.nodes)


def gpu(
    options: GpuOptions, attention: Callable[[], Sequence[Mapping[str, Any]]], bar: Bar, seed: int = 0
) -> dict[str, Any]:
    """Steps by context and nodes, and attention alone.

    Args:
        options: of the section.
        attention: rows about attention alone; called on CUDA only.
        bar: told of the progress.
        seed: of the weights.
    """
    points = [(context, nodes) for context in options.contexts for nodes in options.nodes]
    if not torch.cuda.is_available():
        why = f"{NOT_MEASURED}: no CUDA device"
        names = ("raw_ms", "limit_ms", *VARIANTS)
        bar.advance(len(points), why)
        rows = [{"context": context, "nodes": nodes, **dict.fromkeys(names, why)} for context, nodes in points]
        return {"subject": None, "rows": rows, "attention": why}
    subject = Subject("llama-8b-shape", random_llama(options.shape, options.dtype, "cuda", seed))
    bandwidth = read_bandwidth(_BANDWIDTH_BYTES, subject.device)
    rows = []
    for context, nodes in points:
        rows.append(_point(subject, context, nodes, options, max(bandwidth.values())))
        bar.advance(1, f"{context} tokens, {nodes} nodes")
        gc.collect()
        torch.cuda.empty_cache()
    described = {"model": subject.name, "parameters": subject.num_parameters, "weight_bytes": subject.weight_bytes}
    described |= {"kv_bytes_per_token": subject.kv_bytes(1, 1), "bytes_per_second": bandwidth}
    return {"subject": described, "rows": rows, "attention": _attention(attention)}


def _point(subject: Subject, context: int, nodes: int, options: GpuOptions, bytes_per_second: float) -> dict[str, Any]:
    row: dict[str, Any] = {"context": context, "nodes": nodes}
    steppers, kept, length = dict[str, Stepper](), 1, context
    for name, modes in VARIANTS.items():
        try:
            stepper = Stepper(subject, 1, context, nodes, options.accepted, options.repeats + _WARM_UP, modes)
        except (ValueError, ImportError, NotImplementedError) as error:
            row[name] = f"{NOT_MEASURED}: {str(error).splitlines()[0]}"
            continue
        if stepper.refused is not None:
            row[name] = f"{NOT_MEASURED}: {stepper.refused}"
            stepper.close()
            continue
        steppers[name], kept, length = stepper, len(stepper.path), stepper.length
    raw = RawForward(subject, 1, length, nodes, kept)
    laps = {"raw_ms": raw.lap, **{name: stepper.lap for name, stepper in steppers.items()}}
    row |= {name: milliseconds(spent) for name, spent in in_turns(laps, options.repeats, _WARM_UP).items()}
    for stepper in steppers.values():
        stepper.close()
    read = subject.weight_bytes + subject.kv_bytes(1, context)
    return row | {"limit_ms": 1e3 * read / bytes_per_second, "read_bytes": read}


def _attention(attention: Callable[[], Sequence[Mapping[str, Any]]]) -> Any:
    try:
        return [dict(row) for row in attention()]
    except (ImportError, ValueError) as error:
        return f"{NOT_MEASURED}: {str(error).splitlines()[0]}"
