"""Aggressive decoding: alignment against its definition, and what edits of the input cost.

Shapes: S tokens of the input, T of the output.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from drafters.aggressive import Aggressive
from specdec.interfaces import DecodeState, History, Prefill
from specdec.tree import CANDIDATE, PADDING


def brute_force(source: list[int], output: list[int], last: int, longest: int, shortest: int) -> int | None:
    """By the definition: the longest suffix first, then the next occurrence behind the last alignment."""
    for size in range(min(longest, len(output)), shortest - 1, -1):
        behind = [at + size for at in range(len(source) - size + 1) if source[at : at + size] == output[-size:]]
        if behind:
            return min((at for at in behind if at >= last), default=behind[-1])
    return None


@pytest.mark.parametrize(("longest", "shortest"), [(1, 1), (3, 1), (16, 1), (4, 2)])
@pytest.mark.parametrize("symbols", [2, 3, 8])
def test_alignment_equals_brute_force(symbols: int, longest: int, shortest: int) -> None:
    source = random.Random(symbols)
    drafter, found = Aggressive(max_match=longest, min_match=shortest), 0
    for _ in range(300):
        text = [source.randrange(symbols) for _ in range(source.randrange(15))]
        output = [source.randrange(symbols) for _ in range(source.randrange(1, 8))]
        last = source.randrange(len(text) + 1)
        expected = brute_force(text, output, last, longest, shortest)
        got = drafter.align(np.array(text, dtype=np.int64), np.array(output, dtype=np.int64), last)
        assert got == expected, (text, output, last)
        found += got is not None
    assert found > 20


def state_of(rows: list[list[int]], emitted: list[int], finished: list[bool] | None = None) -> DecodeState:
    root = torch.tensor([row[-1] for row in rows])
    stopped = finished or [False] * len(rows)
    return DecodeState(None, History(rows), root, emitted, stopped, torch.Generator())  # type: ignore[arg-type]


def begin(drafter: Aggressive, state: DecodeState) -> None:
    drafter.start(state, Prefill(torch.zeros(state.batch_size, 0, dtype=torch.int64), [0] * state.batch_size))


def passes_needed(drafter: Aggressive, source: list[int], output: list[int]) -> int:
    """Verifications until ``output`` is written, its first token given; every one emits at least one token."""
    state = state_of([[*source, output[0]]], [1])
    begin(drafter, state)
    passes = 0
    while state.emitted[0] < len(output):
        tree = drafter.propose(state)
        tree.check()
        chain, ahead = tree.token_ids[0, 1:].tolist(), output[state.emitted[0] :]
        right = 0
        while right < min(len(chain), len(ahead) - 1) and chain[right] == ahead[right]:
            right += 1
        state.history.append(0, ahead[: right + 1])
        state.emitted[0] += right + 1
        state.root = torch.tensor([ahead[right]])
        passes += 1
    return passes


INPUT = [source for source in range(10, 70)]


@pytest.mark.parametrize(
    ("output", "passes"),
    [
        (INPUT, 1),
        (INPUT[:20] + [99] + INPUT[21:], 3),  # one token replaced: to the edit, one plain step, the rest
        (INPUT[:20] + INPUT[25:], 2),  # five left out: the target's own token re-aligns at once
        (INPUT[:20] + [97, 98, 99] + INPUT[20:], 5),  # three put in: to them, three plain steps, the rest
        (INPUT[30:] + INPUT[:30], 2),  # halves exchanged
        ([99, 98, 97], 2),  # nothing of the input
    ],
)
def test_what_an_edit_costs(output: list[int], passes: int) -> None:
    assert passes_needed(Aggressive(num_draft_tokens=100), INPUT, output) == passes


def test_repeated_phrases_are_met_in_order() -> None:
    source = [1, 2, 7, 3, 1, 2, 8, 3, 1, 2, 9, 3]
    assert passes_needed(Aggressive(num_draft_tokens=100), source, source) == 1
    # The first phrase left out, then every suffix is ambiguous; the next occurrence is the right one.
    assert passes_needed(Aggressive(num_draft_tokens=100), [5, 6, *source], [5, *source]) == 2


def test_a_chain_per_row_of_the_prompt_alone() -> None:
    rows = [[5, 6, 7, 8, 5], [1, 2, 3, 9], [4, 4, 4, 4, 4], [1, 2, 1]]
    state = state_of(rows, [1, 1, 2, 1], [False, False, False, True])
    drafter = Aggressive(num_draft_tokens=2)
    begin(drafter, state)
    tree = drafter.propose(state)
    tree.check()
    assert tree.role is not None
    assert tree.role.tolist() == [[CANDIDATE] * 3, [CANDIDATE, PADDING, PADDING], [CANDIDATE, CANDIDATE, PADDING]] + [
        [CANDIDATE, PADDING, PADDING]
    ]
    assert tree.token_ids.where(tree.role == CANDIDATE, -1).tolist() == [
        [5, 6, 7],
        [9, -1, -1],
        [4, 4, -1],  # two of the input's three are aligned; what has been emitted is no input
        [1, -1, -1],
    ]
    assert tree.sources == ("aggressive",)
    assert drafter.needs.max_nodes == 3


def test_an_empty_prompt_offers_nothing() -> None:
    state = state_of([[3]], [1])
    drafter = Aggressive()
    begin(drafter, state)
    assert drafter.propose(state).num_nodes == 1


def test_settings_that_allow_no_draft() -> None:
    for settings in ((0, 3, 1), (1, 0, 0), (1, 2, 3), (5, 3, 0)):
        with pytest.raises(ValueError, match="expected num_draft_tokens"):
            Aggressive(*settings)
