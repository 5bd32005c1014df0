"""The contract on one page: what crosses the seams between loop, drafter, verifier and target.

What crosses to training is in ``specdec/learning.py``.

Glossary: *p* target distribution, *q* draft distribution. A step *drafts* nodes, *accepts* some of them along one path
and adds the *bonus*, the target's own token after the last accepted node; *emitted* = accepted + bonus, after stops.

Shapes: B rows (sequences), N nodes of a tree, D depth, P_b committed tokens of row b, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from specdec.transfer import upload
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.cache import TreeCache
    from specdec.sampling import Policy
    from specdec.target import Target

Tap = int | Literal["final"]
"""A place in the residual stream: int i = what enters layer i, ``"final"`` = what the output head receives."""


@dataclass(frozen=True)
class Needs:
    """What a drafter asks of the target beyond the token ids.

    Attributes:
        taps: states recorded at every node of every pass (``Verification.states``).
        prompt_states: record the taps over the prompt too (``Prefill.states``).
        prompt_top_k: ids of the k most likely successors at every prompt position (``Prefill.top_k``).
        max_nodes: N of the largest tree it will propose, whatever it is reshaped to in a request, root included.
        sizes: N of others that it will propose for long.
    """

    taps: tuple[Tap, ...] = ()
    prompt_states: bool = False
    prompt_top_k: int = 0
    max_nodes: int = 1
    sizes: tuple[int, ...] = ()


@dataclass
class Context:
    """Where a request stands inside the target: K/V, committed lengths, and the keyword arguments of a decode step.

    Attributes:
        cache: K/V of the committed tokens; row b's lie in slots ``0..P_b-1``.
        template: keyword arguments that transformers prepared for its first decode step.
        base_lengths: P_b when the template was made.
        lengths: P_b now, on the host.
        budgets: tokens each row may still emit; no node is positioned beyond what plain decoding would feed.
        dtype: of the attention masks.
        lease: as long as it lives nobody else is given the slabs of the cache; None where they end with the request.
    """

    cache: TreeCache
    template: dict[str, Any]
    base_lengths: list[int]
    lengths: list[int]
    budgets: list[int]
    dtype: torch.dtype
    lease: object | None = None


@dataclass
class Prefill:
    """What the prompt pass left for the drafter.

    Attributes:
        token_ids: int64 ``[B, W]``, the ids as generate saw them, left-padded; W = 0 where the prompt was embeddings.
        padding: left padding of each row in ``token_ids``.
        states: tap -> ``[B, W', H]`` over the columns that this prefill computed, right-aligned with ``token_ids``.
        top_k: int64 ``[B, W', k]``, likewise.
    """

    token_ids: Tensor
    padding: list[int]
    states: Mapping[Tap, Tensor] = field(default_factory=dict)
    top_k: Tensor | None = None


class History:
    """The known tokens of every row, prompt and emitted, on the host and without padding."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        longest = max((len(row) for row in rows), default=0)
        self._tokens = np.zeros((len(rows), longest + 256), dtype=np.int64)
        self._lengths = [len(row) for row in rows]
        for index, row in enumerate(rows):
            self._tokens[index, : len(row)] = row

    def row(self, index: int) -> np.ndarray:
        """int64 ``[T]``, a view that holds until the next append."""
        return self._tokens[index, : self._lengths[index]]

    def append(self, index: int, tokens: Sequence[int]) -> None:
        """Add newly emitted tokens to one row."""
        end = self._lengths[index] + len(tokens)
        if end > self._tokens.shape[1]:
            self._tokens = np.pad(self._tokens, ((0, 0), (0, max(end, self._tokens.shape[1]))))
        self._tokens[index, self._lengths[index] : end] = tokens
        self._lengths[index] = end


@dataclass
class DecodeState:
    """One request while it is decoded. The loop owns it; drafters and verifiers read it.

    Attributes:
        policy: how this request turns logits into tokens and when it stops.
        history: the known tokens of each row.
        root: int64 ``[B]`` on the target's device, the last emitted token of each row: the root of the next tree.
        emitted: tokens emitted so far by each row.
        finished: rows that have stopped.
        context: the request inside the target; None until the prompt has been read.
        generator: the only source of randomness a drafter may use.
    """

    policy: Policy
    history: History
    root: Tensor
    emitted: list[int]
    finished: list[bool]
    generator: torch.Generator
    context: Context | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.finished)

    @property
    def done(self) -> bool:
        """Whether every row has stopped."""
        return all(self.finished)


@dataclass
class Verification:
    """The outcome of one target pass over a tree.

    Attributes:
        path: nodes that each row commits, in order, the root first, cut by stop rules; it emitted as many. On the host.
        tokens: the tokens each row emitted: those of ``path[b][1:]``, then one more, the target's own.
        finished: whether each row has stopped, after this step.
        was_finished: whether each row had stopped before this step (it emitted nothing).
        logits: float32 ``[B, N, V]`` of all nodes, before any processor; like ``states`` never to be written into.
        offered: candidates of each row's tree at depths 1..D; on the host.
        states: tap -> ``[B, N, H]`` of all nodes, feed-only ones included.
        scores: processed scores float32 of the emitted tokens per row, ``[n_b, V]``; only where the caller wants them.
        hidden_states: what the model returned under ``output_hidden_states``: per layer ``[B, N, H]``.
    """

    path: list[list[int]]
    tokens: list[list[int]]
    finished: list[bool]
    was_finished: list[bool]
    logits: Tensor
    offered: list[list[int]] = field(default_factory=list)
    states: Mapping[Tap, Tensor] = field(default_factory=dict)
    scores: list[Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def accepted(self) -> list[int]:
        """Accepted draft tokens of each row, counted after stops."""
        return [max(len(nodes) - 1, 0) for nodes in self.path]

    def last_nodes(self, device: torch.device) -> Tensor:
        """int64 ``[B]``: the deepest committed node of each row, 0 where it emitted nothing."""
        return upload([nodes[-1] if nodes else 0 for nodes in self.path], device)


@dataclass
class Walk:
    """What an acceptance rule decided: ``path [B, D+1]`` padded with -1, and the token emitted after each node.

    ``tokens [B, D+1]``: entry i is emitted after node ``path[:, i]``, the token of ``path[:, i+1]`` where that exists.
    """

    path: Tensor
    tokens: Tensor


@runtime_checkable
class AcceptanceRule(Protocol):
    """Which proposed nodes stand, and what is emitted after the last one: a pure function of what it is given.

    Two streams of random numbers reach it. *Uniforms* belong to output positions: ``uniforms[b, d]`` draws the token
    that is emitted after the last accepted node of depth d, and nothing else, so that every rule draws it alike.
    *Coins* belong to the step: the rule says how many it wants and what each decides (accept this event, stop at this
    node). Neither depends on the other, on earlier steps, on the neighbours of a row, or on what drafters draw.

    Attributes:
        name: as in reports.
        lossless: whether the emitted law is the target's own.
        samples: whether it can serve sampling. Under greedy decoding every rule is ``greedy``, which cannot.
        on_path: whether the rule is ``select`` at every node of the walk, in order. Others (rejection rules, typical
            acceptance) cannot be combined with logits processors that keep state.
    """

    name: str
    lossless: bool
    samples: bool
    on_path: bool

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:
        """The token emitted after a node: scores ``[..., V]``, uniforms ``[...]`` in [0, 1) -> int64 ``[...]``."""
        ...

    def refuse(self, tree: TokenTree) -> str | None:
        """Why trees drawn like this one cannot be judged, and which rule can; None where they can."""
        ...

    def num_coins(self, tree: TokenTree) -> int:
        """C, the coins per row that ``accept`` wants for this tree; 0 where the uniforms are enough."""
        ...

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:
        """Walk the whole batch, without synchronising.

        Args:
            tree: the proposal with its draws, as ``refuse`` lets it pass.
            scores: ``[B, N, V]``, log p up to a constant.
            uniforms: float64 ``[B, D+1]`` in [0, 1), one per depth; None under greedy decoding.
            coins: float64 ``[B, C]`` in [0, 1); None where C = 0.
        """
        ...


@runtime_checkable
class Drafter(Protocol):
    """Proposes trees. Never sees the verifier, keeps its own cache, draws only from ``state.generator``.

    One object serves many requests in turn; what it learnt survives from one to the next until ``reset``.
    """

    name: str
    needs: Needs

    def fit(self, target: Target) -> str | None:
        """Bind to a target; returns why it cannot, None where it can. Called before the first request."""
        ...

    def start(self, state: DecodeState, prefill: Prefill) -> None:
        """A request begins: the prompt has been read and its first token emitted (``state.root``)."""
        ...

    def propose(self, state: DecodeState) -> TokenTree:
        """The tree to check next; node 0 of row b is ``state.root[b]``."""
        ...

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
        """Learn from a verified tree; the accepted path is committed already."""
        ...

    def finish(self, state: DecodeState) -> None:
        """The request is over; drop what belongs to it."""
        ...

    def reset(self) -> None:
        """Forget everything learnt from earlier requests."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as tensors and plain values."""
        ...

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A drafter with something to search for offline, for one target and the kind of text it will write."""

    def tune(
        self,
        target: Target,
        prompts: Sequence[Tensor],
        generate: Callable[[Tensor], Any],
        progress: Callable[[int, int, str], None],
    ) -> dict[str, Any]:
        """Search; afterwards this drafter uses what was found.

        Args:
            target: the one it is bound to.
            prompts: int64 ``[1, W]`` each, to calibrate on.
            generate: decodes a prompt with this drafter, as ``model.generate`` does.
            progress: told (done, of, what is being done).

        Returns:
            What was found, in plain values: an entry of a JSON file that the drafter reads back.
        """
        ...


@runtime_checkable
class Shaped(Protocol):
    """A drafter whose tree is a fixed set of rank paths that may be exchanged between any two steps.

    Path ``(0, 2)`` is the node of rank 2 below the node of rank 0 below the root, which is not counted. Drafters that
    draft token by token take chains only, ``(0,), (0, 0), ...``: how many steps a draft may have.

    Attributes:
        tree_paths: the tree of the next step; empty where only a target tells.
        widest: most children of a node, 1 for chains; 0 where it has no such tree as it is set up.
        deepest: most levels; None = no limit.
    """

    @property
    def tree_paths(self) -> list[tuple[int, ...]]: ...
    @property
    def widest(self) -> int: ...
    @property
    def deepest(self) -> int | None: ...

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        """Take another tree from the next ``propose`` on; ValueError where it is none, or none that can be filled."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """Checks a tree with one pass of the target and an acceptance rule."""

    rule: AcceptanceRule | None

    def first(self, target: Target, state: DecodeState, logits: Tensor) -> Verification:
        """The token of the prefill: ``logits [B, V]`` after the prompt."""
        ...

    def verify(self, target: Target, state: DecodeState, tree: TokenTree, taps: Sequence[Tap] = ()) -> Verification:
        """One pass over ``tree``, then acceptance and stop rules; nothing is committed. ``taps``: states to record."""
        ...
