"""Medusa-2: heads and adapted backbone learn together, and are saved as one model that is decoded losslessly.

Shapes: B rows, T tokens, K heads, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import specdec
from drafters.medusa import Medusa
from drafters.medusa_heads import judged
from drafters.medusa_joint import JointLesson, scheduled
from specdec.loading import demo_target
from specdec.training.objectives import wanted_ahead
from test_medusa import batch_of, final_states, fitted, heads_of, inputs_of, shake, target_of
from zoo import HIDDEN, VOCAB, build, untrained

pytestmark = untrained("medusa")

pytest.importorskip("peft")


def joint(model: Any, drafter: Medusa, **options: Any) -> JointLesson:
    lesson = drafter.lesson(target_of(model), joint=True, **({"rank": 4, "dropout": 0.0} | options))
    assert isinstance(lesson, JointLesson)
    return lesson


def run(lesson: JointLesson, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return lesson(*batch[:3], {})


def train(lesson: JointLesson, batch: tuple[Tensor, ...], steps: int = 10) -> list[float]:
    optimiser, losses = torch.optim.AdamW(lesson.parameter_groups(0.01)), []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = run(lesson, batch)["loss"]
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_schedules() -> None:
    for schedule, values in {
        "constant": [1, 1, 1],
        "linear": [0, 0.5, 1],
        "sine": [0, math.sin(math.pi / 4), 1],
        "sine_0.5": [0, 1, 1],
        "sine_1": [0, math.sin(math.pi / 4), 1],
        "sine_.25": [0, 1, 1],
    }.items():
        assert [scheduled(schedule, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(values)
    for unknown in ("cosine", "sine_", "sine_2", "sine_0.0", "linear_0.5"):
        with pytest.raises(ValueError, match=rf"unknown schedule '{unknown}'; known: constant, linear, sine, sine_R"):
            scheduled(unknown, 0.0)


@pytest.mark.parametrize("own_head", [False, True])
def test_the_loss_is_its_definition(own_head: bool) -> None:
    model = build("llama")
    batch = batch_of(model)
    ids, positions, wanted, states = batch
    with torch.no_grad():
        plain = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    drafter = fitted(model, own_head=own_head)
    shake(heads_of(drafter))
    lesson = joint(model, drafter, weight=0.3, schedule="linear", decay=0.5)
    # New adapters change nothing, so the parts are those of the plain model.
    where = wanted_ahead(positions, wanted, 1)
    base = F.cross_entropy(plain[:, :-1][where[:, :-1]], ids[:, 1:][where[:, :-1]])
    heads = judged(heads_of(drafter), target_of(model), states, (ids, positions, wanted), 0.5)
    for progress in (0.0, 0.25, 1.0):
        lesson.progress = progress
        got = run(lesson, batch)
        torch.testing.assert_close(got["base_loss"], base)
        torch.testing.assert_close(got["heads_loss"], heads["loss"].detach())
        torch.testing.assert_close(got["loss"].detach(), base + 0.3 * progress * heads["loss"].detach())
        assert got["hits"].tolist() == heads["hits"].tolist()
        assert got["counted"].tolist() == heads["counted"].tolist()
    assert lesson.taps == ()


def test_who_learns_and_what_stays() -> None:
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch, drafter = batch_of(model), fitted(model)
    lesson = joint(model, drafter)
    heads = {id(part) for part in heads_of(drafter).parameters()}
    adapters = {id(part) for name, part in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * (4 * 7 + 1), "q, k, v, o, gate, up and down of 4 layers, and the output head"
    assert {id(part) for part in lesson.parameters()} == heads | adapters
    assert {id(part) for part in model.parameters() if part.requires_grad} == adapters
    assert all(part.dtype == torch.float32 for part in lesson.parameters())
    groups = lesson.parameter_groups(0.5)
    assert [group["lr"] for group in groups] == [0.5, 2.0]
    assert [{id(part) for part in group["params"]} for group in groups] == [adapters, heads]
    losses = train(lesson, batch)
    assert losses[-1] < 0.9 * losses[0]
    assert any(part.any() for name, part in model.named_parameters() if "lora_B" in name)
    now = {name.replace(".base_layer.", "."): part for name, part in model.state_dict().items() if "lora_" not in name}
    assert now.keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in now.items())
    merged = lesson.merged()
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {name for name in before if "_proj" in name or "lm_head" in name}


def test_checkpoints_of_the_lesson_restore_it() -> None:
    """The trainer saves what is registered; loading must reach the adapters inside the model."""
    model = build("llama")
    batch, drafter = batch_of(model), fitted(model)
    lesson = joint(model, drafter)
    train(lesson, batch, 3)
    saved = {name: tensor.clone() for name, tensor in lesson.state_dict().items()}
    expected = float(run(lesson, batch)["loss"].detach())
    train(lesson, batch, 3)
    assert float(run(lesson, batch)["loss"].detach()) != expected
    lesson.load_state_dict(saved)
    assert float(run(lesson, batch)["loss"].detach()) == expected
    again_model = build("llama")
    again = joint(again_model, fitted(again_model), seed=5)
    again.load_state_dict(saved)
    assert float(run(again, batch)["loss"].detach()) == expected


def test_distilling_pulls_towards_the_model_without_adapters() -> None:
    model = build("llama")
    batch, drafter = batch_of(model), fitted(model)
    ids, positions, wanted, _ = batch
    with torch.no_grad():
        plain = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    lesson = joint(model, drafter, distill=True)
    assert float(run(lesson, batch)["base_loss"]) == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in lesson.adapters.values():
            part += 0.2 * torch.randn(part.shape, generator=generator)
        now = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    where = wanted_ahead(positions, wanted, 1)
    p, q = plain[where].log_softmax(-1), now[where].log_softmax(-1)
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean")
    got = run(lesson, batch)
    assert float(expected) > 0.1
    torch.testing.assert_close(got["base_loss"], expected)
    got["loss"].backward()
    assert all(part.grad is not None for part in lesson.parameters())
    assert all(part.requires_grad for part in lesson.adapters.values()), "the teacher's pass leaves no trace"
    nothing = lesson(ids, positions, torch.zeros_like(wanted), {})
    assert float(nothing["loss"].detach()) == 0


def test_dropout_is_of_the_adapters_and_of_training() -> None:
    model = build("llama")
    batch, drafter = batch_of(model), fitted(model)
    lesson = joint(model, drafter, dropout=0.5)
    train(lesson, batch, 2)
    training = {name for name, module in model.named_modules() if module.training}
    assert training
    assert all("lora_dropout" in name for name in training)

    def losses() -> set[float]:
        return {float(run(lesson, batch)["loss"].detach()) for _ in range(3)}

    assert len(losses()) > 1
    lesson.eval()
    assert len(losses()) == 1
    assert not any(module.training for module in model.modules())


FAMILIES = [
    ("llama", False, "specdec"),
    ("llama", True, "specdec"),
    ("llama", False, "medusa"),
    ("gpt2", False, "specdec"),
]


@pytest.mark.parametrize(("family", "own_head", "layout"), FAMILIES)
def test_saved_as_one_model_which_is_decoded_losslessly(
    family: str, own_head: bool, layout: str, tmp_path: Path
) -> None:
    model = build(family)
    model.config._name_or_path = str(tmp_path / "base")
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch, drafter = batch_of(model), fitted(model, own_head=own_head)
    lesson = joint(model, drafter)
    train(lesson, batch)
    lesson.eval()
    folder = tmp_path / "medusa-2"
    drafter.acceptance = [[0.6, 0.2], [0.4, 0.2], [0.3, 0.2], [0.2, 0.1]]
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        drafter.save(folder, layout)
    config = json.loads((folder / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (4, 1)

    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded) is type(model)
    ids = batch[0]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (model, loaded))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert any(not torch.equal(plain[name], tensor) for name, tensor in loaded.state_dict().items())

    again = Medusa(str(folder))
    specdec.speculate(loaded, again)
    heads, states = heads_of(again), final_states(loaded, ids)[0]
    assert again.acceptance == drafter.acceptance
    assert (heads.output is not None) == (own_head or layout == "medusa")
    with torch.no_grad():
        for head in range(4):
            got = heads.logits_of(head, states, target_of(loaded))
            expected = heads_of(drafter).logits_of(head, states, lesson._target)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    inputs = inputs_of(3)
    output = loaded.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True)
    specdec.restore(loaded)
    assert output.sequences.tolist() == loaded.generate(**inputs, max_new_tokens=20).tolist()
    assert output.speculation.drafted_nodes > 24
    other = build(family)
    other.config._name_or_path = "org/base"
    assert f"those at {folder} are part of the model there" in str(Medusa(str(folder)).fit(target_of(other)))


def test_two_stages_start_from_saved_heads(tmp_path: Path) -> None:
    model = build("llama")
    first = fitted(model)
    shake(heads_of(first))
    first.save(tmp_path / "stage_1")
    second = fitted(model, path=str(tmp_path / "stage_1"))
    lesson = joint(model, second)
    expected = heads_of(first).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lesson.heads.state_dict().items())


def test_the_demo_target_with_its_tied_output_head(tmp_path: Path) -> None:
    """Merging unties output head and embedding; tokenizer and config go along, so the folder is a whole target."""
    loaded = demo_target("bfloat16")
    drafter = Medusa("new")
    assert drafter.fit(target_of(loaded.model)) is None
    lesson = joint(loaded.model, drafter, rank=2)
    ids = loaded.encode("Write a Python function `get_name(self)`: Return the name.")
    positions = torch.arange(ids.shape[1])[None]
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(lesson, (ids, positions, torch.ones_like(ids).bool()), 4)
    assert losses[-1] < losses[0]
    lesson.eval()
    drafter.save(tmp_path)
    from specdec.loading import hf_target

    saved = hf_target(str(tmp_path), dtype="float32", device="cpu")
    assert saved.encode("Hello").tolist() == loaded.encode("Hello").tolist()
    assert not saved.model.config.tie_word_embeddings
    assert not torch.equal(saved.model.lm_head.weight, saved.model.model.embed_tokens.weight)
    assert torch.equal(saved.model.model.embed_tokens.weight, loaded.model.model.embed_tokens.weight.float())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = saved.model.generate(**inputs, max_new_tokens=24)
    specdec.speculate(saved.model, "medusa", path=str(tmp_path))
    assert saved.model.generate(**inputs, max_new_tokens=24).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": 0}, "weight=0"),
        ({"rank": 0}, "rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"decay": 2}, "expected 0 < decay <= 1, got 2"),
        ({"modules": ["c_attn"]}, r"no linear maps \['c_attn'\] to adapt; known: .*lm_head.*q_proj"),
    ],
)
def test_wrong_options_leave_the_model_alone(options: dict[str, Any], said: str) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=said):
        joint(model, fitted(model), **options)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_a_second_time_needs_a_model_without_adapters() -> None:
    model = build("llama")
    lesson = joint(model, fitted(model), modules=["q_proj", "v_proj"])
    assert len(lesson.adapters) == 2 * 2 * 4
    assert {tuple(part.shape) for part in lesson.adapters.values()} >= {(4, HIDDEN)}
    assert target_of(model).vocab_size == VOCAB
    with pytest.raises(ValueError, match="has adapters already"):
        joint(model, fitted(model))
