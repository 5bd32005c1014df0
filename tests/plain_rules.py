"""The acceptance rules as slow plain definitions, each step as its paper says it; and drafters that sample children.

Every flip says which coin or uniform of the running code it stands for (see ``law.code_law``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from law import Coins, Context, PlainDrafter, PlainEvent, PlainTree, toy_target
from specdec.tree import POINT, WITH_REPLACEMENT, WITHOUT_REPLACEMENT

P = Callable[[int], Sequence[float]]
Plan = Sequence[Sequence[int]]
"""Per depth, the kinds of the events at every node of that depth."""
UNNAMED = -1  # a chosen child that no event names


def normalised(values: Sequence[float]) -> list[float]:
    total = math.fsum(values)
    return [value / total for value in values]


def proposals(tree: PlainTree, node: int) -> list[PlainEvent]:
    """The events at a node, and after them one for every child that none of them names."""
    events = [event for _, event in tree.events(node)]
    named = {event.child for event in events}
    return events + [PlainEvent(child, POINT, ()) for child in tree.children(node) if child not in named]


def drawn_from(tree: PlainTree, node: int, number: int, vocab: int) -> list[float]:
    """The distribution of the ``number``-th event at a node, as it was when the event happened."""
    events = proposals(tree, node)
    event = events[number]
    if event.kind == POINT:
        return [float(token == tree.tokens[event.child]) for token in range(vocab)]
    q = list(event.q)
    for earlier in events[:number]:
        if event.kind == earlier.kind == WITHOUT_REPLACEMENT and event.q == earlier.q:
            q[tree.tokens[earlier.child]] = 0.0
    return normalised(q)


def residual(p: Sequence[float], q: Sequence[float]) -> list[float]:
    return [max(value - other, 0.0) for value, other in zip(p, q, strict=True)]


def recursive_rejection(tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """Children one by one; what comes after the last draw is decided by the token drawn from what remains."""
    node, depth = 0, 0
    emitted: list[int] = []
    while True:
        remaining, following = list(p(node)), None
        events = tree.events(node)
        draws = [number for number, (_, event) in enumerate(events) if event.kind != POINT]
        for number, (coin, event) in enumerate(events[: max(draws, default=-1) + 1]):
            q, token = drawn_from(tree, node, number, len(remaining)), tree.tokens[event.child]
            share = min(1.0, remaining[token] / q[token])
            if coins.flip([share, 1 - share], ("coin", coin)) == 0:
                following = event.child
                break
            remaining = normalised(residual(remaining, q))
        if following is None:
            token = coins.flip(remaining, ("uniform", depth))
            emitted.append(token)
            following = next((child for child in tree.children(node) if tree.tokens[child] == token), None)
            if following is None:
                return emitted
        else:
            emitted.append(tree.tokens[following])
        node, depth = following, depth + 1


def block(tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """The largest prefix whose own test passes, on a chain."""
    line = [0]
    while tree.children(line[-1]):
        line += tree.children(line[-1])
    tokens = [tree.tokens[node] for node in line]
    q = [drawn_from(tree, node, 0, len(p(node))) for node in line[:-1]]
    values, length = [1.0], 0
    for i in range(1, len(line)):
        values.append(min(1.0, values[-1] * p(line[i - 1])[tokens[i]] / q[i - 1][tokens[i]]))
    lefts = [residual([values[i] * v for v in p(line[i])], q[i]) for i in range(len(line) - 1)]
    for i in range(1, len(line)):
        passing = values[i]
        if i < len(line) - 1:
            total = math.fsum(lefts[i])
            passing = total / (total + 1 - values[i]) if total + 1 - values[i] > 0 else 1.0
        if coins.flip([passing, 1 - passing], ("coin", i - 1)) == 0:
            length = i
    rest = p(line[length]) if length == len(line) - 1 else normalised(lefts[length])
    return [*tokens[1 : length + 1], coins.flip(rest, ("uniform", length))]


def traversal(tree: PlainTree, p: P, coins: Coins) -> list[int]:
    """Go to the first leaf left; accept its path or cut it off and let its parent lose the draw."""
    pending: dict[int, list[int]] = {}
    value, left = {0: 1.0}, {}
    cut: set[int] = set()
    path = [0]

    def visit(node: int) -> None:
        pending[node] = list(range(len(proposals(tree, node))))
        left[node] = list(p(node))

    def lose(node: int) -> None:
        q = drawn_from(tree, node, pending[node].pop(0), len(left[node]))
        rest = residual([value[node] * v for v in left[node]], q)
        total = math.fsum(rest)
        whole = total + 1 - value[node]
        value[node] = total / whole if whole > 0 else 1.0
        left[node] = normalised(rest) if total > 0 else left[node]

    visit(0)
    while True:
        node = path[-1]
        if pending[node]:
            event = proposals(tree, node)[pending[node][0]]
            if event.child in cut:
                lose(node)  # the same token once more: nothing of p is left for it
                continue
            q, token = drawn_from(tree, node, pending[node][0], len(left[node])), tree.tokens[event.child]
            value[event.child] = min(1.0, value[node] * left[node][token] / q[token])
            path.append(event.child)
            visit(event.child)
            continue
        passing = 1.0 if node == 0 else value[node]
        if coins.flip([passing, 1 - passing], ("coin", node)) == 0:
            return [*(tree.tokens[n] for n in path[1:]), coins.flip(left[node], ("uniform", len(path) - 1))]
        cut.add(path.pop())
        lose(path[-1])


def q_of(context: Context, vocab: int, which: int = 0) -> tuple[float, ...]:
    """A draft distribution, unlike the target's."""
    return tuple(toy_target(vocab, seed=77 + which)(context))


def sampled(plan: Plan, vocab: int, own_q: bool = False, zeros: bool = False) -> PlainDrafter:
    """Draws children as the plan says at every node of each depth and records how.

    A chosen child (POINT, or UNNAMED where that is not recorded) is the likeliest token that is no child yet. With
    ``own_q`` every draw with replacement has a distribution of its own; with ``zeros`` one token is never drafted.
    """

    def propose(context: Context, step: int, coins: Coins) -> PlainTree:  # noqa: ARG001 - the drafter's signature
        tree = PlainTree([0], [context[-1] if context else 0], draws=[])
        level, words = [0], {0: context}
        for kinds in plan:
            following: list[int] = []
            for node in level:
                following += _expand(tree, node, kinds, words, coins)
            level = following
        return tree

    def _expand(tree: PlainTree, node: int, kinds: Sequence[int], words: dict[int, Context], coins: Coins) -> list[int]:
        made: dict[int, int] = {}
        gone: set[int] = set()
        for number, kind in enumerate(kinds):
            which = number if own_q and kind == WITH_REPLACEMENT else 0
            q = toy_target(vocab, seed=77 + which, zeros=zeros)(words[node])
            if kind in (POINT, UNNAMED):
                free = [t for t in range(vocab) if t not in made]
                if not free:
                    continue
                token = max(free, key=lambda t: q[t])
            elif kind == WITH_REPLACEMENT:
                token = coins.flip(q)
            else:
                here = [0.0 if t in gone else value for t, value in enumerate(q)]
                if not any(here):
                    continue  # nothing left to draw
                token = coins.flip(normalised(here))
                gone.add(token)
            if token not in made:
                made[token] = len(tree.parents)
                tree.parents.append(node)
                tree.tokens.append(token)
                words[made[token]] = (*words[node], token)
            assert tree.draws is not None
            if kind != UNNAMED:
                tree.draws.append(PlainEvent(made[token], kind, tuple(q)))
        return list(made.values())

    return propose
