"""What a target is given: attention of tree passes behind transformers' ``AttentionInterface``.

Whether a backend serves a model is found out by running a tree through the loaded weights: the pass shows which heads,
dtypes and extras the layers really ask for, and its logits must be those of the plain model. What arrives without a
packed mask, or asks for something that the backend does not compute, goes to ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import AttentionInterface

from specdec import capabilities
from specdec.target import Target
from verifiers.kernels import plain

# Extras that layers may hand to attention and that change what it computes; no backend here does these.
_UNKNOWN_EXTRAS = ("position_bias", "head_mask", "alibi")
_OLDEST = (8, 0)  # compute capability that the kernels are compiled for at least


@dataclass
class _Probe:
    """What a tree pass asked of a backend: how many layers came by, and the first thing it could not do."""

    calls: int = 0
    reason: str | None = None


_PROBE: ContextVar[_Probe | None] = ContextVar("specdec_attention_probe", default=None)


class PlainAttention:
    """The definition as a backend (``verifiers.kernels.plain``): any device and dtype, slow."""

    name = "plain"
    implementation = "specdec_plain"

    def fit(self, target: Target) -> str | None:
        """Why this backend cannot serve a model here; None where it can."""
        AttentionInterface.register(self.implementation, _forward(self._attend, self._why_not))
        probe, failed, before = _Probe(), None, target.attention
        token = _PROBE.set(probe)
        target.attention = self
        try:
            capabilities.check(target)
        except (ValueError, KeyError) as error:
            failed = str(error)
        finally:
            target.attention = before
            _PROBE.reset(token)
        if probe.calls < target.num_layers and probe.reason is None:
            seen = f"{probe.calls} of {target.num_layers} layers took attention from transformers' AttentionInterface"
            return seen if failed is None else f"{seen} ({failed})"
        return probe.reason or failed

    def move(self, storages: Sequence[Tensor], source: Tensor, target: Tensor) -> bool:  # noqa: ARG002
        """The cache's own move is the definition."""
        return False

    def _attend(self, *args: Any, **options: Any) -> Tensor:
        return plain.tree_attention(*args, **options)

    def _why_not(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:  # noqa: ARG002
        return None


class TritonAttention(PlainAttention):
    """The kernels: tree attention and the move of accepted keys and values.

    Args:
        splits: parts in which the committed tokens are read; None = as suits the device and the length.

    Raises:
        ValueError: ``splits`` < 1.
    """

    name = "triton"
    implementation = "specdec_triton"

    def __init__(self, splits: int | None = None) -> None:
        if splits is not None and splits < 1:
            raise ValueError(f"expected splits >= 1, or null for what suits the device; got {splits}")
        self.splits = splits
        if splits is not None:
            self.implementation = f"specdec_triton_{splits}"
        self._kernel: ModuleType | None = None
        self._compaction: ModuleType | None = None
        self._tables: list[Any] = []
        self._slabs: list[ref[Tensor]] = []

    def fit(self, target: Target) -> str | None:
        """Why the kernels cannot serve a model here; None where they can."""
        try:
            self._kernel = import_module("verifiers.kernels.tree_attention")
            self._compaction = import_module("verifiers.kernels.compaction")
        except ImportError as error:
            return f"Triton cannot be imported ({error}); install the extra 'kernels'"
        reason = self._why_not_on(target.device)
        return reason or super().fit(target)

    def move(self, storages: Sequence[Tensor], source: Tensor, target: Tensor) -> bool:
        """One launch for all layers on a device, where the kernel can reach them all."""
        if self._compaction is None:
            return False
        if not self._tabled(storages):
            devices = list(dict.fromkeys(storage.device for storage in storages))
            if any(self._why_not_on(device) is not None for device in devices):
                return False
            shares = [[storage for storage in storages if storage.device == device] for device in devices]
            self._tables = [self._compaction.table_of(share) for share in shares]
            self._slabs = [ref(storage) for storage in storages]
        for table in self._tables:
            self._compaction.move(table, source, target)
        return True

    def _tabled(self, storages: Sequence[Tensor]) -> bool:
        """Whether the tables at hand are of these very slabs."""
        known = self._slabs
        return len(known) == len(storages) and all(of() is slab for of, slab in zip(known, storages, strict=True))

    def _attend(self, *args: Any, **options: Any) -> Tensor:
        assert self._kernel is not None, "fitted before it is used"
        return self._kernel.tree_attention(*args, **options, splits=self.splits)

    def _why_not(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        assert self._kernel is not None, "fitted before it is used"
        if self._kernel.INTERPRETED and key.dtype == torch.bfloat16:
            return "keys in bfloat16, which Triton's interpreter gets wrong"
        return self._kernel.why_not(query, key, value)

    def _why_not_on(self, device: torch.device) -> str | None:
        assert self._kernel is not None, "imported before it is asked"
        if self._kernel.INTERPRETED:
            return None
        if device.type != "cuda":
            return f"its kernels need CUDA, the model is on {device.type}"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
            return "its kernels need a GPU of compute capability 8.0 or newer"
        return None


def _forward(
    attend: Callable[..., Tensor], why_not: Callable[[Tensor, Tensor, Tensor], str | None]
) -> Callable[..., tuple[Tensor, None]]:
    """An attention function as transformers calls it."""
    sdpa = AttentionInterface()["sdpa"]

    def forward(  # noqa: PLR0913 - transformers' own keywords
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **extras: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is None or attention_mask.dtype != torch.int64:
            extras |= {"softcap": softcap, "s_aux": s_aux}
            return sdpa(module, query, key, value, attention_mask, dropout, scaling, **extras)
        reason = why_not(query, key, value)
        unknown = [name for name in _UNKNOWN_EXTRAS if extras.get(name) is not None]
        if unknown or dropout:
            reason = f"its attention wants {', '.join(unknown) or 'dropout'}"
        probe = _PROBE.get()
        if probe is not None:
            probe.calls += 1
            probe.reason = probe.reason or reason
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        if reason is None:
            return attend(query, key, value, attention_mask, scaling, softcap=softcap or 0.0, sinks=s_aux), None
        # Either the probe, which is told of it, or a model in training mode, whose dropout is left out.
        return plain.tree_attention(query, key, value, attention_mask, scaling, softcap or 0.0, s_aux), None

    return forward
