"""Measure what a round of Kangaroo costs, beside what the weight bytes that it reads predict.

    python scripts/measure_kangaroo.py [--target demo] [--repeats 20] [--threads 2]

A round drafts k tokens as a chain and verifies them. Predicted: ``Kangaroo.round_cost``, (k E + L) / L of the layers'
bytes and k times those of head and adapter, over one plain pass. Measured: the time of draft and verification over that
of a plain pass, all taken in turns within one process. Beside it stands what this machine adds to the bytes: a plain
pass over k + 1 tokens, which the prediction takes for one over a single token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import specdec
from drafters.kangaroo import Kangaroo
from measure_swift import deep_llama
from specdec.interfaces import DecodeState
from specdec.loading import demo_target
from specdec.routing import FULL, Route
from specdec.tree import TokenTree, chain, root_only

console = Console()
PROMPT = 128


class Probe(Kangaroo):
    """In the middle of a request: times drafts of several lengths and their verifications, in turns."""

    name = "probe"

    def __init__(self, lengths: list[int], repeats: int, path: str | None) -> None:
        super().__init__(path=path, num_draft_tokens=max(lengths), confidence=0.0)
        self.lengths, self.repeats = lengths, repeats
        self.seconds: dict[tuple[str, int], list[float]] = {}
        self._done = False

    def propose(self, state: DecodeState) -> TokenTree:
        if not self._done:
            self._done = True
            for _ in track(range(self.repeats), "rounds"):
                self._once(state)
        return root_only(state.root)

    def _once(self, state: DecodeState) -> None:
        """Nothing of it is committed: every repeat writes the same slots behind the committed tokens."""
        target, context = self._target, state.context
        assert target is not None
        assert context is not None
        self._time(("plain", 1), partial(target.run, context, root_only(state.root), route=FULL))
        for k in self.lengths:
            self.num_draft_tokens = k
            tree = self._time(("draft", k), partial(Kangaroo.propose, self, state))
            assert tree.entry is not None
            layer, states = tree.entry
            bare = TokenTree(tree.token_ids, chain(k + 1, tree.token_ids.device))
            self._time(("verify", k), partial(target.run, context, bare, route=Route(lo=layer), states=states))
            self._time(("plain", k + 1), partial(target.run, context, bare, route=FULL))
        self._fed = []

    def _time(self, what: tuple[str, int], job: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.setdefault(what, []).append(time.perf_counter() - start)
        return result


def measure(name: str, model: Any, lengths: list[int], repeats: int, path: str | None) -> dict[str, Any]:
    """The table of one model, and its figures."""
    probe = Probe(lengths, repeats, path)
    specdec.speculate(model, probe)
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(lengths) + 4, do_sample=False)
    # Of each: the quartile of the quickest, which other work on the machine disturbs least.
    quick = {what: statistics.quantiles(spent, n=4)[0] for what, spent in probe.seconds.items()}
    plain = quick["plain", 1]
    table = Table(
        "k", "predicted", "measured", "draft", "verify", "plain pass over k + 1", title=f"{name}, plain pass = 1"
    )
    figures = {}
    for k in lengths:
        parts = {part: quick[part, k] / plain for part in ("draft", "verify")}
        block = quick["plain", k + 1] / plain
        predicted, measured = probe.round_cost(k), sum(parts.values())
        figures[k] = {"predicted": predicted, "measured": measured, **parts, "plain_block": block}
        table.add_row(str(k), *(f"{value:.3f}" for value in (predicted, measured, *parts.values(), block)))
    console.print(table)
    specdec.restore(model)
    sizes = {"exit_layer": probe._layer, "layers": model.config.num_hidden_layers, "plain_ms": 1e3 * plain}
    return {**sizes, "rounds": figures}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("deep", "demo"), nargs="+", default=["deep", "demo"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--path", help="of an adapter for the demo target; the deep one gets a random adapter")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    for name in arguments.target:
        torch.manual_seed(0)
        model = deep_llama() if name == "deep" else demo_target("bfloat16").model
        path = arguments.path if name == "demo" else "new"
        results[name] = measure(name, model, arguments.lengths, arguments.repeats, path)
    provenance = {"threads": torch.get_num_threads(), "torch": torch.__version__, "repeats": arguments.repeats}
    console.out(json.dumps({**results, **provenance}), highlight=False)


if __name__ == "__main__":
    main()
