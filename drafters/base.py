"""What small drafters have in common: binding to a target, and nothing to remember."""

from __future__ import annotations

from typing import Any

from specdec.interfaces import DecodeState, Needs, Prefill, Verification
from specdec.target import Target
from specdec.tree import TokenTree


class BaseDrafter:
    """A drafter that learns nothing; subclasses override what they need (``propose`` at least)."""

    name = "base"
    needs = Needs()

    def fit(self, target: Target) -> str | None:  # noqa: ARG002 - the protocol's signature
        """Every target fits."""
        return None

    def start(self, state: DecodeState, prefill: Prefill) -> None:
        """Nothing to prepare."""

    def propose(self, state: DecodeState) -> TokenTree:
        """The tree to check next."""
        raise NotImplementedError(f"{type(self).__name__} proposes nothing")

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
        """Nothing to learn."""

    def finish(self, state: DecodeState) -> None:
        """Nothing to drop."""

    def reset(self) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing learnt."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Accept the empty state only."""
        if saved:
            raise ValueError(f"drafter {self.name!r} keeps no state; got one with {sorted(saved)}")
