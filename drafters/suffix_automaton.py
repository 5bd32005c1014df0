"""Suffix automaton: what followed the longest match of the text's end (SAM-Decoding, Hu et al., arXiv:2411.10666).

An online suffix automaton over the prompt and the output of each row names the longest suffix that occurred before, in
amortised constant time per token and however long it is; the draft copies what followed its most recent occurrence. A
corpus can stand beside it: its suffix array is a static automaton whose states are intervals, and its matches give a
best-first tree by counts. Where neither match is long enough, an auxiliary drafter may take the row.

Differences from the authors' code, where it falls short of what the method means: the most recent occurrence instead
of the earliest; a copy that reaches the end of the text goes on with itself, as the repetition it assumes would;
chains end where they end instead of being filled with token 0; sampling is the target's own.

Without a corpus or an auxiliary drafter every draft is a chain, and its greatest length, ``num_draft_tokens``, can be
tuned and may change between steps (``Shaped``). How long a draft is up to there, the match decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from drafters.automaton import SuffixAutomaton
from drafters.base import ChainDrafter
from drafters.datastore import Datastore
from drafters.tries import Nodes, by_row, can_share, chain_nodes, most_frequent
from specdec.interfaces import DecodeState, Drafter, Needs, Prefill, Verification
from specdec.target import Target
from specdec.tree import TokenTree, pad_rows


class SamDecoding(ChainDrafter):
    """Draft from the longest match in the text so far or in a corpus, or by another drafter where both are short.

    Args:
        num_draft_tokens: longest chain copied from the text, and nodes of a tree from the corpus. What is tuned, where
            there is neither a corpus nor an auxiliary drafter.
        length_factor: a match of m tokens allows ``1 + int(length_factor * m)`` draft tokens (published: 4, for longer
            chains).
        min_match: shortest match that is used.
        path: folder of a datastore made by ``scripts/build_datastore.py``; None = the text alone.
        max_static_match: longest suffix looked up in the corpus.
        static_bias: tokens by which a match in the corpus must be longer than one in the text (published: 5).
        auxiliary: drafter of the rows whose match is shorter than ``auxiliary_below`` tokens (published: 5), given by
            its name in a config. It must be one that can learn from trees it has not proposed. Where its trees cannot
            share a pass with others (sampled, or begun inside the target), it takes all rows as soon as one is its.
        auxiliary_below: has no effect without an auxiliary drafter.

    Raises:
        ValueError: settings that allow no draft, or a datastore that cannot be read.
    """

    name = "suffix_automaton"

    def __init__(  # noqa: PLR0913 - the recipe's options, all by name
        self,
        num_draft_tokens: int = 10,
        length_factor: float = 8.0,
        min_match: int = 1,
        path: str | None = None,
        max_static_match: int = 16,
        static_bias: int = 5,
        auxiliary: Drafter | None = None,
        auxiliary_below: int = 5,
    ) -> None:
        if num_draft_tokens < 1 or length_factor < 0 or min_match < 1 or max_static_match < min_match:
            raise ValueError(
                "expected num_draft_tokens >= 1, length_factor >= 0 and 1 <= min_match <= max_static_match; got "
                f"{num_draft_tokens=}, {length_factor=}, {min_match=}, {max_static_match=}"
            )
        if auxiliary is not None and not isinstance(auxiliary, Drafter):
            raise ValueError(f"auxiliary: expected a drafter or the name of one, got {auxiliary!r}")
        self.num_draft_tokens, self.length_factor, self.min_match = num_draft_tokens, length_factor, min_match
        self.max_static_match, self.static_bias = max_static_match, static_bias
        self.auxiliary, self.auxiliary_below = auxiliary, auxiliary_below
        self.corpus = None if path is None else Datastore.open(path)
        self.needs = self._needs()
        self._rows: list[SuffixAutomaton] = []
        self._together = False  # the auxiliary drafter's trees are for all rows of this request

    def fit(self, target: Target) -> str | None:
        """Whether the corpus has the target's vocabulary, and what the auxiliary drafter says."""
        reason = None if self.corpus is None else self.corpus.why_not(target)
        if reason is None and self.auxiliary is not None:
            reason = self.auxiliary.fit(target)
            self.needs = self._needs()  # a drafter may know them only now
        return reason

    def _needs(self) -> Needs:
        theirs = Needs() if self.auxiliary is None else self.auxiliary.needs
        return replace(theirs, max_nodes=max(self.most_nodes, theirs.max_nodes))

    @property
    def widest(self) -> int:
        """A chain; 0 where some drafts come from a corpus or from another drafter."""
        return 1 if self.corpus is None and self.auxiliary is None else 0

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        """Copy chains of at most another length from the next step on."""
        if not self.widest:
            raise ValueError(
                "suffix_automaton with a corpus or an auxiliary drafter proposes more than chains from the text; "
                "expected path=null and auxiliary=null"
            )
        super().reshape(paths)

    def start(self, state: DecodeState, prefill: Prefill) -> None:
        """Begin one automaton per row."""
        self._rows = [SuffixAutomaton() for _ in range(state.batch_size)]
        self._together = False
        if self.auxiliary is not None:
            self.auxiliary.start(state, prefill)

    def propose(self, state: DecodeState) -> TokenTree:
        """A chain or a tree per row; the auxiliary drafter's where there is one and the match is short."""
        rows: list[Nodes] = []
        retrieved = []
        for row, done in enumerate(state.finished):
            nodes, length = (([], []), 0) if done else self._retrieve(row, state)
            rows.append(nodes)
            retrieved.append(done or length >= self.auxiliary_below)
        alone = retrieved == state.finished or (self._together and not all(retrieved))
        if self.auxiliary is not None and alone:
            return self.auxiliary.propose(state)
        tree = pad_rows(state.root, [tokens for tokens, _ in rows], [parents for _, parents in rows], (self.name,))
        if self.auxiliary is None or all(retrieved):
            return tree
        # It need not propose for rows that are served already.
        theirs = self.auxiliary.propose(replace(state, finished=retrieved))
        if not can_share(theirs):
            # The served rows go without a draft this once. To ask again would cost a draft.
            self._together = True
            return theirs
        return by_row(tree, theirs, retrieved, self.auxiliary)

    def _retrieve(self, row: int, state: DecodeState) -> tuple[Nodes, int]:
        """The nodes of one row, and the length of the match they come from, that of the corpus less its bias."""
        text, automaton = state.history.row(row), self._rows[row]
        automaton.extend(text[len(automaton.text) :].tolist())
        length = automaton.match_length if automaton.match_length >= self.min_match else 0
        if self.corpus is not None:
            found, continuations = self.corpus.continuations(
                text, self.min_match, self.max_static_match, self._allowed(self.max_static_match)
            )
            if found and (not length or found - self.static_bias > length):
                nodes = most_frequent(continuations[:, : self._allowed(found)], self.num_draft_tokens)
                return nodes, max(found - self.static_bias, 0)
        return chain_nodes(automaton.continuation(self._allowed(length)) if length else []), length

    def _allowed(self, match_length: int) -> int:
        return min(self.num_draft_tokens, 1 + int(self.length_factor * match_length))

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
        """The automata read the text when they next propose; the auxiliary drafter learns from every tree."""
        if self.auxiliary is not None:
            self.auxiliary.update(state, tree, verification)

    def finish(self, state: DecodeState) -> None:
        """Drop the automata."""
        self._rows = []
        if self.auxiliary is not None:
            self.auxiliary.finish(state)

    def reset(self) -> None:
        """Nothing of the text outlives a request; the auxiliary drafter forgets."""
        if self.auxiliary is not None:
            self.auxiliary.reset()

    def state_dict(self) -> dict[str, Any]:
        """``auxiliary``: what the auxiliary drafter learnt; nothing without one."""
        return {} if self.auxiliary is None else {"auxiliary": self.auxiliary.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Hand the auxiliary drafter its state.

        Raises:
            ValueError: a state of another drafter.
        """
        expected = [] if self.auxiliary is None else ["auxiliary"]
        if sorted(saved) != expected:
            raise ValueError(f"drafter {self.name!r} expected a state with {expected}, got one with {sorted(saved)}")
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(saved["auxiliary"])
