"""The methods that are compared: our loop with a drafter (``none`` = plain decoding), and transformers as it is.

Every method is asked the same way and answers with the same ``Measured``; its tokens are counted by one function.

The wall clock is that of the whole ``model.generate`` call, device synchronised on both sides. Our loop tells the
prefill's time itself; for transformers a streamer notes when the first token came, which costs microseconds per token
and tells the size of every block that assisted generation accepts as well. With assisted generation the prompt's pass
verifies candidates already, so that first block counts as a verification.

The time of a batch is shared by its texts: the prefill equally, as all rows are padded to one width; each step equally
among the rows unfinished in it, so that a row which ended early does not pay for one that goes on. Of our loop the
steps' times are known, and what lies outside of its phases is shared in proportion; of transformers every step after
the first token is taken to last equally long.

Shapes: B rows, W prompt columns.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.decoding import Step
from specdec.evaluation.records import COLD, PREFILL, STATELESS, TARGET, StepTrace
from specdec.evaluation.trace import Tracer
from specdec.generation import Speculation, using
from specdec.graphs.passes import at_once
from specdec.interfaces import DecodeState
from specdec.metrics import emitted


@dataclass
class Batch:
    """Prompts of one call: int64 ids ``[B, W]``, left-padded, and their mask."""

    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Tensor], pad: int) -> Batch:
        """Pad prompts ``[1, W_b]`` on the left to the longest."""
        width = max(prompt.shape[1] for prompt in prompts)
        ids = prompts[0].new_full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - prompt.shape[1] :] = prompt[0]
            mask[row, width - prompt.shape[1] :] = 1
        return cls(ids, mask)


@dataclass
class Measured:
    """One text as a method produced it.

    Attributes:
        ids: tokens emitted.
        seconds: its share of the call.
        prefill_seconds: its share of the time until the first token.
        accept_lengths: tokens emitted by each verification.
        sources: where each token came from.
        trace: its steps; None where the method does not run through our loop.
    """

    ids: list[int]
    seconds: float
    prefill_seconds: float
    accept_lengths: list[int]
    sources: list[str]
    trace: StepTrace | None = None


class Method(Protocol):
    """Something that answers prompts, under one state of what it has learnt."""

    name: str
    kind: str
    state: str
    lossless: bool

    @property
    def compiled(self) -> bool:
        """Whether its passes run as graphs, which may have to be made in the middle of a call."""
        ...

    def warm_up(self, batch: Batch, options: dict[str, Any]) -> None:
        """Answer a batch for nobody, and make the graphs that other batches of as many rows will need."""
        ...

    def generate(self, batch: Batch, options: dict[str, Any]) -> list[Measured]:
        """Answer a batch; ``options`` are keyword arguments of ``generate``."""
        ...

    def begin(self) -> None:
        """A question begins; a cold method forgets the ones before."""
        ...

    def forget(self) -> None:
        """As newly built."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learnt."""
        ...

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back what was learnt."""
        ...


@contextmanager
def all_graphs(handle: Speculation) -> Iterator[None]:
    """Within the block a request makes the graphs of passes of all sizes, and those of parts of the target at once."""

    def make(state: DecodeState, step: Step) -> None:
        # Whoever enters in the middle of the target never runs whole passes.
        whole = step.tree is not None and step.tree.entry is None
        if whole and state.context is not None and handle.last.passes == 1:
            handle.target.make_graphs(state.context, handle.drafter.needs.taps)

    handle.observers.append(make)
    try:
        with at_once():
            yield
    finally:
        handle.observers.remove(make)


class Speculating:
    """Our loop with one drafter; ``none`` is the plain baseline.

    Args:
        name: in tables.
        model: the target.
        handle: its speculation with this drafter; attached before, and in force during calls only.
        eos_ids: tokens that end a text.
        kind: ``drafter`` or ``plain``.
    """

    def __init__(
        self, name: str, model: Any, handle: Speculation, eos_ids: Collection[int], kind: str = "drafter"
    ) -> None:
        self.name, self.kind, self.state = name, kind, STATELESS
        self.model, self.handle, self.eos_ids = model, handle, eos_ids
        self.tracer = Tracer(handle)
        self.initial = self.state_dict()
        rule = handle.verifier.rule
        self.lossless = rule is None or rule.lossless

    @property
    def stateful(self) -> bool:
        """Whether it has something to forget; known after a first call."""
        return bool(self.handle.drafter.state_dict())

    @property
    def compiled(self) -> bool:
        """Whether the target's passes run as graphs; those of a draft model follow them."""
        return self.handle.target.graphs is not None

    def warm_up(self, batch: Batch, options: dict[str, Any]) -> None:
        """Speculate for nobody, with a pass of every size on the way."""
        with all_graphs(self.handle):
            _timed(self.model, using(self.model, self.handle), batch, options, self.eos_ids)

    def generate(self, batch: Batch, options: dict[str, Any]) -> list[Measured]:
        """Speculate; observers are in place before the clock starts."""
        self.tracer.start()
        try:
            rows, seconds = _timed(self.model, using(self.model, self.handle), batch, options, self.eos_ids)
        finally:
            self.handle.observers = []
        counted = self.handle.last.emitted_tokens
        assert counted == sum(map(len, rows)), f"the loop counted {counted} tokens, the text has {sum(map(len, rows))}"
        texts, traced = [], [self.tracer.row(row) for row in range(len(rows))]
        own = [_traced_seconds(trace) for trace, _ in traced]
        for ids, (trace, sources), part in zip(rows, traced, own, strict=True):
            lengths = [accepted + 1 for accepted in trace.accepted]
            texts.append(Measured(ids, seconds * (part / sum(own)), trace.seconds[PREFILL], lengths, sources, trace))
        return texts

    def begin(self) -> None:
        """Forget where the state is cold."""
        if self.state == COLD:
            self.forget()

    def forget(self) -> None:
        """Back to what the drafter knew when it was built (such as a file it was given), statistics included."""
        self.handle.reset()
        if self.initial:
            self.handle.drafter.load_state_dict(copy.deepcopy(self.initial))

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return copy.deepcopy(self.handle.drafter.state_dict())

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a copy back."""
        self.handle.drafter.load_state_dict(copy.deepcopy(saved))


class Transformers:
    """``model.generate`` of transformers as it is, with or without its own speculation.

    Args:
        model: the target.
        eos_ids: tokens that end a text.
        kind: ``transformers``, ``transformers_prompt_lookup`` or ``transformers_assistant``.
        extra: keyword arguments of ``generate`` that switch its speculation on.
    """

    state = STATELESS
    lossless = True
    compiled = False

    def __init__(self, model: Any, eos_ids: Collection[int], kind: str, extra: dict[str, Any] | None = None) -> None:
        self.name = self.kind = kind
        self.model, self.eos_ids, self.extra = model, eos_ids, extra or {}
        assistant = self.extra.get("assistant_model")
        self._assistant_config = None if assistant is None else copy.deepcopy(assistant.generation_config)

    def warm_up(self, batch: Batch, options: dict[str, Any]) -> None:
        """Call transformers for nobody."""
        self.generate(batch, options)

    def generate(self, batch: Batch, options: dict[str, Any]) -> list[Measured]:
        """Call transformers."""
        self.forget()
        clock, rows_in_call = _Clock(), batch.input_ids.shape[0]
        options = {**options, **self.extra, "streamer": clock}
        start = time.perf_counter()
        rows, seconds = _timed(self.model, using(self.model, None), batch, options, self.eos_ids)
        prefill = max((clock.first or start) - start, 0.0)
        shares = _shares([len(ids) - 1 for ids in rows])
        texts = []
        for ids, share in zip(rows, shares, strict=True):
            own = prefill / rows_in_call + (seconds - prefill) * share
            if self.extra:
                lengths, sources = _blocks(clock.blocks, len(ids), self.kind)
            else:
                lengths, sources = [1] * (len(ids) - 1), [PREFILL] + [TARGET] * (len(ids) - 1)
            texts.append(Measured(ids, own, prefill / rows_in_call, lengths, sources))
        return texts

    def begin(self) -> None:
        """Nothing is kept between questions."""

    def forget(self) -> None:
        """The heuristic schedule writes into the assistant's own config; every call starts from the same one."""
        if self._assistant_config is not None:
            self.extra["assistant_model"].generation_config = copy.deepcopy(self._assistant_config)

    def state_dict(self) -> dict[str, Any]:
        """Nothing learnt."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Nothing to put back."""


@dataclass
class _Clock:
    """A streamer that notes when the first token came and how many came at a time; the prompt comes first."""

    first: float | None = None
    blocks: list[int] = field(default_factory=list)
    _prompt_seen: bool = False

    def put(self, value: Tensor) -> None:
        """``[B]`` or, from assisted generation, ``[1, k]``."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if self.first is None:
            self.first = time.perf_counter()
        self.blocks.append(value.shape[-1] if value.dim() > 1 else 1)

    def end(self) -> None:
        """The text is complete."""


def _timed(
    model: Any,
    mode: AbstractContextManager[None],
    batch: Batch,
    options: dict[str, Any],
    eos_ids: Collection[int],
) -> tuple[list[list[int]], float]:
    """Call ``generate`` between two looks at the clock. Returns what each row emitted, and seconds."""
    on_cuda = batch.input_ids.is_cuda
    with mode:
        if on_cuda:
            torch.cuda.synchronize(batch.input_ids.device)
        start = time.perf_counter()
        ids = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        if on_cuda:
            torch.cuda.synchronize(batch.input_ids.device)
        seconds = time.perf_counter() - start
    return [emitted(row, eos_ids) for row in ids[:, batch.input_ids.shape[1] :].tolist()], seconds


def _traced_seconds(trace: StepTrace) -> float:
    """All phases of one text; each step is shared by the rows unfinished in it."""
    return sum(sum(seconds) if isinstance(seconds, list) else seconds for seconds in trace.seconds.values())


def _shares(steps: Sequence[int]) -> list[float]:
    """Shares, of sum 1, in a time of steps that last equally long and are shared by the rows unfinished in them.

    Args:
        steps: after how many of them each row is finished.
    """
    if max(steps) < 1:
        return [1 / len(steps)] * len(steps)
    running = [sum(count > step for count in steps) for step in range(max(steps))]
    return [sum(1 / rows for rows in running[: max(count, 0)]) / len(running) for count in steps]


def _blocks(blocks: Sequence[int], length: int, kind: str) -> tuple[list[int], list[str]]:
    """Blocks of assisted generation as verifications, cut where the text ends; its last token is the target's."""
    lengths, sources = list[int](), list[str]()
    for block in blocks:
        size = min(block, length - len(sources))
        if size > 0:
            lengths.append(size)
            sources += [kind] * (size - 1) + [TARGET]
    return lengths, sources
