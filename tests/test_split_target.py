"""Drafters with weights beside a target that lies on two devices: each sits where the states that it reads are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import specdec
from drafters.base import device_of
from second_device import SECOND, SecondDevice, split
from specdec import capabilities
from specdec.target import Target
from zoo import HIDDEN, build, prompts, untrained

HOST = torch.device("cpu")
TREE = {"shape": "top_k", "num_draft_tokens": 3, "width": 3, "num_nodes": 9}
pytestmark = untrained("medusa", "hydra_heads", "kangaroo")

# Drafter, its options, its module, and where this must be if the layers from 2 on are on the second device.
CASES = [
    ("medusa", {}, "heads", SECOND),
    ("medusa", {"own_head": True}, "heads", SECOND),
    ("hydra_heads", {"arch": "mlp"}, "heads", SECOND),
    ("hydra_heads", {"arch": "prefix-mlp", "own_head": True}, "heads", SECOND),
    ("kangaroo", {"exit_layer": 2}, "adapter", HOST),
    ("kangaroo", {"exit_layer": 3}, "adapter", SECOND),
    ("kangaroo", {"exit_layer": 3, **TREE}, "adapter", SECOND),
]


@pytest.fixture(params=[True, False], ids=["head there", "head here"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A target whose upper layers are elsewhere. Whether it can branch is a question of values, which it has not."""

    def observed(target: Target) -> None:
        with target.router.observe():
            target.model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False)

    monkeypatch.setattr(capabilities, "check", observed)
    monkeypatch.setattr("drafters.kangaroo.why_not_split", lambda *_: None)
    return split(build("llama"), 2, request.param)


def test_the_second_device_is_one(model: Any) -> None:
    with SecondDevice(), pytest.raises(RuntimeError, match="on one device, got"):
        torch.nn.functional.linear(torch.ones(1, 32), model.model.layers[3].self_attn.q_proj.weight)
    with SecondDevice():
        assert device_of(Target(model), "final") == SECOND
        assert [device_of(Target(model), layer) for layer in (1, 2, 3, 4)] == [HOST, HOST, SECOND, SECOND]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("drafter", "options", "name", "place"), CASES)
def test_where_the_states_are(
    drafter: str, options: dict[str, Any], name: str, place: torch.device, batch: int, model: Any
) -> None:
    ids, mask = prompts(batch)
    with SecondDevice():
        specdec.speculate(model, drafter, **options)
        handle = specdec.speculation_of(model)
        module: nn.Module = getattr(handle.drafter, name)
        assert {tensor.device for tensor in (*module.parameters(), *module.buffers())} == {place}
        text = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert text.device == HOST
    assert text.shape == (batch, ids.shape[1] + 8)
    assert model.speculation.drafted_nodes > 0


LESSONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("medusa", {}, {"labels": "teacher"}),
    ("medusa", {"own_head": True}, {}),
    ("hydra_heads", {"arch": "mlp"}, {"labels": 1.0, "teacher": 1.0, "reconstruction": 1.0}),
    ("hydra_heads", {"arch": "prefix-mlp", "own_head": True}, {}),
    ("kangaroo", {"exit_layer": 3}, {}),
]


@pytest.mark.parametrize(("drafter", "options", "loss"), LESSONS)
def test_lessons(drafter: str, options: dict[str, Any], loss: dict[str, Any], model: Any) -> None:
    """A Trainer has lesson, batch and states on one device; of the target it asks what lies elsewhere."""
    model.requires_grad_(False)
    ids = torch.arange(2, 26).view(2, 12)
    positions, wanted = torch.arange(12).expand(2, -1), torch.ones(2, 12, dtype=torch.bool)
    with SecondDevice():
        specdec.speculate(model, drafter, **options)
        handle = specdec.speculation_of(model)
        specdec.restore(model)
        made: Any = handle.drafter.lesson(handle.target, **loss)  # type: ignore[attr-defined]
        module: nn.Module = getattr(handle.drafter, "adapter" if drafter == "kangaroo" else "heads")
        module.to_empty(device=HOST)
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        got = made(ids, positions, wanted, {tap: torch.zeros(2, 12, HIDDEN) for tap in made.taps})
        got["loss"].backward()
    assert {tensor.device for tensor in got.values()} == {HOST}
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_joint_training_wants_one_device(model: Any) -> None:
    with SecondDevice():
        specdec.speculate(model, "medusa")
        handle = specdec.speculation_of(model)
        specdec.restore(model)
        with pytest.raises(ValueError, match="expected a target on one, got one on cpu, meta: leave target.device_map"):
            handle.drafter.lesson(handle.target, joint=True)  # type: ignore[attr-defined]
