"""Who takes what in one step: wall clock by part, each part without the parts inside it.

Parts are told apart by wrapping the functions in which they happen, for as long as is looked. Each look at the clock is
paid by whoever encloses it: tenths of a microsecond, against milliseconds.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from specdec import decoding, target
from specdec.bench.clock import synchronise
from specdec.bench.stepping import Stepper
from specdec.cache import TreeLayer
from specdec.metrics import SpeculationStats

_ATTENTION, _FEED_FORWARD = ("self_attn", "attn", "attention"), ("mlp", "feed_forward")

FORWARD = ("compiled forward", "attention", "K/V written", "feed-forward", "head", "the rest of the forward")
"""Parts of the model's forward; all others are ours."""
PARTS = ("draft", "inputs", "masks", *FORWARD, "verify", "accept", "keep", "commit", "update", "statistics", "loop")
"""All parts, in the order of a step. ``loop`` is what is left of it."""


class Stopwatch:
    """Seconds by part.

    Args:
        wait: called before each look at the clock.
        clock: seconds.
    """

    def __init__(self, wait: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._wait, self._clock, self._inside = wait, clock, list[float]()

    def __call__(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its own time counted to ``part``."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            self._inside.append(0.0)
            start = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                self._wait()
                spent = self._clock() - start
                self.seconds[part] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return watched


def profile(stepper: Stepper, steps: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds per step by part: means over the quicker half of some steps, which nothing else has interrupted.

    Args:
        stepper: whose steps; of a compiled pass the forward is one part, since nothing looks into a graph.
        steps: how many, after two that do not count.
        clock: for tests.
    """
    watch, seen = Stopwatch(functools.partial(synchronise, stepper.subject.device), clock), list[dict[str, float]]()
    with _watched(stepper, watch):
        step = watch("loop", stepper.step)
        for _ in range(steps + 2):
            watch.seconds.clear()
            step()
            seen.append(dict(watch.seconds))
    kept = sorted(seen[2:], key=lambda parts: sum(parts.values()))[: -(-steps // 2)]
    return {part: sum(parts[part] for parts in kept) / len(kept) for part in PARTS if part in kept[0]}


@contextmanager
def _watched(stepper: Stepper, watch: Stopwatch) -> Iterator[None]:
    handle, model = stepper.handle, stepper.subject.model
    rule = handle.verifier.rule
    assert rule is not None, "a stepper's rule is known"
    places: list[tuple[Any, str, str]] = [
        (handle.drafter, "propose", "draft"),
        (handle.drafter, "update", "update"),
        (handle.target, "_inputs", "inputs"),
        (target, "attention_masks", "masks"),
        (handle.target, "keep", "keep"),
        (handle.verifier, "verify", "verify"),
        (rule, "accept", "accept"),
        (decoding, "_commit", "commit"),
        (SpeculationStats, "record", "statistics"),
    ]
    if (graphs := handle.target.graphs) is not None:
        places += [(graphs, "_outputs", "compiled forward")]
    else:  # a model whose modules are wrapped is not run as a graph
        places += [
            (model, "forward", "the rest of the forward"),
            (model.get_output_embeddings(), "forward", "head"),
            (TreeLayer, "update", "K/V written"),
        ]
        for layer in handle.target.layers:
            places += [(module, "forward", "attention") for module in _children(layer, _ATTENTION)]
            places += [(module, "forward", "feed-forward") for module in _children(layer, _FEED_FORWARD)]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(_replaced(owner, name, watch(part, getattr(owner, name))))
        yield


def _children(layer: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [child for name, child in layer.named_children() if name in names]


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Set an attribute of an object, a class or a module, and take it back."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
