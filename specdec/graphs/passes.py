"""Passes of a target as graphs: one per bucket of nodes, route and taps, made when such passes recur.

A pass over a small model is bound by the dispatch of its operations, which a graph does not pay. What makes a graph
worth its making is that its shapes recur: passes are padded to a bucket, inputs lie in buffers that are written in
place, and the numbers of slots and of rows are symbols, so that neither a growing text nor another batch size makes
anything anew. Only a single row, the common case, has graphs of its own. So has every number of rows beyond
``MOST_ROWS``, and every one of a model whose code asks for the number, as Llama 4's does.

Two things can be done with the traced pass, alone or together: compile it (``compiler``, CPU and CUDA, kept on disk by
``graphs.store``), and capture it over fixed buffers (``capture``, a CUDA graph per bucket).
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.cache import TreeCache
from specdec.graphs.buffers import Buffers, PassShape
from specdec.graphs.constants import Weights
from specdec.graphs.shelf import Shelf
from specdec.graphs.state import attention_key, condition, foreign_hook
from specdec.graphs.store import Graph, Store, identity
from specdec.graphs.tracing import MOST_ROWS, PassModule, trace, unpack
from specdec.interfaces import Context, Tap
from specdec.routing import FULL, Route, Router
from specdec.visibility import AttentionKinds

_SIZES = (8, 32, 128)  # buckets between a single node and the largest tree, where they are at most half of it
_UNDERSTOOD = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}  # of a template
RECURS = 16  # passes of a route other than the full one before it gets a graph: a search tries many only once
_MOST_OF_MANY = 32  # graphs of which there might be any number; of the others there are few by themselves


class Compiler(Protocol):
    """Makes a traced pass quick; ``store`` keeps what it made for other processes."""

    def __call__(self, program: torch.export.ExportedProgram, shape: PassShape, store: Store) -> Graph: ...


def inductor(program: torch.export.ExportedProgram, shape: PassShape, store: Store) -> Graph:
    """Ahead-of-time code generation."""
    return store.compile(shape, program)


Run = Callable[[], list[Tensor]]
Capture = Callable[[Run], Run]
"""Given a function over fixed buffers, one that repeats its operations on what the buffers hold by then."""


class _RowsAreFixed(Exception):
    """The model's forward cannot be traced with the number of rows as a symbol."""


@dataclass
class _View:
    """The buffers of a graph over one cache, what was captured over them, and the graph, whose constants that reads."""

    buffers: Buffers
    captured: Run | None = None
    graph: Graph | None = None


class _Made:
    """The graphs of one model, and by what to tell that it has changed since."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[PassShape, int], Graph] = {}
        self.fixed = set[Route]()  # whose graphs are for one number of rows each
        self.looked_for = set[tuple[PassShape, int]]()  # on disk, before a request needed them
        self.state: Any = None
        self.store: Store | None = None


# Whoever speculates with a model, its passes are the same.
_MADE: weakref.WeakKeyDictionary[Any, _Made] = weakref.WeakKeyDictionary()
_MAKINGS = Counter[str]()
_AT_ONCE: ContextVar[bool] = ContextVar("specdec_graphs_at_once", default=False)
_AS_MADE: ContextVar[bool] = ContextVar("specdec_graphs_as_made", default=False)


def makings() -> int:
    """How many graphs this process has compiled or loaded, of all models: a timed call must not raise it."""
    return _MAKINGS.total()


@contextmanager
def at_once() -> Iterator[None]:
    """Within the block parts of a model get their graphs at the first pass, not when they are seen to recur."""
    mark = _AT_ONCE.set(True)
    try:
        yield
    finally:
        _AT_ONCE.reset(mark)


@contextmanager
def as_made() -> Iterator[None]:
    """Within the block no graph is compiled or loaded; passes that have none run as they are."""
    mark = _AS_MADE.set(True)
    try:
        yield
    finally:
        _AS_MADE.reset(mark)


class GraphPasses:
    """Runs passes of one target as graphs.

    Args:
        model: the target's model.
        router: of its layers.
        kinds: of its attention.
        max_nodes: N of the largest tree to come, a bucket of its own.
        announce: told what is being compiled or loaded, and how long it took.
        compiler: None runs the model's own forward.
        capture: None runs without fixed buffers.
        attention: whose masks are packed; None = the model's own.
        sizes: the buckets beside 1 and ``max_nodes``, where they are smaller; None = the usual few.
    """

    def __init__(  # noqa: PLR0913 - what a target knows of its passes
        self,
        model: Any,
        router: Router,
        kinds: AttentionKinds,
        max_nodes: int,
        announce: Callable[[str], None],
        compiler: Compiler | None = inductor,
        capture: Capture | None = None,
        attention: str | None = None,
        sizes: Iterable[int] | None = None,
    ) -> None:
        self.attention = attention
        self.model, self.router, self.announce = model, router, announce
        self.kinds, self.by_layer = list(kinds.sizes), kinds.by_layer
        self.compiler, self.capture = compiler, capture
        usual = [size for size in _SIZES if 2 * size <= max_nodes]
        between = usual if sizes is None else [size for size in sizes if size < max_nodes]
        self.buckets = sorted({1, max_nodes, *between})
        self.failures: dict[Route, str] = {}
        self._said = set[str]()
        self._made = _MADE.setdefault(model, _Made())
        self._seen: Counter[PassShape] = Counter()
        self._views: dict[PassShape, _View] = {}
        self._of: tuple[Callable[[], TreeCache | None], int, int] = (lambda: None, 0, 0)
        self.shelf = None if capture is None else Shelf()
        # Of the present request:
        self._hook: str | None = None
        self._attends, self._dtypes = "", tuple[torch.dtype, ...]()

    def __call__(
        self,
        context: Context,
        inputs: Mapping[str, Any],
        route: Route = FULL,
        states: Tensor | None = None,
        taps: Sequence[Tap] = (),
    ) -> tuple[Tensor | None, dict[Tap, Tensor]] | None:
        """One pass.

        Args:
            context: the request; its cache has begun the pass.
            inputs: keyword arguments of the ordinary pass over ``[B, n]``.
            route: which part of the model.
            states: ``[B, n, H]`` entering layer ``route.lo``, where that is > 0.
            taps: states to return.

        Returns:
            Logits ``[B, n, V]`` (None where the route has none) and taps ``[B, n, H]``; None where this pass has no
            graph, which is warned of once per reason. Where one could not be made, ``failures`` says why, and
            it is not tried again.
        """
        if route in self.failures or not (route.logits or taps):  # without either it is run for its K/V alone
            return None
        self._refresh(context)
        batch, nodes = inputs["input_ids"].shape
        if (reason := self._why_not(context, inputs)) is not None:
            self._say(reason)
            return None
        if nodes > self.buckets[-1]:
            self._say(f"graphs are made for up to {self.buckets[-1]} nodes", "passes over more")
            return None
        own = () if states is None else (route.lo,)  # what enters needs no way through the graph
        asked = tuple(tap for tap in dict.fromkeys(taps) if tap not in own)
        bucket = next(size for size in self.buckets if size >= nodes)
        shape = self._shape(context, batch, bucket, route, asked)
        if not self._recurs(shape):
            return None
        try:
            view = self._view(context, shape, states)
            with torch.inference_mode():
                tensors = view.buffers.fill(inputs, context.cache, states)
                outputs = self._outputs(shape, view, tensors)
                logits, found = unpack(shape, outputs, nodes)
        except _RowsAreFixed:
            self._made.fixed.add(route)
            return self(context, inputs, route, states, taps)
        except Exception as error:  # noqa: BLE001 - whatever a compiler may throw, ordinary passes go on
            self.failures[route] = f"{type(error).__name__}: {_first_line(error)}"
            return None
        if states is not None:
            found |= {tap: states for tap in taps if tap in own}
        return logits, found

    def _why_not(self, context: Context, inputs: Mapping[str, Any]) -> str | None:
        """Why passes of such a request are no graphs; None where they are."""
        template = context.template
        if self._hook is not None:
            return f"{self._hook}, which graphs would not call"
        if self.model.training:
            return "the model is in training mode"
        if not template.keys() <= _UNDERSTOOD:
            return f"its forward is given {', '.join(sorted(template.keys() - _UNDERSTOOD))}, which graphs do not take"
        for name in ("output_hidden_states", "output_attentions"):
            if template.get(name):
                return f"graphs do not return what {name} asks for"
        if template["position_ids"].dim() != 2:
            return f"its positions have {template['position_ids'].dim()} dimensions, those of graphs have 2"
        if self.attention is None and not _additive(inputs["attention_mask"]):
            return "its attention masks are no numbers to be added"
        return None

    def _say(self, reason: str, what: str = "the passes") -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"{reason}; {what} of {type(self.model).__name__} run uncompiled", stacklevel=5)

    def load(self, context: Context, taps: Sequence[Tap] = ()) -> None:
        """Load the graphs that lie on disk for the full passes of a request, so that no step has to wait for them.

        Args:
            context: the request.
            taps: states that its passes will return.
        """
        if self.compiler is None or FULL in self.failures or _AS_MADE.get():
            return
        self._refresh(context)
        if self._hook is not None or self.model.training:
            return
        for bucket in self.buckets:
            shape = self._shape(context, len(context.lengths), bucket, FULL, tuple(dict.fromkeys(taps)))
            key = (shape, torch.get_num_threads())
            if key in self._made.graphs or key in self._made.looked_for:
                continue
            self._made.looked_for.add(key)
            try:
                with torch.inference_mode():
                    graph = self._loaded(self._module(shape))
            except _RowsAreFixed:
                self._made.fixed.add(FULL)
                return self.load(context, taps)
            except Exception:  # noqa: BLE001 - the first pass will meet it again, and tell
                return
            if graph is not None:
                self._made.graphs[key] = graph

    def _shape(self, context: Context, batch: int, bucket: int, route: Route, taps: tuple[Tap, ...]) -> PassShape:
        words = 0 if self.attention is None else -(-self.buckets[-1] // 64)
        device = context.template["position_ids"].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        rows = None if 1 < batch <= MOST_ROWS and route not in self._made.fixed else batch
        return PassShape(rows, bucket, route, taps, self._attends, words, self._dtypes, autocast)

    def _recurs(self, shape: PassShape) -> bool:
        """Whether such passes have a graph, or are worth one by now."""
        if (shape, torch.get_num_threads()) in self._made.graphs:
            return True
        if _AS_MADE.get() and self.compiler is not None:
            return False
        self._seen[shape] += 1
        if not shape.route.is_full and self._seen[shape] <= self._patience(shape):
            return False
        if _one_of_many(shape) and sum(_one_of_many(made) for made, _ in self._made.graphs) >= _MOST_OF_MANY:
            self._say(f"{_MOST_OF_MANY} graphs with skipped parts or for one number of rows are made at most", "others")
            return False
        return True

    @staticmethod
    def _patience(shape: PassShape) -> int:
        """Passes of a part of the model that run as they are; of what a search tries once there are always some."""
        return 0 if _AT_ONCE.get() and not shape.route.skips else RECURS

    def _refresh(self, context: Context) -> None:
        """Forget what stands on slabs that are no more, or on a model that was another."""
        cache = context.cache
        if self._of[0]() is cache and self._of[1:] == (cache.fills, cache.capacity):
            return
        self._of = weakref.ref(cache), cache.fills, cache.capacity
        dtypes = tuple(slab.dtype for layer in cache.layers for slab in (layer.keys, layer.values))
        self._dtypes = dtypes[:1] if len(set(dtypes)) == 1 else dtypes
        own = self.model.config.get_text_config(decoder=True)._attn_implementation
        self._attends = attention_key(self.attention or str(own))
        self._hook = foreign_hook(self.model)
        state = condition(self.model)
        if self._made.state != state:
            self._made.graphs.clear()
            self._made.looked_for.clear()
            self._made.state, self._made.store = state, None
        if self.shelf is None:
            self._views = {}
            return
        self._views = self.shelf.views(cache, state)

    def _view(self, context: Context, shape: PassShape, states: Tensor | None) -> _View:
        if shape not in self._views:
            hidden = 0 if states is None else states.shape[-1]
            kinds = self.kinds if self.by_layer else self.kinds[:1]
            # With the slabs they may outlive a request that came within inference mode.
            with torch.inference_mode(False):
                like = torch.empty(0, dtype=context.dtype, device=context.template["position_ids"].device)
                self._views[shape] = _View(Buffers(shape, context.cache, kinds, like, hidden))
        return self._views[shape]

    def _graph(self, shape: PassShape, buffers: Buffers) -> Graph:
        """The graph of these passes: known, on disk, or made now; without a compiler the model's own forward."""
        key = (shape, torch.get_num_threads())
        if key in self._made.graphs:
            return self._made.graphs[key]
        module = self._module(shape)
        if self.compiler is None:
            return lambda tensors: module(*tensors)
        graph = self._loaded(module) or self._compiled(self.compiler, module, buffers)
        self._made.graphs[key] = graph
        return graph

    def _module(self, shape: PassShape) -> PassModule:
        return PassModule(self.model, self.router, shape, self.kinds if self.by_layer else None)

    def _loaded(self, module: PassModule) -> Graph | None:
        start, store = time.perf_counter(), self._store(module)
        if module.shape.batch is None and store.is_refused(module.shape):
            raise _RowsAreFixed
        graph = store.load(module.shape)
        if graph is not None:
            _MAKINGS["loaded"] += 1
            self.announce(f"loaded {self._what(module.shape)} in {time.perf_counter() - start:.1f} s")
        return graph

    def _compiled(self, compiler: Compiler, module: PassModule, buffers: Buffers) -> Graph:
        shape, start = module.shape, time.perf_counter()
        _MAKINGS["compiled"] += 1
        self.announce(f"compiling {self._what(shape)} ...")
        program = None
        try:
            program = trace(module, buffers)
            graph = compiler(program, shape, self._store(module))
        except Exception as error:
            if shape.batch is not None:
                raise
            if program is None:  # the model's own doing, and so in every process
                self._store(module).refuse(shape)
            self.announce(f"a graph for each number of rows, since {type(error).__name__}: {_first_line(error)}")
            raise _RowsAreFixed from error
        self.announce(f"compiled {self._what(shape)} in {time.perf_counter() - start:.0f} s")
        return graph

    def _store(self, module: PassModule) -> Store:
        if self._made.store is None:
            self._made.store = Store(identity(self.model, module.kinds), Weights(module))
        return self._made.store

    def _what(self, shape: PassShape) -> str:
        return f"{type(self.model).__name__} for {shape}"

    def _outputs(self, shape: PassShape, view: _View, tensors: list[Tensor]) -> list[Tensor]:
        """Of the graph, or of its capture: then they are copies, since the next replay writes over its own."""
        if self.capture is None:
            return self._graph(shape, view.buffers)(tensors)
        if view.captured is None:
            graph, whole = self._graph(shape, view.buffers), view.buffers.tensors(view.buffers.usable)
            view.captured, view.graph = self.capture(lambda: graph(whole)), graph
        return [output.clone() for output in view.captured()]


def _one_of_many(shape: PassShape) -> bool:
    """Whether there may be any number of graphs like this one: a search tries many skips, a server many batches."""
    return shape.route.skips or shape.batch not in (None, 1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _additive(masks: Any) -> bool:
    """Whether masks are numbers to be added to scores; a backend may bring its own kind."""
    found = masks.values() if isinstance(masks, dict) else [masks]
    return all(mask is None or mask.is_floating_point() for mask in found)
