"""The seam for other attention in tree passes: transformers' ``AttentionInterface``, switched for the length of a pass.

Prefill and whatever else runs the model keep its own implementation; a tree pass hands the layers packed masks
(``specdec.visibility``), which every model passes on as it does any mask of four dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from specdec.target import Target


@runtime_checkable
class AttentionBackend(Protocol):
    """Computes the attention of tree passes in place of the model's own implementation.

    Attributes:
        name: as in ``conf/attention``.
        implementation: the name by which transformers' ``AttentionInterface`` knows it once it has been fitted. What is
            registered there takes packed masks, and does as ``sdpa`` does with any other.
    """

    name: str
    implementation: str

    def fit(self, target: Target) -> str | None:
        """Why it cannot serve this model on this machine, found out by running a tree; None where it can."""
        ...

    def move(self, storages: Sequence[Tensor], source: Tensor, target: Tensor) -> bool:
        """Copy slots ``source [B, m]`` to ``target [B, m]`` of ``storages``, all read before any is written.

        Args:
            storages: ``[G, B, Hkv, S, D]`` each, together keys and values of all layers; their devices may differ.
            source, target: int64, on any device.

        Returns:
            False where it does nothing, and leaves that to the cache.
        """
        ...


class Switch:
    """Which attention the layers of a model use.

    Args:
        model: whose modules read their implementation from a config at every forward.
    """

    def __init__(self, model: Any) -> None:
        decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
        configs = [module.config for module in decoder.modules() if hasattr(module, "config")]
        self._configs: list[Any] = list({id(config): config for config in configs}.values())

    @contextmanager
    def to(self, implementation: str) -> Iterator[None]:
        """Within the block it is ``implementation``, afterwards what it was."""
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = implementation
        try:
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation = own
