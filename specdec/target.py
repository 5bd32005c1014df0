"""Target: a Hugging Face causal LM as prefill / run(tree) / keep(path), without a line of its modelling code copied.

The prompt is read by transformers' own ``_prefill``; the keyword arguments of every tree pass are those that
``prepare_inputs_for_generation`` returned for the first decode step, with ids, positions, mask and cache replaced. So
embeddings as input, continued caches, chunked prefill, PEFT prompts and vision-language models need no case of their
own.

Shapes: B rows, N nodes of a tree, n nodes of a pass, P_b committed tokens of row b, K slots seen, H hidden, V
vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.attention import AttentionBackend, Switch
from specdec.cache import TreeCache
from specdec.graphs import passes
from specdec.graphs.cuda import CudaGraphs
from specdec.interfaces import Context, Needs, Tap
from specdec.routing import FULL, Route, Router
from specdec.selection import top_k
from specdec.transfer import upload
from specdec.tree import TokenTree, from_host
from specdec.visibility import AttentionKinds, attention_masks, packed_masks

_HEAD_CHUNK = 256  # prompt positions per pass of the head: bounds the vocabulary-sized intermediate


@dataclass
class PassOutput:
    """What one pass computed: logits ``[B, n, V]`` as the model gives them, taps ``[B, n, H]``, all hidden states."""

    logits: Tensor
    states: Mapping[Tap, Tensor] = field(default_factory=dict)
    hidden_states: tuple[Tensor, ...] | None = None


class Target:
    """A causal LM seen from outside.

    Args:
        model: any decoder whose attention is full, sliding or chunked and which takes ``position_ids``;
            ``capabilities.check`` says which do.

    Raises:
        ValueError: the decoder layers or the output head cannot be found.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = self.model.config.get_text_config(decoder=True)
        self.layers = _decoder_layers(self.model, self.config.num_hidden_layers)
        self.router = Router(self.layers, _output_head(self.model))
        self.kinds = AttentionKinds.of(self.config)
        self.graphs: passes.GraphPasses | None = None
        self.attention: AttentionBackend | None = None
        self._switch = Switch(model)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """H, the width of what the output head receives."""
        return self.router.head.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        return self.router.head.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return self.model.dtype

    @property
    def name(self) -> str:
        """Class of the model, for messages."""
        return type(self.model).__name__

    def prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], needs: Needs
    ) -> tuple[Any, PassOutput]:
        """Read the prompt with transformers' own prefill.

        Args:
            input_ids: int64 ``[B, W]``, left-padded, as ``_sample`` receives them.
            generation_config: as ``_sample`` receives it.
            model_kwargs: likewise; chunked prefill rewrites it in place.
            needs: what the drafter wants recorded over the prompt.

        Returns:
            transformers' output, and ours: ``logits [B, 1, V]`` after the prompt with the taps over it.
        """
        wanted = tuple(dict.fromkeys((*needs.taps, "final") if needs.prompt_top_k else needs.taps))
        record = bool(wanted) and (needs.prompt_states or needs.prompt_top_k > 0)
        kept = model_kwargs.get("logits_to_keep")
        if record and kept is not None:
            model_kwargs["logits_to_keep"] = 0  # the head must be shown all positions for its input to be recorded
        with self.router.taps(wanted if record else (), last_only=record) as recorded:
            outputs = self.model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        if record and kept is not None:
            model_kwargs["logits_to_keep"] = kept
        states = {tap: torch.cat(parts, dim=1) for tap, parts in recorded.items()}
        return outputs, PassOutput(outputs.logits[:, -1:], states, outputs.get("hidden_states"))

    def open(self, ids: Tensor, outputs: Any, model_kwargs: dict[str, Any], reserve: int, release: bool) -> Context:
        """Move from transformers' prefill to our cache.

        Args:
            ids: int64 ``[B, W+1]``, the prompt and its first emitted token.
            outputs: what ``prefill`` returned of transformers.
            model_kwargs: of the prefill.
            reserve: slots to have beyond the prompt.
            release: the prefilled cache is nobody else's, so let go of it.
        """
        model_kwargs = self.model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
        template = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
        prefilled = template.pop("past_key_values")
        for dropped in ("input_ids", "inputs_embeds", "logits_to_keep", "cache_position"):
            template.pop(dropped, None)
        columns = prefilled.get_seq_length()
        mask = template.pop("attention_mask", None)
        if mask is not None:
            assert mask.shape == (ids.shape[0], columns + 1), f"mask {tuple(mask.shape)} for {columns} cached columns"
            mask = mask[:, :-1].bool()
        if template.get("position_ids") is None:
            # Such a model counts the columns of its cache, padding included.
            template["position_ids"] = torch.full((ids.shape[0], 1), columns, device=self.device)
        shelf, lease = None if self.graphs is None else self.graphs.shelf, None
        if shelf is not None:
            cache, lease = shelf.take(prefilled, mask, columns + reserve, release)
        else:
            cache = TreeCache(prefilled, mask, columns + reserve, release, for_graphs=self.graphs is not None)
        if self.attention is not None:
            cache.mover = self.attention.move
        lengths = [columns - pad for pad in cache.padding]
        return Context(cache, template, lengths, list(lengths), [0] * len(lengths), self.dtype, lease)

    def run(
        self,
        context: Context,
        tree: TokenTree,
        nodes: slice | None = None,
        route: Route = FULL,
        states: Tensor | None = None,
        taps: Sequence[Tap] = (),
    ) -> PassOutput:
        """One pass over (a stretch of) a tree. Nodes see the committed tokens, their ancestors and themselves.

        Self-drafters run a growing tree level by level: ``nodes`` is the newest stretch, K/V of the earlier nodes
        stand in the slots that their own pass wrote.

        Args:
            context: the request.
            tree: the tree, up to at least the end of ``nodes``.
            nodes: which of its nodes to run; all by default.
            route: which part of the model.
            states: ``[B, n, H]`` entering layer ``route.lo``, where that is > 0.
            taps: states to record.

        Returns:
            inference tensors: to be read and combined, never written in place outside inference mode.
        """
        start, stop, _ = (nodes or slice(0, tree.num_nodes)).indices(tree.num_nodes)
        inputs = self._inputs(context, tree, start, stop)
        if self.graphs is not None:
            with self._attending():
                outcome = self._as_graph(self.graphs, context, inputs, route, states, taps)
            if outcome is not None:
                return outcome
        # A pass over a small model is bound by dispatch, of which inference mode saves a twentieth.
        with torch.inference_mode(), self._attending():
            if route.is_full and not taps:
                outputs = self.model(**inputs, return_dict=True)
                return PassOutput(outputs.logits, {}, outputs.get("hidden_states"))
            with self.router.route(route, states), self.router.taps(taps) as recorded:
                outputs = self.model(**inputs, return_dict=True)
        return PassOutput(
            outputs.logits, {tap: parts[0] for tap, parts in recorded.items()}, outputs.get("hidden_states")
        )

    def _attending(self) -> AbstractContextManager[None]:
        """Within the block the layers use the attention of tree passes."""
        return nullcontext() if self.attention is None else self._switch.to(self.attention.implementation)

    def use_graphs(
        self,
        max_nodes: int,
        compiling: Callable[[str], None] | None,
        capture: bool = False,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """From now on run passes over up to ``max_nodes`` nodes as graphs where they recur (``specdec.graphs``).

        Args:
            max_nodes: N of the largest tree to come.
            compiling: compile them, and tell this about it; None leaves them as they are.
            capture: capture them as CUDA graphs.
            sizes: the smaller sizes that passes are padded to; None = the usual few.

        Raises:
            ValueError: CUDA graphs of a model that is not on a CUDA device.
        """
        self.graphs = passes.GraphPasses(
            self.model,
            self.router,
            self.kinds,
            max_nodes,
            compiling or (lambda _: None),
            None if compiling is None else passes.inductor,
            CudaGraphs(self.device) if capture else None,
            None if self.attention is None else self.attention.implementation,
            sizes,
        )

    @property
    def kept_bytes(self) -> int:
        """Bytes of the K/V slabs that are kept from request to request; none without captured passes."""
        return 0 if self.graphs is None or self.graphs.shelf is None else self.graphs.shelf.nbytes

    def load_graphs(self, context: Context, taps: Sequence[Tap] = ()) -> None:
        """Load the graphs that lie on disk for the full passes of a request; others are made when a pass needs them.

        Args:
            context: the request.
            taps: states that its passes will record.
        """
        if self.graphs is not None:
            with self._attending():
                self.graphs.load(context, taps)

    def make_graphs(self, context: Context, taps: Sequence[Tap] = ()) -> None:
        """Run a full pass of every size that graphs are made for, so that no later one has to make any.

        Args:
            context: a request under way; nothing is committed to it.
            taps: states that its passes will record.
        """
        for size in () if self.graphs is None else self.graphs.buckets:
            ids = torch.zeros(len(context.lengths), size, dtype=torch.int64, device=self.device)
            self.run(context, TokenTree(ids, from_host([[0] * size], self.device)), taps=taps)

    def _as_graph(
        self,
        graphs: passes.GraphPasses,
        context: Context,
        inputs: dict[str, Any],
        route: Route,
        states: Tensor | None,
        taps: Sequence[Tap],
    ) -> PassOutput | None:
        """A pass as a graph; None where this one is none."""
        known = route in graphs.failures
        outcome = graphs(context, inputs, route, states, taps)
        if outcome is not None:
            logits, found = outcome
            # Without a head an ordinary pass returns a part of the states as logits, which nobody reads.
            return PassOutput(next(iter(found.values()))[..., :1] if logits is None else logits, found)
        if route in graphs.failures and not known:
            what = "the passes" if route.is_full else f"passes over a part ({route})"
            warnings.warn(f"{graphs.failures[route]}; {what} of {self.name} run uncompiled", stacklevel=3)
        return None

    def keep(self, context: Context, paths: Sequence[Sequence[int]]) -> None:
        """Commit the nodes of each row's path: their K/V moves down to the first free slots, in place."""
        rows = enumerate(zip(context.lengths, paths, strict=True))
        moves = [(b, at + node, at + i) for b, (at, path) in rows for i, node in enumerate(path) if node != i]
        if moves and not context.cache.move_on_host(moves):
            longest = max(len(path) for path in paths)
            # Short rows are filled up with moves of a slot onto itself.
            source = [
                [length + node for node in path] + [length + i for i in range(len(path), longest)]
                for length, path in zip(context.lengths, paths, strict=True)
            ]
            target = [[length + i for i in range(longest)] for length in context.lengths]
            both = upload([source, target], context.template["position_ids"].device)
            context.cache.move(both[0], both[1])
        context.lengths = [length + len(path) for length, path in zip(context.lengths, paths, strict=True)]

    def head(self, states: Tensor) -> Tensor:
        """Logits of final states ``[B, T, H]`` -> ``[B, T, V]``, with the model's own soft-cap and scaling; T may be 0.

        Gradients reach ``states`` where the caller wants them, the head's own parameters where they are not frozen.
        """
        if self.head_is_all:
            return self.router.head(states)
        return self._through_model(states)

    @cached_property
    def head_is_all(self) -> bool:
        """Whether the output embedding alone makes the logits: no soft-cap, scaling or slicing comes after it."""
        with torch.inference_mode():
            states = torch.linspace(
                -2, 2, 3 * self.hidden_size, device=self.router.head.weight.device, dtype=self.dtype
            )
            states = states.view(1, 3, -1)
            with self.router.observe():  # who trains has not asked whether the model can branch
                self.model(input_ids=torch.zeros(1, 3, dtype=torch.int64, device=self.device), use_cache=False)
            return torch.equal(self.router.head(states), self._through_model(states))

    def prepare(self) -> None:
        """Find out how the head is reached, which takes a short pass, before a request has to wait for it."""
        _ = self.head_is_all

    def _through_model(self, states: Tensor) -> Tensor:
        if states.shape[1] == 0:
            # No model reads an empty text. One state that nobody keeps runs the layers as often as other states would,
            # which processes that share them count on, and leaves the logits where gradients find them.
            return self._through_model(F.pad(states, (0, 0, 0, 1)))[:, :0]
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=self.device)
        with self.router.head_sees(states):
            return self.model(input_ids=ids, use_cache=False, return_dict=True).logits

    def embedding(self, token_ids: Tensor) -> Tensor:
        """The input embedding of ``token_ids [...]`` -> ``[..., H]``, without positions."""
        return self.model.get_input_embeddings()(token_ids)

    def embed(self, token_ids: Tensor) -> Tensor:
        """What enters layer 0 for ``token_ids [B, T]`` -> ``[B, T, H]``, with the model's own scaling."""
        with self.router.route(Route(hi=0, logits=False)), self.router.taps((0,)) as recorded:
            self.model(input_ids=token_ids, use_cache=False, return_dict=True)
        return recorded[0][0]

    def top_k(self, states: Tensor, k: int) -> Tensor:
        """Ids of the k most likely successors of final states ``[B, T, H]`` -> int64 ``[B, T, k]``, head in chunks."""
        with torch.inference_mode():
            parts = [top_k(self.head(part), k) for part in states.split(_HEAD_CHUNK, dim=1)]
        return torch.cat(parts, dim=1)

    def _inputs(self, context: Context, tree: TokenTree, start: int, stop: int) -> dict[str, Any]:
        """Keyword arguments of a pass over nodes ``[start, stop)``."""
        lengths, cache = context.lengths, context.cache
        uniform = len(set(lengths)) == 1
        cache.reserve(max(lengths) + stop)
        if uniform:
            slots: int | Tensor = lengths[0] + start
        else:
            device = tree.token_ids.device
            slots = upload(lengths, device)[:, None] + torch.arange(start, stop, device=device)
        cache.begin(slots, stop - start, max(lengths) + stop)
        inputs = dict(context.template)
        inputs["input_ids"] = tree.token_ids[:, start:stop]
        inputs["past_key_values"] = cache
        inputs["position_ids"] = inputs["position_ids"] + self._offsets(context, tree, start, stop)
        nodes = slice(start, stop)
        if self.attention is not None:
            inputs["attention_mask"] = packed_masks(self.kinds, tree.topology, nodes, lengths)
        else:
            inputs["attention_mask"] = attention_masks(self.kinds, tree.topology, nodes, lengths, context.dtype)
        for name, value in context.template.items():
            if name.endswith("token_type_ids"):
                inputs[name] = value[..., -1:].expand(*value.shape[:-1], stop - start)
        return inputs

    def _offsets(self, context: Context, tree: TokenTree, start: int, stop: int) -> Tensor:
        """Positions of the nodes relative to the template's, ``[1 or B, n]``."""
        depths = tree.topology.depths[:, start:stop]
        ahead = [now - base for now, base in zip(context.lengths, context.base_lengths, strict=True)]
        # Nodes that the token budget makes unreachable stay within the positions that plain decoding would use, so that
        # models with a position table never read past its end. A row without budget waits at its last position.
        limits = [budget - 1 for budget in context.budgets]
        if len(set(ahead)) == 1 and len(set(limits)) == 1:
            return depths.clamp(max=limits[0]) + ahead[0] if limits[0] < tree.topology.max_depth else depths + ahead[0]
        rows = upload([limits, ahead], depths.device)[..., None]
        return torch.minimum(depths, rows[0]) + rows[1]


def _decoder_layers(model: Any, count: int) -> Sequence[nn.Module]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in (decoder, *decoder.modules()):
        for _, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return list(child)
    raise ValueError(f"{type(model).__name__}: found no list of {count} decoder layers to run a tree through")


def _output_head(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding; expected a causal LM with a head")
    return head
