"""What a chosen tree is worth: published, tuned and adaptive trees of a drafter on the demo target, in turns.

    python scripts/measure_trees.py --drafter token_recycling --tree my_tree.yaml --gsm8k train.jsonl [--rows 20]
        [--threads 2] [--compile] [--output results.json]

Two measurements from one process, in which the methods take turns on every prompt, so that a drift of the machine hits
all alike:

- ``heldout``: prompts that neither the target nor the tuning has seen, one request each.
- ``stream``: one request after another whose text changes character: a question of arithmetic, a function to write, a
  text to be copied. Drafters and adaptive trees keep what they know from request to request.

Tokens per second of whole calls, ratios to the drafter's own tree, and their medians over prompts; rows whose greedy
text ends in a loop are left out of ``heldout`` and counted. ``published`` is the method's published tree where it is
not the drafter's default.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import specdec
from specdec.adaptive import Adaptive
from specdec.evaluation.data import Selection, heldout
from specdec.evaluation.methods import all_graphs
from specdec.evaluation.provenance import provenance
from specdec.generation import Speculation, restore, speculation_of, using
from specdec.graphs.passes import makings
from specdec.loading import Loaded, demo_target
from specdec.metrics import ends_in_loop
from specdec.tuning.files import TreeFile

PUBLISHED: dict[str, dict[str, Any]] = {"token_recycling": {"num_nodes": 80}, "medusa": {"tree": "mc_sim_7b_63"}}
STREAM = ("math", "code", "copy")


@dataclass
class Method:
    """One way to decode, and what it took."""

    name: str
    handle: Speculation | None
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    choosing_s: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(self.tokens) / sum(self.seconds)

    def clear(self) -> None:
        """Forget what was measured, and what the drafter learnt."""
        self.seconds, self.tokens, self.choosing_s = [], [], 0.0
        if self.handle is not None:
            self.handle.reset()


def methods(model: Any, drafter: str, path: str, compiled: bool) -> list[Method]:
    """``generate``, the plain loop, and the drafter with each of its trees."""
    wanted: dict[str, dict[str, Any]] = {"own": {}}
    if drafter in PUBLISHED:
        wanted["published"] = PUBLISHED[drafter]
    wanted |= {
        "tuned": {"tree": path},
        "adaptive": {"tree": "adaptive"},
        "adaptive from tuned": {"tree": {"_target_": "specdec.adaptive.Adaptation", "path": path}},
    }
    found = [Method("generate", None), Method("plain loop", _attached(model, "none", compiled))]
    found += [Method(name, _attached(model, drafter, compiled, **options)) for name, options in wanted.items()]
    for method in found:
        if method.handle is not None and isinstance(method.handle.drafter, Adaptive):
            _time_choices(method, method.handle.drafter)
    return found


def _attached(model: Any, drafter: str, compiled: bool, **options: Any) -> Speculation:
    handle = speculation_of(specdec.speculate(model, drafter, compile=compiled, **options))
    restore(model)
    return handle


def _time_choices(method: Method, drafter: Adaptive) -> None:
    choose = drafter._choose

    def timed(*arguments: Any) -> bool:
        start = time.perf_counter()
        changed = choose(*arguments)
        method.choosing_s += time.perf_counter() - start
        return changed

    drafter._choose = timed  # type: ignore[method-assign,assignment]


def decode(model: Any, method: Method, ids: Tensor, new_tokens: int) -> Tensor:
    """One request, timed."""
    with using(model, method.handle):
        start = time.perf_counter()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        method.seconds.append(time.perf_counter() - start)
    method.tokens.append(text.shape[1] - ids.shape[1])
    return text[0, ids.shape[1] :]


def in_turns(model: Any, contenders: Sequence[Method], prompts: Sequence[Tensor], new_tokens: int) -> list[bool]:
    """All methods on all prompts; whether each text loops, by plain decoding."""
    for method in contenders:  # warm-up: graphs of every size, pass times, the allocator
        with nullcontext() if method.handle is None else all_graphs(method.handle):
            decode(model, method, prompts[0], 2 * new_tokens)
        method.clear()
    loops, made = [], makings()
    shuffled = random.Random(0)
    for ids in prompts:
        # Not in turns that repeat: who comes after a large tree finds its memory mapped, and is a twentieth quicker.
        order = shuffled.sample(contenders, len(contenders))
        texts = {method.name: decode(model, method, ids, new_tokens) for method in order}
        loops.append(ends_in_loop(texts["generate"].tolist()))
    assert makings() == made, "a graph was made in a timed call"
    return loops


def figures(contenders: Sequence[Method], kept: Sequence[int]) -> dict[str, Any]:
    """Per method over the prompts that are kept: tokens/s, ratios to the drafter's own tree, what adapting took."""
    own = next(method for method in contenders if method.name == "own")
    said = {}
    for method in contenders:
        tokens, seconds = sum(method.tokens[i] for i in kept), sum(method.seconds[i] for i in kept)
        base = sum(own.tokens[i] for i in kept) / sum(own.seconds[i] for i in kept)
        by_prompt = [
            (method.tokens[i] / method.seconds[i]) / (own.tokens[i] / own.seconds[i]) for i in kept if own.tokens[i]
        ]
        said[method.name] = {
            "tokens_per_second": tokens / seconds,
            "over_own_tree": tokens / seconds / base,
            "median_over_own_tree": statistics.median(by_prompt),
            "mean_accepted_tokens": None if method.handle is None else method.handle.stats.mean_accepted_tokens,
            "nodes": None if method.handle is None else method.handle.stats.nodes_per_verification,
            "choosing_share": method.choosing_s / sum(method.seconds),
        }
    return said


def copying(question: str) -> str:
    """A request whose answer repeats a text."""
    return f"Repeat this text word for word, three times:\n{question}\n{question}\n{question}"


def stream_of(loaded: Loaded, questions: Sequence[Any]) -> list[Tensor]:
    """Requests of changing character, two of a kind one after another."""
    by_kind = {kind: [item.turns[0] for item in questions if item.category == kind] for kind in ("math", "code")}
    by_kind["copy"] = [copying(text) for text in by_kind["math"][::-1]]
    pairs = min(len(texts) for texts in by_kind.values()) // 2
    order = ((by_kind[kind][2 * pair + step]) for pair in range(pairs) for kind in STREAM for step in range(2))
    return [loaded.encode(text) for text in order]


def show(console: Console, title: str, said: dict[str, Any]) -> None:
    """A table of one measurement."""
    table = Table(title=title, title_justify="left")
    for name in ("method", "tokens/s", "over own tree", "median", "accepted", "nodes", "choosing"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, row in said.items():
        accepted = "" if row["mean_accepted_tokens"] is None else f"{row['mean_accepted_tokens']:.2f}"
        nodes = "" if row["nodes"] is None else f"{row['nodes']:.1f}"
        cells = (f"{row['tokens_per_second']:.1f}", f"{row['over_own_tree']:.3f}", f"{row['median_over_own_tree']:.3f}")
        table.add_row(name, *cells, accepted, nodes, f"{row['choosing_share']:.2%}")
    console.print(table)


def main() -> None:
    """Measure and print; the last line of standard output is JSON where no file is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drafter", default="token_recycling")
    parser.add_argument("--tree", required=True, help="a file of specdec tune")
    parser.add_argument("--gsm8k", required=True, help="GSM8K's train.jsonl, of which held-out questions are asked")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    console, loaded = Console(stderr=True), demo_target(options.dtype)
    model = loaded.model
    contenders = methods(model, options.drafter, options.tree, options.compile)
    questions = Selection(limit=options.rows, sample=True)(heldout(options.gsm8k))
    said: dict[str, Any] = {
        "provenance": provenance(loaded, ["python", *sys.argv], {}, None, []),
        "drafter": options.drafter,
        "paths": [list(path) for path in TreeFile.read(options.tree).paths],
    }
    prompts = [loaded.encode(question.turns[0]) for question in questions]
    loops = in_turns(model, contenders, prompts, options.new_tokens)
    kept = [index for index, looping in enumerate(loops) if not looping]
    if not kept:
        raise SystemExit(f"all {len(loops)} texts end in a loop; expected more rows or shorter answers")
    said["heldout"] = {"prompts": len(prompts), "looping": sum(loops), "methods": figures(contenders, kept)}
    show(
        console,
        f"{options.drafter}, held-out prompts: {len(kept)} of {len(prompts)} do not loop",
        said["heldout"]["methods"],
    )
    stream = stream_of(loaded, questions)
    if stream:
        in_turns(model, contenders, stream, options.new_tokens)
        said["stream"] = {"requests": len(stream), "methods": figures(contenders, range(len(stream)))}
        show(
            console,
            f"{options.drafter}, a stream of {len(stream)} requests: {', '.join(STREAM)}",
            said["stream"]["methods"],
        )
    text = json.dumps(said, indent=None if options.output is None else 1)
    if options.output is None:
        print(text)  # noqa: T201 - the result
    else:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
