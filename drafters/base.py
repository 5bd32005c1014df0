"""What drafters have in common: binding to a target, nothing to remember, and words for weights that nobody trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from specdec.interfaces import DecodeState, Needs, Prefill, Tap, Verification
from specdec.target import Target
from specdec.templates import chain_length, chain_paths
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


@torch.no_grad()
def device_of(target: Target, tap: Tap) -> torch.device:
    """Where the states of a tap arrive, which is where a module that reads them belongs.

    A model may lie on several devices, and neither its embedding nor its output head (where the two are tied) says on
    which of them a state is made; so a pass over one token is asked.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64, device=target.device)
    with target.router.taps((tap,)) as recorded:
        target.model(input_ids=ids, use_cache=False)
    return recorded[tap][0].device


class ChainDrafter(BaseDrafter):
    """A drafter whose drafts are chains, and whose length may be exchanged between steps (``Shaped``).

    Attributes:
        num_draft_tokens: of the longest chain.
    """

    num_draft_tokens: int

    @property
    def most_nodes(self) -> int:
        """N of the largest tree, root included."""
        return 1 + self.num_draft_tokens

    @property
    def tree_paths(self) -> list[tuple[int, ...]]:
        """The longest chain; none where the drafter is set up for something else."""
        return chain_paths(self.num_draft_tokens) if self.widest else []

    @property
    def widest(self) -> int:
        """A chain."""
        return 1

    @property
    def deepest(self) -> int | None:
        """No limit."""
        return None

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        """Draft chains of another length from the next step on."""
        self.num_draft_tokens = chain_length(paths, self.name)
        self.needs = replace(self.needs, max_nodes=self.most_nodes)


def warn_untrained(name: str, made: str, target: Target, way_out: str) -> None:
    """Tell the user that a drafter runs on weights which nobody has trained for this target.

    Args:
        name: of the drafter.
        made: what it has instead.
        target: that it is bound to.
        way_out: what to do about it.
    """
    warnings.warn(
        f"drafter {name!r} has no trained weights for {target.name}: {made}, so hardly a draft will be accepted; "
        f"{way_out}",
        stacklevel=3,
    )


def why_other_weights(given: Mapping[str, Any], loaded: Mapping[str, Any], place: str) -> str | None:
    """Why weights that were loaded are not those that the options ask for; None where they are.

    Args:
        given: the options; None = whatever the weights are.
        loaded: the same of the weights.
        place: where the weights come from.
    """
    differing = [name for name, value in given.items() if value is not None and value != loaded[name]]
    if not differing:
        return None
    expected, got = (", ".join(f"{name}={_written(of[name])}" for name in differing) for of in (loaded, given))
    return f"{expected} (or null), as the weights at {place} have it; got {got}, which path=new makes new ones with"


def _written(value: Any) -> str:
    """A value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def why_no_own_head(target: Target) -> str | None:
    """Why a copy of the target's output head would not say what the target says; None where it does."""
    if target.head_is_all:
        return None
    return (
        f"own_head=false: {target.name} scales or caps its logits after the output head, so that copies of the head "
        "would not say what it says"
    )
