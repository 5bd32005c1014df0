"""``specdec train``, of which every process leaves word how it was cut up, in ``watched-RANK.json`` where it runs.

torchrun --nproc-per-node 2 -m watched train ...
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec import cli
from specdec.training import objectives
from specdec.training.trainer import DrafterTrainer


def learn_and_tell(trainer: Any, checkpoint: Path | None = None) -> dict[str, float]:
    """``DrafterTrainer.learn``, and what it was like within."""
    device, precisions, target, lesson = trainer.args.device.type, set(), trainer.frozen.target, trainer.model

    def note(losses: Tensor, counts: Tensor, steps: Sequence[int]) -> Tensor:
        precisions.add(str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "plain")
        made: Tensor = _shared(losses, counts, steps)
        return made

    vars(objectives)["shared"] = note  # which every lesson comes to within its own forward
    metrics, engine = _learn(trainer, checkpoint), trainer.model_wrapped
    word = {
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
        "lesson": sorted({type(parameter).__name__ for parameter in lesson.parameters()}),
        "in_parts": sorted({hasattr(parameter, "ds_id") for parameter in lesson.parameters()}),
        "weights": sorted({str(parameter.dtype) for parameter in lesson.parameters()}),
        "precisions": sorted(precisions),
        "layers": sorted({type(part).__name__ for layer in target.layers for part in layer.parameters()}),
        "head": sorted({type(part).__name__ for part in target.router.head.parameters()}),
    }
    Path(f"watched-{trainer.args.process_index}.json").write_text(json.dumps(word))
    return metrics


_learn: Any = DrafterTrainer.learn
_shared: Any = objectives.shared

if __name__ == "__main__":
    DrafterTrainer.learn = learn_and_tell  # type: ignore[method-assign, assignment]
    cli.main()
