"""Breadth: every family of the zoo runs trees, layer ranges and skips on its unmodified model, or is refused by name.

References are always plain transformers: ``generate``, one path alone in a fresh forward, a copy with fewer layers.
Shapes: B rows, N nodes of a tree, L layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdec
import zoo
from drafters.base import BaseDrafter
from scripted import tree_of
from specdec.interfaces import Context, DecodeState, Needs
from specdec.routing import Route
from specdec.target import Target
from specdec.tree import CANDIDATE, TokenTree

NEW_TOKENS = 28
CLOSE = 1e-4  # of the span of the logits
# Parents of nodes 1, 2, ...: two branches in turns, so that slots are no positions; one forks and outgrows the window.
PARENTS = (0, 0, 1, 2, 3, 4, 5, 5, 7, 9, 10, 11, 12, 13)
RIGHT = (1, 3, 5, 7)  # a path that holds the text to come
LAYERS = 4
POSITION_TABLES = ("gpt2", "opt", "gpt_neo", "gpt_bigcode", "xglm", "biogpt")  # what enters layer 0 depends on them
ATTENTION = re.compile(r"(self_attn|attn|attention|self_attention)$")
MLP = re.compile(r"(mlp|feed_forward|block_sparse_moe|fc2)$")
CHAINS = [pytest.param(name, marks=pytest.mark.slow) for name in ("none", "prompt_lookup")]  # a tree shows as much


@cache
def model_of(family: str) -> Any:
    return zoo.build(family)


@cache
def plain(family: str, *lengths: int) -> tuple[dict[str, Tensor], Tensor]:
    return zoo.clear_prompts(model_of(family), len(lengths), NEW_TOKENS, lengths)


def speculated(model: Any, drafter: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The greedy text with a drafter; the model is plain again afterwards."""
    specdec.speculate(model, drafter)
    try:
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    finally:
        specdec.restore(model)


@pytest.mark.parametrize("drafter", [*CHAINS, "token_recycling"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_greedy_text(family: str, drafter: str) -> None:
    model = model_of(family)
    for lengths in ((13,), zoo.LENGTHS, (9, 9)):
        inputs, expected = plain(family, *lengths)
        got = speculated(model, drafter, inputs)
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_model_can_be_trained_after_it_has_speculated(family: str) -> None:
    """Passes run in inference mode; nothing that such a pass made may stay behind in the model."""
    model = copy.deepcopy(model_of(family))
    inputs, _ = plain(family, 13)
    speculated(model, "token_recycling", inputs)
    model(input_ids=inputs["input_ids"]).logits.float().logsumexp(-1).sum().backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


class Probe(BaseDrafter):
    """Proposes a tree whose first branch is right at first and whose other nodes are random; looks into the target."""

    name = "probe"
    needs = Needs(max_nodes=len(PARENTS) + 1)

    def __init__(self, texts: Sequence[Sequence[int]], look: Callable[[Target, Context, TokenTree, list[Any]], None]):
        self.texts, self.look = texts, look

    def fit(self, target: Target) -> None:
        self.target = target

    def propose(self, state: DecodeState) -> TokenTree:
        rows = []
        for row, text in enumerate(self.texts):
            right = dict(zip(RIGHT, text[state.emitted[row] :][: 2 + row], strict=False))
            others = torch.randperm(zoo.VOCAB, generator=state.generator).tolist()
            others = [token for token in others if token not in right.values()]
            rows.append([(p, right.get(node, others[node]), CANDIDATE) for node, p in enumerate(PARENTS, start=1)])
        tree = tree_of(state.root, rows)
        assert state.context is not None
        texts = [state.history.row(row).tolist() for row in range(len(rows))]
        self.look(self.target, state.context, tree, texts)
        return tree


def probe(family: str, look: Callable[[Target, Context, TokenTree, list[Any]], None]) -> None:
    """Run ``look`` in front of the passes of a ragged batch whose rows accept different lengths."""
    model = model_of(family)
    inputs, expected = plain(family, *zoo.LENGTHS)
    seen: list[list[int]] = []

    def once_ragged(target: Target, context: Context, tree: TokenTree, texts: list[Any]) -> None:
        # At the prompt's end and where rows have drifted apart; every pass would take minutes over the zoo.
        if len(seen) in (0, 3):
            look(target, context, tree, texts)
        seen.append(list(context.lengths))

    drafter = Probe(expected[:, inputs["input_ids"].shape[1] :].tolist(), once_ragged)
    got = speculated(model, drafter, inputs)
    assert got.tolist() == expected.tolist()
    assert len(seen) > 3
    assert len({after - before for after, before in zip(seen[3], seen[0], strict=True)}) > 1, "rows drift apart"


@torch.no_grad()
def path_logits(
    model: Any, tree: TokenTree, texts: list[Any], altered: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Tensor:
    """Logits of every node, ``[B, N, V]``: each path alone behind its text, by the plain model.

    Args:
        model: plain.
        tree: whose root-to-leaf paths run.
        texts: committed tokens of each row, the root included.
        altered: what is done to the model after it has read the committed tokens.
    """
    paths = tree.topology.paths.expand(tree.batch_size, -1, -1)
    logits = torch.full((tree.batch_size, tree.num_nodes, zoo.VOCAB), torch.nan)
    for row, text in enumerate(texts):
        for node in reversed(range(tree.num_nodes)):
            if not logits[row, node].isnan().any():
                continue
            path = [at for at in paths[row, node].tolist() if at >= 0]
            ids = torch.tensor([text[:-1] + tree.token_ids[row, path].tolist()])
            if altered is nullcontext:
                output = model(input_ids=ids, use_cache=False)
            else:
                known = model(input_ids=ids[:, : -len(path)], use_cache=True).past_key_values
                with altered():
                    output = model(input_ids=ids[:, -len(path) :], past_key_values=known)
            logits[row, path] = output.logits[0, -len(path) :]
    return logits


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) <= CLOSE * float(expected.max() - expected.min())


def assert_differ(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) > 0.05 * float(expected.max() - expected.min())


def shortened(model: Any, layers: int) -> Any:
    """A copy of which only the first layers are left."""
    short = copy.deepcopy(model)
    for module in list(short.modules()):
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == LAYERS:
                del child[layers:]
    short.config.get_text_config(decoder=True).num_hidden_layers = layers
    return short


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_tree_pass_equals_each_path_alone(family: str) -> None:
    plain_model = copy.deepcopy(model_of(family))

    def look(target: Target, context: Context, tree: TokenTree, texts: list[Any]) -> None:
        expected = path_logits(plain_model, tree, texts)
        assert_close(target.run(context, tree).logits, expected)
        parts = [target.run(context, tree, nodes=part).logits for part in (slice(0, 4), slice(4, 5), slice(5, 15))]
        assert_close(torch.cat(parts, dim=1), expected)

    probe(family, look)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_layer_ranges(family: str) -> None:
    plain_model = copy.deepcopy(model_of(family))

    def look(target: Target, context: Context, tree: TokenTree, texts: list[Any]) -> None:
        for count in range(1, LAYERS):
            early = target.run(context, tree, route=Route(hi=count)).logits
            assert_close(early, path_logits(shortened(plain_model, count), tree, texts))
        full = target.run(context, tree, taps=(*range(LAYERS + 1), "final"))
        assert_close(full.logits, path_logits(plain_model, tree, texts))
        assert_close(target.head(full.states["final"]), full.logits)
        if family not in POSITION_TABLES:
            assert_close(target.embed(tree.token_ids), full.states[0])
        for first in range(1, LAYERS):
            resumed = target.run(context, tree, route=Route(lo=first), states=full.states[first], taps=(LAYERS,))
            assert_close(resumed.logits, full.logits)
            assert_close(resumed.states[LAYERS], full.states[LAYERS])

    probe(family, look)


def silenced(model: Any, index: int, names: re.Pattern[str]) -> ExitStack:
    """Within the block that part of layer ``index`` runs and contributes nothing."""

    def zero(_: nn.Module, __: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    found = [module for name, module in layers[index].named_children() if names.match(name)]
    assert len(found) == 1
    stack = ExitStack()
    stack.callback(found[0].register_forward_hook(zero).remove)
    return stack


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_sublayer_skips(family: str) -> None:
    plain_model = copy.deepcopy(model_of(family))

    def look(target: Target, context: Context, tree: TokenTree, texts: list[Any]) -> None:
        assert target.router.why_not_skip() is None
        last = LAYERS - 1
        both = Route(skip_attention=frozenset({last}), skip_mlp=frozenset({last}))
        assert_close(
            target.run(context, tree, route=both).logits, target.run(context, tree, route=Route(hi=last)).logits
        )
        full = target.run(context, tree).logits
        for route, silence in (
            (Route(skip_attention=frozenset({1})), partial(silenced, plain_model, 1, ATTENTION)),
            (Route(skip_mlp=frozenset({2})), partial(silenced, plain_model, 2, MLP)),
        ):
            got = target.run(context, tree, route=route).logits
            assert_differ(got, full)
            assert_close(got, path_logits(plain_model, tree, texts, silence))

    probe(family, look)


@pytest.mark.parametrize("name", [name for name in zoo.REFUSED if name not in zoo.SWITCHING])
def test_families_that_cannot_branch_are_refused_by_name(name: str) -> None:
    model = zoo.REFUSED[name]()
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*cannot run token trees: "):
        specdec.speculate(model, "none")
    ids, mask = zoo.prompts(1)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=2).shape[0] == 1, "the model is as it was"


@pytest.mark.parametrize("name", zoo.SWITCHING)
def test_texts_over_which_rope_switches_are_left_to_plain_generation(name: str) -> None:
    model = zoo.REFUSED[name]()
    for length in (8, NEW_TOKENS):
        inputs, expected = zoo.clear_prompts(model, 3, length)
        specdec.speculate(model, "token_recycling")
        switches = pytest.warns(UserWarning, match="not speculating: .*rope switches its frequencies")
        with switches if length == NEW_TOKENS else nullcontext():
            got = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        assert (model.speculation.passes > 0) == (length < NEW_TOKENS)
        assert got.tolist() == expected.tolist()
        specdec.restore(model)
