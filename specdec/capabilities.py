"""Which models and requests can branch a tree, asked before any work; refusals name the culprit and what would work.

Two kinds of answers. A *model* is refused by ``check`` when ``speculate`` is called. A *request* that belongs to plain
decoding is recognised by ``why_plain``; it runs as transformers does, with one warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from specdec.cache import TreeCache, can_branch
from specdec.interfaces import Context
from specdec.target import Target
from specdec.templates import Template
from specdec.tree import TokenTree
from specdec.visibility import FULL, KNOWN_LAYER_TYPES, AttentionKinds

SUPPORTED_TRANSFORMERS = ">= 5.17"
_PRIVATE_NAMES = ("_sample", "_prefill", "_update_model_kwargs_for_generation", "_optimize_model_for_decode")
_ATTENTION = ("sdpa", "eager")
# The shape of the self-check's tree: two branches, one of them forking again, six nodes.
_CHECK_TREE = ((0,), (1,), (0, 0), (0, 1), (1, 0))


def check_transformers(model: Any) -> None:
    """Raise ImportError where transformers lacks a name that the seam leans on."""
    missing = [name for name in _PRIVATE_NAMES if not hasattr(model, name)]
    # Models that override it pass what they do not know on to this one.
    prepare = inspect.signature(GenerationMixin.prepare_inputs_for_generation)
    if "next_sequence_length" not in prepare.parameters:
        missing.append("prepare_inputs_for_generation(next_sequence_length=)")
    if missing:
        import transformers

        raise ImportError(
            f"specdec needs transformers {SUPPORTED_TRANSFORMERS}; {transformers.__version__} has no "
            f"{', '.join(missing)} on {type(model).__name__}"
        )


def why_not(model: Any) -> str | None:
    """What about a model keeps a tree from branching in it; None where nothing is known to."""
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder; expected a decoder-only model"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids, so siblings cannot share a position"
    if getattr(model, "_is_stateful", False) or not model._supports_default_dynamic_cache():
        return "it keeps a recurrent state, which cannot be rolled back to a branch"
    text = config.get_text_config(decoder=True)
    if getattr(text, "alibi", False):
        return "ALiBi biases by cache slot, not by position_ids"
    if "local" in (getattr(text, "attention_layers", None) or ()):
        return "its local attention counts cache slots, not positions"
    odd = sorted({kind for kind in getattr(text, "layer_types", None) or () if kind not in KNOWN_LAYER_TYPES})
    if odd:
        return f"layer types {odd} cannot branch; expected {list(KNOWN_LAYER_TYPES)}"
    if not can_branch(DynamicCache(config=text)):
        return "its cache has layers other than full, sliding or chunked attention"
    return _why_not_attention(text)


def _why_not_attention(text: Any) -> str | None:
    used = getattr(text, "_attn_implementation", "sdpa")
    if used in _ATTENTION:
        return None
    return f"attention implementation {used!r} takes no tree mask; call model.set_attn_implementation('sdpa') first"


def check(target: Target) -> None:
    """Compare a six-node tree with its root-to-leaf paths on the loaded weights.

    Both the reference (every path alone, no cache, the model's own masks) and a control (the same paths decoded token
    by token with transformers' own cache) come from the plain model, so the bound is the model's own rounding.

    Raises:
        ValueError: the model cannot branch; says what is wrong.
    """
    reason = why_not(target.model)
    if reason is None:
        with _no_image_before(target.model):
            reason = _why_tree_differs(target)
    if reason is not None:
        raise ValueError(f"{target.name} ({target.config.model_type}) cannot run token trees: {reason}")


@contextmanager
def _no_image_before(model: Any) -> Iterator[None]:
    """Vision-language models remember how far the last request's images moved its text; in the block they do not."""
    kept = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    for module, _ in kept:
        module.rope_deltas = None
    try:
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


@torch.no_grad()
def _why_tree_differs(target: Target) -> str | None:
    template = Template.from_paths(_CHECK_TREE).to(target.device)
    # Spread over the vocabulary, distinct, and away from its ends, where special tokens tend to live.
    spread = torch.linspace(0.1, 0.8, 14, device=target.device) * target.vocab_size
    ids = spread.long()[torch.tensor([3, 9, 0, 12, 6, 1, 10, 4, 2, 5, 7, 8, 11, 13], device=target.device)]
    prompt, nodes = ids[None, :8], ids[None, 8:]
    try:
        with target.router.observe():
            outputs = target.model(input_ids=prompt, use_cache=True, return_dict=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"a plain forward over eight tokens failed ({type(error).__name__}: {error})"
    if outputs.get("past_key_values") is None:
        return "it returns no key-value cache"
    reference, control = _paths_alone(target, template, prompt, nodes)
    context = _bare_context(target, outputs.past_key_values, template.num_nodes)
    try:
        tree = target.run(context, TokenTree(nodes, template.topology)).logits[0].float()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"the tree pass failed ({type(error).__name__}: {error})"
    difference = (tree - reference).abs().amax(-1)
    rounding = (control - reference).abs().amax()
    spread_of_logits = (reference - reference.mean(0)).abs().amax()
    half = torch.finfo(target.dtype).bits < 32
    bound = 10 * rounding + (5e-2 if half else 1e-4) * spread_of_logits
    # Half precision may flip an expert's routing at one node; a wrong mask or position is wrong at most of them.
    worst = difference.median() if half else difference.max()
    if worst <= bound:
        return None
    return f"self-check: tree logits differ from path logits by {float(worst):.2e}, rounding allows {float(bound):.2e}"


def _paths_alone(target: Target, template: Template, prompt: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of every node, ``[N, V]``: from its path in one forward, and token by token with a cache."""
    together, stepwise = [], []
    for path in template.topology.paths[0].tolist():
        ids = torch.cat([prompt, nodes[:, [node for node in path if node >= 0]]], dim=1)
        together.append(target.model(input_ids=ids, use_cache=False, return_dict=True).logits[0, -1])
        outputs = target.model(input_ids=prompt, use_cache=True, return_dict=True)
        for step in range(prompt.shape[1], ids.shape[1]):
            outputs = target.model(
                input_ids=ids[:, step : step + 1],
                past_key_values=outputs.past_key_values,
                use_cache=True,
                return_dict=True,
            )
        stepwise.append(outputs.logits[0, -1])
    return torch.stack(together).float(), torch.stack(stepwise).float()


def _bare_context(target: Target, prefilled: Any, width: int) -> Context:
    columns = prefilled.get_seq_length()
    template = {"position_ids": torch.tensor([[columns]], device=target.device), "use_cache": True}
    return Context(TreeCache(prefilled, None, columns + width), template, [columns], [columns], [2**31], target.dtype)


def why_plain(
    model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], max_length: int
) -> str | None:
    """What about a request belongs to plain decoding; None where it can speculate.

    Args:
        model: the model being asked.
        input_ids: int64 ``[B, W]``.
        generation_config: as ``_sample`` receives it.
        model_kwargs: likewise.
        max_length: longest text this request can reach, in tokens.
    """
    if generation_config.is_assistant:
        return "the model is another model's assistant"
    if not model_kwargs.get("use_cache", True):
        return "use_cache=False"
    if not can_branch(model_kwargs.get("past_key_values")):
        return f"a cache of type {type(model_kwargs.get('past_key_values')).__name__}"
    if generation_config.output_attentions:
        return "output_attentions"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and (mask.ndim != 2 or bool((mask[:, 1:] < mask[:, :-1]).any())):
        return "an attention mask that is not left-padded"
    text = model.config.get_text_config(decoder=True)
    reason = _why_not_attention(text)
    if reason is not None:
        return reason
    # PEFT's prompt learning patches this name on the instance.
    virtual = "prepare_inputs_for_generation" in model.__dict__
    if virtual and mask is not None and not bool(mask.all()) and set(AttentionKinds.of(text).sizes) != {FULL}:
        return "padding between virtual tokens and text, which a windowed model counts"
    # Ids are fewer than positions where the prompt is embeddings, or continues a cache.
    embeds = model_kwargs.get("inputs_embeds")
    seen = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    columns = max(input_ids.shape[1], seen or 0, 0 if embeds is None else embeds.shape[1])
    shortest = columns if mask is None else int(mask.sum(-1).min())
    return _why_positions_switch(text, shortest, max_length + columns - input_ids.shape[1])


def _why_positions_switch(text: Any, prompt_length: int, max_length: int) -> str | None:
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for parameters in ropes:
        kind = parameters.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            continue
        boundary = parameters.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        boundary = boundary or text.max_position_embeddings
        if max_length > boundary and not (kind == "longrope" and prompt_length > boundary):
            return f"a text that may cross {boundary} tokens, where {kind} rope switches its frequencies"
    floor = getattr(text, "floor_scale", None)
    if getattr(text, "attn_temperature_tuning", False) and floor and max_length >= floor:
        return f"a text that may reach {floor} tokens, where attention temperature is tuned by cache slot"
    return None
