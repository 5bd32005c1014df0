"""What Hydra heads learn from: the text, the target's own distribution, its later states (Ankner et al., 2402.05109).

Every head is taught with the true tokens in front of it. Its loss is a weighted sum of the cross-entropy with the text
(``labels``), that with the target's distribution at the position it predicts (``teacher``) and the distance between
its hidden state and the target's there (``reconstruction``); the losses of the heads are added up without weights.
The published weights are 1/0/0 for Hydra and 0/1/0 for Hydra++.

Difference from the authors' code: where heads read the same vector, one dropout mask serves them all, because its
product with their weights is computed once.

Shapes: B rows, T tokens of a row, M of them counted, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafters.hydra_modules import HydraHeads
from specdec.interfaces import Tap
from specdec.target import Target
from specdec.training import objectives

OPTIONS = ("labels", "teacher", "reconstruction", "noise", "dropout")


class HydraLesson(nn.Module):
    """The loss of all heads over packed texts.

    Args:
        heads: what learns; they become float32.
        target: the frozen model.
        tap: where the heads' states come from.
        **options: ``labels``, ``teacher``, ``reconstruction``: weights of the three losses, at least 0.
            ``noise``: alpha of the uniform noise alpha / sqrt(T H) on the embeddings, and without a prefix layer on the
            states, in training (NEFTune, 2310.05914). ``dropout``: in front of every block and output layer, in
            training. Defaults: 1, 0, 0, 0 and 0; with a prefix layer 0, 1, 0, 0 and 0.2.

    Raises:
        ValueError: another option, or a value out of range.
    """

    def __init__(self, heads: HydraHeads, target: Target, tap: Tap, **options: Any) -> None:
        super().__init__()
        published = {"labels": 1.0, "teacher": 0.0, "reconstruction": 0.0, "noise": 0.0, "dropout": 0.0}
        if heads.prefix is not None:
            published |= {"labels": 0.0, "teacher": 1.0, "dropout": 0.2}
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"the loss of Hydra heads has no {', '.join(unknown)}; it has: {', '.join(OPTIONS)}")
        chosen = published | options
        self.labels, self.teacher, self.reconstruction, self.noise, self.dropout = (
            float(chosen[name]) for name in OPTIONS
        )
        weights = self.labels, self.teacher, self.reconstruction
        if min(*weights, self.noise) < 0 or not any(weights) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"expected labels, teacher, reconstruction and noise >= 0, one of the first three above 0, and "
                f"0 <= dropout < 1; got {chosen}"
            )
        self.heads = heads.float().requires_grad_(True)
        self.target, self.tap = target, tap
        self.steps_ahead = tuple(range(2, heads.shape.num_heads + 2))
        later: tuple[Tap, ...] = ("final",) if self.teacher or self.reconstruction else ()
        self.taps: tuple[Tap, ...] = tuple(dict.fromkeys((tap, *later)))

    def forward(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor, states: Mapping[Tap, Tensor]
    ) -> dict[str, Tensor]:
        """The loss, and the hits of every head (``specdec.learning.Lesson``)."""
        heads, count = self.heads, self.heads.shape.num_heads
        with torch.no_grad():
            embedded = self._noisy(self.target.embedding(token_ids).float()).to(states[self.tap].device)
            teacher = self.target.head(states["final"].to(self.target.dtype)) if self.teacher else None
        given = states[self.tap].float()
        if heads.prefix is None:
            given = self._noisy(given)
        else:
            given = heads.prefix(given, positions, objectives.same_text(positions))
        sums = heads.open(self._drop(given), self._drop(objectives.ahead(embedded, 1)), count)
        losses, hits, counted = [], [], []
        for head in range(count):
            if head > 0:
                sums = heads.extend(head, sums, self._drop(objectives.ahead(embedded, head + 1)))
            where = objectives.wanted_ahead(positions, wanted, head + 2)
            loss, found = self._judge(head, sums, token_ids, where, states.get("final"), teacher)
            losses.append(loss)
            hits.append(found)
            counted.append(where)
        return objectives.learnt(losses, [1.0] * count, hits, counted, self.steps_ahead)

    def _judge(
        self,
        head: int,
        sums: Tensor,
        token_ids: Tensor,
        where: Tensor,
        final: Tensor | None,
        teacher: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and hits ``[R]`` of one head over the positions ``where [B, T]``."""
        chosen = where.flatten().nonzero()[:, 0]
        counts = torch.ones_like(chosen, dtype=torch.bool)[None]
        if len(chosen) == 0:  # one position that does not count: every parameter still gets its gradient, zero
            chosen, counts = chosen.new_zeros(1), counts.new_zeros(1, 1)
        x = self.heads.hidden(head, sums.flatten(0, 1)[chosen][None], self._drop)
        logits = self.heads.score(head, self._drop(x), self.target).to(x.device)
        # Where it counts, the label is of the same text, and so is the position before it, whose state predicts it.
        label = (chosen + head + 2).clamp(max=token_ids.numel() - 1)
        before, labels = label - 1, token_ids.flatten()[label][None]
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.labels:
            loss = loss + self.labels * objectives.cross_entropy(logits, labels, counts)
        if teacher is not None:
            p = teacher.flatten(0, 1)[before.to(teacher.device)][None].to(x.device)
            taught = objectives.soft_cross_entropy(logits, p, counts)
            loss = loss + self.teacher * taught
        if self.reconstruction and final is not None:
            distance = F.smooth_l1_loss(x.float(), final.flatten(0, 1)[before][None].float())
            loss = loss + self.reconstruction * distance * counts.any()
        return loss, objectives.hits(logits, labels, counts)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _noisy(self, x: Tensor) -> Tensor:
        if not (self.noise and self.training):
            return x
        size = self.noise / (x.shape[1] * x.shape[2]) ** 0.5
        return x + torch.empty_like(x).uniform_(-size, size)
