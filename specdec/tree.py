"""Token trees: what a drafter proposes and a verifier checks in one pass.

Owns the shape of a tree (depths, ancestors, paths: derived from ``parents`` here and nowhere else) and the builders of
trees. Knows nothing about models, caches or acceptance.

Shapes: B rows (sequences), N nodes, D depth of the deepest node, R rows of draft distributions, V vocabulary.

A worked example, N = 5, two branches under the root::

    parents    0 0 0 1 2        root=0 -> {1 -> {3}, 2 -> {4}}
    depths     0 1 1 2 2
    ancestors  1 . . . .        node 0 sees itself
               1 1 . . .
               1 . 1 . .
               1 1 . 1 .        node 3 sees 0, 1 and itself, never its cousin 4
               1 . 1 . 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from specdec.selection import on_host
from specdec.transfer import upload

# Roles of a node. Feed-only nodes are computed but can never be accepted; padding fills a row up to N.
CANDIDATE, FEED_ONLY, PADDING = 0, 1, 2

_MASK_BUCKET = 256  # columns by which kept masks grow

# How a child came to be (Draws.kind).
POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT = 0, 1, 2


class Topology:
    """The shape of a tree, shared by all rows (``parents [1, N]``) or per row (``parents [B, N]``).

    Static drafters build one and keep it, so that everything derived from it is computed once.

    Args:
        parents: int64 ``[1 or B, N]``; node 0 is the root and its own parent, parents precede their children.
        max_depth: depth of the deepest node, or a bound above it, as the builder knows it (reading it off ``parents``
            would synchronise).
    """

    def __init__(self, parents: Tensor, max_depth: int) -> None:
        self.parents = parents
        self.max_depth = max_depth
        self._additive: dict[torch.dtype, Tensor] = {}

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return self.parents.shape[1]

    @cached_property
    def ancestors(self) -> Tensor:
        """bool ``[1 or B, N, N]``: entry (n, m) is true where m lies on the path from the root to n, n included."""
        # Pointer doubling: log2(D) squarings of "self or parent" close the relation without a loop over nodes.
        reach = torch.zeros(*self.parents.shape, self.num_nodes, device=self.parents.device)
        reach.scatter_(2, self.parents.unsqueeze(-1), 1.0)
        reach.diagonal(dim1=1, dim2=2).fill_(1.0)
        for _ in range(max(self.max_depth - 1, 0).bit_length()):
            reach = (reach @ reach).clamp_(max=1.0)
        return reach > 0

    @cached_property
    def words(self) -> Tensor:
        """int64 ``[1 or B, N, W]``: ``ancestors`` as bits, 64 nodes to a word."""
        return packed_bits(self.ancestors)

    @cached_property
    def steps(self) -> Tensor:
        """bool ``[1 or B, N, N]``: ancestors without the root, which no walk can miss."""
        steps = self.ancestors.clone()
        steps[:, :, 0] = False
        return steps

    @cached_property
    def depths(self) -> Tensor:
        """int64 ``[1 or B, N]``, root = 0."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def nodes_by_depth(self) -> Tensor:
        """int64 ``[1 or B, D+1]``: number of nodes at depths 0..D."""
        counts = self.depths.new_zeros(self.depths.shape[0], self.max_depth + 1)
        return counts.scatter_add_(1, self.depths, torch.ones_like(self.depths))

    @cached_property
    def host_parents(self) -> list[list[int]]:
        """``parents`` as lists; reading them synchronises on an accelerator."""
        return self.parents.tolist()

    @cached_property
    def host_depths(self) -> np.ndarray:
        """``depths`` on the host; reading them synchronises on an accelerator, unless the builder knew them."""
        return self.depths.numpy(force=True)

    @cached_property
    def at_depth(self) -> Tensor:
        """int64 ``[1 or B, N, D]``: 1 where a node is at depth 1..D."""
        levels = torch.arange(1, self.max_depth + 1, device=self.parents.device)
        return (self.depths[..., None] == levels).long()

    @cached_property
    def precedence(self) -> Tensor:
        """int64 ``[1 or B, N, N]``: entry (l, n) ranks node n after a walk that ended at node l.

        Larger for nodes on the path to l, then for shallower ones, then for earlier ones; all different and positive.
        """
        nodes = torch.arange(self.num_nodes, device=self.parents.device)
        seniority = (self.num_nodes - self.depths) * self.num_nodes - nodes
        return self.ancestors * self.num_nodes**2 + seniority.unsqueeze(1)

    @cached_property
    def paths(self) -> Tensor:
        """int64 ``[1 or B, N, D+1]``: the nodes from the root to n in order, padded with -1."""
        nodes = torch.arange(self.num_nodes, device=self.parents.device)
        # Parents precede children, so the ancestors of a node in ascending order are its path.
        ordered = torch.where(self.ancestors, nodes, self.num_nodes).sort(-1).values[..., : self.max_depth + 1]
        return torch.where(ordered == self.num_nodes, -1, ordered)

    def at(self, table: Tensor, nodes: Tensor) -> Tensor:
        """Rows of a table ``[1 or B, N, m]`` of this topology, one for each of ``nodes [B]``: ``[B, m]``."""
        if table.shape[0] == 1:
            return table[0].index_select(0, nodes)
        return table[torch.arange(table.shape[0], device=table.device), nodes]

    def additive_mask(self, dtype: torch.dtype, prefix: int = 0) -> Tensor:
        """``[1 or B, 1, N, prefix + N]``: 0 where a node sees another, ``finfo.min`` elsewhere (-inf breaks eager
        attention), behind ``prefix`` columns that all nodes see.

        A view of a wider mask that is kept, so that a shape that recurs costs one slice whatever the prefix.
        """
        kept = self._additive.get(dtype)
        if kept is None or kept.shape[-1] < prefix + self.num_nodes:
            width = -(-prefix // _MASK_BUCKET) * _MASK_BUCKET + self.num_nodes
            kept = torch.zeros(*self.parents.shape, width, dtype=dtype, device=self.parents.device)
            kept[..., width - self.num_nodes :].masked_fill_(~self.ancestors, torch.finfo(dtype).min)
            self._additive[dtype] = kept = kept.unsqueeze(1)
        width = prefix + self.num_nodes
        return kept.narrow(3, kept.shape[-1] - width, width)

    def to(self, device: torch.device) -> Topology:
        """The same shape on another device (itself where it is there already)."""
        return self if self.parents.device == device else Topology(self.parents.to(device), self.max_depth)


def packed_bits(flags: Tensor) -> Tensor:
    """bool ``[..., N]`` -> int64 ``[..., W]``: flag i is bit ``i % 64`` of word ``i // 64``; bits beyond N are 0."""
    padded = torch.nn.functional.pad(flags.long(), (0, -flags.shape[-1] % 64))
    shifts = torch.arange(64, device=flags.device)
    return (padded.view(*flags.shape[:-1], -1, 64) << shifts).sum(-1)


@dataclass
class Draws:
    """The random events by which children were proposed, in the order they happened.

    Rejection rules are exact only when they replay the events in this order with the distributions really used
    (Leviathan et al. 2023; Chen et al. 2023; RSD, arXiv:2402.14160). The order matters among the children of one node
    only. A candidate that no event names is a point mass that comes after the events of its parent.

    Leaving out a child is exact where that depends on the events before it, and wrong where it depends on the token
    that was drawn: such a child stays a candidate.

    Attributes:
        node: int64 ``[B, E]``, the candidate each event proposed; several events may name one node (i.i.d. samples that
            coincided), -1 pads.
        kind: int64 ``[B, E]``. POINT: chosen, not drawn (``q_row`` is not looked at). WITH_REPLACEMENT: drawn from the
            row of ``q`` as it is. WITHOUT_REPLACEMENT: drawn from that row after the tokens were taken out that earlier
            WITHOUT_REPLACEMENT events took from the same row for children of the same node, and renormalised.
        q_row: int64 ``[B, E]``, row of ``q`` that the event was drawn from.
        q: float32 or float64 ``[B, R, V]``, draft distributions; rows are renormalised where they are used.
        width: most events at one node, where the builder knows it (reading it off synchronises on an accelerator).
        kinds: the kinds that occur, likewise.
    """

    node: Tensor
    kind: Tensor
    q_row: Tensor
    q: Tensor
    width: int | None = None
    kinds: frozenset[int] | None = None


@dataclass
class TokenTree:
    """A tree of proposed tokens for every row of a batch. Node 0 is the last committed token, not cached yet.

    Sibling candidates hold distinct tokens.

    Attributes:
        token_ids: int64 ``[B, N]``.
        topology: the shape; ``parents``, depths and masks derive from it.
        role: int64 ``[B, N]`` of CANDIDATE / FEED_ONLY / PADDING; None where every node is a candidate.
        source: int64 ``[1 or B, N]``, index into ``sources`` of the drafter that proposed the node; None = all from 0.
        sources: names of the drafters in this tree.
        rank: int64 ``[1 or B, N]``, the drafter's own rank of the node among its siblings, 0 best; None = unknown.
        draws: how sampled children were drawn; None = point mass everywhere.
        entry: ``(layer, states [B, N, H])``: verification starts at this layer from these states, because the K/V of
            the nodes below it are written already (self-drafters).
    """

    token_ids: Tensor
    topology: Topology
    role: Tensor | None = None
    source: Tensor | None = None
    sources: tuple[str, ...] = field(default=("draft",))
    rank: Tensor | None = None
    draws: Draws | None = None
    entry: tuple[int, Tensor] | None = None
    _compared: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.token_ids.shape[0]

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return self.token_ids.shape[1]

    @property
    def parents(self) -> Tensor:
        """int64 ``[B, N]``."""
        return self.topology.parents.expand(self.batch_size, -1)

    @property
    def candidates(self) -> Tensor | None:
        """bool ``[B, N]``: the nodes that may be accepted; None where all of them may."""
        if self.role is None:
            return None
        if self._compared is None or self._compared[0] is not self.role:
            on_cpu = on_host(self.role)
            self._compared = (self.role, torch.from_numpy(self.role.numpy() == 0) if on_cpu else self.role == CANDIDATE)
        return self._compared[1]

    def candidates_by_depth(self) -> Tensor:
        """int64 ``[B, D]``: number of candidates at depths 1..D."""
        if self.num_nodes == 1:
            return self.token_ids[:, :0]
        if self.candidates is None:
            return self.topology.nodes_by_depth[:, 1:].expand(self.batch_size, -1)
        if on_host(self.token_ids):
            counted = self.candidates.numpy()[:, None].astype(np.int64) @ self.topology.at_depth.numpy()
            return torch.from_numpy(counted[:, 0])
        depths = self.topology.depths.expand(self.batch_size, -1)
        counts = depths.new_zeros(self.batch_size, self.topology.max_depth + 1)
        return counts.scatter_add_(1, depths, self.candidates.long())[:, 1:]

    def check(self) -> None:
        """Raise AssertionError where the invariants of the contract do not hold (tests and debugging; synchronises)."""
        parents, nodes = self.topology.parents, torch.arange(self.num_nodes, device=self.token_ids.device)
        assert self.token_ids.dtype == torch.int64, "token ids are int64"
        assert self.topology.num_nodes == self.num_nodes, "one token per node of the topology"
        assert bool((parents[:, 0] == 0).all()) and bool((parents[:, 1:] < nodes[1:]).all()), "parents precede children"
        assert bool((self.token_ids >= 0).all()), "absence is a role, never a token id"
        assert parents.shape[0] in (1, self.batch_size), "one shape for all rows, or one per row"
        # A builder that ranks on the device knows only how deep it has looked.
        assert self.topology.max_depth >= _longest_walk(parents), "no node is deeper than the depth its builder knows"
        candidate = self.candidates
        alive = torch.ones_like(self.token_ids, dtype=torch.bool) if candidate is None else candidate
        same = (self.parents[:, :, None] == self.parents[:, None]) & (
            self.token_ids[:, :, None] == self.token_ids[:, None]
        )
        same &= alive[:, :, None] & alive[:, None] & (nodes[:, None] != nodes) & (nodes > 0) & (nodes[:, None] > 0)
        assert not bool(same.any()), "sibling candidates hold distinct tokens"
        if self.draws is not None:
            self._check_draws(self.draws, alive)

    def _check_draws(self, draws: Draws, alive: Tensor) -> None:
        real = draws.node >= 0
        child = draws.node.clamp(min=0)
        assert draws.node.shape == draws.kind.shape == draws.q_row.shape, "node, kind and q_row are of every event"
        assert draws.node.shape[0] == draws.q.shape[0] == self.batch_size, "events and distributions are per row"
        assert bool((alive.gather(1, child) & (child > 0) | ~real).all()), "events name candidates below the root"
        sampled = real & (draws.kind != POINT)
        rows = draws.q_row.clamp(0, draws.q.shape[1] - 1)
        assert bool((rows == draws.q_row)[sampled].all()), "q_row is a row of q"
        q = draws.q.gather(1, rows[..., None].expand(-1, -1, draws.q.shape[2]))
        drawn = q.gather(2, self.token_ids.gather(1, child)[..., None]).squeeze(-1)
        assert bool((drawn > 0)[sampled].all()), "a token that was drawn has mass in its distribution"
        kinds = set(draws.kind[real].tolist())
        assert kinds <= {POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT}, "known kinds"
        assert draws.kinds is None or kinds <= draws.kinds, "the builder knows the kinds of its events"
        parent = self.parents.gather(1, child).masked_fill(~real, self.num_nodes)
        counts = torch.zeros(self.batch_size, self.num_nodes + 1, dtype=torch.int64, device=parent.device)
        widest = int(counts.scatter_add_(1, parent, real.long())[:, :-1].max())
        assert draws.width is None or widest <= draws.width, "the builder knows the most events at one node"


def _longest_walk(parents: Tensor) -> int:
    """Steps from the deepest node to the root, by walking; ``Topology.max_depth`` is what others believe instead."""
    node, steps = torch.arange(parents.shape[1], device=parents.device).expand_as(parents), 0
    while bool((node > 0).any()):
        node, steps = parents.gather(1, node), steps + 1
    return steps


@lru_cache(maxsize=512)
def chain(num_nodes: int, device: torch.device | None = None) -> Topology:
    """The topology of one chain: root, child, grandchild, ... (``num_nodes`` nodes, the root included)."""
    return Topology((torch.arange(num_nodes, device=device) - 1).clamp_(min=0)[None], num_nodes - 1)


def root_only(root: Tensor) -> TokenTree:
    """The tree that proposes nothing: plain decoding. ``root`` int64 ``[B]``."""
    return TokenTree(root[:, None], chain(1, root.device))


def from_host(parents: Sequence[Sequence[int]] | np.ndarray, device: torch.device | None = None) -> Topology:
    """The topology of parents that are known on the host; nothing synchronises.

    Rows that agree share one shape. Shapes of one row that were made lately come back as the same object, so that what
    derives from them is computed once; a combination of unequal rows hardly ever recurs, and is not kept.

    Args:
        parents: ints ``[B, N]``; node 0 is the root and its own parent, parents precede their children.
        device: of the topology; None = the host.
    """
    rows = np.ascontiguousarray(parents, dtype=np.int64)
    device = device or torch.device("cpu")
    if len(rows) == 1 or bool((rows == rows[0]).all()):
        return _recent(rows[0].tobytes(), device)
    return _topology(rows, device)


@lru_cache(maxsize=1024)
def _recent(parents: bytes, device: torch.device) -> Topology:
    # A copy, because torch wants memory that it may write to.
    return _topology(np.frombuffer(parents, dtype=np.int64)[None].copy(), device)


def _topology(parents: np.ndarray, device: torch.device) -> Topology:
    nodes = np.arange(parents.shape[1])
    assert not parents[:, 0].any() and bool((parents[:, 1:] < nodes[1:]).all()), "parents precede children"
    assert bool((parents >= 0).all()), "absence is a role, never a parent"
    above, depths = np.broadcast_to(nodes, parents.shape), np.zeros_like(parents)
    while above.any():
        depths += above > 0
        above = np.take_along_axis(parents, above, axis=1)
    topology = Topology(upload(parents, device), int(depths.max()))
    topology.host_depths = depths
    return topology


def pad_rows(
    root: Tensor,
    tokens: Sequence[Sequence[int]],
    parents: Sequence[Sequence[int]],
    sources: tuple[str, ...] = ("draft",),
) -> TokenTree:
    """One tree from what each row proposes; short rows are filled up with padding, hung under the root.

    Args:
        root: int64 ``[B]``, token of node 0, which ``tokens`` and ``parents`` leave out.
        tokens: of every row's nodes 1, 2, ...; a row may be empty.
        parents: likewise, their parents; 0 is the root, parents precede children.
        sources: names of the drafters in this tree.
    """
    counts = [len(row) for row in tokens]
    longest = max(counts)
    if longest == 0:
        return root_only(root)
    ids, above = np.zeros((2, len(counts), longest + 1), dtype=np.int64)
    for row, count in enumerate(counts):
        ids[row, 1 : count + 1] = tokens[row]
        above[row, 1 : count + 1] = parents[row]
    token_ids = upload(ids, root.device)
    token_ids[:, 0] = root
    role = None
    if min(counts) < longest:
        node, last = np.arange(longest + 1), np.array(counts)[:, None]
        role = upload(np.where(node <= last, CANDIDATE, PADDING), root.device)
    return TokenTree(token_ids, from_host(above, root.device), role, sources=sources)
