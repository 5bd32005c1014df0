"""The training scripts of the demo target: what counts as repetition, and what the loss against it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from demo_target_corpus import CHAT_TEMPLATE
from demo_target_loops import Prompts, chat_prompt, greedy, repeat_origins, repeated_rows, unlikelihood
from refine_demo_target import RECIPE, Plan, open_refinement, refine
from specdec.demo.heldout import ends_in_loop, heldout_functions, is_heldout, stdlib_functions
from specdec.loading import DEMO_FOLDER, demo_target
from train_demo_target import Run

UNIQUE = list(range(100, 140))


def marked(ids: list[int]) -> list[int]:
    return np.flatnonzero(repeat_origins(ids) >= 0).tolist()


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [1],
        UNIQUE,
        [1, 2, 3, 4] * 2,  # two copies of a short block
        [7] * 7,  # fewer than eight tokens: 1000000
        [1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9],  # nine apart, and only eight agree
    ],
)
def test_ordinary_text_is_not_marked(ids: list[int]) -> None:
    assert marked(ids) == []


def test_the_copies_are_marked_and_point_to_the_first() -> None:
    ids = [50, 51, *[1, 2, 3, 4] * 3, 60]
    assert marked(ids) == list(range(6, 14))
    assert repeat_origins(ids)[6:14].tolist() == [2, 3, 4, 5] * 2


def test_two_copies_of_a_long_block() -> None:
    block = list(range(9))
    assert marked([*block, *block]) == list(range(9, 18))


def test_repetition_inside_a_text_counts_too() -> None:
    ids = [*UNIQUE, *[5] * 10, *UNIQUE[::-1]]
    assert marked(ids) == list(range(41, 50))
    assert not ends_in_loop(ids)


def test_a_counter_does_not_hide_the_repetition_and_is_not_marked() -> None:
    line = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    ids = [token for count in range(4) for token in [*line, 70 + count]]
    assert marked(ids) == [i for i in range(11, 43) if i % 11 != 10]


def test_the_shortest_period_decides() -> None:
    assert set(repeat_origins([1, 2] * 20)[2:].tolist()) == {0, 1}


def test_every_loop_is_found() -> None:
    rng = np.random.default_rng(0)
    for block in range(1, 40):
        ids = [*UNIQUE, *rng.permutation(90)[:block].tolist() * 12][: 40 + max(8, 3 * block)]
        assert ends_in_loop(ids)
        assert marked(ids) == list(range(40 + block, len(ids)))


@pytest.fixture
def scored() -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[3, 4, 3, 4, 3, 4], [1, 2, 3, 4, 5, 6]])
    origins = torch.tensor([[-1, -1, 0, 1, 0, 1], [-1] * 6])
    return logits, tokens, origins


def test_unlikelihood_is_its_definition(scored: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, tokens, origins = scored
    p = logits.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    losses = unlikelihood(logits, tokens, origins)
    torch.testing.assert_close(losses[0, 2:], -(1 - p[0, :2].repeat(2)) * torch.log(1 - p[0, 2:]))
    assert not losses[0, :2].any()
    assert not losses[1].any()


def test_unlikelihood_lowers_the_repeated_tokens_and_nothing_else(scored: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, tokens, origins = scored
    unlikelihood(logits, tokens, origins).sum().backward()
    assert logits.grad is not None
    touched = logits.grad.abs().amax(-1) > 0
    assert torch.equal(touched, origins >= 0)
    before, after = logits.softmax(-1), (logits - 0.1 * logits.grad).softmax(-1)
    change = (after - before).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert (change[touched] < 0).all()
    others = (after - before).scatter(-1, tokens.unsqueeze(-1), 0.0)
    assert (others[touched].sum(-1) > 0).all()


def test_unlikelihood_where_the_probability_rounds_to_one() -> None:
    logits = torch.zeros(1, 2, 5)
    logits[0, 1, 2] = 60.0
    logits.requires_grad_()
    tokens, origins = torch.tensor([[2, 2]]), torch.tensor([[-1, 0]])
    loss = unlikelihood(logits, tokens, origins)
    torch.testing.assert_close(loss[0, 1], torch.tensor(0.8 * (60.0 - np.log(4.0)), dtype=torch.float32))
    loss.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 1, 2], torch.tensor(0.8))


def test_rows_of_repetition_leave_the_prompt_unmarked() -> None:
    loop = [1, 2, 3] * 5
    rows = repeated_rows([(loop, UNIQUE), (UNIQUE, loop)], length=47)
    assert len(rows) == 1
    ids, origins = rows[0]
    assert ids.tolist() == [*UNIQUE, *loop[:8]]
    assert np.flatnonzero(origins >= 0).tolist() == list(range(43, 48))
    assert origins[43:].tolist() == [40, 41, 42, 40, 41]


def test_prompts_and_continuations() -> None:
    tokenizer = demo_target("float32").tokenizer
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert chat_prompt("What is 2 + 3?") == prompt
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    before = tokenizer.backend_tokenizer.to_str()
    pairs = greedy(tiny, tokenizer, [prompt, "def f(x):"], new_tokens=5)
    for text, (ids, continuation) in zip([prompt, "def f(x):"], pairs, strict=True):
        assert tokenizer.decode(ids) == text
        assert len(continuation) == 5
    assert tokenizer.backend_tokenizer.to_str() == before, "settings of a call would be exported"


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("Anna", "Ben", "Carla", "David")
    rows = [
        {"question": f"{name} has {n} pens and buys {n}. How many pens?", "answer": f"{name} has {n} + {n} = {2 * n}."}
        for n in range(10)
        for name in names
    ]
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_to_learn_from_are_not_held_out(gsm8k: Path) -> None:
    prompts = Prompts(gsm8k)
    texts = prompts.draw((3, 40, 40), seed=1)
    assert texts == prompts.draw((3, 40, 40), seed=1)
    assert texts != prompts.draw((3, 40, 40), seed=2)
    assert all("pens" in text for text in texts[:3])
    heldout = {function.name for function in heldout_functions()}
    for text in texts[3:]:
        name = text.partition("`")[2].partition("(")[0] if text.startswith("<|") else text.split("(")[0].split()[-1]
        assert not is_heldout(f"def {name}")
        assert name not in heldout


@pytest.mark.slow
def test_a_resumed_refinement_gives_the_same_weights(
    gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    functions = stdlib_functions(heldout=False)[:300]
    for module in ("demo_target_corpus", "demo_target_loops"):
        monkeypatch.setattr(f"{module}.stdlib_functions", lambda *, heldout: functions)  # noqa: ARG005
    plan = Plan(first_token=0, updates_per_round=1, prompts=(1, 3, 2), new_tokens=60, rows=2, length=128)

    def opened(folder: str) -> Run:
        run = open_refinement(tmp_path / folder, DEMO_FOLDER)
        run.recipe = replace(RECIPE, tokens_per_domain=512)
        return run

    whole, first = opened("whole"), opened("parts")
    start = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    refine(whole, 3, plan, gsm8k, save_every=60.0)

    def save_and_stop() -> None:
        Run.save(first)
        first.stop = True

    monkeypatch.setattr(first, "save", save_and_stop)
    refine(first, 3, plan, gsm8k, save_every=0.0)
    assert first.step == 1
    second = opened("parts")
    assert second.step == 1
    refine(second, 3, plan, gsm8k, save_every=60.0)
    assert whole.step == second.step == 3
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])
    assert not torch.equal(start["model.embed_tokens.weight"], whole.model.state_dict()["model.embed_tokens.weight"])
    with pytest.raises(SystemExit, match="of a run of 3 steps"):
        refine(opened("parts"), 4, plan, gsm8k, save_every=60.0)
