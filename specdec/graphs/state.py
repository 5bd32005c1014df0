"""What a model's graphs stand on beside the shapes of its passes, and by what to tell that it has changed.

A graph holds what the model's forward read while it was traced: numbers and switches of its modules (which adapter is
active, by what it is scaled), the code that ran, and on a CPU weights in a layout of their own. None of these follow a
later change of the model, so a change has to be seen. Seen is: where tensors lie and how often they were written, a few
numbers of each tensor on the host (a write through ``.data`` is not counted), and every plain value in the modules and
their configs. Not seen are other objects' insides, and a write through ``.data`` to single places of a tensor.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 16  # numbers per tensor; more cost time in every request and see hardly more
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_USUAL = frozenset({bool, int, float, str, type(None)})
# What nn.Module keeps of its own, and what says nothing of what is computed or is changed by generate itself.
_SILENT = frozenset(vars(nn.Module())) - {"training"} | {
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "warnings_issued",
    "_tp_plan",
    "_ep_plan",
    "_pp_plan",
    "_fsdp_plan",
    "config",  # most modules share one, which is looked at once
    "_attn_implementation_internal",  # part of the passes' shape
    "_output_capturing_hooks_installed",
    "_previous_max_cache_length",
}
_CAPTURES = "transformers.utils.output_capturing"  # whose hooks stay and do nothing unless asked
_VERSIONED = ("torch", "transformers")  # whose sources are known by their versions


def condition(model: nn.Module) -> tuple[Any, ...]:
    """What is compared from request to request: as long as it stays, the model's graphs hold."""
    kept = [part for module in model.modules() for part in (module._parameters, module._buffers) if part]
    tensors = [tensor for part in kept for tensor in part.values() if tensor is not None]
    places = tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
    return places, samples(tensors), settings(model, _place)


@torch.no_grad()
def samples(tensors: Iterable[Tensor]) -> list[bytes]:
    """A few numbers of each dense tensor on the host, from its first to near its last, in one gather per dtype."""
    views: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        dense = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
        if not dense or not tensor.numel() or type(tensor) not in (Tensor, nn.Parameter):
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        step = max(1, last // (_SAMPLES - 1))
        views[tensor.dtype].append(tensor.detach().as_strided((1 + last // step,), (step,)))
    return [torch.cat(some).view(torch.uint8).numpy().tobytes() for some in views.values()]


def settings(model: nn.Module, tensor: Callable[[Tensor], str] | None = None) -> str:
    """The plain values in the modules of a model and in their configs, functions by their code.

    Args:
        model: whose.
        tensor: how to tell tensors that are neither parameters nor buffers; None = by their values.
    """
    modules = [vars(module) for module in model.modules()]
    configs = {id(config): config for own in modules if (config := own.get("config")) is not None}
    entries = [vars(config) if hasattr(config, "__dict__") else {"": config} for config in configs.values()]
    return repr([_plain_items(own, tensor or _values) for own in (*modules, *entries)])


def _plain_items(entries: Mapping[str, Any], tensor: Callable[[Tensor], str]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in entries.items():
        if key in _SILENT:
            continue
        if type(value) in _USUAL:  # nearly all are
            found.append((key, value))
        elif (text := plain(value, tensor)) is not None:
            found.append((key, text))
    return found


def plain(value: Any, tensor: Callable[[Tensor], str] | None = None, depth: int = 3) -> str | None:
    """A number, switch, text or function, or containers of them, as text; None for other objects.

    The same in every process, so sets are sorted.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return None if tensor is None else tensor(value)
    if isinstance(value, FunctionType | MethodType | partial):
        return "".join(code_of(value, depth))
    if depth and isinstance(value, dict):
        return str([(plain(key, tensor, depth - 1), plain(part, tensor, depth - 1)) for key, part in value.items()])
    if depth and isinstance(value, list | tuple):
        return str([plain(part, tensor, depth - 1) for part in value])
    if depth and isinstance(value, set | frozenset):
        return str(sorted(str(plain(part, tensor, depth - 1)) for part in value))
    return None


def _place(tensor: Tensor) -> str:
    return f"{id(tensor)} {-1 if tensor.is_inference() else tensor._version}"


def _values(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.blake2b(numbers.data, digest_size=16).hexdigest()}"


def code_of(value: Any, depth: int = 3) -> Iterator[str]:
    """What a function computes, as far as its code, its defaults and what it encloses tell."""
    if isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()) if depth else ():
            yield from code_of(part, depth - 1)
        return
    value = getattr(value, "__func__", value)
    if not isinstance(value, FunctionType):
        yield plain(value, depth=depth) or str(getattr(value, "__qualname__", type(value).__qualname__))
        return
    yield from _instructions(value.__code__)
    if depth:
        inner = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # a name that has no value yet
                continue
        for part in inner:
            yield from code_of(part, depth - 1)


def _instructions(code: CodeType) -> Iterator[str]:
    yield f"{code.co_name} {code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield str(plain(constant))


def attention_key(name: str) -> str:
    """The attention function that transformers has under a name, told apart from any other under the same name.

    Functions of other packages stand for all modules beside them, whose code they run.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function: Any = ALL_ATTENTION_FUNCTIONS.get(name)  # none for what the modelling file itself computes
    state = hashlib.blake2b(digest_size=8)
    for part in () if function is None else (*code_of(function), *_files_of(inspect.unwrap(function))):
        state.update(part.encode())
    return f"{name} {state.hexdigest()}"


def _files_of(function: Any) -> tuple[str, ...]:
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    package, file = getattr(module, "__package__", None) or "", getattr(module, "__file__", None)
    if file is None or package.split(".")[0] in _VERSIONED:
        return ()
    return sources(Path(file).parent if package else Path(file))


@lru_cache(maxsize=64)
def sources(place: Path) -> tuple[str, ...]:
    """Digests of a source file, or of those in a folder, as they were when first asked for."""
    files = sorted(place.glob("*.py")) if place.is_dir() else [place]
    return tuple(hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files)


def foreign_hook(model: nn.Module) -> str | None:
    """A hook that the model's forward would call and a graph would not; None where there is none."""
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if getattr(hook, "__module__", None) != _CAPTURES:
                called = getattr(hook, "__qualname__", type(hook).__qualname__)
                return f"{type(module).__name__} {name!r} has a forward hook ({called})"
    every = nn.modules.module
    return "torch has a global forward hook" if every._global_forward_hooks or every._global_forward_pre_hooks else None
