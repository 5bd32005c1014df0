"""How a request turns logits into tokens and when it stops: p is what plain ``generate`` would have used.

Ways to ask for p, chosen once per request from the processors and stopping criteria it carries:

- *vectorised*: processors that ignore the ids (temperature, top-k, top-p, ...) take all nodes of a tree at once;
- *by row*: every other built-in runs lazily along each row's walk, one call per emitted token, on the left-padded ids;
- *by length*: where each of those calls would be waited for, built-ins that answer for any row alone, without waiting
  and without remembering, take all nodes of a tree, one call for those whose texts have the same length;
- *lock-step*: an unknown processor or criterion, which may keep state across the batch, sees exactly plain's
  sequence of calls: the whole batch, one position at a time; rows then advance together, by the shortest.

Shapes: B rows, N nodes, D depth, V vocabulary, W prompt columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as processors_of_transformers
from transformers.generation import stopping_criteria as criteria_of_transformers

from specdec.transfer import upload
from specdec.tree import TokenTree

_UNIFORM_BLOCK = 256
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _known(module: Any, names: str) -> frozenset[type]:
    return frozenset(getattr(module, name) for name in names.split() if hasattr(module, name))


_IGNORE_IDS = _known(
    processors_of_transformers,
    "TemperatureLogitsWarper TopPLogitsWarper TopKLogitsWarper MinPLogitsWarper TypicalLogitsWarper "
    "EpsilonLogitsWarper EtaLogitsWarper SuppressTokensLogitsProcessor InfNanRemoveLogitsProcessor LogitNormalization",
)
_ROWS_ARE_INDEPENDENT = _IGNORE_IDS | _known(
    processors_of_transformers,
    "MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor NoRepeatNGramLogitsProcessor TopHLogitsWarper "
    "SequenceBiasLogitsProcessor NoBadWordsLogitsProcessor ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor "
    "ExponentialDecayLengthPenalty SuppressTokensAtBeginLogitsProcessor WatermarkLogitsProcessor",
)
# Functions of one row's ids and scores and nothing else. Not among them: what reads values back (watermarks, top-h,
# n-grams of the prompt), and what a user wrote (allowed tokens), which may refuse texts that no walk reaches.
_BY_LENGTH = _IGNORE_IDS | _known(
    processors_of_transformers,
    "MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor NoRepeatNGramLogitsProcessor "
    "SequenceBiasLogitsProcessor NoBadWordsLogitsProcessor ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor "
    "ExponentialDecayLengthPenalty SuppressTokensAtBeginLogitsProcessor RepetitionPenaltyLogitsProcessor "
    "EncoderRepetitionPenaltyLogitsProcessor",
)
_SIMPLE_CRITERIA = _known(criteria_of_transformers, "MaxLengthCriteria MaxTimeCriteria EosTokenCriteria")
_ROW_CRITERIA = _SIMPLE_CRITERIA | _known(criteria_of_transformers, "StopStringCriteria")


def _repetition_penalty(processor: Any, row: int) -> Any:
    clone = copy.copy(processor)
    ignored = processor.__dict__.get("prompt_ignore_length")
    if isinstance(ignored, Tensor):
        clone.prompt_ignore_length = ignored[row : row + 1]
    return clone


def _encoder_repetition(processor: Any, row: int) -> Any:
    clone = copy.copy(processor)
    clone.encoder_input_ids = processor.encoder_input_ids[row : row + 1]
    return clone


def _encoder_no_repeat(processor: Any, row: int) -> Any:
    clone = copy.copy(processor)
    clone.generated_ngrams = [processor.generated_ngrams[row]]
    clone.batch_size = 1
    return clone


def _prefix_constrained(processor: Any, row: int) -> Any:
    allowed = processor._prefix_allowed_tokens_fn
    return type(processor)(lambda _, ids: allowed(row, ids), 1)


def _prompts_of(processor: Any) -> int | None:
    """Number of prompts that an encoder processor knows; None for the others."""
    ids = getattr(processor, "encoder_input_ids", None)
    return getattr(processor, "batch_size", None) if ids is None else ids.shape[0]


def _by_name(table: dict[str, Callable[[Any, int], Any]]) -> dict[type, Callable[[Any, int], Any]]:
    return {
        getattr(processors_of_transformers, n): view
        for n, view in table.items()
        if hasattr(processors_of_transformers, n)
    }


FOR_ROW = _by_name(
    {
        "RepetitionPenaltyLogitsProcessor": _repetition_penalty,
        "EncoderRepetitionPenaltyLogitsProcessor": _encoder_repetition,
        "EncoderNoRepeatNGramLogitsProcessor": _encoder_no_repeat,
        "PrefixConstrainedLogitsProcessor": _prefix_constrained,
    }
)
"""Built-in processors that hold state per row, and the view of them that serves one row alone."""


def _for_nodes(processor: Any, rows: Tensor) -> Any:
    """A view of a processor of ``_BY_LENGTH`` for nodes of several rows: ``rows`` int64 ``[g]``, of each."""
    names = [n for n in _PER_PROMPT if isinstance(processor.__dict__.get(n), Tensor)]
    if not names:
        return processor
    clone = copy.copy(processor)
    for name in names:
        known = getattr(processor, name)
        setattr(clone, name, known.index_select(0, rows.to(known.device)))
    return clone


_PER_PROMPT = ("prompt_ignore_length", "encoder_input_ids")  # attributes ``[B, ...]``


def why_plain(processors: Sequence[Any], generation_config: Any, batch_size: int) -> str | None:
    """What about the processors of a request belongs to plain decoding; None where it can speculate."""
    wants_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    if batch_size == 1 or not wants_scores or generation_config._eos_token_tensor is None:
        return None
    # Plain generate shows such a processor the padding that rows emit after they stopped,
    # and returns what it made of it.
    unknown = [type(p).__name__ for p in processors if type(p) not in _ROWS_ARE_INDEPENDENT | FOR_ROW.keys()]
    return f"output_scores of stopped rows after {unknown[0]}, which may keep state" if unknown else None


class Uniforms:
    """``u[b, t]`` in [0, 1): one per row and output position, drawn ahead.

    Position t of row b uses the same number whatever was proposed and whoever the neighbours are, so sampled text is
    identical for every point-mass drafter, tree and batch composition.

    Args:
        batch_size: B.
        seed: of the request; each row has a generator of its own.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        self._generators = [
            torch.Generator("cpu").manual_seed((seed + row * 0x9E3779B97F4A7C15) % 2**63) for row in range(batch_size)
        ]
        self._drawn = torch.empty(batch_size, 0, dtype=torch.float64, device="cpu")

    def take(self, starts: Sequence[int], count: int, device: torch.device) -> Tensor:
        """float64 ``[B, count]``: row b from output position ``starts[b]`` on."""
        while self._drawn.shape[1] < max(starts) + count:
            block = [
                torch.rand(_UNIFORM_BLOCK, generator=g, dtype=torch.float64, device="cpu") for g in self._generators
            ]
            self._drawn = torch.cat([self._drawn, torch.stack(block)], dim=1)
        positions = torch.tensor(starts, device="cpu")[:, None] + torch.arange(count, device="cpu")
        return upload(self._drawn.gather(1, positions), device)


class Coins:
    """The second stream: numbers in [0, 1) for accepting and rejecting, as many per step as a rule asks for.

    Coin c of the step at which row b stands at output position t is a function of (seed, b, t, c) alone. A row emits
    something at every step, so no two steps share a coin, and it may be asked for more coins than it needs (as the
    widest tree of a batch makes it) without any later coin changing.

    Args:
        batch_size: B.
        seed: of the request.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        rows = np.arange(1, batch_size + 1, dtype=np.uint64)
        self._keys = _mix(np.uint64(seed % 2**64) ^ _mix(rows * _GOLDEN))

    def take(self, starts: Sequence[int], count: int, device: torch.device) -> Tensor:
        """float64 ``[B, count]``: the coins of rows that stand at output positions ``starts``."""
        positions = np.asarray(starts, dtype=np.uint64) + np.uint64(1)
        step = _mix(self._keys ^ _mix(positions * _GOLDEN))
        bits = _mix(step[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
        return upload((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53, device)


def _mix(bits: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): uint64 -> uint64, one to one."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@dataclass(frozen=True)
class Group:
    """Rows that walk together, with the processors that serve them."""

    rows: list[int]
    processors: list[Any]


class Policy:
    """The sampling and stopping side of one request.

    Args:
        prompt_ids: int64 ``[B, W]``, as ``_sample`` received them.
        processors: logits processors, in order.
        criteria: stopping criteria, in order.
        generation_config: for do_sample, pad token and the scores that the caller wants.
        seed: of the uniforms and the coins; None under greedy decoding.
    """

    def __init__(
        self,
        prompt_ids: Tensor,
        processors: Sequence[Any],
        criteria: Sequence[Any],
        generation_config: Any,
        seed: int | None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.processors, self.criteria = list(processors), list(criteria)
        batch = prompt_ids.shape[0]
        self.uniforms = None if seed is None else Uniforms(batch, seed)
        self.coins = None if seed is None else Coins(batch, seed)
        self.wants_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
        pad = generation_config._pad_token_tensor
        self.pad_token_id = None if pad is None else int(pad)
        limits = [c.max_length for c in self.criteria if isinstance(c, criteria_of_transformers.MaxLengthCriteria)]
        self.max_new_tokens = min(limits, default=2**31) - prompt_ids.shape[1]
        eos = [c.eos_token_id for c in self.criteria if hasattr(c, "eos_token_id")]
        self.has_eos = bool(eos)
        self.eos_token_ids = {int(token) for ids in eos for token in torch.as_tensor(ids).flatten().tolist()}
        self.outputs: list[list[int]] = [[] for _ in range(batch)]
        self.stopped = [False] * batch
        self._scores: list[Tensor] = []
        self._timed = [c for c in self.criteria if type(c) is criteria_of_transformers.MaxTimeCriteria]
        self.vectorised, self.lock_step = self._mode(batch)
        self.by_length = not self.lock_step and self._answers_by_length()
        self.groups = self._groups(batch)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.prompt_ids.shape[0]

    @property
    def needs_ids(self) -> str | None:
        """Name of a processor that reads the ids, which rules off the walk cannot serve; None where there is none."""
        return next((type(p).__name__ for p in self.processors if type(p) not in _IGNORE_IDS), None)

    def _mode(self, batch: int) -> tuple[bool, bool]:
        kinds, stops = {type(p) for p in self.processors}, {type(c) for c in self.criteria}
        if kinds <= _IGNORE_IDS and stops <= _SIMPLE_CRITERIA:
            return True, False
        by_row = kinds <= _ROWS_ARE_INDEPENDENT | FOR_ROW.keys() and stops <= _ROW_CRITERIA
        # Several sequences per prompt share its entry here, in ways of each processor's own.
        by_row &= all(_prompts_of(p) in (None, batch) for p in self.processors)
        # Without an EOS criterion plain generate lets a stopped row go on until all rows have stopped.
        by_row &= self.has_eos or stops <= _SIMPLE_CRITERIA
        return False, batch > 1 and not by_row

    def _answers_by_length(self) -> bool:
        kinds, stops = {type(p) for p in self.processors}, {type(c) for c in self.criteria}
        prompts = [_prompts_of(p) for p in self.processors]
        return kinds <= _BY_LENGTH and stops <= _SIMPLE_CRITERIA and set(prompts) <= {None, self.batch_size}

    def _groups(self, batch: int) -> list[Group]:
        if self.lock_step or batch == 1:
            return [Group(list(range(batch)), self.processors)]
        return [
            Group([row], [FOR_ROW.get(type(p), lambda p, _: p)(p, row) for p in self.processors])
            for row in range(batch)
        ]

    def warp(self, logits: Tensor) -> Tensor:
        """Scores of all nodes at once, float32 ``[B, N, V]`` -> ``[B, N, V]`` (vectorised requests only)."""
        if not self.processors:
            return logits
        flat = logits.reshape(-1, logits.shape[-1])
        unused = torch.zeros(flat.shape[0], 1, dtype=torch.int64, device=flat.device)
        for processor in self.processors:
            flat = processor(unused, flat)
        return flat.view(logits.shape)

    def score(self, logits: Tensor, tree: TokenTree) -> Tensor:
        """Scores of all nodes, float32 ``[B, N, V]`` -> ``[B, N, V]`` (requests that answer by length only).

        The processors are called once for all nodes whose texts, from the prompt to the node, have the same length.
        """
        if self.vectorised:
            return self.warp(logits)
        batch, nodes, vocabulary = logits.shape
        ends = np.array([self.prompt_ids.shape[1] + len(out) for out in self.outputs])
        lengths = (ends[:, None] + tree.topology.host_depths).ravel()  # of the text of each node
        order = np.argsort(lengths, kind="stable")
        counts = np.unique(lengths, return_counts=True)
        places = upload(np.stack([order, order // nodes, np.argsort(order, kind="stable")]), logits.device)
        texts = self._texts(tree, upload(ends, logits.device)).flatten(0, 1)
        flat, scores, start = logits.reshape(-1, vocabulary), list[Tensor](), 0
        for length, count in zip(*(part.tolist() for part in counts), strict=True):
            where, rows = places[0, start : start + count], places[1, start : start + count]
            ids, part = texts[:, :length].index_select(0, where), flat.index_select(0, where)
            for processor in self.processors:
                part = _for_nodes(processor, rows)(ids, part)
            scores.append(part)
            start += count
        return torch.cat(scores).index_select(0, places[2]).view(batch, nodes, -1)

    def _texts(self, tree: TokenTree, ends: Tensor) -> Tensor:
        """int64 ``[B, N, T]``: the ids of each node's text, from the prompt to the node; what follows means nothing.

        Args:
            tree: the tree.
            ends: int64 ``[B]``, where each row's known text ends.
        """
        known = self.ids(range(self.batch_size)).to(ends.device)
        depth = tree.topology.max_depth
        texts = torch.nn.functional.pad(known, (0, depth))[:, None].repeat(1, tree.num_nodes, 1)
        if depth == 0:
            return texts
        paths = tree.topology.paths[..., 1:].expand(self.batch_size, -1, -1).clamp(min=0)
        tokens = tree.token_ids.gather(1, paths.flatten(1)).view(paths.shape)
        places = ends[:, None, None] + torch.arange(depth, device=ends.device)
        return texts.scatter_(2, places.expand(paths.shape), tokens)

    def ids(self, rows: Sequence[int]) -> Tensor:
        """int64 ``[g, W+t]``: the ids of some rows as generate has them now; stopped rows padded to the longest."""
        longest = max(len(self.outputs[row]) for row in rows)
        pad = self.pad_token_id or 0
        emitted = [self.outputs[row] + [pad] * (longest - len(self.outputs[row])) for row in rows]
        tail = upload(np.array(emitted, dtype=np.int64).reshape(len(rows), longest), self.prompt_ids.device)
        prompts = self.prompt_ids if rows == range(self.batch_size) else self.prompt_ids[list(rows)]
        return torch.cat([prompts, tail], dim=1)

    def draw_ahead(self, count: int, device: torch.device) -> Tensor | None:
        """Uniforms of the next ``count`` positions of every row, ``[B, count]``; None under greedy decoding."""
        return None if self.uniforms is None else self.uniforms.take([len(out) for out in self.outputs], count, device)

    def draw_coins(self, count: int, device: torch.device) -> Tensor | None:
        """Coins of this step for every row, ``[B, count]``; None where none are wanted."""
        if self.coins is None or count == 0:
            return None
        return self.coins.take([len(out) for out in self.outputs], count, device)

    def cut(self, row: int, tokens: list[int]) -> tuple[list[int], bool]:
        """Apply EOS and the token budget to tokens about to be emitted (vectorised requests)."""
        tokens = tokens[: self.max_new_tokens - len(self.outputs[row])]
        for index, token in enumerate(tokens):
            if token in self.eos_token_ids:
                return tokens[: index + 1], True
        return tokens, len(self.outputs[row]) + len(tokens) >= self.max_new_tokens

    def out_of_time(self) -> bool:
        """Whether a ``max_time`` has run out (vectorised requests ask once per step)."""
        return any(bool(c(self.prompt_ids, None).any()) for c in self._timed)

    def end_together(self) -> None:
        """Cut all rows to the shortest of those that time ran out on, as plain generate leaves them."""
        if self.lock_step or not self.out_of_time():
            return
        others = [c for c in self.criteria if type(c) is not criteria_of_transformers.MaxTimeCriteria]
        rows = range(self.batch_size)
        running = [
            row for row in rows if not any(bool(torch.as_tensor(c(self.ids([row]), None)).any()) for c in others)
        ]
        shortest = min((len(self.outputs[row]) for row in running), default=None)
        self.outputs = [out[:shortest] for out in self.outputs]

    def process(self, group: Group, ids: Tensor, logits: Tensor) -> Tensor:
        """One plain call of the group's processors: ids ``[g, T]``, logits ``[g, V]`` -> float32 ``[g, V]``."""
        scores = logits.float()
        for processor in group.processors:
            scores = processor(ids, scores)
        return scores

    def stops(self, ids: Tensor, scores: Tensor) -> list[bool]:
        """One plain call of the stopping criteria on a group that has just grown by one token."""
        seen = None
        if self.wants_scores and len(self.groups) == 1:
            self._scores.append(scores)
            seen = tuple(self._scores)
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for criterion in self.criteria:
            done |= torch.as_tensor(criterion(ids, seen), device=ids.device)
        return done.tolist()
