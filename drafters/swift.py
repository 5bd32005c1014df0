"""SWIFT: the target drafts for itself without some of its attention and feed-forward parts (2410.06916).

Which parts go is a skip set, found while decoding (``skip_search.py``) or given: a published or tuned file, or Unified
Layer Skipping's even spread. Skipped parts are not computed. The draft stops when it is unsure of a token, and proposes
the runners-up of every step as siblings, the more of them the less sure it was (a comb). It writes into the slots
behind the committed tokens of the target's own cache, which the verification then writes anew: whatever is skipped, no
K/V of a draft survives.

Differences from the authors' code: no clone of the cache; batches (one skip set, rows stop on their own); exact
sampling, since the draft is a point mass; the search is off where the request is too short to repay it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from drafters.base import ChainDrafter
from drafters.self_drafting import Draft, comb_tree, draft_chain
from drafters.skip_search import SkipSearch, SkipSet, load_skip_set, matchness, unified, uniform
from specdec.interfaces import DecodeState, Needs, Prefill
from specdec.target import Target
from specdec.tree import TokenTree, root_only

# Nodes of a step by the draft's confidence in its first choice: (above, nodes).
_GREEDY_WIDTHS = ((0.95, 3), (0.8, 5), (0.5, 8))
_SAMPLED_WIDTHS = ((0.95, 1), (0.8, 3), (0.5, 5))
_UNSURE_WIDTH = 10


class Swift(ChainDrafter):
    """Draft with the target's own layers, some of their parts left out.

    Args:
        skip: the set to start from. ``"uniform"`` is the one that decoding improves on; the path of a JSON file,
            ``{"path": FILE, "key": ENTRY}``, ``{"speedup": s}`` (Unified Layer Skipping) and
            ``{"attention": [...], "mlp": [...]}`` are used as they are.
        num_draft_tokens: most steps of a draft.
        confidence: stop after a token less likely than this under the draft.
        max_width: most nodes per depth; 1 = a chain. The method's own numbers go up to 10.
        search: the search for a better set; True = with SWIFT's settings, False = none.
        min_new_tokens: no search in requests that may emit fewer tokens, which could not repay it.
        search_interval: steps between two candidates.

    Raises:
        ValueError: settings that allow no draft, or a skip set that cannot be read.
    """

    name = "swift"

    def __init__(
        self,
        skip: str | Mapping[str, Any] = "uniform",
        num_draft_tokens: int = 25,
        confidence: float = 0.8,
        max_width: int = _UNSURE_WIDTH,
        search: SkipSearch | bool = True,
        min_new_tokens: int = 256,
        search_interval: int = 1,
    ) -> None:
        if min(num_draft_tokens, max_width, search_interval) < 1 or not 0 < confidence <= 1:
            raise ValueError(
                "expected num_draft_tokens, max_width and search_interval >= 1 and 0 < confidence <= 1; got "
                f"{num_draft_tokens=}, {max_width=}, {search_interval=}, {confidence=}"
            )
        self._initial = _reader(skip)
        self._improves = skip == "uniform"
        self.num_draft_tokens, self.confidence, self.max_width = num_draft_tokens, confidence, max_width
        self.search = (SkipSearch() if search else None) if isinstance(search, bool) else search
        self.min_new_tokens, self.search_interval = min_new_tokens, search_interval
        self.needs = Needs(max_nodes=self.most_nodes)
        self._target: Target | None = None
        self._saved: dict[str, Any] | None = None
        self._skip = SkipSet(frozenset(), frozenset())
        self._searching, self._unscored, self._steps = False, False, 0
        self._kept: list[DecodeState] | None = None

    @property
    def skip_set(self) -> SkipSet:
        """The set that drafts now."""
        return self._skip

    def fit(self, target: Target) -> str | None:
        """Read the first skip set and bind the search."""
        layers = target.num_layers
        if layers < 3:
            return f"a model of at least 3 layers, since the first and the last stay; got {layers}"
        reason = target.router.why_not_skip()
        if reason is not None:
            return f"layers whose parts can be skipped; {reason}"
        self._skip = self._initial(layers)
        if self._skip.last >= layers:
            return f"a skip set for {layers} layers (0 to {layers - 1}), got one that names layer {self._skip.last}"
        self._target = target
        if self.search is not None:
            self.search.bind(layers, self._skip)
            if self._improves:
                self.search.settle()
            if self._saved is not None:
                self.search.load_state_dict(self._saved)
                self._saved = None
            self._skip = self.search.best
        return None

    @property
    def most_nodes(self) -> int:
        """With what the confidence hangs beside the chain."""
        return 1 + self.num_draft_tokens * min(self.max_width, _UNSURE_WIDTH)

    def start(self, state: DecodeState, prefill: Prefill) -> None:  # noqa: ARG002 - the protocol's signature
        """Decide whether to search in this request."""
        self._steps = 0
        if self._kept is not None:
            self._kept.append(state)
            return
        long_enough = state.policy.max_new_tokens >= self.min_new_tokens
        search = self.search
        self._searching = search is not None and self._improves and long_enough and not search.done
        self._unscored = self._searching

    def propose(self, state: DecodeState) -> TokenTree:
        """Try a candidate where one is due, then draft with the best set known."""
        assert self._target is not None
        if self._searching:
            self._try_candidate(state)
        width = min(self.max_width, _UNSURE_WIDTH, self._target.vocab_size)
        draft = draft_chain(self._target, state, self._skip.route, self.num_draft_tokens, self.confidence, width)
        if not draft.ranked:
            return root_only(state.root)
        return comb_tree(state.root, draft, _widths(draft, width, state.policy.uniforms is None), self.name)

    def finish(self, state: DecodeState) -> None:  # noqa: ARG002 - the protocol's signature
        """The text that candidates were scored on is over."""
        self._searching = False

    def reset(self) -> None:
        """Back to the first set, nothing scored."""
        self._saved = None
        if self.search is not None:
            self.search.reset()
            if self._target is not None:
                self._skip = self.search.best

    def state_dict(self) -> dict[str, Any]:
        """The search; nothing where there is none, or no target yet."""
        if self.search is None or self._target is None:
            return dict(self._saved or {})
        return self.search.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a saved search.

        Raises:
            ValueError: it is none, or one over another model's layers.
        """
        if self.search is None:
            super().load_state_dict(saved)
            return
        if not saved:
            self.reset()
            return
        self.search.check_state(saved)
        if self._target is None:
            self._saved = dict(saved)
        else:
            self.search.load_state_dict(saved)
            self._skip = self.search.best

    def tune(
        self,
        target: Target,
        prompts: Sequence[Tensor],
        generate: Callable[[Tensor], Any],
        progress: Callable[[int, int, str], None],
    ) -> dict[str, Any]:
        """Search on the target's own texts for the prompts; each candidate is scored on all of them (``Tunable``).

        Returns:
            The best set in the layout of the published files, with how it was found.

        Raises:
            ValueError: no search to run, or no text long enough to be scored.
        """
        search = self.search
        if search is None:
            raise ValueError("tuning swift is its search; got search=false, expected true or the settings of one")
        search.settle()
        states = self._decode_all(prompts, generate, progress)
        window = search.context_window + 1
        texts = [(state.context, state.policy.outputs[0][:window]) for state in states]
        texts = [(context, text) for context, text in texts if len(text) == window]

        def score(skip: SkipSet) -> float:
            scores = [matchness(target, context, [text], skip.route) for context, text in texts if context is not None]
            return sum(scores) / len(scores)

        if not texts:
            raise ValueError(f"no text reached {window} tokens (context_window + 1); give max_new_tokens >= {window}")
        first = score(search.best)
        search.rebase(first)
        while not search.done:
            search.tell(score(search.propose()))
            progress(search.iteration, search.max_iterations, f"candidates, matchness {search.best_score:.3f}")
        self._skip = search.best
        found = {"matchness": search.best_score, "matchness_of_first": first, "candidates": search.iteration}
        return {**self._skip.as_dict(), **found, "ratio": search.ratio, "texts": len(texts)}

    def _decode_all(
        self,
        prompts: Sequence[Tensor],
        generate: Callable[[Tensor], Any],
        progress: Callable[[int, int, str], None],
    ) -> list[DecodeState]:
        """The requests of all prompts, kept with their K/V."""
        states: list[DecodeState] = []
        self._kept = states
        try:
            for index, prompt in enumerate(prompts, start=1):
                generate(prompt)
                progress(index, len(prompts), "calibration texts")
        finally:
            self._kept = None
        return states

    def _try_candidate(self, state: DecodeState) -> None:
        """One step of the search, on the first W + 1 tokens that every running row has emitted."""
        search, target, context = self.search, self._target, state.context
        assert search is not None and target is not None and context is not None
        window = search.context_window + 1
        ready = [count > window for count in state.emitted]
        if not any(ready) or not all(r or done for r, done in zip(ready, state.finished, strict=True)):
            return
        self._steps += 1
        if (self._steps - 1) % self.search_interval:
            return
        outputs = state.policy.outputs
        texts = [text[:window] if r else [] for text, r in zip(outputs, ready, strict=True)]
        skip = search.best if self._unscored else search.propose()
        score = matchness(target, context, texts, skip.route)
        if self._unscored:
            search.rebase(score)
            self._unscored = False
        else:
            search.tell(score)
        self._skip = search.best
        self._searching = not search.done


def _reader(skip: str | Mapping[str, Any]) -> Callable[[int], SkipSet]:
    """What makes the first skip set once the number of layers is known; files are read now."""
    if skip == "uniform":
        return uniform
    given: dict[str, Any] = {"path": skip} if isinstance(skip, str) else dict(skip)
    if given.keys() == {"speedup"}:
        return lambda layers: unified(layers, float(given["speedup"]))
    if given.keys() == {"attention", "mlp"}:
        fixed = SkipSet.of(given["attention"], given["mlp"])
    elif {"path"} <= given.keys() <= {"path", "key"}:
        fixed = load_skip_set(given["path"], given.get("key"))
    else:
        raise ValueError(
            'expected skip="uniform", a JSON file, {"path": ..., "key": ...}, {"speedup": ...} or '
            f'{{"attention": [...], "mlp": [...]}}; got {skip!r}'
        )
    return lambda _: fixed


def _widths(draft: Draft, most: int, greedy: bool) -> list[list[int]]:
    """Nodes that each step offers, per row: the surer the draft, the fewer."""
    table = _GREEDY_WIDTHS if greedy else _SAMPLED_WIDTHS

    def width(confidence: float) -> int:
        return min(next((nodes for above, nodes in table if confidence > above), _UNSURE_WIDTH), most)

    return [[width(confidence) for confidence in step] for step in draft.confidence]
