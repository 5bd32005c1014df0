"""Tree files: what is written is read back, and what is not such a file is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from drafters.prompt_lookup import PromptLookup
from drafters.token_recycling import TokenRecycling
from specdec.templates import chain_paths
from specdec.tuning.choice import Costs, Profile, expect
from specdec.tuning.files import FixedTree, TreeFile, described

PATHS = [(0,), (1,), (0, 0)]
PROFILE = Profile([[0.5, 0.2], [0.4, 0.1]])
COSTS = Costs(np.array([1.0, 1.0, 1.5, 2.0]), 1.1, (0.1, 0.0, 0.2), (0.3, -0.01))


def tree_file(rate: float = 0.5) -> TreeFile:
    expected = {"chosen": described(expect(PATHS, PROFILE, COSTS)), "plain": {"tokens_per_second": rate}}
    return TreeFile("token_recycling", 48, PATHS, PROFILE, COSTS, {"target": "toy"}, expected, {"note": [[1], [2]]})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tree.yaml"
    tree_file().write(path)
    read = TreeFile.read(str(path))
    assert (read.drafter, read.vocab_size, read.paths) == ("token_recycling", 48, PATHS)
    assert read.costs.passes.tolist() == COSTS.passes.tolist()
    assert (read.costs.plain, read.costs.draft, read.costs.rest) == (1.1, COSTS.draft, COSTS.rest)
    assert read.profile == PROFILE
    assert read.expected["chosen"]["tokens_per_step"] == 1.9
    assert (read.made_on, read.more) == ({"target": "toy"}, {"note": [[1], [2]]})
    assert not read.plain_is_faster
    assert tree_file(rate=9.9).plain_is_faster
    assert str(path) in path.read_text(), "the head says how to use it"


def test_chains(tmp_path: Path) -> None:
    profile = Profile([[0.5, 0.1]] * 2, [0.9, 0.5], [1.0, 2.5])
    TreeFile("prompt_lookup", 48, chain_paths(2), profile, COSTS).write(tmp_path / "chain.yaml")
    assert TreeFile.read(tmp_path / "chain.yaml").profile == profile
    drafter = PromptLookup()
    assert FixedTree(str(tmp_path / "chain.yaml")).shape(drafter, 48) is drafter
    assert drafter.num_draft_tokens == 2
    assert drafter.needs.max_nodes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 1, got format=2"),
        ({"drafter": None}, "a name and a number"),
        ({"paths": [[0], [1, 0]]}, r"path \[1, 0\] needs \[1\]"),
        ({"paths": [[0], [0]]}, "twice"),
        ({"paths": []}, "expected paths such as"),
        ({"paths": [[0, "a"]]}, "expected paths such as"),
        ({"paths": "0"}, "paths to be a list"),
        ({"acceptance": [1]}, "acceptance to be a mapping"),
        ({"acceptance": {"rates": [["x"]]}}, "acceptance.rates to be numbers"),
        ({"seconds": {}}, "seconds.pass to be a list"),
        ({"seconds": {"pass": [2, 1], "draft": [0, 0, 0], "rest": [0, 0], "plain": 1}}, "never fall"),
        ({"seconds": {"pass": [1], "draft": [0], "rest": [0, 0], "plain": 1}}, "3 numbers in seconds.draft"),
    ],
)
def test_what_is_no_tree_file(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    tree_file().write(path)
    plain = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**plain, **change}))
    with pytest.raises(ValueError, match=f"tree.yaml: .*{message}"):
        TreeFile.read(path)


def test_what_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    for text, message in (
        ("[", "expected YAML"),
        ("just text", "a mapping.*got str"),
        ("{format: 1}", "lacks drafter"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            TreeFile.read(path)
    with pytest.raises(FileNotFoundError, match="specdec tune makes one"):
        TreeFile.read(tmp_path / "none.yaml")


def test_made_for_another(tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    tree_file().write(path)
    with pytest.raises(ValueError, match="made for drafter 'token_recycling', got 'prompt_lookup'"):
        FixedTree(str(path)).shape(PromptLookup(), 48)
    with pytest.raises(ValueError, match=r"vocabulary of 48 tokens \(toy\), the target has 50"):
        FixedTree(str(path)).shape(TokenRecycling(), 50)
    with pytest.raises(ValueError, match="asks for 2 successors"):
        FixedTree(str(path)).shape(TokenRecycling(num_successors=1, paths=[[0]]), 48)
    with pytest.raises(ValueError, match="by a file or by its paths"):
        FixedTree(str(path), [[0]])
    drafter = TokenRecycling()
    FixedTree(str(path)).shape(drafter, 48)
    assert drafter.tree_paths == PATHS
