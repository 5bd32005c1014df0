"""Acceptance rules that ask p for one token per node: greedy and target sampling; and what all rules share.

A rule is a pure function of (tree with its draws, p, uniforms, coins). p is given as scores, log-probabilities up to a
constant; it is taken in float32 where the scores are (as plain sampling takes it) and summed in float64.

Shapes: B rows, N nodes, D depth, V vocabulary, C coins.
"""

from __future__ import annotations

from itertools import compress
from operator import not_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.interfaces import Walk
from specdec.selection import argmax, on_host
from specdec.tree import TokenTree


def follow(tree: TokenTree, chosen: Tensor) -> Walk:
    """Walk from the root to the child that holds the chosen token, as long as there is one.

    Args:
        tree: the proposal; sibling candidates hold distinct tokens.
        chosen: int64 ``[B, N]``, the token that is emitted should the walk reach the node.
    """
    if tree.num_nodes == 1:
        return Walk(torch.zeros_like(chosen), chosen)
    if on_host(chosen):
        return _follow_on_host(tree, chosen)
    topology = tree.topology
    hit = chosen.gather(1, tree.parents) == tree.token_ids
    if tree.candidates is not None:
        hit = hit & tree.candidates
    # A node is reached when no node on its path, itself included, is missed; at most one per depth is.
    missed = (topology.steps > hit[:, None]).any(-1)
    path = path_to(tree, topology.depths.masked_fill(missed, -1).argmax(-1))
    return Walk(path, chosen.gather(1, path.clamp(min=0)))


def _follow_on_host(tree: TokenTree, chosen: Tensor) -> Walk:
    # The same where there is no device to wait for: one look-up by (parent, token) for each accepted node.
    longest = tree.topology.max_depth + 1
    paths, emitted = [], []
    for children, tokens in zip(children_on_host(tree), chosen.tolist(), strict=True):
        path, node = [0], children.get((0, tokens[0]))
        while node is not None:
            path.append(node)
            node = children.get((node, tokens[node]))
        missing = longest - len(path)
        paths.append(path + [-1] * missing)
        emitted.append([tokens[node] for node in path] + [tokens[0]] * missing)
    return Walk(torch.from_numpy(np.array(paths)), torch.from_numpy(np.array(emitted)))


def children_on_host(tree: TokenTree) -> list[dict[tuple[int, int], int]]:
    """Per row: (node, token) -> the child of that node that holds the token, candidates only; reads the tree back."""
    parents, numbers = tree.topology.host_parents, range(1, tree.num_nodes)
    alive = None if tree.role is None else tree.role.tolist()
    table: list[dict[tuple[int, int], int]] = []
    for row, tokens in enumerate(tree.token_ids.tolist()):
        above = parents[row if len(parents) > 1 else 0]
        nodes: Any = zip(zip(above[1:], tokens[1:], strict=True), numbers, strict=True)
        if alive is not None:
            nodes = compress(nodes, map(not_, alive[row][1:]))  # CANDIDATE is 0
        table.append(dict(nodes))
    return table


def path_to(tree: TokenTree, node: Tensor) -> Tensor:
    """int64 ``[B, D+1]``: the nodes from the root to ``node [B]``, padded with -1."""
    return tree.topology.at(tree.topology.paths, node)


def stop_at(tree: TokenTree, node: Tensor, emitted: Tensor) -> Walk:
    """Accept the path to ``node [B]`` and emit the token ``emitted [B]`` after it."""
    path = path_to(tree, node)
    tokens = tree.token_ids.gather(1, path.clamp(min=0)).roll(-1, dims=1)
    last = (path >= 0).sum(-1, keepdim=True) - 1
    return Walk(path, tokens.scatter(1, last, emitted[:, None]))


def reachable(tree: TokenTree) -> Tensor:
    """bool ``[B, N]``: candidates below candidates only, and the root."""
    if tree.candidates is None:
        return torch.ones_like(tree.token_ids, dtype=torch.bool)
    return ~(tree.topology.steps & ~tree.candidates[:, None]).any(-1)


def probabilities(scores: Tensor) -> Tensor:
    """p in float64: scores ``[..., V]`` -> ``[..., V]``."""
    return (scores if scores.dtype == torch.float64 else scores.float()).softmax(-1).double()


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw in token order, weights float64 ``[..., V]`` that need not sum to one, uniforms ``[...]`` in [0, 1).

    Tokens without weight are never drawn; int64 ``[...]``, -1 where the weights are no distribution (NaN).
    """
    cdf = weights.cumsum(-1)
    token = torch.searchsorted(cdf, (uniforms * cdf[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    # Rounding can leave u * total on the last step; the last token with mass is then the right one.
    token = torch.minimum(token, torch.searchsorted(cdf, cdf[..., -1:].contiguous()).squeeze(-1))
    return torch.where(cdf[..., -1].isfinite(), token, -1)


class Greedy:
    """Follow the child that equals the argmax. Under greedy decoding every rule is this one."""

    name = "greedy"
    lossless = True
    samples = False
    on_path = True

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:  # noqa: ARG002 - the protocol's signature
        """The first of equal maxima."""
        return argmax(scores)

    def refuse(self, tree: TokenTree) -> str | None:  # noqa: ARG002 - the protocol's signature
        """How the tree was drawn does not matter."""
        return None

    def num_coins(self, tree: TokenTree) -> int:  # noqa: ARG002 - the protocol's signature
        """None."""
        return 0

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:  # noqa: ARG002
        """The walk along the argmaxes."""
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
        return inverse_cdf(probabilities(scores), uniforms)

    def refuse(self, tree: TokenTree) -> str | None:  # noqa: ARG002 - the protocol's signature
        """How the tree was drawn does not matter, as long as it was drawn without looking at the uniforms."""
        return None

    def num_coins(self, tree: TokenTree) -> int:  # noqa: ARG002 - the protocol's signature
        """None."""
        return 0

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:  # noqa: ARG002
        """The walk along the drawn tokens."""
        assert uniforms is not None, "sampling needs uniforms"
        depths = tree.topology.depths.expand(tree.batch_size, -1)
        return follow(tree, self.select(scores, uniforms.gather(1, depths)))
