"""Activations that are recomputed in the backward pass, where a lesson learns through the target."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import TrainingArguments

from specdec.target import Target


def asked(arguments: TrainingArguments) -> bool:
    """Whether activations are to be recomputed, by either of the names that transformers has for it."""
    return bool(arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False))


def allow(lesson: Any, target: Target) -> None:
    """Give a lesson that learns through the target the methods by which the Trainer has activations recomputed.

    Raises:
        ValueError: nothing of the target learns.
    """
    if not any(parameter.requires_grad for parameter in target.model.parameters()):
        raise ValueError(
            "trainer.gradient_checkpointing=true recomputes the layers through which gradients go, and the target's "
            "are frozen; it serves loss.joint=true, where the target learns too. Smaller batches "
            "(trainer.per_device_train_batch_size=, with trainer.gradient_accumulation_steps=) save memory here"
        )

    def enable(name: str, **options: Any) -> None:
        getattr(target.model, name)(**options)
        for layer in target.layers:
            # Transformers recomputes in training mode alone. The layers' parts stay in evaluation mode, so that the
            # backbone computes what it would compute; its adapters are in training mode already.
            layer.training = True

    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(target.model, name):
            setattr(lesson, name, partial(enable, name))
