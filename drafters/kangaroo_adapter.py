"""Kangaroo's adapter: the one attention layer that turns an exit state into what the target's head can read.

adapter(x) = norm(x + attention(input_norm(x))), without a feed-forward part: 4 H^2 + 2 H parameters (Liu et al.,
2404.18911). Its logits come from the target's own head, which is frozen and not stored with it.

Differences from the authors' code: a checkpoint that does not fit is refused instead of filled up at random; the head
is the target's tensor instead of a second copy; training reads the first token of a text too, as drafting does.

Shapes: B rows, n states, T tokens of a row, H hidden size, V vocabulary, E exit layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafters.causal_layer import CausalAttention, GrowingRows, RMSNorm
from specdec import checkpoints
from specdec.checkpoints import Checkpoint
from specdec.interfaces import Tap
from specdec.selection import argmax
from specdec.target import Target
from specdec.training.objectives import hits, learnt, same_text, soft_cross_entropy, wanted_ahead

LAYOUTS = ("specdec", "kangaroo")
_PUBLISHED_WEIGHTS = "pytorch_model.bin"
_READ_AT_ONCE = 1024  # states of a prompt per pass


class Adapter(nn.Module):
    """Norm, attention with a residual sum, norm.

    Args:
        hidden: H.
        heads: attention heads, each with keys and values of its own, also where the base shares them; H / heads must
            be even.
        eps: of the norms.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: H does not divide into that many heads of an even size.
    """

    def __init__(self, hidden: int, heads: int, eps: float = 1e-6, rope_theta: float = 10000.0) -> None:
        super().__init__()
        if hidden % (2 * heads):
            raise ValueError(f"expected heads of an even size; got {heads} for a hidden size of {hidden}")
        self.heads = heads
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = CausalAttention(hidden, heads, heads, hidden // heads, rope_theta)
        self.norm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor | None, rows: GrowingRows | None = None) -> Tensor:
        """Exit states ``[B, n, H]`` -> what the head receives ``[B, n, H]``; the others as in ``CausalAttention``."""
        x = x.to(self.norm.weight)
        return self.norm(x + self.self_attn(self.input_layernorm(x), positions, visible, rows))

    def read(self, x: Tensor, counts: Sequence[int], rows: GrowingRows) -> None:
        """Take in committed text: keys and values only, nothing attends.

        Args:
            x: exit states ``[B, n, H]``, each row's own from column 0 on.
            counts: how many they are in each row; what follows them is of no meaning.
            rows: where they are committed.
        """
        for first in range(0, max(counts), _READ_AT_ONCE):
            part = x[:, first : first + _READ_AT_ONCE].to(self.norm.weight)
            width = part.shape[1]
            positions, _ = rows.begin(width)
            self.self_attn.remember(self.input_layernorm(part), positions, rows)
            rows.commit([min(max(count - first, 0), width) for count in counts])


def fresh_adapter(target: Target, seed: int) -> Adapter:
    """A random adapter for a target, the same for the same seed; matrices of a standard deviation of 0.02."""
    adapter = Adapter(target.hidden_size, _heads(target), getattr(target.config, "rms_norm_eps", None) or 1e-6)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.self_attn.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    return adapter


def _heads(target: Target) -> int:
    """The base's number of heads, or the next smaller one whose size is even."""
    hidden = target.hidden_size
    return next(heads for heads in range(target.config.num_attention_heads, 0, -1) if hidden % (2 * heads) == 0)


def load_adapter(path: str, target: Target) -> tuple[Adapter, int | None, list[str]]:
    """Read an adapter, saved here or published by the authors.

    Args:
        path: as ``checkpoints.read`` takes it.
        target: that it must be made for.

    Returns:
        the adapter, the exit layer that it was trained for (published ones do not say), and the keys that were ignored,
        with the reasons.

    Raises:
        FileNotFoundError: nothing to read.
        ValueError: another base, a key or shape that does not fit, a config with values of another kind than expected,
            or a file that cannot be read.
    """
    found = checkpoints.read(path)
    reason = _why_other_base(found, target)
    if reason is not None:
        raise ValueError(f"expected {reason}")
    heads = found.setting("num_attention_heads", int, target.config.num_attention_heads, least=1)
    layer = found.setting("exit_layer", int, None, least=1)
    eps = found.setting("rms_norm_eps", float, 1e-6, least=0)
    adapter = Adapter(target.hidden_size, heads, eps, _rope_theta(found))
    found.ignore(r"(.*\.)?rotary_emb\.inv_freq", "rotary frequencies follow from the config")
    published = any(key.startswith("layers.") for key in found.keys)
    found.fill(adapter, {name: _published(name) if published else name for name, _ in adapter.named_parameters()})
    found.close()
    return adapter, layer, found.ignored


def _rope_theta(found: Checkpoint) -> float:
    """Base of the rotary frequencies, which stand in the config by themselves or among ``rope_parameters``."""
    within = "rope_parameters." if found.setting("rope_parameters", dict, None) else ""
    kind = found.setting(within + "rope_type", str, "default") if within else "default"
    theta = found.setting(within + "rope_theta", float, 10000.0)
    if kind != "default" or theta <= 0:
        raise ValueError(
            f"{found.place}: expected plain rotary positions (rope_type default) with rope_theta > 0, got rope_type "
            f"{kind} and rope_theta {theta}"
        )
    return theta


def _why_other_base(found: Checkpoint, target: Target) -> str | None:
    for key, ours in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        said = found.setting(key, int, ours)
        if said != ours:
            return f"an adapter for this model; this one is for one with {key}={said}, not {ours}"
    return checkpoints.why_other_base(found.config, target)


def _published(name: str) -> str:
    """A parameter's name in the authors' checkpoints."""
    return name if name.startswith("norm.") else f"layers.0.{name}"


def save_adapter(folder: Path, adapter: Adapter, layer: int, target: Target, layout: str) -> None:
    """Write an adapter in the target's dtype.

    Args:
        folder: made where it is missing.
        adapter: what to write.
        layer: E.
        target: that it was trained for.
        layout: ``specdec`` or ``kangaroo``, the authors' (a config of a one-layer Llama beside a pickle of tensors).

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    weights = {name: parameter.to(target.dtype) for name, parameter in adapter.named_parameters()}
    config = {
        "drafter": "kangaroo",
        "exit_layer": layer,
        "hidden_size": target.hidden_size,
        "num_attention_heads": adapter.heads,
        "rms_norm_eps": adapter.norm.eps,
        "rope_theta": adapter.self_attn.rope_theta,
        **checkpoints.saved_base(target),
    }
    if layout == "specdec":
        checkpoints.save(folder, weights, config)
        return
    published = {_published(name): weight for name, weight in weights.items()}
    checkpoints.save(folder, published, config | _llama_config(target), _PUBLISHED_WEIGHTS)


def _llama_config(target: Target) -> dict[str, Any]:
    """What the authors' loader, a one-layer Llama, wants to know besides."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "intermediate_size": getattr(target.config, "intermediate_size", None) or 4 * target.hidden_size,
        "max_position_embeddings": getattr(target.config, "max_position_embeddings", None) or 2048,
        "num_hidden_layers": 1,
        "vocab_size": target.vocab_size,
    }


class AdapterLesson(nn.Module):
    """-sum_v p(v) log q(v) at the same position: p the target's, q the adapter's through the target's own head.

    A position counts where the next token is wanted, since that is the token both speak of. A *hit* is the target's
    most likely token, the one that greedy verification accepts, whatever the text goes on with.

    Args:
        adapter: what learns.
        target: frozen; not a part of this module.
        layer: E.
    """

    steps_ahead: tuple[int, ...] = (1,)

    def __init__(self, adapter: Adapter, target: Target, layer: int) -> None:
        super().__init__()
        self.adapter = adapter
        self.taps: tuple[Tap, ...] = (layer, "final")
        self._target, self._layer = target, layer

    def forward(
        self,
        token_ids: Tensor,  # noqa: ARG002 - of every lesson; what they say is in the states
        positions: Tensor,
        wanted: Tensor,
        states: Mapping[Tap, Tensor],
    ) -> dict[str, Tensor]:
        """Judge a batch of packed texts; arguments and result as in ``Lesson``."""
        where = wanted_ahead(positions, wanted, 1)
        hidden = self.adapter(states[self._layer], positions, same_text(positions))
        # The vocabulary is wide, and what is not wanted need not be multiplied by it.
        logits = self._target.head(hidden[where][None].to(self._target.dtype)).to(hidden.device)
        with torch.no_grad():
            teacher = self._target.head(states["final"][where][None]).to(hidden.device)
        judged = where[where][None]
        loss = soft_cross_entropy(logits, teacher, judged)
        return learnt([loss], [1.0], [hits(logits, argmax(teacher), judged)], [judged], self.steps_ahead)
