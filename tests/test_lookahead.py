"""Lookahead: the window as feed-only nodes against Jacobi steps run by hand, the pool, and what is counted and kept.

Shapes: B rows, N tokens of an n-gram, W columns of the window.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from drafters.lookahead import Lookahead, NgramPool, merge
from specdec.interfaces import DecodeState, History, Prefill, Verification
from specdec.tree import CANDIDATE, FEED_ONLY, PADDING, TokenTree
from test_contract import Trace, check_cache, check_statistics, generate, model_of, plain_text, prompts
from zoo import VOCAB


class SlowPool:
    """The pool by its definition: the whole history of additions, read backwards."""

    def __init__(self, per_token: int) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.per_token = per_token

    def after(self, token: int) -> list[tuple[int, ...]]:
        """The last ``per_token`` different n-grams that survived every addition before."""
        kept: list[tuple[int, ...]] = []
        for ngram in (n for n in self.seen if n[0] == token):
            kept = [ngram[1:], *(k for k in kept if k != ngram[1:])][: self.per_token]
        return kept


def test_the_pool_keeps_the_least_long_ago_of_each_token() -> None:
    source = random.Random(0)
    pool, slow = NgramPool(3, 4), SlowPool(4)
    for _ in range(400):
        ngram = tuple(source.randrange(4) for _ in range(3))
        pool.add([ngram])
        slow.seen.append(ngram)
        assert all(pool.after(token) == slow.after(token) for token in range(5))
    copy = NgramPool(3, 4)
    copy.add(map(tuple, pool.as_tensor().tolist()))
    assert all(copy.after(token) == pool.after(token) for token in range(5))
    pool.clear()
    assert pool.as_tensor().shape == (0, 3)


def test_candidates_share_their_beginnings() -> None:
    assert merge([(1, 2, 3), (1, 4, 3), (1, 2, 5), (6, 2, 3)]) == (
        [1, 2, 3, 4, 3, 5, 6, 2, 3],
        [0, 1, 2, 1, 4, 2, 0, 7, 8],
    )
    assert merge([]) == ([], [])


def state_of(rows: list[list[int]], finished: list[bool] | None = None) -> DecodeState:
    root, stopped = torch.tensor([row[-1] for row in rows]), finished or [False] * len(rows)
    generator = torch.Generator().manual_seed(0)
    return DecodeState(None, History(rows), root, [1] * len(rows), stopped, generator)  # type: ignore[arg-type]


def begun(state: DecodeState, **settings: Any) -> Lookahead:
    drafter = Lookahead(**settings)
    drafter.start(state, Prefill(torch.zeros(state.batch_size, 0, dtype=torch.int64), [0] * state.batch_size))
    return drafter


def test_the_tree_of_the_docstring() -> None:
    state = state_of([[7, 8, 9]])
    drafter = begun(state, window=3, ngram=4, candidates=2)
    drafter._windows[0] = np.array([[10, 11, 12], [20, 21, 22], [30, 31, 32]])
    drafter.pool.add([(9, 1, 2, 3), (9, 1, 5, 6), (8, 4, 4, 4)])
    tree = drafter.propose(state)
    tree.check()
    assert tree.token_ids.tolist() == [[9, 1, 5, 6, 2, 3, 10, 11, 12, 20, 21, 22, 30, 31, 32]]
    assert tree.parents.tolist() == [[0, 0, 1, 2, 1, 4, 0, 6, 7, 6, 7, 8, 9, 10, 11]]
    assert tree.role is not None
    assert tree.role.tolist() == [[CANDIDATE] * 6 + [FEED_ONLY] * 9]
    # Position of level l, column c: l + c + 1 behind the root.
    assert tree.topology.depths[0, 6:].tolist() == [1, 2, 3, 2, 3, 4, 3, 4, 5]
    # Each level sees level 0 up to its column, and its own column below it.
    seen = [tree.token_ids[0, tree.topology.ancestors[0, node]].tolist() for node in range(12, 15)]
    assert seen == [[9, 10, 20, 30], [9, 10, 11, 21, 31], [9, 10, 11, 12, 22, 32]]
    assert tree.num_nodes <= drafter.needs.max_nodes == 1 + 3 * (3 + 2)


def test_rows_that_have_stopped_run_no_window() -> None:
    state = state_of([[7, 8, 9], [1, 2, 3]], [False, True])
    tree = begun(state, window=2, ngram=3, candidates=1).propose(state)
    tree.check()
    assert tree.role is not None
    assert tree.role.tolist() == [[CANDIDATE] + [FEED_ONLY] * 4, [CANDIDATE] + [PADDING] * 4]


def verified(tree: TokenTree, following: dict[tuple[int, ...], int], vocab: int) -> Verification:
    """A pass of a target that knows what follows each path; 0 elsewhere."""
    logits = torch.zeros(1, tree.num_nodes, vocab)
    for node in range(tree.num_nodes):
        path = tuple(tree.token_ids[0, tree.topology.ancestors[0, node]].tolist())
        logits[0, node, following.get(path, 0)] = 1.0
    return Verification([[0]], [[40]], [False], [False], logits)


def test_levels_move_down_and_columns_close_ngrams() -> None:
    state = state_of([[7, 8, 9]])
    drafter = begun(state, window=2, ngram=3, candidates=4, pool_from_prompt=False, pool_from_output=False)
    drafter._windows[0] = np.array([[10, 11], [20, 21]])
    tree = drafter.propose(state)
    drafter.update(state, tree, verified(tree, {(9, 10, 20): 30, (9, 10, 11, 21): 31}, 50))
    assert drafter._windows[0].tolist() == [[20, 21], [30, 31]]
    assert drafter.pool.after(10) == [], "the filling of the window is no n-gram"
    tree = drafter.propose(state)
    drafter.update(state, tree, verified(tree, {(9, 20, 30): 41, (9, 20, 21, 31): 42}, 50))
    assert drafter._windows[0].tolist() == [[30, 31], [41, 42]]
    assert drafter.pool.as_tensor().tolist() == []
    tree = drafter.propose(state)
    drafter.update(state, tree, verified(tree, {(9, 30, 41): 43, (9, 30, 31, 42): 44}, 50))
    assert drafter.pool.as_tensor().tolist() == [[30, 41, 43], [31, 42, 44]]


def test_the_text_fills_the_pool_once() -> None:
    state = state_of([[1, 2, 3, 4]])
    drafter = begun(state, ngram=3, window=1)
    assert drafter.pool.as_tensor().tolist() == [[1, 2, 3], [2, 3, 4]]
    state.history.append(0, [5, 6])
    drafter._read_text(state, True)
    assert drafter.pool.as_tensor().tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert begun(state, ngram=3, window=1, pool_from_prompt=False).pool.as_tensor().tolist() == []
    assert begun(state_of([[1]]), ngram=3).pool.as_tensor().tolist() == [], "a text shorter than an n-gram"


@torch.no_grad()
def jacobi_by_hand(model: Any, text: list[int], window: np.ndarray) -> list[int]:
    """Successor of every column's last level, one plain pass per column."""
    successors = []
    for column in range(window.shape[1]):
        path = [*text, *window[0, : column + 1].tolist(), *window[1:, column].tolist()]
        successors.append(int(model(input_ids=torch.tensor([path])).logits[0, -1].argmax()))
    return successors


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("llama", 3), ("gemma3_text", 3)])
def test_the_window_computes_what_plain_passes_would(family: str, batch: int) -> None:
    """In the pass that verifies, over ragged rows, windows of attention shorter than the text."""
    model, inputs = model_of(family), prompts(batch)
    compared = 0

    class Watched(Lookahead):
        def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
            nonlocal compared
            before, running = self._windows.copy(), [not done for done in verification.was_finished]
            super().update(state, tree, verification)
            for row in range(state.batch_size):
                text = state.history.row(row).tolist()
                text = text[: len(text) - len(verification.tokens[row])]
                reach = state.emitted[row] - len(verification.tokens[row]) + self.window + self.levels
                if running[row] and reach < 24:  # beyond the budget, positions are clamped
                    assert self._windows[row, -1].tolist() == jacobi_by_hand(model, text, before[row])
                    compared += 1

    output, trace = generate(model, Watched(window=4, ngram=4, candidates=3), inputs)
    assert output.sequences.tolist() == plain_text(family, batch)
    assert compared > 4 * batch
    check_kept(model, inputs, output, trace)


def check_kept(model: Any, inputs: dict[str, torch.Tensor], output: Any, trace: Trace) -> None:
    """Feed-only nodes are computed, not drafted, and their K/V never stays."""
    check_cache(model, inputs, output.sequences, trace)
    check_statistics(output.speculation, trace)
    drafted = computed = 0
    for step in trace.steps:
        if step.tree is None:
            continue
        assert step.tree.role is not None
        for row, done in enumerate(step.verification.was_finished):
            if not done:
                drafted += int((step.tree.role[row, 1:] == CANDIDATE).sum())
                computed += step.tree.num_nodes
                assert not {int(r) for r in step.tree.role[row, step.verification.path[row]]} - {CANDIDATE}
    assert (output.speculation.drafted_nodes, output.speculation.computed_nodes) == (drafted, computed)
    assert computed > drafted + output.speculation.verifications


def test_what_was_pooled_serves_the_next_request() -> None:
    model, inputs = model_of("llama"), prompts(1)
    drafter = Lookahead()
    first, _ = generate(model, drafter, inputs)
    again, _ = generate(model, drafter, inputs)
    assert again.speculation.mean_accepted_tokens > max(first.speculation.mean_accepted_tokens, 3.0)
    saved = drafter.state_dict()
    drafter.reset()
    assert drafter.state_dict()["ngrams"].shape == (0, 5)
    drafter.load_state_dict(saved)
    assert torch.equal(drafter.state_dict()["ngrams"], saved["ngrams"])
    assert int(saved["ngrams"].max()) < VOCAB


def test_settings_and_states_that_do_not_fit() -> None:
    broken: list[dict[str, Any]] = [{"window": 0}, {"ngram": 1}, {"candidates": 0}]
    for settings in broken:
        with pytest.raises(ValueError, match="expected window >= 1, ngram >= 2 and candidates >= 1"):
            Lookahead(**settings)
    for wrong in ({}, {"ngrams": torch.zeros(3, 4, dtype=torch.int64)}, {"ngrams": torch.zeros(5)}):
        with pytest.raises(ValueError, match=r"expected ngrams of shape \(any, 5\)"):
            Lookahead().load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"torch.int64; got \(3, 5\), torch.float32"):
        Lookahead().load_state_dict({"ngrams": torch.full((3, 5), 1.5)})
    with pytest.raises(ValueError, match="ids from 0 on, got -1"):
        Lookahead().load_state_dict({"ngrams": torch.full((3, 5), -1)})


def test_a_pool_of_another_vocabulary_is_refused() -> None:
    model = model_of("llama")
    foreign, drafter = {"ngrams": torch.tensor([[1, 2, 3, 4, VOCAB + 5], [1, 2, 3, 4, 5]])}, Lookahead()
    specdec.speculate(model, drafter)
    try:
        drafter.load_state_dict({"ngrams": foreign["ngrams"][1:]})
        with pytest.raises(ValueError, match=rf"tokens below {VOCAB}, the target's vocabulary, got token {VOCAB + 5}"):
            drafter.load_state_dict(foreign)
        assert drafter.pool.after(1) == [(2, 3, 4, 5)], "and what was there stays"
        unbound = Lookahead()
        unbound.load_state_dict(foreign)
        with pytest.raises(ValueError, match=f"got token {VOCAB + 5}"):
            specdec.speculate(model, unbound)
    finally:
        specdec.restore(model)


def test_smallest_window() -> None:
    model, inputs = model_of("gpt2"), prompts(3)
    output, _ = generate(model, Lookahead(window=1, ngram=2, candidates=1), inputs)
    assert output.sequences.tolist() == plain_text("gpt2", 3)
