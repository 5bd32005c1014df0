"""Tries of known continuations, and trees that take each row from one of two drafters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.interfaces import Drafter
from specdec.transfer import upload
from specdec.tree import CANDIDATE, PADDING, TokenTree, Topology

Nodes = tuple[list[int], list[int]]
"""Tokens and parents of a row's nodes 1, 2, ..., as ``specdec.tree.pad_rows`` takes them."""


def chain_nodes(tokens: list[int]) -> Nodes:
    """One path."""
    return tokens, list(range(len(tokens)))


def most_frequent(rows: np.ndarray, num_nodes: int, weights: np.ndarray | None = None) -> Nodes:
    """The prefixes that most continuations share, as a trie.

    The value of a node is the number of rows that begin with its path, which is what best-first expansion by the
    product of count ratios along the path orders by as well: the product telescopes. No node outweighs its parent, so
    the ``num_nodes`` largest are closed; the shallower one goes first among equals.

    Args:
        rows: int64 ``[H, D]``, one continuation each; -1 = it has ended (and stays so to the right).
        num_nodes: largest trie, the root not counted.
        weights: positive int64 ``[H]``, what each row counts for; None = 1.
    """
    count, depth = rows.shape
    if not count or not depth:
        return [], []
    order = np.lexsort(rows.T[::-1])
    rows = rows[order]
    # A node is a run of rows with an equal prefix; runs in a column are told apart by where one begins.
    begins = np.ones((count, depth), dtype=bool)
    np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1, out=begins[1:])
    flat = begins.T.reshape(-1)
    starts = np.flatnonzero(flat)
    levels, firsts = np.divmod(starts, count)
    tokens = rows[firsts, levels]
    weights = np.ones(count, dtype=np.int64) if weights is None else weights[order]
    values = np.add.reduceat(np.tile(weights, depth), starts)
    values[tokens < 0] = 0
    chosen = np.argsort(-values, kind="stable")[: min(num_nodes, np.count_nonzero(values))]
    chosen.sort()
    run = flat.cumsum() - 1
    above = run[np.maximum(starts[chosen] - count, 0)]
    parents = np.where(levels[chosen] > 0, np.searchsorted(chosen, above) + 1, 0)
    return tokens[chosen].tolist(), parents.tolist()


def can_share(tree: TokenTree) -> bool:
    """Whether it may share a pass with another tree: it is not sampled, nor begun inside the target."""
    return tree.draws is None and tree.entry is None


def by_row(first: TokenTree, second: TokenTree, takes_first: list[bool], second_drafter: Drafter) -> TokenTree:
    """The tree whose rows come from ``first`` where ``takes_first`` says so, else from ``second``.

    Args:
        first: a tree of candidates and padding only, ``[B, N]``.
        second: any tree of point-mass proposals, ``[B, M]``.
        takes_first: one per row.
        second_drafter: whose tree ``second`` is, for messages.

    Raises:
        ValueError: ``second`` holds sampled proposals, or enters the target above its first layer; such a tree cannot
            share a pass with another.
    """
    if not can_share(second):
        raise ValueError(
            f"drafter {second_drafter.name!r} proposes trees that cannot share a pass with another drafter's (sampled, "
            "or begun inside the target); expected one that proposes tokens only, such as token_recycling"
        )
    device, size = first.token_ids.device, max(first.num_nodes, second.num_nodes)
    takes = upload(takes_first, device)[:, None]

    def mix(of_first: Tensor, of_second: Tensor, fill: int) -> Tensor:
        pad = [F.pad(x, (0, size - x.shape[1]), value=fill) for x in (of_first, of_second)]
        return torch.where(takes, pad[0], pad[1])

    roles = [torch.full_like(t.token_ids, CANDIDATE) if t.role is None else t.role for t in (first, second)]
    shape = Topology(mix(first.parents, second.parents, 0), max(_depth(first, takes), _depth(second, ~takes)))
    zero = torch.zeros_like(first.token_ids)
    theirs = torch.zeros_like(second.token_ids) if second.source is None else second.source.expand_as(second.token_ids)
    return TokenTree(
        mix(first.token_ids, second.token_ids, 0),
        shape,
        mix(roles[0], roles[1], PADDING),
        source=mix(zero, theirs + len(first.sources), 0),
        sources=(*first.sources, *second.sources),
    )


def _depth(tree: TokenTree, rows: Tensor) -> int:
    """Depth of the deepest node among ``rows`` (bool ``[B, 1]``, at least one)."""
    topology = tree.topology
    if topology.parents.shape[0] == 1:
        return topology.max_depth
    return int(topology.depths.where(rows, 0).max())
