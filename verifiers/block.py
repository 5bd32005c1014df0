"""Block verification of a chain (Sun et al., arXiv:2403.10444): decide about whole prefixes instead of single tokens.

Shapes: B rows, N nodes, E events, D depth, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Walk
from specdec.tree import POINT, TokenTree
from verifiers.acceptance import TargetSampling, inverse_cdf, probabilities, reachable, stop_at
from verifiers.events import why_no_chain


class Block:
    """Accept the longest prefix that passes its own test; a shorter one that fails does not end the search.

    With ``a_0 = 1`` and ``a_i = min(1, a_{i-1} p(x_i) / q(x_i))``, the prefix of length i passes with probability
    ``h_i = S_i / (S_i + 1 - a_i)`` where ``S_i = sum (a_i p - q)+`` over the tokens after it, and ``h = a`` for the
    whole chain. After prefix i comes y ~ (a_i p - q)+, normalised; after the whole chain y ~ p. Exact, and never fewer
    accepted tokens than token-wise rejection in expectation.
    """

    name = "block"
    lossless = True
    samples = True
    on_path = False

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:
        """As target sampling: after the empty chain y ~ p."""
        return TargetSampling().select(scores, uniforms)

    def refuse(self, tree: TokenTree) -> str | None:
        """Anything but a chain."""
        return why_no_chain(tree)

    def num_coins(self, tree: TokenTree) -> int:
        """One per depth below the root."""
        return tree.topology.max_depth

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:
        """Coin i-1 decides about the prefix of length i; the uniform of its depth draws y."""
        assert uniforms is not None, "sampling needs uniforms"
        if tree.topology.max_depth == 0:
            return TargetSampling().accept(tree, scores, uniforms)
        assert coins is not None, "block verification needs coins"
        line = _line(tree)
        rows = torch.arange(tree.batch_size, device=line.device)
        there = line[:, 1:] >= 0
        node = line.clamp(min=0)
        p = probabilities(scores.gather(1, node[..., None].expand(-1, -1, scores.shape[-1])))
        q = _proposals(tree, node[:, 1:], scores.shape[-1])
        value = _prefix_values(p, q, tree.token_ids.gather(1, node[:, 1:]), there)
        # What of p is left after a prefix that is not the whole chain: entry i is for length i.
        left = (value[:, :-1, None] * p[:, :-1] - q).clamp_(min=0)
        total = left.sum(-1)
        whole = total + 1 - value[:, :-1]
        passing = torch.where(whole == 0, 1.0, total / whole)
        longest = torch.cat([~there, torch.ones_like(there[:, :1])], dim=1)  # no proposal after this length
        passing = torch.where(longest, value, torch.cat([passing, value[:, -1:]], dim=1))
        passed = (coins < passing[:, 1:]) & there
        depths = torch.arange(1, line.shape[1], device=line.device)
        length = torch.where(passed, depths, 0).amax(-1)
        exhausted = longest[rows, length] | (total[rows, length.clamp(max=total.shape[1] - 1)] <= 0)
        remaining = torch.where(exhausted[:, None], p[rows, length], left[rows, length.clamp(max=left.shape[1] - 1)])
        drawn = inverse_cdf(remaining, uniforms[rows, length])
        return stop_at(tree, node[rows, length], drawn)


def _line(tree: TokenTree) -> Tensor:
    """int64 ``[B, D+1]``: the candidate of each depth, -1 below the end of a row's chain."""
    depths = tree.topology.depths.expand(tree.batch_size, -1)
    end = tree.topology.max_depth + 1
    place = depths.masked_fill(~reachable(tree), end)
    nodes = torch.arange(tree.num_nodes, device=depths.device).expand_as(depths)
    return nodes.new_full((tree.batch_size, end + 1), -1).scatter_(1, place, nodes)[:, :end]


def _proposals(tree: TokenTree, node: Tensor, vocab_size: int) -> Tensor:
    """float64 ``[B, D, V]``: what each node of the line was drawn from; one-point where it was chosen."""
    tokens = tree.token_ids.gather(1, node)
    point = torch.zeros(*node.shape, vocab_size, dtype=torch.float64, device=node.device)
    point.scatter_(2, tokens[..., None], 1.0)
    draws = tree.draws
    if draws is None or draws.node.shape[1] == 0:
        return point
    event = node.new_full((node.shape[0], tree.num_nodes + 1), -1)
    order = torch.arange(draws.node.shape[1], device=node.device).expand_as(draws.node)
    event.scatter_(1, draws.node.masked_fill(draws.node < 0, tree.num_nodes), order)
    event = event.gather(1, node)
    known = event.clamp(min=0)
    sampled = (event >= 0) & (draws.kind.gather(1, known) != POINT)
    row = draws.q_row.gather(1, known).masked_fill(~sampled, 0)
    q = draws.q.gather(1, row[..., None].expand(-1, -1, vocab_size)).double()
    return torch.where(sampled[..., None], q / q.sum(-1, keepdim=True), point)


def _prefix_values(p: Tensor, q: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
    """float64 ``[B, D+1]``: a_0..a_D, 0 below the end of the chain."""
    at = tokens[..., None]
    ratio = (p[:, :-1].gather(2, at) / q.gather(2, at)).squeeze(-1)
    values = [torch.ones_like(ratio[:, 0])]
    for depth in range(ratio.shape[1]):
        following = (values[-1] * ratio[:, depth]).clamp(max=1.0)
        values.append(torch.where(there[:, depth], following, 0.0))
    return torch.stack(values, dim=1)
