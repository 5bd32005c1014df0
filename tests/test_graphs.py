"""Passes as graphs: the same text, few graphs, ordinary passes where there can be none, and what lies on disk.

The default tests trace graphs but let torch run them operation by operation, which takes seconds instead of minutes and
keeps the arithmetic; one test generates code, for a model of one layer. CUDA graphs are captured by a stand-in that
runs the same function over the same buffers again; the real one is marked ``gpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import specdec
from drafters.draft_model import DraftModel
from specdec.build import build_drafter, build_verifier
from specdec.generation import attach, speculation_of
from specdec.graphs import cuda, passes, store, tracing
from specdec.graphs.buffers import PassShape
from specdec.graphs.constants import Weights, explain
from specdec.graphs.shelf import Shelf
from specdec.routing import FULL, Route
from test_contract import model_of, plain_text, prompts
from zoo import build, untrained

pytestmark = untrained("medusa", "hydra_heads", "kangaroo", "draft_model")

NEW_TOKENS = 24
SLOW = pytest.mark.slow
generate_code = passes.inductor


def interpreted(program: Any, shape: PassShape, _: Any) -> Callable[[list[Tensor]], list[Tensor]]:  # noqa: ARG001
    """Stands in for the compiler: the traced operations, one by one."""
    module = program.module()
    return lambda tensors: module(*tensors)


@pytest.fixture(autouse=True)
def _fresh_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(passes, "inductor", interpreted)
    passes._MADE.clear()
    yield
    passes._MADE.clear()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[PassShape]:
    """What has been traced so far."""
    shapes: list[PassShape] = []
    trace = tracing.trace

    def spy(module: tracing.PassModule, buffers: Any) -> Any:
        shapes.append(module.shape)
        return trace(module, buffers)

    monkeypatch.setattr(passes, "trace", spy)
    return shapes


def speculating(model: Any, drafter: str, told: list[str], **options: Any) -> Any:
    return attach(model, build_drafter(drafter, **options), build_verifier("tree_attention"), told.append)


def graphs_of(model: Any) -> passes.GraphPasses:
    found = speculation_of(model).target.graphs
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        ("llama", 3),
        ("gemma3_text", 3),
        ("gpt2", 1),
        *(pytest.param(*case, marks=SLOW) for case in [("llama", 1), ("gemma3_text", 1), ("gpt2", 3)]),
    ],
)
def test_text_is_that_of_ordinary_passes(family: str, batch: int) -> None:
    model, told = model_of(family), list[str]()
    speculating(model, "token_recycling", told)
    try:
        for _ in range(2):
            text = model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS).tolist()
            assert text == plain_text(family, batch)
        assert graphs_of(model).failures == {}
    finally:
        specdec.restore(model)
    assert [line.split()[0] for line in told] == ["compiling", "compiled"]


@pytest.mark.parametrize(
    ("drafter", "batch", "options"),
    [
        ("early_exit", 1, {"confidence": 0.0}),
        pytest.param("early_exit", 3, {"confidence": 0.0, "width": 3}, marks=SLOW),
        pytest.param("kangaroo", 3, {"confidence": 0.0}, marks=SLOW),
        pytest.param(
            "kangaroo",
            1,
            {"shape": "top_k", "num_draft_tokens": 3, "width": 2, "num_nodes": 6, "confidence": 0.0},
            marks=SLOW,
        ),
        pytest.param("swift", 3, {"confidence": 0.05, "num_draft_tokens": 3, "max_width": 2}, marks=SLOW),
    ],
)
def test_drafts_with_a_part_of_the_target_are_graphs_too(
    drafter: str, batch: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, traced: list[PassShape]
) -> None:
    monkeypatch.setattr(passes, "RECURS", 1)
    model, told = model_of("llama"), list[str]()
    speculating(model, drafter, told, **options)
    try:
        text = model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS).tolist()
        known = len(traced)
        again = model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS).tolist()
        assert graphs_of(model).failures == {}
    finally:
        specdec.restore(model)
    assert text == again == plain_text("llama", batch)
    assert len(traced) == known, "graphs are made once"
    drafts = [shape for shape in traced if not shape.route.is_full]
    assert any(shape.nodes == 1 for shape in drafts)
    if drafter != "swift":
        assert any(shape.enters for shape in drafts)
        assert any(shape.taps for shape in drafts)


def test_a_route_that_does_not_recur_gets_no_graph(traced: list[PassShape]) -> None:
    model = model_of("llama")
    speculating(model, "early_exit", [], num_draft_tokens=1, confidence=0.0)
    try:
        model.generate(**prompts(1), max_new_tokens=6)
    finally:
        specdec.restore(model)
    assert all(shape.route.is_full for shape in traced)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=SLOW), 2])
def test_growing_texts_and_slabs_make_no_other_graph(batch: int, traced: list[PassShape]) -> None:
    model, told = model_of("llama"), list[str]()
    speculating(model, "prompt_lookup", told, num_draft_tokens=19)
    capacities, steps = set[int](), 0
    handle = speculation_of(model)
    handle.observers.append(lambda state, _: capacities.add(state.context.cache.capacity) if state.context else None)
    try:
        for seed, new_tokens in ((5, 120), (6, 30), (7, 180)):
            model.generate(**prompts(batch, seed), max_new_tokens=new_tokens, eos_token_id=None)
            steps += handle.last.passes
        with_more_slots = handle.target.open
        handle.target.open = lambda *args, **kwargs: _cramped(with_more_slots(*args, **kwargs))  # type: ignore[method-assign]
        model.generate(**prompts(batch, 8), max_new_tokens=150, eos_token_id=None)
    finally:
        specdec.restore(model)
    assert steps > 100
    assert len(capacities) > 2
    assert {shape.nodes for shape in traced} <= {1, 8, 20}
    assert len(set(traced)) == len(traced), "each is made once"
    assert len(told) == 2 * len(traced)


def _cramped(context: Any) -> Any:
    """A request whose slabs have to grow on the way."""
    cache = context.cache
    cache.capacity = 128  # of which 64 are usable
    for slab in cache._slabs:
        slab.storage = slab.storage[:, :, :, :128].contiguous()
    for layer in cache.layers:
        layer.refresh()
    return context


def test_a_compiler_that_fails_leaves_ordinary_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nand details")

    model = model_of("llama")
    monkeypatch.setattr(passes, "inductor", broken)
    specdec.speculate(model, "token_recycling", compile=True)
    try:
        with pytest.warns(UserWarning, match="no compiler here; the passes of .* run uncompiled") as caught:
            text = model.generate(**prompts(1), max_new_tokens=NEW_TOKENS).tolist()
        assert len(caught) == 1
        assert text == plain_text("llama", 1)
    finally:
        specdec.restore(model)


def test_a_part_that_does_not_compile_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def partly(program: Any, shape: PassShape, keep: Any) -> Any:
        if shape.enters:
            raise RuntimeError("no states here")
        return interpreted(program, shape, keep)

    model, told = model_of("llama"), list[str]()
    monkeypatch.setattr(passes, "inductor", partly)
    monkeypatch.setattr(passes, "RECURS", 1)
    speculating(model, "early_exit", told, confidence=0.0)
    try:
        with pytest.warns(UserWarning, match="no states here; passes over a part .*lo=1.* run uncompiled") as caught:
            text = model.generate(**prompts(1), max_new_tokens=NEW_TOKENS).tolist()
        assert len(caught) == 1
        assert text == plain_text("llama", 1)
    finally:
        specdec.restore(model)
    assert any(line.startswith("compiled") for line in told)


def test_what_a_graph_does_not_return_comes_from_ordinary_passes() -> None:
    model, told = model_of("llama"), list[str]()
    options: dict[str, Any] = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_hidden_states": True}
    plain = model.generate(**prompts(1), **options)
    speculating(model, "token_recycling", told)
    try:
        with pytest.warns(UserWarning, match="do not return what output_hidden_states asks for; .* run uncompiled"):
            got = model.generate(**prompts(1), **options)
        assert got.sequences.tolist() == plain.sequences.tolist()
        assert len(got.hidden_states) == len(plain.hidden_states)
        assert told == []
        model.generate(**prompts(1), max_new_tokens=8)
        assert told, "transformers' own hooks stay, and do nothing unless asked"
    finally:
        specdec.restore(model)


def test_changed_weights_make_new_graphs_and_hooks_ordinary_passes() -> None:
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
        hook = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].flip(-1),))
        with pytest.warns(UserWarning, match=r"Linear 'lm_head' has a forward hook .* run uncompiled") as caught:
            hooked = [model.generate(**prompts(1), max_new_tokens=8).tolist() for _ in range(2)]
        assert len(caught) == 1
        assert len(told) == 4
    finally:
        specdec.restore(model)
    assert hooked == [model.generate(**prompts(1), max_new_tokens=8).tolist()] * 2
    hook.remove()
    assert changed == model.generate(**prompts(1), max_new_tokens=8).tolist()


def test_a_model_is_let_go() -> None:
    import gc

    model = build("llama")
    speculating(model, "none", [])
    model.generate(**prompts(1), max_new_tokens=4)
    specdec.restore(model)
    del model
    gc.collect()
    assert len(passes._MADE) == 0


def one_layer(seed: int = 0, **changes: Any) -> Any:
    settings: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model("llama", **(settings | {"initializer_range": 0.5} | changes))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def test_generated_code_lies_on_disk_for_any_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(passes, "inductor", generate_code)
    known: list[str] = []
    for seed in (0, 0, 1):  # made, loaded, loaded for other weights
        model, told = one_layer(seed=seed), list[str]()
        plain = model.generate(**prompts(1), max_new_tokens=NEW_TOKENS).tolist()
        passes._MADE.clear()
        speculating(model, "none", told)
        assert model.generate(**prompts(1), max_new_tokens=NEW_TOKENS).tolist() == plain
        assert graphs_of(model).failures == {}
        known.append(told[-1].split()[0])
    assert known == ["compiled", "loaded", "loaded"]
    (entry,) = (tmp_path / "graphs").iterdir()
    assert {path.name for path in entry.iterdir()} == {"graph.pt2", "constants.json"}
    inputs = prompts(1)
    logits = {}
    for compiled in (True, False):
        speculating(model, "none", []) if compiled else specdec.speculate(model, "none")
        options: dict[str, Any] = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
        logits[compiled] = torch.stack(model.generate(**inputs, **options).logits)
        specdec.restore(model)
    assert (logits[True] - logits[False]).abs().max() < 1e-4


def test_a_key_tells_models_apart() -> None:
    model = one_layer()
    mine = store.identity(model, None)
    assert mine is not None
    assert store.identity(one_layer(), None) == mine
    assert store.identity(one_layer(seed=1), None) == mine, "weights are given at load"
    others = [one_layer(rms_norm_eps=1e-3), one_layer(num_hidden_layers=2), one_layer(hidden_act="gelu")]
    others += [one_layer().to(torch.bfloat16), one_layer(attn_implementation="eager")]
    found = [store.identity(other, None) for other in others] + [store.identity(model, ["full_attention"])]
    assert len({mine, *found}) == 1 + len(found)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert store.identity(model, None) is None, "what a hook does is unknown"


def test_a_key_tells_passes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    kept = store.Store("model", Weights(model))
    route = Route
    shapes = [
        PassShape(1, 8, route()),
        PassShape(2, 8, route()),
        PassShape(None, 8, route()),
        PassShape(1, 9, route()),
        PassShape(1, 8, route(hi=1)),
    ]
    shapes += [PassShape(1, 8, route(lo=1)), PassShape(1, 8, route(), ("final",)), PassShape(1, 8, route(), (0,))]
    shapes += [PassShape(1, 8, route(skip_mlp=frozenset({1}))), PassShape(1, 8, route(skip_attention=frozenset({1})))]
    shapes += [PassShape(1, 8, route(logits=False), (1,)), PassShape(1, 8, route(), attention="sdpa")]
    shapes += [PassShape(1, 8, route(), words=words) for words in (1, 2)]
    shapes += [PassShape(1, 8, route(), cache=(torch.bfloat16,)), PassShape(1, 8, route(), autocast=torch.bfloat16)]
    places = [kept._place(shape) for shape in shapes]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    places.append(kept._place(shapes[0]))
    assert len(set(places)) == len(places)


def test_a_graph_that_cannot_be_read_is_thrown_away() -> None:
    kept, shape = store.Store("model", Weights(one_layer())), PassShape(1, 8, FULL)
    assert kept.load(shape) is None
    place = kept._place(shape)
    assert place is not None
    place.mkdir(parents=True)
    (place / "graph.pt2").write_bytes(b"half a file")
    (place / "constants.json").write_text("{}", encoding="utf-8")
    assert kept.load(shape) is None
    assert not place.exists()


def test_constants_are_recipes_or_kept() -> None:
    weight, other = torch.randn(8, 16), torch.randn(16, 8)
    named = {"weight": weight, "other": other, "twin": other.clone(), "norm": torch.ones(4)}
    pack = torch.ops.mkldnn._reorder_linear_weight
    constants = {
        "a": pack(weight, 4),
        "b": pack(weight.t().contiguous(), 4),
        "c": pack(other, 4),
        "d": torch.ones(4) / 2,
    }
    recipes, kept = explain(constants, ["norm", *constants], named)
    assert recipes["norm"] == {"of": "norm", "packed": False, "transposed": False}
    assert recipes["a"] == {"of": "weight", "packed": True, "transposed": False}
    assert recipes["b"] == {"of": "weight", "packed": True, "transposed": True}
    assert recipes["c"]["of"] is None, "two tensors are equal today and need not be tomorrow"
    assert set(kept) == {"c", "d"}
    module = torch.nn.Module()
    for name, value in named.items():
        module.register_buffer(name, value)
    made = Weights(module).made(recipes, kept)
    x = torch.randn(3, 16)
    linear = torch.ops.mkldnn._linear_pointwise
    for name, dense in (("a", weight), ("c", other)):
        y = x if name == "a" else torch.randn(3, 8)
        torch.testing.assert_close(linear(y, made[name], None, "none", [], ""), y @ dense.t())
    assert made["norm"] is module.norm


class Captured:
    """Stands in for CUDA graphs: the outputs stay where they are, and are written over."""

    def __init__(self) -> None:
        self.graphs, self.replays = list[Any](), 0

    def __call__(self, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        outputs = [output.clone() for output in run()]
        self.graphs.append(outputs)

        def replay() -> list[Tensor]:
            self.replays += 1
            for mine, new in zip(outputs, run(), strict=True):
                mine.copy_(new)
            return outputs

        return replay


def capturing(model: Any, drafter: str) -> tuple[Captured, Any]:
    """A model whose passes are captured, and its target."""
    captured = Captured()
    specdec.speculate(model, drafter)
    handle = speculation_of(model)
    target, needs = handle.target, handle.drafter.needs.max_nodes
    target.graphs = passes.GraphPasses(model, target.router, target.kinds, needs, print, None, captured)
    return captured, target


@pytest.mark.parametrize("drafter", ["token_recycling", "early_exit"])
def test_capture_over_fixed_buffers(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "RECURS", 1)
    model = model_of("llama")
    captured, target = capturing(model, drafter)
    try:
        for batch in (1, 3):
            text = model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS).tolist()
            assert text == plain_text("llama", batch)
        assert target.graphs.failures == {}
    finally:
        specdec.restore(model)
    assert 0 < len(captured.graphs) <= 10
    assert captured.replays > len(captured.graphs)


def test_the_next_request_has_what_was_captured() -> None:
    model = model_of("llama")
    expected = {(batch, new): plain(model, batch, new) for batch, new in ((1, 24), (1, 9), (3, 24), (1, 300))}
    captured, target = capturing(model, "token_recycling")
    made = []
    try:
        for batch, new in [(1, 24), (1, 24), (1, 9), (3, 24), (1, 24), (3, 24), (1, 300), (1, 24)]:
            text = model.generate(**prompts(batch), max_new_tokens=new).tolist()
            assert text == expected[batch, new]
            made.append(len(captured.graphs))
            for kept in target.graphs.shelf._kept:  # what a request leaves behind must not show
                for layer in kept.cache.layers:
                    layer.keys.fill_(float("nan"))
                    layer.values.fill_(float("nan"))
        assert target.graphs.failures == {}
        first = made[0]
        assert made[:3] == [first] * 3, "the same slabs, the same graphs"
        assert made[3] > first, "three rows are other slabs"
        assert made[4:6] == [made[3]] * 2, "two are kept"
        assert made[6] > made[5], "a long request needs longer ones"
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(0)  # another version of the weights
        model.generate(**prompts(1), max_new_tokens=24)
        assert len(captured.graphs) > made[-1], "what was captured of a model that has changed holds no more"
    finally:
        specdec.restore(model)


def prefilled(rows: int, tokens: int) -> DynamicCache:
    """Two layers of ones."""
    made = DynamicCache()
    for layer in range(2):
        made.update(torch.ones(rows, 2, tokens, 4), torch.ones(rows, 2, tokens, 4), layer)
    return made


def test_requests_within_inference_mode_leave_slabs_for_those_outside() -> None:
    model = model_of("llama")
    expected = {new: plain(model, 1, new) for new in (NEW_TOKENS, 300)}
    captured, target = capturing(model, "token_recycling")
    try:
        for within, new in [(True, NEW_TOKENS), (False, NEW_TOKENS), (True, 300), (False, 300), (True, 300)]:
            with torch.inference_mode(within):
                assert model.generate(**prompts(1), max_new_tokens=new).tolist() == expected[new]
        assert target.graphs.failures == {}
        assert target.kept_bytes > 0
        assert captured.replays > 3 * len(captured.graphs)
    finally:
        specdec.restore(model)


def test_slabs_that_grow_within_a_request_are_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    expected = plain(model, 1, 200)
    captured, target = capturing(model, "token_recycling")
    open_ = target.open
    monkeypatch.setattr(target, "open", lambda ids, out, given, _, release: open_(ids, out, given, 40, release))
    try:
        for _ in range(3):
            captured.graphs.clear()
            assert model.generate(**prompts(1), max_new_tokens=200).tolist() == expected
            assert len(captured.graphs) > len(target.graphs._views), "what was captured before they grew is lost"
        assert target.graphs.failures == {}
    finally:
        specdec.restore(model)


def test_slabs_in_use_are_nobody_elses() -> None:
    shelf = Shelf()
    first, lease = shelf.take(prefilled(1, 8), None, 40, release=False)
    second, other = shelf.take(prefilled(1, 8), None, 40, release=False)
    third, more = shelf.take(prefilled(1, 8), None, 40, release=False)
    assert len({id(cache) for cache in (first, second, third)}) == 3
    shelf.views(first)["some"] = "captured"
    shelf.views(third)["some"] = "lost: two are kept"
    assert (len(shelf.views(first)), len(shelf.views(third))) == (1, 0)
    del lease
    mask = torch.tensor([[False] * 2 + [True] * 3])
    again, lease = shelf.take(prefilled(1, 5), mask, 30, release=False)
    assert again is first
    assert shelf.views(again) == {"some": "captured"}
    assert again.padding == [2]
    assert torch.equal(again.layers[0].keys[0, 0, :, 0], torch.tensor([1.0] * 3 + [0.0] * (again.capacity - 3)))
    again.reserve(4 * again.capacity)
    assert shelf.views(again) == {}, "the slabs have grown"
    del lease, other
    assert shelf.take(prefilled(1, 5), None, 30, release=False)[0] is second, "the other is too long by now"
    assert shelf.take(prefilled(2, 5), None, 30, release=False)[0] not in (first, second)
    del more


def plain(model: Any, batch: int, new_tokens: int) -> list[list[int]]:
    """What the model itself says."""
    return model.generate(**prompts(batch), max_new_tokens=new_tokens).tolist()


def test_cuda_graphs_need_cuda() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="need a target on a CUDA device, this one is on cpu; use compile=true"):
        specdec.speculate(model, "token_recycling", cuda_graphs=True)
    specdec.restore(model)


@pytest.mark.gpu
@pytest.mark.parametrize("drafter", ["token_recycling", "early_exit", "swift"])
@pytest.mark.parametrize("batch", [1, 3])
def test_cuda_graphs(drafter: str, batch: int) -> None:
    model = build("llama").to("cuda")
    inputs = {name: value.to("cuda") for name, value in prompts(batch).items()}
    plain = model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist()
    specdec.speculate(model, drafter, cuda_graphs=True)
    for _ in range(2):
        assert model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist() == plain
    assert graphs_of(model).failures == {}
    assert isinstance(graphs_of(model).capture, cuda.CudaGraphs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_generated_code(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "inductor", generate_code)
    test_text_is_that_of_ordinary_passes(family, 3)


@SLOW
def test_a_draft_model_follows_in_graphs_of_its_own(traced: list[PassShape]) -> None:
    model, inputs = model_of("llama"), prompts(2)
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist()
    drafter: Any = DraftModel(build("llama", seed=1), width=3, depth=3, num_nodes=8)
    specdec.speculate(model, drafter, compile=True)
    try:
        assert model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist() == expected
        own = drafter.follower.target.graphs
        assert own is not None
        assert not own.failures
        assert own.buckets == [1, 4]
        assert {shape.nodes for shape in traced} >= {4, 9}, "levels of the draft, trees of the target"
    finally:
        specdec.restore(model)
    specdec.speculate(model, drafter)
    try:
        assert model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist() == expected
        assert drafter.follower.target.graphs is None
    finally:
        specdec.restore(model)
