"""Typical acceptance (Medusa, arXiv:2401.10774, section 2.3.1): lossy. What it emits is not the target's own law.

Shapes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Walk
from specdec.selection import argmax
from specdec.tree import TokenTree
from verifiers.acceptance import TargetSampling, stop_at

_INSIDE_LOG = 1e-5  # the method's entropy is -sum p log(p + 1e-5)


class Typical:
    """Accept what is likely enough: ``p(x) > min(epsilon, delta exp(-H(p)))``, along the longest path.

    Deterministic but for the bonus: of the longest paths whose tokens all pass the likeliest is taken, and the token
    after it is the argmax, as in the method, so that a whole text at temperature > 0 is deterministic. At temperature
    0 (greedy decoding) the rule is ``greedy``; only there is it lossless.

    The original's two constants are swapped between its helper functions and its callers (and between its ports); the
    threshold, here ``epsilon``, is 0.09 and the factor, here ``delta``, is 0.3, its square root, as its paper advises.

    Args:
        epsilon: no token of this probability or more is refused.
        delta: how far the bar falls with the entropy of p; 0 accepts all that is possible.
        sample_bonus: draw the token after the accepted path from p instead.

    Raises:
        ValueError: epsilon outside [0, 1), or delta below 0.
    """

    name = "typical"
    lossless = False
    samples = True
    on_path = False

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3, sample_bonus: bool = False) -> None:
        if not 0 <= epsilon < 1:
            raise ValueError(f"expected epsilon in [0, 1), got {epsilon}")
        if delta < 0:
            raise ValueError(f"expected delta >= 0, got {delta}")
        self.epsilon, self.delta, self.sample_bonus = epsilon, delta, sample_bonus

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:
        """The bonus; -1 where the scores are no distribution."""
        drawn = TargetSampling().select(scores, uniforms)
        return drawn if self.sample_bonus else torch.where(drawn < 0, drawn, argmax(scores))

    def refuse(self, tree: TokenTree) -> str | None:  # noqa: ARG002 - the protocol's signature
        """How the tree was drawn does not matter: nothing is exact anyway."""
        return None

    def num_coins(self, tree: TokenTree) -> int:  # noqa: ARG002 - the protocol's signature
        """None."""
        return 0

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:  # noqa: ARG002
        """The longest path of passing tokens; the uniform of its depth draws the bonus, where that is drawn."""
        assert uniforms is not None, "sampling needs uniforms"
        topology, rows = tree.topology, torch.arange(tree.batch_size, device=scores.device)
        log_p = scores.float().log_softmax(-1)
        edge = log_p[rows[:, None], tree.parents, tree.token_ids]
        passing = edge.exp() > self.threshold(log_p.exp()).gather(1, tree.parents)
        if tree.candidates is not None:
            passing &= tree.candidates
        reached = ~(topology.steps & ~passing[:, None]).any(-1)
        depth = topology.depths.masked_fill(~reached, -1)
        likelihood = (topology.steps * edge.masked_fill(~passing, 0.0)[:, None]).sum(-1)
        longest = depth == depth.amax(-1, keepdim=True)
        last = likelihood.masked_fill(~longest, -torch.inf).argmax(-1)
        level = topology.depths.expand(tree.batch_size, -1)[rows, last]
        return stop_at(tree, last, self.select(scores[rows, last], uniforms[rows, level]))

    def threshold(self, p: Tensor) -> Tensor:
        """The bar at a node: p ``[..., V]`` -> ``[...]``."""
        entropy = -(p * (p + _INSIDE_LOG).log()).sum(-1)
        return (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
