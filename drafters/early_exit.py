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

import torch
from torch import Tensor

from drafters.base import BaseDrafter
from drafters.self_drafting import comb_tree, draft_chain
from specdec.interfaces import DecodeState, Needs
from specdec.routing import Route
from specdec.target import Target
from specdec.tree import TokenTree, root_only


class EarlyExit(BaseDrafter):
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
        self.needs = Needs(max_nodes=1 + num_draft_tokens * width)
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
        return _why_not_split(target, self._layer)

    def propose(self, state: DecodeState) -> TokenTree:
        """Draft, then complete the lower layers of the nodes that the draft has not run."""
        target, context = self._target, state.context
        assert target is not None and context is not None
        route = Route(hi=self._layer)
        draft = draft_chain(target, state, route, self.num_draft_tokens, self.confidence, self.width)
        steps = len(draft.ranked)
        if steps == 0:
            return root_only(state.root)
        tree = comb_tree(state.root, draft, [[self.width] * state.batch_size] * steps, self.name)
        if context.template.get("output_hidden_states"):
            # The caller wants the states of the lower layers too, which only a whole pass returns.
            return tree
        lower = Route(hi=self._layer, logits=False)
        rest = target.run(context, tree, slice(steps, tree.num_nodes), lower, taps=(self._layer,))
        tree.entry = (self._layer, torch.cat([*draft.states, rest.states[self._layer]], dim=1))
        return tree


@torch.no_grad()
def _why_not_split(target: Target, layer: int) -> str | None:
    """Why layers below and from ``layer`` on cannot run one after the other; None where they can.

    A model whose upper layers read more of the lower ones than the residual stream would be verified wrongly, so the
    split is held to an unbroken pass before it is used.
    """
    model, router = target.model, target.router
    ids = torch.linspace(0.1, 0.8, 8, device=target.device).mul(target.vocab_size).long()[None]

    def logits() -> Tensor:
        return model(input_ids=ids, use_cache=False, return_dict=True).logits.float()

    whole = logits()
    with router.route(Route(hi=layer, logits=False)), router.taps((layer,)) as recorded:
        logits()
    try:
        with router.route(Route(lo=layer), recorded[layer][0]):
            split = logits()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return f"layers that can run from stored states; from layer {layer} on {type(error).__name__}: {error}"
    difference, scale = (split - whole).abs().max(), (whole - whole.mean()).abs().max()
    if difference <= 1e-3 * scale:
        return None
    return (
        f"layers that read only the residual stream; split at layer {layer}, logits differ by {float(difference):.1e}"
    )
