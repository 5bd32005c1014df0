"""Running parts of an unmodified model: layer ranges, sub-layer skips, stored states put in, states recorded.

No modelling file is forked and no layer list is swapped (that is silently wrong on several families). Layers outside
the range get an instance ``forward`` that passes the residual stream through, so the model's own embedding, masks,
rotary tables, final norm, head, soft-cap and scaling all stay in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from specdec.interfaces import Tap

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn")
_MISSING = object()


@dataclass(frozen=True)
class Route:
    """Which part of the model a pass runs.

    Attributes:
        lo, hi: layers ``[lo, hi)`` run, the others pass the residual stream through; hi = None means all of them.
        skip_attention, skip_mlp: layers inside the range whose attention (feed-forward) contributes nothing; a layer in
            both passes the residual stream through as well.
        logits: whether the output head runs.
    """

    lo: int = 0
    hi: int | None = None
    skip_attention: frozenset[int] = frozenset()
    skip_mlp: frozenset[int] = frozenset()
    logits: bool = True

    @property
    def is_full(self) -> bool:
        """Whether nothing is left out."""
        return self == FULL

    @property
    def skips(self) -> bool:
        """Whether parts of layers are left out."""
        return bool(self.skip_attention or self.skip_mlp)


FULL = Route()


class Router:
    """Patches the layers of one model for the length of a pass.

    Args:
        layers: the decoder layers in order.
        head: the output embedding, or None where the model has none.
    """

    def __init__(self, layers: Sequence[nn.Module], head: nn.Module) -> None:
        self.layers = layers
        self.head: Any = head
        self._arity: dict[nn.Module, int | None] = {}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """During one ordinary forward, learn whether layers and sub-layers return a tensor or a tuple."""

        def note(module: nn.Module, _: Any, output: Any) -> None:
            self._arity[module] = len(output) if isinstance(output, tuple) else None

        with ExitStack() as stack:
            for layer in self.layers:
                for module in (layer, *_children(layer, _ATTENTION_NAMES), *_children(layer, _MLP_NAMES)):
                    stack.callback(module.register_forward_hook(note).remove)
            yield

    def why_not_skip(self) -> str | None:
        """Why sub-layer skips cannot be done on this model; None where they can."""
        for index, layer in enumerate(self.layers):
            if not _children(layer, _ATTENTION_NAMES):
                return f"layer {index} ({type(layer).__name__}) has none of the attention modules {_ATTENTION_NAMES}"
            if not _children(layer, _MLP_NAMES) and not (hasattr(layer, "fc1") and hasattr(layer, "fc2")):
                return f"layer {index} ({type(layer).__name__}) has none of the feed-forward modules {_MLP_NAMES}"
        return None

    @contextmanager
    def route(self, route: Route, states: Tensor | None = None) -> Iterator[None]:
        """Within the block the model's forward runs ``route`` only.

        Args:
            route: what to run.
            states: ``[B, n, H]``, put into the residual stream in front of layer ``route.lo`` (which must be > 0).
        """
        hi = len(self.layers) if route.hi is None else route.hi
        assert states is None or route.lo > 0, "states enter in front of a layer > 0; layer 0 starts from the tokens"
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                whole = index in route.skip_attention and index in route.skip_mlp  # its norms and sums go as well
                if whole or not route.lo <= index < hi:
                    replaced = states if index == route.lo - 1 else None
                    stack.enter_context(_patched(layer, self._pass_through(layer, replaced)))
                    continue
                if index in route.skip_attention:
                    for module in _children(layer, _ATTENTION_NAMES)[:1]:
                        stack.enter_context(_patched(module, self._zeros(module)))
                if index in route.skip_mlp:
                    self._skip_mlp(layer, stack)
            if not route.logits:
                stack.enter_context(_patched(self.head, lambda hidden: hidden[..., :1]))
            yield

    @contextmanager
    def taps(self, taps: Sequence[Tap], last_only: bool = False) -> Iterator[dict[Tap, list[Tensor]]]:
        """Record the residual stream; one list entry per forward (chunked prefills run several).

        Args:
            taps: int i = what enters layer i (i = number of layers: what leaves the last), ``"final"`` = what the
                output head receives.
            last_only: the head then sees the last position only, so no prompt-by-vocabulary tensor is made.
        """
        recorded: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}

        def head_input(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if "final" in recorded:
                recorded["final"].append(args[0])
            return (args[0][:, -1:], *args[1:]) if last_only else None

        def layer_input(tap: int) -> Callable[..., None]:
            return lambda _, args, kwargs: recorded[tap].append(args[0] if args else kwargs["hidden_states"])

        def last_output(_: nn.Module, __: Any, output: Any) -> None:
            recorded[len(self.layers)].append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            if last_only or "final" in recorded:
                stack.callback(self.head.register_forward_pre_hook(head_input).remove)
            for tap in taps:
                if tap == len(self.layers):
                    stack.callback(self.layers[-1].register_forward_hook(last_output).remove)
                elif tap != "final":
                    hook = self.layers[tap].register_forward_pre_hook(layer_input(tap), with_kwargs=True)
                    stack.callback(hook.remove)
            yield recorded

    @contextmanager
    def head_sees(self, states: Tensor) -> Iterator[None]:
        """Within the block the output head receives ``states [B, T, H]`` and the layers are passed through."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(_patched(layer, self._pass_through(layer, None)))
            stack.callback(self.head.register_forward_pre_hook(lambda _, args: (states, *args[1:])).remove)
            yield

    def _pass_through(self, layer: nn.Module, states: Tensor | None) -> Callable[..., Any]:
        arity = self._arity[layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = states if states is not None else args[0] if args else kwargs["hidden_states"]
            return hidden if arity is None else (hidden, *[None] * (arity - 1))

        return forward

    def _zeros(self, module: nn.Module) -> Callable[..., Any]:
        arity = self._arity[module]

        def forward(*args: Any, **kwargs: Any) -> Any:
            zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
            return zeros if arity is None else (zeros, *[None] * (arity - 1))

        return forward

    def _skip_mlp(self, layer: nn.Module, stack: ExitStack) -> None:
        modules = _children(layer, _MLP_NAMES)
        for module in modules:
            stack.enter_context(_patched(module, self._zeros(module)))
        if not modules:  # opt keeps its two linear maps in the layer itself
            stack.enter_context(_patched(cast(nn.Module, layer.fc1), lambda hidden: hidden))
            stack.enter_context(_patched(cast(nn.Module, layer.fc2), torch.zeros_like))


def _children(layer: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [child for name, child in layer.named_children() if name in names]


@contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # accelerate keeps its own hook in the same instance entry, so put back what was there instead of deleting it.
    previous = module.__dict__.get("forward", _MISSING)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if previous is _MISSING:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous
