"""Speculative text for a prompt, coloured by who proposed each token; compare=true runs it plainly as well."""

from __future__ import annotations

import time
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from specdec.audit import Audit, audit
from specdec.commands._session import Session
from specdec.demo.view import PlainStream, SpeculativeView, comparison, legend, verdict
from specdec.generation import plainly, speculation_of


def run(config: DictConfig) -> int:
    """Decode every prompt. Returns 1 where a compared text is neither identical nor a near-tie."""
    session, console = Session(config), Console(record=config.picture is not None)
    ids = [session.loaded.encode(prompt, config.chat) for prompt in session.prompts()]
    session.speculate()
    code = (_compare if config.compare else _show)(session, console, ids)
    if config.picture is not None:
        console.save_svg(config.picture, title="specdec")
    return code


def _show(session: Session, console: Console, ids: list[Tensor]) -> int:
    for prompt, row in zip(session.prompts(), ids, strict=True):
        console.rule(escape(prompt.splitlines()[0][:70]), align="left")
        _speculative(session, console, row)
    handle = speculation_of(session.model)
    console.print(legend(handle.drafter.name))
    stats = handle.stats
    console.print(f"{stats.mean_accepted_tokens:.2f} mean accepted tokens, {stats.tokens_per_second:.0f} tokens/s")
    return 0


def _compare(session: Session, console: Console, ids: list[Tensor]) -> int:
    handle = speculation_of(session.model)
    plain, plain_seconds, tokens = [], 0.0, [0, 0]
    with plainly(session.model):
        session.generate(ids[0])  # warm-up: the first passes of a process pay for its allocations
        for prompt, row in zip(session.prompts(), ids, strict=True):
            console.rule(f"plain: {escape(prompt.splitlines()[0][:60])}", align="left")
            view = PlainStream(console, session.loaded.tokenizer)
            start = time.perf_counter()
            output = session.generate(row, streamer=view, return_dict_in_generate=True, output_logits=True)
            plain_seconds += time.perf_counter() - start - view.seconds
            tokens[0] += output.sequences.shape[1] - row.shape[1]
            plain.append(output)
    session.generate(ids[0])
    handle.reset()
    console.print(legend(handle.drafter.name))
    seconds, ours = 0.0, []
    for prompt, row in zip(session.prompts(), ids, strict=True):
        console.rule(f"{handle.drafter.name}: {escape(prompt.splitlines()[0][:60])}", align="left")
        text, spent = _speculative(session, console, row)
        seconds += spent
        tokens[1] += text.shape[1] - row.shape[1]
        ours.append(text)
    console.print(comparison(plain_seconds, seconds, (tokens[0], tokens[1]), handle.stats))
    if session.options()["do_sample"]:
        console.print(
            "sampled texts follow the same law but differ from plain's: the random numbers are drawn otherwise"
        )
        return 0
    result = _audit(session, ids, plain, ours)
    for line in verdict(
        result, lambda token: session.loaded.tokenizer.decode([token]) if token >= 0 else "end of text"
    ):
        console.print(line)
    return 1 if result.mismatches and handle.stats.lossless else 0


def _speculative(session: Session, console: Console, row: Tensor) -> tuple[Tensor, float]:
    handle = speculation_of(session.model)
    view = SpeculativeView(console, session.loaded.tokenizer)
    handle.observers = [view.observe]
    start = time.perf_counter()
    text = session.generate(row)
    spent = time.perf_counter() - start - view.seconds
    handle.observers = []
    view.end()
    return text, spent


def _audit(session: Session, ids: list[Tensor], plain: list[Any], ours: list[Tensor]) -> Audit:
    texts = iter(zip(plain, ours, strict=True))
    pair: dict[str, Any] = {}

    def plain_text(_: Tensor) -> tuple[Tensor, Tensor]:
        output, pair["ours"] = next(texts)
        return output.sequences, torch.stack([step[0] for step in output.logits])

    return audit(session.model, ids, plain_text, lambda _: pair["ours"])
