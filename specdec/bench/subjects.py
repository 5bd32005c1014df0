"""What is measured: the target of a run, and a Llama of random weights whose size makes a pass memory-bound.

Shapes: B rows, P committed tokens, N nodes, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Subject:
    """A model with the name that it goes by in tables."""

    name: str
    model: Any

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> str:
        """Of its weights."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def num_parameters(self) -> int:
        """Of all weights, tied ones once."""
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one pass reads: all of them but the input embedding, of which it reads a few rows;
        where that is the output head too, it is read as such.
        """
        embedding = self.model.get_input_embeddings().weight
        tied = self.model.get_output_embeddings().weight is embedding
        return sum(w.nbytes for w in self.model.parameters()) - (0 if tied else embedding.nbytes)

    def kv_bytes(self, rows: int, length: int) -> int:
        """Bytes of K/V that one pass over ``rows`` sequences of ``length`` committed tokens reads."""
        return sum(k.nbytes + v.nbytes for k, v in self._one_token()) * rows * length

    def filled(self, rows: int, length: int, seed: int = 0) -> DynamicCache:
        """transformers' own cache with ``length`` tokens in every row: random numbers, which cost what real ones do.

        So a long context takes no prefill.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._one_token()):
            states = [
                torch.empty(rows, like.shape[1], length, like.shape[3], dtype=like.dtype, device=like.device).normal_(
                    generator=generator
                )
                for like in (keys, values)
            ]
            cache.update(states[0], states[1], index)
        return cache

    def ids(self, rows: int, width: int, seed: int = 0) -> Tensor:
        """Random token ids, int64 ``[rows, width]``."""
        generator = torch.Generator("cpu").manual_seed(seed)
        size = self.model.get_output_embeddings().weight.shape[0]
        return torch.randint(size, (rows, width), generator=generator).to(self.device)

    def _one_token(self) -> list[tuple[Tensor, Tensor]]:
        with torch.inference_mode():
            cache = self.model(self.ids(1, 1), use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]


def random_llama(shape: Mapping[str, Any], dtype: str, device: str | None = None, seed: int = 0) -> Any:
    """A Llama of random weights, in evaluation mode.

    Args:
        shape: arguments of ``LlamaConfig``.
        dtype: of the weights; they are made in it, so that twice the memory is never needed.
        device: None = CUDA where there is one.
        seed: of the weights; torch's global generator is left as it was.

    Raises:
        ValueError: an unknown dtype.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; expected float32, bfloat16 or float16")
    before, place = torch.get_default_dtype(), device or ("cuda" if torch.cuda.is_available() else "cpu")
    devices = [torch.device(place)] if torch.device(place).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        torch.set_default_dtype(kind)
        try:
            with torch.device(place):
                model = LlamaForCausalLM(LlamaConfig(**shape))
        finally:
            torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
