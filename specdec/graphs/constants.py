"""The weights inside compiled graphs: given at load, so that what lies on disk is code, and all graphs share one copy.

On a CPU a linear map is quickest with its weight laid out for the processor's matrix units beforehand (a third off a
pass over 25 nodes of the demo target). The compiler makes such layouts when it may treat weights as constants
("freezing"), and would store them with every graph. Here each constant of a graph is recorded by how it follows from
the model: a tensor of the model by its name, or the packed layout of one. Both are made anew from the loaded weights.
What follows from no single tensor is kept by value, and then the graph serves these weights only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

Recipe = dict[str, Any]
"""``of``: name of a tensor of the model, or null where the value is kept; ``packed``, ``transposed``: how it is laid
out."""

_ROWS = 16  # inputs that packed weights are laid out for; the layouts of other counts hardly differ


def recorder(found: dict[str, Tensor]) -> Callable[[torch.fx.Graph], None]:
    """A pass over the compiler's graph that notes its constants in ``found``, once weights are packed.

    A function, since the compiler copies objects among its options.
    """

    def note(graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="get_attr"):
            value: Any = reduce(getattr, str(node.target).split("."), graph.owning_module)
            if isinstance(value, Tensor):
                found[str(node.target)] = value

    return note


def explain(
    constants: Mapping[str, Tensor], wanted: Iterable[str], named: Mapping[str, Tensor]
) -> tuple[dict[str, Recipe], dict[str, Tensor]]:
    """How the constants of a graph follow from the tensors of a module.

    Args:
        constants: name in the graph -> value, as the compiler had them.
        wanted: the names that the compiled graph asks for.
        named: name -> tensor of the module.

    Returns:
        The recipes by name, and the values of those that follow from no single tensor.
    """
    recipes: dict[str, Recipe] = {}
    kept: dict[str, Tensor] = {}
    for name in wanted:
        if name in named:
            recipes[name] = {"of": name, "packed": False, "transposed": False}
            continue
        value = constants[name]
        dense = value.to_dense() if value.is_mkldnn else value
        source, transposed = _source(dense, named) if value.is_mkldnn else (None, False)
        recipes[name] = {"of": source, "packed": value.is_mkldnn, "transposed": transposed}
        if source is None:
            kept[name] = dense.detach().clone()
    return recipes, kept


def _source(dense: Tensor, named: Mapping[str, Tensor]) -> tuple[str | None, bool]:
    """The one tensor that a weight is, and whether it lies transposed; None where several are equal today."""
    for transposed in (False, True):
        seen = {name: own.t() if transposed and own.dim() == 2 else own for name, own in named.items()}
        equal = [name for name, own in seen.items() if own.shape == dense.shape and torch.equal(own, dense)]
        if len({named[name].data_ptr() for name in equal}) == 1:
            return equal[0], transposed
    return None, False


class Weights:
    """The constants of all graphs of one model.

    Args:
        module: whose tensors the recipes name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.named = tensors_of(module)
        self._packed: dict[tuple[int, bool], Tensor] = {}
        self._digest: str | None = None

    def made(self, recipes: Mapping[str, Recipe], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name in the graph -> tensor, to be held as long as the graph is."""
        return {name: self._one(recipe, kept.get(name)) for name, recipe in recipes.items()}

    def _one(self, recipe: Recipe, kept: Tensor | None) -> Tensor:
        if recipe["of"] is None:
            assert kept is not None, "what follows from no tensor of the model is kept"
            return _pack(kept) if recipe["packed"] else kept
        weight = self.named[recipe["of"]]
        if not recipe["packed"]:
            return weight
        key = (weight.data_ptr(), recipe["transposed"])
        if key not in self._packed:
            self._packed[key] = _pack(weight.t() if recipe["transposed"] else weight)
        return self._packed[key]

    @property
    def digest(self) -> str:
        """Of all values; reads every byte, about a second per gigabyte."""
        if self._digest is None:
            state = hashlib.blake2b(digest_size=16)
            for name, value in self.named.items():
                state.update(name.encode())
                state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            self._digest = state.hexdigest()
        return self._digest


def _pack(weight: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().clone(memory_format=torch.contiguous_format), _ROWS
        )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or buffer, shared ones under all of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}
