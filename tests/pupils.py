"""The smallest drafter that learns, packed texts for it, and a training of it that can be killed.

python tests/pupils.py FOLDER [CHECKPOINT]     trains in FOLDER, from a checkpoint where one is given
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import zoo
from drafters.base import BaseDrafter
from specdec.interfaces import Tap
from specdec.target import Target
from specdec.training import objectives

LENGTH = 24


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of three random texts and a little padding; the second token of each text and what follows it is wanted.

    A text is a chain of tokens in which each follows from the one before, so that there is something to learn.
    """

    def __init__(self, count: int, seed: int = 0, vocab: int = zoo.VOCAB) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items = []
        for _ in range(count):
            sizes = [5, 7, 9]
            starts = torch.randint(1, vocab, (3,), generator=generator).tolist()
            texts = [
                [(start + 5 * step) % vocab for step in range(size)] for start, size in zip(starts, sizes, strict=True)
            ]
            left = LENGTH - sum(sizes)
            token_ids = torch.tensor([token for text in texts for token in text] + [zoo.PAD] * left)
            positions = torch.tensor([place for size in [*sizes, left] for place in range(size)])
            wanted = (positions > 0) & (torch.arange(LENGTH) < LENGTH - left)
            self.items.append({"token_ids": token_ids, "positions": positions, "wanted": wanted})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(self.items[index])

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(b"".join(item[name].numpy().tobytes() for name in ("token_ids", "positions", "wanted")))
        return digest.hexdigest()


class ResidualLesson(nn.Module):
    """One residual layer per depth on the final state; dropout, so that the random state matters when resuming."""

    def __init__(self, target: Target, depths: int = 2, dropout: float = 0.1, taps: Sequence[Tap] = ("final",)) -> None:
        super().__init__()
        self.taps, self.steps_ahead = tuple(taps), tuple(range(2, depths + 2))
        self.heads = nn.ModuleList(nn.Linear(target.hidden_size, target.hidden_size) for _ in range(depths))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.dropout = nn.Dropout(dropout)
        self._head = target.head  # a bound method, so that nothing of the target is registered
        self.progress = 0.0

    def forward(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor, states: Mapping[Tap, Tensor]
    ) -> dict[str, Tensor]:
        final = states["final"]
        losses, found, counted = [], [], []
        for depth, head in enumerate(self.heads, start=2):
            logits = self._head(final + self.dropout(torch.tanh(head(final))))
            labels, where = objectives.ahead(token_ids, depth), objectives.wanted_ahead(positions, wanted, depth)
            losses.append(objectives.cross_entropy(logits, labels, where))
            found.append(objectives.hits(logits, labels, where))
            counted.append(where)
        size = torch.stack([parameter.square().mean() for parameter in self.parameters()]).sum()
        return objectives.learnt(
            losses, [0.8 ** (step - 1) for step in self.steps_ahead], found, counted, self.steps_ahead
        ) | {
            "size": size,
            "progress": torch.tensor(self.progress),
        }


class Pupil(BaseDrafter):
    """A drafter that proposes nothing and learns a ``ResidualLesson``."""

    name = "pupil"

    def __init__(self) -> None:
        self._lesson: ResidualLesson | None = None

    def lesson(self, target: Target, **options: Any) -> ResidualLesson:
        if unknown := options.keys() - {"dropout"}:
            raise ValueError(f"no option {sorted(unknown)}; known: dropout")
        self._lesson = ResidualLesson(target, **options)
        return self._lesson

    def settled(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path, layout: str = "specdec") -> None:
        if layout != "specdec":
            raise ValueError(f"unknown layout {layout!r}; known: specdec")
        folder.mkdir(parents=True, exist_ok=True)
        learnt, heads = ({}, 0) if self._lesson is None else (self._lesson.state_dict(), len(self._lesson.heads))
        torch.save(learnt, folder / "weights.pt")
        (folder / "config.json").write_text(json.dumps({"heads": heads}))


def target_of(family: str = "llama", dtype: torch.dtype = torch.float32, model: Any = None) -> Target:
    """A tiny frozen target whose layers are known."""
    target = Target((zoo.build(family, dtype=dtype) if model is None else model).requires_grad_(False))
    with target.router.observe(), torch.no_grad():
        target.model(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=False)
    return target


OPTIONS: dict[str, Any] = {
    "max_steps": 24,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-2,
    "logging_steps": 3,
    "save_steps": 4,
    "eval_steps": 8,
    "save_total_limit": 2,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
}


def trainer_in(folder: Path, train: Any = None, held_out: Any = None, **options: Any) -> Any:
    """A trainer of the pupil with a loss curve, float32."""
    from specdec.training.callbacks import LossCurve, Provenance
    from specdec.training.features import Frozen
    from specdec.training.trainer import DrafterTrainer, training_arguments

    target = target_of()
    lesson = Pupil().lesson(target)
    held_out = Rows(6, seed=1) if held_out is None else held_out
    arguments = training_arguments(OPTIONS | options, folder, 0, target, evaluates=True)
    callbacks = [LossCurve(folder / "log.jsonl"), Provenance({"command": "test"})]
    return DrafterTrainer(lesson, arguments, Frozen(target, lesson.taps), train or Rows(22), held_out, callbacks)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The loss curve, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timed = ("runtime", "per_second", "flos", "preparation_time", "train_loss")
    return [{name: value for name, value in line.items() if not name.endswith(timed)} for line in lines]


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    trainer_in(place).learn(Path(sys.argv[2]) if len(sys.argv) > 2 else None)
