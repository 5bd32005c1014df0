"""The seam into transformers: ``speculate(model)`` makes ``model.generate`` speculate, ``restore(model)`` undoes it.

The model object gets a class of its own that overrides ``_sample``, the method to which greedy decoding and sampling
both dispatch, and thinly ``generate``. Copies and pickles are plain models; all our state is one plain ``__dict__``
entry.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdec import capabilities, sampling
from specdec.attention import AttentionBackend
from specdec.decoding import Request, Step, decode
from specdec.interfaces import DecodeState, Drafter, Verifier
from specdec.metrics import SpeculationStats
from specdec.outputs import Recorder
from specdec.sampling import Policy
from specdec.target import Target

_KEY = "_specdec"
# Whether the running generate() has come to _sample; each thread and task sees its own.
_ENTERED: ContextVar[bool] = ContextVar("specdec_entered", default=False)
_MODEL_OF: WeakKeyDictionary[Drafter, weakref.ref[Any]] = WeakKeyDictionary()
Model = TypeVar("Model", bound=Any)


class Speculation:
    """What one speculating model carries: its target, drafter and verifier, and the statistics of its calls.

    Attributes:
        stats: all calls since ``speculate`` or the last ``reset``.
        last: the latest call, as far as it has come.
        observers: called after every step of the loop, with the state and the step.
    """

    def __init__(self, target: Target, drafter: Drafter, verifier: Verifier) -> None:
        self.target, self.drafter, self.verifier = target, drafter, verifier
        self.stats = self._new_stats()
        self.last = self._new_stats()
        self.observers: list[Callable[[DecodeState, Step], None]] = []
        self._busy = threading.Lock()
        self._warned: set[str] = set()

    def reset(self) -> None:
        """Set all counters to zero and make the drafter forget what it learnt."""
        self.stats, self.last = self._new_stats(), self._new_stats()
        self.drafter.reset()

    def warn_once(self, message: str) -> None:
        """Warn the user, the same message once per ``speculate``."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Hold the model for one request.

        Raises:
            RuntimeError: another request is running on it.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "this model is generating already; one speculating model serves one generate() at a time"
            )
        try:
            yield
        finally:
            self._busy.release()

    def sample(self, request: Request, recorder: Recorder) -> Any:
        """Run one request and return what ``_sample`` would."""
        stats = self.last = self._new_stats()
        on_cuda = self.target.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.target.device)
            before = torch.cuda.memory_allocated(self.target.device) - self.target.kept_bytes
        for state, step in decode(self.target, self.drafter, self.verifier, request, stats):
            recorder.record(state, step)
            for observer in self.observers:
                observer(state, step)
        result = recorder.result(self.target, state, stats)
        if on_cuda:
            stats.peak_extra_bytes = torch.cuda.max_memory_allocated(self.target.device) - before
        elif state.context is not None:
            stats.peak_extra_bytes = state.context.cache.nbytes
        self.stats += stats
        return result

    def _new_stats(self) -> SpeculationStats:
        rule = self.verifier.rule
        return SpeculationStats(self.drafter.name, rule is None or rule.lossless)


def attach(
    model: Model,
    drafter: Drafter,
    verifier: Verifier,
    compiling: Callable[[str], None] | None = None,
    cuda_graphs: bool = False,
    attention: AttentionBackend | None = None,
) -> Model:
    """Make ``model.generate`` speculate with built objects (``specdec.speculate`` also takes names).

    Args:
        model: a causal LM of transformers; ``torch.compile``, PEFT and DDP wrappers are looked through.
        drafter: bound to this model from now on.
        verifier: checks its trees.
        compiling: run passes as compiled graphs, and tell this about their compilation; None = as they are.
        cuda_graphs: capture passes as CUDA graphs.
        attention: of tree passes; where it cannot serve this model the model's own stays, with one warning. None = the
            model's own.

    Returns:
        ``model``, as given.

    Raises:
        ImportError: this transformers lacks what the seam needs.
        ValueError: the model cannot run token trees, the drafter does not fit it, or CUDA graphs without CUDA.
    """
    inner = unwrap(model)
    restore(inner)
    capabilities.check_transformers(inner)
    reason = capabilities.why_not(inner)
    if reason is not None:
        raise ValueError(f"{type(inner).__name__} ({inner.config.model_type}) cannot run token trees: {reason}")
    _refuse_shared(drafter, inner)
    target = Target(inner)
    # What the drafter allocates outlives a caller's inference mode.
    with _evaluating(inner), torch.inference_mode(False):
        capabilities.check(target)
        target.prepare()
        if attention is not None:
            _use_attention(target, attention)
        reason = drafter.fit(target)
    if reason is not None:
        raise ValueError(f"drafter {drafter.name!r} does not fit {target.name}: it needs {reason}")
    if compiling is not None or cuda_graphs:
        target.use_graphs(drafter.needs.max_nodes, compiling, cuda_graphs, drafter.needs.sizes or None)
    _MODEL_OF[drafter] = weakref.ref(inner)
    inner.__dict__[_KEY] = Speculation(target, drafter, verifier)
    inner.__class__ = _speculating(type(inner))
    return model


def _use_attention(target: Target, attention: AttentionBackend) -> None:
    reason = attention.fit(target)
    if reason is None:
        target.attention = attention
        return
    own = target.config._attn_implementation
    warnings.warn(
        f"attention {attention.name!r} is not used for {target.name}: {reason}; its own {own!r} stays", stacklevel=4
    )


def _refuse_shared(drafter: Drafter, model: Any) -> None:
    """Raise ValueError where another model speculates with this very drafter: what it learnt is that model's."""
    bound = _MODEL_OF.get(drafter)
    other = None if bound is None else bound()
    handle = None if other is None or other is model else other.__dict__.get(_KEY)
    if handle is not None and handle.drafter is drafter:
        raise ValueError(
            f"this drafter ({drafter.name!r}) serves another model already; build one for each, or restore() that model"
        )


def restore(model: Model) -> Model:
    """Give the model its plain ``generate`` back; a model that does not speculate is left as it is."""
    inner = unwrap(model)
    if _KEY in inner.__dict__:
        del inner.__dict__[_KEY]
        inner.__class__ = type(inner).__mro__[1]
    return model


@contextmanager
def plainly(model: Any) -> Iterator[None]:
    """Within the block ``model.generate`` is plain; the speculation comes back as it was, drafter state included.

    Raises:
        ValueError: the model does not speculate.
    """
    speculation_of(model)
    with using(model, None):
        yield


@contextmanager
def using(model: Any, handle: Speculation | None) -> Iterator[None]:
    """Within the block the model speculates with this handle, or plainly with None; then it is as it was before.

    Several drafters serve one model in turn this way: ``attach`` each, keep its ``speculation_of``, and nothing is
    built, checked or forgotten at the change.

    Args:
        model: the target.
        handle: what ``speculation_of`` gave for this model.

    Raises:
        ValueError: the handle is another model's.
    """
    inner = unwrap(model)
    if handle is not None and handle.target.model is not inner:
        raise ValueError(f"this speculation ({handle.drafter.name!r}) was attached to another model; attach it here")
    before, kind = inner.__dict__.pop(_KEY, None), type(inner)
    plain = kind if before is None else kind.__mro__[1]
    if handle is not None:
        inner.__dict__[_KEY] = handle
    inner.__class__ = plain if handle is None else _speculating(plain) if before is None else kind
    try:
        yield
    finally:
        inner.__dict__.pop(_KEY, None)
        inner.__class__ = kind
        if before is not None:
            inner.__dict__[_KEY] = before


def speculation_of(model: Any) -> Speculation:
    """The handle of a speculating model: drafter, verifier, target, statistics.

    Raises:
        ValueError: the model does not speculate.
    """
    handle = unwrap(model).__dict__.get(_KEY)
    if handle is None:
        raise ValueError(f"this {type(model).__name__} does not speculate; call specdec.speculate(model, ...) first")
    return handle


def unwrap(model: Any) -> Any:
    """The transformers model inside ``torch.compile``, PEFT and (Distributed)DataParallel wrappers.

    Raises:
        ValueError: there is none.
    """
    from transformers import GenerationMixin

    inner = model
    while not isinstance(inner, GenerationMixin):
        if isinstance(inner, nn.Module) and "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        else:
            raise ValueError(f"expected a transformers model that can generate, got {type(model).__name__}")
    return inner


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block no module is in training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _speculating(base: Any) -> type:
    """A class like ``base`` whose generate speculates."""

    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle: Speculation | None = self.__dict__.get(_KEY)
        if handle is None:  # a method bound before ``restore``
            return base.generate(self, *args, **kwargs)
        mark = _ENTERED.set(False)
        try:
            result = base.generate(self, *args, **kwargs)
            entered = _ENTERED.get()
        finally:
            _ENTERED.reset(mark)
        if not entered:
            handle.warn_once(
                "this generation mode does not speculate (beams, an assistant, ...): it ran as transformers does"
            )
        return result

    def _sample(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        handle: Speculation | None = self.__dict__.get(_KEY)
        if handle is None:  # restored half way, or within ``plainly``
            return base._sample(self, input_ids, **kwargs)
        _ENTERED.set(True)
        with handle.busy():
            return _route(self, base, handle, input_ids, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Only the state: pickle would insist on the class of ``self``.
        _, _, state, *rest = base.__reduce_ex__(self, protocol)
        return (object.__new__, (base,), {k: v for k, v in state.items() if k != _KEY}, *rest)

    def speculation(self: Any) -> SpeculationStats:
        return self.__dict__[_KEY].stats

    body = {
        "generate": generate,
        "_sample": _sample,
        "__reduce_ex__": __reduce_ex__,
        "speculation": property(speculation, doc="Statistics of all calls since speculate()."),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), body)


def _route(  # noqa: PLR0913 - transformers' own keywords
    model: Any,
    base: Any,
    handle: Speculation,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Speculate, or hand the request to the base method where it belongs there."""
    cache = model_kwargs.get("past_key_values")
    max_length = getattr(stopping_criteria, "max_length", None) or 2**31
    reason = "synced_gpus" if synced_gpus else None
    reason = reason or capabilities.why_plain(model, input_ids, generation_config, model_kwargs, max_length)
    reason = reason or sampling.why_plain(logits_processor, generation_config, input_ids.shape[0])
    if reason is not None:
        handle.warn_once(f"not speculating: {reason}; running plain generation")
        return base._sample(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    # One draw from torch's global generator, so that set_seed governs; greedy decoding
    # leaves it untouched, as plain does.
    seed = int(torch.randint(2**62, (1,))) if generation_config.do_sample else None
    policy = Policy(input_ids, logits_processor, stopping_criteria, generation_config, seed)
    keep_cache = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    padding = _padding(input_ids, model_kwargs.get("attention_mask"))
    request = Request(input_ids, model_kwargs, generation_config, policy, padding, seed or 0, keep_cache)
    recorder = Recorder(request, streamer, cache)
    with model._optimize_model_for_decode():
        return handle.sample(request, recorder)


def _padding(input_ids: Tensor, mask: Tensor | None) -> list[int]:
    """Left padding of each row within ``input_ids [B, W]``."""
    columns = input_ids.shape[1]
    if mask is None or columns == 0:
        return [0] * input_ids.shape[0]
    return (columns - mask[:, -columns:].long().sum(-1)).tolist()
