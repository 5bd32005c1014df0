"""Adapters and images: what PEFT and vision-language models put in front of the text reaches the tree passes too."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import specdec
import zoo
from equality import ask, assert_same_on, prompt, run, tiny_llama

pytestmark = [
    # PEFT asks transformers by an old name, and says what it does with position ids.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]
ADAPTERS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def case(batch: int, **settings: Any) -> dict[str, Any]:
    return prompt(batch) | {"max_new_tokens": 14} | settings


def adapted(model: Any, kind: str) -> Any:
    """The model in a PEFT wrapper with random weights that matter."""
    torch.manual_seed(3)
    wrapped: Any = peft.get_peft_model(model, ADAPTERS[kind]).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.4)
    return wrapped


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind: str, batch: int) -> None:
    text = assert_same_on(adapted(tiny_llama(), kind), case(batch))
    assert text.tolist() != run("plain", case(batch)).tolist(), "the adapter changes nothing"


def test_padding_behind_virtual_tokens_in_a_windowed_model_is_left_to_plain_generation() -> None:
    wrapped = adapted(zoo.build("mistral"), "prompt tuning")
    assert_same_on(wrapped, case(1))
    expected = ask(wrapped, case(3))
    specdec.speculate(wrapped, "token_recycling")
    with pytest.warns(UserWarning, match="not speculating: padding between virtual tokens and text"):
        assert ask(wrapped, case(3)).tolist() == expected.tolist()


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "eos_token_id": 7}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_images(name: str, batch: int, settings: dict[str, Any]) -> None:
    chosen, inputs = zoo.vision(name)
    inputs = {key: value[: len(value) * batch // 2] for key, value in inputs.items()}
    arguments = inputs | {"max_new_tokens": 14} | settings
    text = assert_same_on(chosen, arguments)
    blind = ask(chosen, arguments | {"pixel_values": -inputs["pixel_values"]})
    assert text.tolist() != blind.tolist(), "the image changes nothing"


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_text_after_a_request_with_an_image(name: str) -> None:
    chosen, inputs = zoo.vision(name)
    words = {"input_ids": inputs["input_ids"][:1, -3:], "max_new_tokens": 14}
    expected = ask(chosen, words).tolist()
    specdec.speculate(chosen, "token_recycling")
    ask(chosen, inputs | {"max_new_tokens": 4})
    assert ask(chosen, words).tolist() == expected
