"""Measure SWIFT: what a found skip set accepts against the uniform one, and what a draft step costs.

    python scripts/measure_swift.py cost [--threads 2]
    python scripts/measure_swift.py acceptance --gsm8k PATH [--rows 16]

``cost`` builds a deep Llama with random weights, large enough that decoding waits for memory, and compares the time of
a draft step with the share of the weights that the step reads, the head's included. ``acceptance`` searches a set for
the embedded target on some held-out prompts and decodes others with it. All figures are ratios within one process,
taken in turns; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from drafters.self_drafting import draft_chain
from drafters.skip_search import SkipSearch, SkipSet, unified, uniform
from drafters.swift import Swift
from specdec.decoding import Step
from specdec.evaluation.data import heldout
from specdec.generation import plainly, speculation_of
from specdec.interfaces import DecodeState
from specdec.loading import Loaded, demo_target
from specdec.metrics import SpeculationStats, ends_in_loop
from specdec.routing import FULL, Route
from specdec.target import Target
from specdec.tree import root_only

console = Console()
NEW_TOKENS = 96
STEPS = 8  # of a draft whose cost is taken
LAYERS = 24


def deep_llama() -> LlamaForCausalLM:
    """24 layers, 0.29 B parameters of random bfloat16."""
    config = LlamaConfig(
        vocab_size=16_384,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def routes() -> dict[str, Route]:
    """Skip sets of several makes, and an early exit."""
    search = SkipSearch()
    search.bind(LAYERS, uniform(LAYERS))
    upper = range(LAYERS // 3, LAYERS - 1)
    sets = {
        "uniform": uniform(LAYERS),
        "random, r = 0.45": search.propose(),
        "unified, s = 2": unified(LAYERS, 2),
        "attention of the upper layers": SkipSet.of(upper, ()),
        "feed-forward of the upper layers": SkipSet.of((), upper),
    }
    return {name: found.route for name, found in sets.items()} | {"first 6 layers": Route(hi=6)}


def kept_share(target: Target, route: Route) -> float:
    """Share of a step's weight bytes that a route reads; the embedding, of which a step reads a row, is left out."""

    def size(module: torch.nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    head = size(target.router.head)
    whole = kept = head
    for index, layer in enumerate(target.layers):
        inside = route.hi is None or index < route.hi
        for part, skipped in (("self_attn", route.skip_attention), ("mlp", route.skip_mlp)):
            bytes_ = size(layer.get_submodule(part))
            whole += bytes_
            kept += bytes_ * (inside and index not in skipped)
    return kept / whole


class Probe(Swift):
    """In the middle of a request: times drafts along several routes and one plain step, in turns."""

    name = "probe"

    def __init__(self, chosen: dict[str, Route], repeats: int) -> None:
        super().__init__(skip={"attention": [], "mlp": []}, search=False)
        self.chosen, self.repeats = chosen, repeats
        self.seconds: dict[str, list[float]] = {name: [] for name in ("step", *chosen)}

    def propose(self, state: DecodeState) -> Any:
        target, context = self._target, state.context
        assert target is not None
        assert context is not None
        if state.emitted[0] == 2:

            def draft(route: Route) -> Callable[[], Any]:
                # As Swift drafts: 10 ranked successors, and the confidence read back.
                return lambda: draft_chain(target, state, route, STEPS, 1e-9, 10)

            jobs = {"step": lambda: target.run(context, root_only(state.root), route=FULL)}
            jobs |= {name: draft(route) for name, route in self.chosen.items()}
            for _ in track(range(self.repeats), "draft steps"):
                for name, job in jobs.items():
                    start = time.perf_counter()
                    job()
                    self.seconds[name].append((time.perf_counter() - start) / (1 if name == "step" else STEPS))
        return root_only(state.root)


def cost(repeats: int) -> dict[str, Any]:
    """c_d, one draft step over one plain step, beside the kept share of the weight bytes."""
    torch.manual_seed(0)
    model = deep_llama()
    chosen = routes()
    probe = Probe({"nothing skipped": FULL, **chosen}, repeats)
    specdec.speculate(model, probe)
    ids = torch.randint(3, 16_000, (1, 128))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS + 4, do_sample=False)
    target = speculation_of(model).target
    # Of each: the quartile of the quickest, which other work on the machine disturbs least.
    quick = {name: statistics.quantiles(spent, n=4)[0] for name, spent in probe.seconds.items()}
    table = {}
    for name, route in probe.chosen.items():
        share, ratio = kept_share(target, route), quick[name] / quick["step"]
        table[name] = {"kept_share": share, "c_d": ratio, "c_d_over_share": ratio / share}
        console.print(f"{name:34} kept share {share:.3f}  c_d {ratio:.3f}  ratio {ratio / share:.3f}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "step_ms": 1e3 * quick["step"], "repeats": repeats, "routes": table}


class ChainCounter:
    """The chain's own acceptance, siblings left out: tokens of the chain accepted, over those offered and reached."""

    def __init__(self) -> None:
        self.accepted = self.tested = 0

    def __call__(self, _: DecodeState, step: Step) -> None:
        if step.tree is None or step.tree.num_nodes == 1:
            return
        depth = step.tree.topology.max_depth
        for path in step.verification.path:
            good = next((i for i, node in enumerate(path) if node != i), len(path)) - 1
            self.accepted += good
            self.tested += good + (good < depth)


def acceptance(gsm8k: Path, rows: int, candidates: int) -> dict[str, Any]:
    """Found set against uniform set on rows that do not loop, with the speed over plain decoding."""
    loaded = demo_target("bfloat16")
    model = loaded.model
    texts = [question.turns[0] for question in heldout(str(gsm8k))[: rows + 8]]
    calibration, judged = texts[:8], texts[8:]
    drafter = Swift(search=SkipSearch(max_iterations=candidates, max_score=1.0))
    specdec.speculate(model, drafter)
    target = speculation_of(model).target
    with console.status("searching") as status:
        found = drafter.tune(
            target,
            [loaded.encode(text) for text in calibration],
            lambda ids: _generate(model, ids),
            lambda done, of, what: status.update(f"{done} of {of} {what}"),
        )
    console.print_json(json.dumps(found))
    encoded = [loaded.encode(text) for text in judged]
    with plainly(model):
        plain = [_generate(model, ids)[0, ids.shape[1] :].tolist() for ids in encoded]
    calm = [ids for ids, text in zip(encoded, plain, strict=True) if not ends_in_loop(text)]
    sets = {"uniform": uniform(target.num_layers), "found": drafter.skip_set}
    methods: dict[str, Swift | str] = {"none": "none"}
    for name, chosen in sets.items():
        for width in (1, 10):
            label = f"{name}, {'chain' if width == 1 else 'comb'}"
            methods[label] = Swift(skip=chosen.as_dict(), max_width=width)
    result = _in_turns(loaded, methods, calm)
    return {"found": found, "rows": len(calm), "looping_share": 1 - len(calm) / len(encoded), "methods": result}


def _in_turns(loaded: Loaded, methods: dict[str, Swift | str], encoded: Sequence[Tensor]) -> dict[str, Any]:
    model = loaded.model
    seconds, tokens = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0)
    stats = {name: SpeculationStats() for name in methods}
    counters = {name: ChainCounter() for name in methods}
    for ids in track(encoded, "rows"):
        for name, drafter in methods.items():
            specdec.speculate(model, drafter)
            handle = speculation_of(model)
            handle.observers.append(counters[name])
            start = time.perf_counter()
            text = _generate(model, ids)
            seconds[name] += time.perf_counter() - start
            tokens[name] += text.shape[1] - ids.shape[1]
            stats[name] += handle.last
            specdec.restore(model)
    table: dict[str, Any] = {}
    for name, total in stats.items():
        counter = counters[name]
        table[name] = {
            "mean_accepted_tokens": total.mean_accepted_tokens,
            "chain_alpha": counter.accepted / counter.tested if counter.tested else None,
            "draft_share": total.draft_share,
            "speed_over_none": (tokens[name] / seconds[name]) / (tokens["none"] / seconds["none"]),
        }
        console.print(name, table[name])
    return table


def _generate(model: Any, ids: Tensor) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "acceptance"))
    parser.add_argument(
        "--gsm8k", type=Path, help="of acceptance: GSM8K's train.jsonl, of which held-out questions are asked"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=60, help="skip sets tried by the search")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "cost":
        result = cost(arguments.repeats)
    elif arguments.gsm8k is None:
        parser.error("acceptance needs --gsm8k=PATH of GSM8K's train.jsonl")
    else:
        result = acceptance(arguments.gsm8k, arguments.rows, arguments.candidates)
    provenance = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    console.out(json.dumps({**result, **provenance}), highlight=False)


if __name__ == "__main__":
    main()
