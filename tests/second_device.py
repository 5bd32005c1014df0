"""A second device on a machine that has none: tensors of ``meta`` stand in for it, values do not.

Shapes and devices are all that such tensors have, so a text decoded this way means nothing. But whatever mixes devices
where an accelerator would refuse it raises here too, and what is copied to the host arrives as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SECOND = torch.device("meta")
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::_copy_from")
_INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # take indices of the host too


class SecondDevice(TorchDispatchMode):
    """Within the block, copies between the devices work and everything else that mixes them raises."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, options = func._schema.name, dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if tensor.device == SECOND]
        if name in _COPIES:
            return self._copy(func, name, args, options)
        if there and name == "aten::equal":
            return True
        if there and name == "aten::_local_scalar_dense":
            return 0
        seen = given[:1] if name in _INDEXING else given
        devices = {tensor.device for tensor in seen if tensor.ndim}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device, got {sorted(map(str, devices))}")
        return func(*args, **options)

    def _copy(self, func: Any, name: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
        if name in ("aten::copy_", "aten::_copy_from"):
            into, source = (args[0], args[1]) if name == "aten::copy_" else (args[1], args[0])
            return into.zero_() if source.device == SECOND != into.device else func(*args, **options)
        made = [x for x in (*args[1:], *options.values()) if isinstance(x, torch.device)]
        if args[0].device == SECOND and made and made[0] != SECOND:
            kinds = [x for x in (*args[1:], *options.values()) if isinstance(x, torch.dtype)]
            return torch.zeros(args[0].shape, dtype=kinds[0] if kinds else args[0].dtype, device=made[0])
        return func(*args, **options)


def split(model: Any, first: int, head: bool) -> Any:
    """Put the layers from ``first`` on, and the last norm, on the second device, as a ``device_map`` would.

    Args:
        model: a Llama.
        first: of the layers that go there.
        head: whether the output head goes there too; one that is tied to the embedding stays with it.
    """
    parts: list[tuple[nn.Module, torch.device]] = [(model.model.embed_tokens, torch.device("cpu"))]
    parts += [(layer, torch.device("cpu") if i < first else SECOND) for i, layer in enumerate(model.model.layers)]
    parts += [(model.model.norm, SECOND), (model.lm_head, SECOND if head else torch.device("cpu"))]
    for part, device in parts:
        part.to(device)
        add_hook_to_module(part, AlignDevicesHook(execution_device=device))
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    return model
