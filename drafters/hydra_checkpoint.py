"""Weights of Hydra heads on disk: as specdec saves them, and as the authors do.

The public layout is a pickle ``hydra_lm_head.pt`` with a ``config.json``. A head is a list of modules in it, with
dropouts between them in the architecture ``prefix-mlp``, so that its blocks count 1, 3, 5, ... instead of 0, 1, 2, ...;
its later blocks are one and the same module there, stored under each of its names: they load as blocks of equal
weights. How many heads and blocks there are is read off the names, whatever the config says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.base import why_no_own_head
from drafters.hydra_modules import HydraHeads, HydraShape, PrefixShape, rope_type
from drafters.medusa_trees import remembered
from specdec import checkpoints
from specdec.checkpoints import Checkpoint
from specdec.target import Target

ARCHES = ("mlp", "prefix-mlp")
LAYOUTS = ("specdec", "hydra")
PUBLIC_FILE = "hydra_lm_head.pt"
_PREFIX = "prefix_embeding_layer."  # the authors' spelling
_FILES = (checkpoints.WEIGHTS, PUBLIC_FILE, "pytorch_model.bin")


def load(path: str, target: Target) -> tuple[HydraHeads, list[list[float]] | None, list[str]]:
    """Read heads in either layout.

    Args:
        path: a folder, a file of weights or a hub id.
        target: the model that they draft for.

    Returns:
        the heads, in the target's dtype; the accuracies that they remember, if any (``medusa_trees.remembered``); and
        the keys that were ignored, with the reasons.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: weights for another base, of another architecture or of other sizes, keys of no meaning, or a config
            with values of another kind than expected.
    """
    found = checkpoints.read(path, _FILES)
    reason = checkpoints.why_other_base(found.config, target)
    if reason is not None:
        raise ValueError(f"{path}: expected {reason}")
    public = any(key.startswith("hydra_mlp.") for key in found.keys)
    heads = _load_public(found, target) if public else _load_ours(found, target)
    found.close()
    return heads, remembered(found, heads.shape.num_heads), found.ignored


def save(folder: Path, heads: HydraHeads, target: Target, layout: str, more: Mapping[str, Any]) -> None:
    """Write heads in the target's dtype, which is what they draft in.

    Args:
        folder: made where it is missing.
        heads: of any dtype.
        target: the model that they draft for.
        layout: one of ``LAYOUTS``. The public one has an output layer in every head: where the target's serves them, a
            copy of it is written.
        more: entries of the config beside the sizes.

    Raises:
        ValueError: an unknown layout, or one in which copies of the target's head would not say the same as it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r} of Hydra heads; known: {', '.join(LAYOUTS)}")
    reason = why_no_own_head(target) if layout == "hydra" and not heads.shape.own_head else None
    if reason is not None:
        raise ValueError(f"expected layout specdec, which shares the target's output head, and {reason}")
    config = checkpoints.saved_base(target) | _config(heads.shape, layout) | dict(more)
    named = heads.state_dict() if layout == "specdec" else dict(_public_tensors(heads, target))
    weights = {name: tensor.to(target.dtype) for name, tensor in named.items()}
    checkpoints.save(folder, weights, config, checkpoints.WEIGHTS if layout == "specdec" else PUBLIC_FILE)


def _config(shape: HydraShape, layout: str) -> dict[str, Any]:
    arch = arch_of(shape)
    if layout == "specdec":
        sizes = {"num_heads": shape.num_heads, "num_layers": shape.num_layers, "own_head": shape.own_head}
        prefix = None if shape.prefix is None else asdict(shape.prefix)
        offset = shape.hidden_state_offset
        return {"drafter": "hydra_heads", "arch": arch, **sizes, "prefix": prefix, "hidden_state_offset": offset}
    return {
        "hydra_num_heads": shape.num_heads,
        "hydra_num_layers": shape.num_layers,
        "hydra_head_arch": arch,
        "grounded_heads": True,
        "hidden_state_offset": shape.hidden_state_offset,
    }


def arch_of(shape: HydraShape) -> str:
    """The authors' name of the architecture."""
    return ARCHES[shape.prefix is not None]


def _load_ours(found: Checkpoint, target: Target) -> HydraHeads:
    config = found.config
    missing = [name for name in ("num_heads", "num_layers", "own_head") if name not in config]
    if missing:
        there = ", ".join(sorted(found.keys)[:3])
        raise ValueError(
            f"{found.place}: expected Hydra heads as saved by specdec (a {checkpoints.CONFIG} with "
            f"{', '.join(missing)}) or keys hydra_mlp.*; the file has: {there}, ..."
        )
    shape = HydraShape(
        hidden=target.hidden_size,
        vocabulary=target.vocab_size,
        num_heads=found.setting("num_heads", int, least=1),
        num_layers=found.setting("num_layers", int, least=1),
        own_head=found.setting("own_head", bool),
        prefix=_our_prefix(found),
        hidden_state_offset=found.setting("hidden_state_offset", int, 0, least=0),
    )
    _check_sizes(found, shape)
    heads = HydraHeads.empty(shape, target)
    found.fill(heads)
    return heads


def _our_prefix(found: Checkpoint) -> PrefixShape | None:
    """Sizes of the prefix layer, as ``_config`` has written them."""
    said = found.setting("prefix", dict, None)
    if said is None:
        return None
    known = {field.name: field.default for field in fields(PrefixShape)}
    if unknown := sorted(set(said) - set(known)):
        raise ValueError(
            f"{found.place}: 'prefix' in its {checkpoints.CONFIG} has no {', '.join(unknown)}; it has: "
            f"{', '.join(known)}"
        )
    settings: dict[str, Any] = {}
    for name, default in known.items():  # sizes must be there, the other numbers have defaults
        kind = int if default is MISSING else float
        where, least = f"prefix.{name}", 1 if default is MISSING else 0
        settings[name] = found.setting(where, kind, *([] if default is MISSING else [default]), least=least)
    shape = PrefixShape(**settings)
    if shape.heads % shape.kv_heads or shape.head_dim % 2 or not shape.rope_theta:
        raise ValueError(
            f"{found.place}: expected a prefix layer with a multiple of kv_heads for heads, an even head_dim and "
            f"rope_theta > 0; got {said}"
        )
    return shape


def _check_sizes(found: Checkpoint, shape: HydraShape) -> None:
    """Hold what the config says against the weights, before memory is made for what it says."""
    for name, said, there in (
        ("num_heads", shape.num_heads, found.count(r"slots\.(\d+)\.")),
        ("num_layers", shape.num_layers, 1 + found.count(r"blocks\.0\.(\d+)\.")),
    ):
        if said != there:
            raise ValueError(f"{found.place}: expected {name}={there}, as its weights have them; got {said}")
    with torch.device("meta"):
        planned = HydraHeads(shape)
    for name, parameter in planned.named_parameters():
        if found.shape(name) != tuple(parameter.shape):
            raise ValueError(
                f"{found.place}: expected {name} of shape {list(parameter.shape)}, got {list(found.shape(name))}"
            )


def _load_public(found: Checkpoint, target: Target) -> HydraHeads:
    step = 1 if any(key.startswith("hydra_mlp.0.0.") for key in found.keys) else 2
    shape = _public_shape(found, target, step)
    heads = HydraHeads.empty(shape, target)
    hidden = shape.hidden
    for index in range(shape.num_heads):
        names, output = _names(index, shape.num_layers, step)
        wide, first = (hidden, (index + 2) * hidden), names[0]
        parts = ("linear", "res_connection")
        weight, residual = (found.take(f"{first}.{part}.weight", wide) for part in parts)
        bias, residual_bias = (found.take(f"{first}.{part}.bias", (hidden,)) for part in parts)
        heads.set_first_block(index, weight, residual, bias, residual_bias)
        for block, name in zip(heads.blocks[index].children(), names[1:], strict=True):
            found.fill(block, prefix=f"{name}.linear.")
        if shape.own_head:
            found.fill(heads.outputs[index], prefix=f"{output}.")
    if heads.prefix is not None:
        found.fill(heads.prefix, prefix=_PREFIX)
        found.ignore(rf"{_PREFIX}embed_tokens\.weight", "the prefix layer reads states, no tokens")
        found.ignore(rf"{_PREFIX}.*rotary_emb\.inv_freq", "follows from the base of the frequencies")
    found.ignore(r"input_embed_fn\.weight", "a copy of the target's own embedding")
    return heads


def _public_shape(found: Checkpoint, target: Target, step: int) -> HydraShape:
    arch = found.setting("hydra_head_arch", str, ARCHES[0])
    if arch not in ARCHES:
        raise ValueError(f"{found.place}: heads of architecture {arch!r}; expected {' or '.join(ARCHES)}")
    if not found.setting("grounded_heads", bool, True):
        raise ValueError(f"{found.place}: heads that do not read drafted tokens are Medusa's; use drafter=medusa")
    return HydraShape(
        hidden=target.hidden_size,
        vocabulary=target.vocab_size,
        num_heads=found.count(r"hydra_mlp\.(\d+)\."),
        num_layers=(found.count(r"hydra_mlp\.0\.(\d+)\.") + step - 1) // step,
        own_head=found.count(r"hydra_lm_head\.(\d+)\.") > 0,
        prefix=_public_prefix(found, target) if arch == "prefix-mlp" else None,
        hidden_state_offset=found.setting("hidden_state_offset", int, 0, least=0),
    )


def _public_prefix(found: Checkpoint, target: Target) -> PrefixShape:
    """Sizes of the prefix layer; how many attention heads it has is the base's affair, as it is for the authors."""
    queries, keys, gate = (
        found.shape(f"{_PREFIX}layers.0.{name}_proj.weight")[0] for name in ("self_attn.q", "self_attn.k", "mlp.gate")
    )
    like, kind = PrefixShape.like(target), rope_type(target.config)
    if kind != "default":
        raise ValueError(
            f"{found.place}: expected a base with plain rotary positions, which its prefix layer takes over; those of "
            f"{target.name} are of type {kind!r}"
        )
    if queries % (2 * like.heads):
        raise ValueError(
            f"{found.place}: expected the prefix layer's queries to be those of the target's {like.heads} attention "
            f"heads, of an even size each; got {queries} rows"
        )
    head_dim = queries // like.heads
    return replace(like, head_dim=head_dim, kv_heads=keys // head_dim, intermediate=gate)


def _names(head: int, num_layers: int, step: int) -> tuple[list[str], str]:
    """Names of a head's blocks and of its output layer; ``step`` is 2 where a dropout stands in front of each."""
    blocks = [f"hydra_mlp.{head}.{step * (layer + 1) - 1}" for layer in range(num_layers)]
    return blocks, f"hydra_lm_head.{head}" + (".1" if step == 2 else "")


def _public_tensors(heads: HydraHeads, target: Target) -> Iterator[tuple[str, Tensor]]:
    shape, shared = heads.shape, target.router.head
    for index in range(shape.num_heads):
        names, output = _names(index, shape.num_layers, 1 if shape.prefix is None else 2)
        first = ("linear.weight", "res_connection.weight", "linear.bias", "res_connection.bias")
        for name, tensor in zip(first, heads.first_block(index), strict=True):
            yield f"{names[0]}.{name}", tensor
        for block, name in zip(heads.blocks[index].children(), names[1:], strict=True):
            yield from ((f"{name}.linear.{key}", tensor) for key, tensor in block.state_dict().items())
        own: Any = heads.outputs[index] if shape.own_head else shared
        bias = getattr(own, "bias", None)
        yield f"{output}.weight", own.weight
        yield f"{output}.bias", torch.zeros_like(own.weight[:, 0]) if bias is None else bias
    if heads.prefix is not None:
        yield from ((_PREFIX + name, tensor) for name, tensor in heads.prefix.state_dict().items())
