"""Token Recycling: the published tree, what is learnt from where, and which of several equal tokens wins.

Shapes: B rows, N nodes, V vocabulary, k successors.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import specdec
from drafters import token_recycling
from drafters.token_recycling import TokenRecycling, published_paths, tree_paths
from equality import tiny_llama
from specdec.interfaces import DecodeState, History, Prefill, Verification
from specdec.target import Target
from specdec.templates import Template
from specdec.tree import CANDIDATE, FEED_ONLY, PADDING, TokenTree
from test_acceptance import depths_of, random_tree

VOCAB, K = 7, 3
PATHS = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]


class Bare:
    """As much of a target as ``fit`` looks at."""

    vocab_size = VOCAB
    device = torch.device("cpu")


def fitted(**options: Any) -> TokenRecycling:
    drafter = TokenRecycling(num_successors=K, paths=PATHS, **options)
    assert drafter.fit(cast(Target, Bare())) is None
    return drafter


def matrix_of(drafter: TokenRecycling) -> Tensor:
    assert drafter.matrix is not None
    return drafter.matrix


def state_of(roots: list[int]) -> DecodeState:
    batch, none = len(roots), [False] * len(roots)
    history = History([[root] for root in roots])
    return DecodeState(None, history, torch.tensor(roots), [1] * batch, none, torch.Generator())  # type: ignore[arg-type]


def test_the_published_tree() -> None:
    paths = published_paths()
    assert len(paths) == len(set(paths)) == 80
    assert [count for _, count in sorted(Counter(map(len, paths)).items())] == [8, 21, 25, 15, 8, 3]
    template = Template.from_paths(paths)
    assert (template.num_nodes, template.width, template.topology.max_depth) == (81, 8, 6)
    assert [path for path in paths if len(path) == 6] == [(0,) * 6, (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0)]


@pytest.mark.parametrize("count", range(1, 81))
def test_smaller_trees_are_closed_parts_of_it(count: int) -> None:
    paths = tree_paths(count)
    assert len(paths) == count
    assert set(paths) <= set(published_paths())
    Template.from_paths(paths)


def test_bad_settings() -> None:
    for count in (0, 81):
        with pytest.raises(ValueError, match="1 to 80"):
            TokenRecycling(num_nodes=count)
    with pytest.raises(ValueError, match="asks for 3 successors"):
        TokenRecycling(num_successors=2, paths=[[0], [1], [2]])
    assert "at least 8" in str(TokenRecycling().fit(cast(Target, Bare())))
    assert TokenRecycling().needs.max_nodes == 25


@pytest.mark.parametrize("by_numpy", [False, True])
def test_unseen_successors_are_padding(by_numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_recycling, "on_host", lambda _: by_numpy)
    drafter = fitted()
    tree = drafter.propose(state_of([0, 3]))
    tree.check()
    assert tree.role is not None
    assert tree.role.tolist() == [[CANDIDATE] + [PADDING] * 6] * 2
    matrix_of(drafter)[0] = torch.tensor([2, 0, 5])
    matrix_of(drafter)[2] = torch.tensor([0, 4, 6])
    tree = drafter.propose(state_of([0, 3]))
    tree.check()
    #            root 0  1  00 01 10 000
    assert tree.token_ids.tolist() == [[0, 2, 0, 0, 4, 2, 2], [3, 0, 0, 0, 0, 0, 0]]
    assert tree.role is not None
    assert tree.role.tolist() == [[CANDIDATE] * 7, [CANDIDATE] + [PADDING] * 6]
    assert tree.rank is not None
    assert tree.rank.tolist() == [[0, 0, 1, 0, 1, 0, 0]]


def test_prompt_rows_are_the_top_k_of_a_plain_pass() -> None:
    model = tiny_llama(vocab_size=24)
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(2, 24, (3, 12), generator=generator), torch.ones(3, 12, dtype=torch.int64)
    mask[1, :5] = mask[2, :3] = 0
    ids[mask == 0] = 1
    drafter = TokenRecycling(num_successors=K, paths=[[0]])
    specdec.speculate(model, drafter)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, eos_token_id=0)
    handle = specdec.speculation_of(model)
    assert handle.last.emitted_tokens > 3
    # The same, slowly: columns from left to right, the first row before later ones where they meet in a column.
    expected: dict[int, list[int]] = {}
    at: dict[int, int] = {}
    for row in range(3):
        padding = int((mask[row] == 0).sum())
        with torch.no_grad():
            logits = model(input_ids=ids[row : row + 1, padding:]).logits[0]
        for column in range(padding, 12):
            token = int(ids[row, column])
            if column > at.get(token, -1):
                at[token] = column
                expected[token] = logits[column - padding].topk(K).indices.tolist()
    drafter.reset()
    seen: list[Tensor] = []
    drafter.update = lambda *_: seen.append(matrix_of(drafter).clone())  # type: ignore[method-assign]
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)
    assert len(expected) > 10
    for token in range(24):
        assert seen[0][token].tolist() == expected.get(token, [-1] * K), token
    assert seen[0][24].tolist() == [-1] * K


def test_continued_prompts_write_the_columns_that_were_read() -> None:
    drafter = fitted()
    top_k = torch.tensor([[[4, 5, 6], [1, 2, 3]]])
    drafter.start(state_of([0]), Prefill(torch.tensor([[6, 2, 3, 0]]), [0], top_k=top_k))
    expected = torch.full((VOCAB + 1, K), -1)
    expected[3], expected[0] = top_k[0]
    assert torch.equal(matrix_of(drafter), expected)
    drafter.start(state_of([0]), Prefill(torch.zeros(1, 0, dtype=torch.int64), [0], top_k=top_k))
    assert torch.equal(matrix_of(drafter), expected), "a prompt of embeddings has no tokens to learn from"


def slow_update(before: Tensor, tree: TokenTree, verification: Verification) -> Tensor:
    """By the definition: for every token the worthiest of the nodes that hold it."""
    after = before.clone()
    for token in range(VOCAB):
        best: tuple[tuple[int, ...], list[int]] | None = None
        for row in range(tree.batch_size):
            depths, path = depths_of(tree.parents[row].tolist()), verification.path[row]
            for node in range(tree.num_nodes):
                padding = tree.role is not None and tree.role[row, node] == PADDING
                if padding or int(tree.token_ids[row, node]) != token:
                    continue
                if verification.finished[row] and depths[node] >= len(path):
                    continue  # beyond the stop
                key = (node not in path, depths[node], node, row)
                if best is None or key < best[0]:
                    best = (key, verification.logits[row, node].topk(K).indices.tolist())
        if best is not None:
            after[token] = torch.tensor(best[1])
    return after


@pytest.mark.parametrize("by_numpy", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_which_of_several_equal_tokens_wins(
    batch: int, shared: bool, by_numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_recycling, "on_host", lambda _: by_numpy)
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        tree = random_tree(seed, batch=batch, shared=shared, roles=seed % 3 > 0)
        paths, finished, before = [], [], []
        for row in range(batch):
            node = int(torch.randint(tree.num_nodes, (1,), generator=generator))
            path = [n for n in range(tree.num_nodes) if tree.topology.ancestors[row if not shared else 0, node, n]]
            stopped = int(torch.randint(4, (1,), generator=generator))
            before.append(stopped == 0 and batch > 1)
            finished.append(stopped <= 1)
            paths.append([] if before[-1] else path)
        logits = torch.randn(batch, tree.num_nodes, VOCAB, generator=generator)
        tokens = [[0] * len(path) for path in paths]
        verification = Verification(paths, tokens, finished, before, logits)
        drafter = fitted()
        start = torch.randint(VOCAB, (VOCAB + 1, K), generator=generator)
        start[VOCAB] = -1
        matrix_of(drafter).copy_(start)
        expected = slow_update(start, tree, verification)
        drafter.update(state_of([0] * batch), tree, verification)
        assert torch.equal(matrix_of(drafter), expected), seed


@pytest.mark.parametrize("by_numpy", [False, True])
def test_the_texts_of_a_batch_do_not_overwrite_each_other(by_numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_recycling, "on_host", lambda _: by_numpy)
    batch, learnt = 3, torch.randint(VOCAB, (VOCAB + 1, K), generator=torch.Generator().manual_seed(0))
    learnt[VOCAB] = -1
    together, alone = fitted(), [fitted() for _ in range(batch)]
    for drafter, rows in ((together, batch), *((each, 1) for each in alone)):
        matrix_of(drafter).copy_(learnt)
        empty = Prefill(torch.zeros(rows, 0, dtype=torch.int64), [0] * rows, top_k=torch.zeros(rows, 0, K).long())
        drafter.start(state_of([0] * rows), empty)
    roots = [1, 1, 2]
    for seed in range(6):
        logits = torch.randn(batch, 7, VOCAB, generator=torch.Generator().manual_seed(seed))
        tree = together.propose(state_of(roots))
        for row, drafter in enumerate(alone):
            own = drafter.propose(state_of([roots[row]]))
            assert tree.token_ids[row].tolist() == own.token_ids[0].tolist(), (seed, row)
            drafter.update(
                state_of([0]), own, Verification([[0, 1]], [[0, 0]], [False], [False], logits[row : row + 1])
            )
        walks = Verification([[0, 1]] * batch, [[0, 0]] * batch, [False] * batch, [False] * batch, logits)
        together.update(state_of([0] * batch), tree, walks)
    assert not torch.equal(matrix_of(alone[0]), matrix_of(alone[1])), "this would pass with a shared matrix"
    shared = matrix_of(together).clone()
    together.finish(state_of([0] * batch))
    assert together.propose(state_of([1])).token_ids[0, 1] == shared[1, 0], "what all learnt is left"


def test_feed_only_nodes_teach_and_padding_does_not() -> None:
    role = torch.tensor([[CANDIDATE, FEED_ONLY, PADDING]])
    tree = TokenTree(torch.tensor([[1, 2, 3]]), Template.from_paths([[0], [1]]).topology, role)
    drafter, logits = fitted(), torch.arange(VOCAB).float().expand(1, 3, -1)
    drafter.update(state_of([1]), tree, Verification([[0]], [[6]], [False], [False], logits))
    known = matrix_of(drafter)[:, 0] >= 0
    assert known.nonzero().flatten().tolist() == [1, 2]


def test_save_load_reset(tmp_path: Path) -> None:
    drafter = fitted()
    matrix_of(drafter)[2] = torch.tensor([3, 4, 0])
    saved = drafter.state_dict()
    torch.save(saved, tmp_path / "matrix.pt")
    kept = matrix_of(drafter).clone()
    drafter.reset()
    assert bool((matrix_of(drafter) == -1).all())
    for other in (fitted(path=str(tmp_path / "matrix.pt")), fitted()):
        other.load_state_dict(saved)
        assert torch.equal(matrix_of(other), kept)
        other.reset()
        assert torch.equal(saved["matrix"], kept), "what was saved is a copy"
    assert torch.equal(matrix_of(fitted(path=str(tmp_path / "matrix.pt"))), kept)


def test_state_before_there_is_a_target(tmp_path: Path) -> None:
    drafter = fitted()
    matrix_of(drafter)[2] = torch.tensor([3, 4, 0])
    torch.save(drafter.state_dict(), tmp_path / "matrix.pt")
    unbound = TokenRecycling(num_successors=K, paths=[[0]], path=str(tmp_path / "matrix.pt"))
    assert torch.equal(unbound.state_dict()["matrix"], matrix_of(drafter))
    unbound.reset()
    assert unbound.state_dict() == {}
    unbound.fit(cast(Target, Bare()))
    assert bool((matrix_of(unbound) == -1).all())


def test_refuses_a_matrix_of_another_shape() -> None:
    saved = fitted().state_dict()
    for wrong in ({}, {"matrix": saved["matrix"][:-1]}, {"matrix": saved["matrix"][:, :2]}):
        with pytest.raises(ValueError, match=r"\(8, 3\)"):
            fitted().load_state_dict(wrong)
    late = TokenRecycling(num_successors=2, paths=[[0]])
    late.load_state_dict(saved)
    with pytest.raises(ValueError, match="expected a matrix"):
        late.fit(cast(Target, Bare()))
