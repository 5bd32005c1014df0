"""Every definition of a statistic on traces made by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from specdec.interfaces import Verification
from specdec.metrics import SpeculationStats, Throughput, emitted, ends_in_loop, median_repeat, shared
from specdec.tree import CANDIDATE, FEED_ONLY, PADDING, TokenTree, Topology, chain, root_only


def step(*rows: tuple[list[int], list[int]], before: str = "", after: str = "") -> Verification:
    """One verification: per row its path and its tokens; x marks the rows that have stopped before, and after it."""
    paths, tokens = [list(path) for path, _ in rows], [list(emitted) for _, emitted in rows]
    was_finished, finished = ([mark == "x" for mark in marks or "." * len(rows)] for marks in (before, after))
    return Verification(paths, tokens, finished, was_finished, torch.zeros(len(rows), 1, 1))


def record(stats: SpeculationStats, verification: Verification, tree: TokenTree | None = None) -> None:
    """As the loop does it: the verifier has counted what the tree offered."""
    if tree is not None:
        verification.offered = tree.candidates_by_depth().tolist()
    stats.record(verification, tree)


def chain_tree(length: int, batch: int = 1) -> TokenTree:
    return TokenTree(torch.arange(length + 1).expand(batch, -1), chain(length + 1))


def test_before_anything_happened() -> None:
    stats = SpeculationStats()
    assert stats.mean_accepted_tokens == 1.0
    assert stats.acceptance_by_depth == stats.conditional_acceptance_by_depth == []
    assert stats.tokens_per_second == stats.draft_share == 0.0


def test_plain_decoding_is_exactly_one() -> None:
    stats = SpeculationStats()
    record(stats, step(([0], [5]), ([0], [6])))
    for _ in range(7):
        record(stats, step(([0], [5]), ([0], [6])), root_only(torch.tensor([1, 1])))
    assert (stats.rows, stats.emitted_tokens, stats.verifications, stats.passes) == (2, 16, 14, 7)
    assert stats.mean_accepted_tokens == 1.0
    assert (stats.drafted_nodes, stats.computed_nodes) == (0, 14)
    assert stats.accepted_lengths == {0: 14}
    assert stats.acceptance_by_depth == []


def test_acceptance_by_depth() -> None:
    stats = SpeculationStats()
    record(stats, step(([0], [9])))
    record(stats, step(([0, 1, 2], [1, 2, 7])), chain_tree(3))  # accepts 2 of 3
    record(stats, step(([0], [7])), chain_tree(3))  # accepts 0 of 3
    record(stats, step(([0, 1], [1, 7])), chain_tree(1))  # accepts 1 of 1, and offers no more
    record(stats, step(([0, 1], [1, 7])), chain_tree(2))  # accepts 1 of 2
    assert stats.mean_accepted_tokens == (3 + 1 + 2 + 2) / 4
    assert stats.accepted_lengths == {0: 1, 1: 2, 2: 1}
    assert stats.offered_at_depth == {1: 4, 2: 3, 3: 2}
    assert stats.acceptance_by_depth == [3 / 4, 1 / 4, 0]
    # Depth 2 was offered and reached twice (not by the one that had nothing to offer), depth 3 once.
    assert stats.conditional_acceptance_by_depth == [3 / 4, 1 / 2, 0 / 1]


def test_conditional_acceptance_counts_only_who_was_offered_the_depth() -> None:
    stats = SpeculationStats()
    record(stats, step(([0, 1], [1, 7])), chain_tree(1))  # reached depth 2 without a candidate at it
    record(stats, step(([0], [7])), chain_tree(2))  # had one and never got there
    assert stats.reached_at_depth == {1: 2}
    assert stats.conditional_acceptance_by_depth == [0.5, 0.0]
    record(stats, step(([0, 1, 2], [1, 2, 7])), chain_tree(2))
    assert stats.conditional_acceptance_by_depth == [2 / 3, 1.0]
    assert stats.acceptance_by_depth == [2 / 3, 1 / 3]


def test_an_eos_inside_an_accepted_path_is_the_last_token() -> None:
    # The walk could have gone four deep; the second token was EOS, so two nodes stand and the EOS is the target's own.
    stats = SpeculationStats()
    record(stats, step(([0], [9])))
    record(stats, step(([0, 1], [1, 2]), after="x"), chain_tree(4))
    assert stats.emitted_tokens == 3
    assert stats.accepted_lengths == {1: 1}
    assert stats.mean_accepted_tokens == 2.0
    assert stats.acceptance_by_depth == [1, 0, 0, 0]


def test_rows_that_have_stopped_do_not_count() -> None:
    stats = SpeculationStats()
    record(stats, step(([0], [9]), ([0], [9]), ([0], [2]), after="..x"))
    tree = chain_tree(2, batch=3)
    record(stats, step(([0, 1], [1, 2]), ([0], [4]), ([], []), before="..x", after="x.x"), tree)
    record(stats, step(([], []), ([0, 1, 2], [1, 2, 3]), ([], []), before="x.x", after="xxx"), tree)
    assert (stats.rows, stats.emitted_tokens) == (3, 9)
    assert (stats.passes, stats.verifications) == (2, 3)
    assert stats.mean_accepted_tokens == (2 + 1 + 3) / 3
    assert stats.accepted_lengths == {0: 1, 1: 1, 2: 1}
    assert (stats.drafted_nodes, stats.computed_nodes) == (6, 9)


def test_only_candidates_are_drafted() -> None:
    role = torch.tensor([[CANDIDATE, CANDIDATE, FEED_ONLY, PADDING], [CANDIDATE, PADDING, PADDING, PADDING]])
    tree = TokenTree(torch.zeros(2, 4, dtype=torch.int64), Topology(torch.tensor([[0, 0, 1, 0]]), 2), role)
    stats = SpeculationStats()
    for _ in range(2):  # counts of trees with roles are not those of an earlier tree of the same shape
        record(stats, step(([0, 1], [1, 2]), ([0], [4])), tree)
    assert (stats.drafted_nodes, stats.computed_nodes) == (2, 16)
    assert stats.offered_at_depth == {1: 2}
    assert stats.acceptance_by_depth == [0.5]
    assert stats.conditional_acceptance_by_depth == [1.0], "row 1 was offered nothing"
    whole = TokenTree(torch.tensor([[0, 1, 2, 3]] * 2), tree.topology)
    record(stats, step(([0], [4]), ([0], [4])), whole)
    record(stats, step(([0], [4]), ([0], [4])), whole)
    assert stats.drafted_nodes == 2 + 4 * 3
    assert stats.offered_at_depth == {1: 6, 2: 4}


def test_rows_of_different_shapes() -> None:
    tree = TokenTree(torch.tensor([[0, 1, 2], [0, 1, 2]]), Topology(torch.tensor([[0, 0, 0], [0, 0, 1]]), 2))
    stats = SpeculationStats()
    record(stats, step(([0, 1], [1, 2]), ([0, 1, 2], [1, 2, 3])), tree)
    assert stats.offered_at_depth == {1: 2, 2: 1}
    assert stats.conditional_acceptance_by_depth == [1.0, 1.0]


def test_time() -> None:
    stats = SpeculationStats(rows=2, emitted_tokens=12)
    stats.seconds = {"prefill": 10.0, "draft": 1.0, "verify": 3.0, "commit": 1.0}
    assert stats.tokens_per_second == 2.0, "tokens and seconds after the prefill"
    assert stats.draft_share == 0.2
    with stats.phase("verify"):
        pass
    assert stats.seconds["verify"] > 3.0
    with pytest.raises(RuntimeError), stats.phase("commit"):
        raise RuntimeError
    assert stats.seconds["commit"] > 1.0, "counted although the block failed"


def test_two_requests_add_up() -> None:
    first, second = SpeculationStats("a"), SpeculationStats("a", lossless=False)
    for stats, accepted in ((first, 0), (second, 2)):
        record(stats, step(([0], [9])))
        record(stats, step((list(range(accepted + 1)), [1] * (accepted + 1))), chain_tree(2))
    first.seconds["draft"], second.seconds["draft"] = 1.0, 2.0
    first.peak_extra_bytes, second.peak_extra_bytes = 5, 3
    first += second
    assert (first.rows, first.emitted_tokens, first.verifications, first.passes) == (2, 6, 2, 2)
    assert (first.drafted_nodes, first.computed_nodes) == (4, 6)
    assert first.accepted_lengths == Counter({0: 1, 2: 1})
    assert first.mean_accepted_tokens == 2.0
    assert first.acceptance_by_depth == [0.5, 0.5]
    assert first.conditional_acceptance_by_depth == [0.5, 1.0]
    assert first.seconds["draft"] == 3.0
    assert first.peak_extra_bytes == 5, "peaks do not add up"
    assert not first.lossless
    assert second.accepted_lengths == {2: 1}, "what was added is left as it is"


def test_as_json() -> None:
    stats = SpeculationStats("x")
    record(stats, step(([0, 1], [1, 2])), chain_tree(2))
    plain = json.loads(json.dumps(stats.as_dict()))
    assert plain["drafter"] == "x"
    assert plain["accepted_lengths"] == {"1": 1}
    assert plain["acceptance_by_depth"] == [1.0, 0.0]


def test_a_recorded_trace_counts_as_the_steps_did() -> None:
    live, traced = SpeculationStats(), SpeculationStats()
    record(live, step(([0], [9])))
    taken = [([0, 1, 2], 3), ([0], 3), ([0, 1], 1)]
    for path, length in taken:
        record(live, step((path, [1] * len(path))), chain_tree(length))
    offered = [[1] * length for _, length in taken]
    traced.add_text(offered, [len(path) - 1 for path, _ in taken], [length + 1 for _, length in taken])
    assert traced == live
    assert traced.nodes_per_verification == (4 + 4 + 2) / 3


# What Spec-Bench's scripts get wrong, on texts made by hand.


def test_both_sides_of_a_speedup_are_counted_by_the_same_function() -> None:
    # Spec-Bench counts the baseline by tokenising its text again, special tokens gone, minus one per turn.
    plain = emitted([5, 6, 7, 2, 0, 0], {2})
    ours = emitted([5, 6, 7, 2], {2})
    assert plain == ours == [5, 6, 7, 2], "EOS is a token that had to be computed; padding is none"
    assert emitted([5, 6], {2}) == [5, 6]
    assert emitted([2, 2], {2, 3}) == [2]
    baseline, faster = Throughput(), Throughput()
    baseline.add(len(plain), 2.0, 0.5)
    faster.add(len(ours), 1.0, 0.5)
    assert faster.speedup(baseline) == 2.0, "the same text in half the time"
    assert (baseline.rate, baseline.decode_rate) == (2.0, 2.0)


def test_what_follows_an_eos_in_an_accepted_path_counts_nowhere() -> None:
    # Spec-Bench trims tokens and accepted lengths behind an EOS for some methods only.
    assert len(emitted([5, 2, 8, 9, 9], {2})) == 2


def test_a_failed_question_counts_for_nobody() -> None:
    # Spec-Bench stores the previous turn's steps, tokens and seconds again, and compares means over different sets.
    assert shared([{1, 2, 3}, {1, 3}, {3, 1}]) == {1, 3}
    assert shared([]) == set()
    baseline, other = Throughput(), Throughput()
    baseline.add(1, 1.0)
    with pytest.raises(ValueError, match="the same texts; got 0 and 1"):
        other.speedup(baseline)
    assert other.speedup(Throughput()) is None


def test_a_rate_is_a_ratio_of_sums() -> None:
    speed = Throughput()
    speed.add(100, 1.0)
    speed.add(1, 1.0)
    assert speed.rate == 50.5
    assert Throughput().rate == Throughput().decode_rate == 0.0


def test_the_median_repeat() -> None:
    assert median_repeat([10, 10, 10], [3.0, 1.0, 2.0]) == 2
    assert median_repeat([10, 10], [2.0, 1.0]) == 1, "the faster of two"
    assert median_repeat([10, 100, 10], [1.0, 1.0, 9.0]) == 0, "seconds per token, not seconds"


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([1, 2, 3] * 3, True),
        ([9, 9, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], True),
        ([1, 2, 3, 1, 2, 3], False),
        ([7] * 7, False),
        ([7] * 8, True),
        (list(range(60)) + list(range(48)), True),
        (list(range(60)) + list(range(47)), False),
        ([1, 2, 3] * 3 + [0], False),
        ([], False),
    ],
)
def test_looping_texts(ids: list[int], loops: bool) -> None:
    assert ends_in_loop(ids) == loops
