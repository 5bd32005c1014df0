"""Attention of tree passes behind transformers' interface: the model's own text, and its own attention elsewhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
import zoo
from scripted import RightAmongDecoys
from specdec.attention import AttentionBackend
from specdec.build import build_attention, choices
from specdec.generation import speculation_of
from specdec.graphs.passes import GraphPasses
from specdec.interfaces import DecodeState
from specdec.target import Target
from specdec.tree import TokenTree, Topology, from_host
from specdec.visibility import KNOWN_LAYER_TYPES, AttentionKinds, _visible, packed_masks, packed_visibility
from verifiers.kernels import plain
from verifiers.kernels.backend import PlainAttention, TritonAttention

NEW_TOKENS = 24
# Their layers compute attention by themselves, without transformers' interface.
WITHOUT_INTERFACE = ("falcon", "gptj", "gpt_neo", "codegen", "xglm")
COMMON = ("gemma2", "gemma3_text", "llama4_text", "gpt_oss")  # soft cap, windows, chunks, sinks


def random_topology(nodes: int, rows: int = 1, seed: int = 0) -> Topology:
    generator = torch.Generator().manual_seed(seed)
    parents = torch.rand(rows, nodes, generator=generator) * torch.arange(nodes)
    return from_host(parents.long().numpy())


def slowly(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@cache
def model_of(family: str) -> Any:
    return zoo.build(family)


@pytest.fixture(autouse=True)
def _plain_again() -> Iterator[None]:
    yield
    specdec.restore(model_of("llama"))


def text(model: Any, inputs: dict[str, Tensor], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False).tolist()


def attention_of(model: Any) -> AttentionBackend | None:
    return speculation_of(model).target.attention


@pytest.mark.parametrize("family", COMMON)
def test_greedy_text_with_packed_masks(family: str) -> None:
    check_packed_masks(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f not in (*COMMON, *WITHOUT_INTERFACE)])
def test_greedy_text_with_packed_masks_everywhere(family: str) -> None:
    check_packed_masks(family)


def check_packed_masks(family: str) -> None:
    model = model_of(family)
    for lengths in ((13,), zoo.LENGTHS):
        inputs, expected = zoo.clear_prompts(model, len(lengths), NEW_TOKENS, lengths)
        specdec.speculate(model, "token_recycling", attention="plain", num_nodes=24)
        try:
            assert isinstance(attention_of(model), PlainAttention)
            assert text(model, inputs) == expected.tolist()
        finally:
            specdec.restore(model)


@pytest.mark.parametrize("drafter", ["early_exit", "lookahead"])
def test_drafters_that_run_parts_of_the_target(drafter: str) -> None:
    """Stretches of trees, layer ranges, skips and rows of other shapes go through packed masks as well."""
    model = model_of("llama")
    inputs, expected = zoo.clear_prompts(model, 3, NEW_TOKENS)
    specdec.speculate(model, drafter, attention="plain")
    assert text(model, inputs) == expected.tolist()


@pytest.mark.parametrize("family", ["falcon", *(slowly(f) for f in WITHOUT_INTERFACE if f != "falcon")])
def test_a_model_that_does_not_ask_keeps_its_own(family: str) -> None:
    model = model_of(family)
    inputs, expected = zoo.clear_prompts(model, 1, 8, (13,))
    with pytest.warns(UserWarning, match=r"'plain' is not used .* 0 of 4 layers .* its own '(sdpa|eager)' stays"):
        specdec.speculate(model, "prompt_lookup", attention="plain")
    try:
        assert attention_of(model) is None
        assert text(model, inputs, 8) == expected.tolist()
    finally:
        specdec.restore(model)


@pytest.mark.parametrize("kind", KNOWN_LAYER_TYPES)
@pytest.mark.parametrize("size", [3, 7, 64])
def test_packed_masks_say_what_masks_say(kind: str, size: int) -> None:
    kinds = AttentionKinds({kind: size}, False)
    for lengths in ((0,), (33, 33), (0, 33, 20)):
        for topology in (random_topology(70, 1), random_topology(70, len(lengths), seed=1)):
            for part in (slice(0, 70), slice(10, 66), slice(3, 4)):
                packed = packed_masks(kinds, topology, part, lengths)
                seen = packed_visibility(packed, max(lengths) + part.stop)
                assert torch.equal(seen, _visible(kind, size, topology, part, lengths))


def test_only_tree_passes_are_switched() -> None:
    model, seen = model_of("llama"), list[str]()
    inputs, expected = zoo.clear_prompts(model, 1, NEW_TOKENS, (13,))
    specdec.speculate(model, "prompt_lookup", attention="plain")
    handle = model.model.register_forward_hook(lambda *_: seen.append(model.config._attn_implementation))
    try:
        assert text(model, inputs) == expected.tolist()
    finally:
        handle.remove()
    assert seen[0] == "sdpa", "the prompt is read as ever"
    assert set(seen[1:]) == {"specdec_plain"}
    assert model.config._attn_implementation == "sdpa"
    specdec.restore(model)
    assert text(model, inputs) == expected.tolist()


def test_a_pass_that_fails_leaves_the_models_own() -> None:
    model = model_of("llama")
    specdec.speculate(model, "prompt_lookup", attention="plain")
    handle = model.model.layers[1].register_forward_pre_hook(fail_in_a_tree_pass)
    try:
        with pytest.raises(RuntimeError, match="in a tree pass"):
            text(model, zoo.clear_prompts(model, 1, NEW_TOKENS, (13,))[0])
    finally:
        handle.remove()
    assert model.config._attn_implementation == "sdpa"


def fail_in_a_tree_pass(layer: Any, _: Any) -> None:
    if layer.self_attn.config._attn_implementation == "specdec_plain":
        raise RuntimeError("in a tree pass")


def test_attention_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    right = plain.tree_attention
    monkeypatch.setattr(plain, "tree_attention", lambda *args, **options: right(*args, **options) * 1.01)
    with pytest.warns(UserWarning, match="'plain' is not used .* self-check: tree logits differ"):
        specdec.speculate(model, "prompt_lookup", attention="plain")
    assert attention_of(model) is None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_graphs_take_packed_masks(family: str, batch: int) -> None:
    """Buckets larger than the trees; captured over fixed buffers, as CUDA graphs are."""
    model = model_of(family)
    inputs, expected = zoo.clear_prompts(model, batch, NEW_TOKENS)
    specdec.speculate(model, "token_recycling", attention="plain", num_nodes=24)
    target = speculation_of(model).target
    replayed = list[int]()

    def capture(run: Any) -> Any:
        replayed.append(0)
        return run

    kinds = target.kinds
    target.graphs = GraphPasses(
        model, target.router, kinds, 70, lambda _: None, None, capture, attention="specdec_plain"
    )
    try:
        assert text(model, inputs) == expected.tolist()
        assert not target.graphs.failures
        assert replayed
    finally:
        specdec.restore(model)


def test_an_unknown_name_lists_the_known() -> None:
    assert choices("attention") == ["plain", "triton"]
    with pytest.raises(ValueError, match=r"unknown attention 'flash'; known: plain, triton"):
        specdec.speculate(model_of("llama"), attention="flash")
    with pytest.raises(ValueError, match="splits >= 1"):
        TritonAttention(splits=0)


class Comparing(RightAmongDecoys):
    """Runs its tree with the target's own attention as well; ``difference`` of the logits, as a part of the largest."""

    difference = 0.0

    def fit(self, target: Target) -> None:
        self.target = target

    def propose(self, state: DecodeState) -> TokenTree:
        tree, target = super().propose(state), self.target
        assert state.context is not None
        ours = target.run(state.context, tree).logits
        target.attention, attention = None, target.attention
        own = target.run(state.context, tree).logits
        target.attention = attention
        self.difference = max(self.difference, float((ours - own).abs().max() / own.abs().max()))
        return tree


def counting(counts: dict[str, int], launch: Callable[..., Any]) -> Callable[..., Any]:
    name = launch.__name__

    def counted(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return launch(*args, **options)

    return counted


def on_cuda_of(family: str) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts whose text a GPU's own rounding does not change, with that text."""
    inputs, expected = zoo.clear_prompts(model_of(family), 3, NEW_TOKENS)
    return {name: tensor.cuda() for name, tensor in inputs.items()}, expected


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need Triton (extra 'kernels')")
class TestTriton:
    """The kernels in whole models; in the interpreter, which takes its time."""

    @staticmethod
    def small(family: str) -> Any:
        """Two layers; a windowed one first where there are windows."""
        changed: dict[str, Any] = {"num_hidden_layers": 2}
        if family.startswith(("gemma", "gpt_oss")):
            changed["layer_types"] = ["sliding_attention", "full_attention"]
        return zoo._redraw(zoo._make(family, zoo._FAMILIES[family] | changed), 0)

    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        """How often each kernel is launched."""
        counts = {"tree_attention": 0, "move": 0}
        for module, name in (("tree_attention", "tree_attention"), ("compaction", "move")):
            owner = importlib.import_module(f"verifiers.kernels.{module}")
            monkeypatch.setattr(owner, name, counting(counts, getattr(owner, name)))
        return counts

    @pytest.mark.parametrize("family", ["llama", "gemma2", slowly("gemma3_text"), slowly("qwen3"), slowly("gpt_oss")])
    def test_greedy_text(self, family: str, counted: dict[str, int]) -> None:
        """Ragged rows; a shared key head, a window, a soft cap, normed queries."""
        model = self.small(family)
        inputs, expected = zoo.clear_prompts(model, 2, 10, (13, 6))
        right = expected[:, inputs["input_ids"].shape[1] :].tolist()
        specdec.speculate(model, RightAmongDecoys(zoo.VOCAB, 4, right), attention="triton")
        counted.update(tree_attention=0)
        assert text(model, inputs, 10) == expected.tolist()
        passes = model.speculation.passes
        assert passes == 2, "4 + 1 tokens in each"
        assert counted == {"tree_attention": 2 * passes, "move": passes}, "two layers, one move for both"

    def test_logits_are_those_of_the_models_own(self) -> None:
        model = self.small("llama")
        inputs, _ = zoo.clear_prompts(model, 2, 10, (13, 6))
        drafter = Comparing(zoo.VOCAB, 3, [list(range(3, 9))] * 2)
        specdec.speculate(model, drafter, attention="triton")
        text(model, inputs, 2)
        assert 0 < drafter.difference <= 2e-6

    def test_half_precision(self, counted: dict[str, int]) -> None:
        model = self.small("llama").half()
        specdec.speculate(model, "prompt_lookup", attention="triton")
        text(model, {"input_ids": torch.randint(2, 90, (1, 9), generator=torch.Generator().manual_seed(0))}, 4)
        assert counted["tree_attention"] > 2

    @pytest.mark.parametrize(
        ("dtype", "family", "said"),
        [(torch.bfloat16, "llama", "bfloat16, which Triton's interpreter"), (torch.float32, "deepseek_v3", "one size")],
    )
    def test_what_it_does_not_take_is_named(self, dtype: torch.dtype, family: str, said: str) -> None:
        model = zoo.build(family, dtype=dtype)
        with pytest.warns(UserWarning, match=f"'triton' is not used .* {said}.*; its own 'sdpa' stays"):
            specdec.speculate(model, "prompt_lookup", attention="triton")
        assert attention_of(model) is None

    @pytest.mark.gpu
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3", "gpt_oss"])
    def test_greedy_text_on_a_gpu(self, family: str, counted: dict[str, int]) -> None:
        model = zoo.build(family).cuda()
        inputs, expected = on_cuda_of(family)
        specdec.speculate(model, "token_recycling", attention="triton")
        assert text(model, inputs) == expected.tolist()
        assert counted["tree_attention"] > 0
        model = zoo.build(family, dtype=torch.bfloat16).cuda()
        specdec.speculate(model, "token_recycling", attention="triton")
        assert attention_of(model) is not None, "the self-check passes in bfloat16 too"
        text(model, inputs)

    def test_without_cuda_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel = importlib.import_module("verifiers.kernels.tree_attention")
        monkeypatch.setattr(kernel, "INTERPRETED", False)
        with pytest.warns(UserWarning, match="need CUDA, the model is on cpu; its own 'sdpa' stays"):
            specdec.speculate(model_of("llama"), "prompt_lookup", attention="triton")

    def test_an_old_gpu_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel = importlib.import_module("verifiers.kernels.tree_attention")
        monkeypatch.setattr(kernel, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        attention = TritonAttention()
        attention._kernel = kernel
        assert "8.0 or newer" in (attention._why_not_on(torch.device("cuda:0")) or "")


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("tree_attention", "compaction"):
        monkeypatch.delitem(sys.modules, f"verifiers.kernels.{name}", raising=False)
    with pytest.warns(UserWarning, match=r"Triton cannot be imported .* extra 'kernels'; its own 'sdpa' stays"):
        specdec.speculate(model_of("llama"), "prompt_lookup", attention="triton")


def test_every_recipe_builds() -> None:
    for name in choices("attention"):
        built = build_attention(name)
        assert isinstance(built, AttentionBackend)
        assert built.name == name
