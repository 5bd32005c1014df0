"""Loading targets: the embedded demo model, or any causal LM from a local folder or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEMO_FOLDER = Path(__file__).resolve().parent / "demo" / "target"


@dataclass
class Loaded:
    """A model with its tokenizer, its name in reports, and whether its passes are to be compiled or captured."""

    model: Any
    tokenizer: Any
    name: str
    compile: bool = False
    cuda_graphs: bool = False

    def encode(self, prompt: str | Sequence[Mapping[str, str]], chat: bool | None = None) -> Tensor:
        """Token ids ``[1, W]`` of a prompt on the model's device.

        Args:
            prompt: one user turn, or plain text; or a conversation, messages with ``role`` and ``content``, which
                becomes its contents one after the other where there is no chat template.
            chat: put it into the tokenizer's chat template; None = where there is one.

        Raises:
            ValueError: an empty prompt, no chat template where one is asked for, or a prompt beyond the model's
                context.
        """
        template = self.tokenizer.chat_template is not None
        if chat and not template:
            raise ValueError(f"the tokenizer of {self.name} has no chat template; use chat=false")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        if template if chat is None else chat:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = self.tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        if not any(message["content"] for message in messages) or not ids:
            raise ValueError("the prompt is empty; expected at least one token")
        context = self.context_length
        if context is not None and len(ids) >= context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; {self.name} reads at most {context} with its answer included"
            )
        return torch.tensor([ids], device=self.model.device)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text, as ``generate`` knows them."""
        eos = self.model.generation_config.eos_token_id
        return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])

    @property
    def context_length(self) -> int | None:
        """Longest text the model was made for, in tokens; None where its config does not say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def demo_target(
    dtype: str = "bfloat16", device: str | None = None, compile: bool = False, cuda_graphs: bool = False
) -> Loaded:
    """The embedded demo target: a small Llama trained by ``scripts/train_demo_target.py``.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: such as ``cpu`` or ``cuda:0``; None = CUDA where there is one.
        compile: run speculative passes as compiled graphs.
        cuda_graphs: capture them as CUDA graphs.
    """
    if not (DEMO_FOLDER / "config.json").is_file():
        raise FileNotFoundError(
            f"the demo target is missing from {DEMO_FOLDER}; make it with scripts/train_demo_target.py"
        )
    loaded = _load(str(DEMO_FOLDER), "demo", dtype, device)
    loaded.compile, loaded.cuda_graphs = compile, cuda_graphs
    return loaded


def is_demo(model: Any) -> bool:
    """Whether a model is the demo target, for which drafters find their shipped weights."""
    return getattr(model.config, "_name_or_path", None) == str(DEMO_FOLDER)


def hf_target(  # noqa: PLR0913 - the options of one recipe
    path: str,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    compile: bool = False,
    cuda_graphs: bool = False,
) -> Loaded:
    """Any causal LM of transformers.

    Args:
        path: a local folder or a hub id.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``, ...
        device: such as ``cpu`` or ``cuda:0``; None = CUDA where there is one.
        device_map: as in ``from_pretrained``, such as ``auto``, in place of ``device``; needs accelerate.
        attn_implementation: ``sdpa`` or ``eager``; None = the model's default.
        revision: of the hub repository.
        trust_remote_code: run code that comes with the model; off unless asked for.
        compile: run speculative passes as compiled graphs.
        cuda_graphs: capture them as CUDA graphs.
    """
    extra = {"device_map": device_map, "attn_implementation": attn_implementation, "revision": revision}
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(f"target.path names no folder: {path}; expected one with config.json, or a hub id")
    known = {key: value for key, value in extra.items() if value is not None}
    loaded = _load(
        str(Path(path).expanduser()) if path.startswith("~") else path,
        Path(path).name,
        dtype,
        device,
        trust_remote_code=trust_remote_code,
        **known,
    )
    loaded.compile, loaded.cuda_graphs = compile, cuda_graphs
    return loaded


def _load(path: str, name: str, dtype: str, device: str | None, **options: Any) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; expected auto, float32, bfloat16 or float16")
    tokenizer_options = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    tokenizer = AutoTokenizer.from_pretrained(path, **tokenizer_options)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options
    )
    if "device_map" not in options:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Loaded(model.eval(), tokenizer, name)
