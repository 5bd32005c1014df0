"""How well a draft does on held-out texts: what is counted, over batches and over the processes of a distributed run;
and that each row counts once, however batches are filled up for all processes to have one.

Shapes: K depths (heads), R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Scores:
    """How often the wanted token was among the draft's best, summed over batches."""

    def __init__(self) -> None:
        self._hits = self._counted = self._loss = torch.zeros(())

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        """Count what a lesson returned; its loss weighs as much as the tokens it was taken over."""
        counted = outputs["counted"].double()
        self._hits = self._hits + outputs["hits"].double()
        self._counted = self._counted + counted
        self._loss = self._loss + outputs["loss"].detach().double() * counted[0]

    def reduce(self, accelerator: Any) -> None:
        """Sum over the processes of a distributed run."""
        for name in ("_hits", "_counted", "_loss"):
            setattr(self, name, accelerator.reduce(getattr(self, name), "sum"))

    def rates(self) -> dict[str, float]:
        """``loss``, and ``depth_k/top_r``: the share of wanted tokens at depth k among the draft's best r.

        Raises:
            ValueError: none was wanted.
        """
        counted = self._counted.tolist()
        if not counted or counted[0] == 0:
            raise ValueError("no token of the held-out texts is wanted; expected texts with an assistant's turn")
        rates = {"loss": float(self._loss) / counted[0]}
        for depth, (hits, of) in enumerate(zip(self._hits.tolist(), counted, strict=True), start=1):
            if of:
                rates |= {f"depth_{depth}/top_{rank}": hit / of for rank, hit in enumerate(hits, start=1)}
        return rates

    def acceptance(self) -> list[list[float]] | None:
        """``[K][R]``: the share of wanted tokens that are exactly the draft's candidate of each rank, per depth.

        None where no token was wanted at some depth, since drafters remember rates of all their heads or of none. A
        rank that was never right counts as half a token: a tree drawn from few texts should not stop at it.
        """
        made = []
        for hits, of in zip(self._hits.tolist(), self._counted.tolist(), strict=True):
            if of == 0:
                return None
            made.append(
                [round(max(now - before, 0.5) / of, 6) for before, now in zip([0.0, *hits], hits, strict=False)]
            )
        return made or None


def once(batch: Mapping[str, Any], rows: int, rank: int, size: int) -> dict[str, Any]:
    """The last batch of an epoch without what the epoch has shown before.

    Batches are dealt to the processes in turn, or each batch in as many parts (accelerate's ``split_batches``). Where
    the last round is not full, rows from the beginning of the epoch fill it up (``even_batches``), so that each process
    has a whole batch; in those nothing is wanted any more.

    Args:
        batch: of this process, B rows; ``wanted [B, T]``.
        rows: of the epoch.
        rank: this process's number.
        size: how many processes there are.
    """
    wanted = batch["wanted"].clone()
    if left := rows % (size * len(wanted)):  # of the last round, those that the epoch had left
        wanted[max(left - rank * len(wanted), 0) :] = False
    return {**batch, "wanted": wanted}


def check_dealing(arguments: Any) -> None:
    """Hold the arguments of a distributed training to how ``once`` takes batches to be dealt out.

    Raises:
        ValueError: an option of accelerate's by which a process lacks a batch, or rows shown before look like others.
    """
    dealing = arguments.accelerator_config
    usual = {"even_batches": True, "dispatch_batches": False}
    wrong = [name for name, value in usual.items() if bool(getattr(dealing, name)) != value]
    if wrong and arguments.world_size > 1:
        raise ValueError(
            f"trainer.accelerator_config.{wrong[0]}={str(not usual[wrong[0]]).lower()} deals batches out in another "
            "way than what makes several processes one; expected it left out: each process has as many batches, and "
            "rows that fill up the last of an epoch teach nothing"
        )


class Even(Dataset[dict[str, Any]]):
    """Rows, and behind them copies of the first in which nothing is wanted, up to a multiple of what is judged at once.

    Else the last batch would be filled up with rows that were counted before, so that all processes have one.
    """

    def __init__(self, rows: Any, multiple: int) -> None:
        self._rows, self._length = rows, -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self._rows):
            return self._rows[index]
        row = self._rows[0]
        return {**row, "wanted": torch.zeros_like(row["wanted"])}
