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
from specdec.tree import POINT, TokenTree
from verifiers.acceptance import TargetSampling, inverse_cdf, probabilities
from verifiers.events import Events, nobody

_TINY = 1e-300


class RecursiveRejection:
    """The events at a node one after the other, in the order they were drawn.

    With r = p at first, the child x of an event drawn from q is accepted with probability ``min(1, r(x) / q(x))``; on
    rejection ``r <- (r - q)+``, normalised, and the next event is tried. When none is left y ~ r is emitted. Exact for
    any mixture of kinds and of distributions, as long as the events are replayed in order and q is what each was
    really drawn from. Point events that come last at their node, and candidates that no event names, are decided by
    that same y: its child is accepted where there is one. So without draws the walk is exactly ``target_sampling``.
    """

    name = "recursive_rejection"
    lossless = True
    samples = True
    on_path = False

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:
        """As target sampling: at a node without children nothing else is left."""
        return TargetSampling().select(scores, uniforms)

    def refuse(self, tree: TokenTree) -> str | None:  # noqa: ARG002 - the protocol's signature
        """Every tree will do."""
        return None

    def num_coins(self, tree: TokenTree) -> int:
        """One per event."""
        return 0 if _only_points(tree) else tree.draws.node.shape[1]  # type: ignore[union-attr]

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:
        """Coin e decides event e; the uniform of a depth draws what is emitted after the last accepted node."""
        if _only_points(tree):
            return TargetSampling().accept(tree, scores, uniforms)
        assert uniforms is not None and coins is not None, "rejection needs uniforms and coins"
        return _Replay(tree, scores, coins).walk(uniforms)


def _only_points(tree: TokenTree) -> bool:
    """Whether nothing was drawn, as far as the drafter says."""
    return tree.draws is None or tree.draws.node.shape[1] == 0 or tree.draws.kinds == frozenset({POINT})


class _Replay:
    """One batch of trees being walked."""

    def __init__(self, tree: TokenTree, scores: Tensor, coins: Tensor) -> None:
        self.tree, self.scores, self.coins = tree, scores, coins
        self.events = Events(tree)
        # The rest is decided by the draw from what remains.
        tried = self.events.before_a_draw()
        at = self.events.at
        known = tried.gather(1, at.clamp(min=0).flatten(1)).view_as(at)
        self.at = torch.where(known, at, -1)
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
        """The child that an event got accepted, -1 for none, and what then remains of p ``[B, V]``."""
        remaining = probabilities(self.scores[self.rows, node])
        chosen = torch.full_like(node, -1)
        here = self.at[self.rows, node]
        for slot in range(self.events.width if children else 0):
            trying = active & (chosen < 0) & (here[:, slot] >= 0)
            if nobody(trying):
                break
            event = here[:, slot].clamp(min=0)
            q = self.events.distribution(event, here[:, :slot].clamp(min=0))
            token = self.events.token.gather(1, event[:, None])
            share, scale = remaining.sum(-1), q.sum(-1)
            bar = self.coins.gather(1, event[:, None]) * q.gather(1, token)
            hit = (bar.squeeze(1) * share) < remaining.gather(1, token).squeeze(1) * scale
            child = self.events.node.gather(1, event[:, None]).squeeze(1)
            chosen = torch.where(trying & hit, child, chosen)
            left = (remaining - q * (share / scale.clamp(min=_TINY))[:, None]).clamp_(min=0)
            # Where p and q agree to rounding nothing is left and nothing is rejected but by rounding.
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
