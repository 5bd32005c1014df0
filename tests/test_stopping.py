"""Stopping: at plain generate's token, wherever in an accepted block it falls, with the same padding after it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from equality import DRAFTERS, PAD, VOCAB, assert_same, model, new_text, prompt, run

LENGTH = 20


def case(batch: int, **settings: Any) -> dict[str, Any]:
    return prompt(batch) | {"max_new_tokens": LENGTH} | settings


@cache
def free_text(batch: int) -> list[list[int]]:
    """The greedy text that nothing stops."""
    arguments = case(batch)
    return new_text(run("plain", arguments), arguments)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The letters, and 22 of them after an ``e``."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {name: i for i, name in enumerate([*letters, *("e" + letter for letter in letters)][:VOCAB])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="b")


@pytest.mark.parametrize("position", range(12))
def test_eos_at_every_offset_of_a_block(position: int) -> None:
    token = free_text(1)[0][position]
    text = assert_same(case(1, eos_token_id=token))
    assert text[0, -1] == token


@pytest.mark.parametrize("position", range(12))
def test_eos_list_in_a_ragged_batch(position: int) -> None:
    tokens = [row[position] for row in free_text(3)[:2]]
    text = assert_same(case(3, eos_token_id=tokens))
    assert text.shape[1] > 9


def test_stopped_rows_pad_until_the_last_one_stops() -> None:
    arguments = case(3, eos_token_id=free_text(3)[0][5])
    text = new_text(assert_same(arguments), arguments)
    assert text[0][6:] == [PAD] * (len(text[0]) - 6)
    assert len(text[0]) > 6


def test_eos_under_sampling() -> None:
    for seed in range(4):
        assert_same(case(3, eos_token_id=[5, 39, 16], do_sample=True), reference="none", seed=seed)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_token_budget(batch: int, length: int) -> None:
    assert assert_same(case(batch, max_new_tokens=length)).shape == (batch, 9 + length)
    by_total = prompt(batch) | {"max_length": 9 + length}
    assert assert_same(by_total).shape == (batch, 9 + length)
    assert model("oracle").speculation.emitted_tokens == batch * length


class Clock:
    """Stands in for the ``time`` module of transformers' criteria; stands still until told."""

    now = 1.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", clock)
    return clock


class TimePasses(StoppingCriteria):
    """Never stops anything; the time runs out when the text has some length."""

    def __init__(self, clock: Clock, length: int) -> None:
        self.clock, self.length = clock, length
        clock.now = 1.0

    def __deepcopy__(self, memo: Any) -> TimePasses:
        return TimePasses(self.clock, self.length)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:  # noqa: ARG002
        self.clock.now += 9.0 if input_ids.shape[1] == self.length else 0.0
        return False


@pytest.mark.parametrize("eos", [None, 30])
def test_max_time(eos: int | None, clock: Clock) -> None:
    assert assert_same(case(3, max_time=5.0, eos_token_id=eos)).shape == (3, 9 + LENGTH)
    clock.now = 10.0
    assert assert_same(case(3, max_time=-1.0, eos_token_id=eos)).shape == (3, 10)


@pytest.mark.parametrize("eos", [None, 30])
def test_max_time_runs_out_within_a_block(eos: int | None, clock: Clock) -> None:
    patience = StoppingCriteriaList([TimePasses(clock, 14)])
    assert assert_same(case(3, max_time=5.0, eos_token_id=eos, stopping_criteria=patience)).shape == (3, 15)


class Impatient(BaseStreamer):
    """Lets the time run out when it has been given some positions."""

    def __init__(self, clock: Clock, positions: int) -> None:
        self.clock, self.positions = clock, positions
        clock.now = 1.0

    def __deepcopy__(self, memo: Any) -> Impatient:
        return Impatient(self.clock, self.positions)

    def put(self, value: Tensor) -> None:  # noqa: ARG002
        self.positions -= 1
        self.clock.now += 9.0 if self.positions == 0 else 0.0

    def end(self) -> None:
        pass


@pytest.mark.parametrize("more", [{}, {"eos_token_id": 27}, {"repetition_penalty": 1.01}], ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_rows_that_time_ran_out_on_end_together(name: str, more: dict[str, Any], clock: Clock) -> None:
    free = case(3, **more)
    told = new_text(run("plain", free), free)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    arguments = case(3, max_time=5.0, streamer=Impatient(clock, 4), **wanted, **more)
    result = run(name, arguments, told)
    text = new_text(result, arguments)
    assert 4 <= len(text[0]) <= 9
    assert text == [row[: len(text[0])] for row in told], "real tokens, no padding"
    assert [tuple(s.shape) for s in result.scores] == [(3, VOCAB)] * len(text[0])
    assert len(result.hidden_states) == len(text[0])
    assert result.past_key_values.get_seq_length() == result.sequences.shape[1] - 1


class Sum(StoppingCriteria):
    """Stops row b where the sum of its last two tokens is divisible by b + 3; writes down what it was called with."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __deepcopy__(self, memo: Any) -> Sum:
        return self

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        self.calls.append((input_ids.tolist(), None if scores is None else [tuple(s.shape) for s in scores]))
        return input_ids[:, -2:].sum(-1) % (torch.arange(len(input_ids)) + 5) == 0


@pytest.mark.parametrize("wanted", [{}, {"return_dict_in_generate": True, "output_scores": True}], ids=str)
@pytest.mark.parametrize("eos", [None, 41])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_custom_criterion_sees_exactly_the_calls_of_plain_generate(
    batch: int, eos: int | None, wanted: dict[str, Any]
) -> None:
    def recorded(name: str, told: Any = ((),)) -> tuple[Any, list[list[int]]]:
        calls: list[Any] = []
        arguments = case(batch, stopping_criteria=StoppingCriteriaList([Sum(calls)]), eos_token_id=eos, **wanted)
        return calls, new_text(run(name, arguments, told), arguments)

    calls, text = recorded("plain")
    assert len(text[0]) < LENGTH, "nothing was stopped"
    for drafter in DRAFTERS:
        assert recorded(drafter, text) == (calls, text), drafter


def test_without_eos_a_stopped_row_goes_on_until_all_have_stopped() -> None:
    arguments = case(3, stopping_criteria=StoppingCriteriaList([Sum([])]))
    text = new_text(assert_same(arguments), arguments)
    assert text == [row[: len(text[0])] for row in free_text(3)], "real tokens, no padding"
    assert model("oracle").speculation.emitted_tokens == 3 * len(text[0])


class NotALimit(StoppingCriteria):
    """Carries a ``max_length`` that is not a number of tokens, and never stops."""

    max_length = 3

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:  # noqa: ARG002
        return False


def test_foreign_max_length_attribute_is_no_token_budget() -> None:
    assert_same(case(1, stopping_criteria=StoppingCriteriaList([NotALimit()])))


@pytest.mark.parametrize("eos", [None, 41])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("position", range(1, 7))
def test_stop_strings_at_every_offset_of_a_block(position: int, batch: int, eos: int | None) -> None:
    stops = [tokenizer().decode(row[position : position + 2])[:2] for row in free_text(batch)]
    text = assert_same(
        case(batch, stop_strings=stops, tokenizer=tokenizer(), eos_token_id=eos), ("token_recycling", "oracle")
    )
    assert text.shape[1] < 9 + LENGTH


def test_stop_strings_under_sampling() -> None:
    for seed in range(2):
        arguments = case(3, stop_strings=["ca", "de", "rt", "x"], tokenizer=tokenizer(), do_sample=True)
        assert_same(arguments, reference="none", seed=seed)


@pytest.mark.parametrize("stop", [{"eos_token_id": 39}, {"max_new_tokens": 4}], ids=str)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_nothing_is_counted_past_a_stop(drafter: str, stop: dict[str, int]) -> None:
    arguments = case(3, **stop)
    text = new_text(assert_same(arguments, [drafter]), arguments)
    eos = stop.get("eos_token_id", -1)
    emitted = sum(row.index(eos) + 1 if eos in row else len(row) for row in text)
    stats = model(drafter).speculation
    assert stats.emitted_tokens == emitted
    assert stats.verifications == sum(stats.accepted_lengths.values())
    accepted = sum(length * count for length, count in stats.accepted_lengths.items())
    assert accepted + stats.verifications == emitted - 3
