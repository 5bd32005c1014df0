"""Plain decoding through our own loop, so that both sides of every speed-up are counted by the same code."""

from __future__ import annotations

from drafters.base import BaseDrafter
from specdec.interfaces import DecodeState
from specdec.tree import TokenTree, root_only


class NoDrafter(BaseDrafter):
    """Proposes nothing: one token per pass."""

    name = "none"

    def propose(self, state: DecodeState) -> TokenTree:
        """The root alone."""
        return root_only(state.root)
