"""Accepted tokens of the draft model's sampled trees at equal node budgets and temperature 1: one run, table and JSON.

    python scripts/measure_draft_shapes.py --gsm8k PATH [--rows 40] [--seeds 2] [--output results.json]

Chains drawn independently and merged (i.i.d.) against RSD-C and RSD-S, which draw without replacement; each in several
shapes of the same number of node slots, because the best one is another for each. All are judged by recursive rejection
on held-out prompts of the demo target with its draft model. Counts only: nothing here depends on the machine's speed.
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
# Node slots -> branchings of RSD-C that fill them; i.i.d. chains and RSD-S of every shape that fills them stand beside.
BRANCHINGS: dict[int, list[list[int]]] = {
    6: [[2, 1, 1], [2, 2], [3, 1]],
    12: [[2, 1, 1, 1, 1, 1], [2, 1, 2, 1], [3, 1, 1, 1], [2, 2, 1], [4, 1, 1]],
    24: [[4, 1, 1, 1, 1, 1], [2, 2, 1, 1, 1, 1], [2, 1, 2, 1, 1, 1], [2, 1, 1, 1, 2, 1, 1, 1], [3] + [1] * 7],
}
CHAINS: dict[int, list[tuple[int, int]]] = {
    6: [(2, 3), (3, 2)],
    12: [(2, 6), (3, 4), (4, 3)],
    24: [(3, 8), (4, 6), (6, 4)],
}


def methods(budget: int) -> dict[str, dict[str, Any]]:
    """Name -> options of the drafter, for all shapes of at most so many node slots."""
    named: dict[str, dict[str, Any]] = {}
    for width, depth in CHAINS[budget]:
        named[f"i.i.d., {width} chains of {depth}"] = {"shape": "chains", "width": width, "depth": depth}
        named[f"RSD-S, width {width}, {depth} levels"] = {"shape": "rsd_s", "width": width, "depth": depth}
    for branching in BRANCHINGS[budget]:
        named[f"RSD-C, {'-'.join(map(str, branching))}"] = {"shape": "rsd_c", "branching": branching}
    return named


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
    parser.add_argument("--budgets", type=int, nargs="+", default=list(CHAINS), choices=list(CHAINS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    loaded = demo_target(args.dtype, "cpu")
    texts = [question.turns[0] for question in heldout(str(args.gsm8k))[: args.rows]]
    results: dict[str, dict[str, float]] = {}
    table = Table("node slots", "method", "mean accepted tokens", "distinct nodes per step")
    todo = [(budget, name, options) for budget in args.budgets for name, options in methods(budget).items()]
    for budget, name, options in track(todo, "methods", console=console):
        figures = results[f"{budget} nodes, {name}"] = summary(measure(loaded, texts, args.seeds, **options))
        error = f"{figures['mean_accepted_tokens']:.3f} ± {figures['standard_error']:.3f}"
        table.add_row(str(budget), name, error, f"{figures['distinct_nodes']:.1f}")
        if args.output:
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(table)


if __name__ == "__main__":
    main()
