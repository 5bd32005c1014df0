"""Prompt lookup: what followed the last time the text ended like this (A. Saxena, 2023).

Looks up the longest suffix of the text that occurred before, the most recent occurrence first among equals, and
proposes what followed it as a chain. The original and transformers' version take the first occurrence instead.
"""

from __future__ import annotations

import numpy as np
import torch

from drafters.base import ChainDrafter
from specdec.interfaces import DecodeState, Needs
from specdec.transfer import upload
from specdec.tree import CANDIDATE, PADDING, TokenTree, chain, root_only


class PromptLookup(ChainDrafter):
    """Draft by copying from the text so far.

    Args:
        num_draft_tokens: longest chain proposed.
        max_ngram: longest suffix that is matched, in tokens.
        min_ngram: shortest suffix that counts as a match.

    Raises:
        ValueError: lengths that allow no draft.
    """

    name = "prompt_lookup"

    def __init__(self, num_draft_tokens: int = 10, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if num_draft_tokens < 1 or not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"expected num_draft_tokens >= 1 and 1 <= min_ngram <= max_ngram; got {num_draft_tokens=}, "
                f"{min_ngram=}, {max_ngram=}"
            )
        self.num_draft_tokens, self.max_ngram, self.min_ngram = num_draft_tokens, max_ngram, min_ngram
        self.needs = Needs(max_nodes=self.most_nodes)

    def propose(self, state: DecodeState) -> TokenTree:
        """A chain per row, as long as the longest match among the rows allows."""
        drafts = [
            np.empty(0, np.int64) if done else self.lookup(state.history.row(row))
            for row, done in enumerate(state.finished)
        ]
        longest = max(len(draft) for draft in drafts)
        if longest == 0:
            return root_only(state.root)
        device = state.root.device
        tokens = np.zeros((len(drafts), longest), np.int64)
        for row, draft in enumerate(drafts):
            tokens[row, : len(draft)] = draft
        token_ids = torch.cat([state.root[:, None], upload(tokens, device)], dim=1)
        role = None
        if any(len(draft) < longest for draft in drafts):
            lengths = upload([len(draft) for draft in drafts], device)[:, None]
            node = torch.arange(longest + 1, device=device)
            role = torch.where(node <= lengths, CANDIDATE, PADDING)
        return TokenTree(token_ids, chain(longest + 1, device), role, sources=(self.name,))

    def lookup(self, text: np.ndarray) -> np.ndarray:
        """What followed the best occurrence of the text's end: int64 ``[T]`` -> at most ``[num_draft_tokens]``."""
        if len(text) < 2:
            return text[:0]
        ends = np.flatnonzero(text[:-1] == text[-1])  # where the last token occurred before
        found = ends if self.min_ngram == 1 else ends[:0]
        for size in range(2, self.max_ngram + 1):
            ends = ends[ends >= size - 1]  # where the last ``size`` tokens would have room
            if not len(ends):
                break
            ends = ends[text[ends - (size - 1)] == text[-size]]
            if size >= self.min_ngram and len(ends):
                found = ends
        if not len(found):
            return text[:0]
        start = int(found[-1]) + 1
        return text[start : start + self.num_draft_tokens]
