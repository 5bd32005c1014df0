"""THE loop: prefill, start, then propose, verify, commit, keep, update until every row has stopped.

No drafter, model family or batch size owns a second one.

Shapes: B rows, W prompt columns, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.interfaces import DecodeState, Drafter, History, Needs, Prefill, Verification, Verifier
from specdec.metrics import SpeculationStats
from specdec.sampling import Policy
from specdec.target import PassOutput, Target
from specdec.transfer import upload
from specdec.tree import TokenTree

_DRAFT_STREAM = 0x2545F4914F6CDD1D


@dataclass
class Request:
    """One call of generate, as it reaches the loop.

    Attributes:
        input_ids: int64 ``[B, W]``, left-padded, as ``_sample`` received them.
        model_kwargs: likewise; the loop may rewrite entries.
        generation_config: likewise.
        policy: sampling and stopping.
        padding: left padding of each row in ``input_ids``.
        seed: of the drafter's generator.
        keep_cache: the prefilled cache outlives the request (it is returned, or the caller's own).
    """

    input_ids: Tensor
    model_kwargs: dict[str, Any]
    generation_config: Any
    policy: Policy
    padding: list[int]
    seed: int
    keep_cache: bool


@dataclass
class Step:
    """What the loop yields: the verification, its tree (None for the prefill) and what the prefill returned."""

    verification: Verification
    tree: TokenTree | None
    prompt: PassOutput | None = None


def decode(
    target: Target, drafter: Drafter, verifier: Verifier, request: Request, stats: SpeculationStats
) -> Iterator[tuple[DecodeState, Step]]:
    """Decode one request, yielding after every step; the first one is the prefill's token."""
    with stats.phase("prefill"):
        outputs, prompt = target.prefill(
            request.input_ids, request.generation_config, request.model_kwargs, drafter.needs
        )
        state = _begin(request, target.device)
        step = verifier.first(target, state, prompt.logits[:, -1])
        _commit(state, step)
        stats.record(step)
    yield state, Step(step, None, prompt)
    with stats.phase("prefill"):
        _open(target, state, request, outputs, drafter.needs)
    if state.done:
        return
    assert state.context is not None
    try:
        with stats.phase("prefill"):
            drafter.start(state, _for_drafter(target, drafter, request, prompt))
        del outputs, prompt
        while not state.done:
            with stats.phase("draft"):
                tree = drafter.propose(state)
            with stats.phase("verify"):
                step = verifier.verify(target, state, tree, drafter.needs.taps)
            with stats.phase("commit"):
                _commit(state, step)
                target.keep(state.context, step.path)
            with stats.phase("draft"):
                drafter.update(state, tree, step)
            stats.record(step, tree)
            yield state, Step(step, tree)
    finally:
        drafter.finish(state)


def _begin(request: Request, device: torch.device) -> DecodeState:
    ids, rows = request.input_ids, request.input_ids.shape[0]
    known = [row[pad:] for row, pad in zip(ids.tolist(), request.padding, strict=True)]
    # Another stream than the uniforms', which the proposals must not depend on.
    generator = torch.Generator("cpu").manual_seed(request.seed ^ _DRAFT_STREAM)
    root = torch.zeros(rows, dtype=torch.int64, device=device)
    return DecodeState(request.policy, History(known), root, [0] * rows, [False] * rows, generator)


def _commit(state: DecodeState, step: Verification) -> None:
    """Make emitted tokens part of the text; the newest of each row becomes the next root."""
    for row, tokens in enumerate(step.tokens):
        state.policy.outputs[row].extend(tokens)
        state.history.append(row, tokens)
        state.emitted[row] += len(tokens)
    state.finished = list(step.finished)
    if state.context is not None:
        state.context.budgets = [max(state.policy.max_new_tokens - count, 0) for count in state.emitted]
    newest = np.array([out[-1] for out in state.policy.outputs], dtype=np.int64)
    state.root = upload(newest, state.root.device)


def _open(target: Target, state: DecodeState, request: Request, outputs: Any, needs: Needs) -> None:
    if state.done and not request.keep_cache:
        return
    ids = torch.cat([request.input_ids, state.root.to(request.input_ids.device)[:, None]], dim=1)
    reserve = min(request.policy.max_new_tokens, 512) + needs.max_nodes
    state.context = target.open(ids, outputs, request.model_kwargs, reserve, release=not request.keep_cache)
    state.context.budgets = [request.policy.max_new_tokens - count for count in state.emitted]
    if not state.done:
        target.load_graphs(state.context, needs.taps)


def _for_drafter(target: Target, drafter: Drafter, request: Request, prompt: PassOutput) -> Prefill:
    needs = drafter.needs
    top_k = target.top_k(prompt.states["final"], needs.prompt_top_k) if needs.prompt_top_k else None
    states = prompt.states if needs.prompt_states else {}
    return Prefill(request.input_ids, request.padding, states, top_k)
