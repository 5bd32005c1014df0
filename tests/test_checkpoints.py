"""What anybody may have written into a drafter's files: settings of any kind, configs that are none, names of bases."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from specdec import checkpoints
from specdec.checkpoints import Checkpoint
from specdec.target import Target
from zoo import build

RATES = list[list[float]]


def holding(**config: Any) -> Checkpoint:
    return Checkpoint({}, config, "some/heads")


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        ("mlp", str, "mlp"),
        (False, bool, False),
        ({"a": 1}, dict, {"a": 1}),
        ([[1, 0.5], [0.25]], RATES, [[1.0, 0.5], [0.25]]),
    ],
)
def test_settings_of_every_kind(value: Any, kind: Any, expected: Any) -> None:
    found = holding(key=value).setting("key", kind)
    assert found == expected
    assert type(found) is type(expected)
    assert holding().setting("key", kind, expected) == expected
    assert holding(key=None).setting("key", kind, None) is None


@pytest.mark.parametrize(
    ("value", "kind", "what"),
    [
        ("2", int, "a whole number"),
        (True, int, "a whole number"),
        (2.0, int, "a whole number"),
        (None, int, "a whole number"),
        ("2", float, "a number"),
        (True, float, "a number"),
        (float("nan"), float, "a number"),
        (float("inf"), float, "a number"),
        (1, str, "a text"),
        (1, bool, "true or false"),
        ([1], dict, "an object"),
        ({"0": [0.5]}, RATES, "a list of lists of numbers"),
        ([0.5, 0.25], RATES, "a list of lists of numbers"),
        ([], RATES, "a list of lists of numbers, none of them empty"),
        ([[0.5], []], RATES, "a list of lists of numbers, none of them empty"),
        ([["0.5"]], RATES, "a list of lists of numbers"),
        ("[[0.5]]", RATES, "a list of lists of numbers"),
    ],
)
def test_settings_of_another_kind(value: Any, kind: Any, what: str) -> None:
    with pytest.raises(ValueError, match="some/heads: expected 'key' in its config.json to be ") as caught:
        holding(key=value).setting("key", kind)
    assert what in str(caught.value)
    assert str(caught.value).endswith(f"got {value!r}")


def test_settings_that_are_not_there_and_those_within_others() -> None:
    with pytest.raises(ValueError, match="some/heads: expected 'num_heads' in its config.json, a whole number; got no"):
        holding().setting("num_heads", int)
    nested = holding(prefix={"heads": 4}, rope=[1])
    assert nested.setting("prefix.heads", int) == 4
    assert nested.setting("prefix.size", int, 7) == 7
    with pytest.raises(ValueError, match="expected 'rope' in its config.json to be an object, got \\[1\\]"):
        nested.setting("rope.theta", float, 1e4)
    assert holding(heads=1).setting("heads", int, least=1) == 1
    with pytest.raises(ValueError, match="to be a whole number of at least 1, got 0"):
        holding(heads=0).setting("heads", int, least=1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("[1, 2]", "expected a JSON object, got list"), ('{"num_heads": 4', "expected a JSON object \\(")],
)
def test_a_config_that_is_none(content: str, expected: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json: {expected}"):
        checkpoints.read(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json: expected a (JSON object|weight_map)"):
        checkpoints.read(str(tmp_path))


def test_what_is_no_tensor_is_listed(tmp_path: Path) -> None:
    state = {"model": {"a": torch.zeros(2), "step": 3}, "optimizer": {"lr": 0.1}, "epoch": 1}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = checkpoints.read(str(tmp_path))
    assert found.keys == ["a"]
    assert not found.in_whole_model
    assert found.ignored == ["step (no tensor but int)", "optimizer (no tensor but dict)", "epoch (no tensor but int)"]


def test_a_folder_that_is_not_there_and_a_hub_that_gives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def unreachable(path: str, **_: Any) -> str:
        asked.append(path)
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "drafter").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint at run/draftr: run is a folder here, and holds drafter"):
        checkpoints.read("run/draftr")
    assert not asked
    said = r"org/heads is no folder here, and the hub did not give it \(ConnectionError: no route\); expected a folder"
    with pytest.raises(ValueError, match=said):
        checkpoints.read("org/heads")
    assert asked == ["org/heads"]


def test_the_base_by_its_weights() -> None:
    """The folder may be called anything; another training of the model is another model all the same."""
    model = build("llama")
    model.config._name_or_path = "org/base"
    saved = json.loads(json.dumps(checkpoints.saved_base(Target(model))))
    model.config._name_or_path = "somewhere/renamed"
    assert checkpoints.why_other_base(saved, Target(model)) is None
    other = build("llama", seed=1)
    other.config._name_or_path = "somewhere/renamed"
    assert "a checkpoint for somewhere/renamed; this one is for org/base" in str(
        checkpoints.why_other_base(saved, Target(other))
    )
    other.config._name_or_path = "elsewhere/base"
    assert checkpoints.why_other_base(saved, Target(other)) is None, "the same name, as before"


def target_called(name: str) -> Any:
    config = SimpleNamespace(_name_or_path=name)
    return SimpleNamespace(model=SimpleNamespace(config=config), hidden_size=8, vocab_size=16, num_layers=2)


def test_the_base_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model may lie in a hub's cache, in a folder of its own, or where one stands."""
    (tmp_path / "Base-7b").mkdir()
    monkeypatch.chdir(tmp_path / "Base-7b")
    sha = "0123456789abcdef0123456789abcdef01234567"
    ours = [
        "org/Base-7b", "/models/base-7b", "/models/base-7b//", ".", "./",
        f"/cache/models--org--Base-7b/snapshots/{sha}",
        f"/cache/models--org--Base-7b/snapshots/{sha}/", f"hub/models--Base-7b/snapshots/{sha}",
    ]  # fmt: skip
    for saved in ours:
        config = checkpoints.base_of(target_called(saved))
        for name in ours:
            assert checkpoints.why_other_base(config, target_called(name)) is None, (saved, name)
        other = checkpoints.why_other_base(config, target_called(f"/cache/models--org--Other-7b/snapshots/{sha}"))
        assert other is not None
        assert "a checkpoint for org/Other-7b; this one is for " in other
    assert checkpoints.base_of(target_called(ours[-3]))[checkpoints.BASE] == "org/Base-7b", "no folder of this machine"


def test_sizes_of_another_kind_are_another_base() -> None:
    config: dict[str, Any] = json.loads(json.dumps(checkpoints.base_of(target_called("org/base"))))
    config["base_hidden_size"] = "8"
    reason = checkpoints.why_other_base(config, target_called("org/base"))
    assert reason is not None
    assert "hidden_size='8', not 8" in reason
