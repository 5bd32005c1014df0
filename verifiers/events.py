"""The draws of a tree as rules replay them, and what can be asked about how a tree was drawn.

Shapes: B rows, N nodes, E events, K most events at one node, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specdec.tree import POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT, Draws, TokenTree

KIND_NAMES = {POINT: "chosen", WITH_REPLACEMENT: "drawn with replacement", WITHOUT_REPLACEMENT: "without replacement"}


class Events:
    """What was drawn below every node, in the order it happened.

    Events that name a node which is no candidate count as padding.

    Args:
        tree: the tree.
        draws: its draws, or those of ``completed``.

    Attributes:
        node: int64 ``[B, E]``, the child that the event proposed; -1 pads.
        parent: int64 ``[B, E]``, the node that it happened at; N where it is padding.
        token: int64 ``[B, E]``.
        kind: int64 ``[B, E]``.
    """

    def __init__(self, tree: TokenTree, draws: Draws) -> None:
        self.draws, self.kind = draws, draws.kind
        self.node = draws.node
        if tree.candidates is not None:
            self.node = self.node.masked_fill(~tree.candidates.gather(1, self.node.clamp(min=0)), -1)
        child = self.node.clamp(min=0)
        self.token = tree.token_ids.gather(1, child)
        self.parent = tree.parents.gather(1, child).masked_fill(self.node < 0, tree.num_nodes)
        self._num_nodes = tree.num_nodes
        self._same = self.parent[:, :, None] == self.parent[:, None]  # entry (e, f): events at the same node
        self._rows = torch.arange(tree.batch_size, device=child.device)
        self._gone: Tensor | None = None
        if WITHOUT_REPLACEMENT in (draws.kinds or KIND_NAMES):
            without = (self.kind == WITHOUT_REPLACEMENT) & (self.node >= 0)
            self._gone = self._same.tril(-1) & without[:, :, None] & without[:, None]
            self._gone &= draws.q_row[:, :, None] == draws.q_row[:, None]

    @property
    def count(self) -> int:
        """E."""
        return self.node.shape[1]

    def at_nodes(self) -> Tensor:
        """int64 ``[B, N, K]``: the events at every node in order, -1 pads."""
        rank = self._same.tril(-1).sum(-1)
        width = self.draws.width
        if width is None:
            width = int(rank.masked_fill(self.node < 0, -1).max()) + 1
        place = (self.parent * width + rank).masked_fill(self.node < 0, self._num_nodes * width)
        table = place.new_full((place.shape[0], self._num_nodes * width + 1), -1)
        order = torch.arange(self.count, device=place.device).expand_as(place)
        return table.scatter_(1, place, order)[:, :-1].view(place.shape[0], self._num_nodes, width)

    def up_to_the_last_draw(self) -> Tensor:
        """bool ``[B, E]``: sampled events, and point events that have one after them at the same node."""
        sampled = (self.kind != POINT) & (self.node >= 0)
        return (self._same & sampled[:, None]).triu().any(-1)

    def distribution(self, event: Tensor) -> Tensor:
        """What an event was drawn from, as it was then: int64 ``[B]`` -> float64 ``[B, V]``.

        Padding may be asked for; the answer is then without meaning, but finite.
        """
        at = event[:, None]
        q = self.draws.q[self._rows, self.draws.q_row.gather(1, at).squeeze(1)].double()
        if self._gone is not None:
            q.scatter_reduce_(1, self.token, (~self._gone[self._rows, event]).double(), "prod")
        point = self.kind.gather(1, at) == POINT
        q = q.mul_(~point).scatter_add_(1, self.token.gather(1, at), point.double())
        return q.div_(q.sum(-1, keepdim=True).clamp_(min=_TINY))


_TINY = 1e-300


def completed(tree: TokenTree, vocab_size: int) -> Draws:
    """The draws with a point event for every candidate that none of them names, after those of its parent."""
    nodes = torch.arange(tree.num_nodes, device=tree.token_ids.device).expand_as(tree.token_ids)
    draws = tree.draws
    if draws is None:
        kind = torch.full_like(nodes, POINT)
        return Draws(
            nodes.masked_fill(nodes == 0, -1),
            kind,
            torch.zeros_like(nodes),
            torch.zeros(tree.batch_size, 1, vocab_size, device=nodes.device),
            kinds=frozenset({POINT}),
        )
    named = torch.zeros(nodes.shape[0], nodes.shape[1] + 1, dtype=torch.bool, device=nodes.device)
    named.scatter_(1, draws.node.masked_fill(draws.node < 0, tree.num_nodes), True)
    named[:, 0] = True
    return replace(
        draws,
        node=torch.cat([draws.node, nodes.masked_fill(named[:, :-1], -1)], dim=1),
        kind=torch.cat([draws.kind, torch.full_like(nodes, POINT)], dim=1),
        q_row=torch.cat([draws.q_row, torch.zeros_like(nodes)], dim=1),
        width=None,
        kinds=None if draws.kinds is None else draws.kinds | {POINT},
    )


def only_points(tree: TokenTree) -> bool:
    """Whether nothing was drawn, as far as the drafter says."""
    draws = tree.draws
    return draws is None or draws.node.shape[1] == 0 or draws.kinds == frozenset({POINT})


def why_no_chain(tree: TokenTree) -> str | None:
    """What keeps the candidates from being one chain of single draws.

    Read off the shape where all rows share it and all nodes are candidates; otherwise it synchronises.
    """
    topology = tree.topology
    if topology.max_depth < tree.num_nodes - 1 or topology.parents.shape[0] > 1:
        shared = topology.parents.shape[0] == 1 and tree.candidates is None
        children = torch.ones_like(tree.token_ids) if tree.candidates is None else tree.candidates.long()
        if shared or _most(tree.num_nodes, tree.parents[:, 1:], children[:, 1:]) > 1:
            return "it branches, and this rule is for chains; acceptance=recursive_rejection or traversal take trees"
    draws = tree.draws
    if draws is None or draws.width == 1:
        return None
    if _most(tree.num_nodes, draws.node.clamp(min=0), (draws.node >= 0).long()) > 1:
        return (
            "several draws name one node, and this rule is for single draws; acceptance=recursive_rejection takes them"
        )
    return None


def _most(num_nodes: int, nodes: Tensor, counts: Tensor) -> int:
    """The largest count that a node of any row gets: nodes and counts int64 ``[B, M]``."""
    return int(nodes.new_zeros(nodes.shape[0], num_nodes).scatter_add_(1, nodes, counts).max())


def kinds_of(tree: TokenTree) -> frozenset[int]:
    """The kinds of the draws; synchronises on an accelerator where the drafter does not state them."""
    draws = tree.draws
    if draws is None:
        return frozenset()
    return draws.kinds if draws.kinds is not None else frozenset(draws.kind[draws.node >= 0].tolist())


def nobody(rows: Tensor) -> bool:
    """Whether no row is concerned, as far as can be told for free: on an accelerator asking would synchronise."""
    return rows.device.type == "cpu" and not bool(rows.any())
