"""Measure the core on the demo target: ratios from one run on one machine, as JSON and a Markdown table.

    python scripts/measure.py --gsm8k PATH [--rows 40] [--output results.json]

Prompts are held out from the target's training: GSM8K questions and functions of the standard library, half each, in
the chat template. Methods are interleaved prompt by prompt, so that a drift of the machine hits all alike. Every figure
is given over all rows and over the rows whose plain greedy text does not end in a loop, because loops inflate
acceptance.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import specdec
from specdec.cache import TreeCache
from specdec.demo.heldout import heldout_functions, heldout_gsm8k
from specdec.generation import plainly, speculation_of
from specdec.loading import Loaded, demo_target
from specdec.metrics import SpeculationStats, ends_in_loop

NEW_TOKENS = 128
NODES = 25
DRAFTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "prompt_lookup": {},
    "token_recycling": {"num_nodes": NODES - 1},
}
DTYPES = ("bfloat16", "float32")
console = Console()


@dataclass
class Tally:
    """Sums of one method over some rows."""

    seconds: float = 0.0
    tokens: int = 0
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def rate(self) -> float:
        """Emitted tokens per second of ``generate``, prefill included."""
        return self.tokens / self.seconds if self.seconds else 0.0


def prompts(gsm8k: Path, rows: int) -> list[str]:
    """Held-out questions and requests for functions, alternating."""
    functions = [function.request for function in heldout_functions()]
    questions = heldout_gsm8k(gsm8k)
    half = rows // 2
    spread = [texts[:: max(len(texts) // half, 1)][:half] for texts in (questions, functions)]
    return [text for pair in zip(*spread, strict=True) for text in pair]


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Greedy continuation of ``ids``."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, do_sample=False, **{"max_new_tokens": NEW_TOKENS, **options})


def run_methods(loaded: dict[str, Loaded], texts: Sequence[str]) -> tuple[dict[str, list[Tally]], list[bool]]:
    """Every method on every prompt, interleaved. Returns tallies per method and row, and which rows loop."""
    methods: dict[str, Callable[[Tensor], Tensor]] = {}
    for dtype in DTYPES:
        model = loaded[dtype].model
        methods[f"generate {dtype}"] = functools.partial(generate, model)
        methods[f"transformers prompt_lookup {dtype}"] = functools.partial(generate, model, prompt_lookup_num_tokens=10)
    fast = loaded["bfloat16"].model
    handles = {}
    for name, options in DRAFTERS.items():
        specdec.speculate(fast, drafter=name, **options)
        handles[name] = speculation_of(fast)
        methods[name] = functools.partial(generate, fast)
    tallies: dict[str, list[Tally]] = {name: [] for name in methods}
    loops = []
    encoded = [loaded["bfloat16"].encode(text) for text in texts]
    for name, method in methods.items():  # warm-up
        with _only(fast, handles.get(name)):
            method(encoded[0])
    for handle in handles.values():
        handle.reset()
    for ids in track(encoded, "methods"):
        for name, method in methods.items():
            with _only(fast, handles.get(name)):
                start = time.perf_counter()
                text = method(ids)
                tally = Tally(time.perf_counter() - start, text.shape[1] - ids.shape[1])
                if name in handles:
                    tally.stats = handles[name].last
                tallies[name].append(tally)
                if name == "generate bfloat16":
                    loops.append(ends_in_loop(text[0, ids.shape[1] :].tolist()))
    specdec.restore(fast)
    return tallies, loops


@contextmanager
def _only(model: Any, handle: Any) -> Iterator[None]:
    """Within the block the model speculates with this handle, or plainly where there is none."""
    if handle is None:
        with plainly(model):
            yield
        return
    current = model.__dict__["_specdec"]
    model.__dict__["_specdec"] = handle
    try:
        yield
    finally:
        model.__dict__["_specdec"] = current


def total(tallies: Sequence[Tally], keep: Sequence[bool]) -> Tally:
    """Sum over the rows to keep."""
    result = Tally()
    for tally, wanted in zip(tallies, keep, strict=True):
        if wanted:
            result.seconds += tally.seconds
            result.tokens += tally.tokens
            result.stats += tally.stats
    return result


def forward_seconds(model: Any, ids: Tensor, widths: Sequence[int], repeats: int = 40) -> dict[int, float]:
    """Median seconds of the raw forward over so many tokens behind ``ids``, with transformers' own cache, in turns."""
    times: dict[int, list[float]] = {width: [] for width in widths}
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for _, width in ((turn, width) for turn in range(repeats) for width in widths):
            new = ids[:, :1].expand(-1, width)
            start = time.perf_counter()
            model(new, past_key_values=cache, use_cache=True)
            times[width].append(time.perf_counter() - start)
            cache.crop(-width)
    return {width: statistics.median(spent) for width, spent in times.items()}


def step_seconds(model: Any, ids: Tensor, repeats: int = 9) -> dict[str, float]:
    """Median seconds per decode step of plain ``generate`` and of ``none``, in turns, without prefill and EOS."""
    steps = 64
    options: dict[str, Any] = {"eos_token_id": None, "max_new_tokens": steps + 1}
    times: dict[str, list[float]] = {"generate": [], "none": []}
    specdec.speculate(model, drafter="none")
    for _ in range(repeats):
        for name, spent in times.items():
            with nullcontext() if name == "none" else plainly(model):
                start = time.perf_counter()
                generate(model, ids, **options)
                middle = time.perf_counter()
                generate(model, ids, **{**options, "max_new_tokens": 1})
                spent.append((2 * middle - start - time.perf_counter()) / steps)
    specdec.restore(model)
    return {name: statistics.median(spent) for name, spent in times.items()}


def loop_share(model: Any, ids: Tensor, mask: Tensor) -> float:
    """Share of the time after the prefill that is not spent inside the model's forward."""
    handle, inside = speculation_of(model), [0.0]
    plain_forward = model.forward

    @functools.wraps(plain_forward)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = plain_forward(*args, **kwargs)
        # Only tree passes count: the prefill, and the head over the prompt, are no part of a step.
        inside[0] += (time.perf_counter() - start) * isinstance(kwargs.get("past_key_values"), TreeCache)
        return result

    shares = []
    model.__dict__["forward"] = timed
    for _ in range(3):
        inside[0] = 0.0
        generate(model, ids, mask, eos_token_id=None)
        seconds = sum(spent for phase, spent in handle.last.seconds.items() if phase != "prefill")
        shares.append(1 - inside[0] / seconds)
    del model.__dict__["forward"]
    return statistics.median(shares)


def identical(loaded: Loaded, texts: Sequence[str]) -> dict[str, Any]:
    """Rows equal to plain ``generate`` in float32, batch 1 and ragged batches of 8."""
    model, result = loaded.model, {}
    encoded = [loaded.encode(text) for text in texts]
    batches = [_batch(encoded[i : i + 8], loaded.tokenizer.pad_token_id) for i in range(0, len(encoded), 8)]
    singles = [(ids, torch.ones_like(ids)) for ids in encoded]
    expected = [[generate(model, *batch) for batch in group] for group in (singles, batches)]
    for name, options in DRAFTERS.items():
        specdec.speculate(model, drafter=name, **options)
        for label, group, plain in zip(("batch 1", "batch 8"), (singles, batches), expected, strict=True):
            equal = [
                sum(bool(torch.equal(a, b)) for a, b in zip(generate(model, *batch), text, strict=True))
                for batch, text in zip(track(group, f"float32, {name}, {label}"), plain, strict=True)
            ]
            result[f"{name}, {label}"] = f"{sum(equal)} of {len(encoded)}"
        specdec.restore(model)
    return result


def _batch(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), width), pad)
    for index, row in enumerate(rows):
        ids[index, width - row.shape[1] :] = row[0]
    lengths = torch.tensor([[row.shape[1]] for row in rows])
    return ids, (torch.arange(width) >= width - lengths).long()


def measure(gsm8k: Path, rows: int) -> dict[str, Any]:
    """Everything, as one JSON-ready dict."""
    loaded = {dtype: demo_target(dtype) for dtype in DTYPES}
    texts = prompts(gsm8k, rows)
    fast = loaded["bfloat16"]
    ids = fast.encode(texts[0])
    tallies, loops = run_methods(loaded, texts)
    middle = torch.cat([ids, generate(fast.model, ids, max_new_tokens=NEW_TOKENS // 2)[:, ids.shape[1] :]], dim=1)
    forward = forward_seconds(fast.model, middle, (1, 11, NODES))
    steps = step_seconds(fast.model, ids)
    specdec.speculate(fast.model, drafter="token_recycling", **DRAFTERS["token_recycling"])
    batch = _batch([fast.encode(text) for text in texts[:8]], fast.tokenizer.pad_token_id)
    shares = {"batch 1": loop_share(fast.model, ids, torch.ones_like(ids)), "batch 8": loop_share(fast.model, *batch)}
    specdec.restore(fast.model)
    everything, calm = [True] * len(loops), [not loop for loop in loops]
    return {
        "rows": len(loops),
        "looping_share": sum(loops) / len(loops),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "forward_ms": {width: 1e3 * seconds for width, seconds in forward.items()},
        "step_ms": {name: 1e3 * seconds for name, seconds in steps.items()},
        "loop_share_at_25_nodes": shares,
        "all_rows": _summary(tallies, everything, forward),
        "non_looping_rows": _summary(tallies, calm, forward),
        "float32_identical": identical(loaded["float32"], texts),
    }


def _summary(
    tallies: dict[str, list[Tally]], keep: Sequence[bool], forward: dict[int, float]
) -> dict[str, dict[str, float]]:
    sums = {name: total(rows, keep) for name, rows in tallies.items()}
    plain = max(sums[f"generate {dtype}"].rate for dtype in DTYPES)
    lookup = max(sums[f"transformers prompt_lookup {dtype}"].rate for dtype in DTYPES)
    table = {}
    for name, tally in sums.items():
        accepted = tally.stats.mean_accepted_tokens
        row = {"speedup_vs_generate": tally.rate / plain, "speedup_vs_transformers_prompt_lookup": tally.rate / lookup}
        if name in DRAFTERS:
            row["mean_accepted_tokens"] = accepted
        if name == "token_recycling":
            # Both sides of this one are bfloat16, as t is.
            own = tally.rate / sums["generate bfloat16"].rate
            row["reached_of_allowed"] = own / (accepted * forward[1] / forward[NODES])
        table[name] = row
    return table


def markdown(result: dict[str, Any]) -> str:
    """The section of the README: non-looping rows first, all rows in brackets."""
    lines = ["| method | mean accepted tokens | vs `generate` | vs transformers' prompt lookup |", "|---|---|---|---|"]
    for name in result["all_rows"]:
        cells = []
        for key in ("mean_accepted_tokens", "speedup_vs_generate", "speedup_vs_transformers_prompt_lookup"):
            pair = [result[rows][name].get(key) for rows in ("non_looping_rows", "all_rows")]
            cells.append("" if pair[0] is None else f"{pair[0]:.2f} ({pair[1]:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    steps, forward, shares = result["step_ms"], result["forward_ms"], result["loop_share_at_25_nodes"]
    recycling = result["non_looping_rows"]["token_recycling"]
    lines += [
        "",
        f"- looping rows: {100 * result['looping_share']:.0f} % of {result['rows']}",
        f"- `token_recycling` reaches {100 * recycling['reached_of_allowed']:.0f} % of what its accepted tokens allow "
        f"(accepted tokens x t(1)/t({NODES}) of the raw bfloat16 forward: t({NODES})/t(1) = "
        f"{forward[NODES] / forward[1]:.2f}), against bfloat16 `generate`",
        f"- a step of `none` takes {steps['none'] / steps['generate']:.3f} of a step of `generate`, bfloat16; the raw "
        f"forward {forward[1] / steps['generate']:.3f}",
        f"- everything but the target's forward: {100 * shares['batch 1']:.1f} % of a step of {NODES} nodes, batch 1, "
        f"and {100 * shares['batch 8']:.1f} % at batch 8",
        "- float32, rows equal to `generate`: "
        + "; ".join(f"{k}: {v}" for k, v in result["float32_identical"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, default=Path("../shared/data/gsm8k/train.jsonl"))
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drafter", action="append", default=[], help="a further name in conf/drafter; repeatable")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    DRAFTERS.update({name: {} for name in arguments.drafter})
    result = measure(arguments.gsm8k, arguments.rows)
    console.print_json(json.dumps(result))
    console.print(markdown(result), markup=False)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
