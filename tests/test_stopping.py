"""Stopping: at the same token as plain generate, wherever in an accepted block it falls, with the same padding after it."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
import torch
from equality import DRAFTERS, PAD, VOCAB, assert_same, model, new_text, prompt, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

LENGTH = 24


def case(batch: int, **settings: Any) -> dict[str, Any]:
    return prompt(batch) | {"max_new_tokens": LENGTH} | settings


@cache
def free_text(batch: int) -> list[list[int]]:
    """The greedy text that nothing stops."""
    arguments = case(batch)
    return new_text(run("plain", arguments), arguments)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Token 2n is the letter n, token 2n+1 the same letter before an ``e``."""
    letters = "abcdfghijklmnopqrstuvwxyz"
    vocabulary = {letters[i // 2] + "e" * (i % 2): i for i in range(VOCAB)}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="b")


@pytest.mark.parametrize("position", range(12))
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_eos_at_every_offset_of_a_block(drafter: str, position: int) -> None:
    token = free_text(1)[0][position]
    text = assert_same(drafter, case(1, eos_token_id=token))
    assert text[0, -1] == token


@pytest.mark.parametrize("position", range(12))
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_eos_list_in_a_ragged_batch(drafter: str, position: int) -> None:
    tokens = [row[position] for row in free_text(3)[:2]]
    text = assert_same(drafter, case(3, eos_token_id=tokens))
    assert text.shape[1] > 9


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stopped_rows_pad_until_the_last_one_stops(drafter: str) -> None:
    arguments = case(3, eos_token_id=free_text(3)[0][5])
    text = new_text(assert_same(drafter, arguments), arguments)
    assert text[0][6:] == [PAD] * (len(text[0]) - 6)
    assert len(text[0]) > 6


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_eos_under_sampling(drafter: str) -> None:
    for seed in range(4):
        assert_same(drafter, case(3, eos_token_id=[5, 39, 16], do_sample=True), reference="none", seed=seed)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_token_budget(drafter: str, batch: int, length: int) -> None:
    assert assert_same(drafter, case(batch, max_new_tokens=length)).shape == (batch, 9 + length)
    by_total = prompt(batch) | {"max_length": 9 + length}
    assert assert_same(drafter, by_total).shape == (batch, 9 + length)
    assert model(drafter).speculation.emitted_tokens == batch * length


@pytest.mark.parametrize("eos", [None, 30])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_max_time(drafter: str, eos: int | None) -> None:
    assert assert_same(drafter, case(3, max_time=1e-9, eos_token_id=eos)).shape == (3, 10)
    assert_same(drafter, case(3, max_time=1e9, eos_token_id=eos))


class SlowFrom(StoppingCriteria):
    """Never stops anything; spends time from a given length on."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        time.sleep(0.2 if input_ids.shape[1] >= self.length else 0)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("eos", [None, 30])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_max_time_within_the_text(drafter: str, eos: int | None) -> None:
    arguments = case(3, max_time=0.15, eos_token_id=eos, stopping_criteria=StoppingCriteriaList([SlowFrom(14)]))
    text = assert_same(drafter, arguments)
    assert text.shape == (3, 14)


class Sum(StoppingCriteria):
    """Stops row b where the sum of its last two tokens is divisible by b + 3; writes down what it was called with."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __deepcopy__(self, memo: Any) -> Sum:
        return self

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        self.calls.append((input_ids.tolist(), None if scores is None else [tuple(s.shape) for s in scores]))
        return input_ids[:, -2:].sum(-1) % (torch.arange(len(input_ids)) + 5) == 0


@pytest.mark.parametrize("wanted", [{}, {"return_dict_in_generate": True, "output_scores": True}], ids=["ids", "scores"])
@pytest.mark.parametrize("eos", [None, 41])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_custom_criterion(drafter: str, batch: int, eos: int | None, wanted: dict[str, Any]) -> None:
    def recorded(name: str, told: Any = ((),)) -> tuple[Any, list[list[int]]]:
        calls: list[Any] = []
        arguments = case(batch, stopping_criteria=StoppingCriteriaList([Sum(calls)]), eos_token_id=eos, **wanted)
        return calls, new_text(run(name, arguments, told), arguments)

    calls, text = recorded("plain")
    assert recorded(drafter, text) == (calls, text)
    assert len(text[0]) < LENGTH, "nothing was stopped"


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_without_eos_a_stopped_row_goes_on_until_all_have_stopped(drafter: str) -> None:
    arguments = case(3, stopping_criteria=StoppingCriteriaList([Sum([])]))
    text = new_text(assert_same(drafter, arguments), arguments)
    assert text == [row[: len(text[0])] for row in free_text(3)], "real tokens, no padding"
    assert model(drafter).speculation.emitted_tokens == 3 * len(text[0])


class NotALimit(StoppingCriteria):
    """Carries a ``max_length`` that is not a number of tokens, and never stops."""

    max_length = 3

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:  # noqa: ARG002
        return False


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_foreign_max_length_attribute_is_no_token_budget(drafter: str) -> None:
    assert_same(drafter, case(1, stopping_criteria=StoppingCriteriaList([NotALimit()])))


@pytest.mark.parametrize("eos", [None, 41])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("position", range(1, 9))
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stop_strings(drafter: str, position: int, batch: int, eos: int | None) -> None:
    stops = [tokenizer().decode(row[position : position + 2])[:2] for row in free_text(batch)]
    text = assert_same(drafter, case(batch, stop_strings=stops, tokenizer=tokenizer(), eos_token_id=eos))
    assert text.shape[1] < 9 + LENGTH


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stop_strings_under_sampling(drafter: str) -> None:
    for seed in range(3):
        arguments = case(3, stop_strings=["ca", "de", "rt", "x"], tokenizer=tokenizer(), do_sample=True)
        assert_same(drafter, arguments, reference="none", seed=seed)


@pytest.mark.parametrize("stop", [{"eos_token_id": 39}, {"max_new_tokens": 4}], ids=str)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_nothing_is_counted_past_a_stop(drafter: str, stop: dict[str, int]) -> None:
    arguments = case(3, **stop)
    text = new_text(assert_same(drafter, arguments), arguments)
    eos = stop.get("eos_token_id", -1)
    emitted = sum(row.index(eos) + 1 if eos in row else len(row) for row in text)
    stats = model(drafter).speculation
    assert stats.emitted_tokens == emitted
    assert stats.verifications == sum(stats.accepted_lengths.values())
    accepted = sum(length * count for length, count in stats.accepted_lengths.items())
    assert accepted + stats.verifications == emitted - 3
