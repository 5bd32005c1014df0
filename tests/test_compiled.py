"""Compiled passes: the same text, few graphs, and ordinary passes where there can be none.

The default tests let the compiler capture and functionalise graphs but not generate code, which takes seconds instead
of minutes and keeps the arithmetic; code generation runs under the marker ``slow``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import specdec
from specdec import compiled
from specdec.build import build_drafter, build_verifier
from specdec.generation import attach, speculation_of
from test_contract import model_of, plain_text, prompts
from zoo import build

NEW_TOKENS = 24


@pytest.fixture(autouse=True)
def _fresh_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    compiled._GRAPHS.clear()
    yield
    compiled._GRAPHS.clear()
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs that have been made so far, recompilations included."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def speculating(model: Any, drafter: str, told: list[str], **options: Any) -> Any:
    return attach(model, build_drafter(drafter, **options), build_verifier("tree_attention"), told.append)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_text_is_that_of_ordinary_passes(family: str, batch: int) -> None:
    model, told = model_of(family), list[str]()
    speculating(model, "token_recycling", told)
    try:
        for _ in range(2):
            text = model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS).tolist()
            assert text == plain_text(family, batch)
        target = speculation_of(model).target
        assert target.compiled is not None
        assert target.compiled.failure is None
    finally:
        specdec.restore(model)
    assert any(line.startswith("compiled") for line in told)


def test_a_growing_text_recompiles_nothing() -> None:
    model, told = model_of("llama"), list[str]()
    speculating(model, "token_recycling", told, num_nodes=7)
    try:
        inputs = prompts(1)
        model.generate(**inputs, max_new_tokens=80, eos_token_id=None)
        known, steps = graphs(), 0
        for seed in range(3):
            more = prompts(1, seed=seed + 5)
            model.generate(**more, max_new_tokens=120, eos_token_id=None)
            steps += model.speculation.passes
        assert steps > 100
        assert graphs() == known
    finally:
        specdec.restore(model)
    assert len(told) == 2 * len(compiled._GRAPHS[model])


def test_a_compiler_that_fails_leaves_ordinary_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nand details")

    model = model_of("llama")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    specdec.speculate(model, "token_recycling", compile=True)
    try:
        with pytest.warns(UserWarning, match="no compiler here.*uncompiled") as caught:
            text = model.generate(**prompts(1), max_new_tokens=NEW_TOKENS).tolist()
        assert len(caught) == 1
        assert text == plain_text("llama", 1)
    finally:
        specdec.restore(model)


def test_what_a_graph_does_not_return_comes_from_ordinary_passes() -> None:
    model, told = model_of("llama"), list[str]()
    options: dict[str, Any] = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_hidden_states": True}
    plain = model.generate(**prompts(1), **options)
    speculating(model, "token_recycling", told)
    try:
        got = model.generate(**prompts(1), **options)
        assert got.sequences.tolist() == plain.sequences.tolist()
        assert len(got.hidden_states) == len(plain.hidden_states)
        assert told == []
    finally:
        specdec.restore(model)


def test_changed_weights_make_new_graphs() -> None:
    model, told = build("llama"), list[str]()
    speculating(model, "none", told)
    try:
        for _ in range(2):
            model.generate(**prompts(1), max_new_tokens=4)
        assert len(told) == 2, "compiling and compiled, once"
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        changed = model.generate(**prompts(1), max_new_tokens=8).tolist()
        assert len(told) == 4
    finally:
        specdec.restore(model)
    assert changed == model.generate(**prompts(1), max_new_tokens=8).tolist()


def test_a_head_that_reads_something_else_is_left_alone() -> None:
    model, told = build("llama"), list[str]()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].flip(-1),))
    expected = model.generate(**prompts(1), max_new_tokens=8).tolist()
    with pytest.warns(UserWarning, match="between this model's decoder and its output head.*uncompiled"):
        speculating(model, "token_recycling", told)
    try:
        assert model.generate(**prompts(1), max_new_tokens=8).tolist() == expected
    finally:
        specdec.restore(model)
    assert told == []


@pytest.mark.slow
def test_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    test_text_is_that_of_ordinary_passes("llama", 1)
