"""What a chosen tree is worth: published, tuned and adaptive trees of a drafter on the demo target, in turns.

    python scripts/measure_trees.py --drafter token_recycling --tree my_tree.yaml --gsm8k train.jsonl [--rows 20]
        [--set shape=chain] [--twice] [--only NAME ...] [--threads 2] [--compile] [--output results.json]

Two measurements from one process, in which the methods take turns on every prompt, in a drawn order, so that a drift of
the machine hits all alike:

- ``heldout``: prompts that neither the target nor the tuning has seen, one request each.
- ``stream``: one request after another whose text changes character: greedy answers (``answer``), answers drawn at a
  temperature of 1.5 (``hot``), answers that must be twice as long, most of which come to repeat themselves (``long``),
  and answers to a question that stands answered above already, which are mostly copied (``again``). Drafters and
  adaptive trees keep what they know from request to request.

Two figures are told, with the ratio to the tuned tree: tokens per second of whole calls, whose interval is the one that
95 % of paired resamplings of the requests fall into; and of steady steps, where a step of a size takes as long as such
steps usually do, with whatever tree they were, and what adapting took is added as it was measured, so that neither the
machine's drift is in it nor what other work on the machine did to a method. Rows whose greedy text ends in a loop are
left out of ``heldout`` and counted. ``published`` is the method's published tree where it is not the drafter's default.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

import specdec
from specdec.adaptive import Adaptive
from specdec.decoding import Step
from specdec.evaluation.data import Selection, heldout
from specdec.evaluation.methods import all_graphs
from specdec.evaluation.provenance import provenance
from specdec.generation import Speculation, restore, speculation_of, using
from specdec.graphs.passes import makings
from specdec.interfaces import DecodeState
from specdec.loading import Loaded, demo_target
from specdec.metrics import ends_in_loop
from specdec.tuning.files import TreeFile

PUBLISHED: dict[str, dict[str, Any]] = {"token_recycling": {"num_nodes": 80}, "medusa": {"tree": "mc_sim_7b_63"}}
ADAPTIVE = "adaptive from tuned"
STREAM = ("answer", "hot", "long", "again")
RESAMPLES, INTERVAL = 10_000, (2.5, 97.5)


@dataclass(frozen=True)
class Request:
    """One prompt, ``ids [1, W]``, with what ``generate`` is told."""

    ids: Tensor
    options: dict[str, Any]
    kind: str = STREAM[0]


@dataclass
class Method:
    """One way to decode, and what it took."""

    name: str
    handle: Speculation | None
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    adapting_s: float = 0.0
    steps: list[list[tuple[int, float]]] = field(default_factory=list)
    _clock: float = 0.0
    _told: float = 0.0

    def see(self, state: DecodeState, step: Step) -> None:  # noqa: ARG002 - an observer's signature
        """Note the nodes of a step and its seconds, adapting left out, by request."""
        now = time.perf_counter()
        if step.tree is None:
            self.steps.append([])
        else:
            self.steps[-1].append((step.tree.num_nodes, now - self._clock - (self.adapting_s - self._told)))
        self._clock, self._told = time.perf_counter(), self.adapting_s

    def steady(self, usual: Mapping[int, float]) -> np.ndarray:
        """float64 ``[requests]``: seconds of each one's steps if steps of a size took as long as they usually do."""
        spent = np.array([sum(usual[nodes] for nodes, _ in steps) for steps in self.steps], float)
        return spent * (1 + self.adapting_s / max(spent.sum(), 1e-9))

    def clear(self) -> None:
        """Forget what was measured, and what the drafter learnt."""
        self.seconds, self.tokens, self.steps, self.adapting_s = [], [], [], 0.0
        self._told = 0.0
        if self.handle is not None:
            self.handle.reset()


def methods(model: Any, drafter: str, own: dict[str, Any], path: str, compiled: bool) -> list[Method]:
    """``generate``, the plain loop, and the drafter, with options of its own, with each of its trees."""
    wanted: dict[str, dict[str, Any]] = {"own": {}}
    if drafter in PUBLISHED:
        wanted["published"] = PUBLISHED[drafter]
    wanted |= {
        "tuned": {"tree": path},
        "adaptive": {"tree": "adaptive"},
        ADAPTIVE: {"tree": {"_target_": "specdec.adaptive.Adaptation", "path": path}},
    }
    found = [Method("generate", None), Method("plain loop", _attached(model, "none", compiled))]
    found += [Method(name, _attached(model, drafter, compiled, **own, **options)) for name, options in wanted.items()]
    for method in found:
        if method.handle is not None and isinstance(method.handle.drafter, Adaptive):
            _time_adapting(method, method.handle.drafter)
    return [_watched(method) for method in found]


def _attached(model: Any, drafter: str, compiled: bool, **options: Any) -> Speculation:
    handle = speculation_of(specdec.speculate(model, drafter, compile=compiled, **options))
    restore(model)
    return handle


def _watched(method: Method) -> Method:
    if method.handle is not None:
        method.handle.observers.append(method.see)
    return method


def _time_adapting(method: Method, drafter: Adaptive) -> None:
    """What proposing and updating take beyond the drafter's own part."""
    for name in ("propose", "update"):
        setattr(drafter, name, _adding(method, getattr(drafter, name), 1.0))
        setattr(drafter.drafter, name, _adding(method, getattr(drafter.drafter, name), -1.0))


def _adding(method: Method, call: Callable[..., Any], sign: float) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        found = call(*arguments)
        method.adapting_s += sign * (time.perf_counter() - start)
        return found

    return timed


def decode(model: Any, method: Method, request: Request) -> Tensor:
    """One request, timed."""
    ids = request.ids
    torch.manual_seed(0)
    with using(model, method.handle):
        start = time.perf_counter()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **request.options)
        method.seconds.append(time.perf_counter() - start)
    method.tokens.append(text.shape[1] - ids.shape[1])
    return text[0, ids.shape[1] :]


def in_turns(model: Any, contenders: Sequence[Method], requests: Sequence[Request]) -> list[bool]:
    """All methods on all requests; whether each text loops, by plain decoding."""
    for method in contenders:  # warm-up: graphs of every size, pass times, the allocator
        with nullcontext() if method.handle is None else all_graphs(method.handle):
            decode(model, method, long_one(requests[0]))
        method.clear()
    loops, made = [], makings()
    shuffled = random.Random(0)
    for request in requests:
        # Not in turns that repeat: who comes after a large tree finds its memory mapped, and is a twentieth quicker.
        order = shuffled.sample(contenders, len(contenders))
        texts = {method.name: decode(model, method, request) for method in order}
        loops.append(ends_in_loop(texts["generate"].tolist()))
    assert makings() == made, "a graph was made in a timed call"
    return loops


def figures(contenders: Sequence[Method], kept: Sequence[int]) -> dict[str, Any]:
    """Per method over the requests that are kept: tokens/s, ratios to two of them, what adapting took."""
    # [methods, 2, requests]: tokens, seconds
    each = {method.name: np.array([method.tokens, method.seconds], float)[:, list(kept)] for method in contenders}
    draws = np.random.default_rng(0).integers(len(kept), size=(RESAMPLES, len(kept)))

    def rate(name: str, drawn: np.ndarray | None = None) -> Any:
        tokens, seconds = each[name].sum(1) if drawn is None else each[name][:, drawn].sum(2)
        return tokens / seconds

    said, tuned = {}, next(method for method in contenders if method.name == "tuned")
    for method in contenders:
        name, stats = method.name, None if method.handle is None else method.handle.stats
        resampled = rate(name, draws) / rate("tuned", draws)
        steady = None if method.handle is None else steady_ratio(contenders, [method], [tuned], kept)
        said[name] = {
            "tokens_per_second": float(rate(name)),
            "over_own_tree": float(rate(name) / rate("own")),
            "over_tuned": float(rate(name) / rate("tuned")),
            "interval": np.percentile(resampled, INTERVAL).round(4).tolist(),
            "steady_over_tuned": steady,
            "mean_accepted_tokens": None if stats is None else stats.mean_accepted_tokens,
            "nodes": None if stats is None else stats.nodes_per_verification,
            "adapting_share": method.adapting_s / sum(method.seconds),
        }
    return said


def of_both(contenders: Sequence[Method], kept: Sequence[int]) -> dict[str, Any] | None:
    """Two copies of the adaptive tree over two of the tuned one, and how far copies differ; None without copies."""
    found = {method.name: method for method in contenders}
    pairs = [[found.get(name), found.get(f"{name}, again")] for name in (ADAPTIVE, "tuned")]
    ours, theirs = ([method for method in pair if method is not None] for pair in pairs)
    if len(ours) + len(theirs) < 4:
        return None
    # [adaptive, tuned][2, requests]: tokens, seconds
    at = list(kept)
    whole = [np.sum([np.array([m.tokens, m.seconds], float)[:, at] for m in pair], 0) for pair in (ours, theirs)]
    draws = np.random.default_rng(0).integers(len(kept), size=(RESAMPLES, len(kept)))
    resampled = [tokens[draws].sum(1) / seconds[draws].sum(1) for tokens, seconds in whole]
    rates = [tokens.sum() / seconds.sum() for tokens, seconds in whole]
    return {
        "over_tuned": float(rates[0] / rates[1]),
        "interval": np.percentile(resampled[0] / resampled[1], INTERVAL).round(4).tolist(),
        "steady_over_tuned": steady_ratio(contenders, ours, theirs, kept),
        "copies_differ": {
            first.name: float((sum(again.tokens) / sum(again.seconds)) / (sum(first.tokens) / sum(first.seconds)))
            for first, again in (ours, theirs)
        },
    }


def steady_ratio(
    contenders: Sequence[Method], ours: Sequence[Method], theirs: Sequence[Method], kept: Sequence[int]
) -> float:
    """Tokens per second of undisturbed steps, of some methods over those of others.

    A step of a size takes as long as such steps usually do, whoever of those that draft ran them: the mean without the
    slowest tenth. What adapting took is added as it was.
    """
    by_size = defaultdict(list)
    for method in contenders:
        if method.handle is not None and (method.name != "plain loop" or method in ours):
            for nodes, seconds in itertools.chain(*method.steps):
                by_size[nodes].append(seconds)
    usual = {nodes: float(np.mean(np.sort(times)[: -(-9 * len(times) // 10)])) for nodes, times in by_size.items()}

    def rate(methods: Sequence[Method]) -> float:
        at = list(kept)
        tokens = sum(np.array(method.tokens)[at].sum() for method in methods)
        return float(tokens / sum(method.steady(usual)[at].sum() for method in methods))

    return rate(ours) / rate(theirs)


def by_kind(contenders: Sequence[Method], requests: Sequence[Request]) -> dict[str, dict[str, float]]:
    """Kind -> method -> tokens per second over those of the tuned tree."""
    of_kind = {kind: [i for i, request in enumerate(requests) if request.kind == kind] for kind in STREAM}
    rates = {
        kind: {each.name: sum(each.tokens[i] for i in at) / sum(each.seconds[i] for i in at) for each in contenders}
        for kind, at in of_kind.items()
    }
    whole = {kind: {name: rate / found["tuned"] for name, rate in found.items()} for kind, found in rates.items()}
    tuned = next(method for method in contenders if method.name == "tuned")
    for kind, at in of_kind.items():
        for each in contenders:
            if each.handle is not None:
                whole[kind][f"{each.name}, steady"] = steady_ratio(contenders, [each], [tuned], at)
    return whole


def long_one(request: Request) -> Request:
    """As long as any, and past every end."""
    length = 2 * request.options["max_new_tokens"]
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    return Request(request.ids, options, STREAM[2])


def asked_again(loaded: Loaded, question: str, request: Request) -> Request:
    """The question once more, behind itself and the answer that it got."""
    ids = request.ids
    text = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **request.options)[0, ids.shape[1] :]
    answer = loaded.tokenizer.decode(text, skip_special_tokens=True)
    turns = [("user", question), ("assistant", answer), ("user", question)]
    return Request(loaded.encode([{"role": role, "content": said} for role, said in turns]), request.options, "again")


def stream_of(loaded: Loaded, questions: Sequence[str], requests: Sequence[Request]) -> list[Request]:
    """Requests of changing character, two of a kind one after another."""
    hot = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    made = []
    for index, (question, request) in enumerate(zip(questions, requests, strict=True)):
        kind = STREAM[index // 2 % len(STREAM)]
        if kind == "hot":
            request = Request(request.ids, request.options | hot, kind)
        elif kind == "again":
            request = asked_again(loaded, question, request)
        made.append(long_one(request) if kind == "long" else request)
    return made


def show(console: Console, title: str, said: dict[str, Any]) -> None:
    """A table of one measurement."""
    table = Table(title=title, title_justify="left")
    for name in (
        "method",
        "tokens/s",
        "over own tree",
        "over tuned",
        "95 %",
        "steady",
        "accepted",
        "nodes",
        "adapting",
    ):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, row in said.items():
        accepted = "" if row["mean_accepted_tokens"] is None else f"{row['mean_accepted_tokens']:.2f}"
        nodes = "" if row["nodes"] is None else f"{row['nodes']:.1f}"
        cells = [f"{row['tokens_per_second']:.1f}", f"{row['over_own_tree']:.3f}", f"{row['over_tuned']:.3f}"]
        cells.append("{:.3f} to {:.3f}".format(*row["interval"]))
        cells.append("" if row["steady_over_tuned"] is None else f"{row['steady_over_tuned']:.3f}")
        table.add_row(name, *cells, accepted, nodes, f"{row['adapting_share']:.2%}")
    console.print(table)


def main() -> None:
    """Measure and print; the last line of standard output is JSON where no file is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drafter", default="token_recycling")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of the drafter")
    parser.add_argument("--tree", required=True, help="a file of specdec tune")
    parser.add_argument("--gsm8k", required=True, help="GSM8K's train.jsonl, of which held-out questions are asked")
    parser.add_argument("--twice", action="store_true", help="two of the tuned and the adaptive tree: what is chance")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="these, generate, own and tuned")
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
    own = {name: yaml.safe_load(value) for name, _, value in (option.partition("=") for option in options.set)}
    made = partial(methods, model, options.drafter, own, options.tree, options.compile)
    contenders = made()
    if options.twice:
        for method in made():
            if method.name in ("tuned", ADAPTIVE):
                method.name += ", again"
                contenders.append(method)
    if options.only:
        wanted = {
            "generate",
            "own",
            "tuned",
            "tuned, again",
            *options.only,
            *(f"{name}, again" for name in options.only),
        }
        contenders = [method for method in contenders if method.name in wanted]
    questions = Selection(limit=options.rows, sample=True)(heldout(options.gsm8k))
    said: dict[str, Any] = {
        "provenance": provenance(loaded, ["python", *sys.argv], {}, None, []),
        "drafter": options.drafter,
        "paths": [list(path) for path in TreeFile.read(options.tree).paths],
    }
    greedy = {"max_new_tokens": options.new_tokens, "do_sample": False}
    requests = [Request(loaded.encode(question.turns[0]), greedy) for question in questions]
    loops = in_turns(model, contenders, requests)
    kept = [index for index, looping in enumerate(loops) if not looping]
    if not kept:
        raise SystemExit(f"all {len(loops)} texts end in a loop; expected more rows or shorter answers")
    said["heldout"] = {
        "prompts": len(requests),
        "looping": sum(loops),
        "methods": figures(contenders, kept),
        "both_copies": of_both(contenders, kept),
    }
    show(
        console,
        f"{options.drafter}, held-out prompts: {len(kept)} of {len(requests)} do not loop",
        said["heldout"]["methods"],
    )
    stream = stream_of(loaded, [question.turns[0] for question in questions], requests)
    in_turns(model, contenders, stream)
    said["stream"] = {
        "requests": len(stream),
        "methods": figures(contenders, range(len(stream))),
        "both_copies": of_both(contenders, range(len(stream))),
        "over_tuned_by_kind": by_kind(contenders, stream),
    }
    show(
        console,
        f"{options.drafter}, a stream of {len(stream)} requests: {', '.join(STREAM)}",
        said["stream"]["methods"],
    )
    console.print(said["stream"]["over_tuned_by_kind"])
    for name in ("heldout", "stream"):
        console.print(name, "both copies:", said[name]["both_copies"])
    text = json.dumps(said, indent=None if options.output is None else 1)
    if options.output is None:
        print(text)  # noqa: T201 - the result
    else:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
