"""Is the output really the target's own? Plain and speculative text compared, rounding told from bugs.

In float32 both are the same, token for token. In half precision a pass over several tokens rounds otherwise than a
pass over one, so a near-tie may flip, with or without a drafter. The audit therefore measures a control on the same
prompts: plain text scored step by step and again in one block, no drafter involved. A token that is not the target's
argmax under teacher forcing is a *near-tie* where its gap is within what the control's rounding explains, a
*mismatch* otherwise.

Shapes: P prompt tokens, T emitted tokens, V vocabulary. Gaps are differences of log-probabilities, in nats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

# The control samples rounding at some positions only; the tree's own may be somewhat larger.
_SAFETY = 2.0


@dataclass(frozen=True)
class Divergence:
    """The first position where two texts part: both tokens, and how much likelier plain's one was, in nats."""

    position: int
    plain_token: int
    speculative_token: int
    gap: float


@dataclass
class Row:
    """One prompt: whether the texts agree, and how far the worst emitted token is from the target's argmax.

    Attributes:
        divergence: first difference from plain's text; None where they agree.
        worst_gap: largest gap of an emitted token under teacher forcing on the speculative text itself.
        control_rounding: largest change of a top-2 gap between scoring plain's text step by step and in one block.
        control_flips: positions where block scoring alone changes the argmax of plain's text.
    """

    divergence: Divergence | None
    worst_gap: float
    control_rounding: float
    control_flips: int


@dataclass
class Audit:
    """All rows of one audit, and the verdict."""

    rows: list[Row] = field(default_factory=list)

    @property
    def bound(self) -> float:
        """Largest gap that rounding explains, in nats: derived from the control, not a constant."""
        return _SAFETY * max((row.control_rounding for row in self.rows), default=0.0)

    @property
    def identical(self) -> int:
        """Rows whose texts agree token for token."""
        return sum(row.divergence is None for row in self.rows)

    @property
    def near_ties(self) -> list[Row]:
        """Rows that differ by no more than rounding."""
        return [row for row in self.rows if row.divergence is not None and self._within(row)]

    @property
    def mismatches(self) -> list[Row]:
        """Rows with a token that is neither the argmax nor a near-tie: a bug."""
        return [row for row in self.rows if not self._within(row)]

    @property
    def control_flips(self) -> int:
        """Positions where plain block scoring alone would have changed the text."""
        return sum(row.control_flips for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "rows": len(self.rows),
            "identical": self.identical,
            "near_ties": len(self.near_ties),
            "mismatches": len(self.mismatches),
            "bound_nats": self.bound,
            "control_flips": self.control_flips,
            "details": [asdict(row) for row in self.rows],
        }

    def _within(self, row: Row) -> bool:
        gap = row.worst_gap if row.divergence is None else max(row.worst_gap, row.divergence.gap)
        return gap <= self.bound


@dataclass
class Pair:
    """Two greedy texts of one prompt.

    Attributes:
        prompt_length: P.
        plain: ids ``[1, P+T]`` of plain decoding.
        steps: its logits step by step, ``[T, V]``.
        speculative: ids ``[1, P+T']``.
    """

    prompt_length: int
    plain: Tensor
    steps: Tensor
    speculative: Tensor


def first_difference(plain: list[int], speculative: list[int]) -> int | None:
    """Index of the first token that differs, the shorter text's end included; None where the texts are equal."""
    for index, (a, b) in enumerate(zip(plain, speculative, strict=False)):
        if a != b:
            return index
    return None if len(plain) == len(speculative) else min(len(plain), len(speculative))


def audit(model: Any, pairs: Iterable[Pair]) -> Audit:
    """Compare greedy texts that were decoded without logits processors; ``model`` is the target, to force them on."""
    return Audit([_row(model, pair) for pair in pairs])


def _row(model: Any, pair: Pair) -> Row:
    steps, block = pair.steps.float().log_softmax(-1), teacher_forced(model, pair.plain, pair.prompt_length)
    top = steps.topk(2).indices
    gaps = [scores.gather(1, top).diff(dim=1) for scores in (steps, block)]
    rounding = float((gaps[0] - gaps[1]).abs().max())
    flips = int((steps.argmax(-1) != block.argmax(-1)).sum())
    theirs, ours = (text[0, pair.prompt_length :].tolist() for text in (pair.plain, pair.speculative))
    at = first_difference(theirs, ours)
    if at is None:
        return Row(None, _worst_gap(block, ours), rounding, flips)
    forced = teacher_forced(model, pair.speculative, pair.prompt_length)
    plain_token, our_token = (tokens[at] if at < len(tokens) else -1 for tokens in (theirs, ours))
    # Up to here the texts agree, so plain's own step-by-step logits judge the choice.
    both = min(plain_token, our_token) >= 0
    gap = float(steps[at, plain_token] - steps[at, our_token]) if both else float("inf")
    return Row(Divergence(at, plain_token, our_token, gap), _worst_gap(forced, ours), rounding, flips)


@torch.no_grad()
def teacher_forced(model: Any, text: Tensor, prompt_length: int) -> Tensor:
    """Log-probabilities float32 ``[T, V]`` before each emitted token of ``text [1, P+T]``, scored in one block."""
    logits = model(input_ids=text[:, :-1], use_cache=False, return_dict=True).logits
    return logits[0, prompt_length - 1 :].float().log_softmax(-1)


def _worst_gap(log_probs: Tensor, tokens: list[int]) -> float:
    if not tokens:
        return 0.0
    chosen = log_probs.gather(1, torch.tensor(tokens, device=log_probs.device)[:, None]).squeeze(1)
    return float((log_probs.amax(-1) - chosen).max())
