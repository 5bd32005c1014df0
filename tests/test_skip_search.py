"""Skip sets and the search for one: formulas, files, the three limits, and scoring that leaves no trace.

Shapes: B rows, W scored tokens, L layers.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from drafters.base import BaseDrafter
from drafters.skip_search import SkipSearch, SkipSet, load_skip_set, matchness, unified, uniform
from specdec.interfaces import DecodeState, Needs
from specdec.routing import FULL, Route
from specdec.target import Target
from specdec.tree import TokenTree, root_only
from zoo import build, prompts


def kept(skip: SkipSet, layers: int) -> list[int]:
    assert skip.attention == skip.mlp
    return sorted(set(range(layers)) - skip.attention)


# Worked out by hand from K = floor(L / s) and the interval floor(L / (K - 1)).
@pytest.mark.parametrize(
    ("layers", "speedup", "expected"),
    [
        (30, 2, [*range(0, 27, 2), 29]),
        (30, 3, [*range(0, 25, 3), 29]),
        (30, 5, [0, 6, 12, 18, 24, 29]),
        (30, 10, [0, 15, 29]),
        (32, 2, [*range(0, 29, 2), 31]),
        (8, 1, [*range(8)]),
        (4, 2, [0, 3]),
    ],
)
def test_unified_layer_skipping(layers: int, speedup: float, expected: list[int]) -> None:
    assert kept(unified(layers, speedup), layers) == expected


@pytest.mark.parametrize("speedup", [0.5, 5, 0])
def test_unified_layer_skipping_keeps_two_layers_at_least(speedup: float) -> None:
    with pytest.raises(ValueError, match="1 <= speedup <= 4 for 8 layers"):
        unified(8, speedup)


def test_the_uniform_set_is_every_odd_layer_but_the_last() -> None:
    assert kept(uniform(8), 8) == [0, 2, 4, 6, 7]
    assert kept(uniform(3), 3) == [0, 2]


def write(folder: Path, content: Any) -> Path:
    path = folder / "sets.json"
    path.write_text(json.dumps(content))
    return path


def test_published_files_load(tmp_path: Path) -> None:
    one = {"attention": [3, 5], "mlp": [6]}
    published = {"llama-13b_cnndm": one, "codellama-13b_humaneval": {"attention": [7], "mlp": []}}
    path = write(tmp_path, published)
    assert load_skip_set(path, "llama-13b_cnndm") == SkipSet.of([3, 5], [6])
    assert load_skip_set(path, "codellama-13b_humaneval").as_dict() == {"attention": [7], "mlp": []}
    with pytest.raises(ValueError, match="llama-13b_cnndm, codellama-13b_humaneval; got key=None"):
        load_skip_set(path)
    assert (
        load_skip_set(write(tmp_path, one)) == load_skip_set(write(tmp_path, {"any": one})) == SkipSet.of([3, 5], [6])
    )


@pytest.mark.parametrize("content", [[1], {"model": [1]}, {"model": {"attention": [1]}}])
def test_other_files_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ValueError, match="no file of skip sets; expected"):
        load_skip_set(write(tmp_path, content))


@pytest.mark.parametrize("layer", [-1, 1.5, "2", True])
def test_layer_numbers_are_checked(layer: Any) -> None:
    with pytest.raises(ValueError, match="lists layer numbers"):
        SkipSet.of([0, layer], [])


def bound(layers: int = 32, **options: Any) -> SkipSearch:
    search = SkipSearch(**options)
    search.bind(layers, uniform(layers))
    return search


@pytest.mark.parametrize(("layers", "count"), [(28, 23), (32, 27), (36, 30), (40, 34), (48, 41), (80, 70), (4, 1)])
def test_every_candidate_skips_that_many_and_keeps_both_ends(layers: int, count: int) -> None:
    search = bound(layers, bayesian_interval=3)
    sets = []
    for score in (0.1, 0.2, 0.3, 0.4):
        candidate = search.propose()
        search.tell(float(score))
        assert len(candidate.attention) + len(candidate.mlp) == count
        assert not (candidate.attention | candidate.mlp) & {0, layers - 1}
        sets.append(candidate)
    assert len(set(sets)) > 1
    assert search.best == sets[-1]


def test_candidates_keep_or_restore_the_best() -> None:
    search = bound(bayesian_interval=0)
    assert search.best == uniform(32)
    search.rebase(0.3)
    found: list[float] = []
    best, scores = search.best, [0.2, 0.4, 0.4, 0.1, 0.6]
    for score in scores:
        candidate = search.propose()
        search.tell(score)
        best = candidate if score in (0.4, 0.6) and score > max([0.3, *found], default=0) else best
        found.append(score)
        assert search.best == best
        assert search.best_score == max(0.3, *found)
    assert search.tolerance == 0


def test_the_three_limits() -> None:
    search = bound(max_score=0.9, bayesian_interval=0)
    for score, done in ((0.9, False), (0.91, True)):
        search.propose()
        search.tell(score)
        assert search.done is done
    search = bound(max_tolerance=3, bayesian_interval=0)
    search.rebase(0.5)
    for worse in range(5):
        assert search.done is (worse > 3)
        search.propose()
        search.tell(0.5)
    search = bound(max_iterations=3, bayesian_interval=0)
    for told in range(5):
        assert search.done is (told > 3)
        search.propose()
        search.tell(0.1 * told)
    assert bound(ratio=0.0).done, "nothing to choose"


def test_seeded_runs_repeat_and_saved_ones_go_on() -> None:
    def go(search: SkipSearch, rounds: int) -> list[SkipSet]:
        found = []
        for _ in range(rounds):
            found.append(search.propose())
            # A score that depends on the set alone.
            search.tell(sum(found[-1].mlp) / 500)
        return found

    settings: dict[str, Any] = {"bayesian_interval": 3}
    search = bound(12, **settings)
    whole = go(search, 8)
    assert whole == go(bound(12, **settings), 8)
    assert whole != go(bound(12, seed=1, **settings), 8)
    first, second = bound(12, **settings), bound(12, **settings)
    go(first, 4)
    saved = first.state_dict()
    go(first, 2)
    second.load_state_dict(saved)
    assert go(second, 4) == whole[4:]
    search.reset()
    assert search.best == uniform(12)
    assert whole == go(search, 8)
    with pytest.raises(ValueError, match=r"20 sub-layers \(12 layers\), got one over 60"):
        second.load_state_dict(bound(32).state_dict())


def test_bayesian_optimisation_finds_what_helps() -> None:
    """Where the score is the number of feed-forward parts in the set, its proposals beat random ones."""
    search, scores = bound(12, bayesian_interval=5, max_score=2.0), {True: list[float](), False: list[float]()}
    for index in range(1, 61):
        candidate = search.propose()
        score = len(candidate.mlp) / search.count
        search.tell(score)
        scores[index % 5 == 0].append(score)
    assert np.mean(scores[True]) > np.mean(scores[False]) + 0.15


def test_sets_that_come_up_again_are_no_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    search = bound(4, bayesian_interval=10, max_score=2.0)  # four sets in all
    for score in range(20):
        search.propose()
        search.tell(score / 20)
    assert search.iteration == 20
    assert not any(capsys.readouterr()), "the library keeps quiet"


def test_a_missing_library_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    search = SkipSearch()
    with pytest.warns(UserWarning, match=r"bayesian-optimization.*specdec-hf\[swift\]"):
        search.settle()
    assert search.bayesian_interval == 0
    search.settle()
    SkipSearch(bayesian_interval=0).settle()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention": [77]}, "layers 0 to 11, got one that names 77"),
        ({"mlp": [-1]}, "layer numbers from 0 on; got -1"),
        ({"iteration": 1.5}, "iteration: expected a whole number"),
        ({"best_score": None}, "best_score: expected a number"),
        ({"points": torch.zeros(20)}, "points: expected 2 dimensions"),
        ({"scores": [1.0]}, "scores: expected 1 dimension"),
        ({"scores": torch.zeros(9, dtype=torch.float64)}, "a score per point, got 1 and 9"),
        ({"generator": torch.zeros(3)}, r"generator: expected the state of one, got \(3,\), torch.float32"),
        ({"generator": 7}, "generator: expected the state of one, got 7"),
    ],
)
def test_a_broken_state_changes_nothing(wrong: dict[str, Any], message: str) -> None:
    search = bound(12)
    search.propose()
    search.tell(0.5)
    before = search.state_dict()
    other = bound(12, seed=7)
    other.propose()
    other.tell(0.75)
    with pytest.raises(ValueError, match=message):
        search.load_state_dict({**other.state_dict(), **wrong})
    after = search.state_dict()
    assert all(torch.equal(after[k], v) if isinstance(v, torch.Tensor) else after[k] == v for k, v in before.items())


@pytest.mark.parametrize("wrong", [{"ratio": 1.1}, {"context_window": 0}, {"bayesian_interval": -1}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= ratio <= 1"):
        SkipSearch(**wrong)


class Scorer(BaseDrafter):
    """Scores routes on the first W tokens of every row at each step, and looks at what that left behind."""

    name = "scorer"
    needs = Needs(max_nodes=2)
    window = 5

    def __init__(self, routes: list[Route]) -> None:
        self.routes = routes
        self.scores: list[list[float]] = []

    def fit(self, target: Target) -> str | None:
        self.target = target
        return None

    def propose(self, state: DecodeState) -> TokenTree:
        context, emitted = state.context, state.policy.outputs
        assert context is not None
        ready = [len(text) > self.window for text in emitted]
        if any(ready):
            before = [(x.keys.clone(), x.values.clone()) for x in context.cache.layers]
            lengths, draws = list(context.lengths), state.generator.get_state()
            texts = [text[: self.window + 1] if r else [] for text, r in zip(emitted, ready, strict=True)]
            self.scores.append([matchness(self.target, context, texts, route) for route in self.routes])
            assert context.lengths == lengths
            assert torch.equal(state.generator.get_state(), draws)
            for (keys, values), layer in zip(before, context.cache.layers, strict=True):
                for row, length in enumerate(lengths):
                    assert torch.equal(layer.keys[row, :, :length], keys[row, :, :length])
                    assert torch.equal(layer.values[row, :, :length], values[row, :, :length])
        return root_only(state.root)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_scoring_is_exact_and_leaves_the_request_as_it_was(family: str) -> None:
    """Row 1 stops early, with fewer tokens than are scored."""
    model = build(family)
    ids, mask = prompts(3)
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**inputs)[:, ids.shape[1] :].tolist()
    end = next(t for t in plain[1][:5] if t not in plain[0] + plain[2])
    expected = model.generate(**inputs, eos_token_id=end).tolist()
    skip = Route(skip_attention=frozenset({2}), skip_mlp=frozenset({1, 2}))
    scorer = Scorer([FULL, skip])
    specdec.speculate(model, scorer)
    assert model.generate(**inputs, eos_token_id=end).tolist() == expected
    specdec.restore(model)
    assert len(scorer.scores) > 3
    assert {full for full, _ in scorer.scores} == {1.0}, "the whole model agrees with its own text"
    # The same for the skipping draft, slowly: its own pass over the emitted tokens behind the whole model's prompt.
    rows, hits = [0, 2], []
    target = Target(model)
    for row in rows:
        prompt = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        text = torch.tensor([plain[row][: Scorer.window + 1]])
        with torch.no_grad(), target.router.observe():
            cache = model(input_ids=prompt, use_cache=True).past_key_values
        with torch.no_grad(), target.router.route(skip):
            logits = model(input_ids=text[:, :-1], past_key_values=cache, use_cache=True).logits
        hits += (logits.argmax(-1) == text[:, 1:])[0].tolist()
    assert scorer.scores[-1][1] == pytest.approx(np.mean(hits))
    assert len({score for _, score in scorer.scores}) == 1, "always the same text"
