"""A second model that reads along with a request: its own K/V, its own passes, no token computed twice.

The target and the loop know nothing of it. What the target has emitted and the follower has not read yet (usually the
last accepted token, if it was a leaf, and the bonus) enters as a chain in front of the next tree; the nodes of that
tree that were accepted keep their K/V, the others are overwritten.

Shapes: B rows, W prompt columns, C nodes of the chain, w nodes of a level, N nodes so far, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import DynamicCache

from specdec.interfaces import Context, DecodeState, Needs, Prefill
from specdec.target import Target
from specdec.transfer import upload
from specdec.tree import TokenTree, Topology

_CHAIN = 4  # nodes in front of a tree that graphs are made for at least


class Follower:
    """Reads one request at a time with a model of its own.

    Args:
        target: the model that follows, seen as a ``Target`` (the wrapper, not the role).
        leader: the target of the request; where its passes run as graphs, the follower's do.
    """

    def __init__(self, target: Target, leader: Target) -> None:
        self.target, self.leader = target, leader
        # Positions beyond it do not exist in models with a position table, and mean little in the others.
        self.limit: int = getattr(target.config, "max_position_embeddings", None) or 2**31
        self.context: Context | None = None
        self._warned = False

    def open(self, state: DecodeState, prefill: Prefill, nodes: int, level: int) -> None:
        """Read the prompt. A prompt without ids, or one beyond the model's positions, is not followed.

        Args:
            state: the request, its first token emitted.
            prefill: the prompt.
            nodes: most nodes of a tree, for which room is made.
            level: most nodes of a level, for which graphs are made.
        """
        self.context = None
        self._follow_graphs(level)
        columns = prefill.token_ids.shape[1]
        if columns == 0 or columns - min(prefill.padding) >= self.limit:
            return
        device = self.target.device
        ids = prefill.token_ids.to(device)
        padding = torch.tensor(prefill.padding, device=device)[:, None]
        mask = (torch.arange(columns, device=device) >= padding).long()
        kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "use_cache": True}
        kwargs["past_key_values"] = DynamicCache(config=self.target.config)
        if self.target.model._supports_logits_to_keep():
            kwargs["logits_to_keep"] = 1
        outputs, _ = self.target.prefill(ids, self.target.model.generation_config, kwargs, Needs())
        ids = torch.cat([ids, state.root.to(device)[:, None]], dim=1)
        reserve = min(state.policy.max_new_tokens, 512) + nodes + 1
        self.context = self.target.open(ids, outputs, kwargs, reserve, release=True)

    def _follow_graphs(self, level: int) -> None:
        graphs = self.leader.graphs
        if graphs is None:
            self.target.graphs = None
        elif self.target.graphs is None:
            compiling = None if graphs.compiler is None else graphs.announce
            capture = graphs.capture is not None and self.target.device.type == "cuda"
            if graphs.capture is not None and not capture and not self._warned:
                self._warned = True
                where = f"{self.target.name} drafts on {self.target.device}"
                warnings.warn(f"{where}, where there are no CUDA graphs; its passes are not captured", stacklevel=2)
            if compiling is not None or capture:
                # The chain in front is seldom longer than a leaf and the bonus.
                self.target.use_graphs(max(level, _CHAIN), compiling, capture)

    def begin(self, state: DecodeState) -> Growth | None:
        """The tree of one step, nothing of it run yet; None where no row can be followed."""
        if self.context is None:
            return None
        assert state.context is not None
        texts = [state.history.row(row) for row in range(state.batch_size)]
        quiet = [done or len(text) >= self.limit for text, done in zip(texts, state.finished, strict=True)]
        if all(quiet):
            return None
        known = self.context.lengths
        unread = [
            (text[-1:] if silent else text[length:]).tolist()
            for text, length, silent in zip(texts, known, quiet, strict=True)
        ]
        self.context.budgets = [
            min(budget + len(tokens) - 1, self.limit - length)
            for budget, tokens, length in zip(state.context.budgets, unread, known, strict=True)
        ]
        return Growth(self.target, self.context, unread, quiet)

    def close(self) -> None:
        """Let go of the request's K/V."""
        self.context = None


class Growth:
    """A tree that a follower grows level by level, behind the chain of what it had not read yet.

    Nodes that were run are counted from 0, the root (the newest token of each row), in the order they were given to
    ``expand``; rows without anything to draft for (``quiet``) are run along and never kept.

    Args:
        target: the follower's model.
        context: the request in it.
        unread: tokens of each row that it has not read, the root last.
        quiet: rows that nothing is drafted for.
    """

    def __init__(
        self, target: Target, context: Context, unread: Sequence[Sequence[int]], quiet: Sequence[bool]
    ) -> None:
        self.target, self.context, self.quiet = target, context, list(quiet)
        self.counts = [len(tokens) for tokens in unread]
        self.width = max(self.counts)
        device = target.device
        rows = [[*tokens, *[0] * (self.width - len(tokens))] for tokens in unread]
        self._tokens = upload(rows, device)
        self._levels: tuple[tuple[int, ...], ...] = ()
        self._root: int | Tensor = self.width - 1
        if min(self.counts) < self.width:
            self._root = upload(self.counts, device)[:, None] - 1
        self._parents: Tensor | None = None

    def root(self) -> Tensor:
        """Run the chain: float32 logits after each row's root, ``[B, 1, V]``."""
        logits = self._run(0, _planned(self.width, (), self._tokens.device))
        if isinstance(self._root, int):
            return logits[:, -1:]
        return logits.gather(1, self._root[..., None].expand(-1, -1, logits.shape[2]))

    def expand(self, tokens: Tensor, parents: Tensor | tuple[int, ...]) -> Tensor:
        """Run one level deeper.

        Args:
            tokens: int64 ``[B, w]``.
            parents: int64 ``[1 or B, w]``, or as plain values where they are the same in every step; nodes as counted
                by this class.

        Returns:
            float32 logits ``[B, w, V]``.
        """
        start = self._tokens.shape[1]
        self._tokens = torch.cat([self._tokens, tokens.to(self._tokens.device)], dim=1)
        if isinstance(parents, tuple) and isinstance(self._root, int):
            self._levels += (parents,)
            return self._run(start, _planned(self.width, self._levels, self._tokens.device))
        return self._run(start, self._grown(parents))

    def keep(self, accepted: Sequence[Sequence[int]], finished: Sequence[bool]) -> None:
        """Commit the chain and the accepted nodes of each row (as counted by this class, the root left out)."""
        paths: list[list[int]] = []
        for count, nodes, silent, done in zip(self.counts, accepted, self.quiet, finished, strict=True):
            kept = [] if silent or done else [*range(count), *(self.width - 1 + node for node in nodes)]
            paths.append(kept)
        self.target.keep(self.context, paths)

    def _run(self, start: int, topology: Topology) -> Tensor:
        tree = TokenTree(self._tokens, topology)
        return self.target.run(self.context, tree, slice(start, tree.num_nodes)).logits.float()

    def _grown(self, parents: Tensor | tuple[int, ...]) -> Topology:
        """The topology with one more level, of parents that are known on the device only or differ by row."""
        device = self._tokens.device
        if self._parents is None:
            planned = _planned(self.width, self._levels, device)
            self._parents, self._depth = planned.parents, planned.max_depth
        level = upload([parents], device) if isinstance(parents, tuple) else parents.to(device)
        level = torch.where(level == 0, self._root, level + (self.width - 1))
        rows = max(level.shape[0], self._parents.shape[0])
        self._parents = torch.cat([self._parents.expand(rows, -1), level.expand(rows, -1)], dim=1)
        self._depth += 1
        return Topology(self._parents, self._depth)


@lru_cache(maxsize=512)
def _planned(width: int, levels: tuple[tuple[int, ...], ...], device: torch.device) -> Topology:
    """A chain of ``width`` nodes with levels below its last node; parents as ``Growth.expand`` takes them."""
    parents = [max(node - 1, 0) for node in range(width)]
    parents += [node + width - 1 for level in levels for node in level]
    return Topology(torch.tensor([parents], device=device), width - 1 + len(levels))
