"""Lookahead decoding: N-grams from a Jacobi window that runs in the pass which verifies them (Fu et al., 2402.02057).

The window holds N-1 levels of W guessed tokens. Level 0 lies at the W positions after the root; level l, column c one
position further than level l-1, whose guess it follows. A pass over the window yields the successor of its last level,
so every column closes an N-gram; then the levels move down by one and the successors become the last level. However
many tokens were accepted, the columns stay (moving them along was measured to accept less). N-grams go to a pool under
their first token; those of the root are the candidates of the next pass.

The window needs no mask of its own: level 0 is a chain below the root and column c's higher levels are a chain below
its node ``(0, c)``, so it is a part of the tree whose nodes are feed-only. W = 3, N = 4 (levels 0, 1, 2)::

    root - 00 - 01 - 02 - 12 - 22
            |    '- 11 - 21
            '- 10 - 20

Differences from the authors' code, where it falls short of what the method means: N-grams that begin in the random
filling of a new window are not pooled; candidates are merged into a trie with distinct siblings, so that none is
computed twice; sampling is the target's own, at any batch size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from drafters.base import BaseDrafter
from specdec.interfaces import DecodeState, Needs, Prefill, Verification
from specdec.selection import argmax
from specdec.target import Target
from specdec.transfer import upload
from specdec.tree import FEED_ONLY, TokenTree, pad_rows

Ngram = tuple[int, ...]


class NgramPool:
    """N-grams by their first token, at most ``per_token`` of each, the least recently seen of which go first.

    Args:
        size: N.
        per_token: G.
    """

    def __init__(self, size: int, per_token: int) -> None:
        self.size, self.per_token = size, per_token
        self._entries: dict[int, OrderedDict[Ngram, None]] = {}

    def add(self, ngrams: Iterable[Ngram]) -> None:
        """Note N-grams in the order in which they were seen."""
        for first, *rest in ngrams:
            known = self._entries.setdefault(first, OrderedDict())
            known[tuple(rest)] = None
            known.move_to_end(tuple(rest))
            if len(known) > self.per_token:
                known.popitem(last=False)

    def after(self, token: int) -> list[Ngram]:
        """What may follow a token: (N-1)-tuples, the most recently seen first."""
        return list(reversed(self._entries.get(token, ())))

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()

    def largest_token(self) -> int:
        """Of all N-grams; -1 where there is none."""
        return max((max(first, *map(max, known)) for first, known in self._entries.items()), default=-1)

    def as_tensor(self) -> torch.Tensor:
        """int64 ``[M, N]``, in an order that ``add`` restores the pool from."""
        rows = [[first, *rest] for first, known in self._entries.items() for rest in known]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.size)


def merge(chains: Iterable[Ngram]) -> tuple[list[int], list[int]]:
    """Tokens and parents of the trie of some chains, nodes in the order in which the chains reach them.

    Plain Python: the pool has at most G chains of N - 1 tokens (7 of 4 by default), over which sorting them in numpy
    takes 8 times as long, and 5 times over 15.
    """
    tokens: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    for chain in chains:
        node = 0
        for token in chain:
            if (node, token) not in children:
                tokens.append(token)
                parents.append(node)
                children[node, token] = len(tokens)
            node = children[node, token]
    return tokens, parents


class Lookahead(BaseDrafter):
    """Draft from a pool of N-grams which the target itself computes ahead.

    Args:
        window: W, columns of the window (published: 7 to 15).
        ngram: N, tokens of an N-gram, the one it is found by included (published: 5).
        candidates: G, N-grams kept per first token and verified at a time (published: 7 to 15).
        pool_from_prompt: begin with the N-grams of the prompt.
        pool_from_output: take in those of the text as it grows.

    Raises:
        ValueError: sizes that leave no window or no N-gram.
    """

    name = "lookahead"

    def __init__(
        self,
        window: int = 7,
        ngram: int = 5,
        candidates: int = 7,
        pool_from_prompt: bool = True,
        pool_from_output: bool = True,
    ) -> None:
        if window < 1 or ngram < 2 or candidates < 1:
            raise ValueError(
                f"expected window >= 1, ngram >= 2 and candidates >= 1; got {window=}, {ngram=}, {candidates=}"
            )
        self.window, self.levels, self.candidates = window, ngram - 1, candidates
        self.pool_from_prompt, self.pool_from_output = pool_from_prompt, pool_from_output
        self.pool = NgramPool(ngram, candidates)
        self.needs = Needs(max_nodes=1 + self.levels * (window + candidates))
        self._vocab_size: int | None = None
        self._parents = self._window_parents()
        self._windows = np.empty((0, self.levels, window), dtype=np.int64)  # [B, N-1, W]
        self._age: list[int] = []  # steps each row's window has run
        self._read: list[int] = []  # tokens of each row that the pool has seen
        self._proposed: TokenTree | None = None
        self._starts: list[int] = []  # node of (0, 0) in the newest tree

    def _window_parents(self) -> np.ndarray:
        """Parents of the window's nodes, level by level, counted from (0, 0); -1 is the root."""
        nodes = np.arange(self.levels * self.window)
        return np.where(nodes < self.window, nodes - 1, nodes - self.window)

    def fit(self, target: Target) -> str | None:
        """Any target whose vocabulary holds the pool's tokens."""
        self._vocab_size = target.vocab_size
        return self._beyond_vocabulary(self.pool.largest_token())

    def _beyond_vocabulary(self, largest: int) -> str | None:
        if self._vocab_size is None or largest < self._vocab_size:
            return None
        return f"N-grams of tokens below {self._vocab_size}, the target's vocabulary, got token {largest}"

    def start(self, state: DecodeState, prefill: Prefill) -> None:  # noqa: ARG002 - the text is in the state
        """Fill the windows with random tokens of each row's text, and the pool with its N-grams."""
        shape = (self.levels, self.window)
        windows = []
        for row in range(state.batch_size):
            text = state.history.row(row)
            picked = torch.randint(len(text), shape, generator=state.generator).numpy()
            windows.append(text[picked])
        self._windows = np.stack(windows)
        self._age = [0] * state.batch_size
        self._read = [0 if self.pool_from_prompt else len(state.history.row(r)) for r in range(state.batch_size)]
        self._read_text(state, self.pool_from_prompt)

    def _read_text(self, state: DecodeState, into_pool: bool) -> None:
        """Pool the N-grams that end in new text, or pass over it."""
        size = self.pool.size
        for row, read in enumerate(self._read):
            text = state.history.row(row)
            if into_pool and len(text) >= size and len(text) > read:
                new = text[max(read - size + 1, 0) :]
                grams = np.lib.stride_tricks.sliding_window_view(new, size) if len(new) >= size else new[:0, None]
                self.pool.add(map(tuple, grams.tolist()))
            self._read[row] = len(text)

    def propose(self, state: DecodeState) -> TokenTree:
        """The root's N-grams as candidates, then the window, whose nodes are fed only."""
        tokens: list[list[int]] = []
        parents: list[list[int]] = []
        self._starts = []
        for row, done in enumerate(state.finished):
            ids, above = ([], []) if done else merge(self.pool.after(int(state.history.row(row)[-1])))
            self._starts.append(len(ids) + 1)
            if not done:
                offset = len(ids) + 1
                above = above + np.where(self._parents < 0, 0, self._parents + offset).tolist()
                ids = ids + self._windows[row].reshape(-1).tolist()
            tokens.append(ids)
            parents.append(above)
        tree = pad_rows(state.root, tokens, parents, (self.name,))
        self._proposed = tree
        return self._with_roles(tree, state.finished)

    def _with_roles(self, tree: TokenTree, finished: list[bool]) -> TokenTree:
        starts = np.array(self._starts)[:, None]
        node = np.arange(tree.num_nodes)
        running = ~np.array(finished)[:, None]
        fed = torch.from_numpy(running & (node >= starts) & (node < starts + self._parents.size))
        role = torch.zeros_like(tree.token_ids) if tree.role is None else tree.role
        tree.role = role.masked_fill_(upload(fed, role.device), FEED_ONLY)
        return tree

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
        """Close an N-gram per column, move the window, pool what has become text."""
        self._read_text(state, self.pool_from_output)
        if tree is not self._proposed:
            return  # another drafter's turn: the window has not run
        rows = [row for row, done in enumerate(verification.was_finished) if not done]
        first = torch.tensor([self._starts[row] for row in rows]) + (self.levels - 1) * self.window
        nodes = first[:, None] + torch.arange(self.window)
        device = verification.logits.device
        last = verification.logits[upload(rows, device)[:, None], upload(nodes, device)]
        successors = argmax(last).cpu().numpy()
        for row, new in zip(rows, successors, strict=True):
            window = self._windows[row]
            if self._age[row] >= self.levels:
                self.pool.add(map(tuple, np.vstack([window, new]).T.tolist()))
            window[:-1], window[-1] = window[1:].copy(), new
            self._age[row] += 1

    def finish(self, state: DecodeState) -> None:  # noqa: ARG002 - the protocol's signature
        """Drop the windows; the pool stays."""
        self._windows, self._age, self._read = self._windows[:0], [], []
        self._proposed = None

    def reset(self) -> None:
        """Empty the pool."""
        self.pool.clear()

    def state_dict(self) -> dict[str, Any]:
        """``ngrams``: int64 ``[M, N]``, the least recently seen first among those of one token."""
        return {"ngrams": self.pool.as_tensor()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a saved pool in place of this one.

        Raises:
            ValueError: it holds N-grams of another size, no integers, or tokens beyond the target's vocabulary.
        """
        ngrams = saved.get("ngrams")
        fits = isinstance(ngrams, torch.Tensor) and ngrams.ndim == 2 and ngrams.shape[1] == self.pool.size
        if not isinstance(ngrams, torch.Tensor) or not fits or ngrams.dtype != torch.int64:
            got = f"{tuple(ngrams.shape)}, {ngrams.dtype}" if isinstance(ngrams, torch.Tensor) else repr(ngrams)
            raise ValueError(f"expected ngrams of shape (any, {self.pool.size}), torch.int64; got {got}")
        smallest, largest = (int(ngrams.min()), int(ngrams.max())) if len(ngrams) else (0, -1)
        if smallest < 0:
            raise ValueError(f"expected N-grams of token ids from 0 on, got {smallest}")
        if reason := self._beyond_vocabulary(largest):
            raise ValueError(f"expected {reason}")
        self.pool.clear()
        self.pool.add(map(tuple, ngrams.tolist()))
