"""The seam: a speculating model is in every other respect the model it was, and ``restore`` makes it that again."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hydra
import peft
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, pipeline, set_seed
from transformers.generation.streamers import BaseStreamer

import drafters
import specdec
import verifiers
from equality import PAD, Oracle, ask, prompt, run, tiny_llama
from test_stopping import tokenizer

LENGTH = 14
CASE: dict[str, Any] = prompt(3) | {"max_new_tokens": LENGTH}


@pytest.fixture
def speculating() -> Any:
    return specdec.speculate(tiny_llama(), "token_recycling")


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The greedy text of the plain model."""
    return run("plain", CASE).tolist()


def test_restore_leaves_nothing_behind(expected: list[list[int]]) -> None:
    chosen = tiny_llama()
    before = dict(vars(chosen))
    assert specdec.speculate(chosen) is chosen
    assert chosen.generate(**CASE).tolist() == expected
    assert chosen.speculation.emitted_tokens == 3 * LENGTH
    assert specdec.restore(chosen) is chosen
    assert type(chosen) is LlamaForCausalLM
    assert not hasattr(chosen, "speculation")
    assert vars(chosen) == before
    assert all("forward" not in vars(module) for module in chosen.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in chosen.modules())
    assert chosen.generate(**CASE).tolist() == expected
    assert type(specdec.restore(chosen)) is LlamaForCausalLM, "restoring a plain model changes nothing"


def test_the_class_looks_like_the_model_s_own(speculating: Any) -> None:
    cls = type(speculating)
    assert isinstance(speculating, LlamaForCausalLM)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (
        LlamaForCausalLM.__name__,
        LlamaForCausalLM.__qualname__,
        LlamaForCausalLM.__module__,
    )
    assert inspect.signature(speculating.generate) == inspect.signature(tiny_llama().generate)


def test_a_second_speculate_replaces_the_first(speculating: Any, expected: list[list[int]]) -> None:
    speculating.generate(**CASE)
    specdec.speculate(speculating, "prompt_lookup", max_ngram=2)
    assert specdec.speculation_of(speculating).drafter.name == "prompt_lookup"
    assert speculating.speculation.emitted_tokens == 0
    assert type(speculating).__mro__[1] is LlamaForCausalLM
    assert speculating.generate(**CASE).tolist() == expected


def test_a_failed_speculate_leaves_a_plain_model(speculating: Any, expected: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        specdec.speculate(speculating, "token_recycling", num_successors=1000)
    assert type(speculating) is LlamaForCausalLM
    assert speculating.generate(**CASE).tolist() == expected


def test_a_plain_model_has_no_handle() -> None:
    with pytest.raises(ValueError, match="this LlamaForCausalLM does not speculate; call specdec.speculate"):
        specdec.speculation_of(tiny_llama())


def test_training_mode_is_left_alone() -> None:
    chosen = tiny_llama().train()
    chosen.model.layers[0].eval()
    before = [module.training for module in chosen.modules()]
    specdec.speculate(chosen)
    assert [module.training for module in chosen.modules()] == before


def via_pickle(chosen: Any, folder: Path) -> Any:  # noqa: ARG001 - one signature for all ways
    return pickle.loads(pickle.dumps(chosen))


def via_torch_save(chosen: Any, folder: Path) -> Any:
    torch.save(chosen, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def via_save_pretrained(chosen: Any, folder: Path) -> Any:
    chosen.save_pretrained(folder)
    return type(tiny_llama()).from_pretrained(folder)


def via_state_dict(chosen: Any, folder: Path) -> Any:  # noqa: ARG001
    fresh = tiny_llama(initializer_range=0.01)
    fresh.load_state_dict(chosen.state_dict())
    return fresh


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "deepcopy": lambda chosen, _: copy.deepcopy(chosen),
    "copy": lambda chosen, _: copy.copy(chosen),
    "pickle": via_pickle,
    "torch.save": via_torch_save,
    "save_pretrained": via_save_pretrained,
    "state_dict": via_state_dict,
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_are_plain_models(way: str, speculating: Any, expected: list[list[int]], tmp_path: Path) -> None:
    speculating.generate(**CASE)
    twin = WAYS[way](speculating, tmp_path)
    assert type(twin) is LlamaForCausalLM
    assert not any("specdec" in name for name in vars(twin))
    assert twin.generate(**CASE).tolist() == expected
    assert twin.config.architectures in (None, ["LlamaForCausalLM"])
    assert speculating.generate(**CASE).tolist() == expected
    assert speculating.speculation.emitted_tokens == 2 * 3 * LENGTH, "the original still speculates"
    assert specdec.speculate(twin, "none").generate(**CASE).tolist() == expected


def test_modules_parameters_and_state_are_the_model_s_own(speculating: Any) -> None:
    speculating.generate(**CASE)
    plain = tiny_llama()
    assert speculating.state_dict().keys() == plain.state_dict().keys()
    assert dict(speculating.named_modules()).keys() == dict(plain.named_modules()).keys()
    assert dict(speculating.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    assert str(speculating) == str(plain)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"return_full_text": False}], ids=str)
def test_text_generation_pipeline(settings: dict[str, Any]) -> None:
    texts = ["cab dab", "z", "quick brown fox"]

    def answers(chosen: Any) -> Any:
        names = tokenizer()
        names.padding_side = "left"
        pipe = pipeline("text-generation", model=chosen, tokenizer=names, device="cpu")
        config = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD}
        return [pipe(texts, **config, **settings), pipe(texts, batch_size=3, **config, **settings)]

    chosen = specdec.speculate(tiny_llama(), "prompt_lookup")
    assert answers(chosen) == answers(tiny_llama())
    assert chosen.speculation.emitted_tokens == 2 * 3 * 9


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["compile", "peft", "data parallel", "distributed", "compiled peft"])
def test_wrappers_are_looked_through(kind: str, expected: list[list[int]]) -> None:
    inner = tiny_llama()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2)
    distributed = nn.parallel.DistributedDataParallel
    wrapped: Any
    if kind == "compile":
        wrapped = torch.compile(inner, backend="eager")
    elif kind == "peft":
        wrapped = peft.get_peft_model(inner, lora).eval()
    elif kind == "compiled peft":
        wrapped = torch.compile(peft.get_peft_model(inner, lora).eval(), backend="eager")
    elif kind == "data parallel":
        wrapped = nn.DataParallel(inner)
    else:  # a real one needs a process group
        wrapped = distributed.__new__(distributed)
        nn.Module.__init__(wrapped)
        wrapped.module = inner
    assert specdec.speculate(wrapped, "token_recycling") is wrapped
    generate = wrapped.generate if hasattr(wrapped, "generate") else inner.generate
    assert generate(**CASE).tolist() == expected
    assert inner.speculation.emitted_tokens == 3 * LENGTH
    assert specdec.speculation_of(wrapped) is specdec.speculation_of(inner)
    assert specdec.restore(wrapped) is wrapped
    assert type(inner) is LlamaForCausalLM
    assert generate(**CASE).tolist() == expected


class Interrupting(BaseStreamer):
    """Does something in another thread while the third position is being streamed."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action, self.count = action, 0
        self.outcome: Any = None

    def __deepcopy__(self, memo: Any) -> Interrupting:
        return self

    def put(self, value: Tensor) -> None:  # noqa: ARG002
        self.count += 1
        if self.count == 3:
            with ThreadPoolExecutor(1) as pool:
                self.outcome = pool.submit(self.action).exception()

    def end(self) -> None:
        pass


def test_two_generates_at_once_on_one_model(speculating: Any, expected: list[list[int]]) -> None:
    second = Interrupting(lambda: speculating.generate(**CASE))
    assert speculating.generate(**CASE, streamer=second).tolist() == expected
    assert isinstance(second.outcome, RuntimeError)
    assert "this model is generating already" in str(second.outcome)
    assert speculating.speculation.emitted_tokens == 3 * LENGTH
    assert speculating.generate(**CASE).tolist() == expected


def test_a_generate_without_speculation_beside_one_with_it(speculating: Any, expected: list[list[int]]) -> None:
    beams = Interrupting(lambda: speculating.generate(**CASE, num_beams=2))
    assert speculating.generate(**CASE, streamer=beams).tolist() == expected
    assert isinstance(beams.outcome, UserWarning), "the beams did not speculate, and only they warn"


def test_an_error_in_the_middle_leaves_the_model_usable(speculating: Any, expected: list[list[int]]) -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] > 12:
                raise KeyError("broken processor")
            return scores

    with pytest.raises(KeyError, match="broken processor"):
        speculating.generate(**CASE, logits_processor=LogitsProcessorList([Broken()]))
    assert speculating.generate(**CASE).tolist() == expected


def test_inference_mode_in_any_order(expected: list[list[int]]) -> None:
    with torch.inference_mode():
        chosen = specdec.speculate(tiny_llama(), "token_recycling")
        assert chosen.generate(**CASE).tolist() == expected
    assert chosen.generate(**CASE).tolist() == expected
    with torch.inference_mode():
        assert chosen.generate(**CASE).tolist() == expected


def test_inside_a_foreign_hydra_main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    texts = []

    @hydra.main(version_base=None, config_path=str(tmp_path))
    def application(config: Any) -> None:  # noqa: ARG001 - hydra's signature
        assert GlobalHydra.instance().is_initialized()
        texts.append(specdec.speculate(tiny_llama(), "prompt_lookup").generate(**CASE).tolist())

    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
    monkeypatch.setattr(sys, "argv", ["application", f"hydra.run.dir={tmp_path}", *quiet])
    application()
    assert texts == [expected]


def test_from_four_threads(expected: list[list[int]]) -> None:
    start = threading.Barrier(4)
    models = [tiny_llama() for _ in range(4)]

    def work(index: int) -> Any:
        start.wait()
        name = ("none", "prompt_lookup", "token_recycling", "token_recycling")[index]
        return specdec.speculate(models[index], name).generate(**CASE).tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [expected] * 4


def test_set_seed_governs_sampling(speculating: Any) -> None:
    def sampled(seed: int) -> list[list[int]]:
        set_seed(seed)
        return speculating.generate(**CASE, do_sample=True).tolist()

    assert sampled(5) == sampled(5)
    assert sampled(5) != sampled(6)
    set_seed(5)
    twice = [speculating.generate(**CASE, do_sample=True).tolist() for _ in range(2)]
    assert twice[0] != twice[1]


def test_greedy_decoding_leaves_the_global_generators_alone(speculating: Any) -> None:
    set_seed(3)
    states = torch.get_rng_state(), random.getstate()
    speculating.generate(**CASE, repetition_penalty=1.2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_sampling_takes_as_much_from_the_global_generator_whatever_the_drafter() -> None:
    states = []
    for name in ("none", "prompt_lookup", "token_recycling"):
        run(name, CASE | {"do_sample": True})
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_speculate_itself_draws_nothing() -> None:
    chosen = tiny_llama()
    before = torch.get_rng_state()
    specdec.speculate(chosen, "token_recycling")
    assert torch.equal(torch.get_rng_state(), before)


def test_transformers_without_what_the_seam_leans_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GenerationMixin, "_prefill")
    with pytest.raises(ImportError, match=r"needs transformers >= 5.17; .* has no _prefill on LlamaForCausalLM"):
        specdec.speculate(tiny_llama())


@pytest.mark.parametrize("package", [drafters, verifiers], ids=["drafters", "verifiers"])
def test_a_foreign_package_of_our_name(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(package, "__owner__")
    with pytest.raises(ImportError, match=f"the package '{package.__name__}' at .* is not specdec's"):
        specdec.speculate(tiny_llama())


def test_reset_forgets_what_was_counted_and_learnt(speculating: Any) -> None:
    handle = specdec.speculation_of(speculating)
    speculating.generate(**CASE)
    assert bool((handle.drafter.matrix >= 0).any())  # type: ignore[attr-defined]
    handle.reset()
    assert speculating.speculation.emitted_tokens == 0
    assert bool((handle.drafter.matrix < 0).all())  # type: ignore[attr-defined]


def test_statistics_of_perfect_drafts(expected: list[list[int]]) -> None:
    chosen = specdec.speculate(tiny_llama(), Oracle(block=3))
    ask(chosen, CASE, [row[9:] for row in expected])
    stats = chosen.speculation
    # Rows are told 3, 2 and 1 tokens ahead, then a wrong one: 13 tokens after the prefill's take 4, 5 and 7 passes.
    assert (stats.rows, stats.emitted_tokens) == (3, 3 * LENGTH)
    assert (stats.passes, stats.verifications) == (7, 4 + 5 + 7)
    assert stats.mean_accepted_tokens == 3 * 13 / 16
    assert dict(stats.accepted_lengths) == {3: 3, 2: 4, 1: 6, 0: 3}
    assert stats.lossless
    assert stats.peak_extra_bytes > 0
    assert all(seconds > 0 for seconds in stats.seconds.values())
