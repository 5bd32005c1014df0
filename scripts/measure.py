"""Microbenchmarks of the core on the demo target: what a step costs, which ``specdec evaluate`` does not tell.

    python scripts/measure.py --gsm8k PATH [--rows 20] [--output results.json]

Ratios from one run on one machine, as JSON; methods take turns, so that a drift of the machine hits all alike. Prompts
are those of ``data=heldout``. Figures per drafter and task, and losslessness, are ``specdec evaluate``'s.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import specdec
from specdec.cache import TreeCache
from specdec.evaluation.data import Selection, heldout
from specdec.evaluation.methods import Batch, Speculating
from specdec.generation import Speculation, speculation_of, using
from specdec.loading import Loaded, demo_target
from specdec.metrics import PHASES

NEW_TOKENS = 128
NODES = 25


def generate(model: Any, batch: Batch, **options: Any) -> Tensor:
    """Greedy continuation of a batch."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)


def attached(model: Any, drafter: str, **options: Any) -> Speculation:
    """The speculation of a drafter; the model is plain again."""
    specdec.speculate(model, drafter=drafter, **options)
    handle = speculation_of(model)
    specdec.restore(model)
    return handle


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


def step_seconds(model: Any, batch: Batch, repeats: int = 9) -> dict[str, float]:
    """Median seconds per decode step of plain ``generate`` and of ``none``, in turns, without prefill and EOS."""
    steps = 64
    options: dict[str, Any] = {"eos_token_id": None, "max_new_tokens": steps + 1}
    modes = {"generate": None, "none": attached(model, "none")}
    times: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(repeats):
        for name, handle in modes.items():
            with using(model, handle):
                start = time.perf_counter()
                generate(model, batch, **options)
                middle = time.perf_counter()
                generate(model, batch, **{**options, "max_new_tokens": 1})
                times[name].append((2 * middle - start - time.perf_counter()) / steps)
    return {name: statistics.median(spent) for name, spent in times.items()}


def loop_share(model: Any, handle: Speculation, batch: Batch) -> float:
    """Share of the time after the prefill that is not spent inside the model's forward."""
    inside = [0.0]
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
    with using(model, handle):
        for _ in range(3):
            inside[0] = 0.0
            generate(model, batch, eos_token_id=None)
            seconds = sum(handle.last.seconds[phase] for phase in PHASES if phase != "prefill")
            shares.append(1 - inside[0] / seconds)
    del model.__dict__["forward"]
    return statistics.median(shares)


def harness_ratio(model: Any, handle: Speculation, batches: Sequence[Batch]) -> float:
    """Tokens per second as an evaluation measures them, over those of bare ``generate`` calls: cold, in turns."""
    method = Speculating(handle.drafter.name, model, handle, {model.generation_config.eos_token_id})
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    bare, measured = [], []
    for turn, batch in enumerate(batches):
        for harness in (turn % 2, 1 - turn % 2):
            method.forget()
            if harness:
                measured.append(sum(text.seconds for text in method.generate(batch, options)))
                continue
            with using(model, handle):
                start = time.perf_counter()
                generate(model, batch)
                bare.append(time.perf_counter() - start)
    return statistics.median(a / b for a, b in zip(bare, measured, strict=True))


def measure(gsm8k: Path, rows: int) -> dict[str, Any]:
    """Everything, as one JSON-ready dict."""
    loaded: Loaded = demo_target("bfloat16")
    model, pad = loaded.model, loaded.tokenizer.pad_token_id
    questions = Selection(limit=rows, sample=True)(heldout(str(gsm8k)))
    prompts = [loaded.encode(question.turns[0]) for question in questions]
    batches = [Batch.of([prompt], pad) for prompt in prompts]
    text = generate(model, batches[0], max_new_tokens=NEW_TOKENS // 2)
    forward = forward_seconds(model, text, (1, 11, NODES))
    steps = step_seconds(model, batches[0])
    handles = {name: attached(model, name) for name in ("none", "prompt_lookup")}
    handles["token_recycling"] = attached(model, "token_recycling", num_nodes=NODES - 1)
    recycling = handles["token_recycling"]
    return {
        "prompts": len(prompts),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "forward_ms": {width: 1e3 * seconds for width, seconds in forward.items()},
        "forward_ratio": {width: seconds / forward[1] for width, seconds in forward.items()},
        "step_of_none_over_generate": steps["none"] / steps["generate"],
        "forward_share_of_a_step_of_generate": forward[1] / steps["generate"],
        f"share_outside_the_forward_at_{NODES}_nodes": {
            "batch 1": loop_share(model, recycling, batches[0]),
            "batch 8": loop_share(model, recycling, Batch.of(prompts[:8], pad)),
        },
        "evaluation_over_bare_generate": {
            name: harness_ratio(model, handle, batches) for name, handle in handles.items()
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.gsm8k, arguments.rows)
    Console().print_json(json.dumps(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
