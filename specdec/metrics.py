"""Every counter and every definition, with unit and denominator. Reports compute nothing of their own.

Words: a *verification* is one target pass seen by one unfinished row. It offers *drafted* nodes, *accepts* some of them
along a path and *emits* accepted + 1 tokens (the bonus), all counted after stops. The token of the prefill is emitted
by no verification.

What is said of a *text* (one answer to one prompt) holds for any method, whether it runs through our loop or not: its
tokens are counted by ``emitted``, its seconds are those of the whole call.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.interfaces import Verification
from specdec.tree import TokenTree

PHASES = ("prefill", "draft", "verify", "commit")
MIN_LOOP_SPAN = 8
LONG_REPETITION = 48


class _Phase:
    # By hand, because every step enters several: a generator's context costs as much as a small operation of torch.
    __slots__ = ("_name", "_seconds", "_start")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] += time.perf_counter() - self._start


@dataclass
class SpeculationStats:
    """Counters of one or many requests; they add up with ``+=``.

    Attributes:
        drafter: name of the drafter.
        lossless: whether the acceptance rule leaves the target's law as it is.
        rows: sequences decoded.
        emitted_tokens: tokens emitted by all rows, the prefill's included, padding not.
        verifications: target passes counted once per row that was unfinished.
        passes: target passes over trees, whatever the batch.
        drafted_nodes: candidates offered to unfinished rows, roots not counted.
        computed_nodes: nodes computed for unfinished rows, roots and feed-only ones included.
        accepted_lengths: accepted draft tokens -> number of verifications.
        offered_at_depth: depth -> verifications whose tree had a candidate at it.
        reached_at_depth: depth -> those of them that accepted all the depths before it.
        seconds: phase -> seconds of wall clock, draft including what drafters learn afterwards.
        peak_extra_bytes: most memory held beyond the weights: on CUDA by the allocator, else the bytes of the K/V
            slabs.
    """

    drafter: str = "none"
    lossless: bool = True
    rows: int = 0
    emitted_tokens: int = 0
    verifications: int = 0
    passes: int = 0
    drafted_nodes: int = 0
    computed_nodes: int = 0
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    offered_at_depth: Counter[int] = field(default_factory=Counter)
    reached_at_depth: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    peak_extra_bytes: int = 0

    def record(self, step: Verification, tree: TokenTree | None = None) -> None:
        """Count one step; ``tree`` is None for the prefill, which emits a token but verifies nothing."""
        self.emitted_tokens += sum(len(tokens) for tokens in step.tokens)
        if tree is None:
            self.rows += len(step.tokens)
            return
        self.passes += 1
        accepted = step.accepted
        for row, done in enumerate(step.was_finished):
            if done:
                continue
            self._count(step.offered[row], accepted[row], tree.num_nodes)

    def add_text(self, offered: Sequence[Sequence[int]], accepted: Sequence[int], computed: Sequence[int]) -> None:
        """Count the recorded trace of one text: per verification the candidates at depths 1..D, how many of them were
        accepted and how many nodes were computed. The trace of a batch counts its passes once per text.
        """
        self.rows += 1
        self.emitted_tokens += 1 + sum(accepted) + len(accepted)
        self.passes += len(accepted)
        for by_depth, length, nodes in zip(offered, accepted, computed, strict=True):
            self._count(by_depth, length, nodes)

    def _count(self, by_depth: Sequence[int], accepted: int, computed: int) -> None:
        self.verifications += 1
        self.drafted_nodes += sum(by_depth)
        self.computed_nodes += computed
        self.accepted_lengths[accepted] += 1
        for depth, count in enumerate(by_depth, start=1):
            if count:
                self.offered_at_depth[depth] += 1
                if depth <= accepted + 1:
                    self.reached_at_depth[depth] += 1

    def phase(self, name: str) -> _Phase:
        """A block whose wall clock is added to a phase."""
        return _Phase(self.seconds, name)

    @property
    def mean_accepted_tokens(self) -> float:
        """Tokens emitted per verification, bonus included, the prefill's token not: plain decoding is exactly 1.0."""
        return (self.emitted_tokens - self.rows) / self.verifications if self.verifications else 1.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Entry d-1: share of all verifications that accepted at least d tokens."""
        return [self._accepted(depth) / self.verifications for depth in self._depths()]

    @property
    def conditional_acceptance_by_depth(self) -> list[float]:
        """Entry d-1: of the verifications that accepted d-1 tokens and offered depth d, the share that accepted d."""
        reached = self.reached_at_depth
        return [self._accepted(depth) / reached[depth] if reached[depth] else 0.0 for depth in self._depths()]

    @property
    def nodes_per_verification(self) -> float:
        """Mean size of a computed tree, root included."""
        return self.computed_nodes / self.verifications if self.verifications else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens emitted after the prefill per second spent after the prefill, all rows together."""
        seconds = sum(self.seconds[phase] for phase in PHASES if phase != "prefill")
        return (self.emitted_tokens - self.rows) / seconds if seconds else 0.0

    @property
    def draft_share(self) -> float:
        """Share of the time after the prefill that went into drafting and learning."""
        seconds = sum(self.seconds[phase] for phase in PHASES if phase != "prefill")
        return self.seconds["draft"] / seconds if seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Counters and metrics as plain values, for JSON."""
        return {
            "drafter": self.drafter,
            "lossless": self.lossless,
            "rows": self.rows,
            "emitted_tokens": self.emitted_tokens,
            "verifications": self.verifications,
            "passes": self.passes,
            "drafted_nodes": self.drafted_nodes,
            "computed_nodes": self.computed_nodes,
            "mean_accepted_tokens": self.mean_accepted_tokens,
            "acceptance_by_depth": self.acceptance_by_depth,
            "conditional_acceptance_by_depth": self.conditional_acceptance_by_depth,
            "accepted_lengths": dict(sorted(self.accepted_lengths.items())),
            "tokens_per_second": self.tokens_per_second,
            "draft_share": self.draft_share,
            "seconds": dict(self.seconds),
            "peak_extra_bytes": self.peak_extra_bytes,
        }

    def __iadd__(self, other: SpeculationStats) -> SpeculationStats:
        for name in ("rows", "emitted_tokens", "verifications", "passes", "drafted_nodes", "computed_nodes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.accepted_lengths.update(other.accepted_lengths)
        self.offered_at_depth.update(other.offered_at_depth)
        self.reached_at_depth.update(other.reached_at_depth)
        for phase, seconds in other.seconds.items():
            self.seconds[phase] += seconds
        self.peak_extra_bytes = max(self.peak_extra_bytes, other.peak_extra_bytes)
        self.lossless &= other.lossless
        return self

    def _accepted(self, depth: int) -> int:
        return sum(count for length, count in self.accepted_lengths.items() if length >= depth)

    def _depths(self) -> range:
        return range(1, max(self.offered_at_depth, default=0) + 1)


@dataclass
class Throughput:
    """Tokens and seconds of some texts, the same for every method.

    Attributes:
        texts: how many.
        tokens: emitted, EOS included, padding not.
        seconds: of the whole calls, prefill included.
        prefill_seconds: of them, until the first token was there.
    """

    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0

    def add(self, tokens: int, seconds: float, prefill_seconds: float = 0.0) -> None:
        """Count one text."""
        self.texts += 1
        self.tokens += tokens
        self.seconds += seconds
        self.prefill_seconds += prefill_seconds

    @property
    def rate(self) -> float:
        """Tokens per second, a ratio of sums: long texts weigh as much as they last."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens after the first of each text per second after the prefill."""
        seconds = self.seconds - self.prefill_seconds
        return (self.tokens - self.texts) / seconds if seconds > 0 else 0.0

    def speedup(self, baseline: Throughput) -> float | None:
        """Ratio of the rates; None where the baseline has none.

        Raises:
            ValueError: the baseline has seen another number of texts.
        """
        if self.texts != baseline.texts:
            raise ValueError(f"a speed-up compares the same texts; got {self.texts} and {baseline.texts}")
        return self.rate / baseline.rate if baseline.rate else None


def emitted(ids: Iterable[int], eos_ids: Collection[int]) -> list[int]:
    """The tokens of one text among what ``generate`` returned behind its prompt: up to the first EOS, that included.

    What follows an EOS is padding. Every method's tokens are counted by the length of this.
    """
    text = []
    for token in ids:
        text.append(token)
        if token in eos_ids:
            break
    return text


def median_repeat(tokens: Sequence[int], seconds: Sequence[float]) -> int:
    """The repeat of median seconds per token (the lower of two middle ones): its tokens and times stand for all."""
    order = sorted(range(len(tokens)), key=lambda repeat: seconds[repeat] / max(tokens[repeat], 1))
    return order[(len(order) - 1) // 2]


def shared(texts: Iterable[Collection[Any]]) -> set[Any]:
    """The texts that every method has: what is missing from one counts for nobody."""
    sets = [set(keys) for keys in texts]
    return set.intersection(*sets) if sets else set()


def ends_in_loop(ids: Sequence[int], max_block: int = 64) -> bool:
    """Whether a token sequence ends in a repeated block of 1..``max_block`` tokens.

    It does if three whole copies of the block end it, or if 48 tokens at its end continue the block's period.
    Repetition that spans fewer than 8 tokens never counts: ``1000`` and ``....`` are ordinary text.
    """
    for block in range(1, min(max_block, len(ids) - 1) + 1):
        repeated = 0
        while repeated + block < len(ids) and ids[-1 - repeated] == ids[-1 - repeated - block]:
            repeated += 1
        if repeated + block >= max(3 * block, MIN_LOOP_SPAN) or repeated >= LONG_REPETITION:
            return True
    return False
