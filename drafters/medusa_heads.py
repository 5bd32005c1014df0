"""Medusa's heads: residual blocks on the target's final state, their checkpoints, and the lesson that trains them.

Head k (from 0) reads h_t, from which the target's own head predicts x_{t+1}, and predicts x_{t+2+k} (Cai et al.,
2401.10774, section 2.1). A block is x + SiLU(W x + b). New heads have W = b = 0, so they say what the target's head
says, exactly. (The authors' code zeroes W alone; its random b moves the logits from the start. It also makes all blocks
of a head one module, where the method means different ones.)

Shapes: B rows, T tokens of a row, K heads, L blocks of a head, H hidden size, V vocabulary, C choices of a head (V, or
fewer where a checkpoint's output heads know a part of the vocabulary only), M positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafters.base import device_of, why_no_own_head
from specdec import checkpoints
from specdec.checkpoints import BASE, WEIGHTS, Checkpoint
from specdec.interfaces import Tap
from specdec.target import Target
from specdec.training.objectives import RANKS, ahead, hits, learnt, wanted_ahead

WITHIN_MODEL = "medusa_head."
FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", WEIGHTS, "pytorch_model.bin")
LAYOUTS = ("specdec", "medusa", "medusa_v2")
LABELS = ("text", "teacher")


class Block(nn.Module):
    """One residual block of every head: ``weight [K, H, H]`` and ``bias [K, H]``."""

    def __init__(self, num_heads: int, hidden: int, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden, hidden, **where))
        self.bias = nn.Parameter(torch.zeros(num_heads, hidden, **where))


class MedusaHeads(nn.Module):
    """K heads side by side, so that one product serves them all.

    Args:
        num_heads: K.
        num_layers: L; 0 leaves the output heads alone.
        hidden: H.
        choices: C, rows of the heads' own output heads; None = they share the target's.
        bias: the output heads of their own have biases, as the target's may have.
        where: dtype and device of the parameters.

    Attributes:
        token_map: int64 ``[C]``, the token of each row of the output heads where they know a part of the vocabulary.
    """

    token_map: Tensor | None

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden: int,
        choices: int | None = None,
        bias: bool = False,
        **where: Any,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(num_heads, hidden, **where) for _ in range(num_layers))
        self.output = None if choices is None else nn.Parameter(torch.zeros(num_heads, choices, hidden, **where))
        self.output_bias = nn.Parameter(torch.zeros(num_heads, choices, **where)) if bias and choices else None
        self.num_heads, self.num_layers = num_heads, num_layers
        self.register_buffer("token_map", None, persistent=False)

    def forward(self, x: Tensor, count: int | None = None) -> Tensor:
        """What enters the output heads: ``x [..., H]`` -> ``[..., K, H]``, of the first ``count`` heads."""
        count, x = count or self.num_heads, x.to(self.dtype)
        states = x.unsqueeze(-2).expand(*x.shape[:-1], count, -1)
        for index, block in enumerate(self.each_block()):
            weight, bias = block.weight[:count], block.bias[:count]
            if index == 0:  # all heads read the same state
                mixed = F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(-1, (count, -1))
            else:
                mixed = torch.einsum("...kh,kgh->...kg", states, weight) + bias
            states = states + F.silu(mixed)
        return states

    def one(self, head: int, x: Tensor) -> Tensor:
        """The same of a single head: ``[..., H]`` -> ``[..., H]``."""
        x = x.to(self.dtype)
        for block in self.each_block():
            x = x + F.silu(F.linear(x, block.weight[head], block.bias[head]))
        return x

    def each_block(self) -> Iterator[Block]:
        """The blocks in order, by their type."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters: the target's while decoding, float32 while they learn."""
        return next(self.parameters()).dtype

    def logits(self, x: Tensor, target: Target, count: int) -> Tensor:
        """``[B, H]`` -> ``[B, count, C]`` of the first ``count`` heads."""
        states = self(x, count)
        if self.output is None:
            return target.head(states.to(target.dtype))
        logits = torch.bmm(states.transpose(0, 1), self.output[:count].transpose(1, 2)).transpose(0, 1)
        return logits if self.output_bias is None else logits + self.output_bias[:count]

    def logits_of(self, head: int, x: Tensor, target: Target) -> Tensor:
        """``[M, H]`` -> ``[M, C]`` of a single head, where ``x`` is."""
        states = self.one(head, x)
        if self.output is None:
            return target.head(states.to(target.dtype)[None])[0].to(x.device)
        return F.linear(states, self.output[head], None if self.output_bias is None else self.output_bias[head])


def new_heads(target: Target, num_heads: int, num_layers: int, own_head: bool) -> MedusaHeads:
    """Heads that know nothing yet: each says what the target's head says.

    Raises:
        ValueError: output heads of their own for a target of which no copy would say the same.
    """
    reason = why_no_own_head(target) if own_head else None
    if reason is not None:
        raise ValueError(f"expected {reason}")
    base, device = target.router.head, device_of(target, "final")
    bias: Tensor | None = getattr(base, "bias", None)
    choices = target.vocab_size if own_head else None
    where: dict[str, Any] = {"dtype": target.dtype, "device": device}
    heads = MedusaHeads(num_heads, num_layers, target.hidden_size, choices, bias is not None, **where)
    with torch.no_grad():
        if heads.output is not None:
            heads.output.copy_(base.weight.expand_as(heads.output))
        if heads.output_bias is not None and bias is not None:
            heads.output_bias.copy_(bias.expand_as(heads.output_bias))
    return heads


@dataclass(frozen=True)
class _Names:
    """What a layout calls its tensors; ``prefix`` is part of every name."""

    prefix: str
    block: str
    output: str
    heads: tuple[str, ...]
    layers: str

    @classmethod
    def of(cls, names: Sequence[str]) -> _Names:
        prefix = next((p for p in (WITHIN_MODEL, "medusa_heads.") if any(name.startswith(p) for name in names)), "")
        start = re.escape(prefix)
        if any(re.match(rf"{start}(blocks|lm_heads)\.", name) for name in names):  # vLLM's
            counted = (rf"{start}blocks\.(\d+)\.", rf"{start}lm_heads\.(\d+)\.")
            layers = rf"{start}blocks\.0\.layers\.(\d+)\."
            return cls(prefix, "blocks.{h}.layers.{l}", "lm_heads.{h}.weight", counted, layers)
        layers = rf"{start}0\.(\d+)\.linear\."
        return cls(prefix, "{h}.{l}.linear", "{h}.{l}.weight", (rf"{start}(\d+)\.\d+\.",), layers)

    def of_block(self, head: int, layer: int) -> str:
        return self.prefix + self.block.format(h=head, l=layer)

    def of_outputs(self, num_heads: int, num_layers: int, there: set[str]) -> list[str]:
        """The output head of every head; in vLLM's layout all may share one, which goes by either of two names."""
        named = [self.prefix + self.output.format(h=head, l=num_layers) for head in range(num_heads)]
        if len(self.heads) > 1 and there.isdisjoint(named[1:]):
            one = self.prefix + "lm_head.weight"
            return [one if one in there else named[0]] * num_heads
        return named


def load_heads(checkpoint: Checkpoint, target: Target) -> MedusaHeads:
    """Heads from a checkpoint in any of the known layouts: the two published ones, a whole Medusa-2 model's, vLLM's.

    Raises:
        ValueError: no heads, other sizes than the target's, or names that no layout has.
    """
    there = set(checkpoint.keys)
    names = _Names.of(checkpoint.keys)
    num_heads, num_layers = max(map(checkpoint.count, names.heads)), checkpoint.count(names.layers)
    if num_heads == 0:
        found = ", ".join(sorted(there)[:5]) or "none"
        raise ValueError(f"{checkpoint.place}: expected names of Medusa heads such as 0.0.linear.weight; found {found}")
    outputs = names.of_outputs(num_heads, num_layers, there)
    own = not there.isdisjoint(outputs)
    if num_layers == 0 and not own:
        raise ValueError(f"{checkpoint.place}: expected blocks or output heads; found neither")
    tokens = _token_map(checkpoint, names.prefix + "token_map", target)
    hidden, device = target.hidden_size, device_of(target, "final")
    choices = None if not own else target.vocab_size if tokens is None else len(tokens)
    # The published layouts have none; ours has them where the target's output head has one.
    with_bias = own and any(_bias_of(name) in there for name in outputs)
    heads = MedusaHeads(num_heads, num_layers, hidden, choices, with_bias, dtype=target.dtype, device=device)
    heads.token_map = None if tokens is None or not own else tokens.to(device)
    blocks = [names.of_block(head, layer) for head in range(num_heads) for layer in range(num_layers)]
    biased = any(name + ".bias" in there for name in blocks)  # of all heads or of none
    with torch.no_grad():
        for layer, block in enumerate(heads.each_block()):
            for head in range(num_heads):
                name = names.of_block(head, layer)
                block.weight[head] = checkpoint.take(name + ".weight", (hidden, hidden))
                if biased:
                    block.bias[head] = checkpoint.take(name + ".bias", (hidden,))
        if heads.output_bias is not None:
            for head, name in enumerate(outputs):
                heads.output_bias[head] = checkpoint.take(_bias_of(name), (heads.output_bias.shape[1],))
        if heads.output is not None:
            taken = {name: _output(checkpoint, name, tokens, target) for name in dict.fromkeys(outputs)}
            for head, name in enumerate(outputs):
                heads.output[head] = taken[name]
    checkpoint.close()
    return heads


def _bias_of(name: str) -> str:
    return name.removesuffix(".weight") + ".bias"


def _output(checkpoint: Checkpoint, name: str, tokens: Tensor | None, target: Target) -> Tensor:
    """The rows ``[C, H]`` of one output head; a whole one is cut down to the tokens that are mapped."""
    vocab, hidden = target.vocab_size, target.hidden_size
    if tokens is None or checkpoint.shape(name)[0] == vocab:
        rows = checkpoint.take(name, (vocab, hidden))
        return rows if tokens is None else rows[tokens]
    return checkpoint.take(name, (len(tokens), hidden))


def _token_map(checkpoint: Checkpoint, name: str, target: Target) -> Tensor | None:
    """int64 ``[C]``: the token that each row of the output heads stands for; None = all tokens in order."""
    if name not in checkpoint.keys:
        return None
    tokens = checkpoint.take(name, checkpoint.shape(name)).long().flatten()
    if len(tokens.unique()) < len(tokens) or not 0 <= int(tokens.min()) <= int(tokens.max()) < target.vocab_size:
        raise ValueError(
            f"{checkpoint.place}: expected {name} to name different tokens below {target.vocab_size}; got "
            f"{len(tokens)} entries, {len(tokens.unique())} of them different, up to {int(tokens.max())}"
        )
    return tokens


def named_tensors(heads: MedusaHeads, target: Target, own_head: bool) -> dict[str, Tensor]:
    """The heads by the published names, in the target's dtype; with output heads of their own where ``own_head``.

    Raises:
        ValueError: copies of the target's output head would not say the same as it.
    """
    named: dict[str, Tensor] = {}
    for layer, block in enumerate(heads.each_block()):
        for head in range(heads.num_heads):
            named[f"{head}.{layer}.linear.weight"] = block.weight[head]
            named[f"{head}.{layer}.linear.bias"] = block.bias[head]
    if own_head:
        base = target.router.head
        reason = why_no_own_head(target) if heads.output is None else None
        if reason is not None:
            raise ValueError(f"expected layout specdec or medusa_v2, which share the output head, and {reason}")
        if heads.output is None and getattr(base, "bias", None) is not None:
            raise ValueError(
                f"the output head of {target.name} has a bias, for which the heads' own output heads have no place; "
                "expected layout specdec or medusa_v2, which share it"
            )
        outputs: Sequence[Tensor] = [base.weight] * heads.num_heads if heads.output is None else list(heads.output)
        named |= {f"{head}.{heads.num_layers}.weight": output for head, output in enumerate(outputs)}
        if heads.output_bias is not None:
            named |= {f"{head}.{heads.num_layers}.bias": bias for head, bias in enumerate(heads.output_bias)}
    return {name: tensor.detach().to(target.dtype) for name, tensor in named.items()}


def export(
    heads: MedusaHeads, target: Target, layout: str, acceptance: Sequence[Sequence[float]] | None
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights, config and file name of a layout.

    Raises:
        ValueError: an unknown layout, or one that these heads do not fit in.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r} of Medusa heads; known: {', '.join(LAYOUTS)}")
    own_head = layout == "medusa" or (layout == "specdec" and heads.output is not None)
    if heads.token_map is not None and layout != "specdec":
        raise ValueError(f"heads over {len(heads.token_map)} of the tokens have no place in layout {layout!r}")
    if heads.output is not None and not own_head:
        raise ValueError(f"layout {layout!r} shares the target's output head; these heads have their own: use medusa")
    if heads.output_bias is not None and layout != "specdec":
        raise ValueError(f"layout {layout!r} has no place for the biases of the heads' own output heads: use specdec")
    weights, base = named_tensors(heads, target, own_head), checkpoints.saved_base(target)
    sizes = {"num_heads": heads.num_heads, "num_layers": heads.num_layers}
    learnt_rates = {} if acceptance is None else {"acceptance": [list(row) for row in acceptance]}
    if layout == "specdec":
        if heads.token_map is not None:
            weights["token_map"] = heads.token_map
        return weights, {"drafter": "medusa", **base, **sizes, "own_head": own_head, **learnt_rates}, WEIGHTS
    config = {f"medusa_{name}": count for name, count in sizes.items()} | {BASE: base[BASE]} | learnt_rates
    if layout == "medusa":
        return weights, config, "medusa_lm_head.pt"
    return weights, {**config, "version": "2"}, "medusa_lm_head.safetensors"


def judged(
    heads: MedusaHeads,
    target: Target,
    states: Tensor,
    batch: tuple[Tensor, Tensor, Tensor],
    decay: float,
    teacher: bool = False,
) -> dict[str, Tensor]:
    """The losses of all heads, and how often they are right.

    Args:
        heads: to be judged.
        target: whose output head they may share.
        states: final ones of the target, ``[B, T, H]``.
        batch: token ids, positions and wanted, each ``[B, T]``.
        decay: head k (from 0) weighs decay^(k+1).
        teacher: the label is what the target would have said in place of the text's token.

    Returns:
        as ``Lesson`` has it.
    """
    token_ids, positions, wanted = batch
    said = _argmax(target, states) if teacher else token_ids
    losses, found, counted = [], [], []
    for head in range(heads.num_heads):
        where = wanted_ahead(positions, wanted, head + 2)
        labels = ahead(said, head + 1 if teacher else head + 2)[where]
        counted.append(where)
        if len(labels) == 0:
            losses.append(heads.logits_of(head, states[:1, 0], target).float().sum() * 0)
            found.append(torch.zeros(RANKS, dtype=torch.int64, device=states.device))
            continue
        # Only what is wanted goes through the output head, the largest part of the work.
        logits = heads.logits_of(head, states[where], target)
        losses.append(F.cross_entropy(logits.float(), labels))
        found.append(hits(logits[None], labels[None], where[where][None]))
    weights = [decay ** (head + 1) for head in range(heads.num_heads)]
    return learnt(losses, weights, found, counted, steps_of(heads))


def steps_of(heads: MedusaHeads) -> tuple[int, ...]:
    """How far ahead of a position each head's token is."""
    return tuple(range(2, heads.num_heads + 2))


@torch.no_grad()
def _argmax(target: Target, states: Tensor) -> Tensor:
    """int64 ``[B, T]``: the target's own next tokens, row by row, as all logits at once may not fit."""
    return torch.stack([target.head(row[None].to(target.dtype))[0].argmax(-1).to(row.device) for row in states])


def check_common(decay: float, labels: str) -> None:
    """Raise ValueError where an option that all lessons have is out of range."""
    if not 0 < decay <= 1:
        raise ValueError(f"expected 0 < decay <= 1, got {decay}")
    if labels not in LABELS:
        raise ValueError(f"unknown labels {labels!r}; known: {', '.join(LABELS)}")


class MedusaLesson(nn.Module):
    """Medusa-1: the heads learn, everything else is frozen. Loss: sum over k = 1..K of decay^k CE_k.

    The authors' first script sums without weights (decay=1); the paper and their later code take 0.8^k, as here.

    Args:
        heads: to be trained, in float32.
        target: frozen.
        decay: of the weights.
        labels: ``text``, the tokens of the data; ``teacher``, what the target finds most likely after the same text,
            which is what greedy decoding accepts.

    Raises:
        ValueError: an option out of range.
    """

    taps: tuple[Tap, ...] = ("final",)

    def __init__(self, heads: MedusaHeads, target: Target, decay: float = 0.8, labels: str = "text") -> None:
        super().__init__()
        check_common(decay, labels)
        self.heads, self.decay, self.labels, self.steps_ahead = heads, decay, labels, steps_of(heads)
        self._target = target  # no module: what it holds is not registered

    def forward(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor, states: Mapping[Tap, Tensor]
    ) -> dict[str, Tensor]:
        """See ``Lesson``."""
        batch = (token_ids, positions, wanted)
        return judged(self.heads, self._target, states["final"], batch, self.decay, self.labels == "teacher")
