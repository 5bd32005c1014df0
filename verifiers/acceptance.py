"""Acceptance rules: pure functions of (tree, p, draws, uniforms).

Shapes: B rows, N nodes, D depth, V vocabulary. p is given as scores, log-probabilities up to a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Walk
from specdec.selection import argmax
from specdec.tree import TokenTree


def follow(tree: TokenTree, chosen: Tensor) -> Walk:
    """Walk from the root to the child that holds the chosen token, as long as there is one.

    Args:
        tree: the proposal; sibling candidates hold distinct tokens.
        chosen: int64 ``[B, N]``, the token that is emitted should the walk reach the node.
    """
    if tree.num_nodes == 1:
        return Walk(torch.zeros_like(chosen), chosen)
    topology = tree.topology
    hit = chosen.gather(1, tree.parents) == tree.token_ids
    if tree.candidates is not None:
        hit = hit & tree.candidates
    # A node is reached when no node on its path, itself included, is missed; at most one per depth is.
    missed = (topology.steps > hit[:, None]).any(-1)
    path = topology.at(topology.paths, topology.depths.masked_fill(missed, -1).argmax(-1))
    return Walk(path, chosen.gather(1, path.clamp(min=0)))


class Greedy:
    """Follow the child that equals the argmax. Under greedy decoding every lossless rule reduces to this."""

    name = "greedy"
    lossless = True
    samples = False
    on_path = True

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:  # noqa: ARG002 - the protocol's signature
        return argmax(scores)

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None) -> Walk:
        return follow(tree, self.select(scores, uniforms))


class TargetSampling:
    """Draw y ~ p at the node; if a child holds y go there, else stop and emit that same y.

    Exact for every tree that was built without looking at these uniforms and whose siblings are distinct; a node is
    accepted with the probability p gives its path, the upper bound for a fixed tree. The draw is by inverse CDF in
    token order, so equal uniforms give equal tokens whatever the tree.
    """

    name = "target_sampling"
    lossless = True
    samples = True
    on_path = True

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:
        """-1 where the scores are no distribution (NaN, or nothing left to choose from)."""
        assert uniforms is not None, "sampling needs uniforms"
        cdf = scores.float().softmax(-1).double().cumsum(-1)
        token = torch.searchsorted(cdf, (uniforms * cdf[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
        # Rounding can leave u * total on the last step; the last token with mass is then the right one.
        token = torch.minimum(token, torch.searchsorted(cdf, cdf[..., -1:].contiguous()).squeeze(-1))
        return torch.where(cdf[..., -1].isfinite(), token, -1)

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None) -> Walk:
        assert uniforms is not None, "sampling needs uniforms"
        depths = tree.topology.depths.expand(tree.batch_size, -1)
        return follow(tree, self.select(scores, uniforms.gather(1, depths)))
