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
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import specdec
from scripted import RightAmongDecoys
from specdec.adaptive import Adaptation, Adaptive
from specdec.build import build_drafter, choices
from specdec.decoding import Step
from specdec.graphs import passes
from specdec.interfaces import DecodeState, Drafter
from specdec.tree import TokenTree
from specdec.tuning.choice import Choice, choose
from test_contract import model_of, plain_text, prompts
from test_graphs import interpreted
from verifiers.kernels.backend import TritonAttention
from zoo import VOCAB, build, untrained

pytestmark = untrained("medusa", "hydra_heads", "kangaroo", "draft_model")

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 12
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
        self.operations = 0
        self.operations_per_step: list[int] = []
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations += 1
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
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()

    def counted(name: str) -> Callable[..., Any]:
        plain = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not spy.within and spy.on_device(self):
                spy.note()
            before, spy.within = spy.within, True  # one read may call another
            try:
                result = plain(self, *args, **kwargs)
                if name == "cpu" and result is self:  # a copy on the host, which may be read for nothing
                    result = self.detach()
                    spy.device.pop(result, None)
                return result
            finally:
                spy.within = before

        return read

    for name in READS:
        monkeypatch.setattr(Tensor, name, counted(name))
    for package in ("specdec", "drafters", "verifiers"):
        for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == package]:
            if hasattr(module, "on_host"):
                monkeypatch.setattr(module, "on_host", lambda _: False)
    return spy


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


def waits_per_step(
    drafter: str | Drafter, spy: Spy, batch: int, how: Mapping[str, Any] | None = None, **generate: Any
) -> list[Counter[str]]:
    """Waits of every step after the prefill; ``how`` goes to ``speculate``."""
    model, steps = model_of("llama"), list[Counter[str]]()
    settings = {"max_new_tokens": NEW_TOKENS, **generate}
    specdec.speculate(model, drafter, **(how or {}))
    handle = specdec.speculation_of(model)
    if handle.target.graphs is not None:
        model.generate(**prompts(batch), **settings)  # what is made once is made before
    for part in (*model.parameters(), *model.buffers()):
        spy.mark(part)
    # What these keep is on the host by their method: tables, pools, texts.
    if handle.drafter.name not in ("trigram", "lookahead", "rest", "suffix_automaton"):
        for tensor in tensors_within(handle.drafter, set()):
            spy.mark(tensor)

    def observe(state: DecodeState, step: Step) -> None:
        if step.tree is not None:
            steps.append(Counter(spy.waits))
            spy.operations_per_step.append(spy.operations)
        spy.waits.clear()
        spy.operations = 0
        spy.mark(state.root)

    handle.observers.append(observe)
    try:
        with spy:
            model.generate(**prompts(batch), **settings)
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


PROCESSORS: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 9,
    "eos_token_id": 7,
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_processors_that_read_the_ids_are_waited_for_once(batch: int, sampled: bool, spy: Spy) -> None:
    torch.manual_seed(0)
    steps = waits_per_step("token_recycling", spy, batch, do_sample=sampled, **PROCESSORS)
    assert len(steps) > 1
    assert all(step.total() == 1 for step in steps), steps


@pytest.mark.parametrize("drafter", ["early_exit", "kangaroo"])
def test_drafts_of_a_fixed_length_wait_for_nothing(drafter: str, spy: Spy) -> None:
    steps = waits_per_step(build_drafter(drafter, confidence=0.0), spy, 3)
    assert steps
    assert all(step.total() == 1 for step in steps), steps


@pytest.fixture
def _traced_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Graphs are run operation by operation, and made the first time that they could be."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(passes, "inductor", interpreted)
    monkeypatch.setattr(passes, "RECURS", 0)
    passes._MADE.clear()
    yield
    passes._MADE.clear()


@pytest.mark.usefixtures("_traced_only")
@pytest.mark.parametrize(
    ("drafter", "batch"),
    [
        ("token_recycling", 3),
        ("kangaroo", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("token_recycling", 1), ("kangaroo", 3), ("medusa", 3)]
        ),
    ],
)
def test_passes_as_graphs_wait_for_nothing(drafter: str, batch: int, spy: Spy) -> None:
    built = build_drafter(drafter, **({"confidence": 0.0} if drafter == "kangaroo" else {}))
    steps = waits_per_step(built, spy, batch, {"compile": True})
    assert steps
    assert all(step.total() == 1 for step in steps), steps
    (made,) = passes._MADE.values()
    assert made.graphs, "passes were graphs"


class Knowing(RightAmongDecoys):
    """The text to come among wrong siblings; what it reads to lay them out is the test's, not a drafter's."""

    def __init__(self, spy: Spy) -> None:
        columns = prompts(2)["input_ids"].shape[1]
        super().__init__(VOCAB, 2, [row[columns:] for row in plain_text("llama", 2)])
        self.spy = spy

    def propose(self, state: DecodeState) -> TokenTree:
        self.spy.within = True
        tree = super().propose(state)
        self.spy.within = False
        return tree


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need Triton (extra 'kernels')")
@pytest.mark.parametrize("drafter", ["scripted", pytest.param("kangaroo", marks=pytest.mark.slow)])
def test_kernels_are_not_waited_for(drafter: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unequal lengths, whose accepted keys and values the kernel moves."""
    from triton.runtime.interpreter import GridExecutor

    launches = list[str]()
    interpret = GridExecutor.__call__

    def launch(self: Any, *args: Any, **options: Any) -> None:
        # What the interpreter reads in the place of a device is no wait of ours.
        launches.append(self.fn.__name__)
        before, spy.within = spy.within, True
        try:
            interpret(self, *args, **options)
        finally:
            spy.within = before

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    built: Any = Knowing(spy) if drafter == "scripted" else build_drafter(drafter, confidence=0.0, num_draft_tokens=2)
    steps = waits_per_step(built, spy, 2, {"attention": TritonAttention(splits=1)}, max_new_tokens=7)
    assert steps
    assert all(step.total() == 1 for step in steps), steps
    moving = set() if drafter == "kangaroo" else {"_move"}  # a chain stays where it is
    assert set(launches) == {"_partial", "_merge", *moving}


@pytest.mark.parametrize("drafter", ["token_recycling", "medusa", "prompt_lookup"])
def test_trees_that_follow_the_text_wait_for_nothing_more(
    drafter: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = list[Choice]()

    def counted(*args: Any, **options: Any) -> Choice:
        chosen.append(choose(*args, **options))
        return chosen[-1]

    monkeypatch.setattr("specdec.adaptive.choose", counted)
    following = Adaptive(build_drafter(drafter), Adaptation(interval=2, gain=0.0))
    steps = waits_per_step(following, spy, 3)
    assert steps
    assert all(step.total() == 1 for step in steps), steps
    assert chosen


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


WIDE = [[rank] for rank in range(8)] + [[above, rank] for above in range(8) for rank in range(7)]


@pytest.mark.parametrize("drafter", ["token_recycling", "medusa", "hydra_heads"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_larger_tree_asks_for_no_more_operations(drafter: str, sampled: bool, spy: Spy) -> None:
    """Neither drafting nor the mask, the walk and the learning go through nodes or the vocabulary one by one."""
    counts = []
    for paths in ([[0], [0, 0]], WIDE):
        name = "paths" if drafter == "token_recycling" else "tree"
        spy.operations_per_step.clear()
        torch.manual_seed(0)
        waits_per_step(build_drafter(drafter, **{name: paths}), spy, 1, do_sample=sampled)
        counts.append(median(spy.operations_per_step[1:]))
    # A path that is not the first child's moves K/V, a few operations; a loop over nodes would add 62 of them or more.
    assert counts[1] < counts[0] + 30, "65 nodes against 3, at the same depth"


@pytest.mark.gpu
@pytest.mark.parametrize("drafter", choices("drafter"))
def test_a_step_waits_once_on_cuda(drafter: str) -> None:
    assert max(waits_on_cuda(drafter)) <= 1 + MORE.get(drafter, (0, ""))[0]


@pytest.mark.gpu
def test_processors_that_read_the_ids_are_waited_for_once_on_cuda() -> None:
    assert max(waits_on_cuda("token_recycling", **PROCESSORS)) <= 1


def waits_on_cuda(drafter: str, **generate: Any) -> list[int]:
    """Of every step after the first two, as torch counts them."""
    model = build("llama").to("cuda")
    inputs = {name: value.to("cuda") for name, value in prompts(3).items()}
    specdec.speculate(model, drafter)
    counts = list[int]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def observe(*_: Any) -> None:
            counts.append(sum("synchronizing" in str(one.message) for one in caught))
            caught.clear()
            torch.cuda.set_sync_debug_mode("warn")

        specdec.speculation_of(model).observers.append(observe)
        try:
            model.generate(**inputs, max_new_tokens=NEW_TOKENS, **generate)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counts[2:]
