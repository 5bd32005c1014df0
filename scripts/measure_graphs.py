"""Measure compiled passes: what making and loading a graph takes, and a pass as a graph against an ordinary one.

    python scripts/measure_graphs.py [--model demo|deep] [--dtype bfloat16] [--threads 2] [--nodes 1 8 16 25 64]
        [--rows 1 4 8]

Passes are full ones over chains behind a prompt, taken in turns within one process; ratios of medians count. Of several
rows every other one is shorter, and the graph that serves any number of them stands beside one that is made for this
number alone ("fixed"). Run it twice: the second time graphs are loaded (``SPECDEC_CACHE`` names another folder for
them). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any
from unittest import mock

import torch
from rich.console import Console

import specdec
from measure_swift import deep_llama
from specdec.build import build_drafter, build_verifier
from specdec.decoding import Step
from specdec.generation import attach, speculation_of
from specdec.graphs import passes, tracing
from specdec.interfaces import DecodeState
from specdec.loading import demo_target
from specdec.tree import TokenTree, chain

console = Console()


def begun(model: Any, rows: int, context: int) -> DecodeState:
    """A request behind random prompts; its cache outlives it."""
    states: list[DecodeState] = []

    def keep(state: DecodeState, _: Step) -> None:
        states.append(state)

    speculation_of(model).observers.append(keep)
    ids = torch.randint(3, model.config.vocab_size, (rows, context))
    mask = torch.ones_like(ids)
    mask[1::2, : context // 8] = 0
    options = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=mask, **options)
    speculation_of(model).observers.clear()
    return states[-1]


def measure(model: Any, rows: int, nodes: int, context: int, repeats: int) -> dict[str, Any]:
    """Seconds of an ordinary pass and of graphs' for a number of rows and nodes, medians."""
    attach(model, build_drafter("none"), build_verifier("tree_attention"), console.print)
    target = speculation_of(model).target
    # Within the block of "fixed" no number of rows is shared.
    most = {"ordinary": 0, "graph": tracing.MOST_ROWS} | ({"fixed": 1} if rows > 1 else {})
    graphs: dict[str, passes.GraphPasses | None] = {"ordinary": None}
    for kind in list(most)[1:]:
        target.use_graphs(nodes, console.print)
        graphs[kind] = target.graphs
    state = begun(model, rows, context)
    assert state.context is not None
    state.context.budgets = [nodes + 1] * rows
    tree = TokenTree(torch.randint(3, model.config.vocab_size, (rows, nodes)), chain(nodes))
    seconds: dict[str, list[float]] = {kind: [] for kind in graphs}
    logits, kinds = {}, list(graphs)
    for turn in range(repeats):
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            target.graphs = graphs[kind]
            with mock.patch.object(passes, "MOST_ROWS", most[kind]):
                start = time.perf_counter()
                logits[kind] = target.run(state.context, tree).logits
                seconds[kind].append(time.perf_counter() - start)
    specdec.restore(model)
    medians = {f"{kind}_s": statistics.median(values[1:]) for kind, values in seconds.items()}
    row: dict[str, Any] = {"rows": rows, "nodes": nodes, **medians, "first_s": seconds["graph"][0]}
    row["ratio"] = medians["ordinary_s"] / medians["graph_s"]
    if "fixed" in graphs:
        row["to_fixed"] = medians["graph_s"] / medians["fixed_s"]
    row["max_difference"] = float((logits["ordinary"].float() - logits["graph"].float()).abs().max())
    row["failures"] = [text for some in graphs.values() if some is not None for text in some.failures.values()]
    console.print(row)
    return row


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["demo", "deep"], default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 16, 25, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = demo_target(options.dtype).model if options.model == "demo" else deep_llama()
    cases = [(rows, nodes) for rows in options.rows for nodes in options.nodes]
    found = [measure(model, *case, options.context, options.repeats) for case in cases]
    console.print(json.dumps({"options": vars(options), "torch": torch.__version__, "passes": found}))


if __name__ == "__main__":
    main()
