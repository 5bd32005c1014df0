"""Slabs that outlive their request, so that what was captured over them serves the next one too."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from specdec.cache import TreeCache

_KEPT = 2  # requests whose slabs are kept, the last ones


class Lease:
    """Held by a request as long as it uses its slabs."""


@dataclass
class _Kept:
    """Slabs, the request that has them, and what was captured over them while they had this capacity."""

    cache: TreeCache
    lease: weakref.ref[Lease]
    capacity: int
    views: dict[Any, Any] = field(default_factory=dict)


class Shelf:
    """The slabs of the last requests.

    A request takes slabs that nobody has, of its shape and not more than twice as long as it needs; else new ones are
    made, and of the others those that have stood longest are let go.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []

    def take(
        self, prefilled: DynamicCache, mask: Tensor | None, reserve: int, release: bool
    ) -> tuple[TreeCache, Lease]:
        """Slabs that hold the prompt (arguments of ``TreeCache``), and what to hold while they are used."""
        lease = Lease()
        for kept in reversed(self._kept):
            if kept.lease() is None and kept.cache.fits(prefilled, reserve):
                kept.cache.refill(prefilled, mask, release)
                kept.lease = weakref.ref(lease)
                self._kept.append(self._kept.pop(self._kept.index(kept)))
                return kept.cache, lease
        while len(self._kept) >= _KEPT and (free := self._free()) is not None:  # before more memory is asked for
            self._kept.remove(free)
        cache = TreeCache(prefilled, mask, reserve, release, for_graphs=True)
        if len(self._kept) < _KEPT:
            self._kept.append(_Kept(cache, weakref.ref(lease), cache.capacity))
        return cache, lease

    def _free(self) -> _Kept | None:
        return next((kept for kept in self._kept if kept.lease() is None), None)

    def views(self, cache: TreeCache) -> dict[Any, Any]:
        """What was captured over these slabs; anew where they have grown since, or are nobody's to keep."""
        kept = next((kept for kept in self._kept if kept.cache is cache), None)
        if kept is None:
            return {}
        if kept.capacity != cache.capacity:
            kept.views, kept.capacity = {}, cache.capacity
        return kept.views

    def forget(self) -> None:
        """The model has changed: nothing that was captured holds."""
        for kept in self._kept:
            kept.views = {}
