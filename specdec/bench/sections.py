"""The sections that time steps and weigh memory; each takes its options and returns plain values for ``bench.json``.

A section says beforehand how many measurements it will take, so that a bar can tell the time left.

Words of the rows: ``raw_ms`` is transformers' own forward (``stepping.RawForward``), ``step_ms`` our whole step
(``stepping.Stepper``) over as many nodes behind the same context, ``compiled_ms`` the same with a compiled pass, each a
median with its quartiles; ``limit_ms`` what reading the weights and the K/V once would take.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.bench.bandwidth import read_bandwidth
from specdec.bench.clock import in_turns, milliseconds
from specdec.bench.meter import held, request_peaks
from specdec.bench.profiling import FORWARD, PARTS, profile
from specdec.bench.records import NOT_MEASURED
from specdec.bench.stepping import RawForward, Stepper, handle_of, request_of
from specdec.bench.subjects import Subject
from specdec.build import build_drafter, build_verifier

_WARM_UP = 3


class Bar(Protocol):
    """What is told of the progress."""

    def advance(self, count: int, said: str = "") -> None:
        """So many measurements more are done."""
        ...

    def note(self, text: str) -> None:
        """A line that stays."""
        ...


@dataclass(frozen=True)
class StepOptions:
    """Of the section ``step``.

    Attributes:
        nodes: N, root included; one row of figures each.
        context: committed tokens at the first step.
        accepted: draft tokens that stand in every step.
        repeats: rounds that count.
        compile: measure compiled passes too.
    """

    nodes: Sequence[int]
    context: int
    accepted: int
    repeats: int
    compile: bool

    def count(self, subjects: Sequence[Subject]) -> int:
        """Measurements."""
        return len(subjects) * len(self.nodes)


def step(subjects: Sequence[Subject], options: StepOptions, bar: Bar) -> dict[str, Any]:
    """Our step against the raw forward of the same model at the same width, and against the byte limit."""
    described, rows = [], []
    for subject in subjects:
        bandwidth = read_bandwidth(subject.weight_bytes, subject.device)
        described.append(_described(subject, bandwidth))
        for nodes in options.nodes:
            modes = {"step": {}, "compiled": {"compile": True}} if options.compile else {"step": {}}
            row = {"model": subject.name, "nodes": nodes, "rows": 1, "context": options.context}
            row |= _side_by_side(subject, (1, options.context, nodes), options.accepted, options.repeats, modes)
            rows.append(_with_ratios(row, _limit(subject, 1, options.context, max(bandwidth.values()))))
            bar.advance(1, f"{subject.name}, {nodes} nodes")
    return {"subjects": described, "rows": rows}


@dataclass(frozen=True)
class GrowthOptions:
    """Of the section ``growth``: one axis grows, the other two stay at the first of their values (nodes: at ``tree``).

    Attributes:
        contexts: committed tokens.
        batches: rows.
        nodes: N.
        tree: N where context or batch grows; those are measured at one node too.
        accepted: draft tokens that stand in every step.
        repeats: rounds that count.
    """

    contexts: Sequence[int]
    batches: Sequence[int]
    nodes: Sequence[int]
    tree: int
    accepted: int
    repeats: int

    def points(self) -> list[tuple[int, int, int]]:
        """(Rows, context, nodes) of all measurements, each once."""
        rows, context = self.batches[0], self.contexts[0]
        found = [(rows, length, nodes) for length in self.contexts for nodes in (1, self.tree)]
        found += [(batch, context, nodes) for batch in self.batches for nodes in (1, self.tree)]
        found += [(rows, context, nodes) for nodes in self.nodes]
        return list(dict.fromkeys(found))

    def count(self, subjects: Sequence[Subject]) -> int:
        """Measurements."""
        return len(subjects) * len(self.points())


def growth(subjects: Sequence[Subject], options: GrowthOptions, bar: Bar) -> dict[str, Any]:
    """How the cost of a step grows with context, batch and nodes."""
    described, rows = [], []
    for subject in subjects:
        bandwidth = read_bandwidth(subject.weight_bytes, subject.device)
        described.append(_described(subject, bandwidth))
        for batch, context, nodes in options.points():
            row = {"model": subject.name, "nodes": nodes, "rows": batch, "context": context}
            point = (batch, context, nodes)
            row |= _side_by_side(subject, point, options.accepted, options.repeats, {"step": {}})
            rows.append(_with_ratios(row, _limit(subject, batch, context, max(bandwidth.values()))))
            bar.advance(1, f"{batch} x {context} tokens, {nodes} nodes")
    return {"subjects": described, "rows": rows}


@dataclass(frozen=True)
class ProfileOptions:
    """Of the section ``profile``: a profile for each number of nodes at each batch size.

    Attributes:
        nodes: N.
        batches: rows.
        compile: profile compiled passes, too, at the first batch size.
        context: committed tokens at the first step.
        accepted: draft tokens that stand in every step.
        steps: steps that count.
    """

    nodes: Sequence[int]
    batches: Sequence[int]
    context: int
    accepted: int
    steps: int
    compile: bool

    def count(self, subjects: Sequence[Subject]) -> int:
        """Measurements."""
        return len(subjects) * len(self.points())

    def points(self) -> list[tuple[int, int, bool]]:
        """Nodes, rows, and whether passes are compiled."""
        points = [(nodes, batch, False) for nodes in self.nodes for batch in self.batches]
        return points + [(nodes, self.batches[0], True) for nodes in self.nodes if self.compile]


def profiles(subjects: Sequence[Subject], options: ProfileOptions, bar: Bar) -> dict[str, Any]:
    """Who takes what in one step."""
    rows = []
    for subject in subjects:
        for nodes, batch, compiled in options.points():
            point, modes = (batch, options.context, nodes), {"compile": True} if compiled else {}
            with _stepper(subject, point, options.accepted, options.steps + 2, modes) as stepper:
                seconds = profile(stepper, options.steps)
            parts = {part: 1e3 * seconds[part] for part in PARTS if part in seconds}
            whole = sum(parts.values())
            inside = sum(parts.get(part, 0.0) for part in FORWARD)
            row = {"model": subject.name, "nodes": nodes, "rows": batch, "compiled": compiled, "parts_ms": parts}
            row["context"] = options.context
            rows.append(row | {"step_ms": whole, "forward_ms": inside, "outside_share": 1 - inside / whole})
            bar.advance(1, f"{subject.name}, {nodes} nodes x {batch}{', compiled' * compiled}")
    return {"rows": rows}


@dataclass(frozen=True)
class MemoryOptions:
    """Of the section ``memory``.

    Attributes:
        drafters: names.
        context: tokens of the prompt.
        steps: verifications to look at.
    """

    drafters: Sequence[str]
    context: int
    steps: int

    def count(self) -> int:
        """Measurements."""
        return len(self.drafters)


def memory(subject: Subject, prompt: Tensor, options: MemoryOptions, bar: Bar) -> dict[str, Any]:
    """What every drafter holds, and the most that a request holds beyond weights and K/V.

    Args:
        subject: the target.
        prompt: int64 ``[1, W]``.
        options: of the section.
        bar: told of the progress.
    """
    rows, left_out = [], dict[str, str]()
    for name in options.drafters:
        try:
            row = _weighed(subject, prompt, name, options.steps)
        except (ValueError, OSError, ImportError) as error:
            left_out[name] = str(error).splitlines()[0]
        else:
            rows.append(row)
        bar.advance(1, name)
    on_cuda = subject.device.type == "cuda"
    how = "torch.cuda.max_memory_allocated" if on_cuda else "torch's profiler, every allocation; tracemalloc"
    kept = {"model": subject.name, "prompt_tokens": prompt.shape[1], "weight_bytes": subject.weight_bytes}
    return {"how": how, **kept, "rows": rows, "left_out": left_out}


def _weighed(subject: Subject, prompt: Tensor, name: str, steps: int) -> dict[str, Any]:
    def build() -> Any:
        return handle_of(subject.model, build_drafter(name), build_verifier("tree_attention"), {})

    handle, own = held(build)
    options: dict[str, Any] = {"max_new_tokens": 128, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for last in (False, True):  # the first request of a process leaves things behind that are nobody's
        request = request_of(subject.model, handle, prompt, torch.ones_like(prompt), **options)
        peaks = request_peaks(handle, request, subject.kv_bytes(1, prompt.shape[1]), steps if last else 2)
        handle.drafter.reset()
    row = {"drafter": name, "held_bytes": own, "kv_bytes": peaks.kv, "prefill_bytes": peaks.prefill}
    return row | {"step_bytes": peaks.steps, "python_bytes": peaks.python}


def _side_by_side(
    subject: Subject,
    point: tuple[int, int, int],
    accepted: int,
    repeats: int,
    modes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The raw forward and our step in each of its modes, in turns; ``point`` = (rows, context, nodes)."""
    rows, context, nodes = point
    steppers, row = dict[str, Stepper](), dict[str, Any]()
    for name, options in modes.items():
        stepper = Stepper(subject, rows, context, nodes, accepted, repeats + _WARM_UP, options)
        if stepper.refused is not None:
            row[f"{name}_failure"] = f"{NOT_MEASURED}: {stepper.refused}"
            stepper.close()
            continue
        steppers[name] = stepper
    first = steppers["step"]
    raw = RawForward(subject, rows, first.length, nodes, len(first.path))
    laps: dict[str, Callable[[], float]] = {"raw": raw.lap, **{name: s.lap for name, s in steppers.items()}}
    seconds = in_turns(laps, repeats, _WARM_UP)
    for stepper in steppers.values():
        stepper.close()
    return row | {"emitted": len(first.path), **{f"{name}_ms": milliseconds(spent) for name, spent in seconds.items()}}


@contextmanager
def _stepper(
    subject: Subject, point: tuple[int, int, int], accepted: int, steps: int, modes: Mapping[str, Any]
) -> Iterator[Stepper]:
    rows, context, nodes = point
    stepper = Stepper(subject, rows, context, nodes, accepted, steps, modes)
    try:
        yield stepper
    finally:
        stepper.close()
        gc.collect()


def _with_ratios(row: dict[str, Any], limit_ms: float) -> dict[str, Any]:
    """``overhead`` of our step over the raw forward, ``speedup`` of the compiled pass over the ordinary one and
    ``over_limit``, the quickest step as a multiple of the byte limit; of medians.
    """
    raw, own = row["raw_ms"]["median"], row["step_ms"]["median"]
    best = row.get("compiled_ms", row["step_ms"])["median"]
    found = {"limit_ms": limit_ms, "overhead": own / raw - 1, "over_limit": min(best, own) / limit_ms}
    return row | found | ({"speedup": own / best} if "compiled_ms" in row else {})


def _limit(subject: Subject, rows: int, context: int, bytes_per_second: float) -> float:
    """Milliseconds in which weights and K/V can be read once."""
    return 1e3 * (subject.weight_bytes + subject.kv_bytes(rows, context)) / bytes_per_second


def _described(subject: Subject, bandwidth: Mapping[str, float]) -> dict[str, Any]:
    return {
        "model": subject.name,
        "dtype": subject.dtype,
        "parameters": subject.num_parameters,
        "weight_bytes": subject.weight_bytes,
        "kv_bytes_per_token": subject.kv_bytes(1, 1),
        "bytes_per_second": dict(bandwidth),
    }
