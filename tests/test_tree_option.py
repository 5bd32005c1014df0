"""Choosing a drafter's tree: in the library, on the command line, and between any two steps of a request."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_object

import specdec
from drafters.kangaroo import Kangaroo
from drafters.medusa import Medusa
from equality import VOCAB, tiny_llama
from specdec import cli
from specdec.adaptive import Adaptation, Adaptive
from specdec.build import build_drafter, choices, load, shaped_names, with_tree
from specdec.evaluation.records import read_summary
from specdec.interfaces import Shaped
from specdec.templates import chain_paths
from specdec.tuning.choice import Costs, Profile
from specdec.tuning.files import TreeFile
from zoo import build as build_family
from zoo import prompts, untrained

pytestmark = untrained("medusa", "hydra_heads", "kangaroo", "draft_model")

CHAINS: dict[str, dict[str, Any]] = {"draft_model": {"shape": "chain"}}  # by default it grows trees of its own
TREES = [[(0,)], [(0,), (1,), (0, 0), (1, 0), (0, 1)], [(0,), (0, 0), (0, 0, 0)], [(rank,) for rank in range(5)]]


def written(folder: Path, drafter: str = "token_recycling", vocab_size: int = VOCAB) -> str:
    costs = Costs(np.linspace(1.0, 2.0, 32), 1.0)
    path = folder / f"{drafter}.yaml"
    TreeFile(drafter, vocab_size, [(0,), (1,), (0, 0)], Profile([[0.4, 0.2]]), costs).write(path)
    return str(path)


def test_who_has_a_tree_to_choose() -> None:
    shaped = ["draft_model", "early_exit", "hydra_heads", "kangaroo", "medusa", "prompt_lookup", "suffix_automaton"]
    shaped += ["swift", "token_recycling"]
    assert shaped_names() == shaped
    for name in shaped:
        assert isinstance(build_drafter(name), Shaped)
    assert not isinstance(build_drafter("trigram"), Shaped)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", shaped_names())
def test_exchanged_between_any_two_steps(name: str, family: str) -> None:
    """Every step another tree: the text is the target's own, and every proposal has the shape it was told."""
    model = build_family(family)
    ids, mask = prompts(3)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    plain = model.generate(**arguments)
    specdec.speculate(model, name, **CHAINS.get(name, {}))
    handle = specdec.speculation_of(model)
    drafter: Any = handle.drafter
    trees = TREES if drafter.widest > 1 else [chain_paths(length) for length in (1, 5, 2, 3)]
    wanted: list[Any] = [drafter.tree_paths]

    def exchange(state: Any, step: Any) -> None:  # noqa: ARG001 - the observer's signature
        if step.tree is not None:
            if drafter.widest > 1:
                assert step.tree.num_nodes == 1 + len(wanted[-1])
            else:
                assert step.tree.topology.max_depth <= len(wanted[-1])
        wanted.append(trees[len(wanted) % len(trees)])
        drafter.reshape(wanted[-1])
        assert sorted(drafter.tree_paths) == sorted(wanted[-1])
        assert drafter.needs.max_nodes > len(wanted[-1])

    handle.observers.append(exchange)
    assert torch.equal(model.generate(**arguments), plain)
    assert len(wanted) > 8


@pytest.mark.parametrize("name", shaped_names())
def test_trees_that_cannot_be_filled(name: str) -> None:
    model = build_family("llama")
    specdec.speculate(model, name, **CHAINS.get(name, {}))
    drafter: Any = specdec.speculation_of(model).drafter
    before = drafter.tree_paths
    wrong: list[Any] = [[], [[1]], [[0], [0]]]
    if drafter.widest == 1:
        wrong.append([[0], [1]])
    if name != "hydra_heads" and drafter.widest > 1:
        wrong.append([[rank] for rank in range(drafter.widest + 1)])
    if drafter.deepest is not None:
        wrong.append(chain_paths(drafter.deepest + 1))
    for paths in wrong:
        with pytest.raises(ValueError, match="tree|chain|level|rank|successor|depth"):
            drafter.reshape(paths)
    assert drafter.tree_paths == before


def test_in_the_library(tmp_path: Path) -> None:
    model, path = tiny_llama(), written(tmp_path)
    specdec.speculate(model, tree=path)
    drafter: Any = specdec.speculation_of(model).drafter
    assert drafter.tree_paths == [(0,), (1,), (0, 0)]
    specdec.speculate(model, "medusa", tree=[[0], [0, 0]])
    assert specdec.speculation_of(model).drafter.needs.max_nodes == 3
    specdec.speculate(model, "medusa", tree="mc_sim_7b_63")
    assert specdec.speculation_of(model).drafter.needs.max_nodes == 64
    specdec.speculate(model, "medusa", tree="published")
    assert isinstance(specdec.speculation_of(model).drafter, Medusa)
    for tree in ("adaptive", Adaptation(interval=3)):
        specdec.speculate(model, tree=tree)
        assert isinstance(specdec.speculation_of(model).drafter, Adaptive)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"drafter": "medusa", "tree": path}, "made for drafter 'token_recycling', got 'medusa'"),
        ({"drafter": "trigram", "tree": path}, "'trigram' has no tree.*token_recycling"),
        ({"drafter": "lookahead", "tree": "adaptive"}, "'lookahead' has no tree.*prompt_lookup"),
        ({"drafter": "medusa", "tree": "oak"}, "unknown tree 'oak'; known: mc_sim_7b_63"),
        ({"drafter": "prompt_lookup", "tree": "oak"}, "takes no tree"),
        ({"drafter": "medusa", "tree": [[0] * depth for depth in range(1, 9)]}, "4 levels"),
    ]
    for options, message in mistakes:
        with pytest.raises(ValueError, match=message):
            specdec.speculate(model, **options)
    with pytest.raises(FileNotFoundError, match="no tree file at"):
        specdec.speculate(model, tree="nowhere.yaml")
    with pytest.raises(ValueError, match="needs a file"):
        with_tree(build_drafter("medusa"), "tuned", model)
    top_k = Kangaroo(shape="top_k", num_draft_tokens=3, width=2, num_nodes=8)
    with pytest.raises(ValueError, match="expected shape=chain"):
        with_tree(top_k, [[0]], model)


@pytest.mark.parametrize("name", choices("tree"))
def test_recipes_show_every_option_at_its_default(name: str) -> None:
    recipe = load("tree", name)
    options = inspect.signature(get_object(recipe.pop("_target_"))).parameters
    assert recipe.keys() == options.keys()
    assert all(value in (options[key].default, "???") for key, value in recipe.items())


def test_trees_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec"])
    path, output = written(tmp_path, vocab_size=4096), tmp_path / "run"
    few = ("limit=1", "max_new_tokens=4", "warmup=0", "threads=1", "baselines=[]", "states=[warm]")
    wanted = f"{{name: token_recycling, tree: {path}}},{{name: prompt_lookup, label: moving, tree: adaptive}}"
    cli.main(["evaluate", f"drafters=[{wanted},{{name: medusa, tree: mc_sim_7b_63}}]", f"output={output}", *few])
    made = read_summary(output / "summary.json")
    assert {"token_recycling", "moving", "medusa"} <= {row.drafter for row in made.rows}
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "drafters=[medusa]", "tree=adaptive", f"output={tmp_path / 'other'}", *few])


SMALL = ("threads=1", "max_new_tokens=12", "dtype=float32")


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["specdec"])
    path = written(tmp_path, vocab_size=4096)

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            cli.main(["generate", "prompt=def f(x):", *SMALL, *arguments])
        assert left.value.code == 2
        return capsys.readouterr().err

    for way in ([f"tree.path={path}"], ["tree=adaptive", f"tree.path={path}"]):
        cli.main(["generate", "prompt=def f(x):", "compare=true", *SMALL, *way])
        assert "identical texts: 1 of 1" in capsys.readouterr().out
    assert "tree.path=FILE" in said("tree=tuned")
    assert "made for a vocabulary of 48" in said(f"tree.path={written(tmp_path)}")
    assert "these have: draft_model, early_exit" in said("tree=adaptive", "drafter=trigram")
    assert "takes: path, interval" in said("tree=adaptive", "tree.speed=3")
    assert "expected interval" in said("tree=adaptive", "tree.interval=0")
