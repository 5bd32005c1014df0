"""The comb, and drafting in place: where rows stop, what is left in the cache.

Shapes: B rows, N nodes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from drafters import self_drafting
from drafters.base import BaseDrafter
from drafters.early_exit import EarlyExit
from drafters.self_drafting import Draft, comb, comb_tree, draft_chain
from specdec.interfaces import DecodeState, Needs
from specdec.routing import Route
from specdec.target import Target
from specdec.tree import CANDIDATE, PADDING, TokenTree, root_only
from zoo import build, prompts

CPU = torch.device("cpu")


def test_the_comb() -> None:
    shape = comb((3, 1, 2), CPU)
    assert shape.topology.parents.tolist() == [[0, 0, 1, 2, 0, 0, 2]]
    assert shape.topology.depths.tolist() == [[0, 1, 2, 3, 1, 1, 3]] == [shape.depths.tolist()]
    assert shape.rank.tolist() == [[0, 0, 0, 0, 1, 2, 1]] == [shape.ranks.tolist()]
    assert comb((1, 1), CPU).topology.parents.tolist() == [[0, 0, 1]]
    assert shape.topology.ancestors.sum(-1).tolist() == [[1, 2, 3, 4, 2, 2, 4]], "mask rows sum to depth + 1"


@pytest.mark.parametrize("seed", range(8))
def test_any_comb_is_its_definition(seed: int) -> None:
    widths = torch.randint(1, 11, (3 * seed + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    depth, shape = len(widths), comb(tuple(widths), CPU)
    nodes = [(0, 0, 0), *((d, d + 1, 0) for d in range(depth))]  # parent, depth, rank
    nodes += [(d, d + 1, rank) for d, width in enumerate(widths) for rank in range(1, width)]
    parents, depths, ranks = map(list, zip(*nodes, strict=True))
    assert shape.topology.parents.tolist() == [parents]
    assert shape.topology.depths.tolist() == [depths] == [shape.depths.tolist()]
    assert shape.rank.tolist() == [ranks] == [shape.ranks.tolist()]
    assert shape.topology.max_depth == depth


def test_rows_that_stop_earlier_or_are_narrower_get_padding() -> None:
    ranked = [torch.tensor([[10, 11, 12], [20, 21, 22]]), torch.tensor([[13, 14, 15], [23, 24, 25]])]
    tree = comb_tree(torch.tensor([1, 2]), Draft(ranked, [], [2, 1], []), [[3, 2], [2, 3]], "comb")
    tree.check()
    assert tree.parents[0].tolist() == [0, 0, 1, 0, 0, 1]
    assert tree.token_ids.tolist() == [[1, 10, 13, 11, 12, 14], [2, 20, 23, 21, 22, 24]]
    assert tree.role is not None
    c, p = CANDIDATE, PADDING
    assert tree.role.tolist() == [[c] * 6, [c, c, p, c, p, p]]
    full = comb_tree(torch.tensor([1]), Draft([ranked[0][:1]], [], [1], []), [[2]], "comb")
    assert full.role is None
    assert full.token_ids.tolist() == [[1, 10, 11]]


def test_chains_that_every_row_stands_by() -> None:
    ranked = [torch.tensor([[10, 11], [20, 21]]), torch.tensor([[13, 14], [23, 24]])]
    tree = comb_tree(torch.tensor([1, 2]), Draft(ranked, [], [2, 2], []), [[1, 1], [1, 1]], "comb")
    tree.check()
    assert tree.topology is comb((1, 1), CPU).topology
    assert (tree.token_ids.tolist(), tree.role) == ([[1, 10, 13], [2, 20, 23]], None)
    assert tree.rank is not None
    assert tree.rank.tolist() == [[0, 0, 0]]
    short = comb_tree(torch.tensor([1, 2]), Draft(ranked, [], [2, 1], []), [[1, 1], [1, 1]], "comb")
    assert short.role is not None
    assert short.role.tolist() == [[CANDIDATE] * 3, [CANDIDATE, CANDIDATE, PADDING]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_host", [True, False])
def test_how_sure_the_draft_is(on_host: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The softmax of its best token, by numpy where the logits are on the host, by torch elsewhere."""
    monkeypatch.setattr(self_drafting, "on_host", lambda _: on_host)
    logits = (8 * torch.randn(3, 97, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[2, 5:] = -torch.inf
    best = logits.argmax(-1)
    tokens, sure = self_drafting._read(best, logits)
    assert tokens == best.tolist()
    assert sure == pytest.approx(logits.float().softmax(-1).amax(-1).tolist(), rel=1e-6)


class Watched(BaseDrafter):
    """Drafts with a route and keeps the drafts; proposes nothing, so that nothing but the draft touches the cache."""

    name = "watched"
    needs = Needs(max_nodes=8)

    def __init__(self, route: Route, **options: Any) -> None:
        self.route, self.options = route, options
        self.drafts: list[tuple[Draft, list[int], list[bool]]] = []

    def fit(self, target: Target) -> str | None:
        self.target = target
        return None

    def propose(self, state: DecodeState) -> TokenTree:
        assert state.context is not None
        cache, lengths = state.context.cache, state.context.lengths
        before = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
        draft = draft_chain(self.target, state, self.route, **self.options)
        self.drafts.append((draft, list(state.context.budgets), list(state.finished)))
        assert state.context.lengths == lengths
        for (keys, values), layer in zip(before, cache.layers, strict=True):
            for row, length in enumerate(lengths):
                assert torch.equal(layer.keys[row, :, :length], keys[row, :, :length])
                assert torch.equal(layer.values[row, :, :length], values[row, :, :length])
        return root_only(state.root)


def watch(family: str, route: Route, **options: Any) -> tuple[Watched, Any, list[list[int]]]:
    model = build(family)
    ids, mask = prompts(3)
    drafter = Watched(route, **{"steps": 4, **options})
    extra = {"eos_token_id": options.pop("eos")} if "eos" in options else {}
    drafter.options.pop("eos", None)
    specdec.speculate(model, drafter)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, **extra)
    specdec.restore(model)
    return drafter, model, text[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_draft_of_the_whole_model_is_the_text_and_leaves_the_cache_as_it_was(family: str) -> None:
    drafter, _, texts = watch(family, Route())
    assert len(drafter.drafts) == 8
    for done, (draft, budgets, _) in enumerate(drafter.drafts, start=1):
        assert draft.lengths == [min(4, left - 1) for left in budgets], "nothing is drafted beyond the budget"
        for step, ranked in enumerate(draft.ranked):
            assert ranked[:, 0].tolist() == [text[done + step] for text in texts]
        assert draft.confidence == []


def test_a_draft_stops_by_confidence_and_after_the_end_of_text() -> None:
    drafter, _, texts = watch("llama", Route(hi=2), threshold=0.4, width=3)
    seen = set()
    for draft, budgets, _ in drafter.drafts:
        assert len(draft.ranked) == len(draft.confidence) == max(draft.lengths)
        for row, length in enumerate(draft.lengths):
            sure = [p[row] for p in draft.confidence[:length]]
            assert all(p >= 0.4 for p in sure[:-1])
            assert length == min(4, budgets[row] - 1) or sure[-1] < 0.4, "the unsure token is still proposed"
            seen.add(length)
        assert all(ranked.shape == (3, 3) for ranked in draft.ranked)
    assert len(seen) > 2
    end = texts[0][4]
    drafter, _, _ = watch("llama", Route(), threshold=1e-9, eos=end)
    stopped = 0
    for draft, budgets, finished in drafter.drafts:
        for row, length in enumerate(draft.lengths):
            tokens = [ranked[row, 0].item() for ranked in draft.ranked[:length]]
            assert end not in tokens[:-1]
            stopped += tokens[-1:] == [end]
            full = 0 if finished[row] else min(4, budgets[row] - 1)
            assert length == full or tokens[-1:] == [end]
    assert stopped


def test_settings_are_checked() -> None:
    for wrong in ({"width": 0}, {"num_draft_tokens": 0}, {"confidence": 1.5}, {"exit_layer": 0}):
        with pytest.raises(ValueError, match="expected exit_layer >= 1"):
            EarlyExit(**wrong)
