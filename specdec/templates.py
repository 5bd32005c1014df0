"""Trees of a fixed shape: templates, filled anew at every step, and the best one for known acceptance rates.

Shapes: N nodes, D depth of the deepest node.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from specdec.tree import Topology


@dataclass(frozen=True)
class Template:
    """A static tree: which rank of which parent every node takes (Medusa's and Token Recycling's trees are such).

    Attributes:
        topology: ``parents [1, N]`` in breadth-first order.
        ranks: rank of every node among its siblings, root 0; int64 ``[N]``.
        levels: for each depth 1..D, its nodes' parents, counted within the level above, and their ranks.
        width: largest number of children of a node that the template asks for.
    """

    topology: Topology
    ranks: Tensor
    levels: tuple[tuple[Tensor, Tensor], ...]
    width: int

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> Template:
        """Build from rank paths, such as ``[(0,), (1,), (0, 0)]`` (the root is implied).

        Raises:
            ValueError: a path is repeated, or names a rank whose parent or better-ranked sibling is missing.
        """
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        index: dict[tuple[int, ...], int] = {(): 0}
        parents = [0]
        for path in ordered:
            if path in index or not path:
                raise ValueError(f"a tree names each node once; got {list(path)} {'twice' if path else '(the root)'}")
            missing = next(
                (p for p in (path[:-1], (*path[:-1], path[-1] - 1)) if p[-1:] != (-1,) and p not in index), None
            )
            if missing is not None:
                raise ValueError(f"path {list(path)} needs {list(missing)} in the tree too; trees are closed under it")
            index[path] = len(parents)
            parents.append(index[path[:-1]])
        depths = [0, *(len(path) for path in ordered)]
        ranks = torch.tensor([0, *(path[-1] for path in ordered)], device="cpu")
        above = torch.tensor(parents, device="cpu")
        starts = [depths.index(d) for d in range(depths[-1] + 1)] + [len(depths)]
        levels = tuple(
            (above[start:stop] - before, ranks[start:stop])
            for before, start, stop in zip(starts, starts[1:], starts[2:], strict=False)
        )
        width = 1 + max((path[-1] for path in ordered), default=0)
        return cls(Topology(above[None], depths[-1]), ranks, levels, width)

    def to(self, device: torch.device) -> Template:
        """The same template with its tensors on ``device``."""
        levels = tuple((parents.to(device), ranks.to(device)) for parents, ranks in self.levels)
        return Template(self.topology.to(device), self.ranks.to(device), levels, self.width)

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return self.topology.num_nodes

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """The rank paths in breadth-first order, root not counted."""
        paths: list[tuple[int, ...]] = [()]
        for parent, rank in list(zip(self.topology.host_parents[0], self.ranks.tolist(), strict=True))[1:]:
            paths.append((*paths[parent], rank))
        return paths[1:]


@lru_cache(maxsize=256)
def kept_template(paths: tuple[tuple[int, ...], ...], device: torch.device) -> Template:
    """The template of these paths, the same object when they come again: what derives from its topology is kept.

    Raises:
        ValueError: as ``Template.from_paths``; also without a path.
    """
    if not paths:
        raise ValueError("a tree needs at least one node below the root, such as [[0]]; got none")
    with torch.inference_mode(False):  # it outlives the request that happens to need it first
        return Template.from_paths(paths).to(device)


def chain_paths(length: int) -> list[tuple[int, ...]]:
    """The rank paths of a chain of ``length`` nodes, root not counted."""
    return [(0,) * depth for depth in range(1, length + 1)]


def chain_length(paths: Iterable[Sequence[int]], drafter: str) -> int:
    """How many nodes a chain has, root not counted.

    Args:
        paths: rank paths in any order.
        drafter: whose chain, for the message.

    Raises:
        ValueError: they are no chain of at least one node.
    """
    ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    if not ordered or ordered != chain_paths(len(ordered)):
        shown = ", ".join(str(list(path)) for path in ordered[:4]) or "none"
        raise ValueError(f"{drafter} drafts chains: expected paths such as [0], [0, 0], [0, 0, 0]; got {shown}")
    return len(ordered)


def best_first(
    acceptance: Sequence[Sequence[float]], num_nodes: int, max_depth: int | None = None
) -> list[tuple[int, ...]]:
    """The rank paths of the tree with the most expected tokens under a node budget.

    With path value = product of its edge values, the best tree is the ``num_nodes`` largest values; where edge values
    fall with rank this equals the dynamic programme of Sequoia (arXiv:2402.12374), at the cost of a heap.

    Args:
        acceptance: edge values, ``acceptance[d][r]`` = probability that the child of rank r at depth d+1 is the one
            accepted; the last row serves all greater depths.
        num_nodes: nodes to choose, the root not counted.
        max_depth: no deeper than this; None = no limit.
    """
    return [path for path, _ in ranked_paths(acceptance, num_nodes, max_depth)]


def ranked_paths(
    acceptance: Sequence[Sequence[float]], num_nodes: int, max_depth: int | None = None
) -> list[tuple[tuple[int, ...], float]]:
    """``best_first`` with the value of every node: the first n of them are the best tree of n nodes, for every n."""
    heap: list[tuple[float, tuple[int, ...], float]] = []  # minus the value, the path, the value of its parent
    last, deepest = len(acceptance) - 1, num_nodes if max_depth is None else max_depth

    def push(parent_value: float, path: tuple[int, ...]) -> None:
        depth, rank = len(path), path[-1]
        edges = acceptance[depth - 1 if depth <= last else last]
        if depth <= deepest and rank < len(edges) and edges[rank] > 0:
            heapq.heappush(heap, (-parent_value * edges[rank], path, parent_value))

    push(1.0, (0,))
    chosen: list[tuple[tuple[int, ...], float]] = []
    while heap and len(chosen) < num_nodes:
        negative, path, parent_value = heapq.heappop(heap)
        chosen.append((path, -negative))
        push(parent_value, (*path[:-1], path[-1] + 1))
        push(-negative, (*path, 0))
    return chosen
