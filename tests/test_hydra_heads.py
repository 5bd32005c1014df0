"""Hydra heads: what new ones say, the tree against its plain definition, the prefix layer's cache, and learning.

Checkpoints are in ``test_hydra_checkpoint``.

Shapes: B rows, T tokens, N nodes, K heads, H hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from drafters.causal_layer import GrowingRows
from drafters.hydra_heads import Hydra
from drafters.hydra_lesson import HydraLesson
from drafters.hydra_modules import HydraHeads
from equality import tiny_llama
from specdec.build import build_drafter
from specdec.decoding import Step
from specdec.interfaces import DecodeState
from specdec.target import Target
from specdec.templates import Template
from specdec.training.objectives import same_text
from specdec.tree import TokenTree
from zoo import PAD, VOCAB, build, untrained
from zoo import prompts as random_prompts

pytestmark = untrained("hydra_heads")

CLOSE = 1e-4
NEW_TOKENS = 20
ARCHES = ("mlp", "prefix-mlp")
# Inner nodes that are not the first of their level, a level narrower than the one above, ranks with gaps in use.
PATHS = [(0,), (1,), (2,), (0, 0), (1, 0), (1, 1), (2, 0), (1, 0, 0), (2, 0, 0), (2, 0, 1), (2, 0, 1, 0)]


@cache
def model_of(family: str) -> Any:
    return build(family)


def target_of(family: str = "llama") -> Target:
    return Target(model_of(family))


def drafter_of(target: Target, noise: float = 0.0, **options: Any) -> Hydra:
    """Heads for a target, which say what it says; with noise, all of their weights moved at random."""
    drafter = Hydra(**options)
    assert drafter.fit(target) is None
    disturb(heads_of(drafter), noise)
    return drafter


@torch.no_grad()
def disturb(heads: HydraHeads, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in heads.parameters():
        parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def heads_of(drafter: Hydra) -> HydraHeads:
    assert drafter.heads is not None
    return drafter.heads


def inputs_of(batch: int) -> dict[str, Tensor]:
    ids, mask = random_prompts(batch, VOCAB, 3)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def generate(model: Any, drafter: Any, inputs: dict[str, Tensor], watch: Any = None, **options: Any) -> Any:
    """One request, the model plain again after it."""
    specdec.speculate(model, drafter)
    try:
        if watch is not None:
            specdec.speculation_of(model).observers.append(watch)
        torch.manual_seed(0)
        return model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True} | options))
    finally:
        specdec.restore(model)


@torch.no_grad()
def final_states(model: Any, ids: Tensor) -> Tensor:
    """``[B, T, H]`` that the output head of a llama receives."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


def plain_logits(heads: HydraHeads, head: int, state: Tensor, embeddings: Tensor, target: Target) -> Tensor:
    """By the definition: ``state [H]`` and ``embeddings [head + 1, H]`` side by side -> ``[V]``."""
    u = torch.cat([state[None], embeddings]).flatten()
    weight, residual, bias, residual_bias = heads.first_block(head)
    x = residual @ u + residual_bias + torch.nn.functional.silu(weight @ u + bias)
    for block in heads.blocks[head].children():
        x = x + torch.nn.functional.silu(block(x))
    return heads.score(head, x[None, None], target)[0, 0]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
@torch.no_grad()
def test_new_heads_say_what_the_target_says(arch: str, own_head: bool, num_layers: int) -> None:
    target = target_of()
    heads = heads_of(drafter_of(target, arch=arch, own_head=own_head, num_layers=num_layers))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (2, 9), generator=generator)
    states = final_states(target.model, ids)
    expected = target.head(states)
    given = states
    if heads.prefix is not None:
        positions = torch.arange(9)[None]
        given = heads.prefix(states, positions, same_text(positions))
        ratio = given / states
        torch.testing.assert_close(ratio, ratio.mean(-1, keepdim=True).expand_as(ratio), atol=CLOSE, rtol=CLOSE)
        assert 0.5 < float(ratio.mean()) < 2, "and the factor is near 1"
    sums = heads.open(given, torch.randn(given.shape, generator=generator), 4)
    for head in range(4):
        if head > 0:
            sums = heads.extend(head, sums, torch.randn(given.shape, generator=generator))
        got = heads.logits(head, sums, target)
        if heads.prefix is None:
            assert torch.equal(got, expected)
        else:
            assert torch.equal(
                got.argsort(-1, descending=True)[..., :5], expected.argsort(-1, descending=True)[..., :5]
            )


@torch.no_grad()
def test_new_output_layers_are_copies_bias_included() -> None:
    target = target_of("phi")
    heads = heads_of(drafter_of(target, arch="mlp", own_head=True))
    given = torch.randn(2, 5, target.hidden_size, generator=torch.Generator().manual_seed(1))
    sums = heads.open(given, given, 1)
    torch.testing.assert_close(heads.logits(0, sums, target), target.head(given), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_no_copy_of_an_output_head_says_what_a_soft_cap_or_scale_makes_of_it(family: str, tmp_path: Path) -> None:
    target = target_of(family)
    assert "own_head=false: " in str(Hydra(arch="mlp", own_head=True).fit(target))
    shared = drafter_of(target, path="new")
    with pytest.raises(ValueError, match="expected layout specdec, which shares the target's output head, and own_"):
        shared.save(tmp_path, "hydra")
    shared.save(tmp_path)


def test_options_that_the_loaded_heads_are_not(tmp_path: Path) -> None:
    target = target_of()
    drafter_of(target, arch="mlp", num_heads=2).save(tmp_path)
    said = str(Hydra(str(tmp_path), arch="prefix-mlp", num_layers=4, num_heads=2).fit(target))
    assert said == (
        f"arch=mlp, num_layers=1 (or null), as the weights at {tmp_path} have it; got arch=prefix-mlp, num_layers=4, "
        "which path=new makes new ones with"
    )
    drafter = Hydra(str(tmp_path), arch="mlp", num_heads=2, num_layers=1, own_head=False)
    assert drafter.fit(target) is None
    assert drafter.loaded_from == str(tmp_path)
    drafter.acceptance = [[0.5], [0.5]]
    drafter.lesson(target)
    assert drafter.acceptance is None, "what learns is no longer what was judged"


@pytest.mark.parametrize("own_head", [False, True])
def test_number_of_parameters_is_the_published_one(own_head: bool) -> None:
    target = target_of()
    hidden, heads, layers = target.hidden_size, 4, 3
    built = heads_of(drafter_of(target, arch="mlp", num_layers=layers, own_head=own_head))
    first = sum(2 * ((head + 2) * hidden * hidden + hidden) for head in range(heads))
    later = heads * (layers - 1) * (hidden * hidden + hidden)
    outputs = heads * (hidden + 1) * VOCAB if own_head else 0
    assert sum(parameter.numel() for parameter in built.parameters()) == first + later + outputs
    assert len({parameter.data_ptr() for parameter in built.parameters()}) == len(list(built.parameters()))


def test_sums_by_token_are_the_product_of_all_tokens() -> None:
    target = target_of()
    heads = heads_of(drafter_of(target, 0.3, arch="mlp", num_layers=2, own_head=True)).double()
    generator = torch.Generator().manual_seed(1)
    state, embeddings = torch.randn(5, target.hidden_size, generator=generator, dtype=torch.float64).split((1, 4))
    for depth in (2, 4):
        sums = heads.open(state[None], embeddings[None, :1], depth)
        for head in range(depth):
            if head > 0:
                sums = heads.extend(head, sums, embeddings[None, head : head + 1])
            assert sums.shape[-1] == (depth - head) * 2 * target.hidden_size
            got = heads.logits(head, sums, target)[0, 0]
            expected = plain_logits(heads, head, state[0], embeddings[: head + 1], target)
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_tree_is_the_one_of_the_definition(arch: str, batch: int) -> None:
    """Every node holds what its head, run alone on the path above it, ranks at the node's rank."""
    target = target_of()
    drafter = drafter_of(target, 0.2, arch=arch, tree=PATHS)
    trees: list[TokenTree] = []
    states: list[Tensor] = []
    propose = drafter.propose

    def watched(state: DecodeState) -> TokenTree:
        assert drafter._states is not None
        states.append(drafter._states.clone())
        trees.append(propose(state))
        return trees[-1]

    drafter.propose = watched  # type: ignore[method-assign]
    generate(target.model, drafter, inputs_of(batch), max_new_tokens=6)
    template, heads = Template.from_paths(PATHS), heads_of(drafter)
    assert len(trees) > 1
    with torch.no_grad():
        for tree, given in zip(trees, states, strict=True):
            tree.check()
            assert tree.rank is not None
            assert tree.rank.tolist() == [template.ranks.tolist()]
            for row in range(batch):
                for node, path in enumerate(template.topology.paths[0].tolist()):
                    above = [other for other in path if other >= 0][:-1]
                    if not above:
                        continue
                    embeddings = target.embedding(tree.token_ids[row, above])
                    logits = plain_logits(heads, len(above) - 1, given[row, 0], embeddings, target)
                    rank = int(template.ranks[node])
                    assert int(logits.argsort(descending=True)[rank]) == int(tree.token_ids[row, node])


class Watch:
    """After every step: the prefix layer has read what the target has verified, and nothing else."""

    def __init__(self, drafter: Hydra, model: Any) -> None:
        self.drafter, self.model = drafter, model
        self.steps = 0

    @torch.no_grad()
    def __call__(self, state: DecodeState, step: Step) -> None:
        if step.tree is None or state.done:
            return
        self.steps += 1
        rows, prefix, states = self.drafter._rows, heads_of(self.drafter).prefix, self.drafter._states
        assert rows is not None
        assert prefix is not None
        assert states is not None
        assert state.context is not None
        assert rows.lengths == state.context.lengths
        for row, length in enumerate(rows.lengths):
            if state.finished[row]:
                continue
            whole = GrowingRows(1, prefix.attention)
            verified = final_states(self.model, torch.tensor(state.history.row(row)[None, :length]))
            read = prefix(verified, *whole.begin(length), whole)
            torch.testing.assert_close(states[row, 0], read[0, -1], atol=CLOSE, rtol=CLOSE)
            for got, expected in ((rows._keys, whole._keys), (rows._values, whole._values)):
                torch.testing.assert_close(got[row, :, :length], expected[0, :, :length], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("batch", [1, 3])
def test_prefix_cache_is_that_of_one_pass_over_the_verified_states(batch: int) -> None:
    target = target_of()
    # So wide that something is right now and then, whatever the heads say.
    drafter = drafter_of(target, 0.05, tree=[[rank] for rank in range(40)] + [[0, rank] for rank in range(20)])
    watch = Watch(drafter, target.model)
    text = target.model.generate(**inputs_of(batch), max_new_tokens=NEW_TOKENS)
    output = generate(target.model, drafter, inputs_of(batch), watch, eos_token_id=int(text[0, -8]))
    assert watch.steps > 3
    assert output.speculation.mean_accepted_tokens > 1, "several states were read at once"
    assert drafter._rows is None
    assert drafter._states is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("options", [{"arch": "mlp", "own_head": True}, {"arch": "prefix-mlp", "num_layers": 2}])
def test_text_is_the_targets_own_whatever_the_weights(family: str, options: dict[str, Any]) -> None:
    target, inputs = target_of(family), inputs_of(3)
    drafter = drafter_of(target, 0.05, **options)
    output = generate(target.model, drafter, inputs)
    assert output.sequences.tolist() == target.model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist()
    settings = {"do_sample": True, "temperature": 0.7}
    sampled = generate(target.model, drafter, inputs, **settings).sequences.tolist()
    assert sampled == generate(target.model, "none", inputs, **settings).sequences.tolist()
    assert sampled != output.sequences.tolist()


@pytest.mark.parametrize("arch", ARCHES)
def test_prompts_without_ids_and_continued_ones(arch: str) -> None:
    model = model_of("llama")
    drafter = Hydra(arch=arch, tree=PATHS)
    inputs = inputs_of(3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "attention_mask": mask}
    output = generate(model, drafter, embedded)
    assert output.sequences.tolist() == model.generate(**embedded, max_new_tokens=NEW_TOKENS).tolist()
    first = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    longer = {"input_ids": first.sequences, "attention_mask": torch.cat([mask, torch.ones(3, 4).long()], dim=1)}
    expected = model.generate(**longer, max_new_tokens=NEW_TOKENS).tolist()
    output = generate(model, drafter, longer, past_key_values=first.past_key_values)
    assert output.sequences.tolist() == expected


def test_serves_rows_of_another_drafter() -> None:
    model, inputs = model_of("llama"), inputs_of(3)
    drafter = build_drafter("suffix_automaton", auxiliary="hydra_heads", auxiliary_below=1)
    sources = set[str]()
    watch = lambda state, step: sources.update(step.tree.sources if step.tree else ())  # noqa: ARG005, E731
    output = generate(model, drafter, inputs, watch)
    assert output.sequences.tolist() == model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist()
    assert sources == {"hydra_heads", "suffix_automaton"}


class Heard(HydraLesson):
    """A lesson that keeps the logits of every head, with the positions they are of."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.logits: list[Tensor] = []

    def _judge(self, head: int, sums: Tensor, *others: Any) -> Any:
        with torch.no_grad():
            self.logits.append(self.heads.logits(head, sums, self.target))
        return super()._judge(head, sums, *others)


def teach(drafter: Hydra, target: Target, ids: Tensor, **options: Any) -> tuple[Heard, dict[str, Tensor]]:
    """One batch of whole texts ``[B, T]``, every token wanted."""
    lesson = Heard(heads_of(drafter), target, "final", **({"dropout": 0.0} | options))
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    states = {"final": final_states(target.model, ids)}
    return lesson, lesson(ids, positions, torch.ones_like(ids, dtype=torch.bool), states)


@pytest.mark.parametrize("arch", ARCHES)
def test_lesson_and_drafting_see_the_same_where_the_draft_is_the_truth(arch: str) -> None:
    target, inputs = target_of(), inputs_of(1)
    drafter = drafter_of(target, 0.02, arch=arch, tree=[[0] * depth for depth in range(1, 5)])
    heads, drafted = heads_of(drafter), list[Tensor]()
    whole, trees = heads.logits, list[TokenTree]()
    watch = lambda state, step: trees.append(step.tree)  # noqa: ARG005, E731
    heads.logits = lambda *args: drafted.append(whole(*args)) or drafted[-1]  # type: ignore[method-assign, func-returns-value]
    generate(target.model, drafter, inputs, watch, max_new_tokens=2)
    heads.logits = whole  # type: ignore[method-assign]
    text = torch.cat([inputs["input_ids"], trees[1].token_ids], dim=1)  # the prompt, the root and the draft
    lesson, _ = teach(drafter, target, text)
    last = inputs["input_ids"].shape[1] - 1
    assert len(drafted) == len(lesson.logits) == 4
    for got, expected in zip(drafted, lesson.logits, strict=True):
        torch.testing.assert_close(got[0, 0], expected[0, last], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("arch", ARCHES)
def test_heads_read_no_token_from_where_they_predict_on(arch: str) -> None:
    target = target_of()
    drafter = drafter_of(target, 0.1, arch=arch)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, VOCAB, (1, 10), generator=generator)
    before, _ = teach(drafter, target, ids)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % VOCAB
    after, _ = teach(drafter, target, changed)
    for head in range(4):
        # Position t reads x_t (in its state) to x_{t + 1 + head}.
        first = 6 - head - 1
        assert torch.equal(before.logits[head][0, :first], after.logits[head][0, :first])
        differ = (before.logits[head] != after.logits[head]).any(-1)[0]
        assert bool(differ[first:6].all())


@pytest.mark.parametrize("arch", ARCHES)
def test_packed_texts_are_judged_as_texts_of_their_own(arch: str) -> None:
    target = target_of()
    drafter = drafter_of(target, 0.1, arch=arch)
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(2, VOCAB, (1, length), generator=generator) for length in (7, 3, 9)]
    packed = torch.cat(texts, dim=1)
    positions = torch.cat([torch.arange(text.shape[1])[None] for text in texts], dim=1)
    states = {"final": torch.cat([final_states(target.model, text) for text in texts], dim=1)}
    wanted = torch.ones_like(packed, dtype=torch.bool)
    wanted[0, 3] = False
    lesson = Heard(heads_of(drafter), target, "final", labels=1, teacher=0, dropout=0.0)
    got = lesson(packed, positions, wanted, states)
    start = 0
    total, counted = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    for text in texts:
        stop = start + text.shape[1]
        alone = Heard(heads_of(drafter), target, "final", labels=1, teacher=0, dropout=0.0)
        part = {"final": final_states(target.model, text)}
        learnt = alone(text, positions[:, start:stop], wanted[:, start:stop], part)
        counted += learnt["counted"]
        for head in range(4):
            reach = max(text.shape[1] - head - 2, 0)
            expected, packed_in = alone.logits[head][0, :reach], lesson.logits[head][0, start : start + reach]
            torch.testing.assert_close(packed_in, expected, atol=CLOSE, rtol=CLOSE)
            for position in range(reach):
                label = position + head + 2
                if wanted[0, start + label]:
                    total[head] -= expected[position].log_softmax(-1)[text[0, label]]
        start = stop
    assert got["counted"].tolist() == counted.tolist() == [5 + 1 + 7 - 1, 4 + 6 - 1, 3 + 5, 2 + 4]
    torch.testing.assert_close(got["loss"], (total / counted).sum(), atol=CLOSE, rtol=CLOSE)


def test_losses_by_their_definitions() -> None:
    target = target_of()
    drafter = drafter_of(target, 0.1, arch="mlp", num_layers=2)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, VOCAB, (1, 12), generator=generator)
    states = final_states(target.model, ids)[0]
    log_p = target.head(states[None])[0].log_softmax(-1)
    heads = heads_of(drafter)
    with torch.no_grad():
        embeddings, expected = target.embedding(ids)[0], torch.zeros(3)
        hits = torch.zeros(4, 5, dtype=torch.int64)
        for head in range(4):
            places = range(12 - head - 2)
            for t in places:
                logits = plain_logits(heads, head, states[t], embeddings[t + 1 : t + 2 + head], target)
                log_q, label = logits.log_softmax(-1), int(ids[0, t + 2 + head])
                teacher = log_p[t + 1 + head]
                sums = heads.open(states[None, t, None], embeddings[None, t + 1, None], 4)
                for deeper in range(1, head + 1):
                    sums = heads.extend(deeper, sums, embeddings[None, t + 1 + deeper, None])
                distance = (heads.hidden(head, sums)[0, 0] - states[t + 1 + head]).abs()
                smooth = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
                losses = torch.stack([-log_q[label], -(teacher.exp() * log_q).sum(), smooth])
                expected += losses / len(places)
                rank = logits.argsort(descending=True).tolist().index(label)
                hits[head, rank:] += 1
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, 0.1)):
        options = dict(zip(("labels", "teacher", "reconstruction"), weights, strict=True))
        _, learnt = teach(drafter, target, ids, **options)
        torch.testing.assert_close(learnt["loss"], (expected * torch.tensor(weights)).sum(), atol=CLOSE, rtol=CLOSE)
        assert torch.equal(learnt["hits"], hits)
        assert learnt["counted"].tolist() == [10, 9, 8, 7]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
def test_only_the_heads_learn(arch: str, autocast: bool) -> None:
    model = tiny_llama().requires_grad_(False)
    target = Target(model)
    drafter = drafter_of(target, 0.02, arch=arch, own_head=True, num_layers=2)
    lesson = drafter.lesson(target)
    assert {id(parameter) for parameter in lesson.parameters()} == {id(p) for p in heads_of(drafter).parameters()}
    ids = torch.randint(2, 48, (2, 12), generator=torch.Generator().manual_seed(0))
    positions, wanted = torch.arange(12).expand(2, -1), torch.ones(2, 12, dtype=torch.bool)
    states = {"final": final_states(model, ids)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = lesson.train()(ids, positions, wanted, states)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    for name, parameter in lesson.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name
    assert all(parameter.grad is None for parameter in model.parameters())
    # Texts too short for any head: no loss, and still a gradient for everything that learns.
    lesson.zero_grad()
    nothing = lesson(ids, torch.zeros_like(ids), wanted, states)
    nothing["loss"].backward()
    assert float(nothing["loss"].detach()) == 0
    assert nothing["counted"].tolist() == [0] * 4
    assert all(parameter.grad is not None for parameter in lesson.parameters())


@torch.no_grad()
def test_dropout_and_noise_are_for_training_only() -> None:
    target = target_of()
    for arch, options in (("mlp", {"noise": 5.0}), ("prefix-mlp", {})):
        drafter = drafter_of(target, 0.02, arch=arch)
        lesson = drafter.lesson(target, **options)
        assert lesson.dropout == (0.2 if arch == "prefix-mlp" else 0.0)
        assert (lesson.labels, lesson.teacher) == ((0.0, 1.0) if arch == "prefix-mlp" else (1.0, 0.0))
        ids = torch.randint(2, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
        batch = (
            ids,
            torch.arange(12)[None],
            torch.ones(1, 12, dtype=torch.bool),
            {"final": final_states(target.model, ids)},
        )
        quiet = [float(lesson.eval()(*batch)["loss"]) for _ in range(2)]
        assert quiet[0] == quiet[1]
        torch.manual_seed(0)
        loud = [float(lesson.train()(*batch)["loss"]) for _ in range(2)]
        assert len({*loud, quiet[0]}) == 3


def test_bad_options_of_the_lesson() -> None:
    target = target_of()
    drafter = drafter_of(target)
    with pytest.raises(ValueError, match="has no decay; it has: labels, teacher, reconstruction, noise, dropout"):
        drafter.lesson(target, decay=0.8)
    for wrong in ({"teacher": -1}, {"teacher": 0}, {"dropout": 1.0}, {"noise": -0.1}):
        with pytest.raises(ValueError, match="expected labels, teacher, reconstruction and noise >= 0"):
            drafter.lesson(target, **wrong)


@pytest.mark.parametrize("arch", ARCHES)
def test_heads_that_know_the_text_are_always_right(arch: str) -> None:
    """Overfit to the target's answer to one prompt: every draft is accepted to its full depth."""
    target, inputs = target_of(), inputs_of(1)
    rounds, depth = 5, 4
    text = target.model.generate(**inputs, max_new_tokens=rounds * (depth + 1) + 1)
    drafter = Hydra(arch=arch, num_layers=2, tree=[[0] * deep for deep in range(1, depth + 1)])
    target.model.requires_grad_(False)
    lesson = drafter.lesson(target, dropout=0.0, labels=1.0, teacher=0.0).train()
    optimizer = torch.optim.AdamW(lesson.parameters(), lr=3e-3)
    positions, wanted = torch.arange(text.shape[1])[None], torch.ones_like(text, dtype=torch.bool)
    states = {"final": final_states(target.model, text)}
    first = found = lesson(text, positions, wanted, states)
    for _ in range(400):
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        found = lesson(text, positions, wanted, states)
        if bool((found["hits"][:, 0] == found["counted"]).all()):
            break
    assert bool((first["hits"][1:, 0] < first["counted"][1:] / 2).all()), "new heads do not know it"
    output = generate(target.model, drafter, inputs, max_new_tokens=rounds * (depth + 1) + 1)
    assert output.sequences.tolist() == text.tolist()
    assert output.speculation.accepted_lengths == {depth: rounds}


def test_half_precision_follows_the_target() -> None:
    model = tiny_llama().to(torch.bfloat16).requires_grad_(False)
    target = Target(model)
    drafter = drafter_of(target, 0.02)
    assert {parameter.dtype for parameter in heads_of(drafter).parameters()} == {torch.bfloat16}
    ids = torch.randint(2, 48, (1, 9), generator=torch.Generator().manual_seed(0))
    generate(model, drafter, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    drafter.lesson(target)
    learnt = heads_of(drafter)
    assert {parameter.dtype for parameter in learnt.parameters()} == {torch.float32}
    generate(model, drafter, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert heads_of(drafter) is learnt, "what has learnt is what drafts"


def test_trees() -> None:
    target = target_of()
    assert drafter_of(target).template.num_nodes == 25
    assert drafter_of(target, num_heads=2, num_nodes=7).template.topology.max_depth == 2
    assert drafter_of(target, tree=PATHS).needs.max_nodes == len(PATHS) + 1
    drafter = drafter_of(target, num_nodes=6)
    drafter.acceptance = [[0.9, 0.01], [0.8, 0.01], [0.7, 0.01], [0.6, 0.01]]
    assert drafter.fit(target) is None
    assert drafter.template.topology.nodes_by_depth.tolist() == [[1, 2, 2, 1, 1]], "the rates shape the tree"


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'eagle-attn' of Hydra heads; known: mlp, prefix-mlp"):
        Hydra(arch="eagle-attn")
    for wrong in ({"num_heads": 0}, {"num_layers": 0}, {"num_nodes": 0}):
        with pytest.raises(ValueError, match=f"at least 1; got {next(iter(wrong))}=0"):
            Hydra(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs"):
        Hydra(tree=[[1]])
    assert Hydra(tree="mc_sim_7b_63").needs.max_nodes == 64
    with pytest.raises(ValueError, match="unknown tree 'oak'; known: mc_sim_7b_63"):
        Hydra(tree="oak")
    model = model_of("llama")
    with pytest.raises(ValueError, match="no deeper than its 2 heads reach, got one of depth 3"):
        specdec.speculate(model, "hydra_heads", num_heads=2, tree=[[0], [0, 0], [0, 0, 0]])
    wide = Hydra(tree=[[rank] for rank in range(VOCAB + 1)])
    assert f"at least {VOCAB + 1} tokens, got {VOCAB}" in str(wide.fit(target_of()))
