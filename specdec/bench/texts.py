"""End to end: the figures of an evaluation with every baseline in two dtypes, each ratio against the faster.

Tokens, seconds and which texts count are ``specdec.evaluation``'s; only ratios to another row are formed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from specdec.evaluation.methods import Transformers
from specdec.evaluation.records import Summary, SummaryRow
from specdec.evaluation.summary import OVERALL

GENERATE, PROMPT_LOOKUP = "transformers", "transformers_prompt_lookup"
ALL, CALM = "all", "non_looping"


def baseline(name: str, dtype: str, model: Any, eos_ids: Iterable[int], extra: dict[str, Any]) -> Transformers:
    """One of transformers' own methods; in another dtype than the target's it goes by a name of its own."""
    method = Transformers(model, set(eos_ids), name, extra)
    method.name = named(name, dtype)
    return method


def named(name: str, dtype: str) -> str:
    """What a baseline is called in a dtype; "" is the target's."""
    return f"{name}_{dtype}" if dtype else name


def figures(summary: Summary, other_dtype: str) -> list[dict[str, Any]]:
    """A row per method, batch size and subset of texts, over all tasks.

    Args:
        summary: of the evaluation.
        other_dtype: of the second set of baselines.

    Returns:
        ``vs_generate`` and ``vs_prompt_lookup``: tokens per second over those of the faster dtype of each baseline,
        whose rate and dtype stand beside it; None where the baseline was not measured.
    """
    found = []
    overall = [row for row in summary.rows if row.task == OVERALL and row.rows]
    for batch, subset in dict.fromkeys((row.batch_size, row.subset) for row in overall):
        rows = [row for row in overall if (row.batch_size, row.subset) == (batch, subset)]
        fastest = {name: _faster(rows, name, other_dtype) for name in (GENERATE, PROMPT_LOOKUP)}
        found += [_figure(row, fastest) for row in rows]
    return found


def _faster(rows: Sequence[SummaryRow], name: str, other_dtype: str) -> SummaryRow | None:
    own = [row for row in rows if row.drafter in (name, named(name, other_dtype)) and row.tokens_per_second]
    return max(own, key=lambda row: row.tokens_per_second or 0.0, default=None)


def _figure(row: SummaryRow, fastest: dict[str, SummaryRow | None]) -> dict[str, Any]:
    figure: dict[str, Any] = {
        "method": row.drafter,
        "kind": row.method_kind,
        "state": row.state,
        "batch_size": row.batch_size,
        "subset": row.subset,
        "texts": row.rows,
        "looping_share": row.looping_share,
        "tokens_per_second": row.tokens_per_second,
        "mean_accepted_tokens": row.mean_accepted_tokens,
        "draft_share": row.draft_share,
    }
    if row.method_kind in ("plain", "drafter"):  # a text in another dtype is another text
        figure |= {"identical": row.identical_rows, "near_ties": row.near_ties, "bugs": row.bugs}
    for name, reference in fastest.items():
        key = "generate" if name == GENERATE else "prompt_lookup"
        rate = reference.tokens_per_second if reference is not None else None
        figure[f"vs_{key}"] = row.tokens_per_second / rate if rate and row.tokens_per_second else None
        figure[f"{key}_tokens_per_second"] = rate
        figure[f"{key}_method"] = None if reference is None else reference.drafter
    return figure
