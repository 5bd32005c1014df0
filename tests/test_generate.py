"""The same arguments, the same result: ways to say what to generate, bad input, and the modes that never speculate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import specdec
from equality import DRAFTERS, VOCAB, Oracle, ask, assert_same, assert_same_on, model, new_text, prompt, run, tiny_llama

LENGTH = 14


def case(batch: int, **settings: Any) -> dict[str, Any]:
    return prompt(batch) | {"max_new_tokens": LENGTH} | settings


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_greedy(batch: int) -> None:
    assert_same(case(batch, max_new_tokens=40))
    assert model("oracle").speculation.mean_accepted_tokens > 3
    assert model("token_recycling").speculation.mean_accepted_tokens > 1.2
    assert model("none").speculation.mean_accepted_tokens == 1.0


@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_does_not_depend_on_the_drafter(batch: int) -> None:
    texts = [assert_same(case(batch, do_sample=True), DRAFTERS, "none", seed).tolist() for seed in range(3)]
    assert texts[0] != texts[1] != texts[2]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    whole = run("token_recycling", case(3, max_new_tokens=30))
    for row, length in enumerate((9, 4, 6)):
        alone = {key: value[row : row + 1, 9 - length :] for key, value in prompt(3).items()}
        assert run("token_recycling", alone | {"max_new_tokens": 30})[0, length:].tolist() == whole[row, 9:].tolist()


@pytest.mark.parametrize("more", [{}, {"max_new_tokens": 6}], ids=["config", "config and argument"])
def test_generation_config_object(more: dict[str, Any]) -> None:
    config = GenerationConfig(max_new_tokens=11, repetition_penalty=1.4, eos_token_id=7, pad_token_id=0)
    text = assert_same(prompt(3) | {"generation_config": config} | more)
    assert text.shape[1] == 9 + (6 if more else 11)


def test_the_model_s_own_generation_config() -> None:
    chosen = tiny_llama()
    chosen.generation_config.max_new_tokens = 9
    chosen.generation_config.no_repeat_ngram_size = 1
    assert assert_same_on(chosen, prompt(1)).shape == (1, 18)


def test_ids_may_be_named_inputs_and_the_mask_left_out() -> None:
    ids = prompt(1)["input_ids"]
    expected = model("plain").generate(ids, max_new_tokens=8)
    assert model("token_recycling").generate(ids, max_new_tokens=8).tolist() == expected.tolist()
    assert model("oracle").generate(inputs=ids, max_new_tokens=8).tolist() == expected.tolist()


def test_without_a_prompt_generation_starts_from_bos() -> None:
    assert_same({"max_new_tokens": 9})
    assert_same({"max_new_tokens": 9, "do_sample": True}, reference="none")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_as_input(batch: int, with_ids: bool) -> None:
    inputs = prompt(batch)
    embeddings = model("plain").get_input_embeddings()(inputs["input_ids"]).detach() * 1.1
    arguments = case(batch, inputs_embeds=embeddings)
    if not with_ids:
        del arguments["input_ids"]
    assert_same(arguments)
    assert_same(arguments | {"suppress_tokens": [16], "min_new_tokens": 8, "eos_token_id": 5})


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_chunked_prefill(batch: int, chunk: int) -> None:
    assert_same(case(batch, prefill_chunk_size=chunk))


def test_token_zero_is_a_token() -> None:
    chosen = tiny_llama(pad_token_id=None)
    with torch.no_grad():
        chosen.lm_head.weight[0] += chosen.lm_head.weight[5] + chosen.lm_head.weight[39]
    arguments = case(3, max_new_tokens=30)
    text = assert_same_on(chosen, arguments)
    assert 10 < int((text[:, 9:] == 0).sum()) < 80
    assert_same_on(chosen, arguments | {"eos_token_id": 0, "pad_token_id": 0})
    assert_same_on(chosen, arguments | {"eos_token_id": 5, "pad_token_id": 0, "no_repeat_ngram_size": 3})


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"do_sample": True}], ids=str)
def test_a_prompt_of_one_token(settings: dict[str, Any]) -> None:
    arguments = {"input_ids": torch.tensor([[7]]), "max_new_tokens": 12} | settings
    assert_same(arguments, reference="none" if "do_sample" in settings else "plain")


def tiny_gpt2() -> Any:
    """A model with a table of 24 positions."""
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "initializer_range": 0.3}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **ends)).eval()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_text_that_fills_the_context(batch: int) -> None:
    assert assert_same_on(tiny_gpt2(), prompt(batch) | {"max_length": 25}).shape == (batch, 25)


def test_rows_that_stop_early_beside_one_that_fills_the_context() -> None:
    plain, chosen = tiny_gpt2(), specdec.speculate(tiny_gpt2(), "prompt_lookup")
    text = ask(plain, prompt(3) | {"max_length": 25})
    for row, position in ((1, 22), (2, 12)):
        stop = {"eos_token_id": int(text[row, position]), "return_dict_in_generate": True, "output_logits": True}
        expected, got = (ask(one, prompt(3) | {"max_length": 25} | stop) for one in (plain, chosen))
        assert got.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [case(1, max_new_tokens=17), {"input_ids": torch.ones(1, 25).long(), "max_new_tokens": 3}],
    ids=["text", "prompt"],
)
def test_a_text_beyond_the_context_raises_as_plain_generate_does(arguments: dict[str, Any]) -> None:
    with pytest.raises(IndexError, match="index out of range"):
        ask(tiny_gpt2(), arguments)
    for drafter in ("none", "token_recycling", "prompt_lookup"):
        with pytest.raises(IndexError, match="index out of range"):
            ask(specdec.speculate(tiny_gpt2(), drafter), arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        case(1, max_new_tokens=0),
        {"input_ids": torch.empty(1, 0, dtype=torch.int64), "max_new_tokens": 3},
        case(1, max_length=5, max_new_tokens=None),
        case(1, no_such_argument=1),
        case(1, temperature=-1.0, do_sample=True),
        case(2, num_return_sequences=2),
    ],
    ids=["no new tokens", "empty prompt", "long prompt", "unknown argument", "temperature", "greedy sequences"],
)
def test_bad_input_raises_as_plain_generate_does(arguments: dict[str, Any]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever plain generate raises
        run("plain", arguments)
    for drafter in ("none", "token_recycling"):
        with pytest.raises(expected.type) as raised:
            run(drafter, arguments)
        assert str(raised.value) == str(expected.value)
    assert_same(case(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafter": "nonsense"}, "unknown drafter 'nonsense'; known: aggressive, .*token_recycling"),
        ({"verifier": "nonsense"}, "unknown verifier 'nonsense'; known: tree_attention"),
        ({"acceptance": "nonsense"}, "unknown acceptance 'nonsense'; known: block, greedy, "),
        ({"drafter": "token_recycling", "nodes": 3}, "takes no nodes; it takes: num_successors, num_nodes"),
        ({"drafter": "prompt_lookup", "max_ngram": 0}, "min_ngram <= max_ngram"),
        ({"drafter": Oracle(), "block": 3}, r"options \['block'\] go with a drafter's name"),
        ({"drafter": "token_recycling", "num_successors": VOCAB + 1}, f"it needs a vocabulary of at least {VOCAB + 1}"),
    ],
    ids=["drafter", "verifier", "acceptance", "option", "value", "option of an object", "does not fit"],
)
def test_what_speculate_refuses(arguments: dict[str, Any], message: str) -> None:
    chosen = tiny_llama()
    with pytest.raises(ValueError, match=message):
        specdec.speculate(chosen, **arguments)
    assert type(chosen) is LlamaForCausalLM
    assert_same_on(chosen, case(1), ["none"])


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"\(t5\) cannot run token trees: it is an encoder-decoder"):
        specdec.speculate(T5ForConditionalGeneration(config))


def test_what_cannot_generate_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a transformers model that can generate, got Linear"):
        specdec.speculate(torch.nn.Linear(2, 2))


def greedy_by_hand(chosen: Any, input_ids: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    """A decoding loop of the user's own, as ``custom_generate`` takes it."""
    for _step in range(kwargs["generation_config"].max_length - input_ids.shape[1]):
        logits = chosen(input_ids=input_ids).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
    return input_ids


NEVER: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "assistant": {"assistant_model": tiny_llama(num_hidden_layers=1)},
    "transformers' prompt lookup": {"prompt_lookup_num_tokens": 3},
    "custom loop": {"custom_generate": greedy_by_hand},
}
DELEGATED: dict[str, tuple[dict[str, Any], str]] = {
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "static cache": ({"cache_implementation": "static"}, "a cache of type StaticCache"),
    "right padding": ({"attention_mask": torch.tensor([[1] * 9, [1] * 7 + [0] * 2])}, "not left-padded"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
}


def assert_one_warning(chosen: Any, arguments: dict[str, Any], message: str) -> Any:
    """The first call warns, the second one does not; gives the result of the first."""
    with pytest.warns(UserWarning, match=message) as warned:
        result = ask(chosen, arguments)
    assert len(warned) == 1
    ask(chosen, arguments)
    return result


@pytest.mark.parametrize("name", NEVER)
def test_modes_that_never_speculate(name: str) -> None:
    arguments = case(1, **NEVER[name])
    chosen = specdec.speculate(tiny_llama(), "token_recycling")
    result = assert_one_warning(chosen, arguments, "this generation mode does not speculate")
    assert result.tolist() == ask(tiny_llama(), arguments).tolist()
    assert chosen.speculation.emitted_tokens == 0
    assert ask(chosen, case(1)).tolist() == ask(tiny_llama(), case(1)).tolist()
    assert chosen.speculation.emitted_tokens == LENGTH


@pytest.mark.parametrize("name", DELEGATED)
def test_requests_that_belong_to_plain_generation(name: str) -> None:
    settings, message = DELEGATED[name]
    arguments = case(2, **settings)
    plain = tiny_llama(attn_implementation="eager")
    chosen = specdec.speculate(tiny_llama(attn_implementation="eager"), "token_recycling")
    result = assert_one_warning(chosen, arguments, f"not speculating: .*{message}.*; running plain generation")
    expected = ask(plain, arguments)
    assert new_text(result, arguments) == new_text(expected, arguments)
    assert chosen.speculation.emitted_tokens == 0


def test_speculating_models_can_assist() -> None:
    arguments = case(1) | {"assistant_model": specdec.speculate(tiny_llama(num_hidden_layers=1), "none")}
    with pytest.warns(UserWarning, match="the model is another model's assistant"):
        text = tiny_llama().generate(**arguments)
    assert text.tolist() == run("plain", case(1)).tolist()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_text_that_crosses_the_boundary_of_its_rope_is_left_to_plain_generation(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    chosen = specdec.speculate(tiny_llama(rope_parameters=rope, max_position_embeddings=20), "token_recycling")
    plain = tiny_llama(rope_parameters=rope, max_position_embeddings=20)
    within = case(1, max_new_tokens=10)
    assert ask(chosen, within).tolist() == ask(plain, within).tolist()
    assert chosen.speculation.emitted_tokens == 10
    across = case(1, max_new_tokens=30)
    result = assert_one_warning(chosen, across, f"may cross 20 tokens, where {kind} rope switches")
    assert result.tolist() == ask(plain, across).tolist()
