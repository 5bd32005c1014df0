"""Speculative text for a prompt, coloured by who proposed each token; compare=true runs it plainly as well."""

from __future__ import annotations

import re
import time
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from specdec.audit import audit
from specdec.commands._session import Session
from specdec.demo.view import LOSSY, PlainStream, SpeculativeView, comparison, legend, verdict
from specdec.generation import plainly, speculation_of


def run(config: DictConfig) -> int:
    """Decode every prompt. Returns 1 where a compared text is neither identical nor a near-tie."""
    session, console = Session(config), Console(record=config.picture is not None, highlight=False)
    ids = [session.loaded.encode(prompt, config.chat) for prompt in session.prompts()]
    session.speculate()
    code = (_compare if config.compare else _show)(session, console, ids)
    if config.picture is not None:
        # Rich names fonts on a server; the picture should need no network.
        picture = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="specdec"), flags=re.DOTALL)
        Path(config.picture).write_text(picture, encoding="utf-8")
    return code


def _show(session: Session, console: Console, ids: list[Tensor]) -> int:
    for prompt, row in zip(session.prompts(), ids, strict=True):
        console.rule(escape(prompt.splitlines()[0][:70]), align="left")
        _speculative(session, console, row)
    handle = speculation_of(session.model)
    console.print(legend(handle.drafter.name))
    stats = handle.stats
    console.print(f"{stats.mean_accepted_tokens:.2f} mean accepted tokens, {stats.tokens_per_second:.0f} tokens/s")
    if not stats.lossless:
        console.print(LOSSY)
    return 0


def _compare(session: Session, console: Console, ids: list[Tensor]) -> int:
    session.without_processors()
    handle = speculation_of(session.model)
    plain_seconds, seconds, tokens, ours = 0.0, 0.0, [0, 0], []
    with plainly(session.model):
        session.generate(ids[0])  # warm-up: the first passes of a process pay for its allocations
        for prompt, row in zip(session.prompts(), ids, strict=True):
            console.rule(f"plain: {escape(prompt.splitlines()[0][:60])}", align="left")
            view = PlainStream(console, session.loaded.tokenizer)
            start = time.perf_counter()
            text = session.generate(row, streamer=view)
            plain_seconds += time.perf_counter() - start - view.seconds
            tokens[0] += text.shape[1] - row.shape[1]
    session.generate(ids[0])
    handle.reset()
    console.print(legend(handle.drafter.name))
    for prompt, row in zip(session.prompts(), ids, strict=True):
        console.rule(f"{handle.drafter.name}: {escape(prompt.splitlines()[0][:60])}", align="left")
        text, spent = _speculative(session, console, row)
        seconds += spent
        tokens[1] += text.shape[1] - row.shape[1]
        ours.append(text)
    console.print(comparison(plain_seconds, seconds, (tokens[0], tokens[1]), handle.stats))
    if not handle.stats.lossless:
        console.print(LOSSY)
    elif session.options()["do_sample"]:
        console.print("sampled texts follow the same law; they differ from plain's, whose random numbers are others")
    if session.options()["do_sample"]:
        return 0
    result = audit(session.model, [session.pair(row, text) for row, text in zip(ids, ours, strict=True)])
    for line in verdict(result, session.show_token):
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
