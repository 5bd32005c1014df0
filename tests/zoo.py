"""The zoo: tiny random models of many families whose text depends on its whole context.

A tiny model as transformers initialises it (std 0.02) hides errors: attention is uniform, layers add next to nothing,
the next token follows from the last one. So matrices are drawn anew with std 2 / sqrt(32) and centred in both
dimensions (else the mean of GELU and ReLU swamps the stream with one direction: gptj then repeats one token),
embeddings with std 0.5 after the model's own scaling, biases with std 0.05; query norms, which flatten attention, are
doubled. Windows and chunks are 8 tokens, shorter than the text.

Measured over the 42 families, seed 0, float32, 16 greedy texts of 40 tokens behind random prompts of 12 (16 contexts of
24 tokens for the second line), transformers 5.23 on a CPU:
    texts without a loop of period <= 8 in their last 20 tokens: 87 % or more in every family, all of them in 37
    the next token changes when 6 tokens just before the last are shuffled: median 0.66, least xglm 0.19, olmo2 0.23;
        when one of them is replaced: median 0.50, least codegen 0.19, nemotron 0.22
    gap between the two best logits < 1e-3: 0.15 % of tokens, 0.5 % at most in a family (logits have std 2)
    token-by-token against one forward, largest difference of a logit: median 3e-5, most 3e-4 (granitemoe, nemotron)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

VOCAB, HIDDEN, WINDOW, PAD = 97, 32, 8, 0
LENGTHS = (13, 6, 10)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
_GQA = {"num_key_value_heads": 2}
_HEADS = _GQA | {"head_dim": 8}
_WINDOWED = _HEADS | {"sliding_window": WINDOW}
_ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# What each family needs beyond _BASE; keys are transformers' model types.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": _WINDOWED,
    "qwen2": _GQA,
    "qwen3": _HEADS,
    "qwen3_moe": _HEADS | _MOE | {"num_experts": 4},
    "gemma2": _WINDOWED | {"query_pre_attn_scalar": 8},
    "gemma3_text": _WINDOWED | _ALTERNATE | {"query_pre_attn_scalar": 8},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi3": _GQA,
    "mixtral": _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False, "bias": False},
    "olmo2": _GQA,
    "granite": _GQA
    | {"embedding_multiplier": 2.0, "residual_multiplier": 0.8, "logits_scaling": 0.5, "attention_multiplier": 0.35},
    "cohere": _GQA | {"logit_scale": 0.5},
    "cohere2": _WINDOWED | _ALTERNATE | {"logit_scale": 0.5},
    "deepseek_v3": _MOE
    | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    | {
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "llama4_text": _HEADS
    | {"attention_chunk_size": WINDOW, "no_rope_layers": [1, 0, 1, 0], "intermediate_size_mlp": 48}
    | {"num_local_experts": 4, "interleave_moe_layer_step": 2},
    "gpt_oss": _WINDOWED
    | _ALTERNATE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "gemma": _HEADS,
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global"], 4]]},
    "stablelm": _GQA,
    "starcoder2": _WINDOWED,
    "glm4": _HEADS,
    "qwen2_moe": _GQA | _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "smollm3": _GQA | {"no_rope_layers": [1, 0, 1, 0]},
    "ernie4_5": _HEADS,
    "phi": {},
    "gpt_bigcode": {},
    "codegen": {"rotary_dim": 4},
    "olmo3": _WINDOWED | _ALTERNATE,
    "exaone4": _WINDOWED | _ALTERNATE,
    "granitemoe": _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": _GQA | {"num_experts": 4, "num_experts_per_tok": 2},
    "nemotron": _HEADS,
    "xglm": {"d_model": HIDDEN, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4},
    "biogpt": {},
    "persimmon": {},
    "diffllama": _GQA,
    "glm4_moe": _HEADS
    | _MOE
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of a family in ``FAMILIES``, the same for the same seed; it never ends its text by itself."""
    return _redraw(_make(family, _FAMILIES[family]), seed).to(dtype)


def _make(model_type: str, settings: Mapping[str, Any], auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **(_BASE | dict(settings)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=PAD, bos_token_id=1)
    return model


@torch.no_grad()
def _redraw(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    scales = {id(table.weight): float(getattr(table, "embed_scale", 1.0)) for table in tables}
    for name, parameter in model.named_parameters():
        if id(parameter) in scales:
            parameter.normal_(0.0, 0.5 / scales[id(parameter)], generator=generator)
        elif parameter.ndim > 1:
            parameter.normal_(0.0, 2.0 / HIDDEN**0.5, generator=generator)
            for dim in (-1, -2):
                parameter -= parameter.mean(dim, keepdim=True)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.05, generator=generator)
        elif name.endswith(("q_norm.weight", "q_layernorm.weight")):
            parameter += 1.0
    return model


@torch.no_grad()
def clear_prompts(
    model: PreTrainedModel, batch: int, new_tokens: int, lengths: Sequence[int] = LENGTHS
) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts whose greedy text has no near-tie, so that rounding cannot change it, and ``generate``'s plain answer."""
    for seed in range(20):
        ids, mask = prompts(batch, seed=seed, lengths=lengths)
        inputs = {"input_ids": ids, "attention_mask": mask}
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
        output = model.generate(**inputs, **settings, output_logits=True)
        best = torch.stack(output.logits).float().topk(2).values
        if float((best[..., 0] - best[..., 1]).min()) > 3e-3:
            return inputs, output.sequences
    raise AssertionError(f"every text of {type(model).__name__} has a near-tie")


def prompts(batch: int, vocab: int = VOCAB, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Random left-padded ids and their mask, ``[batch, W]``; row b has ``lengths[b % len(lengths)]`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([lengths[row % len(lengths)] for row in range(batch)])
    width = int(sizes.max())
    mask = (torch.arange(width) >= width - sizes[:, None]).long()
    ids = torch.randint(2, vocab, (batch, width), generator=generator)
    return ids.masked_fill(mask == 0, PAD), mask


_IMAGE = 90  # id of the placeholder of an image patch; prompts of vision models stay below it


def vision(name: str, seed: int = 0) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A vision-language model and inputs for ``generate``: two rows of different lengths, an image in each."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = prompts(2, _IMAGE - 5, seed, lengths=(13, 10))
    ids[:, -7:-3] = _IMAGE  # four patches
    inputs = {"input_ids": ids, "attention_mask": mask}
    text = _BASE | _GQA
    if name == "llava":
        tower = {
            "model_type": "clip_vision_model",
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
        }
        tower |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": HIDDEN}
        settings: dict[str, Any] = {"image_token_index": _IMAGE, "text_config": {"model_type": "llama", **text}}
        inputs["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
    elif name == "qwen2_vl":
        tower = {
            "embed_dim": HIDDEN,
            "hidden_size": HIDDEN,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
        }
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        settings = {"image_token_id": _IMAGE, "video_token_id": _IMAGE + 1, "vision_start_token_id": _IMAGE + 2}
        settings |= {"vision_end_token_id": _IMAGE + 3, "text_config": {**text, "rope_parameters": rope}}
        ids[:, -8], ids[:, -3] = _IMAGE + 2, _IMAGE + 3
        inputs["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        inputs["mm_token_type_ids"] = (ids == _IMAGE).long()
    else:
        raise ValueError(f"unknown vision model {name!r}; known: llava, qwen2_vl")
    model = _make(name, settings | {"vision_config": tower}, AutoModelForImageTextToText)
    return _redraw(model, seed), inputs


def _lazy(
    model_type: str, settings: Mapping[str, Any], *, redraw: bool = False, auto: Any = AutoModelForCausalLM
) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        model = _make(model_type, settings, auto)
        return _redraw(model, 0) if redraw else model

    return make


_WIDE = {"initializer_range": 0.3}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_LOCAL = {"attention_types": [[["global", "local"], 2]]}
_STACKS = {f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
_STACKS |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_T5 = {"num_layers": 4, "num_decoder_layers": 4, "num_heads": 4, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48}
_T5 |= {"decoder_start_token_id": PAD}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 24}
_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
_LONG: dict[str, Any] = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **_FACTORS}}
_LONG |= {"original_max_position_embeddings": 24}

# Models that no tree can branch in; those in SWITCHING only where the text crosses their rope's boundary of 24 tokens.
SWITCHING = ("llama_dynamic", "phi3_longrope")
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba": _lazy("mamba", _WIDE),
    "mamba2": _lazy("mamba2", _WIDE | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}),
    "falcon_mamba": _lazy("falcon_mamba", _WIDE),
    "rwkv": _lazy("rwkv", _WIDE),
    "recurrent_gemma": _lazy("recurrent_gemma", _GQA | {"lru_width": HIDDEN, "attention_window_size": WINDOW}),
    "jamba": _lazy("jamba", _WIDE | _GQA | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    "qwen3_next": _lazy("qwen3_next", _WIDE | _HEADS | _HYBRID | {"num_experts": 2, "num_experts_per_tok": 1}),
    "lfm2": _lazy("lfm2", _WIDE | _GQA | {"layer_types": ["conv", "full_attention"] * 2}),
    "minimax": _lazy("minimax", _WIDE | _HEADS | _HYBRID),
    "bloom": _lazy("bloom", {}, redraw=True),
    "mpt": _lazy("mpt", {}, redraw=True),
    "falcon_alibi": _lazy("falcon", {"alibi": True}, redraw=True),
    "gpt_neo_local": _lazy("gpt_neo", _LOCAL | {"window_size": WINDOW}, redraw=True),
    "gpt_neo_far": _lazy("gpt_neo", _LOCAL | {"window_size": 20}, redraw=True),  # beyond the self-check's 14 tokens
    "bart": _lazy("bart", _STACKS | {"is_decoder": True, "d_model": HIDDEN}, redraw=True),
    "roformer": _lazy("roformer", {"is_decoder": True}, redraw=True),
    "openai-gpt": _lazy("openai-gpt", {}, redraw=True),
    "t5": _lazy("t5", _T5, auto=AutoModelForSeq2SeqLM),
    "llama_dynamic": _lazy("llama", _GQA | {"rope_parameters": _DYNAMIC}, redraw=True),
    "phi3_longrope": _lazy("phi3", _GQA | _LONG, redraw=True),
}


def untrained(*drafters: str) -> pytest.MarkDecorator:
    """For tests that run these drafters on random weights, of which they would warn a user."""
    return pytest.mark.filterwarnings(f"ignore:drafter '({'|'.join(drafters)})' has no trained weights:UserWarning")
