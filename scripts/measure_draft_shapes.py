"""Accepted tokens of the draft model's sampled trees at equal node budgets and temperature 1: one run, table and JSON.

    python scripts/measure_draft_shapes.py --gsm8k PATH [--rows 40] [--seeds 2] [--output results.json]

Chains drawn independently and merged (i.i.d.) against RSD-C and RSD-S, which draw without replacement. All are judged
by recursive rejection on held-out prompts of the demo target with its draft model, and none has more node slots or
levels than another of its budget. Counts only: nothing here depends on the machine's speed.
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
# (Node slots, levels) -> name -> options of the drafter. No RSD-C of 4 levels has 24 nodes and narrows steadily.
METHODS: dict[tuple[int, int], dict[str, dict[str, Any]]] = {
    (width * depth, depth): {
        f"i.i.d., {width} chains": {"shape": "chains", "width": width, "depth": depth},
        f"RSD-C, {width} then 1": {"shape": "rsd_c", "branching": [width, *[1] * (depth - 1)]},
        f"RSD-S, width {width}": {"shape": "rsd_s", "width": width, "depth": depth},
    }
    for width, depth in ((2, 4), (3, 4), (4, 6), (6, 4))
}
METHODS[24, 4] |= {
    "RSD-C, 3-2-1-1 (21 nodes)": {"shape": "rsd_c", "branching": [3, 2, 1, 1]},
    "RSD-C, 2-2-2-1 (22 nodes)": {"shape": "rsd_c", "branching": [2, 2, 2, 1]},
}
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
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, default=root.parent / "shared/data/gsm8k/train.jsonl")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    loaded = demo_target(args.dtype, "cpu")
    texts = [question.turns[0] for question in heldout(str(args.gsm8k))[: args.rows]]
    results: dict[str, dict[str, float]] = {}
    table = Table("node slots", "levels", "method", "mean accepted tokens", "distinct nodes per step")
    todo = [(*size, name, options) for size, methods in METHODS.items() for name, options in methods.items()]
    for budget, levels, name, options in track(todo, "methods", console=console):
        figures = results[f"{budget} nodes, {levels} levels, {name}"] = summary(
            measure(loaded, texts, args.seeds, **options)
        )
        error = f"{figures['mean_accepted_tokens']:.3f} ± {figures['standard_error']:.3f}"
        table.add_row(str(budget), str(levels), name, error, f"{figures['distinct_nodes']:.1f}")
    console.print(table)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
