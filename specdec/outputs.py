"""Giving back exactly what plain ``generate`` gives: ids, streamed tokens, scores, logits, hidden states, the cache.

Shapes: B rows, W prompt columns, T emitted positions of the longest row, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.decoding import Request, Step
from specdec.interfaces import DecodeState
from specdec.metrics import SpeculationStats
from specdec.routing import FULL, Route
from specdec.target import PassOutput, Target
from specdec.tree import TokenTree, chain

_FILL = 128  # positions of padding per pass: bounds the mask and the logits


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Transformers' own output with the statistics of this call added."""

    speculation: SpeculationStats | None = None


class Recorder:
    """Collects, position by position, what the caller asked for.

    Args:
        request: the request being decoded.
        streamer: receives ``[B]`` once per position, in order; None = no streaming.
        cache: the cache that transformers prefilled, to be handed back extended.
    """

    def __init__(self, request: Request, streamer: Any, cache: Any) -> None:
        self.request, self.streamer, self.cache = request, streamer, cache
        config = request.generation_config
        self.as_dict = bool(config.return_dict_in_generate)
        rows = request.input_ids.shape[0]
        self.scores: list[list[Tensor]] | None = (
            [[] for _ in range(rows)] if self.as_dict and config.output_scores else None
        )
        self.logits: list[list[Tensor]] | None = (
            [[] for _ in range(rows)] if self.as_dict and config.output_logits else None
        )
        self.hidden: list[list[tuple[Tensor, ...]]] | None = (
            [[] for _ in range(rows)] if self.as_dict and config.output_hidden_states else None
        )
        self.prompt_hidden: tuple[Tensor, ...] | None = None
        self._streamed = 0

    def record(self, state: DecodeState, step: Step) -> None:
        """Take in one step of the loop."""
        if self.hidden is not None and step.prompt is not None:
            self.prompt_hidden = step.prompt.hidden_states
        verification = step.verification
        for row, nodes in enumerate(verification.path):
            if self.scores is not None and verification.scores is not None:
                self.scores[row].extend(verification.scores[row])
            if self.logits is not None:
                self.logits[row].extend(verification.logits[row, nodes].to(torch.float32, copy=True))
            if self.hidden is not None and verification.hidden_states is not None:
                self._record_hidden(row, verification.hidden_states, nodes)
        self._stream(state)

    def result(self, target: Target, state: DecodeState, stats: SpeculationStats) -> Any:
        """What ``_sample`` returns, after the last step."""
        state.policy.end_together()
        self._drop_what_was_cut(state)
        self._stream(state, last=True)
        if self.streamer is not None:
            self.streamer.end()
        request = self.request
        sequences = torch.cat([request.input_ids, self._rectangle(state)], dim=1)
        if request.keep_cache and state.context is not None:
            with stats.phase("commit"):
                self._fill_stopped_rows(target, state)
                state.context.cache.extend(self.cache, state.context.lengths)
        if not self.as_dict:
            return sequences
        hidden = None
        if self.hidden is not None:
            steps = zip(*self.hidden, strict=True)
            hidden = (
                self.prompt_hidden,
                *(tuple(torch.stack(layer) for layer in zip(*rows, strict=True)) for rows in steps),
            )
        return SpeculativeOutput(
            sequences=sequences,
            scores=None if self.scores is None else _by_position(self.scores),
            logits=None if self.logits is None else _by_position(self.logits),
            hidden_states=hidden,
            past_key_values=self.cache,
            speculation=stats,
        )

    def _drop_what_was_cut(self, state: DecodeState) -> None:
        for row, text in enumerate(state.policy.outputs):
            surplus = state.emitted[row] - len(text)
            if surplus == 0:
                continue
            state.emitted[row] = len(text)
            if state.context is not None:
                state.context.lengths[row] -= surplus
            for kept in (self.scores, self.logits):
                if kept is not None:
                    del kept[row][len(text) :]
            if self.hidden is not None:
                del self.hidden[row][len(text) - 1 :]  # the first token came of the prompt's states

    def _record_hidden(self, row: int, layers: tuple[Tensor, ...], nodes: list[int]) -> None:
        assert self.hidden is not None
        for node in nodes:
            self.hidden[row].append(tuple(layer[row, node : node + 1] for layer in layers))

    def _rectangle(self, state: DecodeState) -> Tensor:
        """int64 ``[B, T]``: emitted tokens, stopped rows padded."""
        policy = state.policy
        pad = policy.pad_token_id if policy.pad_token_id is not None else min(policy.eos_token_ids, default=0)
        longest = max(len(out) for out in policy.outputs)
        rows = [out + [pad] * (longest - len(out)) for out in policy.outputs]
        return torch.tensor(rows, dtype=torch.int64, device=self.request.input_ids.device)

    def _stream(self, state: DecodeState, last: bool = False) -> None:
        """Pass on the positions that every row has reached (stopped rows count as padded to any length)."""
        if self.streamer is None:
            return
        lengths = [len(out) for out in state.policy.outputs]
        running = [n for n, done in zip(lengths, state.finished, strict=True) if not done]
        ready = max(lengths) if last or not running else min(running)
        if ready > self._streamed:
            for column in self._rectangle(state)[:, self._streamed : ready].T.cpu():
                self.streamer.put(column)
            self._streamed = ready

    def _fill_stopped_rows(self, target: Target, state: DecodeState) -> None:
        """Feed padding to rows that stopped early, as plain generate does, so that its cache and scores are matched."""
        policy, context = state.policy, state.context
        assert context is not None
        longest = max(state.emitted)
        fed = list(state.emitted)
        root = state.root
        while min(fed) < longest:
            counts = [min(longest - count, _FILL) for count in fed]
            pads = torch.full((state.batch_size, max(counts) - 1), policy.pad_token_id or 0, device=target.device)
            tree = TokenTree(torch.cat([root[:, None], pads], dim=1), chain(max(counts), target.device))
            context.budgets = counts
            output = target.run(context, tree, route=FULL if self.logits or self.scores else Route(logits=False))
            target.keep(context, [list(range(count)) for count in counts])
            self._record_filling(state, output, fed, counts)
            fed = [done + count for done, count in zip(fed, counts, strict=True)]
            root = torch.full_like(root, policy.pad_token_id or 0)

    def _record_filling(self, state: DecodeState, output: PassOutput, fed: list[int], counts: list[int]) -> None:
        """Take in a stretch of padding: ``counts[b]`` positions of row b from ``fed[b]`` on."""
        for row, count in enumerate(counts):
            nodes = list(range(count))
            if self.logits is not None:
                self.logits[row].extend(output.logits[row, nodes].float())
            if self.hidden is not None and output.hidden_states is not None:
                self._record_hidden(row, output.hidden_states, nodes)
        if self.scores is None:
            return
        # The text is complete, so asking the processors once more cannot change it.
        full = torch.cat([self.request.input_ids, self._rectangle(state)], dim=1)
        ends = [start + count for start, count in zip(fed, counts, strict=True)]
        for position in range(min(fed), max(ends)):
            rows = [row for row, end in enumerate(ends) if fed[row] <= position < end]
            scores = torch.zeros(state.batch_size, output.logits.shape[-1], device=output.logits.device)
            scores[rows] = output.logits[rows, [position - fed[row] for row in rows]].float()
            for processor in state.policy.processors:
                scores = processor(full[:, : self.request.input_ids.shape[1] + position], scores)
            for row in rows:
                self.scores[row].append(scores[row])


def _by_position(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Rows of ``[V]`` per position -> per position ``[B, V]``."""
    return tuple(torch.stack(position) for position in zip(*rows, strict=True))
