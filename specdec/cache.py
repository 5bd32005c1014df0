"""TreeCache: K/V of committed tokens and of the tree under verification, in preallocated slabs.

Row b's committed tokens lie in slots ``0..P_b-1``; there is no left padding, so rows are ragged. A pass says which
slots it writes and how far it sees; a skipped attention simply writes nothing, so layers keep no counters. After a
pass the rows of the accepted path are moved down in place.

Shapes: B rows, Hkv key/value heads, D head size, N nodes, P committed tokens, K slots a pass sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from specdec.selection import on_host

_BUCKET = 128  # slots; slabs grow by whole buckets and never inside a pass
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # as which numpy moves numbers of any dtype
_SPARE = 64  # slots that no pass of a graph sees; as many as the seen ones grow by, so that their number stays round


class _Slab:
    """One zeroed storage ``[G, B, Hkv, capacity, D]`` for all K and V of one shape, dtype and device.

    Keys and values of all layers lie in it side by side, so that moving an accepted path is one gather and one copy for
    the whole model. Zeroed because a NaN in a masked slot still poisons its row.
    """

    def __init__(self, like: Tensor, count: int, capacity: int) -> None:
        batch, heads, _, dim = like.shape
        self.storage = torch.zeros(count, batch, heads, capacity, dim, dtype=like.dtype, device=like.device)
        self.bits = self._bits()

    def _bits(self) -> np.ndarray | None:
        """The storage as numpy sees it; None on a device."""
        return self.storage.view(_BITS[self.storage.itemsize]).numpy() if on_host(self.storage) else None

    def grow(self, capacity: int) -> None:
        with torch.inference_mode(self.storage.is_inference()), torch.no_grad():
            grown = self.storage.new_zeros(*self.storage.shape[:3], capacity, self.storage.shape[4])
            grown[:, :, :, : self.storage.shape[3]] = self.storage
        self.storage = grown
        self.bits = self._bits()

    def rows(self, slots: Tensor) -> Tensor:
        """Slots ``[B, m]`` as rows of one layer seen as ``[B * Hkv * capacity, D]``: int64 ``[B * Hkv * m]``."""
        _, batch, heads, capacity, _ = self.storage.shape
        first = torch.arange(0, batch * heads * capacity, capacity, device=self.storage.device)
        return (first.view(batch, heads, 1) + slots.to(self.storage.device)[:, None]).view(-1)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source [B, m]`` to slots ``target [B, m]`` in every layer (the whole path is read first)."""
        if self.storage.shape[1] == 1:
            self.storage.index_copy_(3, target[0], self.storage.index_select(3, source[0]))
            return
        # By whole rows of D numbers: a gather along the slots would fetch every number by an index of its own.
        groups, dim = self.storage.shape[0], self.storage.shape[4]
        flat = self.storage.view(-1, dim)
        first = torch.arange(0, flat.shape[0], flat.shape[0] // groups, device=flat.device)[:, None]
        moved = flat.index_select(0, (first + self.rows(source)).view(-1))
        flat.index_copy_(0, (first + self.rows(target)).view(-1), moved)


class TreeLayer(CacheLayerMixin):
    """What one decoder layer sees of the cache: it writes its new K/V into the slots of the running pass."""

    is_sliding = False
    is_compileable = False

    def __init__(self, owner: TreeCache, keys: tuple[_Slab, int], values: tuple[_Slab, int]) -> None:
        super().__init__()
        self.owner = owner
        self._key_place, self._value_place = keys, values
        self.is_initialized = True
        self.refresh()

    def refresh(self) -> None:
        """Take the views anew after the slab has grown."""
        self.keys = self._key_place[0].storage[self._key_place[1]]
        self.values = self._value_place[0].storage[self._value_place[1]]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        raise AssertionError("a TreeLayer is filled from a prefilled cache and never starts empty")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write K and V ``[B, Hkv, N, D]`` of the pass and return all that it may see, ``[B, Hkv, K, D]``."""
        owner, span = self.owner, self.owner.span
        if isinstance(owner.slots, int):
            end = owner.slots + key_states.shape[2]
            self.keys[:, :, owner.slots : end] = key_states
            self.values[:, :, owner.slots : end] = value_states
        else:
            _write(self.keys, owner.rows(self._key_place[0]), key_states)
            _write(self.values, owner.rows(self._value_place[0]), value_states)
        return self.keys[:, :, :span], self.values[:, :, :span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - transformers' signature
        return self.owner.span, 0

    def get_seq_length(self) -> int:
        return self.owner.span - self.owner.width

    def get_max_length(self) -> int:
        return -1


def _write(layer: Tensor, rows: Tensor, states: Tensor) -> None:
    """Put ``states [B, Hkv, N, D]`` into rows of a layer seen as ``[B * Hkv * capacity, D]``."""
    dim = states.shape[-1]
    # Autocast may have computed them in another dtype than the prefill's.
    layer.view(-1, dim).index_copy_(0, rows, states.reshape(-1, dim).to(layer.dtype))


class TreeCache(Cache):
    """K/V slabs of one request at a time. Built from the cache that transformers' own prefill filled.

    Attributes:
        capacity: slots allocated for every row.
        fills: requests that have had them.
        span: K, the slots that the running pass sees (``0..span-1``).
        width: N of the running pass.
        slots: where the running pass writes: the first slot where all rows agree, else int64 ``[B, N]``.
        mover: moves slots of all storages in place of the slabs themselves; false where it leaves that to them.
    """

    def __init__(
        self,
        prefilled: DynamicCache,
        mask: Tensor | None,
        reserve: int,
        release: bool = False,
        for_graphs: bool = False,
    ) -> None:
        """Gather the prompt of every row into slots ``0..P_b-1``.

        Args:
            prefilled: cache after the prefill, columns left-padded.
            mask: bool ``[B, columns]``, false for padding (PEFT puts virtual tokens in front of it); None = no padding.
            reserve: slots to have at least.
            release: let go of each prefilled layer once it is copied (nobody else holds the cache).
            for_graphs: a slab for every layer's keys and one for its values, since a compiled graph that writes into
                tensors which share memory would copy all of it; and some last slots that nobody reads, for the nodes
                by which a pass is padded.
        """
        self._spare = _SPARE if for_graphs else 0
        self.capacity = self._needed(prefilled, reserve)
        self.slots: int | Tensor = 0
        self.mover: Callable[[Sequence[Tensor], Tensor, Tensor], bool] | None = None
        self._rows: dict[_Slab, Tensor] = {}
        self._slabs: list[_Slab] = []
        self._kinds = _kinds(prefilled)
        self.fills = 0
        super().__init__(layers=self._allocate(prefilled, for_graphs))
        self._fill(prefilled, mask, release)

    def _needed(self, prefilled: DynamicCache, reserve: int) -> int:
        return _bucket(max(reserve, prefilled.get_seq_length()) + self._spare)

    def fits(self, prefilled: DynamicCache, reserve: int) -> bool:
        """Whether these slabs would do for another request, and are at most twice as long as it needs."""
        needed = self._needed(prefilled, reserve)
        return needed <= self.capacity <= 2 * needed and self._kinds == _kinds(prefilled)

    def refill(self, prefilled: DynamicCache, mask: Tensor | None, release: bool = False) -> None:
        """Begin another request, which these slabs fit, as if they were new."""
        for slab in self._slabs:
            slab.storage.zero_()
        self.mover = None
        self._fill(prefilled, mask, release)

    def _fill(self, prefilled: DynamicCache, mask: Tensor | None, release: bool) -> None:
        self.columns = prefilled.get_seq_length()
        batch = prefilled.layers[0].keys.shape[0]
        real = torch.ones(batch, self.columns, dtype=torch.bool) if mask is None else mask
        self._real = [row.nonzero().squeeze(-1) for row in real]
        self.padding = [self.columns - len(columns) for columns in self._real]
        self.fills += 1
        self.begin(0, 0, self.columns)
        for source, layer in zip(prefilled.layers, self.layers, strict=True):
            self._load(source, layer)
            if release:
                source.reset()

    def _allocate(self, prefilled: DynamicCache, separate: bool) -> list[TreeLayer]:
        tensors = [tensor for layer in prefilled.layers for tensor in (layer.keys, layer.values)]
        kinds = [(*kind, index if separate else 0) for index, kind in enumerate(self._kinds)]
        slabs = {
            kind: _Slab(tensors[kinds.index(kind)], kinds.count(kind), self.capacity) for kind in dict.fromkeys(kinds)
        }
        used = dict.fromkeys(slabs, 0)
        places = []
        for kind in kinds:
            places.append((slabs[kind], used[kind]))
            used[kind] += 1
        self._slabs = list(slabs.values())
        return [TreeLayer(self, k, v) for k, v in zip(places[::2], places[1::2], strict=True)]

    def _load(self, source: DynamicLayer, layer: TreeLayer) -> None:
        # A windowed layer keeps its newest columns only; what it dropped no window can see any more.
        first = self.columns - source.keys.shape[2]
        for row, columns in enumerate(self._real):
            kept = columns[columns >= first].to(source.keys.device) - first
            slots = slice(len(columns) - len(kept), len(columns))
            layer.keys[row, :, slots] = source.keys[row][:, kept]
            layer.values[row, :, slots] = source.values[row][:, kept]

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots; called between passes only."""
        if slots <= self.usable:
            return
        self.capacity = _bucket(max(slots + self._spare, self.capacity + self.capacity // 2))
        for slab in self._slabs:
            slab.grow(self.capacity)
        for layer in self.layers:
            layer.refresh()

    def begin(self, slots: int | Tensor, width: int, span: int) -> None:
        """Announce a pass: it writes ``slots`` and sees slots ``0..span-1``."""
        self.slots, self.width, self.span = slots, width, span
        self._rows.clear()

    def rows(self, slab: _Slab) -> Tensor:
        """Where the running pass writes in a slab, by row of D numbers; the same for all of the slab's layers."""
        if slab not in self._rows:
            assert isinstance(self.slots, Tensor)
            self._rows[slab] = slab.rows(self.slots)
        return self._rows[slab]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Move slots ``source [B, m]`` to ``target [B, m]`` in all layers."""
        if self.mover is not None and self.mover([slab.storage for slab in self._slabs], source, target):
            return
        for slab in self._slabs:
            device = slab.storage.device
            slab.move(source.to(device), target.to(device))

    def move_on_host(self, moves: Sequence[tuple[int, int, int]]) -> bool:
        """Move (row, source, target) in all layers, one after the other; false, with nothing done, on a device or where
        somebody else moves.

        A path's few slots are moved in a fraction of the time that two operations of torch and their indices take. Each
        source lies at or behind its target and at or behind all targets before it, so none is overwritten unread.
        """
        stores = [slab.bits for slab in self._slabs]
        if self.mover is not None or any(store is None for store in stores):
            return False
        for store in stores:
            assert store is not None
            for row, source, target in moves:
                store[:, row, :, target] = store[:, row, :, source]
        return True

    def extend(self, prefilled: DynamicCache, lengths: Sequence[int]) -> None:
        """Append to the prefilled cache what was committed since, as plain generate would have left it.

        Args:
            prefilled: the cache this one was built from, unchanged since.
            lengths: committed tokens of each row, padding not counted; the same number of new ones in every row.
        """
        new = {length + pad - self.columns for length, pad in zip(lengths, self.padding, strict=True)}
        assert len(new) == 1, "rows are filled up to one length before the cache is handed back"
        count = new.pop()
        if count == 0:
            return
        for index, (target, layer) in enumerate(zip(prefilled.layers, self.layers, strict=True)):
            keys = torch.stack([layer.keys[row, :, n - count : n] for row, n in enumerate(lengths)])
            values = torch.stack([layer.values[row, :, n - count : n] for row, n in enumerate(lengths)])
            assert target.is_initialized, f"layer {index} was released"
            target.update(keys, values)

    @property
    def usable(self) -> int:
        """Slots that committed tokens and trees may lie in."""
        return self.capacity - self._spare

    @property
    def nbytes(self) -> int:
        """Bytes held by the slabs."""
        return sum(slab.storage.nbytes for slab in self._slabs)


def can_branch(cache: Any) -> bool:
    """Whether a cache is one that a TreeCache can be built from and hand back (full, sliding or chunked layers)."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and not cache.offloading and all(type(layer) in kinds for layer in cache.layers)


def _kinds(prefilled: DynamicCache) -> list[tuple[Any, ...]]:
    """B, Hkv, D, dtype and device of every layer's keys and values, in turn."""
    tensors = (tensor for layer in prefilled.layers for tensor in (layer.keys, layer.values))
    return [(t.shape[0], t.shape[1], t.shape[3], t.dtype, t.device) for t in tensors]


def _bucket(slots: int) -> int:
    return -(-slots // _BUCKET) * _BUCKET
