"""Drafters whose right and wrong proposals are known: exact counts, and the same text whatever they propose."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from equality import tiny_llama
from scripted import Always, Drawn, Empty, Hidden, Random, Right, RightAmongDecoys, Scripted, Wrong, expected_lengths
from specdec.metrics import SpeculationStats
from specdec.tree import FEED_ONLY, PADDING
from zoo import prompts as random_prompts

VOCAB = 12
DEPTH = 4
NEW_TOKENS = 23
PAD = 1


@cache
def model_of() -> Any:
    return tiny_llama(vocab_size=VOCAB, pad_token_id=PAD)


@cache
def speculating() -> Any:
    """A second model of the same weights; its drafters are exchanged from call to call, as all fit it."""
    return specdec.speculate(tiny_llama(vocab_size=VOCAB, pad_token_id=PAD), Empty(VOCAB))


def prompts(batch: int) -> dict[str, Tensor]:
    """Random ids and mask, left-padded."""
    ids, mask = random_prompts(batch, VOCAB, seed=0)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def plain(batch: int, **settings: Any) -> Tensor:
    text: Tensor = model_of().generate(**prompts(batch), max_new_tokens=NEW_TOKENS, **settings)
    return text


def texts_of(sequences: Tensor, eos: int | None = None) -> list[list[int]]:
    """The new tokens of each row, up to and with its first EOS."""
    rows = [row[prompts(sequences.shape[0])["input_ids"].shape[1] :] for row in sequences.tolist()]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def run(drafter: Scripted, batch: int, **settings: Any) -> tuple[Tensor, SpeculationStats]:
    model = speculating()
    specdec.speculation_of(model).drafter = drafter
    output = model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, **settings)
    return output.sequences, output.speculation


def counted(texts: list[list[int]], depth: int) -> Counter[int]:
    """Accepted lengths of a drafter that is always right: whole blocks, and what is left at the end of each row."""
    lengths: Counter[int] = Counter()
    for text in texts:
        blocks, rest = divmod(len(text) - 1, depth + 1)
        lengths[depth] += blocks
        lengths[rest - 1] += rest > 0
    return +lengths


@pytest.mark.parametrize("kind", [Right, RightAmongDecoys, Drawn])
@pytest.mark.parametrize("depth", [1, 2, 4, 30])
@pytest.mark.parametrize("batch", [1, 3])
def test_always_right(kind: type[Scripted], depth: int, batch: int) -> None:
    expected = plain(batch)
    got, stats = run(kind(VOCAB, depth, texts_of(expected)), batch)
    assert got.tolist() == expected.tolist()
    verifications = -(-(NEW_TOKENS - 1) // (depth + 1))
    assert stats.passes == verifications
    assert stats.verifications == batch * verifications
    assert stats.accepted_lengths == counted(texts_of(expected), depth)
    assert stats.mean_accepted_tokens == (NEW_TOKENS - 1) / verifications


@pytest.mark.parametrize("kind", [Right, RightAmongDecoys])
@pytest.mark.parametrize("position", [4, 5, 6, 7])
def test_always_right_with_eos_inside_a_block(kind: type[Scripted], position: int) -> None:
    free = texts_of(plain(3))
    eos = free[0][position]
    expected = plain(3, eos_token_id=eos)
    texts = texts_of(expected, eos)
    got, stats = run(kind(VOCAB, DEPTH, texts), 3, eos_token_id=eos)
    assert got.tolist() == expected.tolist()
    assert stats.accepted_lengths == counted(texts, DEPTH)
    assert stats.emitted_tokens == sum(map(len, texts)), "padding after a stop is not emitted"
    assert stats.passes == max(-(-(len(text) - 1) // (DEPTH + 1)) for text in texts)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [Wrong, Empty, Hidden])
def test_never_right(kind: type[Scripted], batch: int) -> None:
    expected = plain(batch)
    for options in ({"role": FEED_ONLY}, {"role": PADDING}) if kind is Hidden else ({},):
        got, stats = run(kind(VOCAB, DEPTH, texts_of(expected), **options), batch)
        assert got.tolist() == expected.tolist()
        assert stats.accepted_lengths == {0: batch * (NEW_TOKENS - 1)}
        assert stats.passes == NEW_TOKENS - 1
        assert stats.mean_accepted_tokens == 1.0
        assert (stats.drafted_nodes == 0) == (kind is Empty)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 1.3}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("batch", [1, 3])
def test_random_trees_change_nothing(settings: dict[str, Any], batch: int) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        expected, _ = run(Empty(VOCAB), batch, **settings)
        torch.manual_seed(seed)
        got, stats = run(Random(VOCAB), batch, **settings)
        assert got.tolist() == expected.tolist()
        assert stats.drafted_nodes > stats.verifications
        assert batch == 1 or stats.mean_accepted_tokens > 1.0, "random tokens are right now and then"
        if not settings:
            assert got.tolist() == plain(batch).tolist()


@pytest.mark.parametrize("position", [0, 3, 6])
def test_full_of_eos(position: int) -> None:
    eos = texts_of(plain(1))[0][position]
    expected = plain(3, eos_token_id=eos)
    texts = texts_of(expected, eos)
    got, stats = run(Always(VOCAB, DEPTH, token=eos), 3, eos_token_id=eos)
    assert got.tolist() == expected.tolist()
    # An EOS ends its row as the target's own token, not as an accepted one.
    assert stats.accepted_lengths == +Counter({0: sum(len(text) - 1 for text in texts)})
    assert stats.mean_accepted_tokens == 1.0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("token", range(0, VOCAB, 2))
def test_full_of_one_token(token: int, batch: int) -> None:
    expected = plain(batch)
    got, stats = run(Always(VOCAB, DEPTH, token=token), batch)
    assert got.tolist() == expected.tolist()
    proposals = [[token] * DEPTH] * NEW_TOKENS
    lengths = Counter(length for text in texts_of(expected) for length in expected_lengths(text, proposals))
    assert stats.accepted_lengths == lengths


def test_padding_that_stores_token_0_is_not_token_0() -> None:
    # Zeros as candidates are accepted where the text has runs of zeros, zeros as padding never.
    for settings in ({}, {"sequence_bias": [[[0], 2.0]]}):  # one pass over all nodes, and the lazy walk
        texts = texts_of(plain(3, **settings))
        zeros = [[0] * NEW_TOKENS] * 3
        lengths = Counter(n for text in texts for n in expected_lengths(text, [[0] * DEPTH] * NEW_TOKENS))
        assert max(lengths) > 0, "the text has zeros in it"
        got, stats = run(Always(VOCAB, DEPTH), 3, **settings)
        assert texts_of(got) == texts
        assert stats.accepted_lengths == lengths
        got, stats = run(Hidden(VOCAB, DEPTH, zeros, role=PADDING), 3, **settings)
        assert texts_of(got) == texts
        assert stats.mean_accepted_tokens == 1.0
