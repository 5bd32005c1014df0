"""Rejection rules: accept a drawn child with the ratio of p to q, else go on with what of p the draw did not cover.

Token-wise on chains (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318), and recursively over the
children of a node, drawn independently (SpecInfer, arXiv:2305.09781) or without replacement (RSD, arXiv:2402.14160;
Sequoia, arXiv:2402.12374).

Shapes: B rows, N nodes, E events, D depth, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Walk
from specdec.tree import POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT, TokenTree
from verifiers.acceptance import TargetSampling, inverse_cdf, probabilities
from verifiers.events import KIND_NAMES, Events, kinds_of, nobody, only_points, why_no_chain

_KINDS = {
    "any": frozenset(KIND_NAMES),
    "with": frozenset({POINT, WITH_REPLACEMENT}),
    "without": frozenset({POINT, WITHOUT_REPLACEMENT}),
}


class RecursiveRejection:
    """The events at a node one after the other, in the order they were drawn.

    With r = p at first, the child x of an event drawn from q is accepted with probability ``min(1, r(x) / q(x))``; on
    rejection ``r <- (r - q)+``, normalised, and the next event is tried. When none is left y ~ r is emitted. Exact for
    any mixture of kinds and of distributions, as long as the events are replayed in order and q is what each was
    really drawn from. Point events that come last at their node, and candidates that no event names, are decided by
    that same y: its child is accepted where there is one. So without draws the walk is exactly ``target_sampling``.

    Args:
        replacement: the draws to take: "any" (every event says how it was drawn), or "with" or "without" only, which
            refuse the others. Chosen children go with all of them.

    Raises:
        ValueError: another ``replacement``.
    """

    name = "recursive_rejection"
    lossless = True
    samples = True
    on_path = False

    def __init__(self, replacement: str = "any") -> None:
        if replacement not in _KINDS:
            raise ValueError(f"expected replacement to be one of {', '.join(_KINDS)}; got {replacement!r}")
        self.kinds = _KINDS[replacement]
        if replacement != "any":
            self.name = f"rejection_{replacement}_replacement"

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:
        """As target sampling: where nothing was drawn, p is all that remains."""
        return TargetSampling().select(scores, uniforms)

    def refuse(self, tree: TokenTree) -> str | None:
        """Draws of a kind that this rule was told not to take."""
        if len(self.kinds) == len(KIND_NAMES):
            return None
        others = [KIND_NAMES[kind] for kind in sorted(kinds_of(tree) - self.kinds)]
        return f"it has children {others[0]}; acceptance=recursive_rejection takes any" if others else None

    def num_coins(self, tree: TokenTree) -> int:
        """One per event."""
        return 0 if only_points(tree) else tree.draws.node.shape[1]  # type: ignore[union-attr]

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:
        """Coin e decides event e; the uniform of a depth draws what is emitted after the last accepted node."""
        if only_points(tree):
            return TargetSampling().accept(tree, scores, uniforms)
        assert uniforms is not None and coins is not None, "rejection needs uniforms and coins"
        return _Replay(tree, scores, coins).walk(uniforms)


class TokenWise(RecursiveRejection):
    """Recursive rejection on chains of single draws, where it is the original speculative sampling.

    Every drafted token is accepted with probability ``min(1, p / q)``; after the first rejection the walk ends with
    y ~ (p - q)+, normalised.
    """

    name = "token_wise"

    def __init__(self) -> None:
        super().__init__()

    def refuse(self, tree: TokenTree) -> str | None:
        """Anything but a chain."""
        return why_no_chain(tree)


class _Replay:
    """One batch of trees being walked."""

    def __init__(self, tree: TokenTree, scores: Tensor, coins: Tensor) -> None:
        assert tree.draws is not None
        self.tree, self.scores, self.coins = tree, scores, coins
        self.events = Events(tree, tree.draws)
        at = self.events.at_nodes()
        # What comes after the last draw is decided by the token drawn from what remains.
        tried = self.events.up_to_the_last_draw().gather(1, at.clamp(min=0).flatten(1)).view_as(at)
        self.at = torch.where(tried, at, -1)
        self.rows = torch.arange(tree.batch_size, device=scores.device)

    def walk(self, uniforms: Tensor) -> Walk:
        tree, depth = self.tree, self.tree.topology.max_depth
        node = torch.zeros_like(self.rows)
        active = torch.ones_like(self.rows, dtype=torch.bool)
        path = node.new_full((tree.batch_size, depth + 1), -1)
        tokens = torch.zeros_like(path)
        for level in range(depth + 1):
            chosen, remaining = self._try(node, active, children=level < depth)
            drawn = inverse_cdf(remaining, uniforms[:, level])
            accepted = chosen >= 0
            following = torch.where(accepted, chosen, self._child(node, drawn))
            path[:, level] = torch.where(active, node, -1)
            taken = tree.token_ids[self.rows, chosen.clamp(min=0)]
            tokens[:, level] = torch.where(accepted, taken, drawn)
            active = active & (following >= 0)
            node = following.clamp(min=0)
            if nobody(active):
                break
        return Walk(path, tokens)

    def _try(self, node: Tensor, active: Tensor, children: bool) -> tuple[Tensor, Tensor]:
        """The child that an event got accepted, -1 for none, and what then remains of p ``[B, V]``, up to a factor."""
        remaining = probabilities(self.scores[self.rows, node])
        chosen = torch.full_like(node, -1)
        here = self.at[self.rows, node]
        for slot in range(here.shape[1] if children else 0):
            trying = active & (chosen < 0) & (here[:, slot] >= 0)
            if nobody(trying):
                break
            event = here[:, slot : slot + 1].clamp(min=0)
            token = self.events.token.gather(1, event)
            covered = self.events.distribution(event.squeeze(1)) * remaining.sum(-1, keepdim=True)
            bar = self.coins.gather(1, event) * covered.gather(1, token)
            hit = (bar < remaining.gather(1, token)).squeeze(1)
            chosen = torch.where(trying & hit, self.events.node.gather(1, event).squeeze(1), chosen)
            left = (remaining - covered).clamp_(min=0)
            # Where p and q agree but for rounding nothing is left; what is rejected then is rejected by rounding.
            lost = trying & ~hit & (left.sum(-1) > 0)
            remaining = torch.where(lost[:, None], left, remaining)
        return chosen, remaining

    def _child(self, node: Tensor, token: Tensor) -> Tensor:
        """int64 ``[B]``: the candidate below ``node`` that holds ``token``, -1 where there is none."""
        tree = self.tree
        holds = (tree.parents == node[:, None]) & (tree.token_ids == token[:, None])
        holds[:, 0] = False  # the root is its own parent
        if tree.candidates is not None:
            holds &= tree.candidates
        return torch.where(holds.any(-1), holds.int().argmax(-1), -1)
