"""SWIFT: what is skipped is not computed, no draft survives in the cache, the search changes speed and never text.

Shapes: B rows, N nodes, L layers.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
import test_contract as contract
from drafters.self_drafting import Draft
from drafters.skip_search import SkipSearch, SkipSet, uniform
from drafters.swift import Swift, _widths
from equality import tiny_llama
from specdec.build import build_drafter
from specdec.interfaces import DecodeState, Tunable
from specdec.tree import TokenTree
from sublayers import ATTENTION, MLP, Call, counting
from zoo import build, prompts

LAYERS = 4
EVERYTHING = {"attention": [*range(LAYERS)], "mlp": [*range(LAYERS)]}
NOTHING: dict[str, list[int]] = {"attention": [], "mlp": []}
SURE = 1e-9  # a confidence that every token has


def text_of(model: Any, batch: int = 1, new_tokens: int = 14, **options: Any) -> list[list[int]]:
    ids, mask = prompts(batch)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **settings).tolist()


class Traced(Swift):
    """Marks in the list of calls where a proposal begins and where it is complete."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[Any] = []
        self.trees: list[TokenTree] = []
        self.sets: list[SkipSet] = []

    def propose(self, state: DecodeState) -> TokenTree:
        self.calls.append("propose")
        tree = super().propose(state)
        self.calls.append("verify")
        self.trees.append(tree)
        self.sets.append(self.skip_set)
        return tree


@pytest.mark.parametrize("skip", [{"attention": [2], "mlp": [1, 2]}, EVERYTHING, NOTHING, "uniform", {"speedup": 2}])
def test_skipped_parts_are_not_computed(skip: Any) -> None:
    model = build("llama")
    with counting(model) as calls:
        drafter = Traced(skip=skip, num_draft_tokens=3, confidence=SURE, max_width=3)
        specdec.speculate(model, drafter)
        calls.clear()
        drafter.calls = calls
        text_of(model, 3)
    gone = drafter.skip_set
    kept = [(n, ATTENTION) for n in range(LAYERS) if n not in gone.attention]
    kept += [(n, MLP) for n in range(LAYERS) if n not in gone.mlp]
    marks = [i for i, call in enumerate(calls) if call in ("propose", "verify")]
    sections = [calls[a + 1 : b] for a, b in zip(marks, [*marks[1:], len(calls)], strict=True)]
    for tree, draft, verify in zip(drafter.trees, sections[::2], sections[1::2], strict=True):
        steps = tree.topology.max_depth
        assert Counter(draft) == Counter(Call(*part, 1) for part in kept for _ in range(steps))
        assert Counter(verify) == Counter(
            Call(n, part, tree.num_nodes) for n in range(LAYERS) for part in (ATTENTION, MLP)
        )
    assert max(tree.topology.max_depth for tree in drafter.trees) == 3


@pytest.mark.parametrize("k", [1, 5])
def test_a_draft_that_skips_nothing_is_always_right(k: int) -> None:
    model = build("llama")
    new_tokens = 1 + 3 * (k + 1)
    expected = text_of(model, new_tokens=new_tokens)
    specdec.speculate(model, Swift(skip=NOTHING, num_draft_tokens=k, confidence=SURE, max_width=1))
    assert text_of(model, new_tokens=new_tokens) == expected
    assert model.speculation.passes == 3
    assert model.speculation.mean_accepted_tokens == k + 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("skip", [EVERYTHING, {"attention": [0, 2], "mlp": [3]}, {"speedup": 1.4}])
def test_text_does_not_depend_on_the_set(family: str, skip: Any) -> None:
    model = build(family)
    expected = text_of(model, 3)
    specdec.speculate(model, Swift(skip=skip, num_draft_tokens=4, confidence=0.5, max_width=4))
    assert text_of(model, 3) == expected


def test_confidence_one_drafts_one_token_per_round() -> None:
    model = build("llama")
    drafter = Traced(confidence=1.0)
    specdec.speculate(model, drafter)
    text_of(model)
    assert {tree.topology.max_depth for tree in drafter.trees[:-1]} == {1}
    assert {tree.num_nodes for tree in drafter.trees[:-1]} <= {1 + width for width in (3, 5, 8, 10)}


def test_the_surer_the_draft_the_fewer_siblings() -> None:
    draft = Draft([], [[0.96, 0.95], [0.8, 0.81], [0.5, 0.0]], [3, 3], [])
    assert _widths(draft, 10, greedy=True) == [[3, 5], [8, 5], [10, 10]]
    assert _widths(draft, 10, greedy=False) == [[1, 3], [5, 3], [10, 10]]
    assert _widths(draft, 2, greedy=True) == [[2, 2]] * 3


def searching(**options: Any) -> Traced:
    settings: dict[str, Any] = {"ratio": 0.5, "context_window": 4, "bayesian_interval": 3, "max_score": 1.0, **options}
    return Traced(search=SkipSearch(**settings), min_new_tokens=1, num_draft_tokens=3, confidence=0.2)


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("gemma3_text", 3), ("gpt2", 3)])
def test_searching_changes_neither_text_nor_cache(family: str, batch: int) -> None:
    model, inputs = contract.model_of(family), contract.prompts(batch)
    drafter = searching()
    output, trace = contract.generate(model, drafter, inputs)
    assert output.sequences.tolist() == contract.plain_text(family, batch)
    contract.check_cache(model, inputs, output.sequences, trace)
    assert drafter.search is not None
    assert drafter.search.iteration >= 3, "a Bayesian proposal among them"
    settings: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "seed": 1}
    reference, _ = contract.generate(model, "none", inputs, **settings)
    sampled, _ = contract.generate(model, drafter, inputs, **settings)
    assert sampled.sequences.tolist() == reference.sequences.tolist()


def test_the_search_lives_across_requests_and_drafts_use_its_best() -> None:
    model, drafter = build("llama"), searching(bayesian_interval=0)
    specdec.speculate(model, drafter)
    search = drafter.search
    assert search is not None
    text_of(model, new_tokens=16)
    told = search.iteration
    assert told > 0
    assert drafter.skip_set == search.best
    found = search.best_score
    assert (search.best == uniform(LAYERS)) == (search.tolerance == told), "the first set was scored, too"
    text_of(model, new_tokens=16)
    assert search.iteration > told
    assert search.best_score >= found, "the same text: no candidate has made it worse"
    saved = drafter.state_dict()
    drafter.reset()
    assert drafter.skip_set == uniform(LAYERS)
    assert search.iteration == 0
    drafter.load_state_dict(saved)
    assert drafter.skip_set == SkipSet.of(saved["attention"], saved["mlp"])
    drafter.load_state_dict(searching().state_dict())
    assert search.iteration == 0, "a drafter that has met no target has learnt nothing"


def test_the_search_ends_for_good_and_frees_the_decoding() -> None:
    model, drafter = build("llama"), searching(max_iterations=2, max_tolerance=100)
    specdec.speculate(model, drafter)
    assert drafter.search is not None
    for _ in range(2):
        text_of(model, new_tokens=20)
        assert drafter.search.iteration == 3


def test_scored_texts_cost_one_pass_each() -> None:
    model = build("llama")
    with counting(model) as calls:
        drafter = searching(ratio=1.0, bayesian_interval=0)
        specdec.speculate(model, drafter)
        calls.clear()
        text_of(model, new_tokens=16)
    assert drafter.search is not None
    # Only layers 0 and 3 stay, so what layer 0 reads four nodes at a time is a scored text (or a tree of that size).
    trees = sum(tree.num_nodes == 4 for tree in drafter.trees)
    scored = sum(call == Call(0, MLP, 4) for call in calls) - trees
    assert scored == drafter.search.iteration + 1, "each candidate, and the set in use"


def test_short_requests_and_given_sets_are_not_searched() -> None:
    model = build("llama")
    for options, new_tokens in (({"min_new_tokens": 17}, 16), ({"skip": {"speedup": 2}}, 16), ({"search": False}, 16)):
        settings: dict[str, Any] = {"search": SkipSearch(context_window=2), "min_new_tokens": 1, **options}
        drafter = Swift(**settings)
        specdec.speculate(model, drafter)
        first = drafter.skip_set
        text_of(model, new_tokens=new_tokens)
        assert drafter.skip_set == first
        assert drafter.search is None or drafter.search.iteration == 0


def test_without_the_library_candidates_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    model, find = build("llama"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bayes_opt" else find(name))
    expected = text_of(model)
    drafter = searching(bayesian_interval=1)
    with pytest.warns(UserWarning, match=r"pip install 'specdec-hf\[swift\]'"):
        specdec.speculate(model, drafter)
    assert text_of(model) == expected
    assert drafter.search is not None
    assert drafter.search.iteration > 1
    specdec.speculate(model, drafter)  # warned of once
    specdec.speculate(model, "swift", skip={"speedup": 2})  # a given set is not searched from


def test_sets_from_files(tmp_path: Path) -> None:
    path = tmp_path / "sets.json"
    sets = {"tiny_code": {"attention": [1], "mlp": [2]}, "other": {"attention": [9], "mlp": []}}
    path.write_text(json.dumps(sets))
    model = build("llama")
    drafter = build_drafter("swift", skip={"path": str(path), "key": "tiny_code"})
    specdec.speculate(model, drafter)
    assert isinstance(drafter, Swift)
    assert drafter.skip_set == SkipSet.of([1], [2])
    with pytest.raises(ValueError, match=r"a skip set for 4 layers \(0 to 3\), got one that names layer 9"):
        specdec.speculate(model, "swift", skip={"path": str(path), "key": "other"})


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"confidence": 0.0}, {"num_draft_tokens": 0}, {"max_width": 0}, {"search_interval": 0}):
        with pytest.raises(ValueError, match="expected num_draft_tokens"):
            Swift(**wrong)
    unknown: list[dict[str, Any]] = [{"speed": 2}, {"attention": []}, {}]
    for skip in unknown:
        with pytest.raises(ValueError, match='expected skip="uniform"'):
            Swift(skip=skip)
    with pytest.raises(ValueError, match="at least 3 layers.*got 2"):
        specdec.speculate(tiny_llama(), "swift")
    model = build("llama")
    with pytest.raises(ValueError, match="1 <= speedup <= 2 for 4 layers"):
        specdec.speculate(model, "swift", skip={"speedup": 3})
    monkeypatch.setattr("specdec.routing._MLP_NAMES", ("perceptron",))
    with pytest.raises(ValueError, match=r"parts can be skipped; layer 0 .* none of the feed-forward modules"):
        specdec.speculate(model, "swift")


def test_tuning_searches_over_all_texts() -> None:
    model, drafter = build("llama"), searching(ratio=0.75, max_iterations=11)
    specdec.speculate(model, drafter)
    assert isinstance(drafter, Tunable)
    told = []
    ids = [torch.randint(2, 97, (1, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def generate(prompt: torch.Tensor) -> Any:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)

    target = specdec.speculation_of(model).target
    found = drafter.tune(target, ids, generate, lambda done, of, what: told.append((done, of, what)))
    assert found["texts"] == 3
    assert found["candidates"] == 12
    assert found["matchness"] >= found["matchness_of_first"]
    assert {"attention": found["attention"], "mlp": found["mlp"]} == drafter.skip_set.as_dict()
    # Scored over three texts of four tokens.
    assert 12 * found["matchness"] == pytest.approx(round(12 * found["matchness"]))
    assert told[0] == (1, 3, "calibration texts")
    assert told[-1][:2] == (12, 11)
    with pytest.raises(ValueError, match="no text reached 5 tokens"):
        drafter.tune(target, ids, lambda prompt: model.generate(prompt, max_new_tokens=3), lambda *_: None)
    specdec.speculate(model, "swift", search=False)
    other = specdec.speculation_of(model).drafter
    assert isinstance(other, Swift)
    with pytest.raises(ValueError, match="search=false"):
        other.tune(target, ids, generate, lambda *_: None)
