"""A smaller decoder with the same vocabulary drafts for the target (Leviathan et al., 2211.17192; Chen et al.,
2302.01318), as a chain or as a tree (``drafters.sampled_trees`` has the shapes and their papers).

The draft model runs through ``Target`` with K/V of its own (``drafters.follower``), so it may be of any family that can
branch, in another dtype and on another device. Under greedy decoding it proposes its most likely tokens. Under sampling
it draws from q, its own distribution after the request's warpers, and records the draws; requests whose processors read
the ids get the most likely tokens, because rejection rules could not serve them.

The length of a single chain can be tuned and may change between steps (``Shaped``). The other shapes grow trees that
nobody exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.base import BaseDrafter, warn_untrained
from drafters.follower import Follower, Growth
from drafters.ranked_trees import Grown, Shape, TopK
from drafters.sampled_trees import Beam, Branching, Chains
from specdec import capabilities
from specdec.interfaces import DecodeState, Needs, Prefill, Verification
from specdec.loading import DEMO_FOLDER, is_demo
from specdec.sampling import Policy
from specdec.target import Target
from specdec.templates import chain_length, chain_paths
from specdec.transfer import upload
from specdec.tree import CANDIDATE, PADDING, TokenTree, root_only

SHAPES = ("chain", "chains", "top_k", "rsd_c", "rsd_s")
DEMO_DRAFT = DEMO_FOLDER.parent / "draft"


class DraftModel(BaseDrafter):
    """Draft with a smaller model.

    Args:
        path: the draft model: a folder, a hub id, ``demo`` for the one that goes with the demo target, a loaded model
            (used as it is, in evaluation mode), or None: ``demo`` for the demo target, for others a tiny random one,
            which is of use in tests only.
        shape: ``chain``; ``chains``, several independent ones merged; ``top_k``, the best nodes of all that the draft
            model scored; ``rsd_c``, ``branching`` children per level drawn without replacement; ``rsd_s``, a stochastic
            beam search. ``top_k`` never samples, the others do where the request does.
        depth: levels of the tree (``rsd_c``: as many as ``branching`` has), the length of a ``chain``.
        width: nodes expanded per level (``top_k``), of the beam (``rsd_s``), number of ``chains``.
        num_nodes: nodes of a ``top_k`` tree, root not counted.
        branching: children of every node per level, of ``rsd_c``.
        dtype: such as ``float32``; None = the target's.
        device: such as ``cuda:1``; None = the target's.
        seed: of the random draft model.

    Raises:
        ValueError: an unknown shape or dtype, sizes below one, a dtype or device for a model that is loaded already.
    """

    name = "draft_model"

    def __init__(  # noqa: PLR0913 - the options of one recipe
        self,
        path: Any = None,
        shape: str = "top_k",
        depth: int = 4,
        width: int = 6,
        num_nodes: int = 24,
        branching: list[int] | tuple[int, ...] = (4, 2, 1, 1),
        dtype: str | None = None,
        device: str | None = None,
        seed: int = 0,
    ) -> None:
        sizes = {"depth": depth, "width": width, "num_nodes": num_nodes, "branching": min(branching, default=0)}
        wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1]
        if wrong:
            raise ValueError(f"expected sizes of at least 1; got {', '.join(wrong)}")
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"unknown dtype {dtype!r}; expected float32, bfloat16 or float16")
        if not (path is None or isinstance(path, str)) and (dtype or device):
            raise ValueError(f"dtype and device go with a path; got {dtype=}, {device=} and a {type(path).__name__}")
        shapes: dict[str, Shape] = {
            "chain": Chains(depth),
            "chains": Chains(depth, width),
            "top_k": TopK(depth, width, num_nodes),
            "rsd_c": Branching(tuple(branching)),
            "rsd_s": Beam(depth, width),
        }
        if shape not in shapes:
            raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
        self.shape = shapes[shape]
        self.samples = shape != "top_k"
        self.path, self.dtype, self.device, self.seed = path, dtype, device, seed
        self._path = path
        self.needs = Needs(max_nodes=self.shape.max_nodes)
        self.follower: Follower | None = None
        self._step: tuple[Growth, Grown] | None = None

    def fit(self, target: Target) -> str | None:
        """Load the draft model; refuses another vocabulary, a missing model and one that cannot branch."""
        if target.vocab_size < self.shape.widest:
            return f"a vocabulary of at least {self.shape.widest} tokens, got {target.vocab_size}"
        self._path = "demo" if self.path is None and is_demo(target.model) else self.path
        missing = _why_missing(self._path)
        if missing is not None:
            return missing
        try:
            model = self._load(target)
        except OSError as error:
            return f"a draft model at path={self._path!r}; loading it failed: {error}"
        name = f"{type(model).__name__} ({model.config.model_type})"
        reason = capabilities.why_not(model)
        if reason is not None:
            return f"a draft model that can run token trees; {name} cannot: {reason}"
        draft = Target(model)
        if draft.vocab_size != target.vocab_size:
            return f"a draft model over the target's {target.vocab_size} tokens; {name} has {draft.vocab_size}"
        try:
            capabilities.check(draft)
        except ValueError as error:
            return f"a draft model that can run token trees; {error}"
        self.follower = Follower(draft, target)
        return None

    def _load(self, target: Target) -> Any:
        if self._path is not None and not isinstance(self._path, str):
            return self._path.eval()
        dtype = target.dtype if self.dtype is None else getattr(torch, self.dtype)
        if self._path is None:
            warn_untrained(self.name, "a tiny random model", target, "give path=FOLDER_OR_HUB_ID of a smaller model")
            model = random_draft_model(target, self.seed).to(dtype)
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(_folder_of(self._path), dtype=dtype)
        return model.to(self.device or target.device).eval().requires_grad_(False)

    @property
    def tree_paths(self) -> list[tuple[int, ...]]:
        """The chain; none for other shapes."""
        return chain_paths(self.shape.depth) if self.widest else []

    @property
    def widest(self) -> int:
        """A chain, or none that could be exchanged."""
        return 1 if isinstance(self.shape, Chains) and self.shape.width == 1 else 0

    @property
    def deepest(self) -> int | None:
        """No limit."""
        return None

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        """Draft chains of another length from the next step on."""
        if not self.widest:
            raise ValueError("draft_model grows the trees of its other shapes itself; expected shape=chain")
        self.shape = Chains(chain_length(paths, self.name))
        self.needs = replace(self.needs, max_nodes=self.shape.max_nodes)

    def start(self, state: DecodeState, prefill: Prefill) -> None:
        """The draft model reads the prompt."""
        assert self.follower is not None
        self._step = None
        self.follower.open(state, prefill, self.shape.max_nodes, self.shape.level)

    def propose(self, state: DecodeState) -> TokenTree:
        """Grow one tree per row, no deeper than the token budget reaches; stopped rows propose nothing."""
        assert self.follower is not None
        assert state.context is not None
        self._step = None
        rows = zip(state.context.budgets, state.finished, strict=True)
        depth = min(self.shape.depth, max(budget for budget, done in rows if not done) - 1)
        growth = self.follower.begin(state) if depth > 0 else None
        if growth is None:
            return root_only(state.root)
        uniforms = None
        if self.samples and state.policy.uniforms is not None and state.policy.vectorised:
            uniforms = _Uniforms(state)
        grown = self.shape.grow(state.root, _Passes(growth, state.policy, state.root.device), depth, uniforms)
        self._step = growth, grown
        tree = grown.tree
        tree.sources = (self.name,)
        if any(growth.quiet):
            _silence(tree, growth.quiet)
        return tree

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:  # noqa: ARG002
        """Keep the K/V of the accepted nodes that were run.

        In rows that it was not asked for another drafter may have numbered the nodes; it reads them later.
        """
        step, self._step = self._step, None
        if step is None or self.name not in tree.sources:
            return  # what another drafter proposed is read as text
        growth, grown = step
        # Waits for nothing: the verification has been read off the device, and this was computed before it.
        run = grown.run.expand(tree.batch_size, -1).tolist()
        accepted = [
            [] if quiet else [number for number in (row[node] for node in path[1:]) if number > 0]
            for row, path, quiet in zip(run, verification.path, growth.quiet, strict=True)
        ]
        growth.keep(accepted, verification.finished)

    def finish(self, state: DecodeState) -> None:  # noqa: ARG002 - the protocol's signature
        """Let go of the request."""
        self._step = None
        if self.follower is not None:
            self.follower.close()


class _Passes:
    """A growth with the request's warpers over its logits."""

    def __init__(self, growth: Growth, policy: Policy, device: torch.device) -> None:
        self.growth, self.policy, self.device = growth, policy, device

    def root(self) -> Tensor:
        return self._warp(self.growth.root())

    def expand(self, tokens: Tensor, parents: Tensor | tuple[int, ...]) -> Tensor:
        return self._warp(self.growth.expand(tokens, parents))

    def _warp(self, logits: Tensor) -> Tensor:
        logits = logits.to(self.device)
        return self.policy.warp(logits) if self.policy.vectorised else logits


class _Uniforms:
    """float64 in [0, 1) from the request's own generator."""

    def __init__(self, state: DecodeState) -> None:
        self.generator, self.device = state.generator, state.root.device

    def __call__(self, *shape: int) -> Tensor:
        return upload(torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu"), self.device)


def _silence(tree: TokenTree, quiet: list[bool]) -> None:
    """Turn all nodes below the root of quiet rows into padding, their events into none."""
    rows = upload(quiet, tree.token_ids.device)[:, None]
    role = torch.full_like(tree.token_ids, CANDIDATE) if tree.role is None else tree.role
    below = torch.arange(tree.num_nodes, device=rows.device) > 0
    tree.role = role.masked_fill(rows & below, PADDING)
    if tree.draws is not None:
        tree.draws.node = tree.draws.node.masked_fill(rows, -1)


def _folder_of(path: str) -> str:
    return str(DEMO_DRAFT) if path == "demo" else str(Path(path).expanduser()) if path.startswith("~") else path


def _why_missing(path: Any) -> str | None:
    """What a path should have led to; None where it may lead to a model."""
    if not isinstance(path, str):
        return None
    folder = _folder_of(path)
    if folder.startswith((".", "/")) and not (Path(folder) / "config.json").is_file():
        made = "; make it with scripts/train_demo_draft.py" if path == "demo" else ""
        return f"a draft model at path={path!r}; {folder} has no config.json{made}"
    return None


def random_draft_model(target: Target, seed: int) -> Any:
    """A tiny random Llama over the target's vocabulary, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=getattr(target.config, "max_position_embeddings", None) or 2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
