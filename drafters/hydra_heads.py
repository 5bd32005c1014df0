"""Hydra: draft heads that read what was drafted before them (Ankner et al., 2402.05109).

Medusa's heads all look at one state and know nothing of each other's tokens; Hydra's head i also reads the embeddings
of the i + 1 tokens that lead to the node it speaks for. So the tree is filled level by level, all nodes of a level
that have children in one batch. In Hydra++ a causal decoder layer runs over the target's states first and its output
stands in for them; its keys and values cover verified states only.

(The module is called ``hydra_heads`` because ``hydra`` is the configuration library.)

Differences from the authors' code: batches of rows, each as long as its text; a prefix layer with grouped keys and
values; the blocks of a head are modules of their own instead of one module used several times; no dropout is part of
the saved heads, it belongs to the lesson; the output layer may be the target's.

Shapes: B rows, N nodes, n states of a step, K heads, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.base import BaseDrafter, device_of, warn_untrained, why_no_own_head, why_other_weights
from drafters.causal_layer import GrowingRows, prompt_states
from drafters.hydra_checkpoint import ARCHES, arch_of, load, save
from drafters.hydra_lesson import HydraLesson
from drafters.hydra_modules import HydraHeads, HydraShape, PrefixShape, new
from drafters.medusa_trees import best_paths, published_paths
from specdec.checkpoints import CONFIG
from specdec.interfaces import DecodeState, Needs, Prefill, Tap, Verification
from specdec.loading import DEMO_FOLDER, is_demo
from specdec.selection import top_k
from specdec.target import Target
from specdec.templates import Template, kept_template
from specdec.transfer import upload
from specdec.tree import TokenTree

NEW = "new"  # in place of a path
WAY_OUT = "give path=FOLDER_OR_HUB_ID of trained ones (specdec train makes them), or path=new where this is meant"
DEMO_HEADS = DEMO_FOLDER.parent / "hydra_heads"
# How often the target says a head's token of rank 0, 1, ..., given that everything above it was right; 5 % less at
# every depth. Made up so that the best tree of 63 nodes and 4 levels expects 3.3 tokens per pass, which is what Hydra
# reached on Spec-Bench (3.26 with Vicuna 7B). A checkpoint that was trained here brings its own rates.
_RATES = (0.60, 0.13, 0.06, 0.035, 0.025, 0.018, 0.014, 0.011, 0.009, 0.008)
_DECAY = 0.95


@dataclass(frozen=True)
class _Level:
    """What has to be done for one level of the template; *inner* nodes are those with children.

    Attributes:
        width: children computed for every inner node of the level above.
        places: int64 ``[nodes]``, of each node among those children, ``inner parent * width + rank``.
        inner: int64 ``[m]``, the inner nodes among the nodes of this level.
        above: int64 ``[m]``, their parents among the inner nodes of the level above; where the heads are.
    """

    width: int
    places: Tensor
    inner: Tensor
    above: Tensor


def _levels(template: Template, heads: torch.device) -> list[_Level]:
    levels, above = [], [0]  # inner nodes of the level above, counted within it
    for depth, (parents, ranks) in enumerate(template.levels):
        width = int(ranks.max()) + 1
        places = torch.tensor([above.index(parent) for parent in parents.tolist()], device=ranks.device)
        deeper = template.levels[depth + 1][0].tolist() if depth + 1 < len(template.levels) else []
        inner = torch.tensor(sorted(set(deeper)), dtype=torch.int64, device=ranks.device)
        levels.append(_Level(width, places * width + ranks, inner, places[inner].to(heads)))
        above = inner.tolist()
    return levels


def _settled(shape: HydraShape) -> dict[str, Any]:
    sizes = {name: getattr(shape, name) for name in ("num_heads", "num_layers", "own_head")}
    return {"arch": arch_of(shape)} | sizes


class Hydra(BaseDrafter):
    """Draft with sequentially dependent heads.

    Args:
        path: weights: a folder, a file or a hub id, as saved by specdec or published; ``new`` for new ones, which say
            at every depth what the target says at the root. None = those shipped for the demo target, for others new.
        arch: ``mlp`` (Hydra) or ``prefix-mlp`` (Hydra++); None = new heads are Hydra++'s, others what they are. Other
            weights than this and the next three say are refused.
        num_heads: K, and the depth of the trees; None = 4 of new heads.
        num_layers: blocks of each head; None = of new heads as published, 1 for ``mlp`` and 4 for ``prefix-mlp``.
        own_head: whether each head has an output layer ``[V, H]`` of its own, as published; else the target's serves
            them all. None = the target's serves new heads.
        num_nodes: nodes of the tree, root not counted; which ones follows from the acceptance rates of the heads.
        tree: rank paths of another tree, such as ``[[0], [1], [0, 0]]``, or the name of one that Medusa's authors
            published, which Hydra's used too; overrides ``num_nodes``.
        seed: of what is random in new heads.

    Raises:
        ValueError: an unknown architecture, sizes below one, or paths that are no tree.
    """

    name = "hydra_heads"

    def __init__(  # noqa: PLR0913 - the options of one recipe
        self,
        path: str | None = None,
        arch: str | None = None,
        num_heads: int | None = None,
        num_layers: int | None = None,
        own_head: bool | None = None,
        num_nodes: int = 24,
        tree: str | Sequence[Sequence[int]] | None = None,
        seed: int = 0,
    ) -> None:
        if arch not in (None, *ARCHES):
            raise ValueError(f"unknown architecture {arch!r} of Hydra heads; known: {', '.join(ARCHES)}")
        sizes = {"num_heads": num_heads, "num_layers": num_layers, "num_nodes": num_nodes}
        wrong = [f"{name}={size}" for name, size in sizes.items() if size is not None and size < 1]
        if wrong:
            raise ValueError(f"expected sizes of at least 1; got {', '.join(wrong)}")
        self.path, self.seed, self.num_nodes = path, seed, num_nodes
        self._sizes: dict[str, Any] = {
            "arch": arch,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "own_head": own_head,
        }
        paths = published_paths(tree) if isinstance(tree, str) else tree
        self._chosen = None if paths is None else Template.from_paths(paths)
        nodes = num_nodes + 1 if self._chosen is None else self._chosen.num_nodes
        self.needs = Needs(taps=("final",), prompt_states=True, max_nodes=nodes)
        self.heads: HydraHeads | None = None
        self.acceptance: list[list[float]] | None = None
        self.ignored: list[str] = []
        self.loaded_from: str | None = None  # None = the heads are new
        self._target: Target | None = None
        self._tap: Tap = "final"
        self._rows: GrowingRows | None = None
        self._states: Tensor | None = None  # [B, 1, H], what the heads read of each row's text

    def fit(self, target: Target) -> str | None:
        """Read or make the heads, and choose the tree; heads that are bound to this model already stay."""
        if self.heads is None or self._target is None or self._target.model is not target.model:
            width = target.embedding(torch.zeros(1, 1, dtype=torch.int64, device=target.device)).shape[-1]
            if width != target.hidden_size:
                return f"embeddings as wide as the states that its output head reads, {target.hidden_size}; got {width}"
            try:
                reason = self._fill(target)
            except (OSError, ValueError) as error:
                return f"heads that can be read for this model; {error}"
            if reason is not None:
                return reason
        assert self.heads is not None
        self._target, shape = target, self.heads.shape
        self._tap = shape.tap(target)
        self.heads.to(device_of(target, self._tap))  # training may have moved them
        return self._shape(target, shape.num_heads)

    def _shape(self, target: Target, num_heads: int) -> str | None:
        """Choose the tree and plan its levels; says why that cannot be."""
        assert self.heads is not None
        rates = self.acceptance or [[rate * _DECAY**depth for rate in _RATES] for depth in range(num_heads)]
        template = self._chosen or Template.from_paths(best_paths(self.num_nodes, num_heads, target.vocab_size, rates))
        depth = template.topology.max_depth
        if depth > num_heads:
            return f"a tree no deeper than its {num_heads} heads reach, got one of depth {depth}"
        if template.width > target.vocab_size:
            return f"a vocabulary of at least {template.width} tokens, got {target.vocab_size}"
        self.template = template.to(target.device)
        self._plan = _levels(self.template, self.heads.device)
        self.needs = Needs(taps=(self._tap,), prompt_states=True, max_nodes=template.num_nodes)
        return None

    @property
    def tree_paths(self) -> list[tuple[int, ...]]:
        """As it is now (``Shaped``)."""
        template = self._chosen if self._target is None else self.template
        return [] if template is None else template.paths

    @property
    def widest(self) -> int:
        """Any number of children up to the vocabulary; 0 before there is a target."""
        return 0 if self._target is None else self._target.vocab_size

    @property
    def deepest(self) -> int | None:
        """A level for each head."""
        return 0 if self.heads is None else self.heads.shape.num_heads

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        """Draft another tree from the next step on; refuses levels without a head."""
        device = torch.device("cpu") if self._target is None else self._target.device
        template, before = kept_template(tuple(map(tuple, paths)), device), self._chosen
        self._chosen = template
        bound = self.heads is not None and self._target is not None
        reason = self._shape(self._target, self.heads.shape.num_heads) if bound else None  # type: ignore[arg-type,union-attr]
        if reason is not None:
            self._chosen = before
            raise ValueError(f"expected {reason}")
        self.needs = replace(self.needs, max_nodes=template.num_nodes)

    def _fill(self, target: Target) -> str | None:
        """Read or make the heads; says why they are not those that the options ask for."""
        path = self.path
        if path is None and is_demo(target.model) and (DEMO_HEADS / CONFIG).is_file():
            path = str(DEMO_HEADS)
        if path is not None and path != NEW:
            heads, rates, ignored = load(path, target)
            reason = why_other_weights(self._sizes, _settled(heads.shape), path)
            if reason is None:
                self.heads, self.acceptance, self.ignored, self.loaded_from = heads, rates, ignored, path
            return reason
        shape = self._new_shape(target)
        reason = why_no_own_head(target) if shape.own_head else None
        if reason is not None:
            return reason
        self.heads, self.loaded_from = new(shape, target, self.seed), None
        self.acceptance, self.ignored = None, []
        if path is None:
            warn_untrained(self.name, "new heads, which only repeat what its own head says", target, WAY_OUT)
        return None

    def _new_shape(self, target: Target) -> HydraShape:
        """Of new heads: what the options leave open is as published, but for the output layers, which are shared."""
        said = {name: value for name, value in self._sizes.items() if value is not None}
        is_prefix = said.get("arch", "prefix-mlp") == "prefix-mlp"
        return HydraShape(
            hidden=target.hidden_size,
            vocabulary=target.vocab_size,
            num_heads=said.get("num_heads", 4),
            num_layers=said.get("num_layers", 4 if is_prefix else 1),
            own_head=said.get("own_head", False),
            prefix=PrefixShape.like(target) if is_prefix else None,
        )

    @torch.inference_mode()
    def start(self, state: DecodeState, prefill: Prefill) -> None:
        """The prefix layer reads the prompt; without one, its last state is enough."""
        assert self.heads is not None
        self._rows = None
        if self.heads.prefix is None:
            self._states = self._ours(prefill.states[self._tap][:, -1:])
            return
        states, counts = prompt_states(prefill, self._tap)
        reserve = states.shape[1] + min(state.policy.max_new_tokens, 512)
        self._rows = GrowingRows(state.batch_size, self.heads.prefix.attention, reserve)
        self._read(states, counts)

    @torch.inference_mode()
    def propose(self, state: DecodeState) -> TokenTree:
        """Fill the template level by level: one batch of a head for all inner nodes of the level above."""
        heads, target = self.heads, self._target
        assert heads is not None and target is not None and self._states is not None
        template, plan = self.template, self._plan
        tokens = [state.root[:, None]]
        sums = heads.open(self._states, self._ours(target.embedding(tokens[0])), len(plan))
        for depth, level in enumerate(plan):
            best = top_k(heads.logits(depth, sums, target), level.width).to(state.root.device)
            tokens.append(best.flatten(1).index_select(1, level.places))
            if depth + 1 < len(plan):
                inner = self._ours(target.embedding(tokens[-1].index_select(1, level.inner)))
                sums = heads.extend(depth + 1, sums.index_select(1, level.above), inner)
        return TokenTree(torch.cat(tokens, dim=1), template.topology, sources=(self.name,), rank=template.ranks[None])

    @torch.inference_mode()
    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:  # noqa: ARG002
        """Take over the state of each row's last accepted node; the prefix layer reads those of all accepted ones."""
        if state.done:
            return
        assert self.heads is not None
        paths, states = verification.path, verification.states[self._tap]
        longest = 1
        if self.heads.prefix is None:
            paths = [path[-1:] for path in paths]
        else:
            # Never a single one: torch's attention on CPUs takes three times as long over one bfloat16 query as over
            # two (1,000 keys, 4 heads of 64: 0.43 and 0.14 ms).
            longest = max(2, *(len(path) for path in paths))
        # Short rows are filled up with node 0, which is read and not kept.
        nodes = upload([path + [0] * (longest - len(path)) for path in paths], states.device)
        if len(paths) == 1:
            read = states.index_select(1, nodes[0])
        else:
            read = states.gather(1, nodes[..., None].expand(-1, -1, states.shape[2]))
        if self.heads.prefix is None:
            self._states = self._ours(read)
        else:
            self._read(read, [len(path) for path in paths])

    def _read(self, states: Tensor, counts: Sequence[int]) -> None:
        """Run the prefix layer over ``states [B, n, H]``, of which the first ``counts[b]`` are row b's next ones."""
        assert self.heads is not None and self.heads.prefix is not None and self._rows is not None
        positions, visible = self._rows.begin(states.shape[1])
        read = self.heads.prefix(self._ours(states), positions, visible, self._rows)
        self._rows.commit(counts)
        if len(set(counts)) == 1:
            self._states = read[:, counts[0] - 1 : counts[0]]
        else:
            last = upload([max(count - 1, 0) for count in counts], read.device)
            self._states = read.gather(1, last[:, None, None].expand(-1, 1, read.shape[2]))

    def _ours(self, x: Tensor) -> Tensor:
        """Where the heads are, in their dtype, which is the target's unless they have just learnt."""
        assert self.heads is not None
        return x.to(self.heads.device, self.heads.dtype)

    def finish(self, state: DecodeState) -> None:  # noqa: ARG002 - the protocol's signature
        """Let go of the request."""
        self._rows = self._states = None

    def lesson(self, target: Target, **options: Any) -> HydraLesson:
        """What the heads learn from; see ``HydraLesson`` for the options. The heads become float32.

        What was known of their acceptance is forgotten.
        """
        reason = self.fit(target)
        if reason is not None:
            raise ValueError(f"drafter {self.name!r} does not fit {target.name}: it needs {reason}")
        assert self.heads is not None
        self.acceptance = None
        return HydraLesson(self.heads, target, self._tap, **options)

    def settled(self) -> dict[str, Any]:
        """The architecture of the heads, their number and blocks, and whether they have output layers of their own."""
        assert self.heads is not None
        return _settled(self.heads.shape)

    def save(self, folder: Path, layout: str = "specdec") -> None:
        """Write the heads; see ``hydra_checkpoint.LAYOUTS`` for the layouts."""
        if self.heads is None or self._target is None:
            raise ValueError("nothing to save yet; heads are made when the drafter is bound to a target (fit)")
        more = {"acceptance": self.acceptance} if self.acceptance else {}
        save(Path(folder), self.heads, self._target, layout, more)
