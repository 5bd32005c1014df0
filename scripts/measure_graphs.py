"""Measure compiled passes: what making and loading a graph takes, and a pass as a graph against an ordinary one.

    python scripts/measure_graphs.py [--model demo|deep] [--dtype bfloat16] [--threads 2] [--nodes 1 8 16 25 64]

Passes are full ones over chains behind a prompt, taken in turns within one process; ratios of medians count. Run it
twice: the second time graphs are loaded (``SPECDEC_CACHE`` names another folder for them). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from rich.console import Console

import specdec
from measure_swift import deep_llama
from specdec.build import build_drafter, build_verifier
from specdec.decoding import Step
from specdec.generation import attach, speculation_of
from specdec.interfaces import DecodeState
from specdec.loading import demo_target
from specdec.tree import TokenTree, chain

console = Console()


def begun(model: Any, context: int) -> DecodeState:
    """A request behind a random prompt; its cache outlives it."""
    states: list[DecodeState] = []

    def keep(state: DecodeState, _: Step) -> None:
        states.append(state)

    speculation_of(model).observers.append(keep)
    ids = torch.randint(3, model.config.vocab_size, (1, context))
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, eos_token_id=None)
    speculation_of(model).observers.clear()
    return states[-1]


def measure(model: Any, sizes: list[int], context: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of an ordinary pass and of a graph's for each number of nodes, medians."""
    rows = []
    for nodes in sizes:
        attach(model, build_drafter("none"), build_verifier("tree_attention"), console.print)
        target = speculation_of(model).target
        target.use_graphs(nodes, console.print)
        graphs, state = target.graphs, begun(model, context)
        assert graphs is not None
        assert state.context is not None
        state.context.budgets = [nodes + 1]
        tree = TokenTree(torch.randint(3, model.config.vocab_size, (1, nodes)), chain(nodes))
        seconds: dict[str, list[float]] = {"ordinary": [], "graph": []}
        logits = {}
        start = time.perf_counter()
        target.run(state.context, tree)
        first = time.perf_counter() - start
        for turn in range(2 * repeats):
            kind = ("ordinary", "graph")[turn % 2]
            target.graphs = graphs if kind == "graph" else None
            start = time.perf_counter()
            logits[kind] = target.run(state.context, tree).logits
            seconds[kind].append(time.perf_counter() - start)
        medians = {f"{kind}_s": statistics.median(values[2:]) for kind, values in seconds.items()}
        row: dict[str, Any] = {"nodes": nodes, **medians, "first_s": first}
        row |= {"ratio": medians["ordinary_s"] / medians["graph_s"]}
        row |= {"max_difference": float((logits["ordinary"].float() - logits["graph"].float()).abs().max())}
        row |= {"failures": list(graphs.failures.values())}
        console.print(row)
        rows.append(row)
        specdec.restore(model)
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["demo", "deep"], default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 16, 25, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = demo_target(options.dtype).model if options.model == "demo" else deep_llama()
    found = measure(model, options.nodes, options.context, options.repeats)
    console.print(json.dumps({"options": vars(options), "torch": torch.__version__, "passes": found}))


if __name__ == "__main__":
    main()
