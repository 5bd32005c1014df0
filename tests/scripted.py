"""Drafters that do as they are told, so that what the loop must do with their proposals is known exactly.

Shapes: B rows, N nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from drafters.base import BaseDrafter
from specdec.interfaces import DecodeState, Needs
from specdec.tree import (
    CANDIDATE,
    FEED_ONLY,
    PADDING,
    POINT,
    WITHOUT_REPLACEMENT,
    Draws,
    TokenTree,
    Topology,
    root_only,
)


def tree_of(
    root: torch.Tensor, rows: Sequence[Sequence[tuple[int, int, int]]], sources: tuple[str, ...] = ("scripted",)
) -> TokenTree:
    """The tree whose row b has below its root the nodes ``(parent, token, role)``; shorter rows end in padding."""
    longest = max(len(row) for row in rows)
    filled = [
        [(0, token, CANDIDATE), *row] + [(0, 0, PADDING)] * (longest - len(row))
        for token, row in zip(root.tolist(), rows, strict=True)
    ]
    depth = 0
    for row in filled:
        depths = [0]
        for parent, _, _ in row[1:]:
            depths.append(depths[parent] + 1)
        depth = max(depth, *depths)
    parents, tokens, roles = (torch.tensor([[node[i] for node in row] for row in filled]) for i in range(3))
    return TokenTree(tokens, Topology(parents, depth), roles, sources=sources)


class Scripted(BaseDrafter):
    """Knows the text: ``texts[b]`` is what row b will emit, the prefill's token included."""

    name = "scripted"

    def __init__(self, vocab_size: int, depth: int = 4, texts: Sequence[Sequence[int]] = ()) -> None:
        self.vocab_size, self.depth, self.texts = vocab_size, depth, texts
        self.needs = Needs(max_nodes=4 * depth + 1)

    def ahead(self, state: DecodeState, row: int) -> list[int]:
        """What row ``row`` emits next, at most ``depth`` tokens."""
        return list(self.texts[row][state.emitted[row] :][: self.depth])

    def row(self, state: DecodeState, row: int) -> list[tuple[int, int, int]]:
        """The nodes below the root of one row, as (parent, token, role)."""
        raise NotImplementedError

    def propose(self, state: DecodeState) -> TokenTree:
        """One tree for all rows; stopped rows propose nothing."""
        rows = [[] if done else self.row(state, row) for row, done in enumerate(state.finished)]
        return tree_of(state.root, rows) if any(rows) else root_only(state.root)


class Right(Scripted):
    """A chain of the text to come."""

    def row(self, state: DecodeState, row: int) -> list[tuple[int, int, int]]:
        return [(index, token, CANDIDATE) for index, token in enumerate(self.ahead(state, row))]


class RightAmongDecoys(Scripted):
    """The text to come as a path through a tree: one wrong sibling before and one after every right node."""

    def row(self, state: DecodeState, row: int) -> list[tuple[int, int, int]]:
        nodes, parent = [], 0
        for token in self.ahead(state, row):
            before, after = ((token + shift) % self.vocab_size for shift in (1, 2))
            nodes += [(parent, before, CANDIDATE), (parent, token, CANDIDATE), (parent, after, CANDIDATE)]
            parent = len(nodes) - 1
        return nodes


class Wrong(Scripted):
    """A chain that is wrong at once and right after that."""

    def row(self, state: DecodeState, row: int) -> list[tuple[int, int, int]]:
        tokens = self.ahead(state, row)
        tokens[:1] = [(token + 1) % self.vocab_size for token in tokens[:1]]
        return [(index, token, CANDIDATE) for index, token in enumerate(tokens)]


class Hidden(Scripted):
    """The text to come in a role that must not be accepted, candidates below it."""

    def __init__(self, vocab_size: int, depth: int, texts: Sequence[Sequence[int]], role: int = FEED_ONLY) -> None:
        super().__init__(vocab_size, depth, texts)
        self.role = role

    def row(self, state: DecodeState, row: int) -> list[tuple[int, int, int]]:
        return [(i, token, CANDIDATE if i else self.role) for i, token in enumerate(self.ahead(state, row))]


class Always(Scripted):
    """A chain of one token, whatever the text."""

    def __init__(self, vocab_size: int, depth: int = 4, texts: Sequence[Sequence[int]] = (), token: int = 0) -> None:
        super().__init__(vocab_size, depth, texts)
        self.token = token

    def row(self, state: DecodeState, row: int) -> list[tuple[int, int, int]]:  # noqa: ARG002 - it ignores the text
        return [(index, self.token, CANDIDATE) for index in range(self.depth)]


class Empty(Scripted):
    """Proposes nothing."""

    def row(self, state: DecodeState, row: int) -> list[tuple[int, int, int]]:  # noqa: ARG002 - it has nothing to say
        return []


class Random(Scripted):
    """Random trees of up to ``4 * depth`` nodes in random roles, drawn from the generator that the loop gives."""

    def row(self, state: DecodeState, row: int) -> list[tuple[int, int, int]]:  # noqa: ARG002 - it ignores the text
        def below(limit: int) -> int:
            return int(torch.randint(limit, (1,), generator=state.generator))

        nodes: list[tuple[int, int, int]] = []
        taken = set()
        for index in range(below(4 * self.depth) + 1):
            parent, token = below(index + 1), below(self.vocab_size)
            role = (CANDIDATE, CANDIDATE, CANDIDATE, FEED_ONLY, PADDING)[below(5)]
            if (parent, token) in taken:
                role = FEED_ONLY  # sibling candidates are distinct
            taken.add((parent, token))
            nodes.append((parent, token, role))
        return nodes


class Drawn(Right):
    """As ``Right``, saying by which events its children were proposed; the default rule has no use for that."""

    def propose(self, state: DecodeState) -> TokenTree:
        """The chain with one event per node."""
        tree = super().propose(state)
        if tree.num_nodes > 1:
            nodes = torch.arange(1, tree.num_nodes).expand(tree.batch_size, -1)
            node = torch.where(tree.candidates[:, 1:], nodes, -1)  # type: ignore[index]
            q = torch.full((tree.batch_size, 1, self.vocab_size), 1 / self.vocab_size)
            tree.draws = Draws(node, torch.full_like(node, POINT), torch.zeros_like(node), q)
        return tree


class Sampled(BaseDrafter):
    """Draws children from a known q, as the plan of the step says, and records how.

    Args:
        q: float ``[V, V]``, the draft distribution after each token.
        plans: taken in turn, one per step; per depth the kinds of the events at every node. A chosen child (POINT) is
            the likeliest token that is no child yet.
    """

    name = "sampled"

    def __init__(self, q: torch.Tensor, plans: Sequence[Sequence[Sequence[int]]]) -> None:
        self.q, self.plans, self.steps = q, plans, 0
        self.needs = Needs(max_nodes=1 + max(map(_nodes_of, plans)))

    def propose(self, state: DecodeState) -> TokenTree:
        """One tree of the same shape for all rows; a token drawn again leaves a node of padding."""
        plan = self.plans[self.steps % len(self.plans)]
        self.steps += 1
        tokens, alive = [state.root], [torch.ones_like(state.root, dtype=torch.bool)]
        parents, level, events = [0], [0], list[torch.Tensor]()
        for kinds in plan:
            following: list[int] = []
            for node in level:
                made = range(len(tokens), len(tokens) + len(kinds))
                following += made
                parents += [node] * len(kinds)
                for token, first, event in self._children(tokens[node], alive[node], kinds, made, state.generator):
                    tokens.append(token)
                    alive.append(first)
                    events.append(torch.stack([event, torch.full_like(event, kinds[len(tokens) - 1 - made[0]])], -1))
            level = following
        topology = Topology(torch.tensor([parents]), len(plan))
        role = torch.where(torch.stack(alive, 1), CANDIDATE, PADDING)
        tree = TokenTree(torch.stack(tokens, 1), topology, role, sources=("sampled",))
        if events:
            child, kind = torch.stack(events, 1).unbind(-1)
            # Row n of q is what node n's children are drawn from.
            of = torch.tensor(parents[1:]).expand_as(child)
            tree.draws = Draws(child, kind, of, self.q[tree.token_ids].float(), width=max(map(len, plan)))
        tree.check()
        return tree

    def _children(
        self,
        parent: torch.Tensor,
        alive: torch.Tensor,
        kinds: Sequence[int],
        made: range,
        generator: torch.Generator,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per event and row: its token, whether that is new among its siblings, and the node it names."""
        q = self.q[parent].float()
        taken = torch.full_like(q, -1, dtype=torch.int64)  # token -> the node that holds it
        drawable = q.clone()
        for node, kind in zip(made, kinds, strict=True):
            if kind == POINT:
                token = q.masked_fill(taken >= 0, -1).argmax(1)
            else:
                weights = drawable if kind == WITHOUT_REPLACEMENT else q
                token = torch.multinomial(weights, 1, generator=generator).squeeze(1)
            if kind == WITHOUT_REPLACEMENT:
                drawable = drawable.scatter(1, token[:, None], 0.0)
            holder = taken.gather(1, token[:, None]).squeeze(1)
            first = holder < 0
            holder = torch.where(first, node, holder)
            taken = taken.scatter(1, token[:, None], holder[:, None])
            yield token, first & alive, torch.where(alive, holder, -1)


def _nodes_of(plan: Sequence[Sequence[int]]) -> int:
    width, nodes = 1, 0
    for kinds in plan:
        width *= len(kinds)
        nodes += width
    return nodes


def expected_lengths(text: Sequence[int], proposals: Sequence[Sequence[int]]) -> list[int]:
    """Accepted length of every verification of one row, by the definition.

    Args:
        text: what the row emits, the prefill's token included.
        proposals: the chain proposed when ``i`` tokens have been emitted, for every i.
    """
    lengths, emitted = [], 1
    while emitted < len(text):
        right = 0
        for proposed, actual in zip(proposals[emitted], text[emitted:], strict=False):
            if proposed != actual:
                break
            right += 1
        taken = min(right + 1, len(text) - emitted)  # the stop cuts off the bonus
        lengths.append(taken - 1)
        emitted += taken
    return lengths
