"""Early exit: no layer computes a drafted token twice, whatever E, the text is the target's own.

Shapes: B rows, N nodes, k drafted tokens, E exit layer, L layers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import specdec
from drafters.early_exit import EarlyExit
from equality import tiny_llama
from specdec.decoding import Step
from specdec.interfaces import DecodeState
from specdec.routing import Route
from specdec.tree import PADDING, TokenTree
from sublayers import Call, counting
from zoo import build, prompts

LAYERS, NEW_TOKENS = 4, 14


def text_of(model: Any, batch: int, **options: Any) -> Any:
    ids, mask = prompts(batch)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **settings)


class Traced(EarlyExit):
    """Marks in the list of calls where a proposal is complete, and compares its verification with an unbroken pass."""

    def __init__(self, calls: list[Call] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[Any] = [] if calls is None else calls
        self.trees: list[TokenTree] = []
        self.budgets: list[list[int]] = []

    def propose(self, state: DecodeState) -> TokenTree:
        assert state.context is not None
        self.calls.append("propose")
        self.budgets.append([max(left - 1, 0) for left in state.context.budgets])
        tree = super().propose(state)
        self.calls.append("verify")
        self.trees.append(tree)
        return tree


@pytest.mark.parametrize(("width", "batch"), [(1, 1), (1, 3), (3, 3)])
def test_no_layer_computes_a_node_twice(width: int, batch: int) -> None:
    model = build("llama")
    with counting(model) as calls:
        drafter = Traced(exit_layer=2, num_draft_tokens=3, confidence=0.0, width=width)
        specdec.speculate(model, drafter)
        calls.clear()
        drafter.calls = calls
        text_of(model, batch)
    marks = [i for i, call in enumerate(calls) if call in ("propose", "verify")]
    sections = [calls[a + 1 : b] for a, b in zip(marks, [*marks[1:], len(calls)], strict=True)]
    assert len(sections) == 2 * len(drafter.trees)
    for tree, draft, verify in zip(drafter.trees, sections[::2], sections[1::2], strict=True):
        nodes, steps = tree.num_nodes, tree.topology.max_depth
        if steps == 0:
            assert not draft
            continue
        # k passes of one node, then one over the last chain node and all siblings, of layers 0 and 1 only.
        assert Counter(draft) == Counter(
            Call(layer, part, n)
            for n in (*[1] * steps, nodes - steps)
            for layer in (0, 1)
            for part in ("attention", "mlp")
        )
        assert Counter(verify) == Counter(Call(layer, part, nodes) for layer in (2, 3) for part in ("attention", "mlp"))
    assert {tree.num_nodes for tree in drafter.trees} >= {1 + 3 * width}


def test_the_head_reads_each_node_once_to_draft_and_once_to_verify() -> None:
    model, rows = build("llama"), list[int]()
    drafter = Traced(exit_layer=1, num_draft_tokens=3, confidence=0.0)
    specdec.speculate(model, drafter)
    inner = model.lm_head
    weight_used = inner.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[1])
        return weight_used(hidden)

    inner.forward = forward
    text_of(model, 1)
    depths = [tree.topology.max_depth for tree in drafter.trees]
    assert sum(rows[1:]) == sum(2 * depth + 1 for depth in depths), "the prefill's token aside"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(
    "options", [{"exit_layer": 1}, {"exit_layer": 3, "width": 2}, {"exit_layer": 2, "confidence": 0.4, "width": 3}]
)
def test_text_does_not_depend_on_the_settings(family: str, options: dict[str, Any]) -> None:
    model = build(family)
    expected = text_of(model, 3)
    drafter = Traced(**{"num_draft_tokens": 3, "confidence": 0.0, **options})
    specdec.speculate(model, drafter)
    assert text_of(model, 3).tolist() == expected.tolist()
    for tree, budgets in zip(drafter.trees, drafter.budgets, strict=True):
        tree.check()
        assert tree.topology.max_depth <= max(budgets)
    padded = [tree.role is not None and bool((tree.role == PADDING).any()) for tree in drafter.trees]
    assert any(padded), "rows stop at different depths"


@pytest.mark.parametrize("k", [1, 3])
def test_the_whole_model_as_its_own_draft_is_always_right(k: int) -> None:
    model = build("llama")
    expected = text_of(model, 1, max_new_tokens=1 + 4 * (k + 1))
    specdec.speculate(model, EarlyExit(exit_layer=LAYERS, num_draft_tokens=k, confidence=0.0))
    assert text_of(model, 1, max_new_tokens=1 + 4 * (k + 1)).tolist() == expected.tolist()
    assert model.speculation.passes == 4
    assert model.speculation.mean_accepted_tokens == k + 1


@pytest.mark.parametrize(("confidence", "drafted"), [(0.0, 5), (1.0, 1)])
def test_confidence_bounds_the_draft(confidence: float, drafted: int) -> None:
    model = build("llama")
    drafter = Traced(exit_layer=2, num_draft_tokens=5, confidence=confidence)
    specdec.speculate(model, drafter)
    text_of(model, 1)
    depths = [tree.topology.max_depth for tree in drafter.trees]
    assert depths == [min(drafted, budgets[0]) for budgets in drafter.budgets]


def test_verification_from_the_exit_equals_an_unbroken_pass() -> None:
    model = build("gemma3_text")
    drafter = Traced(exit_layer=2, num_draft_tokens=3, confidence=0.0, width=2)
    specdec.speculate(model, drafter)
    handle = specdec.speculation_of(model)
    compared = []
    verify = handle.verifier.verify

    def both(target: Any, state: DecodeState, tree: TokenTree, taps: Any = ()) -> Any:
        assert state.context is not None
        step = verify(target, state, tree, taps)
        if tree.entry is not None:
            compared.append((step.logits, target.run(state.context, tree, route=Route()).logits))
        return step

    handle.verifier.verify = both  # type: ignore[method-assign]
    text_of(model, 3)
    assert len(compared) > 2
    for split, whole in compared:
        torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)


def test_a_caller_who_wants_hidden_states_gets_all_layers() -> None:
    model = build("llama")
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    expected = text_of(model, 1, **wanted).hidden_states
    specdec.speculate(model, EarlyExit(exit_layer=2, confidence=0.0))
    got = text_of(model, 1, **wanted).hidden_states
    assert len(got) == len(expected)
    for ours, plain in zip(got, expected, strict=True):
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=f"exit_layer <= {LAYERS}.*got 5"):
        specdec.speculate(build("llama"), "early_exit", exit_layer=5)
    with pytest.raises(ValueError, match=r"at least 200 tokens \(width\)"):
        specdec.speculate(build("llama"), "early_exit", width=200)
    with pytest.raises(ValueError, match="at least 2 layers, got 1"):
        specdec.speculate(tiny_llama(num_hidden_layers=1), "early_exit")


def test_a_model_whose_upper_layers_read_more_than_the_stream_is_refused() -> None:
    model, kept = build("llama"), dict[str, torch.Tensor]()
    layers = model.model.layers
    layers[0].register_forward_hook(lambda _, __, output: kept.update(low=output))
    layers[3].register_forward_pre_hook(lambda _, args: (args[0] + kept["low"], *args[1:]))
    with pytest.raises(ValueError, match="read only the residual stream; split at layer 2"):
        specdec.speculate(model, "early_exit", exit_layer=2)
    specdec.speculate(model, "none")


def test_observers_see_ranks() -> None:
    model, ranks = build("llama"), set[int]()
    specdec.speculate(model, "early_exit", width=3, exit_layer=3)

    def look(_: DecodeState, step: Step) -> None:
        if step.tree is not None and step.tree.rank is not None:
            ranks.update(step.tree.rank[0].tolist())

    specdec.speculation_of(model).observers.append(look)
    text_of(model, 1)
    assert ranks == {0, 1, 2}
