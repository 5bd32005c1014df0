"""Kangaroo: the lower layers read a drafted token once, the adapter's K/V are those of the text, whatever it says.

Shapes: B rows, N nodes, k drafted tokens, E exit layer, L layers, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM

import specdec
from drafters import kangaroo
from drafters.causal_layer import GrowingRows
from drafters.kangaroo import Kangaroo
from drafters.kangaroo_adapter import Adapter, AdapterLesson
from drafters.kangaroo_tree import ExpandedTree
from drafters.suffix_automaton import SamDecoding
from equality import tiny_llama
from specdec.decoding import Step
from specdec.interfaces import DecodeState
from specdec.learning import Lesson, Trainable
from specdec.loading import demo_target
from specdec.routing import Route
from specdec.target import Target
from specdec.training.objectives import wanted_ahead
from specdec.tree import PADDING, TokenTree
from sublayers import Call, counting
from zoo import HIDDEN, VOCAB, build, prompts, untrained

pytestmark = untrained("kangaroo")

LAYERS, NEW_TOKENS, E = 4, 18, 2
CLOSE = 1e-4
TREE: dict[str, Any] = {"shape": "top_k", "width": 3, "num_nodes": 9}
CHAIN: dict[str, Any] = {"shape": "chain"}
SHAPES = [pytest.param(CHAIN, id="chain"), pytest.param(TREE, id="tree")]


def text_of(model: Any, batch: int, **options: Any) -> Any:
    ids, mask = prompts(batch)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **settings)


def bound(model: Any, **options: Any) -> Kangaroo:
    """A drafter of three tokens that speculates for ``model``."""
    drafter = Kangaroo(**({"num_draft_tokens": 3, "confidence": 0.0} | options))
    specdec.speculate(model, drafter)
    return drafter


def adapter_of(drafter: Kangaroo) -> Adapter:
    assert drafter.adapter is not None
    return drafter.adapter


class Traced(Kangaroo):
    """Marks in the list of calls where a proposal is complete, and keeps the trees and what each row may emit."""

    def __init__(self, calls: list[Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[Any] = [] if calls is None else calls
        self.trees: list[TokenTree] = []
        self.budgets: list[list[int]] = []
        self.adapted: list[Tensor] = []

    def propose(self, state: DecodeState) -> TokenTree:
        assert state.context is not None
        self.calls.append("propose")
        self.budgets.append([max(left - 1, 0) for left in state.context.budgets])
        self.trees.append(super().propose(state))
        self.calls.append("verify")
        return self.trees[-1]

    def _logits(self, *args: Any) -> Tensor:
        logits = super()._logits(*args)
        self.adapted.append(logits)
        return logits


@torch.no_grad()
def transparent(model: Any, drafter: Kangaroo) -> None:
    """Layers from E on add nothing, and the adapter only norms, as the model does: every draft is right."""
    adapter = adapter_of(drafter)
    for layer in model.model.layers[E:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    adapter.self_attn.o_proj.weight.zero_()
    adapter.norm.weight.copy_(model.model.norm.weight)


def sharpen(drafter: Kangaroo, scale: float = 0.3) -> None:
    """An adapter whose attention matters."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter_of(drafter).self_attn.parameters():
        parameter.normal_(0.0, scale, generator=generator)


def test_parameters_are_four_squares_and_two_norms() -> None:
    for hidden, heads in ((64, 4), (256, 8)):
        assert sum(p.numel() for p in Adapter(hidden, heads).parameters()) == 4 * hidden**2 + 2 * hidden
    assert 4 * 4096**2 + 2 * 4096 == 67_117_056, "as published for a base of 7 B"
    model = build("llama")
    drafter = bound(model)
    assert adapter_of(drafter).heads == 4, "the base's heads"
    assert {p.dtype for p in adapter_of(drafter).parameters()} == {torch.float32}
    assert drafter._target is not None
    assert drafter._target.router.head.weight is model.lm_head.weight
    assert isinstance(drafter, Trainable)
    lesson: Lesson = drafter.lesson(drafter._target)
    assert lesson.taps == (E, "final")
    assert {id(p) for p in lesson.parameters()} == {id(p) for p in adapter_of(drafter).parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_layer_reads_a_node_twice(shape: dict[str, Any], batch: int) -> None:
    model = build("llama")
    with counting(model) as calls:
        drafter = Traced(num_draft_tokens=3, confidence=0.0, **shape)
        specdec.speculate(model, drafter)
        calls.clear()
        drafter.calls = calls
        text_of(model, batch)
    marks = [i for i, call in enumerate(calls) if call in ("propose", "verify")]
    sections = [calls[a + 1 : b] for a, b in zip(marks, [*marks[1:], len(calls)], strict=True)]
    assert len(sections) == 2 * len(drafter.trees)
    for tree, draft, verify in zip(drafter.trees, sections[::2], sections[1::2], strict=True):
        nodes, depth = tree.num_nodes, tree.topology.max_depth
        if depth == 0:
            assert not draft
            continue
        run = [1] + [1 if shape is CHAIN else TREE["width"]] * (depth - 1)
        passes = [*run, nodes - sum(run)]
        low, high = (
            Counter(Call(layer, part, n) for n in ns for layer in layers for part in ("attention", "mlp"))
            for ns, layers in ((passes, range(E)), ([nodes], range(E, LAYERS)))
        )
        assert Counter(draft) == low
        assert Counter(verify) == high
    assert {tree.num_nodes for tree in drafter.trees} >= {4 if shape is CHAIN else 10}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"exit_layer": 1, "confidence": 0.5},
        {"exit_layer": 3, "num_draft_tokens": 5},
        {"exit_layer": 1, "num_draft_tokens": 1, **TREE},
        {"exit_layer": 2, "confidence": 0.3, "num_draft_tokens": 3, **TREE},
        {"exit_layer": 3, "confidence": 0.0, "num_draft_tokens": 4, **TREE, "num_nodes": 16},
    ],
)
def test_text_does_not_depend_on_the_settings(family: str, options: dict[str, Any]) -> None:
    model = build(family)
    expected = text_of(model, 3)
    drafter = Traced(**options)
    specdec.speculate(model, drafter)
    sharpen(drafter)
    assert text_of(model, 3).tolist() == expected.tolist()
    for tree, budgets in zip(drafter.trees, drafter.budgets, strict=True):
        tree.check()
        assert tree.topology.max_depth <= max(budgets)
        assert tree.num_nodes <= drafter.needs.max_nodes
    padded = [tree.role is not None and bool((tree.role == PADDING).any()) for tree in drafter.trees]
    assert any(padded) or not options.get("confidence", 1), "rows stop at different depths"


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_text_is_that_of_plain_decoding(shape: dict[str, Any]) -> None:
    model = build("llama")
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 8}
    texts = []
    for drafter in ("none", Kangaroo(num_draft_tokens=3, confidence=0.2, **shape)):
        specdec.speculate(model, drafter)
        torch.manual_seed(3)
        texts.append(text_of(model, 3, **settings).tolist())
        specdec.restore(model)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_transparent_adapter_is_always_right(shape: dict[str, Any], k: int) -> None:
    model = build("llama")
    model.lm_head.weight.data *= 4  # so sure that the likeliest tokens make the likeliest path
    drafter = bound(model, num_draft_tokens=k, **(shape | {"num_nodes": 14}))
    transparent(model, drafter)
    specdec.restore(model)
    length = 1 + 4 * (k + 1)
    expected = text_of(model, 2, max_new_tokens=length)
    specdec.speculate(model, drafter)
    assert text_of(model, 2, max_new_tokens=length).tolist() == expected.tolist()
    assert model.speculation.passes == 4
    assert model.speculation.mean_accepted_tokens == k + 1


@pytest.mark.parametrize(("confidence", "drafted"), [(0.0, 5), (1.1, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_confidence_bounds_the_draft(shape: dict[str, Any], confidence: float, drafted: int) -> None:
    model = build("llama")
    drafter = Traced(num_draft_tokens=5, confidence=confidence, **(shape | {"num_nodes": 15}))
    specdec.speculate(model, drafter)
    text_of(model, 1)
    assert [tree.topology.max_depth for tree in drafter.trees] == [
        min(drafted, budgets[0]) for budgets in drafter.budgets
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_adapter_keeps_the_text_and_no_draft(shape: dict[str, Any], right: bool, batch: int) -> None:
    model = build("llama")
    drafter = Traced(num_draft_tokens=3, confidence=0.0, **shape)
    specdec.speculate(model, drafter)
    sharpen(drafter)
    if right:  # accepted paths, among them whole ones, whose last state the adapter has not seen while drafting
        transparent(model, drafter)
    adapter, compared, lengths = adapter_of(drafter), [], set()

    @torch.inference_mode()
    def look(state: DecodeState, step: Step) -> None:
        if step.tree is None or state.context is None:
            return
        rows = drafter._rows
        assert rows is not None
        assert rows.lengths == state.context.lengths
        first = [logits for logits in drafter.adapted if logits.shape[1] == 1][:1]
        drafter.adapted.clear()
        for row, length in enumerate(rows.lengths):
            states = exit_states(model, state.history.row(row)[:length].tolist())
            fresh = GrowingRows(1, adapter.self_attn)
            adapter.read(states, [length], fresh)
            for ours, theirs in ((rows._keys, fresh._keys), (rows._values, fresh._values)):
                torch.testing.assert_close(ours[row, :, :length], theirs[0, :, :length], atol=CLOSE, rtol=CLOSE)
            if first and step.verification.path[row]:
                before = length - len(step.verification.path[row]) + 1  # what the draft's first step could see
                whole = uncached(adapter, states[:, :before])
                torch.testing.assert_close(first[0][row], model.lm_head(whole)[0, -1:], atol=1e-3, rtol=1e-3)
                compared.append(row)
                lengths.add(len(step.verification.path[row]))

    specdec.speculation_of(model).observers.append(look)
    text_of(model, batch)
    assert set(compared) == set(range(batch))
    assert not right or max(lengths) == 4, "the last drafted token was accepted as well"
    assert drafter._rows is None, "the request is over"


def exit_states(model: Any, tokens: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states[E]


def uncached(adapter: Adapter, states: Tensor) -> Tensor:
    """The adapter over a whole text at once."""
    positions = torch.arange(states.shape[1])[None]
    return adapter(states, positions, (positions[..., None] >= positions[:, None])[:, None])


@pytest.mark.parametrize("shape", SHAPES)
def test_verification_from_the_exit_equals_an_unbroken_pass(shape: dict[str, Any]) -> None:
    model = build("gemma3_text")
    bound(model, **shape)
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
        torch.testing.assert_close(split, whole, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_caller_who_wants_hidden_states_gets_all_layers(shape: dict[str, Any]) -> None:
    model = build("llama")
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    expected = text_of(model, 1, **wanted)
    bound(model, **shape)
    got = text_of(model, 1, **wanted)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert len(got.hidden_states) == len(expected.hidden_states)
    for ours, plain in zip(got.hidden_states, expected.hidden_states, strict=True):
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("hidden_states", [False, True])
def test_beside_a_drafter_that_takes_some_rows(hidden_states: bool) -> None:
    model = build("llama")
    expected = text_of(model, 3, max_new_tokens=30)
    inner = Kangaroo(num_draft_tokens=3, confidence=0.0)
    specdec.speculate(model, SamDecoding(auxiliary=inner, auxiliary_below=2))
    seen = Counter[tuple[str, ...]]()

    def look(state: DecodeState, step: Step) -> None:
        if step.tree is not None and state.context is not None:
            seen[step.tree.sources] += 1
            assert inner._rows is not None
            assert inner._rows.lengths == state.context.lengths

    specdec.speculation_of(model).observers.append(look)
    options = {"return_dict_in_generate": True, "output_hidden_states": True} if hidden_states else {}
    text = text_of(model, 3, max_new_tokens=30, **options)
    assert (text.sequences if hidden_states else text).tolist() == expected.tolist()
    assert seen[("kangaroo",)]
    assert not hidden_states or seen[("suffix_automaton", "kangaroo")], "trees without an entry share a pass"


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_without_ids_and_continued_ones(shape: dict[str, Any]) -> None:
    model = build("llama")
    ids, mask = prompts(3)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "attention_mask": mask}
    first = model.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
    longer = {"input_ids": first.sequences, "attention_mask": torch.cat([mask, torch.ones(3, 4).long()], dim=1)}
    expected = [model.generate(**inputs, **settings).tolist() for inputs in (embedded, longer)]
    bound(model, **shape)
    assert model.generate(**embedded, **settings).tolist() == expected[0]
    assert model.generate(**longer, **settings, past_key_values=first.past_key_values).tolist() == expected[1]


def test_half_precision_follows_the_target() -> None:
    model = build("llama").to(torch.bfloat16)
    for shape in (CHAIN, TREE):
        drafter = bound(model, **shape)
        assert {p.dtype for p in adapter_of(drafter).parameters()} == {torch.bfloat16}
        text_of(model, 3)
        assert model.speculation.mean_accepted_tokens >= 1
        specdec.restore(model)


def test_round_cost_is_the_formula() -> None:
    model = build("llama")
    drafter = bound(model)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head, adapter = VOCAB * HIDDEN, 4 * HIDDEN**2 + 2 * HIDDEN
    plain = LAYERS * layer + head
    for k in (1, 6):
        ours = ((k * E + LAYERS) * layer + (k + 1) * head + k * adapter) / plain
        assert drafter.round_cost(k) == pytest.approx(ours)


# ---- the tree


def plain_tree(table: Tensor, shape: ExpandedTree, depth: int) -> set[tuple[int, ...]]:
    """The definition: paths of tokens in the tree of a draft that looks at the last token only (row of ``table``)."""
    q = table.log_softmax(-1)
    scored: dict[tuple[int, ...], float] = {}
    beam: list[tuple[int, ...]] = [()]
    expanded: list[tuple[int, ...]] = []
    for level in range(depth):
        reached = {}
        for path in beam:
            last = path[-1] if path else 0
            for token in q[last].topk(shape.width).indices.tolist():
                reached[(*path, token)] = scored.get(path, 0.0) + float(q[last, token])
        scored |= reached
        if level < depth - 1:
            beam = sorted(reached, key=lambda path: -reached[path])[: shape.width]
            expanded += beam
    rest = sorted(scored.keys() - set(expanded), key=lambda path: -scored[path])
    return {*expanded, *rest[: shape.num_nodes - len(expanded)]}


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_tree_is_that_of_its_definition(depth: int) -> None:
    tables = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(depth)) * 2
    shape = ExpandedTree(4, 3, 12)
    widths = []

    def scores(tree: TokenTree, nodes: slice) -> Tensor:
        widths.append(nodes.stop - nodes.start)
        assert nodes.stop == tree.num_nodes
        tokens = tree.token_ids[:, nodes]
        return tables.gather(1, tokens[..., None].expand(-1, -1, 12))

    tree, count = shape.grow(torch.zeros(2, dtype=torch.int64), scores, depth, 0.0, [True, True])
    assert widths == [1] + [3] * (depth - 1)
    assert count == sum(widths)
    tree.check()
    for row in range(2):
        paths = tree.topology.paths[row].tolist()
        ours = {tuple(int(tree.token_ids[row, n]) for n in path[1:] if n >= 0) for path in paths} - {()}
        assert ours == plain_tree(tables[row], shape, depth)
        assert all(int(above) < count for above in tree.parents[row]), "what was not run has no children"


def test_rows_of_a_tree_stop_by_themselves() -> None:
    table = torch.full((9, 9), -8.0)
    table[0, 1], table[1, 2], table[2, 3] = 8.0, 8.0, 8.0  # from 0 on it is sure of 1, 2, 3
    table[4, 5:8] = 8.0  # after 4 it is not

    def scores(tree: TokenTree, nodes: slice) -> Tensor:
        return table[tree.token_ids[:, nodes]]

    shape = ExpandedTree(4, 2, 12)
    tree, _ = shape.grow(torch.tensor([0, 4, 0]), scores, 4, 0.5, [True, True, False])
    tree.check()
    assert tree.role is not None
    alive = tree.role != PADDING
    depths = tree.topology.depths.masked_fill(~alive, 0)
    assert depths.amax(1).tolist() == [4, 1, 0]
    assert alive.sum(1).tolist() == [13, 3, 1]
    tree, count = shape.grow(torch.tensor([4, 4, 4]), scores, 4, 0.5, [True, True, True])
    assert (tree.num_nodes, count) == (3, 1)


def test_rows_keep_scattered_states_in_order() -> None:
    adapter = Adapter(8, 2)
    rows = GrowingRows(2, adapter.self_attn, reserve=4)
    rows.lengths = [1, 3]
    rows.begin(5)
    states = torch.arange(2 * 2 * 5 * 4.0).view(2, 2, 5, 4)
    rows.write(states, -states)
    rows.keep([[0, 2, 4], [1]])
    assert rows.lengths == [4, 4]
    assert torch.equal(rows._keys[0, :, 1:4], states[0][:, [0, 2, 4]])
    assert torch.equal(rows._values[1, :, 3:4], -states[1][:, [1]])


# ---- weights on disk


@pytest.mark.parametrize("layout", ["specdec", "kangaroo"])
def test_what_was_saved_is_found_again(layout: str, tmp_path: Path) -> None:
    model = build("llama")
    drafter = bound(model, exit_layer=3)
    sharpen(drafter)
    drafter.save(tmp_path / "adapter", layout)
    expected = [tree.token_ids.tolist() for tree in traced(model, path=None, exit_layer=3, like=drafter)]
    again = Kangaroo(path=str(tmp_path / "adapter"))
    specdec.restore(model)
    specdec.speculate(model, again)
    assert again.needs.taps == (3,), "the checkpoint knows its layer"
    for ours, theirs in zip(adapter_of(again).parameters(), adapter_of(drafter).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    specdec.restore(model)
    assert [tree.token_ids.tolist() for tree in traced(model, path=str(tmp_path / "adapter"))] == expected


def test_the_demo_target_finds_its_own_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo_target("bfloat16").model
    monkeypatch.setattr(kangaroo, "DEMO_ADAPTER", tmp_path / "none")
    fresh, other = bound(model), bound(model, seed=1)
    other.save(tmp_path / "shipped")
    monkeypatch.setattr(kangaroo, "DEMO_ADAPTER", tmp_path / "shipped")
    found = bound(model)
    ours, theirs, random = (adapter_of(d).self_attn.q_proj.weight for d in (found, other, fresh))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, random)
    specdec.restore(model)
    elsewhere = build("llama")
    specdec.speculate(elsewhere, found)
    assert adapter_of(found).norm.weight.shape == (HIDDEN,), "other targets get a random one"


def traced(model: Any, like: Kangaroo | None = None, **options: Any) -> list[TokenTree]:
    specdec.restore(model)
    drafter = Traced(**({"num_draft_tokens": 3, "confidence": 0.0} | options))
    specdec.speculate(model, drafter)
    if like is not None:
        adapter_of(drafter).load_state_dict(adapter_of(like).state_dict())
    text_of(model, 1)
    return drafter.trees


def published(folder: Path, extra: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A checkpoint with the authors' names and config, without their weights."""
    generator = torch.Generator().manual_seed(2)
    weights = {
        f"layers.0.self_attn.{name}_proj.weight": torch.randn(HIDDEN, HIDDEN, generator=generator) for name in "qkvo"
    }
    weights |= {
        name: torch.rand(HIDDEN, generator=generator) for name in ("norm.weight", "layers.0.input_layernorm.weight")
    }
    folder.mkdir(exist_ok=True)
    torch.save(weights | extra, folder / "pytorch_model.bin")
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCAB}
    base |= {"num_attention_heads": 8, "num_hidden_layers": 1, "intermediate_size": 48, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(base | (config or {})))
    return folder


def test_the_authors_layout(tmp_path: Path) -> None:
    frequencies = {"layers.0.self_attn.rotary_emb.inv_freq": torch.rand(2)}
    folder = published(tmp_path, frequencies)
    model = build("llama")
    expected = text_of(model, 1)
    with pytest.warns(
        UserWarning, match="does not say behind which layer .* from exit_layer=2. If .* set exit_layer=E"
    ):
        drafter = bound(model, path=str(folder))
    adapter = adapter_of(drafter)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert torch.equal(adapter.self_attn.o_proj.weight, weights["layers.0.self_attn.o_proj.weight"])
    assert torch.equal(adapter.norm.weight, weights["norm.weight"])
    assert (adapter.heads, adapter.norm.eps, drafter.needs.taps) == (8, 1e-5, (2,))
    assert drafter.ignored == [f"{next(iter(frequencies))} (rotary frequencies follow from the config)"]
    assert text_of(model, 1).tolist() == expected.tolist()
    assert bound(model, path=str(folder), exit_layer=1).needs.taps == (1,), "named by the user: nothing to warn of"
    drafter.save(tmp_path / "again", "kangaroo")
    written = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert written.keys() == weights.keys() - frequencies.keys()
    assert all(torch.equal(written[name], weights[name]) for name in written)
    config = LlamaConfig.from_pretrained(tmp_path / "again")
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (HIDDEN, 8, 8)
    assert (config.vocab_size, config.num_hidden_layers, config.rms_norm_eps) == (VOCAB, 1, 1e-5)


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        ({"hidden_size": 64}, {}, "hidden_size=64, not 32"),
        ({"vocab_size": 32000}, {}, "vocab_size=32000, not 97"),
        ({"base_num_layers": 32, "base_model_name_or_path": "vicuna"}, {}, "is for vicuna with num_layers=32, not 4"),
        ({"num_attention_heads": 5}, {}, "heads of an even size; got 5 for a hidden size of 32"),
        (
            {"num_attention_heads": "8"},
            {},
            "'num_attention_heads' in its config.json to be a whole number of at least 1",
        ),
        ({"hidden_size": "32"}, {}, "'hidden_size' in its config.json to be a whole number, got '32'"),
        ({"exit_layer": "2"}, {}, "'exit_layer' in its config.json to be a whole number of at least 1, got '2'"),
        ({"exit_layer": 0}, {}, "'exit_layer' in its config.json to be a whole number of at least 1, got 0"),
        ({"rms_norm_eps": [1e-6]}, {}, "'rms_norm_eps' in its config.json to be a number of at least 0"),
        ({"rope_parameters": 10000.0}, {}, "'rope_parameters' in its config.json to be an object, got 10000.0"),
        (
            {"rope_parameters": {"rope_theta": "1"}},
            {},
            "'rope_parameters.rope_theta' in its config.json to be a number",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            {},
            "plain rotary positions .* got rope_type yarn",
        ),
        ({"rope_theta": 0}, {}, "plain rotary positions .* got rope_type default and rope_theta 0"),
        ({}, {"layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, r"does not know: layers\.0\.mlp\.up_proj"),
        ({}, {"norm.weight": torch.zeros(64)}, r"norm\.weight of shape \[32\], got \[64\]"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    config: dict[str, Any], extra: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    folder = published(tmp_path, extra, config)
    with pytest.raises(ValueError, match=message):
        specdec.speculate(build("llama"), "kangaroo", path=str(folder))


def test_bad_settings_and_targets(tmp_path: Path) -> None:
    for wrong in ({"num_draft_tokens": 0}, {"width": 0}, {"confidence": -0.1}, {"exit_layer": 0}):
        with pytest.raises(ValueError, match="expected exit_layer >= 1"):
            Kangaroo(**wrong)
    with pytest.raises(ValueError, match="unknown shape 'comb'; known: chain, top_k"):
        Kangaroo(shape="comb")
    with pytest.raises(ValueError, match="expand 50 nodes.*num_nodes > 50, got 50"):
        Kangaroo(shape="top_k", num_nodes=50)
    model = build("llama")
    with pytest.raises(ValueError, match=f"exit_layer < {LAYERS}.*got {LAYERS}"):
        specdec.speculate(model, "kangaroo", exit_layer=LAYERS)
    with pytest.raises(ValueError, match=r"at least 200 tokens \(width\)"):
        specdec.speculate(model, "kangaroo", shape="top_k", width=200, num_nodes=2000)
    with pytest.raises(ValueError, match="at least 2 layers, got 1"):
        specdec.speculate(tiny_llama(num_hidden_layers=1), "kangaroo")
    with pytest.raises(ValueError, match="an adapter that can be read; no checkpoint at"):
        specdec.speculate(model, "kangaroo", path=str(tmp_path / "missing"))
    drafter = bound(model, exit_layer=3)
    drafter.save(tmp_path / "made")
    with pytest.raises(
        ValueError, match=r"exit_layer=3 \(or null\), for which .* was trained; got exit_layer=1, which"
    ):
        specdec.speculate(model, "kangaroo", path=str(tmp_path / "made"), exit_layer=1)
    whole = (tmp_path / "made" / "model.safetensors").read_bytes()
    (tmp_path / "made" / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        specdec.speculate(build("llama"), "kangaroo", path=str(tmp_path / "made"))
    with pytest.raises(ValueError, match="unknown layout 'eagle'; known: specdec, kangaroo"):
        drafter.save(tmp_path / "other", "eagle")
    with pytest.raises(ValueError, match="has no adapter yet"):
        Kangaroo().save(tmp_path / "other")
    narrow = OPTConfig(**{"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2})
    narrow.update({"num_attention_heads": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 64})
    with pytest.raises(ValueError, match="a residual stream as wide as what the head reads.*got 32 and 16"):
        specdec.speculate(OPTForCausalLM(narrow).eval(), "kangaroo")


def test_a_model_whose_upper_layers_read_more_than_the_stream_is_refused() -> None:
    model, kept = build("llama"), dict[str, Tensor]()
    layers = model.model.layers
    layers[0].register_forward_hook(lambda _, __, output: kept.update(low=output))
    layers[3].register_forward_pre_hook(lambda _, args: (args[0] + kept["low"], *args[1:]))
    with pytest.raises(ValueError, match="read only the residual stream; split at layer 2"):
        specdec.speculate(model, "kangaroo")


def test_heads_of_an_even_size() -> None:
    model = tiny_llama(hidden_size=36, head_dim=8)  # four heads, which would be of 9
    drafter = bound(model, exit_layer=1)
    assert adapter_of(drafter).heads == 3
    assert sum(p.numel() for p in adapter_of(drafter).parameters()) == 4 * 36**2 + 2 * 36


# ---- learning


def packed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of two texts each: ids, positions, and what is wanted of them."""
    ids = torch.randint(2, VOCAB, (2, 14), generator=torch.Generator().manual_seed(seed))
    positions = torch.tensor([[*range(9), *range(5)], [*range(4), *range(10)]])
    wanted = positions > 1
    wanted[0, 4] = False
    return ids, positions, wanted


@torch.no_grad()
def states_of(model: Any, ids: Tensor, positions: Tensor) -> dict[Any, Tensor]:
    model.requires_grad_(False)
    target = Target(model)
    with target.router.taps((E, "final")) as recorded:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    return {tap: parts[0] for tap, parts in recorded.items()}


def lesson_of(model: Any) -> AdapterLesson:
    drafter = bound(model)
    sharpen(drafter)
    target = specdec.speculation_of(model).target
    specdec.restore(model)
    return drafter.lesson(target)


def test_the_lesson_is_soft_cross_entropy_at_the_same_position_text_by_text() -> None:
    model = build("llama")
    lesson = lesson_of(model)
    ids, positions, wanted = packed()
    result = lesson(ids, positions, wanted, states_of(model, ids, positions))
    losses, right, counted = [], [0] * 5, 0
    for row, start, stop in ((0, 0, 9), (0, 9, 14), (1, 0, 4), (1, 4, 14)):
        text = ids[row : row + 1, start:stop]
        alone = states_of(model, text, torch.arange(stop - start)[None])
        q = model.lm_head(uncached(lesson.adapter, alone[E]))[0].log_softmax(-1)
        p = model.lm_head(alone["final"])[0].softmax(-1)
        for i in range(stop - start - 1):
            if wanted[row, start + i + 1]:
                losses.append(-(p[i] * q[i]).sum())
                rank = int((q[i] > q[i, p[i].argmax()]).sum())
                right = [count + (rank <= r) for r, count in enumerate(right)]
                counted += 1
    torch.testing.assert_close(result["loss"], torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    assert result["hits"].tolist() == [right]
    assert result["counted"].tolist() == [counted]


def test_only_the_adapter_learns_and_it_does() -> None:
    model = build("llama")
    lesson = lesson_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, positions, wanted = packed()
    states = states_of(model, ids, positions)
    optimiser = torch.optim.AdamW(lesson.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = lesson(ids, positions, wanted, states)["loss"]
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        p = model.lm_head(states["final"][wanted_ahead(positions, wanted, 1)]).softmax(-1)
    least = -(p * p.log()).sum(-1).mean().item()  # the entropy of p: more cannot be learnt
    assert least < losses[-1] < least + 0.5 * (losses[0] - least)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in lesson.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_wanted_is_a_loss_of_zero() -> None:
    model = build("llama")
    lesson = lesson_of(model)
    ids, positions, wanted = packed()
    result = lesson(ids, positions, torch.zeros_like(wanted), states_of(model, ids, positions))
    result["loss"].backward()
    assert (result["loss"].item(), result["counted"].tolist(), int(result["hits"].sum())) == (0.0, [0], 0)
    assert all(p.grad is not None and not p.grad.any() for p in lesson.parameters())


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_heads_that_are_more_than_a_matrix_teach_too(family: str) -> None:
    model = build(family)
    lesson = lesson_of(model)
    ids, positions, wanted = packed()
    result = lesson(ids, positions, wanted, states_of(model, ids, positions))
    result["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lesson.parameters())


def test_learning_in_mixed_precision_keeps_float32_weights() -> None:
    model = build("llama").to(torch.bfloat16)
    lesson = lesson_of(model)
    ids, positions, wanted = packed()
    states = states_of(model, ids, positions)
    with torch.autocast("cpu", torch.bfloat16):
        result = lesson(ids, positions, wanted, states)
    result["loss"].backward()
    assert {p.dtype for p in lesson.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lesson.parameters())
    plain = lesson(ids, positions, wanted, states)["loss"]
    torch.testing.assert_close(result["loss"], plain, atol=0.1, rtol=0.05)


def test_what_was_learnt_stays_where_the_drafter_is_bound_again(tmp_path: Path) -> None:
    model = build("llama").to(torch.bfloat16)
    drafter = bound(model)
    lesson = drafter.lesson(specdec.speculation_of(model).target)
    with torch.no_grad():
        lesson.adapter.norm.weight.fill_(1.2345678)
    specdec.restore(model)
    specdec.speculate(model, drafter)
    assert float(adapter_of(drafter).norm.weight[0].detach()) == pytest.approx(1.2345678, abs=1e-6)
    text_of(model, 2)  # drafts in float32 for a target in bfloat16
    drafter.save(tmp_path)
    specdec.restore(model)
    read = bound(model, path=str(tmp_path))
    assert adapter_of(read).norm.weight.dtype is torch.bfloat16
    specdec.restore(model)
    other = build("llama", seed=1)
    specdec.speculate(other, drafter)
    assert float(adapter_of(drafter).norm.weight[0]) == 1.0, "weights of another model are read for it anew"


def test_options_of_the_loss_and_unbound_drafters() -> None:
    model = build("llama")
    drafter = bound(model)
    with pytest.raises(ValueError, match="no options; got decay"):
        drafter.lesson(specdec.speculation_of(model).target, decay=0.8)
    with pytest.raises(ValueError, match="the target that this drafter is bound to"):
        drafter.lesson(Target(build("gpt2")))
    with pytest.raises(ValueError, match="call fit"):
        Kangaroo().lesson(specdec.speculation_of(model).target)
