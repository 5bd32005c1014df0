"""What the lessons of drafters share: tokens ahead, losses over the wanted positions, and the figures that are logged.

Rows are packed: a row holds several texts one after the other, and position 0 starts a text.

Shapes: B rows, T tokens of a row, V vocabulary, K depths (heads), R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

RANKS = 5
_COUNTS: ContextVar[Mapping[int, Tensor] | None] = ContextVar("wanted positions of a batch, on average", default=None)


def ahead(values: Tensor, steps: int) -> Tensor:
    """``values [B, T, ...]`` moved so that entry t holds that of t + steps; the last ``steps`` are zeros."""
    moved = torch.zeros_like(values)
    moved[:, : max(values.shape[1] - steps, 0)] = values[:, steps:]
    return moved


def wanted_ahead(positions: Tensor, wanted: Tensor, steps: int) -> Tensor:
    """bool ``[B, T]``: whether the token ``steps`` ahead is wanted and of the same text.

    Args:
        positions: int64 ``[B, T]``.
        wanted: bool ``[B, T]``.
        steps: at least 0.
    """
    return ahead(wanted, steps) & (ahead(positions, steps) == positions + steps)


def same_text(positions: Tensor) -> Tensor:
    """bool ``[B, 1, T, T]``: what a causal layer over packed texts may see, key j from query i."""
    text = (positions == 0).cumsum(-1)
    causal = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool, device=positions.device).tril()
    return ((text[:, :, None] == text[:, None]) & causal).unsqueeze(1)


def cross_entropy(logits: Tensor, labels: Tensor, where: Tensor) -> Tensor:
    """Mean over the positions ``where`` of -log p(label), in nats; 0 where there are none.

    Args:
        logits: ``[B, T, V]``.
        labels: int64 ``[B, T]``.
        where: bool ``[B, T]``.
    """
    if not where.any():
        return logits.float().sum() * 0
    return F.cross_entropy(logits[where].float(), labels[where])


def soft_cross_entropy(logits: Tensor, teacher: Tensor, where: Tensor) -> Tensor:
    """Mean over the positions ``where`` of -sum_v p(v) log q(v), in nats; 0 where there are none.

    Args:
        logits: ``[B, T, V]`` of q.
        teacher: ``[B, T, V]`` logits of p, no gradient.
        where: bool ``[B, T]``.
    """
    if not where.any():
        return logits.float().sum() * 0
    p = teacher[where].float().softmax(-1)
    return -(p * logits[where].float().log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def hits(logits: Tensor, labels: Tensor, where: Tensor) -> Tensor:
    """int64 ``[R]``: at how many of the positions ``where`` the label is among the best 1..R.

    Args:
        logits: ``[B, T, V]``.
        labels: int64 ``[B, T]``.
        where: bool ``[B, T]``.
    """
    best = logits[where].topk(min(RANKS, logits.shape[-1]), dim=-1).indices
    found = F.pad((best == labels[where][:, None]).sum(0), (0, RANKS - best.shape[1]))
    return found.cumsum(0)


@contextmanager
def of_step(counts: Mapping[int, Tensor]) -> Iterator[None]:
    """Within the block a loss is a batch's part in its step: the sum over the batch, over what the batches of the step
    have on average. So the mean over the batches, accumulated ones and those of other processes, is the loss of all of
    them as one, however many tokens are wanted in each. That holds for losses of ``learnt`` and ``shared``.

    Args:
        counts: steps ahead -> in how many positions of a batch the token so far ahead is wanted, on average.
    """
    token = _COUNTS.set(counts)
    try:
        yield
    finally:
        _COUNTS.reset(token)


def shared(losses: Tensor, counts: Tensor, steps: Sequence[int]) -> Tensor:
    """A batch's part of its step's losses; within no step these are the batch's own. For terms that ``learnt`` does not
    see.

    Args:
        losses: ``[K]``, means over positions.
        counts: int64 ``[K]``, over how many.
        steps: K of them, how far ahead of a position its token is; among the lesson's ``steps_ahead``.
    """
    on_average = _COUNTS.get()
    if on_average is None:
        return losses
    average = torch.stack([on_average[step] for step in steps])
    return losses * (counts / average.clamp(min=1e-12)).to(losses.dtype)


def learnt(
    losses: Sequence[Tensor],
    weights: Sequence[float],
    found: Sequence[Tensor],
    counted: Sequence[Tensor],
    steps: Sequence[int],
) -> dict[str, Tensor]:
    """What a lesson returns: the weighted sum of its losses, and its hits per depth.

    Args:
        losses: K scalars, each a mean over its ``counted``.
        weights: K of them.
        found: K of ``hits``.
        counted: K of the masks ``where``, which ``wanted_ahead`` makes.
        steps: K of them, how far ahead each depth's token is.
    """
    counts = torch.stack([where.sum() for where in counted])
    parts = torch.stack([weight * part for weight, part in zip(weights, losses, strict=True)])
    return {"loss": shared(parts, counts, steps).sum(), "hits": torch.stack(list(found)), "counted": counts}
