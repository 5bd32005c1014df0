"""Logits processors: under greedy decoding the text is plain generate's, under sampling that of the drafter ``none``.

Sampled text is compared with ``none`` because plain generate draws from another stream; ``none`` and the law itself are
compared elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkingConfig, WatermarkingConfig

import specdec
from equality import DRAFTERS, VOCAB, assert_same, model, new_text, prompt, run, tiny_llama

SPECULATING = DRAFTERS[1:]
LENGTH = 16
SLOW = pytest.mark.slow

WARPERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.7},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "top_h": {"top_h": 0.6},
    "several": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
}


def only_even_after_odd(batch_id: int, ids: Tensor) -> list[int]:
    """Row- and text-dependent: the tokens that differ in parity from the last one, shifted by the row."""
    return list(range((int(ids[-1]) + batch_id + 1) % 2, VOCAB, 2))


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[39], [5, 5], [16, 37, 7]]},
    "sequence_bias": {"sequence_bias": [[[5], -4.0], [[16, 22], 6.0]]},
    "suppress_tokens": {"suppress_tokens": [5, 16, 39]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [16, 5, 30]},
    "forced_eos": {"forced_eos_token_id": 7, "eos_token_id": 7},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.2), "eos_token_id": 39},
    "min_length": {"min_length": 16, "eos_token_id": [5, 39]},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": [5, 39]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": only_even_after_odd},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "guidance_scale": {"guidance_scale": 1.7},
    "watermarking": {"watermarking_config": WatermarkingConfig(bias=3.0, context_width=1)},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 17, 29, 41])},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[39]], "eos_token_id": 5},
}


def case(settings: dict[str, Any], batch: int, **more: Any) -> dict[str, Any]:
    return prompt(batch) | {"max_new_tokens": LENGTH} | settings | more


def assert_prefix_rows(drafter: str, arguments: dict[str, Any], seed: int) -> None:
    """Every prefix of the batch gives the rows that the whole batch gives (up to padding)."""
    whole = new_text(run(drafter, arguments, seed=seed), arguments)
    for count in range(1, len(whole)):
        part = arguments | {key: arguments[key][:count] for key in ("input_ids", "attention_mask")}
        for row, text in zip(whole, new_text(run(drafter, part, seed=seed), part), strict=False):
            assert row[: len(text)] == text


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", WARPERS)
def test_warpers_under_sampling(name: str, batch: int) -> None:
    assert_same(case(WARPERS[name], batch, do_sample=True), SPECULATING, reference="none", seed=batch)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=SLOW), 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_under_greedy(name: str, batch: int) -> None:
    assert_same(case(PROCESSORS[name], batch))


@pytest.mark.parametrize("batch", [pytest.param(1, marks=SLOW), 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_under_sampling(name: str, batch: int) -> None:
    assert_same(case(PROCESSORS[name], batch, do_sample=True), SPECULATING, reference="none", seed=batch)


@pytest.mark.parametrize("name", [*PROCESSORS, *WARPERS])
def test_a_row_does_not_depend_on_the_rows_after_it(name: str) -> None:
    settings = PROCESSORS.get(name) or WARPERS[name]
    assert_prefix_rows("token_recycling", case(settings, 3, do_sample=True), seed=4)


def test_every_processor_of_the_table_changes_the_text() -> None:
    free = run("plain", case({}, 1)).tolist()
    harmless = {"remove_invalid_values", "exponential_decay_length_penalty", "synthid"}
    for name in sorted(PROCESSORS.keys() - harmless):
        assert run("plain", case(PROCESSORS[name], 1)).tolist() != free, name


def test_forced_bos_after_a_prompt_of_one_token() -> None:
    text = assert_same({"input_ids": torch.tensor([[3]]), "forced_bos_token_id": 9, "max_new_tokens": LENGTH})
    assert text[0, 1] == 9


@pytest.mark.parametrize("batch", [1, 3])
def test_guidance_with_negative_prompts(batch: int) -> None:
    negative = {"negative_prompt_ids": torch.arange(5 * batch).view(batch, 5) + 3}
    negative["negative_prompt_attention_mask"] = torch.ones_like(negative["negative_prompt_ids"])
    assert_same(case({"guidance_scale": 1.5} | negative, batch))


class Stateful(LogitsProcessor):
    """Unknown to specdec: counts its calls, penalises what it saw in any row, and writes down every call."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.seen = torch.zeros(VOCAB)

    def __deepcopy__(self, memo: Any) -> Stateful:
        return self

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append((tuple(scores.shape), input_ids.tolist()))
        self.seen[input_ids[0, -1]] += 1.5
        return scores - self.seen - 0.01 * len(self.calls) * torch.arange(VOCAB).flip(0)


def recorded(name: str, arguments: dict[str, Any], told: Any = ((),)) -> tuple[Any, list[list[int]]]:
    """The calls that an unknown processor saw, and the text."""
    calls: list[Any] = []
    arguments = arguments | {"logits_processor": LogitsProcessorList([Stateful(calls)])}
    return calls, new_text(run(name, arguments, told), arguments)


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": 30}, {"eos_token_id": 30, "do_sample": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_an_unknown_processor_sees_exactly_the_calls_of_plain_generate(batch: int, settings: dict[str, Any]) -> None:
    arguments = case(settings, batch)
    calls, text = recorded("none" if settings.get("do_sample") else "plain", arguments)
    assert [len(ids[0]) for _, ids in calls] == [9 + step for step in range(len(text[0]))]
    for drafter in DRAFTERS:
        assert recorded(drafter, arguments, text) == (calls, text)
    assert model("oracle").speculation.mean_accepted_tokens > 1.2


def test_scores_of_stopped_rows_after_an_unknown_processor_belong_to_plain_generate() -> None:
    wanted = {"eos_token_id": 30, "return_dict_in_generate": True, "output_scores": True}
    calls: list[Any] = []
    arguments = case(wanted, 3, logits_processor=LogitsProcessorList([Stateful(calls)]))
    speculating = specdec.speculate(tiny_llama(), "token_recycling")
    with pytest.warns(UserWarning, match="not speculating: output_scores of stopped rows after Stateful"):
        speculating.generate(**arguments)
    assert recorded("plain", case(wanted, 3))[0] == calls


def test_scores_after_an_unknown_processor_speculate_where_no_row_stops_early() -> None:
    arguments = case({"return_dict_in_generate": True, "output_scores": True}, 3)
    calls, text = recorded("plain", arguments)
    assert recorded("oracle", arguments, text) == (calls, text)
