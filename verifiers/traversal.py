"""Traversal verification of a tree (Weng et al., arXiv:2505.12398): block verification with branches.

Shapes: B rows, N nodes, E events, D depth, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Walk
from specdec.tree import TokenTree
from verifiers.acceptance import TargetSampling, inverse_cdf, probabilities, reachable, stop_at
from verifiers.events import Events, completed, nobody


class Traversal:
    """From the first leaf upwards: a leaf that passes is accepted with its whole path, else it is cut off.

    A node has a value a (1 at the root) and what remains of p there, r. The child x of an event drawn from q gets
    ``min(1, a r(x) / q(x))``. A node without children left passes with probability a; where it fails, its parent loses
    the event: ``S = sum (a r - q)+``, ``a <- S / (S + 1 - a)``, ``r <- (a r - q)+ / S``. After the node that passed
    comes y ~ r. Exact for every mixture of kinds and distributions; on a chain it is block verification, and it never
    accepts fewer tokens than recursive rejection in expectation.

    Which value a node has when its turn comes does not depend on the coins, since its turn comes only when all before
    it have failed. So all values are computed first, and the first node in post-order whose coin passes is taken.
    """

    name = "traversal"
    lossless = True
    samples = True
    on_path = False

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:
        """As target sampling: at a root without children r is p."""
        return TargetSampling().select(scores, uniforms)

    def refuse(self, tree: TokenTree) -> str | None:  # noqa: ARG002 - the protocol's signature
        """Every tree will do."""
        return None

    def num_coins(self, tree: TokenTree) -> int:
        """One per node."""
        return tree.num_nodes if tree.num_nodes > 1 else 0

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:
        """Coin n decides whether node n passes; the uniform of its depth draws y."""
        assert uniforms is not None, "sampling needs uniforms"
        if tree.num_nodes == 1:
            return TargetSampling().accept(tree, scores, uniforms)
        assert coins is not None, "traversal needs coins"
        events = Events(tree, completed(tree, scores.shape[-1]))
        first = _first_events(tree, events)
        order = events.parent.argsort(dim=1, stable=True)
        entry, value = _values(events, order, first, scores)
        passed = (coins < value) & reachable(tree)
        passed[:, 0] = True
        last = _post_order(tree, first).masked_fill(~passed, tree.num_nodes).argmin(-1)
        remaining = _remaining(events, order, scores, last, entry.gather(1, last[:, None]).squeeze(1))
        depth = tree.topology.depths.expand(tree.batch_size, -1).gather(1, last[:, None])
        return stop_at(tree, last, inverse_cdf(remaining, uniforms.gather(1, depth).squeeze(1)))


def _first_events(tree: TokenTree, events: Events) -> Tensor:
    """int64 ``[B, N]``: the event that proposed each node first; E where there is none."""
    first = torch.full((tree.batch_size, tree.num_nodes + 1), events.count, device=events.node.device)
    order = torch.arange(events.count, device=first.device).expand_as(events.node)
    place = events.node.masked_fill(events.node < 0, tree.num_nodes)
    return first.scatter_reduce_(1, place, order, "amin")[:, :-1]


def _values(events: Events, order: Tensor, first: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """float64 ``[B, N]`` twice: the value of every node while it has all its children, and when it has lost them.

    Parents precede children, so that with events in order of their parents every value is known when it is needed.
    """
    rows = torch.arange(scores.shape[0], device=scores.device)
    num_nodes = scores.shape[1]
    entry = torch.zeros(scores.shape[0], num_nodes + 1, dtype=torch.float64, device=scores.device)
    entry[:, 0] = 1.0
    value = entry.clone()
    current = torch.full_like(rows, -1)
    r, a = torch.zeros(1, dtype=torch.float64, device=scores.device), value[:, 0]
    for event in order.unbind(1):
        parent = events.parent[rows, event]
        if nobody(parent < num_nodes):
            break
        begins = parent != current
        if not nobody(begins):
            r = torch.where(begins[:, None], probabilities(scores[rows, parent.clamp(max=num_nodes - 1)]), r)
        a = torch.where(begins, entry[rows, parent], a)
        q = events.distribution(event)
        token, child = events.token[rows, event], events.node[rows, event]
        share = (a * r[rows, token] / q[rows, token]).clamp(max=1.0)
        # A token drawn again finds its node cut off already; padding goes to the spare column.
        new = (child >= 0) & (first[rows, child.clamp(min=0)] == event)
        place = torch.where(new, child, num_nodes)
        entry[rows, place] = share
        value[rows, place] = share
        r, a = _lose(r, a, q)
        value[rows, parent] = a
        current = parent
    return entry[:, :-1], value[:, :-1]


def _lose(r: Tensor, a: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """What a node keeps of p, and its value, once an event drawn from q has failed."""
    left = (a[:, None] * r - q).clamp_(min=0)
    total = left.sum(-1)
    whole = total + 1 - a
    kept = torch.where((total > 0)[:, None], left / total[:, None], r)
    return kept, torch.where(whole == 0, 1.0, total / whole)


def _post_order(tree: TokenTree, first: Tensor) -> Tensor:
    """int64 ``[B, N]``: the place of every node when subtrees are visited in order of their first events."""
    ancestors = tree.topology.ancestors.expand(tree.batch_size, -1, -1).float()
    size = ancestors.sum(1)
    siblings = tree.parents[:, :, None] == tree.parents[:, None]
    # Nodes without an event (the root, what is no candidate) are never visited: any place of their own will do.
    nodes = torch.arange(tree.num_nodes, device=first.device)
    age = first * tree.num_nodes + nodes
    earlier = siblings & (age[:, None] < age[:, :, None]) & (nodes > 0) & (nodes > 0)[:, None]
    before = (earlier.float() @ size[..., None]).squeeze(-1)
    return ((ancestors @ before[..., None]).squeeze(-1) + size - 1).long()


def _remaining(events: Events, order: Tensor, scores: Tensor, node: Tensor, a: Tensor) -> Tensor:
    """float64 ``[B, V]``: r at ``node [B]``, entered with value a, after all its events have failed."""
    rows = torch.arange(scores.shape[0], device=scores.device)
    r = probabilities(scores[rows, node])
    for event in order.unbind(1):
        concerned = events.parent[rows, event] == node
        if nobody(concerned):
            continue
        kept, left = _lose(r, a, events.distribution(event))
        r, a = torch.where(concerned[:, None], kept, r), torch.where(concerned, left, a)
    return r
