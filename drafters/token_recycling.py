"""Token Recycling: candidates that a pass computed and threw away become the next draft (Luo et al., 2408.08696).

An adjacency matrix remembers, for every token, its k most likely successors when it was last seen. The draft is a
static tree filled level by level: the child of rank r holds the r-th successor of its parent's token. Every node of
every pass, accepted or not, rewrites its token's row. The matrix outlives a request; the texts of a batch each go on
from it with a copy of their own, so that they do not overwrite each other's successors while they run.

Differences from the authors' code, where it falls short of what the method means: prompt positions write rows at
prefill (theirs throws prefill logits away); duplicates within a pass follow a stated rule instead of scatter order;
successors not seen yet are padding, not token 0; sampling is exact instead of ignored; batches.

Shapes: B rows, N nodes, T positions, V vocabulary, k successors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafters.base import BaseDrafter
from specdec.interfaces import DecodeState, Needs, Prefill, Verification
from specdec.selection import on_host, top_k
from specdec.target import Target
from specdec.templates import Template, kept_template
from specdec.transfer import upload
from specdec.tree import PADDING, TokenTree

# Children by rank path of the parent, as counted from the authors' "2.2.2" tree: 80 nodes, depth 6.
_PUBLISHED_CHILDREN = {
    "": 8,
    "0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1,
    "00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1,
    "10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1,
    "000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1,
    "0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1,
    "00000": 2, "00010": 1,
}  # fmt: skip


def published_paths() -> list[tuple[int, ...]]:
    """The 80 rank paths of the authors' tree."""
    return [(*map(int, parent), rank) for parent, count in _PUBLISHED_CHILDREN.items() for rank in range(count)]


def tree_paths(num_nodes: int) -> list[tuple[int, ...]]:
    """A tree of ``num_nodes`` nodes, root not counted, cut from the published one.

    The published tree was grown greedily, so its better-ranked and shallower parts are worth most: nodes are taken in
    order of the product of ``1 / (rank + 1)`` and a decay of 0.8 per level, which keeps the tree closed.

    Raises:
        ValueError: more nodes than the published tree has.
    """
    paths = published_paths()
    if not 1 <= num_nodes <= len(paths):
        raise ValueError(f"expected 1 to {len(paths)} tree nodes, got {num_nodes}; give tree_paths for other trees")

    def value(path: tuple[int, ...]) -> float:
        product = 1.0
        for rank in path:
            product *= 0.8 / (rank + 1)
        return product

    return sorted(paths, key=lambda path: (-value(path), len(path), path))[:num_nodes]


class TokenRecycling(BaseDrafter):
    """Draft from the adjacency matrix of recycled candidates.

    Args:
        num_successors: k, successors remembered per token; the published value is 8.
        num_nodes: nodes of the tree, root not counted; 80 is the published tree.
        paths: rank paths of another tree, such as ``[[0], [1], [0, 0]]``; overrides ``num_nodes``.
        path: a file written by ``torch.save(drafter.state_dict(), path)`` to start from.

    Raises:
        ValueError: a tree that asks for more successors than are remembered.
    """

    name = "token_recycling"

    def __init__(
        self,
        num_successors: int = 8,
        num_nodes: int = 24,
        paths: list[list[int]] | None = None,
        path: str | None = None,
    ) -> None:
        self.template = Template.from_paths(tree_paths(num_nodes) if paths is None else [tuple(p) for p in paths])
        self.num_successors = num_successors
        self._check(self.template)
        self.needs = Needs(prompt_top_k=num_successors, max_nodes=self.template.num_nodes)
        self.matrix: Tensor | None = None
        # Of a batch: the matrices of its rows, [B * (V + 1), k], and where each begins, [B, 1].
        self._own: Tensor | None = None
        self._base = torch.zeros(1, 1, dtype=torch.int64)
        self._saved: dict[str, Any] | None = None if path is None else torch.load(path, weights_only=True)

    def fit(self, target: Target) -> str | None:
        """Allocate ``[V+1, k]`` on the target's device; -1 = never seen, row V swallows what must not be learnt."""
        if self.num_successors > target.vocab_size:
            return f"a vocabulary of at least {self.num_successors} tokens (num_successors), got {target.vocab_size}"
        shape = (target.vocab_size + 1, self.num_successors)
        if self.matrix is None or self.matrix.shape != shape:
            self.matrix = torch.full(shape, -1, device=target.device)
        self.matrix, self._base = self.matrix.to(target.device), self._base.to(target.device)
        self._take(self.template.to(target.device))
        if self._saved is not None:
            self.load_state_dict(self._saved)
            self._saved = None
        return None

    @property
    def tree_paths(self) -> list[tuple[int, ...]]:
        """As it is now (``Shaped``)."""
        return self.template.paths

    @property
    def widest(self) -> int:
        """As many children as successors are remembered."""
        return self.num_successors

    @property
    def deepest(self) -> int | None:
        """No limit."""
        return None

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        """Draft another tree from the next step on; refuses one that asks for more successors than are remembered."""
        template = kept_template(tuple(map(tuple, paths)), self.template.ranks.device)
        self._check(template)
        self._take(template)

    def _check(self, template: Template) -> None:
        if template.width > self.num_successors:
            raise ValueError(
                f"the tree asks for {template.width} successors of a node; num_successors={self.num_successors}"
            )

    def _take(self, template: Template) -> None:
        self.template = template
        self._host_levels = [(parents.cpu().numpy(), ranks.cpu().numpy()) for parents, ranks in template.levels]
        self.needs = replace(self.needs, max_nodes=template.num_nodes)

    def start(self, state: DecodeState, prefill: Prefill) -> None:
        """Write a row for every prompt position; the latest occurrence of a token wins."""
        assert prefill.top_k is not None and self.matrix is not None
        batch = state.batch_size
        self._own = self.matrix.repeat(batch, 1) if batch > 1 else None
        self._base = torch.arange(batch, device=self.matrix.device)[:, None] * len(self.matrix)
        columns = min(prefill.token_ids.shape[1], prefill.top_k.shape[1])
        if columns == 0:
            return
        device = state.root.device
        tokens = prefill.token_ids[:, -columns:].to(device)
        first = prefill.token_ids.shape[1] - columns
        column = torch.arange(first, first + columns, device=device)
        real = column >= torch.tensor(prefill.padding, device=device)[:, None]
        self._learn(tokens, prefill.top_k[:, -columns:], torch.where(real, column + 1, -1))

    @torch.inference_mode()
    def propose(self, state: DecodeState) -> TokenTree:
        """Fill the template level by level: one gather each."""
        assert self.matrix is not None
        template, level = self.template, state.root[:, None]
        table = self.matrix if self._own is None else self._own
        if on_host(table):
            filled, role = self._fill_on_host(table.numpy(), level.numpy())
        else:
            tokens = [level]
            for parents, ranks in template.levels:
                tokens.append(table[tokens[-1].index_select(1, parents) + self._base, ranks])
            filled = torch.cat(tokens, dim=1)
            # An unseen successor is -1; indexing with it reaches a spare row, so its subtree is unseen as well.
            filled, role = filled.clamp(min=0), (filled < 0) * PADDING  # CANDIDATE is 0
        return TokenTree(filled, template.topology, role, sources=(self.name,), rank=template.ranks[None])

    def _fill_on_host(self, table: np.ndarray, level: np.ndarray) -> tuple[Tensor, Tensor]:
        # The same in numpy.
        base, tokens = self._base.numpy(), [level]
        for parents, ranks in self._host_levels:
            tokens.append(table[tokens[-1][:, parents] + base, ranks])
        filled = np.concatenate(tokens, axis=1)
        return torch.from_numpy(np.maximum(filled, 0)), torch.from_numpy((filled < 0) * np.int64(PADDING))

    @torch.inference_mode()
    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:  # noqa: ARG002
        """Every node rewrites its row; duplicates: accepted nodes first, then the shallowest, then the first."""
        nodes, device = tree.num_nodes, tree.token_ids.device
        successors = top_k(verification.logits, self.num_successors)
        if on_host(successors):
            return self._update_on_host(tree, verification, successors.numpy())
        worth = tree.topology.at(tree.topology.precedence, verification.last_nodes(device))
        if tree.role is not None:
            worth = worth.masked_fill(tree.role == PADDING, -1)
        if any(verification.finished):
            # Nothing is learnt past a stop.
            rows = zip(verification.path, verification.finished, strict=True)
            emitted = upload([len(path) if done else nodes for path, done in rows], device)
            worth = worth.masked_fill(tree.topology.depths >= emitted[:, None], -1)
        self._learn(tree.token_ids, successors, worth)

    def _update_on_host(self, tree: TokenTree, verification: Verification, successors: np.ndarray) -> None:
        # The same in numpy, which does these small things in a third of the time.
        assert self.matrix is not None
        matrix, tokens, batch = self.matrix.numpy(), tree.token_ids.numpy(), tree.batch_size
        size, spare = len(matrix), len(matrix) - 1
        if tree.role is not None:
            tokens = np.where(tree.role.numpy() == PADDING, spare, tokens)
        if any(verification.finished):
            rows = zip(verification.path, verification.finished, strict=True)
            emitted = np.array([[len(path) if done else tree.num_nodes] for path, done in rows])
            tokens = np.where(tree.topology.depths.numpy() >= emitted, spare, tokens)
        table = tree.topology.precedence.numpy()
        last = [nodes[-1] if nodes else 0 for nodes in verification.path]
        worth = table[np.arange(batch) if len(table) > 1 else 0, last]
        if batch > 1:
            worth = worth * batch + np.arange(batch - 1, -1, -1)[:, None]
        # In order of worth: of several writes to one row numpy keeps the last.
        order = worth.ravel().argsort()
        ranked = successors.reshape(len(order), -1)[order]
        matrix[tokens.ravel()[order]] = ranked
        matrix[spare] = -1
        if self._own is not None:
            own = self._own.numpy()
            own[(tokens + self._base.numpy()).ravel()[order]] = ranked
            own[spare::size] = -1

    def _learn(self, tokens: Tensor, successors: Tensor, worth: Tensor) -> None:
        """``successors [B, T, k]`` to the rows of ``tokens [B, T]``, in the matrix and in those of a batch.

        Of equal tokens the one of the largest ``worth [B, T]`` writes, among equals that of the first row. A worth
        below 0 does not write; others are positive and differ within a row.
        """
        assert self.matrix is not None
        size, batch = len(self.matrix), tokens.shape[0]
        if batch > 1:
            worth = worth * batch + torch.arange(batch - 1, -1, -1, device=tokens.device)[:, None]
        _write(self.matrix, tokens, successors, worth, size)
        if self._own is not None:
            _write(self._own, tokens + self._base, successors, worth, size)

    def finish(self, state: DecodeState) -> None:  # noqa: ARG002 - the interface's signature
        """Drop the matrices of a batch; what its rows learnt is in the one that stays."""
        self._own, self._base = None, self._base[:1]

    def reset(self) -> None:
        """Forget every successor, those of a file that was given included."""
        self._saved = None
        if self.matrix is not None:
            self.matrix.fill_(-1)

    def state_dict(self) -> dict[str, Any]:
        """``matrix``: int64 ``[V+1, k]``."""
        if self.matrix is None:
            return dict(self._saved or {})
        return {"matrix": self.matrix.cpu().clone()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a saved matrix.

        Raises:
            ValueError: it belongs to another vocabulary or number of successors.
        """
        matrix = saved.get("matrix")
        if self.matrix is None:
            self._saved = saved
        elif matrix is None or matrix.shape != self.matrix.shape:
            got = None if matrix is None else tuple(matrix.shape)
            raise ValueError(f"expected a matrix of shape {tuple(self.matrix.shape)} (vocabulary + 1, k), got {got}")
        else:
            self.matrix.copy_(matrix)


def _write(table: Tensor, tokens: Tensor, successors: Tensor, worth: Tensor, size: int) -> None:
    """Of each row of ``table [R * size, k]`` the best entry writes; the last of every ``size`` rows is spare."""
    tokens, worth = tokens.reshape(-1), worth.reshape(-1)
    best = torch.zeros_like(table[:, 0]).scatter_reduce_(0, tokens, worth, "amax")
    # Exactly one entry writes each row, whatever the order of the writes; the others go to a spare one.
    rows = torch.where(best.index_select(0, tokens) == worth, tokens, size - 1)
    table.index_copy_(0, rows, successors.reshape(len(rows), -1))
    table[size - 1 :: size].fill_(-1)
