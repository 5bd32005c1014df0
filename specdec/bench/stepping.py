"""One decode step as a lap: ours through the very loop that ``generate`` runs, and the raw forward beside it.

Shapes: B rows, N nodes, D depth, P committed tokens.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specdec.bench.clock import synchronise, timed
from specdec.bench.subjects import Subject
from specdec.build import build, build_verifier, load, speculate
from specdec.decoding import Request, decode
from specdec.generation import Speculation, restore, speculation_of, using
from specdec.interfaces import AcceptanceRule, Context, DecodeState, Needs, Prefill, Verification, Walk
from specdec.metrics import SpeculationStats
from specdec.outputs import Recorder
from specdec.target import Target
from specdec.templates import Template, best_first
from specdec.tree import TokenTree

# Of the shape of trees only: rates that fall with rank and depth as those of real drafters do.
_RATES = ((0.5, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.015),)
_OURS = ("model", "drafter", "verifier", "acceptance", "options")  # parameters of speculate() that are no modes


def tree_of(num_nodes: int) -> Template:
    """The best tree of ``num_nodes`` nodes, root included, for acceptance rates that fall with rank and depth."""
    return Template.from_paths(best_first(_RATES, num_nodes - 1))


class FixedTree:
    """Proposes the same tree of random tokens at every step: a drafter that costs nothing.

    Args:
        template: its shape.
        seed: of the tokens; siblings hold distinct ones.
    """

    name = "fixed_tree"

    def __init__(self, template: Template, seed: int = 0) -> None:
        self.template, self.seed = template, seed
        self.needs = Needs(max_nodes=template.num_nodes)
        self.token_ids: Tensor | None = None

    def fit(self, target: Target) -> str | None:
        """Draw the tokens ``[1, N]``."""
        if target.vocab_size < self.template.num_nodes:
            return f"a vocabulary of at least {self.template.num_nodes} tokens, got {target.vocab_size}"
        drawn = torch.randperm(target.vocab_size, generator=torch.Generator("cpu").manual_seed(self.seed))
        self.token_ids = drawn[: self.template.num_nodes][None].to(target.device)
        self.template = self.template.to(target.device)
        return None

    def start(self, state: DecodeState, prefill: Prefill) -> None:  # noqa: ARG002 - the protocol's signature
        """One tree for every row."""
        assert self.token_ids is not None
        self.token_ids = self.token_ids[:1].repeat(state.batch_size, 1)

    def propose(self, state: DecodeState) -> TokenTree:
        """The tree below the new root."""
        assert self.token_ids is not None
        self.token_ids[:, 0] = state.root
        return TokenTree(self.token_ids, self.template.topology, sources=(self.name,))

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
        """Nothing to learn."""

    def finish(self, state: DecodeState) -> None:
        """Nothing to drop."""

    def reset(self) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing learnt."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Nothing was saved."""


class Forced:
    """Does all the work of a rule, then lets the same path stand whatever the target said.

    So every step of a measurement commits, moves and emits alike.

    Args:
        rule: whose work is done.
        path: the nodes that stand, root first.
    """

    name = "forced"
    lossless = False
    samples = False
    on_path = False

    def __init__(self, rule: AcceptanceRule, path: Sequence[int]) -> None:
        self.rule, self.path = rule, list(path)
        self._walk: Walk | None = None

    def select(self, scores: Tensor, uniforms: Tensor | None) -> Tensor:
        """As the rule does."""
        return self.rule.select(scores, uniforms)

    def refuse(self, tree: TokenTree) -> str | None:
        """As the rule does."""
        return self.rule.refuse(tree)

    def num_coins(self, tree: TokenTree) -> int:
        """As the rule does."""
        return self.rule.num_coins(tree)

    def accept(self, tree: TokenTree, scores: Tensor, uniforms: Tensor | None, coins: Tensor | None = None) -> Walk:
        """The fixed path, after the rule's own walk."""
        walk = self.rule.accept(tree, scores, uniforms, coins)
        if tree.num_nodes == 1:  # of the prefill, or of plain decoding
            return walk
        if self._walk is None:
            self._walk = self._fixed(tree)
        return self._walk

    def _fixed(self, tree: TokenTree) -> Walk:
        width, device = tree.topology.max_depth + 1, tree.token_ids.device
        path = torch.tensor([self.path + [-1] * (width - len(self.path))], device=device)
        path = path.expand(tree.batch_size, -1).contiguous()
        tokens = tree.token_ids.gather(1, path.clamp(min=0))
        # After the last node stands any token: it is a root like another.
        return Walk(path, torch.where(path.roll(-1, 1) > 0, tokens.roll(-1, 1), tree.token_ids[:, -1:]))


class _Paused(Speculation):
    """Takes the request that ``generate`` has made and runs nothing."""

    request: Request | None = None

    def sample(self, request: Request, recorder: Recorder) -> Any:  # noqa: ARG002 - the signature it replaces
        self.request = request
        return request.input_ids


def request_of(model: Any, handle: Speculation, ids: Tensor, mask: Tensor, **options: Any) -> Request:
    """The request that ``model.generate`` makes of a prompt, without anything having run.

    Args:
        model: the target.
        handle: its speculation.
        ids: int64 ``[B, W]``, left-padded.
        mask: of the padding.
        **options: of ``generate``.
    """
    paused = _Paused(handle.target, handle.drafter, handle.verifier)
    with using(model, paused):
        model.generate(input_ids=ids, attention_mask=mask, **options)
    assert paused.request is not None, "generate came by another way than _sample"
    return paused.request


def handle_of(model: Any, drafter: Any, verifier: Any, modes: Mapping[str, Any]) -> Speculation:
    """The speculation of a model with built objects; the model is plain again.

    Args:
        model: the target.
        drafter: built, or its config.
        verifier: built.
        modes: further arguments of ``specdec.speculate``, such as ``compile``.

    Raises:
        ValueError: it takes no such argument.
    """
    known = [name for name in inspect.signature(speculate).parameters if name not in _OURS]
    unknown = [mode for mode in modes if mode not in known]
    if unknown:
        raise ValueError(f"specdec.speculate takes no {', '.join(unknown)}; of modes it takes: {', '.join(known)}")
    speculate(model, drafter, verifier, **modes)
    handle = speculation_of(model)
    restore(model)
    return handle


@contextmanager
def listening(model: Any) -> Iterator[list[str]]:
    """Collect the warnings that name the model: what it cannot do is told so. Others are passed on."""
    refusals: list[str] = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield refusals
    for warning in heard:
        if type(model).__name__ in str(warning.message):
            refusals.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class Stepper:
    """Our step over a fixed tree, again and again: propose, verify (inputs, forward, acceptance), commit, keep, update.

    The text grows by the accepted path, as it does when decoding.

    Args:
        subject: the target.
        rows: B.
        context: P at the first step.
        num_nodes: N, root included.
        accepted: draft tokens that stand in every step (fewer where the tree is not as deep); they are spread over the
            tree, so that their K/V has to move.
        steps: how many will be taken at most.
        modes: further arguments of ``specdec.speculate``, such as ``compile``.

    Attributes:
        refused: why the model does not run in these modes, in the words of the warning that said so; usually None.
    """

    def __init__(
        self,
        subject: Subject,
        rows: int,
        context: int,
        num_nodes: int,
        accepted: int,
        steps: int,
        modes: Mapping[str, Any] | None = None,
    ) -> None:
        self.subject, template = subject, tree_of(num_nodes)
        depth = min(accepted, template.topology.max_depth)
        last = int((template.topology.depths[0] == depth).nonzero()[-1])
        self.path = [node for node in template.topology.paths[0, last].tolist() if node >= 0]
        verifier = build_verifier("tree_attention")
        verifier.rule = Forced(build(load("acceptance", "greedy")), self.path)
        with listening(subject.model) as refusals:
            self.handle = handle_of(subject.model, FixedTree(template), verifier, modes or {})
            self._open(rows, context, steps)
        self.refused = refusals[0] if refusals else None

    def _open(self, rows: int, context: int, steps: int) -> None:
        """Begin a request behind so many tokens and take its first step."""
        subject = self.subject
        self._context: Context | None = None
        ids, cache = subject.ids(rows, context), subject.filled(rows, context - 1)
        options = {"max_new_tokens": (steps + 2) * len(self.path) + 2, "do_sample": False, "eos_token_id": None}
        request = request_of(
            subject.model, self.handle, ids, torch.ones_like(ids), past_key_values=cache, pad_token_id=0, **options
        )
        handle, self.stats = self.handle, SpeculationStats()
        self._steps: Any = decode(handle.target, handle.drafter, handle.verifier, request, self.stats)
        self.step()  # the prefill's token
        self.step()  # opens the cache

    @property
    def length(self) -> int:
        """P now."""
        assert self._context is not None
        return self._context.lengths[0]

    def step(self) -> None:
        """Take one step."""
        with torch.no_grad():  # as within generate
            state, _ = next(self._steps)
        self._context = state.context

    def lap(self) -> float:
        """Seconds of one step."""
        return timed(self.step, self.subject.device)

    def close(self) -> None:
        """Let go of the request."""
        self._steps.close()


class RawForward:
    """transformers' own forward of N tokens behind P: causal, its ``DynamicCache``, logits of all N, nothing prepared.

    Run in inference mode, which ``generate`` itself does not use and which is the quicker. The cache is cut back
    outside the clock; it grows as the stepper's does.

    Args:
        subject: the model.
        rows: B.
        context: P at the first pass.
        num_nodes: N.
        kept: tokens by which the cache grows with every pass.
    """

    def __init__(self, subject: Subject, rows: int, context: int, num_nodes: int, kept: int) -> None:
        self.subject, self.cut = subject, num_nodes - kept
        self.ids = subject.ids(rows, num_nodes, seed=1)
        with torch.inference_mode():
            self.cache = subject.filled(rows, context)

    def lap(self) -> float:
        """Seconds of one forward."""
        with torch.inference_mode():
            synchronise(self.subject.device)
            start = time.perf_counter()
            self.subject.model(self.ids, past_key_values=self.cache, use_cache=True)
            synchronise(self.subject.device)
            seconds = time.perf_counter() - start
            if self.cut:
                self.cache.crop(-self.cut)
        return seconds
