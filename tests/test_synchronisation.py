"""How often a step waits for the device: once, for what was accepted; drafters that read more are listed with why.

On a CPU nothing waits, so a spy counts what would on an accelerator: tensors that follow from the target's weights or
from the drafter's own tensors stand for those of a device, and reading one of them on the host, or asking for a shape
that depends on its values, is one wait. The paths that numpy takes on a CPU are switched off. On CUDA torch itself
counts (marker ``gpu``).
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import specdec
from specdec.build import choices
from specdec.decoding import Step
from specdec.interfaces import DecodeState
from test_contract import model_of, prompts
from zoo import build

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 24
READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__iter__")
# Operations whose result has as many entries as the values of their inputs say.
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique", "unique_", "repeat_interleave.Tensor", "bincount", "equal")

# Waits per step beyond the one for what was accepted, and what they are for.
MORE = {
    "swift": (25, "the confidence of each drafted token, which decides whether the draft goes on"),
    "early_exit": (4, "likewise"),
    "kangaroo": (6, "likewise"),
    "lookahead": (1, "the window's new tokens, which go into a pool on the host"),
    "draft_model": (1, "which nodes were run; computed long before"),
}


class Spy(TorchDispatchMode):
    """Counts waits by the line of ours that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.device: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.waits: Counter[str] = Counter()
        self.within = False

    def mark(self, value: Any) -> None:
        """This tensor lies on the device."""
        if isinstance(value, Tensor):
            self.device[value] = True

    def on_device(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(self.on_device(part) for part in value)
        return isinstance(value, Tensor) and value in self.device

    def note(self) -> None:
        """One wait, for the innermost line of the package."""
        frames = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
        where = frames[-1] if frames else traceback.extract_stack()[-3]
        self.waits[f"{Path(where.filename).name}:{where.lineno} {where.line}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.on_device([*args, *kwargs.values()]):
            name = str(func).removeprefix("aten.")
            by_mask = name.startswith(("index.", "index_put")) and any(
                isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
            )
            if not self.within and (name.startswith(SIZED_BY_VALUES) or by_mask):
                self.note()
            for part in result if isinstance(result, list | tuple) else [result]:
                self.mark(part)
        return result


def _is_ours(file: str) -> bool:
    return any(file.startswith(str(ROOT / package)) for package in ("specdec", "drafters", "verifiers"))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    spy = Spy()

    def counted(name: str) -> Callable[..., Any]:
        plain = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not spy.within and spy.on_device(self):
                spy.note()
            before, spy.within = spy.within, True  # one read may call another
            try:
                return plain(self, *args, **kwargs)
            finally:
                spy.within = before

        return read

    for name in READS:
        monkeypatch.setattr(Tensor, name, counted(name))
    for module in list(sys.modules.values()):
        if getattr(module, "on_host", None) is specdec.selection.on_host and module is not specdec.selection:
            monkeypatch.setattr(module, "on_host", lambda _: False)
    monkeypatch.setattr(specdec.selection, "on_host", lambda _: False)
    yield spy


def tensors_within(value: Any, seen: set[int], depth: int = 0) -> Iterator[Tensor]:
    """Tensors that an object of ours holds, at any depth."""
    if id(value) in seen or depth > 6:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from tensors_within(part, seen, depth + 1)
    elif isinstance(value, dict):
        yield from tensors_within(list(value.values()), seen, depth + 1)
    elif type(value).__module__.partition(".")[0] in ("specdec", "drafters", "verifiers"):
        yield from tensors_within(getattr(value, "__dict__", {}), seen, depth + 1)


def waits_per_step(drafter: str, spy: Spy, batch: int, **generate: Any) -> list[Counter[str]]:
    """Waits of every step after the prefill."""
    model, steps = model_of("llama"), list[Counter[str]]()
    specdec.speculate(model, drafter)
    handle = specdec.speculation_of(model)
    for part in (*model.parameters(), *model.buffers()):
        spy.mark(part)
    # What a drafter keeps on the host by its method, tables and texts, is numpy's and lists; its tensors are the device's.
    if drafter not in ("trigram", "lookahead", "rest", "suffix_automaton"):
        for tensor in tensors_within(handle.drafter, set()):
            spy.mark(tensor)

    def observe(state: DecodeState, step: Step) -> None:
        if step.tree is not None:
            steps.append(Counter(spy.waits))
        spy.waits.clear()
        spy.mark(state.root)

    handle.observers.append(observe)
    try:
        with spy:
            model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS, **generate)
    finally:
        specdec.restore(model)
    return steps[1:]  # the first one also makes what later ones find


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", choices("drafter"))
def test_a_step_waits_once(drafter: str, batch: int, spy: Spy) -> None:
    steps = waits_per_step(drafter, spy, batch)
    assert steps
    allowed = 1 + MORE.get(drafter, (0, ""))[0]
    worst = max(steps, key=lambda step: step.total())
    assert worst.total() <= allowed, f"{drafter}: {dict(worst)}"
    # The wait for what was accepted is there: a spy that sees nothing would pass anything.
    assert all(any("tree_attention.py" in where for where in step) for step in steps)


def test_a_sampled_step_waits_once(spy: Spy) -> None:
    torch.manual_seed(0)
    steps = waits_per_step("token_recycling", spy, 3, do_sample=True, temperature=0.8, top_k=20)
    assert all(step.total() == 1 for step in steps), steps


def test_the_spy_sees_what_waits(spy: Spy) -> None:
    tensor = torch.arange(4)
    spy.mark(tensor)
    with spy:
        _ = torch.arange(4).tolist(), torch.arange(4)[torch.arange(4) > 1]
        assert spy.waits.total() == 0, "the host's own"
        for index, wait in enumerate(
            (tensor.tolist, lambda: (tensor + 1).sum().item(), lambda: bool((tensor > 2).any()))
        ):
            wait()
            assert spy.waits.total() == index + 1
        _ = tensor[tensor > 1]
        assert spy.waits.total() == 4


@pytest.mark.gpu
@pytest.mark.parametrize("drafter", choices("drafter"))
def test_a_step_waits_once_on_cuda(drafter: str) -> None:
    model = build("llama").to("cuda")
    inputs = {name: value.to("cuda") for name, value in prompts(3).items()}
    specdec.speculate(model, drafter)
    counts = list[int]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def observe(_: DecodeState, step: Step) -> None:
            counts.append(sum("synchronizing" in str(one.message) for one in caught))
            caught.clear()
            torch.cuda.set_sync_debug_mode("warn")

        specdec.speculation_of(model).observers.append(observe)
        try:
            model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert max(counts[2:]) <= 1 + MORE.get(drafter, (0, ""))[0]
