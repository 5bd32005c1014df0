"""The draws of a tree sorted by the node that they are about, for rules that replay them.

Shapes: B rows, N nodes, E events, K most events at one node, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.tree import POINT, WITHOUT_REPLACEMENT, TokenTree


class Events:
    """What was drawn below every node, in the order it happened.

    Args:
        tree: with or without draws.

    Attributes:
        node: int64 ``[B, E]``, the child that the event proposed; -1 pads.
        parent: int64 ``[B, E]``, the node that it happened at; N where it is padding.
        token: int64 ``[B, E]``.
        kind: int64 ``[B, E]``.
        at: int64 ``[B, N, K]``, the events at a node in order, -1 pads.
    """

    def __init__(self, tree: TokenTree) -> None:
        self.node, self.kind, self.q_row = _listed(tree)
        self.q = None if tree.draws is None else tree.draws.q
        width = None if tree.draws is None else tree.draws.width
        child = self.node.clamp(min=0)
        self.token = tree.token_ids.gather(1, child)
        self.parent = tree.parents.gather(1, child).masked_fill(self.node < 0, tree.num_nodes)
        self.same = self.parent[:, :, None] == self.parent[:, None]
        rank = self.same.tril(-1).sum(-1)
        if width is None:
            width = int(rank.masked_fill(self.node < 0, -1).max()) + 1 if rank.numel() else 0
        place = (self.parent * width + rank).masked_fill(self.node < 0, tree.num_nodes * width)
        at = place.new_full((tree.batch_size, tree.num_nodes * width + 1), -1)
        order = torch.arange(place.shape[1], device=place.device).expand_as(place)
        self.at = at.scatter_(1, place, order)[:, :-1].view(tree.batch_size, tree.num_nodes, width)
        self._rows = torch.arange(tree.batch_size, device=place.device)

    @property
    def width(self) -> int:
        """K."""
        return self.at.shape[2]

    def before_a_draw(self) -> Tensor:
        """bool ``[B, E]``: sampled events and the point events that have one after them at the same node."""
        sampled = (self.kind != POINT) & (self.node >= 0)
        return (self.same & sampled[:, None]).triu().any(-1)

    def distribution(self, event: Tensor, earlier: Tensor) -> Tensor:
        """What an event was drawn from, up to a factor.

        Args:
            event: int64 ``[B]``, 0 where there is none.
            earlier: int64 ``[B, k]``, the events at the same node before it.

        Returns:
            float64 ``[B, V]``, zero at tokens that could not be drawn (any more).
        """
        token = self.token.gather(1, event[:, None])
        kind = self.kind.gather(1, event[:, None])
        row = self.q_row.gather(1, event[:, None])
        assert self.q is not None, "sampled events come with their distributions"
        q = self.q[self._rows, row.squeeze(1)].double()
        if earlier.shape[1]:
            gone = (kind == WITHOUT_REPLACEMENT) & (self.kind.gather(1, earlier) == WITHOUT_REPLACEMENT)
            gone &= self.q_row.gather(1, earlier) == row
            q.scatter_reduce_(1, self.token.gather(1, earlier), (~gone).double(), "prod")
        point = kind == POINT
        return q.mul_(~point).scatter_add_(1, token, point.double())


def _listed(tree: TokenTree) -> tuple[Tensor, Tensor, Tensor]:
    """Events as the drafter lists them; those of nodes that cannot be accepted never happened."""
    draws = tree.draws
    if draws is None:
        return tree.token_ids[:, :0], tree.token_ids[:, :0], tree.token_ids[:, :0]
    node = draws.node
    if tree.candidates is not None:
        node = node.masked_fill(~tree.candidates.gather(1, node.clamp(min=0)), -1)
    return node, draws.kind, draws.q_row


def nobody(rows: Tensor) -> bool:
    """Whether no row is concerned, as far as can be told for free: on an accelerator asking would synchronise."""
    return rows.device.type == "cpu" and not bool(rows.any())
