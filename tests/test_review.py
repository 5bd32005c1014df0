"""Requests that once went wrong: rules for the wrong mode, broken distributions, shared objects, long padding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import specdec
import zoo
from equality import tiny_llama
from specdec import build
from specdec.audit import audit
from specdec.commands._session import Session
from specdec.decoding import _DRAFT_STREAM
from specdec.generation import plainly
from specdec.sampling import Uniforms
from verifiers.acceptance import TargetSampling
from verifiers.tree_attention import TreeVerifier


@pytest.fixture
def model() -> Any:
    return tiny_llama()


def ids_of(model: Any, rows: int = 2, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, model.config.vocab_size, (rows, length), generator=generator)


def run(model: Any, **arguments: Any) -> Any:
    ids = ids_of(model)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)


def test_a_greedy_rule_is_refused_under_sampling(model: Any) -> None:
    specdec.speculate(model, acceptance="greedy")
    with pytest.raises(ValueError, match="leave it out"):
        run(model, do_sample=True, max_new_tokens=4)
    assert run(model, do_sample=False, max_new_tokens=4).shape == (2, 13)


@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.2}])
def test_scores_that_are_no_distribution_raise_as_plain_does(model: Any, processors: dict[str, Any]) -> None:
    specdec.speculate(model)  # its self-check needs the head whole
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(RuntimeError, match="probability tensor"), plainly(model):
        run(model, do_sample=True, max_new_tokens=4, **processors)
    with pytest.raises(RuntimeError, match="probability tensor"):
        run(model, do_sample=True, max_new_tokens=4, **processors)
    rule = TargetSampling()
    assert rule.select(torch.full((2, 7), float("nan")), torch.rand(2, dtype=torch.float64)).tolist() == [-1, -1]
    assert rule.select(torch.full((2, 7), -torch.inf), torch.rand(2, dtype=torch.float64)).tolist() == [-1, -1]


def test_drafters_draw_from_another_stream_than_the_uniforms() -> None:
    uniforms = Uniforms(1, 17).take([0], 8, torch.device("cpu"))[0]
    own = torch.rand(8, generator=torch.Generator().manual_seed(17 ^ _DRAFT_STREAM), dtype=torch.float64)
    assert not torch.equal(uniforms, own)


@pytest.mark.parametrize("option", [{"encoder_no_repeat_ngram_size": 2}, {"encoder_repetition_penalty": 1.7}])
@pytest.mark.parametrize("sequences", [2, 3])
def test_encoder_processors_with_several_sequences(model: Any, option: dict[str, Any], sequences: int) -> None:
    """top_k=1 makes sampling deterministic, so that plain generate is the reference."""
    arguments = {"do_sample": True, "top_k": 1, "num_return_sequences": sequences, "max_new_tokens": 12, **option}
    expected = run(model, **arguments)
    specdec.speculate(model)
    assert torch.equal(run(model, **arguments), expected)


def test_a_ragged_batch_under_autocast(model: Any) -> None:
    ids = ids_of(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    specdec.speculate(model, drafter="prompt_lookup", min_ngram=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12).shape == (2, 21)


def test_an_attention_that_takes_no_mask_runs_plainly(model: Any) -> None:
    """Set after speculate(), it would otherwise give wrong text without a word."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("mine", sdpa_attention_forward)
    AttentionMaskInterface.register("mine", sdpa_mask)
    expected = run(model, do_sample=False, max_new_tokens=8)
    specdec.speculate(model)
    model.set_attn_implementation("mine")
    with pytest.warns(UserWarning, match="'mine' takes no tree mask"):
        got = run(model, do_sample=False, max_new_tokens=8)
    assert torch.equal(got, expected)


def test_a_drafter_serves_one_model_at_a_time(model: Any) -> None:
    other, drafter = tiny_llama(), build.build_drafter("token_recycling")
    specdec.speculate(model, drafter=drafter)
    with pytest.raises(ValueError, match="serves another model"):
        specdec.speculate(other, drafter=drafter)
    specdec.restore(model)
    specdec.speculate(other, drafter=drafter)
    specdec.speculate(other, drafter=drafter)


def test_a_rule_beside_a_built_verifier_is_refused() -> None:
    with pytest.raises(ValueError, match="goes with a verifier's name"):
        build.build_verifier(TreeVerifier(), acceptance="greedy")


def test_recipes_name_what_is_ours_at_any_depth() -> None:
    nested = {"_target_": "drafters.prompt_lookup.PromptLookup", "max_ngram": {"_target_": "builtins.len"}}
    for config in (nested, {"_target_": "torch.nn.Linear"}):
        with pytest.raises(ValueError, match="_target_ must name"):
            build.build(config)


def test_plainly_on_a_plain_model(model: Any) -> None:
    with pytest.raises(ValueError, match="does not speculate"), plainly(model):
        pass


def test_a_row_that_stopped_long_before_the_others() -> None:
    """Its padding is fed in stretches; the returned cache and scores equal plain's."""
    model = zoo.build("llama")
    model.config.max_position_embeddings = 1024
    text = run(model, do_sample=False, max_new_tokens=150)
    stop = next(t for t in text[0, 12:20].tolist() if t not in text[1, 9:].tolist())
    arguments = {"do_sample": False, "max_new_tokens": 150, "eos_token_id": stop, "pad_token_id": 0}
    arguments |= {"return_dict_in_generate": True, "output_scores": True}
    expected = run(model, **arguments)
    specdec.speculate(model, drafter="prompt_lookup")
    got = run(model, **arguments)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.scores[-1], expected.scores[-1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        got.past_key_values.layers[0].keys, expected.past_key_values.layers[0].keys, atol=1e-3, rtol=1e-3
    )


def test_the_audit_judges_without_the_models_own_processors(model: Any) -> None:
    """A model that ships a repetition penalty is not called wrong for obeying it."""
    model.generation_config.repetition_penalty = 1.3
    session = Session.__new__(Session)
    session.config = {"temperature": 0, "max_new_tokens": 16, "seed": 0}
    session.loaded = type("L", (), {"model": model})()
    specdec.speculate(model)
    session.without_processors()
    ids = ids_of(model, rows=1)
    result = audit(model, [session.pair(ids, session.generate(ids))])
    assert (result.identical, len(result.mismatches)) == (1, 0)


def test_beams_beside_a_speculating_thread_keep_their_warning(model: Any) -> None:
    """Whether a call came to the loop is known to that call alone."""
    specdec.speculate(model)
    with pytest.warns(UserWarning, match="does not speculate"):
        run(model, num_beams=2, do_sample=False, max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, do_sample=False, max_new_tokens=4)
