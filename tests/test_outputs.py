"""What generate hands back besides ids: streamed tokens, scores, logits, hidden states, the cache; all as plain's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, TextStreamer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

import specdec
import zoo
from equality import DRAFTERS, Oracle, ask, assert_same, model, new_text, prompt, run, tiny_llama
from specdec.interfaces import DecodeState
from specdec.tree import TokenTree
from test_stopping import tokenizer

LENGTH = 14
EVERYTHING = dict.fromkeys(["return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"], True)


def case(batch: int, **settings: Any) -> dict[str, Any]:
    return prompt(batch) | {"max_new_tokens": LENGTH} | settings


class Taking(BaseStreamer):
    """Writes down what it is given."""

    def __init__(self, taken: list[Any]) -> None:
        self.taken = taken

    def __deepcopy__(self, memo: Any) -> Taking:
        return self

    def put(self, value: Tensor) -> None:
        self.taken.append(value.tolist())

    def end(self) -> None:
        self.taken.append("end")


@pytest.mark.parametrize(
    "settings", [{}, {"eos_token_id": 39}, {"repetition_penalty": 1.2, "eos_token_id": 5}], ids=str
)
@pytest.mark.parametrize("batch", [1, 3])
def test_streamer_is_given_one_position_at_a_time(batch: int, settings: dict[str, Any]) -> None:
    def taken(name: str, told: Any = ((),)) -> tuple[list[Any], list[list[int]]]:
        kept: list[Any] = []
        arguments = case(batch, streamer=Taking(kept), **settings)
        return kept, new_text(run(name, arguments, told), arguments)

    expected, text = taken("plain")
    assert expected[1:] == [*map(list, zip(*text, strict=True)), "end"]
    for drafter in DRAFTERS:
        assert taken(drafter, text) == (expected, text), drafter


def test_streamer_is_given_tokens_as_soon_as_every_row_has_them() -> None:
    seen: list[int] = []

    class Counting(Oracle):
        proposals = 0

        def propose(self, state: DecodeState) -> TokenTree:
            self.proposals += 1
            return super().propose(state)

    class Watching(Taking):
        def put(self, value: Tensor) -> None:  # noqa: ARG002
            seen.append(drafter.proposals)

    drafter = Counting()
    text = new_text(run("plain", case(3)), case(3))
    ask(specdec.speculate(tiny_llama(), drafter), case(3, streamer=Watching([])), text)
    assert seen[:2] == [0, 0], "the prompt, then the prefill's token before anything is drafted"
    assert len(set(seen)) > 3, "all at once is no stream"


def test_text_streamer_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for name in ("plain", *DRAFTERS):
        run(name, case(1) | {"streamer": TextStreamer(tokenizer())})
        printed.append(capsys.readouterr().out)
    assert printed[0].strip()
    assert printed == printed[:1] * len(printed)


@pytest.mark.parametrize("batch", [1, 3])
def test_num_return_sequences(batch: int) -> None:
    arguments = case(batch, do_sample=True, num_return_sequences=2)
    text = assert_same(arguments, reference="none")
    assert text.shape[0] == 2 * batch
    assert text[0].tolist() != text[1].tolist()


def assert_close(got: Any, expected: Any) -> None:
    """The same structure of tuples, the same shapes and dtypes, values within 1e-4."""
    if isinstance(expected, Tensor):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert not got.is_inference(), "what plain generate returns may be trained on"
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        return
    assert (type(got), len(got)) == (type(expected), len(expected))
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


def layers_of(cache: DynamicCache) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token_id": [27, 39]},
        {"repetition_penalty": 1.3, "eos_token_id": 5},
        {"encoder_no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_everything_a_dict_holds(drafter: str, batch: int, settings: dict[str, Any]) -> None:
    arguments = case(batch, **EVERYTHING, **settings)
    expected = run("plain", arguments)
    got = run(drafter, arguments, new_text(expected, arguments))
    assert isinstance(got, GenerateDecoderOnlyOutput)
    assert set(got.keys()) == {*expected.keys(), "speculation"}
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert_close(got.logits, expected.logits)
    assert_close(got.scores, expected.scores)
    assert_close(got.hidden_states, expected.hidden_states)
    assert_close(layers_of(got.past_key_values), layers_of(expected.past_key_values))


@pytest.mark.parametrize("wanted", sorted(EVERYTHING.keys() - {"return_dict_in_generate"}))
def test_only_what_was_asked_for_is_returned(wanted: str) -> None:
    arguments = case(2, return_dict_in_generate=True) | {wanted: True}
    assert set(run("oracle", arguments).keys()) == {*run("plain", arguments).keys(), "speculation"}


def test_scores_under_sampling_are_those_the_tokens_were_drawn_from() -> None:
    arguments = case(3, do_sample=True, top_k=4, return_dict_in_generate=True, output_scores=True, output_logits=True)
    expected = run("none", arguments, seed=2)
    got = run("oracle", arguments, new_text(expected, arguments), seed=2)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert_close(got.scores, expected.scores)
    drawn = torch.stack(got.scores, 1).gather(2, got.sequences[:, 9:, None])
    assert drawn.isfinite().all()
    assert all(bool((scores.isfinite().sum(-1) == 4).all()) for scores in got.scores)


@pytest.mark.parametrize("output", [{}, {"return_dict_in_generate": True}], ids=["ids", "dict"])
def test_statistics_of_the_call_and_of_all_calls(output: dict[str, Any]) -> None:
    chosen = specdec.speculate(tiny_llama(), "token_recycling")
    first = chosen.generate(**case(1), **output)
    emitted = chosen.speculation.emitted_tokens
    chosen.generate(**case(3), **output)
    assert (emitted, chosen.speculation.emitted_tokens) == (LENGTH, 4 * LENGTH)
    assert specdec.speculation_of(chosen).last.emitted_tokens == 3 * LENGTH
    assert chosen.speculation.rows == 4
    if output:
        assert first.speculation.emitted_tokens == LENGTH
        assert first.speculation.verifications == sum(first.speculation.accepted_lengths.values())


def converse(speakers: Sequence[Any], batch: int, form: str, config: Any) -> tuple[list[Any], DynamicCache]:
    """Three turns on one cache; the user says two tokens in between. Gives what each turn returned, and the cache.

    Args:
        speakers: the model that generates each turn.
        batch: number of rows.
        form: ``"full"`` ids, or ``"new"`` ones only.
        config: of the model.
    """
    inputs = prompt(batch)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, turns = DynamicCache(config=config), []
    for turn, speaker in enumerate(speakers):
        past = cache.get_seq_length()
        given = ids if form == "full" else ids[:, past:]
        arguments = {"input_ids": given, "attention_mask": mask, "past_key_values": cache, "max_new_tokens": 7}
        result = speaker.generate(**arguments | {"return_dict_in_generate": turn == 1})
        sequences = result.sequences if turn == 1 else result
        if turn == 1:
            assert result.past_key_values is cache
        text = sequences[:, given.shape[1] :]
        turns.append(text.tolist())
        said = torch.full((batch, 2), 4 + turn)
        ids = torch.cat([ids, text, said], dim=1)
        mask = torch.cat([mask, torch.ones_like(ids[:, mask.shape[1] :])], dim=1)
        assert cache.get_seq_length() == ids.shape[1] - 3
    return turns, cache


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "mistral"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A plain model and the same one speculating."""
    return zoo.build(request.param), specdec.speculate(zoo.build(request.param), "token_recycling")


@pytest.mark.parametrize("form", ["full", "new"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_conversation_on_one_cache(pair: tuple[Any, Any], batch: int, form: str) -> None:
    plain, speculating = pair
    expected, cache = converse([plain] * 3, batch, form, plain.config)
    for speakers in ([speculating] * 3, [plain, speculating, plain]):
        turns, extended = converse(speakers, batch, form, plain.config)
        assert turns == expected
        assert_close(layers_of(extended), layers_of(cache))


def test_a_returned_cache_starts_the_next_turn() -> None:
    def second_turn(name: str) -> list[Any]:
        first = run(name, case(3, eos_token_id=39, return_dict_in_generate=True))
        ids = torch.cat([first.sequences, torch.full((3, 1), 6)], dim=1)
        mask = torch.cat([prompt(3)["attention_mask"], torch.ones_like(ids[:, 9:])], dim=1)
        return (
            model(name)
            .generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=8)
            .tolist()
        )

    expected = second_turn("plain")
    for drafter in ("prompt_lookup", "token_recycling"):
        assert second_turn(drafter) == expected
