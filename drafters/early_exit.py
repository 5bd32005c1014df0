"""Early exit: the target's first layers, its final norm and its head draft, its other layers verify what they drafted.

LayerSkip's inference (Elhoushi et al., 2404.16710) on any model: no weights are added and none need training, though a
model trained for early exit accepts far more. Draft and verification share their work: the first E layers write K/V
that the verification keeps, and the states that leave them are where it begins, so no layer is computed twice for a
drafted token.

The draft runs k passes of E layers, over the root and the first k - 1 drafted tokens. What the last drafted token and
the siblings still lack, their own K/V and states below layer E, is made in one further pass of E layers without the
head; the verification then runs layers E..L-1 over the whole tree. Per step: k + 1 passes of E layers, one of L - E.

Differences from the authors' code: batches; a stop by confidence; siblings; exact sampling, since the draft is a point
mass. The prompt is read once, by the ordinary prefill, whose K/V serve both parts.
"""

from __future__ import annotations

from drafters.base import ChainDrafter
from drafters.self_drafting import comb_tree, draft_chain, verify_from, why_not_split
from specdec.interfaces import DecodeState, Needs
from specdec.routing import Route
from specdec.target import Target
from specdec.tree import TokenTree, root_only


class EarlyExit(ChainDrafter):
    """Draft with the first layers of the target.

    Args:
        exit_layer: E, layers that draft; None = a quarter of the model's, at least 1.
        num_draft_tokens: k, most tokens in a draft.
        confidence: stop after a token less likely than this under the draft; 0 = always draft k tokens.
        width: successors proposed at every depth of the draft; 1 = a chain, more = a comb of siblings.

    Raises:
        ValueError: settings that allow no draft.
    """

    name = "early_exit"

    def __init__(
        self, exit_layer: int | None = None, num_draft_tokens: int = 4, confidence: float = 0.4, width: int = 1
    ) -> None:
        if num_draft_tokens < 1 or width < 1 or not 0 <= confidence <= 1 or (exit_layer is not None and exit_layer < 1):
            raise ValueError(
                "expected exit_layer >= 1 (or null), num_draft_tokens >= 1, width >= 1 and 0 <= confidence <= 1; got "
                f"{exit_layer=}, {num_draft_tokens=}, {width=}, {confidence=}"
            )
        self.exit_layer, self.num_draft_tokens = exit_layer, num_draft_tokens
        self.confidence, self.width = confidence, width
        self.needs = Needs(max_nodes=self.most_nodes)
        self._target: Target | None = None
        self._layer = 0

    def fit(self, target: Target) -> str | None:
        """Choose E and try the split on the loaded weights."""
        layers = target.num_layers
        if layers < 2:
            return f"a model of at least 2 layers, got {layers}"
        if self.exit_layer is not None and self.exit_layer > layers:
            return f"exit_layer <= {layers}, the model's layers; got {self.exit_layer}"
        if self.width > target.vocab_size:
            return f"a vocabulary of at least {self.width} tokens (width), got {target.vocab_size}"
        self._target, self._layer = target, self.exit_layer or max(layers // 4, 1)
        return why_not_split(target, self._layer)

    @property
    def most_nodes(self) -> int:
        """With what ``width`` hangs beside the chain."""
        return 1 + self.num_draft_tokens * self.width

    def propose(self, state: DecodeState) -> TokenTree:
        """Draft, then complete the lower layers of the nodes that the draft has not run."""
        target = self._target
        assert target is not None
        route = Route(hi=self._layer)
        draft = draft_chain(target, state, route, self.num_draft_tokens, self.confidence, self.width)
        steps = len(draft.ranked)
        if steps == 0:
            return root_only(state.root)
        tree = comb_tree(state.root, draft, [[self.width] * state.batch_size] * steps, self.name)
        return verify_from(self._layer, target, state, tree, draft.states)
