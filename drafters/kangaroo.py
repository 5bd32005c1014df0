"""Kangaroo: the target's first layers and a small adapter draft, its other layers verify (Liu et al., 2404.18911).

The first E layers run on the drafted tokens one by one; the adapter (``drafters.kangaroo_adapter``) turns the state
that leaves them into one that the target's own head can read. Two exits: out of the model after layer E, and out of
drafting after a token of which the draft is less sure than eta, which is still proposed. The first E layers have then
read the whole draft, so the verification starts at layer E from their states, and no layer reads a drafted token twice.

The adapter has K/V of its own: the exit states of the whole prompt, then those of the committed tokens, and behind them
the draft as it grows. The last drafted token never reaches it; if that token is accepted, its state, which the
verification passed on, is read before the next draft.

A round that drafts k tokens costs, in weights read, (k E + L) / L of the layers and k times head and adapter
(``Kangaroo.round_cost``).

Differences from the authors' code: batches, in which rows stop on their own; exact sampling, since the draft is a point
mass; the budget is honoured to the token. They describe a tree and have not published it: ours is
``drafters.kangaroo_tree``.

Shapes: B rows, N nodes, n nodes of a pass, k steps of a draft, H hidden size, V vocabulary, E exit layer, L layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafters.base import ChainDrafter, device_of, warn_untrained
from drafters.causal_layer import GrowingRows, prompt_states
from drafters.kangaroo_adapter import Adapter, AdapterLesson, fresh_adapter, load_adapter, save_adapter
from drafters.kangaroo_tree import ExpandedTree
from drafters.self_drafting import comb_tree, draft_chain, verify_from, why_not_split
from specdec.interfaces import DecodeState, Needs, Prefill, Verification
from specdec.loading import DEMO_FOLDER, is_demo
from specdec.routing import Route
from specdec.target import Target
from specdec.transfer import upload
from specdec.tree import TokenTree, root_only

SHAPES = ("chain", "top_k")
DEMO_ADAPTER = DEMO_FOLDER.parent / "kangaroo"
NEW = "new"
WAY_OUT = "give path=FOLDER_OR_HUB_ID of a trained one (specdec train makes them), or path=new where this is meant"
_EXIT_LAYER = 2


class Kangaroo(ChainDrafter):
    """Draft with the first layers of the target and an adapter.

    Args:
        path: the adapter: a folder, a file of weights or a hub id, in our layout or the authors'; ``new`` for a random
            one, which drafts nothing of use until it is trained. None: the shipped one for the demo target, for others
            a random one.
        exit_layer: E, layers that draft; None = as the adapter says, 2 where it does not.
        shape: ``chain``, or ``top_k``, a tree of the best nodes.
        num_draft_tokens: k, longest path of a draft.
        confidence: eta, go no deeper after a token less likely than this under the draft; 0 = always k tokens, above
            1 = always one. Published: 0.6 for the chain, 0.4 for the tree.
        width: nodes expanded per level of a tree, and children of each.
        num_nodes: of the tree, root not counted; at least one more than the expanded ones,
            ``width * (num_draft_tokens - 1)``.
        seed: of the random adapter.

    Attributes:
        adapter: the module, once there is a target.
        ignored: names in the checkpoint that are not the adapter's, with the reason.

    Raises:
        ValueError: an unknown shape, or settings that allow no draft.
    """

    name = "kangaroo"

    def __init__(  # noqa: PLR0913 - the options of one recipe
        self,
        path: str | None = None,
        exit_layer: int | None = None,
        shape: str = "chain",
        num_draft_tokens: int = 6,
        confidence: float = 0.6,
        width: int = 10,
        num_nodes: int = 60,
        seed: int = 0,
    ) -> None:
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
        if min(num_draft_tokens, width, 1 if exit_layer is None else exit_layer) < 1 or confidence < 0:
            raise ValueError(
                "expected exit_layer >= 1 (or null), num_draft_tokens >= 1, width >= 1 and confidence >= 0; got "
                f"{exit_layer=}, {num_draft_tokens=}, {width=}, {confidence=}"
            )
        expanded = width * (num_draft_tokens - 1)
        if shape == "top_k" and num_nodes <= expanded:
            raise ValueError(
                f"{width=} and {num_draft_tokens=} expand {expanded} nodes, all of which are verified: expected "
                f"num_nodes > {expanded}, got {num_nodes}"
            )
        self.path, self.exit_layer, self.seed = path, exit_layer, seed
        self.num_draft_tokens, self.confidence = num_draft_tokens, confidence
        self.tree = ExpandedTree(num_draft_tokens, width, num_nodes) if shape == "top_k" else None
        self.needs = Needs(max_nodes=self.most_nodes if self.tree is None else self.tree.max_nodes)
        self.adapter: Adapter | None = None
        self.ignored: list[str] = []
        self.loaded_from: str | None = None  # None = the adapter is new
        self._target: Target | None = None
        self._layer = 0
        self._rows: GrowingRows | None = None
        self._fed: list[int] = []  # nodes of each row that the adapter has read since the last commit, the first ones

    def fit(self, target: Target) -> str | None:
        """Load the adapter, choose E, and try the split there on the loaded weights."""
        reason = self._why_too_small(target)
        if reason is not None:
            return reason
        if self._target is None or self._target.model is not target.model:  # else what was learnt since stays
            try:
                adapter, trained, ignored = self._load(target)
            except (OSError, ValueError) as error:
                return f"an adapter that can be read; {error}"
            if trained is not None and self.exit_layer not in (None, trained):
                return (
                    f"exit_layer={trained} (or null), for which the adapter at {self._place(target)} was trained; got "
                    f"exit_layer={self.exit_layer}, which path=new makes a new one for"
                )
            layer = self.exit_layer or trained or min(_EXIT_LAYER, target.num_layers - 1)
            reason = self._why_not_from(target, layer)
            if reason is not None:
                return reason
            self._say(target, trained, layer)
            self.adapter, self._layer = adapter.to(target.dtype).requires_grad_(False).eval(), layer
            place = self._place(target)
            self.ignored, self.loaded_from = ignored, None if place == NEW else place
            self.needs = Needs(taps=(layer,), prompt_states=True, max_nodes=self.needs.max_nodes)
        assert self.adapter is not None
        self.adapter.to(device_of(target, self._layer))
        self._target = target
        return None

    @property
    def widest(self) -> int:
        """A chain; the shape ``top_k`` grows trees of its own, which nobody exchanges."""
        return 1 if self.tree is None else 0

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        """Draft chains of another length from the next step on."""
        if self.tree is not None:
            raise ValueError("kangaroo with shape=top_k grows a tree of its own at every step; expected shape=chain")
        super().reshape(paths)

    def _say(self, target: Target, trained: int | None, layer: int) -> None:
        """Warn of what was decided for the user: a random adapter, or an exit layer that nobody named."""
        if self._place(target) is None:
            warn_untrained(self.name, "a random adapter", target, WAY_OUT)
        elif self.path not in (None, NEW) and trained is None and self.exit_layer is None:
            warnings.warn(
                f"the adapter at {self.path} does not say behind which layer it was trained; drafting from "
                f"exit_layer={layer}. If it was another one, hardly a draft will be accepted: set exit_layer=E",
                stacklevel=3,
            )

    def _why_too_small(self, target: Target) -> str | None:
        if target.num_layers < 2:
            return f"a model of at least 2 layers, got {target.num_layers}"
        if self.tree is not None and self.tree.width > target.vocab_size:
            return f"a vocabulary of at least {self.tree.width} tokens (width), got {target.vocab_size}"
        if target.config.hidden_size != target.hidden_size or target.hidden_size % 2:
            return (
                f"a residual stream as wide as what the head reads, of even width; got {target.config.hidden_size} and "
                f"{target.hidden_size}"
            )
        return None

    def _why_not_from(self, target: Target, layer: int) -> str | None:
        if layer >= target.num_layers:
            return f"exit_layer < {target.num_layers}, the model's layers; got {layer}"
        return why_not_split(target, layer)

    def _place(self, target: Target) -> str | None:
        """Where the adapter comes from; None where there is none and nobody asked for a new one."""
        if self.path is None and is_demo(target.model) and DEMO_ADAPTER.is_dir():
            return str(DEMO_ADAPTER)
        return self.path

    def _load(self, target: Target) -> tuple[Adapter, int | None, list[str]]:
        """The adapter, the exit layer that it was trained for, and what was ignored in its checkpoint."""
        path = self._place(target)
        if path is None or path == NEW:
            return fresh_adapter(target, self.seed), None, []
        return load_adapter(path, target)

    @torch.inference_mode()
    def start(self, state: DecodeState, prefill: Prefill) -> None:
        """The adapter reads the prompt's exit states."""
        assert self.adapter is not None
        states, counts = prompt_states(prefill, self._layer)
        reserve = max(counts) + min(state.policy.max_new_tokens, 512) + self.needs.max_nodes
        self._rows = GrowingRows(state.batch_size, self.adapter.self_attn, reserve)
        self._fed = [0] * state.batch_size
        self.adapter.read(states, counts, self._rows)

    def propose(self, state: DecodeState) -> TokenTree:
        """Draft, then complete the lower layers of the nodes that the draft has not run."""
        assert self._target is not None and state.context is not None
        budgets = zip(state.context.budgets, state.finished, strict=True)
        depth = min(self.num_draft_tokens, max(0 if done else left - 1 for left, done in budgets))
        if depth < 1:
            return root_only(state.root)
        tree, states = self._chain(state) if self.tree is None else self._grown(self.tree, state, depth)
        return verify_from(self._layer, self._target, state, tree, states)

    @property
    def _route(self) -> Route:
        return Route(hi=self._layer, logits=False)

    def _chain(self, state: DecodeState) -> tuple[TokenTree, Sequence[Tensor]]:
        """A chain per row, and the exit states of the nodes that have been run."""
        assert self._target is not None and self._rows is not None
        rows = self._rows

        def head(states: Tensor, step: int) -> Tensor:
            return self._logits(states, *rows.begin(1, step)).to(state.root.device)

        draft = draft_chain(self._target, state, self._route, self.num_draft_tokens, self.confidence, head=head)
        steps = len(draft.ranked)
        # Rows that nothing was drafted for have run their root all the same.
        self._fed = [steps if length else 1 for length in draft.lengths]
        return comb_tree(state.root, draft, [[1] * state.batch_size] * steps, self.name), draft.states

    @torch.no_grad()
    def _grown(self, shape: ExpandedTree, state: DecodeState, depth: int) -> tuple[TokenTree, Sequence[Tensor]]:
        """A tree per row, and the exit states of the nodes that have been run."""
        target, rows, context, exits = self._target, self._rows, state.context, list[Tensor]()
        assert target is not None and rows is not None and context is not None

        def scores(tree: TokenTree, nodes: slice) -> Tensor:
            exits.append(target.run(context, tree, nodes, self._route, taps=(self._layer,)).states[self._layer])
            logits = self._logits(exits[-1], *rows.begin_nodes(tree.topology, nodes))
            return logits.float().to(state.root.device)

        active = [not done for done in state.finished]
        tree, count = shape.grow(state.root, scores, depth, self.confidence, active)
        tree.sources = (self.name,)
        self._fed = [count if on else 1 for on in active]
        return tree, exits

    @torch.inference_mode()
    def _logits(self, states: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        """What adapter and head say of exit states: ``[B, n, H]`` -> ``[B, n, V]``."""
        assert self._target is not None and self.adapter is not None
        hidden = self.adapter(states, positions, visible, self._rows)
        return self._target.head(hidden.to(self._target.dtype))

    @torch.inference_mode()
    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
        """Keep what the adapter has read of the accepted paths, and let it read the rest of them."""
        assert self.adapter is not None and self._rows is not None
        fed, self._fed = self._fed, [0] * state.batch_size
        if self.name not in tree.sources:
            fed = self._fed  # the nodes are another drafter's
        paths = verification.path
        self._rows.keep([[node for node in path if node < count] for path, count in zip(paths, fed, strict=True)])
        unread = [[node for node in path if node >= count] for path, count in zip(paths, fed, strict=True)]
        counts = [len(nodes) for nodes in unread]
        if not any(counts):
            return
        states = verification.states[self._layer]
        nodes = [[*found, *[0] * (max(counts) - len(found))] for found in unread]
        index = upload(nodes, states.device)
        self.adapter.read(states[torch.arange(len(nodes), device=states.device)[:, None], index], counts, self._rows)

    def finish(self, state: DecodeState) -> None:  # noqa: ARG002 - the protocol's signature
        """Let go of the request."""
        self._rows = None

    def lesson(self, target: Target, **options: Any) -> AdapterLesson:
        """Soft cross-entropy through the frozen head; from now on the adapter is in float32 and learns.

        Raises:
            ValueError: any option, since this loss has none; a target that the drafter is not bound to.
        """
        if options:
            raise ValueError(f"kangaroo's loss has no options; got {', '.join(sorted(options))}")
        if self.adapter is None or self._target is None or self._target.model is not target.model:
            raise ValueError("expected the target that this drafter is bound to; call fit(target) first")
        return AdapterLesson(self.adapter.float().requires_grad_(True).train(), target, self._layer)

    def save(self, folder: Path, layout: str = "specdec") -> None:
        """Write the adapter; see ``save_adapter``.

        Raises:
            ValueError: an unknown layout, or a drafter that has not been bound to a target.
        """
        if self.adapter is None or self._target is None:
            raise ValueError("this drafter has no adapter yet; call fit(target) first")
        save_adapter(Path(folder), self.adapter, self._layer, self._target, layout)

    def settled(self) -> dict[str, Any]:
        """The layer whose states the adapter reads."""
        return {"exit_layer": self._layer}

    def round_cost(self, steps: int) -> float:
        """Weight bytes read by a round that drafts a chain of ``steps`` tokens, over those of one plain pass.

        The embedding is left out: a pass reads one row of it per token.
        """
        assert self._target is not None and self.adapter is not None
        layers = [_nbytes(layer) for layer in self._target.layers]
        head = _nbytes(self._target.router.head)
        step = sum(layers[: self._layer]) + head + _nbytes(self.adapter)
        return 1 + steps * step / (sum(layers) + head)


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
