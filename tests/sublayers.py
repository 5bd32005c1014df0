"""Which attention and feed-forward parts of a model really computed, and over how many nodes.

A skipped module is still called, with a ``forward`` that does nothing; so what is counted is the first weight matrix
inside it, which only real work reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from specdec.target import Target

ATTENTION, MLP = "attention", "mlp"
_NAMES = {"self_attn": ATTENTION, "attn": ATTENTION, "mlp": MLP}


@dataclass(frozen=True)
class Call:
    """One use of a sub-layer: over how many nodes."""

    layer: int
    part: str
    nodes: int


@contextmanager
def counting(model: Any) -> Iterator[list[Call]]:
    """Within the block the list grows by one entry per sub-layer that computes."""
    calls: list[Call] = []
    handles = []

    def counter(layer: int, part: str) -> Any:
        # Feed-forward parts may see rows and nodes flattened into one dimension; none of the families tested do.
        return lambda _, args: calls.append(Call(layer, part, args[0].shape[1]))

    for index, layer in enumerate(Target(model).layers):
        for name, child in layer.named_children():
            if name in _NAMES:
                matrix = next(m for m in child.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
                handles.append(matrix.register_forward_pre_hook(counter(index, _NAMES[name])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
