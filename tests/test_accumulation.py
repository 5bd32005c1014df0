"""Accumulated batches are one batch, however unevenly the wanted tokens lie in them; for the loss of every drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from drafters.hydra_heads import Hydra
from drafters.kangaroo import Kangaroo
from drafters.medusa import Medusa
from pupils import OPTIONS, Rows, target_of
from specdec import capabilities
from specdec.training.features import Frozen
from specdec.training.trainer import DrafterTrainer, training_arguments

ROWS = 6  # of which a step of plain SGD reads four, and the step that ends the epoch two
LESSONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "medusa": (lambda: Medusa(num_heads=3, path="new"), {}),
    "medusa, own heads": (lambda: Medusa(num_heads=3, own_head=True, path="new"), {"labels": "teacher"}),
    "medusa-2": (lambda: Medusa(num_heads=3, path="new"), {"joint": True, "rank": 4, "dropout": 0.0}),
    "medusa-2, distilled": (
        lambda: Medusa(num_heads=3, path="new"),
        {"joint": True, "distill": True, "rank": 4, "dropout": 0.0, "schedule": "linear"},
    ),
    "hydra": (lambda: Hydra(arch="mlp", num_heads=3, path="new"), {"labels": 0.5, "reconstruction": 0.7}),
    "hydra++": (lambda: Hydra(arch="prefix-mlp", num_heads=3, path="new"), {"dropout": 0.0}),
    "kangaroo": (lambda: Kangaroo(exit_layer=2, path="new"), {}),
}


def uneven(count: int = ROWS) -> Rows:
    """Rows in which all tokens are wanted, or few, or none."""
    rows = Rows(count)
    for index, (first, last) in enumerate([(0, 24), (18, 24), (2, 2), (0, 9), (0, 0), (3, 24)]):
        rows.items[index]["wanted"][:first] = False
        rows.items[index]["wanted"][last:] = False
    return rows


def moved(name: str, folder: Path, batch: int, accumulated: int) -> tuple[dict[str, Tensor], list[float]]:
    """How far each parameter goes by two steps of SGD, and the loss of each step."""
    make, options = LESSONS[name]
    target, drafter = target_of(model=zoo.build("llama")), make()
    capabilities.check(target)
    assert drafter.fit(target) is None
    lesson = drafter.lesson(target, **options)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in lesson.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    before = {key: tensor.detach().clone() for key, tensor in lesson.named_parameters()}
    settings = OPTIONS | {
        "max_steps": 2, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated,
        "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0,
        "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    made = training_arguments(settings, folder, 0, target, evaluates=False)
    trainer = DrafterTrainer(lesson, made, Frozen(target, lesson.taps), uneven())
    trainer.learn()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {key: tensor.detach() - before[key] for key, tensor in lesson.named_parameters()}, losses


@pytest.mark.parametrize("name", LESSONS)
def test_accumulated_batches_are_one(name: str, tmp_path: Path) -> None:
    if "medusa-2" in name:
        pytest.importorskip("peft")
    whole, losses = moved(name, tmp_path, 4, 1)
    parts, others = moved(name, tmp_path, 1, 4)
    assert others == pytest.approx(losses, rel=1e-5)
    for key, step in whole.items():
        largest = float(step.abs().max())
        torch.testing.assert_close(parts[key], step, rtol=1e-4, atol=1e-4 * largest)
        assert largest > 0, f"{key} has learnt nothing"


def test_a_mean_of_means_is_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, losses = moved("medusa", tmp_path, 4, 1)
    monkeypatch.setattr(DrafterTrainer, "_average", lambda *_: {})
    parts, others = moved("medusa", tmp_path, 1, 4)
    assert others != pytest.approx(losses, rel=0.1)
    assert any((parts[key] - step).abs().max() > 0.1 * step.abs().max() for key, step in whole.items())
