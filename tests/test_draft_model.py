"""The drafter that is a smaller model: its own K/V, what it reads and when, the draws on record, and who is refused.

Shapes: B rows, N nodes, V vocabulary, P tokens that the draft model has kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import specdec
from drafters.draft_model import DEMO_DRAFT, SHAPES, DraftModel
from drafters.follower import Follower
from equality import tiny_llama
from specdec.build import build_drafter
from specdec.decoding import Step
from specdec.interfaces import DecodeState
from specdec.loading import demo_target
from specdec.target import PassOutput, Target
from specdec.templates import chain_paths
from specdec.tree import WITH_REPLACEMENT, WITHOUT_REPLACEMENT, TokenTree
from test_law import p_value, sample, toy_model
from zoo import PAD, REFUSED, VOCAB, build, untrained
from zoo import prompts as random_prompts

SIZES: dict[str, Any] = {"depth": 3, "width": 2, "num_nodes": 5, "branching": [2, 1, 1]}
pytestmark = untrained("draft_model")

NEW_TOKENS = 20
CLOSE = 1e-4


@cache
def target_of(family: str) -> Any:
    return build(family)


def inputs_of(batch: int) -> dict[str, Tensor]:
    ids, mask = random_prompts(batch, VOCAB, 3)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def relative(family: str, noise: float = 0.0) -> Any:
    """A draft model that often agrees with the target of that family: a copy, its weights moved by some noise."""
    return noisy(target_of(family), noise)


def noisy(model: Any, noise: float) -> Any:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def generate(model: Any, drafter: Any, inputs: dict[str, Tensor], watch: Any = None, **options: Any) -> Any:
    """One request, the model plain again after it."""
    rule = options.pop("acceptance", None)
    specdec.speculate(model, drafter, acceptance=rule)
    try:
        if watch is not None:
            specdec.speculation_of(model).observers.append(watch)
        torch.manual_seed(options.pop("seed", 0))
        settings = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
        return model.generate(**inputs, **(settings | options))
    finally:
        specdec.restore(model)


def plain(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    return model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS} | options)).tolist()


class Watch:
    """After every step: what the draft model has kept is what a plain pass over the text would put there."""

    def __init__(self, drafter: DraftModel, draft: Any, starts: Sequence[int]) -> None:
        self.drafter, self.draft, self.starts = drafter, draft, starts
        self.kept: list[list[int]] = []
        self.unread: list[list[int]] = []
        self.steps: list[Step] = []

    def __call__(self, state: DecodeState, step: Step) -> None:
        follower = self.drafter.follower
        assert follower is not None
        self.steps.append(step)
        if step.tree is None or follower.context is None:
            return
        step.tree.check()
        lengths = follower.context.lengths
        self.kept.append(list(lengths))
        self.unread.append([len(state.history.row(row)) - length for row, length in enumerate(lengths)])
        for row, length in enumerate(lengths):
            self._compare(state.history.row(row)[:length].tolist(), row, follower.context.cache.layers)

    def _compare(self, text: list[int], row: int, layers: Any) -> None:
        filled = DynamicCache()
        with torch.no_grad():
            self.draft(input_ids=torch.tensor([text]), past_key_values=filled, use_cache=True)
        config = self.draft.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
        for kind, expected, got in zip(kinds, filled.layers, layers, strict=True):
            first = max(0, len(text) - config.sliding_window + 1) if kind == "sliding_attention" else 0
            for whole, part in ((expected.keys, got.keys), (expected.values, got.values)):
                mine = part[row, :, first : len(text)]
                torch.testing.assert_close(mine, whole[0, :, first:], atol=CLOSE, rtol=CLOSE)


# A draft model of the target's family, one with windows, one with a table of positions.
GREEDY = [(shape, "llama", batch) for shape in SHAPES for batch in (1, 3)]
GREEDY += [(shape, family, 3) for shape in ("top_k", "rsd_c") for family in ("gemma3_text", "gpt2")]


@pytest.mark.parametrize(("shape", "family", "batch"), GREEDY)
def test_greedy_text_and_the_draft_models_own_cache(shape: str, family: str, batch: int) -> None:
    model, inputs = target_of("llama"), inputs_of(batch)
    draft = relative("llama", 0.05) if family == "llama" else build(family, seed=1)
    drafter = DraftModel(draft, shape, **SIZES)
    watch = Watch(drafter, draft, inputs["attention_mask"].sum(1).tolist())
    output = generate(model, drafter, inputs, watch)
    assert output.sequences.tolist() == plain(model, inputs)
    if family == "llama":
        assert output.speculation.mean_accepted_tokens > 1.5
    assert drafter.follower is not None
    assert drafter.follower.context is None, "the request is over"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_draft_model_that_is_the_target_is_always_right(shape: str) -> None:
    model, inputs = target_of("llama"), inputs_of(1)
    drafter = DraftModel(relative("llama"), shape, **(SIZES | {"num_nodes": 50}))  # of top_k nothing is left out
    stats = generate(model, drafter, inputs, max_new_tokens=4 * 5 + 1).speculation
    assert stats.accepted_lengths == {3: 5}
    assert stats.mean_accepted_tokens == 4


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_length_of_a_chain_may_change_between_steps(batch: int, sampled: bool) -> None:
    model, inputs, draft = target_of("llama"), inputs_of(batch), relative("llama", 0.05)
    drafter = DraftModel(draft, "chain", **SIZES)
    watch, lengths, deepest = Watch(drafter, draft, inputs["attention_mask"].sum(1).tolist()), [3], list[int]()

    def exchange(state: DecodeState, step: Step) -> None:
        watch(state, step)
        if step.tree is not None:
            assert step.tree.topology.max_depth <= lengths[-1]
            deepest.append(step.tree.topology.max_depth)
        lengths.append((1, 6, 2, 4)[len(lengths) % 4])
        drafter.reshape(chain_paths(lengths[-1]))
        assert (drafter.tree_paths, drafter.needs.max_nodes) == (chain_paths(lengths[-1]), lengths[-1] + 1)

    options: dict[str, Any] = {"acceptance": "target_sampling", "do_sample": True, "top_k": 7} if sampled else {}
    expected = generate(model, "none", inputs, **options).sequences.tolist()
    assert generate(model, drafter, inputs, exchange, **options).sequences.tolist() == expected
    assert {1, 2, 6} <= set(deepest)


def test_only_a_single_chain_has_a_length_to_choose() -> None:
    for shape in SHAPES:
        drafter = DraftModel(shape=shape, **SIZES)
        assert drafter.widest == (shape == "chain")
        if shape == "chain":
            assert (drafter.tree_paths, drafter.deepest) == (chain_paths(SIZES["depth"]), None)
            continue
        assert drafter.tree_paths == []
        before = drafter.shape, drafter.needs
        with pytest.raises(ValueError, match="expected shape=chain"):
            drafter.reshape(chain_paths(2))
        assert (drafter.shape, drafter.needs) == before
    assert DraftModel(shape="chains", width=1, depth=2).tree_paths == chain_paths(2)


class Counting(Target):
    """Counts the nodes that it runs."""

    nodes = 0

    def run(self, context: Any, tree: TokenTree, nodes: slice | None = None, *args: Any, **others: Any) -> PassOutput:
        assert nodes is not None
        self.nodes += nodes.stop - nodes.start
        return super().run(context, tree, nodes, *args, **others)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_token_is_computed_twice(shape: str) -> None:
    model, inputs = target_of("llama"), inputs_of(1)
    draft = relative("llama", 0.05)
    drafter = DraftModel(draft, shape, **SIZES)
    assert drafter.fit(Target(model)) is None
    assert drafter.follower is not None
    target, expected = Counting(draft), [0]
    follower = Follower(target, drafter.follower.leader)

    def begin(state: DecodeState) -> Any:
        growth = Follower.begin(follower, state)
        if growth is not None:
            # The tokens that the text has gained, less the accepted ones that the draft model had run as nodes.
            assert growth.width in (1, 2)
            assert growth.width == len(state.history.row(0)) - growth.context.lengths[0]
            depth = min(SIZES["depth"], state.context.budgets[0] - 1) if state.context else 0
            below = {"chain": [1] * 2, "rsd_c": [2, 2]}.get(shape, [2] * 2)
            expected.append(growth.width + sum(below[: depth - 1]))
        return growth

    follower.begin = begin  # type: ignore[method-assign]
    drafter.follower = follower
    drafter.fit = lambda _: None  # type: ignore[method-assign, assignment]
    output = generate(model, drafter, inputs)
    assert output.sequences.tolist() == plain(model, inputs)
    assert target.nodes == sum(expected) > 20


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_text_under_target_sampling_equals_plain(shape: str, batch: int) -> None:
    model, inputs = target_of("llama"), inputs_of(batch)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 7, "acceptance": "target_sampling"}
    expected = generate(model, "none", inputs, **settings).sequences.tolist()
    drafter = DraftModel(relative("llama", 0.05), shape, **SIZES)
    output = generate(model, drafter, inputs, **settings)
    assert output.sequences.tolist() == expected
    assert output.speculation.mean_accepted_tokens > 1.1


def test_draws_are_on_record_with_the_law_they_were_drawn_from() -> None:
    model, inputs, draft = target_of("llama"), inputs_of(3), relative("llama", 0.05)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 7}
    for shape in SHAPES:
        checked = 0

        def watch(state: DecodeState, step: Step, shape: str = shape) -> None:
            nonlocal checked
            tree = step.tree
            if tree is None or tree.num_nodes == 1:
                return
            assert (tree.draws is None) == (shape == "top_k")
            if tree.draws is None:
                return
            tree.check()
            kind = WITH_REPLACEMENT if shape.startswith("chain") else WITHOUT_REPLACEMENT
            for row, tokens in enumerate(step.verification.tokens):
                text = state.history.row(row).tolist()
                text = text[: len(text) - len(tokens)]
                if step.verification.was_finished[row]:
                    assert bool((tree.draws.node[row] == -1).all())
                    continue
                left = NEW_TOKENS - state.emitted[row] + len(tokens)
                for node, kind_of, q_row in zip(
                    tree.draws.node[row], tree.draws.kind[row], tree.draws.q_row[row], strict=True
                ):
                    if node < 0:
                        continue
                    assert kind_of == kind
                    assert tree.rank is None or tree.rank.shape[1] == tree.num_nodes
                    path = [n for n in tree.topology.paths.expand(3, -1, -1)[row, node].tolist() if n > 0][:-1]
                    if len(path) >= left:
                        continue  # beyond the token budget, which other rows have still
                    with torch.no_grad():
                        ids = torch.tensor([text + [int(tree.token_ids[row, n]) for n in path]])
                        logits = draft(input_ids=ids).logits[0, -1] / 0.8
                    logits = logits.masked_fill(logits < logits.topk(7).values[-1], -math.inf)
                    torch.testing.assert_close(tree.draws.q[row, q_row], logits.softmax(-1), atol=1e-4, rtol=1e-3)
                    checked += 1

        generate(model, DraftModel(draft, shape, **SIZES), inputs, watch, **settings)
        assert checked > 20 or shape == "top_k"


def test_requests_whose_processors_read_the_ids_get_the_most_likely_tokens() -> None:
    model, inputs = target_of("llama"), inputs_of(3)
    settings = {"do_sample": True, "repetition_penalty": 1.3}
    expected = generate(model, "none", inputs, **settings).sequences.tolist()
    trees: list[Any] = []
    drafter = DraftModel(relative("llama", 0.05), "rsd_s", **SIZES)
    output = generate(model, drafter, inputs, lambda _, step: trees.append(step.tree), **settings)
    assert output.sequences.tolist() == expected, "by the default rule"
    assert all(tree is None or tree.draws is None for tree in trees)


def test_the_drafts_come_from_the_requests_generator_alone() -> None:
    model, inputs = target_of("llama"), inputs_of(1)
    texts = []
    for disturb in (0, 5):
        drafter = DraftModel(relative("llama", 0.05), "rsd_c", **SIZES)
        watch = [lambda *_, n=disturb: torch.rand(n)][0]
        texts.append(generate(model, drafter, inputs, watch, do_sample=True, seed=3).sequences.tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_text_follows_the_targets_law(shape: str) -> None:
    drafter = DraftModel(noisy(toy_model(), 0.2), shape, depth=2, width=2, num_nodes=3, branching=[2, 1])
    assert p_value(sample(drafter, None)) > 1e-4


def test_prompts_without_ids_are_decoded_plainly() -> None:
    model, inputs = target_of("llama"), inputs_of(3)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    output = generate(model, DraftModel(relative("llama"), **SIZES), given)
    assert output.sequences.tolist() == plain(model, given)
    assert output.speculation.mean_accepted_tokens == 1


@pytest.mark.parametrize("limit", [12, 16, 22])
def test_texts_beyond_the_draft_models_positions(limit: int) -> None:
    """Prompts of 13, 6 and 10 tokens: too long for it at once, or rows run out one after the other."""
    model, inputs = target_of("llama"), inputs_of(3)
    draft = build("gpt2")
    draft.config.max_position_embeddings = limit
    table = draft.transformer.wpe
    table.weight = torch.nn.Parameter(table.weight[:limit].clone())
    drafter = DraftModel(draft, "top_k", **SIZES)
    output = generate(model, drafter, inputs)
    assert output.sequences.tolist() == plain(model, inputs)
    drafted = output.speculation.drafted_nodes
    assert (drafted == 0) == (limit == 12)
    full = generate(model, DraftModel(build("gpt2"), "top_k", **SIZES), inputs).speculation.drafted_nodes
    assert drafted < full


def test_rows_that_stop_at_different_times_and_lock_step() -> None:
    model, inputs = target_of("llama"), inputs_of(3)
    text = plain(model, inputs)
    drafter = DraftModel(relative("llama", 0.05), "top_k", **SIZES)
    stop = {"eos_token_id": [text[0][-15], text[1][-9]], "pad_token_id": PAD}
    assert generate(model, drafter, inputs, **stop).sequences.tolist() == plain(model, inputs, **stop)

    class Unknown:
        """A processor that may keep state across the batch: rows advance together."""

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            return scores - 0.5 * torch.nn.functional.one_hot(ids[:, -1], scores.shape[-1])

    expected = plain(model, inputs, logits_processor=[Unknown()])
    for shape in ("top_k", "rsd_c"):
        drafter = DraftModel(relative("llama", 0.05), shape, **SIZES)
        output = generate(model, drafter, inputs, logits_processor=[Unknown()])
        assert output.sequences.tolist() == expected
        assert output.speculation.mean_accepted_tokens > 1.2


def test_another_dtype_than_the_targets() -> None:
    model, inputs = target_of("llama"), inputs_of(2)
    output = generate(model, DraftModel(relative("llama").to(torch.bfloat16), "top_k", **SIZES), inputs)
    assert output.sequences.tolist() == plain(model, inputs)
    assert output.speculation.mean_accepted_tokens > 2
    drafter = DraftModel(dtype="bfloat16")
    assert drafter.fit(Target(model)) is None
    assert drafter.follower is not None
    assert drafter.follower.target.dtype == torch.bfloat16
    assert DraftModel().fit(Target(model)) is None


def test_the_random_draft_model_is_the_same_for_the_same_seed() -> None:
    model = target_of("gpt2")
    before = torch.get_rng_state()

    def weights(seed: int) -> list[Tensor]:
        drafter = DraftModel(seed=seed)
        assert drafter.fit(Target(model)) is None
        assert drafter.follower is not None
        return list(drafter.follower.target.model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(0), weights(1), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_as_draft_model(tmp_path: Path) -> None:
    model, inputs = target_of("llama"), inputs_of(1)
    relative("llama").save_pretrained(tmp_path)
    for path in (str(tmp_path), str(tmp_path) + "/"):
        output = generate(model, build_drafter("draft_model", path=path, shape="chain", depth=3), inputs)
        assert output.sequences.tolist() == plain(model, inputs)
        assert output.speculation.mean_accepted_tokens > 3


REFUSALS: dict[str, tuple[Callable[[Path], DraftModel], str]] = {
    "vocabulary": (lambda _: DraftModel(tiny_llama(vocab_size=VOCAB + 1)), "97 tokens; .* has 98"),
    "folder": (lambda path: DraftModel(str(path / "missing")), "missing has no config.json"),
    "weights": (lambda path: DraftModel(str(_only_config(path))), "loading it failed"),
    "recurrent": (lambda _: DraftModel(REFUSED["mamba"]()), "can run token trees; Mamba"),
    "alibi": (lambda _: DraftModel(REFUSED["bloom"]()), "can run token trees; .*Bloom"),
    "width": (lambda _: DraftModel(None, "rsd_s", width=VOCAB + 1), f"at least {VOCAB + 1} tokens, got {VOCAB}"),
}  # fmt: skip


def _only_config(path: Path) -> Path:
    target_of("llama").config.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_what_is_missing(name: str, tmp_path: Path) -> None:
    make, reason = REFUSALS[name]
    model = target_of("llama")
    with pytest.raises(ValueError, match=f"does not fit .* it needs .*{reason}"):
        specdec.speculate(model, make(tmp_path))
    assert "speculation" not in dir(model)


def test_wrong_settings() -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"shape": "beam"}, "known: chain, chains, top_k, rsd_c, rsd_s"),
        ({"depth": 0}, "depth=0"),
        ({"branching": []}, "branching=0"),
        ({"branching": [2, 0]}, "branching=0"),
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
        ({"path": tiny_llama(), "device": "cpu"}, "device='cpu' and a LlamaForCausalLM"),
    )
    for settings, said in wrong:
        with pytest.raises(ValueError, match=said):
            DraftModel(**settings)
    for shape, nodes in {"chain": 4, "chains": 7, "top_k": 6, "rsd_c": 7, "rsd_s": 7}.items():
        assert DraftModel(shape=shape, **SIZES).needs.max_nodes == nodes


@pytest.mark.parametrize("shape", ["top_k", "rsd_s"])
def test_the_demo_draft_model(shape: str) -> None:
    loaded = demo_target("float32")
    ids = loaded.encode("Write a Python function `get_name(self)`: Return the name.")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = generate(loaded.model, build_drafter("draft_model", path="demo", shape=shape), inputs, max_new_tokens=48)
    assert output.sequences.tolist() == plain(loaded.model, inputs, max_new_tokens=48)
    assert output.speculation.mean_accepted_tokens > 1.5
    assert sum(file.stat().st_size for file in DEMO_DRAFT.iterdir()) < 6e6


def test_the_demo_target_finds_its_draft_model() -> None:
    weights = []
    for drafter in (DraftModel(path="demo"), DraftModel()):
        specdec.restore(specdec.speculate(demo_target("float32").model, drafter))
        assert drafter.follower is not None
        weights.append(drafter.follower.target.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
