"""The modules of Hydra: heads that read the tokens drafted before them, and the prefix layer of Hydra++.

Head i reads the state h_t and the embeddings of x_{t+1}, ..., x_{t+1+i}, and says what x_{t+2+i} is. Its first block
is R u + SiLU(W u + b) over those i + 2 vectors u side by side, so W and R split into a block of columns for each of
them: the contribution of h_t and x_{t+1} is the same for all nodes of a tree, that of a drafted token for all nodes
below it. Weights are kept by what they read (``slots``), not by head, and one product per tree level serves all deeper
heads. It is the same sum, added up in another order. Training goes through the same two functions, ``open`` and
``extend``, with the true tokens.

Shapes: B rows, n nodes or tokens, K heads, D heads in use, L blocks of a head, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafters.base import device_of, why_no_own_head
from drafters.causal_layer import CausalAttention, GrowingRows, RMSNorm
from specdec.interfaces import Tap
from specdec.target import Target

INITIAL_STD = 0.02  # of the projections of a new prefix layer


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class PrefixShape:
    """Sizes of the prefix layer.

    Attributes:
        heads: of attention.
        kv_heads: key-value heads, a divisor of them.
        head_dim: an even number.
        intermediate: width of its feed-forward part.
        rope_theta: base of its rotary frequencies.
        rms_norm_eps: of its three norms.
    """

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    @classmethod
    def like(cls, target: Target) -> PrefixShape:
        """A layer of the target's own sizes, where its config says them."""
        config, hidden = target.config, target.hidden_size
        heads = _number(config, "num_attention_heads", 1)
        kv_heads = _number(config, "num_key_value_heads", heads)
        head_dim = _number(config, "head_dim", max(hidden // heads, 1))
        return cls(
            heads=heads,
            kv_heads=kv_heads if heads % kv_heads == 0 else heads,
            head_dim=head_dim + head_dim % 2,
            intermediate=_number(config, "intermediate_size", 4 * hidden),
            rope_theta=_rope_theta(config),
            rms_norm_eps=float(getattr(config, "rms_norm_eps", None) or 1e-6),
        )


@dataclass(frozen=True)
class HydraShape:
    """Sizes of a set of heads.

    Attributes:
        hidden: H.
        vocabulary: V.
        num_heads: K.
        num_layers: L, blocks of a head, the first included.
        own_head: whether every head has an output layer of its own; else the target's serves them.
        prefix: sizes of the prefix layer (Hydra++); None = none (Hydra).
        hidden_state_offset: the state comes from this many layers before the end; 0 = what the output head receives.
    """

    hidden: int
    vocabulary: int
    num_heads: int
    num_layers: int
    own_head: bool
    prefix: PrefixShape | None = None
    hidden_state_offset: int = 0

    def tap(self, target: Target) -> Tap:
        """Where in this target the heads' states come from.

        Raises:
            ValueError: it has no such layer.
        """
        if not 0 <= self.hidden_state_offset <= target.num_layers:
            raise ValueError(
                f"expected heads that read one of its {target.num_layers} layers, got offset {self.hidden_state_offset}"
            )
        return target.num_layers - self.hidden_state_offset if self.hidden_state_offset else "final"


class _FeedForward(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _DecoderLayer(nn.Module):
    """A layer of a Llama, named as in its checkpoints."""

    def __init__(self, hidden: int, shape: PrefixShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden, shape.rms_norm_eps)
        self.self_attn = CausalAttention(hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.rope_theta)
        self.post_attention_layernorm = RMSNorm(hidden, shape.rms_norm_eps)
        self.mlp = _FeedForward(hidden, shape.intermediate)


class PrefixLayer(nn.Module):
    """One causal decoder layer over the target's states, and a norm: its output stands in for h_t in all heads."""

    def __init__(self, hidden: int, shape: PrefixShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_DecoderLayer(hidden, shape)])
        self.norm = RMSNorm(hidden, shape.rms_norm_eps)

    @property
    def attention(self) -> CausalAttention:
        """The attention of its one layer."""
        attention = self.layers[0].self_attn
        assert isinstance(attention, CausalAttention)
        return attention

    def forward(self, states: Tensor, positions: Tensor, visible: Tensor, rows: GrowingRows | None = None) -> Tensor:
        """``states [B, n, H]`` -> ``[B, n, H]``; the other arguments are those of ``CausalAttention``."""
        layer = self.layers[0]
        assert isinstance(layer, _DecoderLayer)
        states = states + layer.self_attn(layer.input_layernorm(states), positions, visible, rows)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        return self.norm(states)


class HydraHeads(nn.Module):
    """All heads of one drafter; ``new`` and ``hydra_checkpoint.load`` make filled ones.

    Of the rows of ``slots[d]``, the first 2H belong to head d, the next 2H to head d + 1, ...: W's rows, then R's.
    ``slots[0]`` reads [h_t, e(x_{t+1})] and has the biases of both; ``slots[d]`` reads e(x_{t+1+d}).
    """

    def __init__(self, shape: HydraShape) -> None:
        super().__init__()
        hidden, heads = shape.hidden, shape.num_heads
        self.shape = shape
        first = nn.Linear(2 * hidden, heads * 2 * hidden)
        later = [nn.Linear(hidden, (heads - d) * 2 * hidden, bias=False) for d in range(1, heads)]
        self.slots = nn.ModuleList([first, *later])
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(shape.num_layers - 1)) for _ in range(heads)
        )
        self.outputs = nn.ModuleList(nn.Linear(hidden, shape.vocabulary) for _ in range(heads if shape.own_head else 0))
        self.prefix = None if shape.prefix is None else PrefixLayer(hidden, shape.prefix)

    @classmethod
    def empty(cls, shape: HydraShape, target: Target) -> HydraHeads:
        """Heads of a shape in the target's dtype, where the states that they read arrive; weights yet to be written."""
        with torch.device("meta"):
            heads = cls(shape)
        return heads.to(target.dtype).to_empty(device=device_of(target, shape.tap(target)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._slot(0).weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self._slot(0).weight.device

    def open(self, states: Tensor, embeddings: Tensor, depth: int) -> Tensor:
        """What the first ``depth`` heads make of the state and the root.

        Args:
            states: ``[B, n, H]``, h_t or what the prefix layer made of it.
            embeddings: ``[B, n, H]`` of x_{t+1}.
            depth: D, at most K.

        Returns:
            sums ``[B, n, D * 2H]``, for ``logits`` and ``extend``.
        """
        slot, rows = self._slot(0), depth * 2 * self.shape.hidden
        return F.linear(torch.cat([states, embeddings], dim=-1), slot.weight[:rows], slot.bias[:rows])

    def extend(self, head: int, sums: Tensor, embeddings: Tensor) -> Tensor:
        """One token further: from the sums of head ``head - 1`` on to those of ``head`` on.

        Args:
            head: which one comes next, at least 1.
            sums: ``[B, n, m * 2H]`` of the nodes above.
            embeddings: ``[B, n, H]`` of x_{t+1+head}, one for each of them.

        Returns:
            ``[B, n, (m - 1) * 2H]``.
        """
        rest = sums[..., 2 * self.shape.hidden :]
        return rest + F.linear(embeddings, self._slot(head).weight[: rest.shape[-1]])

    def hidden(self, head: int, sums: Tensor, drop: Callable[[Tensor], Tensor] = _as_it_is) -> Tensor:
        """The state that a head predicts from: its first 2H of ``sums [..., >= 2H]`` -> ``[..., H]``.

        Args:
            head: which one.
            sums: of ``open`` or ``extend``; they must begin with this head's.
            drop: dropout in front of every block, in training.
        """
        size = self.shape.hidden
        x = sums[..., size : 2 * size] + F.silu(sums[..., :size])
        for block in self.blocks[head].children():
            x = drop(x)
            x = x + F.silu(block(x))
        return x

    def score(self, head: int, hidden: Tensor, target: Target) -> Tensor:
        """Logits ``[B, n, V]`` of what ``hidden`` gave, ``[B, n, H]``."""
        return self.outputs[head](hidden) if self.shape.own_head else target.head(hidden.to(target.dtype))

    def logits(self, head: int, sums: Tensor, target: Target) -> Tensor:
        """``sums [B, n, >= 2H]`` that begin with this head's -> ``[B, n, V]``."""
        return self.score(head, self.hidden(head, sums), target)

    def first_block(self, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W and R ``[H, (head + 2)H]`` and their biases ``[H]``, as they are published."""
        both = torch.cat([self._slot(d).weight[self._rows(head, d)] for d in range(head + 1)], dim=1)
        weight, residual = both.chunk(2)
        bias, residual_bias = self._slot(0).bias[self._rows(head, 0)].chunk(2)
        return weight, residual, bias, residual_bias

    @torch.no_grad()
    def set_first_block(self, head: int, weight: Tensor, residual: Tensor, bias: Tensor, residual_bias: Tensor) -> None:
        """The inverse of ``first_block``."""
        columns = torch.cat([weight, residual]).split([2 * self.shape.hidden] + [self.shape.hidden] * head, dim=1)
        for d, part in enumerate(columns):
            self._slot(d).weight[self._rows(head, d)] = part.to(self._slot(d).weight)
        first = self._slot(0).bias
        first[self._rows(head, 0)] = torch.cat([bias, residual_bias]).to(first)

    def _slot(self, index: int) -> nn.Linear:
        slot = self.slots[index]
        assert isinstance(slot, nn.Linear)
        return slot

    def _rows(self, head: int, slot: int) -> slice:
        size = 2 * self.shape.hidden
        return slice((head - slot) * size, (head - slot + 1) * size)


@torch.no_grad()
def new(shape: HydraShape, target: Target, seed: int) -> HydraHeads:
    """Heads to be trained: all of them say what the target itself says at h_t.

    R starts as [I 0 ... 0], W, all other blocks and the output projections of the prefix layer as zero, an output layer
    of its own as the target's. Hydra's logits are then the target's exactly. Hydra++'s are so up to one positive factor
    per position, which changes no order: a norm stands behind the prefix layer, and its weight starts as the size that
    states of this target have. (The authors draw R at random instead.) The seed draws the other projections of the
    prefix layer.

    Raises:
        ValueError: output layers of their own for a target of which no copy would say the same.
    """
    reason = why_no_own_head(target) if shape.own_head else None
    if reason is not None:
        raise ValueError(f"expected {reason}")
    heads = HydraHeads.empty(shape, target)
    for parameter in heads.parameters():
        parameter.zero_()
    size = shape.hidden
    one = torch.eye(size, device=heads.device, dtype=target.dtype)
    for head in range(shape.num_heads):
        weight, residual, bias, residual_bias = (torch.zeros_like(part) for part in heads.first_block(head))
        residual[:, :size] = one
        heads.set_first_block(head, weight, residual, bias, residual_bias)
    for output in heads.outputs:
        assert isinstance(output, nn.Linear)
        output.weight.copy_(target.router.head.weight)
        if getattr(target.router.head, "bias", None) is not None:
            output.bias.copy_(target.router.head.bias)
    if heads.prefix is not None:
        _start_prefix(heads.prefix, target, seed)
    return heads


def _start_prefix(prefix: PrefixLayer, target: Target, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in prefix.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.fill_(1.0)
        elif not name.endswith(("norm.weight", "o_proj.weight", "down_proj.weight")):
            drawn = torch.empty(parameter.shape).normal_(0.0, INITIAL_STD, generator=generator)
            parameter.copy_(drawn)
    ids = torch.linspace(0.1, 0.8, 16, device=target.device).mul(target.vocab_size).long()[None]
    with target.router.taps(("final",)) as recorded:
        target.model(input_ids=ids, use_cache=False, return_dict=True)
    prefix.norm.weight.fill_(recorded["final"][0].float().square().mean().sqrt())


def _number(config: Any, name: str, otherwise: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else otherwise


def _rope_theta(config: Any) -> float:
    return float(_rope(config).get("rope_theta") or 10000.0)


def rope_type(config: Any) -> str:
    """How a model's config scales its rotary frequencies; ``default`` = not at all."""
    return _rope(config).get("rope_type") or "default"


def _rope(config: Any) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    # Models with windows keep a set of parameters for each kind of layer.
    return parameters.get("full_attention") or parameters
