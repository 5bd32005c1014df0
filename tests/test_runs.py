"""Whether a later start of a training is the same run: sizes that the weights decide are said by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from drafters.hydra_heads import Hydra
from drafters.kangaroo import Kangaroo
from drafters.medusa import Medusa
from specdec.commands import _runs
from test_medusa import target_of
from zoo import build

LEARNERS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (Medusa, {}, {"num_heads": 4, "num_layers": 1, "own_head": False}),
    (Medusa, {"num_heads": 2, "own_head": True}, {"num_heads": 2, "num_layers": 1, "own_head": True}),
    (Hydra, {}, {"arch": "prefix-mlp", "num_heads": 4, "num_layers": 4, "own_head": False}),
    (Hydra, {"arch": "mlp"}, {"arch": "mlp", "num_heads": 4, "num_layers": 1, "own_head": False}),
    (Kangaroo, {}, {"exit_layer": 2}),
]


@pytest.mark.parametrize(("kind", "options", "sizes"), LEARNERS)
def test_a_drafter_says_what_its_weights_decide(kind: Any, options: dict[str, Any], sizes: dict[str, Any]) -> None:
    drafter = kind(path="new", **options)
    assert drafter.fit(target_of(build("llama"))) is None
    assert drafter.settled() == sizes
    assert sizes.keys() <= inspect.signature(kind).parameters.keys()


def config(drafter: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"texts_fingerprint": "of texts", "resume": True, "overwrite": False, "drafter": drafter} | options


def started(folder: Path, drafter: dict[str, Any]) -> None:
    """A run whose config says this of its drafter."""
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config(drafter)))
    (folder / "checkpoint-2").mkdir()


NOW = {"path": "new", "num_heads": 4, "tree": None}


def test_the_same_options_are_the_same_run(tmp_path: Path) -> None:
    started(tmp_path / "run", NOW)
    assert not _runs.claim(tmp_path / "run", config(NOW))


@pytest.mark.parametrize("said", [{"num_heads": 5}, {"num_heads": None}, {"path": None}])
def test_others_are_another_run(said: dict[str, Any], tmp_path: Path) -> None:
    started(tmp_path / "run", NOW | said)
    name = next(iter(said))
    with pytest.raises(ValueError, match=rf"another run \(drafter.{name}: {said[name]} -> {NOW[name]}\)"):
        _runs.claim(tmp_path / "run", config(NOW))
