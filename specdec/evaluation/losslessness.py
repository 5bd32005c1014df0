"""Is a text that differs from the plain run's a near-tie or a bug? The audit, asked row by row while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.audit import Audit, Pair, audit
from specdec.evaluation.records import BUG, IDENTICAL, NEAR_TIE
from specdec.generation import using


def plain_pair(model: Any, prompt: Tensor, speculative: Tensor, options: dict[str, Any]) -> Pair:
    """Decode ``prompt [1, P]`` plainly with transformers, to audit the text ``speculative [1, P+T]`` of it."""
    with using(model, None):
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return Pair(prompt.shape[1], output.sequences, torch.stack([step[0] for step in output.logits]), speculative)


class Judge:
    """Compares greedy texts with the plain run's.

    What rounding explains is taken from control rows (plain text, scored step by step and in one block) and from every
    row that was judged before; nothing is computed before the first difference.

    Args:
        model: the target.
        controls: prompts ``[1, P]`` for the control.
        options: keyword arguments of ``generate``, greedy.
    """

    def __init__(self, model: Any, controls: Sequence[Tensor], options: dict[str, Any]) -> None:
        self.model, self.controls, self.options = model, controls, options
        self._seen: Audit | None = None

    def verdict(self, prompt: Tensor, plain: Sequence[int], ours: Sequence[int]) -> str:
        """``identical``, ``near_tie`` or ``bug``: the text ``ours`` behind ``prompt [1, P]`` against ``plain``."""
        if list(plain) == list(ours):
            return IDENTICAL
        if self._seen is None:
            pairs = [plain_pair(self.model, control, control, self.options) for control in self.controls]
            for pair in pairs:
                pair.speculative = pair.plain
            self._seen = audit(self.model, pairs)
        text = torch.cat([prompt, prompt.new_tensor([list(ours)])], dim=1)
        self._seen.rows += audit(self.model, [plain_pair(self.model, prompt, text, self.options)]).rows
        return BUG if self._seen.rows[-1] in self._seen.mismatches else NEAR_TIE
