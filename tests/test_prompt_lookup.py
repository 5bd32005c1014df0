"""Prompt lookup against brute force: the longest suffix first, the most recent among equals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drafters.prompt_lookup import PromptLookup
from specdec.interfaces import DecodeState, History
from specdec.tree import CANDIDATE, PADDING


def brute_force(text: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """By the definition, over all lengths and all places."""
    for size in range(longest, shortest - 1, -1):
        if size > len(text):
            continue
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[len(text) - size :]:
                return text[start + size : start + size + count]
    return []


def lookup(text: list[int], count: int = 10, longest: int = 3, shortest: int = 1) -> list[int]:
    found = PromptLookup(count, longest, shortest).lookup(np.array(text, dtype=np.int64))
    assert found.dtype == np.int64
    return found.tolist()


@pytest.mark.parametrize("symbols", [2, 3, 8])
@pytest.mark.parametrize(("longest", "shortest"), [(1, 1), (2, 2), (3, 1), (3, 2), (5, 3), (9, 1)])
def test_equals_brute_force(symbols: int, longest: int, shortest: int) -> None:
    generator = np.random.default_rng(symbols * 10 + longest)
    found = 0
    for length in [*range(14), *range(20, 40)]:
        for _ in range(6):
            text = generator.integers(symbols, size=length).tolist()
            expected = brute_force(text, 4, longest, shortest)
            assert lookup(text, 4, longest, shortest) == expected, text
            found += bool(expected)
    assert found > 5


def test_longest_before_most_recent() -> None:
    #     the longest match is at the beginning, a shorter one is more recent
    assert lookup([1, 2, 3, 7, 8, 5, 3, 9, 1, 2, 3], count=2) == [7, 8]
    assert lookup([1, 2, 3, 7, 8, 5, 3, 9, 1, 2, 3], count=2, longest=1) == [9, 1]


def test_most_recent_among_equals() -> None:
    assert lookup([2, 3, 7, 2, 3, 8, 2, 3], count=1) == [8]


def test_overlapping_matches() -> None:
    assert lookup([4, 4, 4, 4], count=3) == [4]
    assert lookup([1, 2, 1, 2, 1, 2], count=9) == [1, 2], "the most recent one leaves the least to copy"


def test_nothing_to_copy() -> None:
    assert lookup([]) == lookup([3]) == lookup([1, 2, 3]) == []
    assert lookup([1, 2, 3, 1], shortest=2) == []


def test_settings_that_allow_no_draft() -> None:
    for settings in ((0, 3, 1), (1, 0, 0), (1, 2, 3), (5, 3, 0)):
        with pytest.raises(ValueError, match="expected num_draft_tokens"):
            PromptLookup(*settings)


def state_of(rows: list[list[int]], finished: list[bool]) -> DecodeState:
    root = torch.tensor([row[-1] for row in rows])
    return DecodeState(None, History(rows), root, [1] * len(rows), finished, torch.Generator())  # type: ignore[arg-type]


def test_proposes_a_chain_per_row() -> None:
    rows = [[5, 0, 6, 7, 5, 0], [1, 2, 1], [1, 2, 3], [5, 0, 6, 7, 5, 0]]
    tree = PromptLookup(3).propose(state_of(rows, [False, False, False, True]))
    tree.check()
    assert tree.parents.tolist() == [[0, 0, 1, 2]] * 4
    assert tree.role is not None
    assert tree.role.tolist() == [
        [CANDIDATE] * 4,
        [CANDIDATE] * 3 + [PADDING],
        [CANDIDATE] + [PADDING] * 3,
        [CANDIDATE] + [PADDING] * 3,  # a row that has stopped proposes nothing
    ]
    known = tree.token_ids.where(tree.role == CANDIDATE, -1).tolist()
    assert known == [[0, 6, 7, 5], [1, 2, 1, -1], [3, -1, -1, -1], [0, -1, -1, -1]]
    assert tree.sources == ("prompt_lookup",)


def test_proposes_the_root_alone_where_no_row_has_a_match() -> None:
    tree = PromptLookup().propose(state_of([[1, 2, 3], [4, 4]], [False, True]))
    assert tree.token_ids.tolist() == [[3], [4]]
    tree = PromptLookup(2).propose(state_of([[1, 2, 1, 2]], [False]))
    assert tree.role is None
    assert tree.token_ids.tolist() == [[2, 1, 2]]


def test_largest_tree_is_as_announced() -> None:
    drafter = PromptLookup(num_draft_tokens=4)
    tree = drafter.propose(state_of([[1, 2, 3, 4, 5, 6, 7, 1]], [False]))
    assert tree.num_nodes == drafter.needs.max_nodes == 5
