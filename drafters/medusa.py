"""Medusa: several heads guess the tokens ahead at once, from the last state that the target verified (Cai et al.,
2401.10774).

Head k proposes its best tokens for depth k + 1 whatever stands before them, so one evaluation fills a static tree: the
child of rank r at depth d holds the r-th token of head d. ``drafters.medusa_trees`` has the trees,
``drafters.medusa_heads`` the heads and Medusa-1, ``drafters.medusa_joint`` Medusa-2.

Differences from the authors' code: batches; verification is exact for every token id (theirs pads short paths with
token 0 and can take it for an accepted one); sampling is exact by default (typical acceptance is there by name).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.base import BaseDrafter, device_of, warn_untrained, why_no_own_head, why_other_weights
from drafters.medusa_heads import FILES, WITHIN_MODEL, MedusaHeads, MedusaLesson, export, load_heads, new_heads
from drafters.medusa_joint import JointLesson
from drafters.medusa_trees import best_paths, published_paths, remembered
from specdec import checkpoints
from specdec.checkpoints import BASE, Checkpoint
from specdec.interfaces import DecodeState, Needs, Prefill, Verification
from specdec.learning import Lesson
from specdec.loading import DEMO_FOLDER, is_demo
from specdec.selection import top_k
from specdec.target import Target
from specdec.templates import Template, kept_template
from specdec.tree import TokenTree

DEMO_HEADS = DEMO_FOLDER.parent / "medusa"
NEW = "new"
_NEW: dict[str, Any] = {"num_heads": 4, "num_layers": 1, "own_head": False}
WAY_OUT = "give path=FOLDER_OR_HUB_ID of trained ones (specdec train makes them), or path=new where this is meant"


class Medusa(BaseDrafter):
    """Draft with Medusa heads.

    Args:
        path: trained heads: a folder, a file or a hub id, in any published layout, a Medusa-2 model included; ``new``
            for new ones, which say what the target's own head says; None = those shipped for the demo target, where
            they are there, and new ones otherwise.
        num_heads: K; None = 4 of new heads, of others as many as they are.
        num_layers: residual blocks of each head; None = 1 of new heads, of others as many as they have.
        own_head: whether the heads have output heads of their own, in new ones copies of the target's to begin with,
            or share it; None = new ones share it, others as they are. Other weights than these are refused.
        tree: rank paths such as ``[[0], [1], [0, 0]]``, or the name of a published tree; None = the best one for the
            heads' accuracies, which trained heads remember (for others those of published ones are taken).
        num_nodes: of that best tree, root not counted.

    Attributes:
        heads: the modules, once there is a target.
        acceptance: ``[d][r]``, how often the token of rank r of head d was right; training sets it, ``save`` keeps it.
        ignored: names in the checkpoint that are not the heads', with the reason.
        loaded_from: where the heads come from; None = they are new.

    Raises:
        ValueError: sizes below one, an unknown or broken tree.
    """

    name = "medusa"

    def __init__(
        self,
        path: str | None = None,
        num_heads: int | None = None,
        num_layers: int | None = None,
        own_head: bool | None = None,
        tree: str | list[list[int]] | None = None,
        num_nodes: int = 24,
    ) -> None:
        self._sizes: dict[str, Any] = {"num_heads": num_heads, "num_layers": num_layers, "own_head": own_head}
        self._new = _NEW | {name: size for name, size in self._sizes.items() if size is not None}
        if self._new["num_heads"] < 1 or num_nodes < 1 or self._new["num_layers"] < (0 if own_head else 1):
            raise ValueError(
                "expected num_heads >= 1, num_nodes >= 1 and num_layers >= 1 (0 with own_head=true); got "
                f"{num_heads=}, {num_nodes=}, {num_layers=}, {own_head=}"
            )
        self.path, self.num_nodes = path, num_nodes
        paths = published_paths(tree) if isinstance(tree, str) else tree
        self._given = None if paths is None else Template.from_paths(paths)
        self.needs = _needs(num_nodes + 1 if self._given is None else self._given.num_nodes)
        self.heads: MedusaHeads | None = None
        self.acceptance: list[list[float]] | None = None
        self.ignored: list[str] = []
        self.loaded_from: str | None = None
        self._joint: JointLesson | None = None
        self._target: Target | None = None
        self._state: Tensor | None = None

    def fit(self, target: Target) -> str | None:
        """Load the heads and shape the tree; refuses other sizes, another base, and trees that the heads cannot fill.

        Bound to the same model again, the heads stay as they are, with what they have learnt since.
        """
        if self.heads is None or self._target is None or self._target.model is not target.model:
            try:
                reason = self._load(target)
            except (OSError, ValueError) as error:
                return f"heads that can be read; path={self.path!r}: {error}"
            if reason is not None:
                return reason
        assert self.heads is not None
        self._target = target
        self.heads.to(device_of(target, "final"))  # training may have moved them
        return self._shape(self.heads, target)

    def _load(self, target: Target) -> str | None:
        path = self.path
        if path is None and is_demo(target.model) and DEMO_HEADS.is_dir():
            path = str(DEMO_HEADS)
        if path is None or path == NEW:
            reason = why_no_own_head(target) if self._new["own_head"] else None
            if reason is not None:
                return reason
            self.heads, self.acceptance, self.ignored = new_heads(target, **self._new), None, []
            self.loaded_from = None
            if path is None:
                warn_untrained(self.name, "new heads, which only repeat what its own head says", target, WAY_OUT)
            return None
        checkpoint = checkpoints.read(path, FILES, WITHIN_MODEL)
        reason = _why_other_base(checkpoint, path, target)
        if reason is not None:
            return reason
        heads = load_heads(checkpoint, target)
        reason = why_other_weights(self._sizes, _settled(heads), path)
        if reason is not None:
            return reason
        rates = remembered(checkpoint, heads.num_heads)
        self.heads, self.acceptance, self.ignored, self.loaded_from = heads, rates, checkpoint.ignored, path
        return None

    def _shape(self, heads: MedusaHeads, target: Target) -> str | None:
        """Choose the tree and where each node finds its token in ``[K, width]``; says why that cannot be."""
        template = self._given
        if template is None:
            template = Template.from_paths(best_paths(self.num_nodes, heads.num_heads, self.widest, self.acceptance))
        depth = template.topology.max_depth
        if depth > heads.num_heads:
            return f"a tree of at most {heads.num_heads} levels, one for each of its heads; got one of {depth}"
        if template.width > self.widest:
            most = f"{self.widest}, the tokens that a head can propose"
            return f"a tree of ranks below {most}; got rank {template.width - 1}"
        self.template = template.to(target.device)
        self.needs = _needs(template.num_nodes)
        places = (template.topology.depths[0] - 1) * template.width + template.ranks
        self._places = places[1:].to(target.device)
        return None

    @property
    def tree_paths(self) -> list[tuple[int, ...]]:
        """As it is now (``Shaped``)."""
        template = self._given if self.heads is None else self.template
        return [] if template is None else template.paths

    @property
    def widest(self) -> int:
        """As many children as a head can propose tokens; 0 before there are heads."""
        if self.heads is None or self._target is None:
            return 0
        return self._target.vocab_size if self.heads.output is None else self.heads.output.shape[1]

    @property
    def deepest(self) -> int | None:
        """A level for each head."""
        return 0 if self.heads is None else self.heads.num_heads

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        """Draft another tree from the next step on; refuses levels without a head."""
        device = torch.device("cpu") if self._target is None else self._target.device
        template, before = kept_template(tuple(map(tuple, paths)), device), self._given
        self._given = template
        reason = None if self.heads is None or self._target is None else self._shape(self.heads, self._target)
        if reason is not None:
            self._given = before
            raise ValueError(f"expected {reason}")
        self.needs = _needs(template.num_nodes)

    def start(self, state: DecodeState, prefill: Prefill) -> None:  # noqa: ARG002 - the protocol's signature
        """The heads read what the target made of the last prompt token."""
        # Prompts are padded on the left: the last column is every row's last token. A copy lets go of the others.
        self._state = prefill.states["final"][:, -1].clone()

    @torch.inference_mode()
    def propose(self, state: DecodeState) -> TokenTree:
        """One evaluation of the heads, one gather into the tree."""
        assert self.heads is not None
        assert self._target is not None
        assert self._state is not None
        template = self.template
        logits = self.heads.logits(self._state, self._target, template.topology.max_depth)
        best = top_k(logits, template.width)
        if self.heads.token_map is not None:
            best = self.heads.token_map[best]
        tokens = best.to(state.root.device).flatten(1).index_select(1, self._places)
        tokens = torch.cat([state.root[:, None], tokens], dim=1)
        return TokenTree(tokens, template.topology, sources=(self.name,), rank=template.ranks[None])

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:  # noqa: ARG002
        """Keep the state of each row's last accepted node."""
        states = verification.states["final"]
        self._state = tree.topology.at(states, verification.last_nodes(states.device))

    def finish(self, state: DecodeState) -> None:  # noqa: ARG002 - the protocol's signature
        """Let go of the request."""
        self._state = None

    def lesson(self, target: Target, joint: bool = False, **options: Any) -> Lesson:
        """Medusa-1, or with ``joint`` Medusa-2; the options are those of ``MedusaLesson`` and ``JointLesson``.

        The heads become float32, and what was known of their acceptance is forgotten. With ``joint``, adapters are put
        into the target's model and stay there.
        """
        if self.heads is None or self._target is None:
            raise ValueError("the heads are bound to no target yet; call fit(target) first")
        if self.heads.token_map is not None:
            raise ValueError("heads over a part of the vocabulary cannot be trained; expected heads over all of it")
        kind = JointLesson if joint else MedusaLesson
        known = [name for name in inspect.signature(kind).parameters if name not in ("heads", "target")]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"this lesson takes no {', '.join(unknown)}; it takes: joint, {', '.join(known)}")
        _ = self._target.head_is_all  # asked for as long as no adapter is part of the answer
        self.acceptance = None
        made = kind(self.heads.float().requires_grad_(True), target, **options)
        self._joint = made if isinstance(made, JointLesson) else None
        return made

    def settled(self) -> dict[str, Any]:
        """How many heads there are, of how many blocks, and whether they have output heads of their own."""
        assert self.heads is not None
        return _settled(self.heads)

    def save(self, folder: Path, layout: str = "specdec") -> None:
        """Write the heads in the target's dtype; after joint training the whole model too, adapters merged.

        Args:
            folder: made where it is missing.
            layout: ``specdec``; ``medusa``, the published one with an output head for each head (copies of the target's
                where the heads share it); ``medusa_v2``, the published one that shares it. A whole model has the heads
                among its weights, with output heads or without as the layout has it.

        Raises:
            ValueError: an unknown layout, or one that has no place for these heads.
        """
        if self.heads is None or self._target is None:
            raise ValueError("the heads are bound to no target yet; call fit(target) first")
        weights, config, file = export(self.heads, self._target, layout, self.acceptance)
        if self._joint is None:
            checkpoints.save(Path(folder), weights, config, file)
        else:
            self._joint.save(Path(folder), weights, self.acceptance)


def _settled(heads: MedusaHeads) -> dict[str, Any]:
    return {"num_heads": heads.num_heads, "num_layers": heads.num_layers, "own_head": heads.output is not None}


def _needs(max_nodes: int) -> Needs:
    return Needs(taps=("final",), prompt_states=True, max_nodes=max_nodes)


def _why_other_base(checkpoint: Checkpoint, path: str, target: Target) -> str | None:
    """Why these heads are not this target's; None where they may be.

    Heads within a whole model are for that very model, whatever model its config says that it was made from.
    """
    if not checkpoint.in_whole_model:
        return checkpoints.why_other_base(checkpoint.config, target)
    place = Path(path).expanduser()
    whole = str(place.parent) if place.is_file() else path
    if checkpoints.why_other_base({BASE: whole}, target) is None:
        return None
    return (
        f"heads of its own; those at {whole} are part of the model there, which is their target (target=hf "
        f"target.path={whole}); got {checkpoints.base_of(target)[BASE]}"
    )
