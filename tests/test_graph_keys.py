"""What graphs stand on: a changed model makes new ones, passes of another kind others; who has none is told why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AttentionInterface

import specdec
from drafters.follower import Follower
from specdec.build import build_drafter, build_verifier
from specdec.commands._tree import Plan, TreeTuner
from specdec.generation import attach, speculation_of
from specdec.graphs import passes, state, store
from specdec.graphs.passes import GraphPasses
from specdec.target import Target
from test_contract import model_of, prompts
from test_graphs import _fresh_graphs as _fresh_graphs  # a fixture
from test_graphs import graphs_of, one_layer, speculating
from verifiers.kernels import backend
from zoo import build

NEW_TOKENS = 6
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft


def text(model: Any) -> list[list[int]]:
    return model.generate(**prompts(1), max_new_tokens=NEW_TOKENS).tolist()


def adapted() -> Any:
    """A model with two adapters, both of which do something."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(one_layer(), lora)
    model.add_adapter("other", lora)
    return model.eval()


def rescale(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = -40.0


CHANGES: dict[str, Callable[[Any], object]] = {
    "another adapter": lambda model: model.set_adapter("other"),
    "another scale": rescale,
    "weights through .data": lambda model: model.get_output_embeddings().weight.data.mul_(-1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_makes_new_graphs(change: str) -> None:
    model, told = adapted(), list[str]()
    speculating(model, "none", told)
    try:
        assert text(model) == text(model)
        assert len(told) == 2, "compiling and compiled, once"
        CHANGES[change](model)
        changed = text(model)
        assert len(told) == 4
    finally:
        specdec.restore(model)
    assert changed == text(model)


@pytest.mark.parametrize("change", ["another adapter", "another scale"])
def test_a_changed_model_has_another_key_on_disk(change: str) -> None:
    model = adapted()
    inner = model.get_base_model()
    before = store.identity(inner, None)
    assert before == store.identity(adapted().get_base_model(), None)
    CHANGES[change](model)
    assert before != store.identity(inner, None) is not None


def test_code_without_a_file_is_told_apart_by_its_constants() -> None:
    def key(source: str) -> str:
        made: dict[str, Any] = {}
        exec(source, made)  # as a notebook does
        return "".join(state.code_of(made["f"]))

    twice = "def f(x):\n    return x * 2"
    assert key(twice) == key(twice)
    others = ["def f(x):\n    return x * 3", "def f(x, y=2):\n    return x * 2", "f = lambda x: lambda: x * 2"]
    others += [f"def g(k):\n    def f(x):\n        return x * k\n    return f\nf = g({k})" for k in (2, 3)]
    assert len({key(twice), *map(key, others)}) == 1 + len(others)
    assert state.plain(frozenset("cab")) == str(["'a'", "'b'", "'c'"]), "the same order in every process"
    loop: list[Any] = [1]
    loop.append(loop)
    assert state.plain(loop) is not None


def test_the_attention_in_force_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(by: float) -> Callable[..., Any]:
        return lambda *args, **kwargs: AttentionInterface()["sdpa"](*args, **kwargs, scaling=by)

    found = [state.attention_key("sdpa"), state.attention_key("eager")]
    for by in (1.0, 2.0):
        monkeypatch.setitem(AttentionInterface._global_mapping, "mine", scaled(by))
        found.append(state.attention_key("mine"))
    assert len(set(found)) == len(found)
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", scaled(1.0))
    assert state.attention_key("mine") == found[2]


def test_sources_that_are_traced_in_are_part_of_the_key() -> None:
    core = Path(specdec.__file__).parent
    for name in ("routing.py", "visibility.py", "tree.py", "graphs/tracing.py"):
        assert state.sources(core / name)[0] in store._ours()
    kernels = Path(backend.__file__).parent
    function = backend._forward(lambda *_: torch.zeros(1), lambda *_: None)
    assert state._files_of(function) == state.sources(kernels)
    assert len(state.sources(kernels)) == len(list(kernels.glob("*.py")))


def test_autocast_makes_other_graphs() -> None:
    model = one_layer()
    speculating(model, "none", [])
    mixed = torch.autocast("cpu", dtype=torch.bfloat16)
    try:
        text(model)
        with mixed:
            got = text(model)
        assert graphs_of(model).failures == {}
        shapes = {(shape.autocast, shape.cache) for shape, _ in passes._MADE[model].graphs}
    finally:
        specdec.restore(model)
    assert shapes == {(None, (torch.float32,)), (torch.bfloat16, (torch.float32,))}
    with mixed:
        assert got == text(model)


def test_trees_that_need_wider_masks_make_other_graphs() -> None:
    model = one_layer()
    expected = text(model)
    specdec.speculate(model, "none", attention="plain", compile=True)
    target = speculation_of(model).target
    try:
        for most in (24, 70):
            target.use_graphs(most, lambda _: None)
            assert text(model) == expected
            assert graphs_of(model).failures == {}
        assert {shape.words for shape, _ in passes._MADE[model].graphs} == {1, 2}
    finally:
        specdec.restore(model)


@pytest.mark.parametrize("case", ["size", "keyword"])
def test_who_runs_ordinary_passes_is_told_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    expected = text(model)
    speculating(model, "token_recycling", [])
    target = speculation_of(model).target
    target.use_graphs(2 if case == "size" else 90, lambda _: None)
    said = "graphs are made for up to 2 nodes; passes over more of LlamaForCausalLM run uncompiled"
    if case == "keyword":
        plainly, said = (
            target.open,
            "its forward is given extra, which graphs do not take; the passes .* run uncompiled",
        )

        def with_extra(*args: Any, **kwargs: Any) -> Any:
            context = plainly(*args, **kwargs)
            context.template["extra"] = None
            return context

        monkeypatch.setattr(target, "open", with_extra)
    try:
        with pytest.warns(UserWarning, match=said) as caught:
            assert text(model) == text(model) == expected
        assert len(caught) == 1
    finally:
        specdec.restore(model)


def test_positions_of_three_dimensions_have_a_reason() -> None:
    model = one_layer()
    speculating(model, "none", [])
    context: Any = SimpleNamespace(template={"position_ids": torch.zeros(3, 1, 1)})
    reason = graphs_of(model)._why_not(context, {"attention_mask": None})
    assert reason == "its positions have 3 dimensions, those of graphs have 2"
    specdec.restore(model)


def test_a_draft_model_that_is_on_no_gpu_is_not_captured() -> None:
    leader = Target(model_of("llama"))
    leader.graphs = GraphPasses(leader.model, leader.router, leader.kinds, 8, print, None, lambda run: run)
    follower = Follower(Target(build("llama", seed=1)), leader)
    with pytest.warns(UserWarning, match="drafts on cpu, where there are no CUDA graphs"):
        follower._follow_graphs(3)
    follower._follow_graphs(3)
    assert follower.target.graphs is None


def test_tuning_considers_more_sizes_than_decoding_needs() -> None:
    model = model_of("llama")
    session: Any = SimpleNamespace(
        model=model,
        config={"drafter": "token_recycling"},
        loaded=SimpleNamespace(context_length=None),
        attach=lambda name: attach(model, build_drafter(name), build_verifier("tree_attention"), lambda _: None),
    )
    tuner = TreeTuner(session, [], Plan(max_nodes=64), lambda *_: None)
    try:
        published = len(tuner.published) + 1
        assert tuner.graphs == sorted({1, 4, 8, 12, 16, 24, 32, 48, 64, published})
    finally:
        specdec.restore(model)
