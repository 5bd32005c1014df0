"""Slabs that outlive their request, so that what was captured over them serves the next one too."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from specdec.cache import TreeCache

_KEPT = 2  # requests whose slabs are kept, the last ones


class Lease:
    """Held by a request as long as it uses its slabs."""


@dataclass
class _Kept:
    """Slabs, the request that has them, where it runs, and what was captured over them at this capacity."""

    cache: TreeCache
    lease: weakref.ref[Lease]
    streams: list[torch.cuda.Stream]
    capacity: int
    views: dict[Any, Any] = field(default_factory=dict)


class Shelf:
    """The slabs of the last requests.

    A request takes slabs that nobody has, of its shape and not more than twice as long as it needs; else new ones are
    made, and of the others those that have stood longest are let go.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._state: Any = None

    def take(
        self, prefilled: DynamicCache, mask: Tensor | None, reserve: int, release: bool
    ) -> tuple[TreeCache, Lease]:
        """Slabs that hold the prompt (arguments of ``TreeCache``), and what to hold while they are used."""
        lease = Lease()
        # They may be made within inference mode and be filled again outside it.
        with torch.inference_mode(False), torch.no_grad():
            for kept in reversed(self._kept):
                if kept.lease() is None and kept.cache.fits(prefilled, reserve):
                    self._kept.append(self._kept.pop(self._kept.index(kept)))
                    kept.lease, kept.streams = weakref.ref(lease), _after(kept.streams)
                    kept.cache.refill(prefilled, mask, release)
                    return kept.cache, lease
            while len(self._kept) >= _KEPT and self._let_go():  # before more memory is asked for
                pass
            try:
                cache = TreeCache(prefilled, mask, reserve, release, for_graphs=True)
            except torch.OutOfMemoryError:
                while self._let_go():
                    pass
                cache = TreeCache(prefilled, mask, reserve, release, for_graphs=True)
        if len(self._kept) < _KEPT:
            devices = {layer.keys.device for layer in cache.layers if layer.keys.device.type == "cuda"}
            streams = [torch.cuda.current_stream(device) for device in devices]
            self._kept.append(_Kept(cache, weakref.ref(lease), streams, cache.capacity))
        return cache, lease

    def _let_go(self) -> bool:
        """Drop the slabs that have stood longest; false where all are in use."""
        free = next((kept for kept in self._kept if kept.lease() is None), None)
        if free is not None:
            self._kept.remove(free)
        return free is not None

    @property
    def nbytes(self) -> int:
        """Bytes held by all slabs here, in use or not."""
        return sum(kept.cache.nbytes for kept in self._kept)

    def views(self, cache: TreeCache, state: Any = None) -> dict[Any, Any]:
        """What was captured over these slabs; anew where they have grown since, or are nobody's to keep.

        Args:
            cache: the slabs.
            state: of the model; what was captured in another one holds no more.
        """
        if self._state != state:
            self._state = state
            for kept in self._kept:
                kept.views = {}
        found = next((kept for kept in self._kept if kept.cache is cache), None)
        if found is None:
            return {}
        if found.capacity != cache.capacity:
            found.views, found.capacity = {}, cache.capacity
        return found.views


def _after(former: list[torch.cuda.Stream]) -> list[torch.cuda.Stream]:
    """The current streams of the same devices, which wait for what the former ones have still to do."""
    current = [torch.cuda.current_stream(stream.device) for stream in former]
    for before, now in zip(former, current, strict=True):
        if now != before:
            now.wait_stream(before)
    return current
