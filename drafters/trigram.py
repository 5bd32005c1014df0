"""Tri-gram drafting (ADED, later Adaptix; Liu et al., arXiv:2407.12021).

A sparse table holds scores of tri-grams. The draft is the tree that a search over the table visits most, from the last
two tokens of the text (``trigram_search.py``). The scores adapt while decoding: each step raises those of the tri-grams
in the newest tokens. The table may start from a corpus (``scripts/build_trigram.py``) or empty.

Differences from the authors' code, where it falls short of what the method means: the search looks up the right scores
and its visits are computed instead of drawn (see there), so nothing is random; the whole prompt is learnt, not only its
last 16 tokens; a pair never has more than its k successors, and the table never outgrows its limit; a tree over the
node budget loses its least visited nodes, not its longest paths; where nothing is known nothing is proposed; sampling
is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from drafters.base import BaseDrafter
from drafters.trigram_search import ExpectedSearch, SearchSettings
from drafters.trigram_table import TrigramTable
from specdec.interfaces import DecodeState, Needs, Prefill, Verification
from specdec.target import Target
from specdec.tree import TokenTree, pad_rows


@dataclass(frozen=True)
class Adaptation:
    """How the table follows the text.

    Attributes:
        step: added to the score of a tri-gram each time it is seen in the window.
        window: newest tokens that a step learns from; a tri-gram is seen again until it has left the window.
        cap: largest score; scores of a corpus are shares of at most 1.

    Raises:
        ValueError: settings by which nothing is learnt.
    """

    step: float = 0.04
    window: int = 16
    cap: float = 3.0

    def __post_init__(self) -> None:
        if self.step <= 0 or self.cap <= 0 or self.window < 3:
            raise ValueError(f"expected step and cap > 0 and a window of at least 3 tokens; got {self}")

    @property
    def whole_window(self) -> float:
        """What a tri-gram gains in all while tokens come one by one."""
        return self.step * (self.window - 2)


class Trigram(BaseDrafter):
    """Draft from tri-gram scores that adapt to the text.

    Args:
        num_nodes: node budget of the tree, root not counted; the published value is 64.
        num_successors: k, successors kept per pair of tokens.
        max_pairs: pairs of tokens kept; with 12 successors a pair takes 112 bytes, and twice that while there is room.
        search: constants of the search; None = the defaults.
        adaptation: constants of learning; None = the defaults.
        path: a table to start from, written by ``scripts/build_trigram.py`` (``.safetensors``) or by
            ``torch.save(drafter.state_dict(), path)``.

    Raises:
        ValueError: no room for a node, a successor or a pair; a file that holds no such table.
    """

    name = "trigram"

    def __init__(
        self,
        num_nodes: int = 24,
        num_successors: int = 12,
        max_pairs: int = 2**20,
        search: SearchSettings | None = None,
        adaptation: Adaptation | None = None,
        path: str | None = None,
    ) -> None:
        if min(num_nodes, num_successors, max_pairs) < 1:
            raise ValueError(
                f"expected num_nodes, num_successors and max_pairs >= 1; got {num_nodes=}, {num_successors=}, "
                f"{max_pairs=}"
            )
        self.num_nodes = num_nodes
        self.search, self.adaptation = search or SearchSettings(), adaptation or Adaptation()
        self.needs = Needs(max_nodes=num_nodes + 1)
        self.num_successors, self.max_pairs, self._path = num_successors, max_pairs, path
        self._vocab_size: int | None = None
        self.reset()

    def fit(self, target: Target) -> str | None:
        """Any target whose vocabulary holds the table's tokens."""
        self._vocab_size = target.vocab_size
        return self._beyond_vocabulary(self.table)

    def start(self, state: DecodeState, prefill: Prefill) -> None:  # noqa: ARG002 - the protocol's signature
        """Learn each distinct prompt as if it had been emitted token by token."""
        rule = self.adaptation
        rows = dict.fromkeys(tuple(state.history.row(row).tolist()) for row in range(state.batch_size))
        # Sequences of one prompt (num_return_sequences) differ in no more than their first token, the last of a row.
        for prompt in dict.fromkeys(row[:-1] for row in rows):
            self.table.learn(list(prompt), rule.whole_window, rule.cap)
        for row in rows:
            self.table.learn(list(row[-3:]), rule.whole_window, rule.cap)

    def propose(self, state: DecodeState) -> TokenTree:
        """A tree of its own for each row."""
        search = ExpectedSearch(self.table.successors, self.search)
        tokens, parents = [], []
        for row, done in enumerate(state.finished):
            newest = state.history.row(row)[-2:].tolist()
            drafted = ([], []) if done or len(newest) < 2 else search.draft((newest[0], newest[1]), self.num_nodes)
            tokens.append(drafted[0])
            parents.append(drafted[1])
        return pad_rows(state.root, tokens, parents, sources=(self.name,))

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:  # noqa: ARG002
        """Learn from the newest tokens of every row that emitted some."""
        rule = self.adaptation
        for row, stopped in enumerate(verification.was_finished):
            if not stopped:
                self.table.learn(state.history.row(row)[-rule.window :].tolist(), rule.step, rule.cap)

    def reset(self) -> None:
        """Forget every request; the table is that of the file again, or empty."""
        self.table = self._filled(None if self._path is None else _read(Path(self._path)))

    def state_dict(self) -> dict[str, Any]:
        """The table: see ``TrigramTable.state_dict``."""
        return self.table.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a saved table.

        Raises:
            ValueError: it is none, has more successors per pair, or holds tokens beyond the target's vocabulary.
        """
        table = self._filled(saved)
        if reason := self._beyond_vocabulary(table):
            raise ValueError(f"expected {reason}")
        self.table = table

    def _filled(self, saved: dict[str, Any] | None) -> TrigramTable:
        table = TrigramTable(self.num_successors, self.max_pairs)
        if saved is not None:
            table.load_state_dict(saved)
        return table

    def _beyond_vocabulary(self, table: TrigramTable) -> str | None:
        largest = table.largest_token()
        if self._vocab_size is None or largest < self._vocab_size:
            return None
        return f"a table of tokens below {self._vocab_size}, the target's vocabulary, got token {largest}"


def _read(path: Path) -> dict[str, Any]:
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"no table of tri-grams at {path}; make one with scripts/build_trigram.py")
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)
