"""Passes over a part of the target, really compiled: layer ranges, taps, states that enter, skipped sub-layers, the
attention kernels.

``tests/test_graphs.py`` traces such passes and lets torch run them operation by operation; here code is generated and
built, which takes a minute or more for each drafter.
"""

from __future__ import annotations

import importlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import specdec
import zoo
from scripted import RightAmongDecoys
from specdec.build import build_attention, build_drafter, build_verifier
from specdec.generation import attach, speculation_of
from test_contract import prompts
from zoo import build, untrained

pytestmark = [
    pytest.mark.slow,
    untrained("kangaroo"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++"),
]
NEW_TOKENS = 40  # enough for a part of the model to recur, and be compiled
SKIPPED = {"attention": [1, 2], "mlp": [2]}  # layer 2 as a whole, of layer 1 the attention
# Drafter, options that make drafts of one length, and the parts that are compiled as they are announced.
ROUTES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("kangaroo", {"confidence": 0.0, "num_draft_tokens": 2}, ("layers 0 to 2", "layers from 2")),
    ("early_exit", {"confidence": 0.0, "num_draft_tokens": 2, "exit_layer": 1}, ("layers 0 to 1", "layers from 1")),
    ("swift", {"confidence": 0.01, "num_draft_tokens": 2, "skip": SKIPPED, "max_width": 2}, ("3 parts skipped",)),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("drafter", "options", "parts"), ROUTES, ids=[route[0] for route in ROUTES])
def test_text_through_compiled_parts_is_the_targets_own(
    drafter: str,
    options: dict[str, Any],
    parts: tuple[str, ...],
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    model, told = build("llama"), list[str]()  # of which no other test has made graphs
    plain = model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS).tolist()
    attach(model, build_drafter(drafter, **options), build_verifier("tree_attention"), told.append)
    try:
        for _ in range(2):  # on the way compiled, then compiled from the start
            assert model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS).tolist() == plain
        graphs = speculation_of(model).target.graphs
        assert graphs is not None
        assert graphs.failures == {}
    finally:
        specdec.restore(model)
    compiled = [line for line in told if line.startswith("compiled")]
    for part in parts:
        assert any(part in line for line in compiled), told


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need Triton (extra 'kernels')")
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_passes_launch_the_attention_kernels(
    batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of trees with siblings, in all rows; generated code calls the kernels, which the interpreter runs."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    kernel, launched, told = importlib.import_module("verifiers.kernels.tree_attention"), list[int](), list[str]()
    launch = kernel._launch

    def counting(*arguments: Any) -> Any:
        launched.append(1)
        return launch(*arguments)

    model = build("llama")
    inputs, expected = zoo.clear_prompts(model, batch, NEW_TOKENS)
    right = expected[:, inputs["input_ids"].shape[1] :].tolist()
    drafter = RightAmongDecoys(zoo.VOCAB, 3, right)
    attach(model, drafter, build_verifier("tree_attention"), told.append, attention=build_attention("triton"))
    monkeypatch.setattr(kernel, "_launch", counting)
    passes = 0
    try:
        for _ in range(2):  # on the way compiled, then compiled from the start
            launched.clear()
            assert model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist()
            passes = speculation_of(model).last.passes
        target = speculation_of(model).target
        assert target.attention is not None
        assert target.graphs is not None
        assert target.graphs.failures == {}
    finally:
        specdec.restore(model)
    assert any(line.startswith("compiled") for line in told), told
    assert passes < NEW_TOKENS / 3, "trees were accepted"
    assert len(launched) == passes * model.config.num_hidden_layers
