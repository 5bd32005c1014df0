"""Accepted tokens of the draft model's sampled trees at equal node budgets and temperature 1: one run, table and JSON.

    python scripts/measure_draft_shapes.py --gsm8k PATH [--rows 40] [--seeds 2] [--output results.json]

Chains drawn independently and merged (i.i.d.) against RSD-C and RSD-S, which draw without replacement, with the same
number of node slots in the same number of levels. All are judged by recursive rejection on held-out prompts of the demo
target with its draft model. Counts only: nothing here depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import specdec
from specdec.evaluation.data import heldout
from specdec.generation import speculation_of
from specdec.loading import Loaded, demo_target
from specdec.metrics import SpeculationStats

NEW_TOKENS = 96
BATCH = 10
# (Chains or width, levels): as many node slots as their product.
SIZES = [(3, 2), (6, 2), (2, 3), (4, 3)]


def methods(width: int, depth: int) -> dict[str, dict[str, Any]]:
    """Name -> options of the drafter, for the shapes of ``width * depth`` node slots in ``depth`` levels."""
    return {
        f"i.i.d., {width} chains": {"shape": "chains", "width": width, "depth": depth},
        **{
            f"RSD-C, {'-'.join(map(str, branching))}": {"shape": "rsd_c", "branching": branching}
            for branching in branchings(width * depth, depth)
        },
        f"RSD-S, width {width}": {"shape": "rsd_s", "width": width, "depth": depth},
    }


def branchings(slots: int, levels: int, widest: int | None = None) -> list[list[int]]:
    """Every branching vector, not rising from level to level, whose tree has exactly so many nodes below the root."""
    if levels == 0:
        return [[]] if slots == 0 else []
    found = []
    for count in range(1, min(slots, widest or slots) + 1):
        if slots % count == 0:  # every child carries the same subtree
            found += [[count, *rest] for rest in branchings(slots // count - 1, levels - 1, count)]
    return found


console = Console()


def measure(loaded: Loaded, texts: list[str], seeds: int, **options: Any) -> SpeculationStats:
    """Statistics of one method over all prompts and seeds."""
    model = loaded.model
    specdec.speculate(model, "draft_model", path="demo", **options)
    encoded = [loaded.encode(text)[0] for text in texts]
    try:
        for seed in range(seeds):
            for start in range(0, len(encoded), BATCH):
                rows = encoded[start : start + BATCH]
                width = max(map(len, rows))
                ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
                mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
                torch.manual_seed(seed)
                model.generate(
                    ids, attention_mask=mask, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=NEW_TOKENS
                )
        return speculation_of(model).stats
    finally:
        specdec.restore(model)


def summary(stats: SpeculationStats) -> dict[str, float]:
    """Mean accepted tokens (bonus included) with its standard error, and the share accepted by depth."""
    count = stats.accepted_lengths.total()
    mean = sum(length * n for length, n in stats.accepted_lengths.items()) / count
    variance = sum((length - mean) ** 2 * n for length, n in stats.accepted_lengths.items()) / count
    by_depth = {f"depth {d}": share for d, share in enumerate(stats.acceptance_by_depth, start=1)}
    return {
        "mean_accepted_tokens": stats.mean_accepted_tokens,
        "standard_error": math.sqrt(variance / count),
        "verifications": count,
        "distinct_nodes": stats.drafted_nodes / count,
    } | by_depth


def main() -> None:
    """Measure every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    loaded = demo_target(args.dtype, "cpu")
    texts = [question.turns[0] for question in heldout(str(args.gsm8k))[: args.rows]]
    results: dict[str, dict[str, float]] = {}
    table = Table("node slots", "levels", "method", "mean accepted tokens", "distinct nodes per step")
    todo = [(*size, name, options) for size in SIZES for name, options in methods(*size).items()]
    for width, depth, name, options in track(todo, "methods", console=console):
        figures = summary(measure(loaded, texts, args.seeds, **options))
        results[f"{width * depth} nodes, {depth} levels, {name}"] = figures
        error = f"{figures['mean_accepted_tokens']:.3f} ± {figures['standard_error']:.3f}"
        table.add_row(str(width * depth), str(depth), name, error, f"{figures['distinct_nodes']:.1f}")
        if args.output:
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(table)


if __name__ == "__main__":
    main()
