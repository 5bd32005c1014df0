"""Processors that read the ids, where the walk is on a device: all nodes at once, one call per length of text.

On a CPU the verifier asks them along the walk, so the tests switch that off. Node by node along its own path, as plain
``generate`` would ask, is the definition.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

import specdec
from equality import VOCAB, assert_same, model, new_text, run
from scripted import RightAmongDecoys
from specdec.sampling import Policy
from specdec.tree import TokenTree
from test_acceptance import random_tree
from test_processors import PROCESSORS, SPECULATING, case
from verifiers import acceptance, tree_attention

# Of the table of processors: what is asked along the walk everywhere.
ALONG_THE_WALK = {
    "encoder_no_repeat_ngram_size",
    "prefix_allowed_tokens_fn",
    "guidance_scale",
    "watermarking",
    "synthid",
}
BY_LENGTH = sorted(PROCESSORS.keys() - ALONG_THE_WALK)
PROMPT = 4


@pytest.fixture
def _on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tree_attention, acceptance):
        monkeypatch.setattr(module, "on_host", lambda _: False)


def forced(length: int) -> list[Any]:
    """One of each built-in that answers by length; what depends on a length does so within the tree."""
    eos = torch.tensor([5, 7])
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3], [4, 4, 4, 4]])
    return [
        processors.RepetitionPenaltyLogitsProcessor(1.4),
        processors.RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=torch.tensor([1, 4, 2])),
        processors.EncoderRepetitionPenaltyLogitsProcessor(1.5, prompts),
        processors.NoRepeatNGramLogitsProcessor(2),
        processors.NoBadWordsLogitsProcessor([[3], [4, 5], [2, 6, 1]], eos_token_id=eos),
        processors.SequenceBiasLogitsProcessor([[[2], 1.5], [[3, 1], -2.0]]),
        processors.MinLengthLogitsProcessor(length, eos),
        processors.MinNewTokensLengthLogitsProcessor(PROMPT, length - PROMPT, eos),
        processors.SuppressTokensAtBeginLogitsProcessor([1, 2], length),
        processors.ExponentialDecayLengthPenalty((length - PROMPT, 1.3), eos, PROMPT),
        processors.ForcedEOSTokenLogitsProcessor(length + 3, 5),
        processors.SuppressTokensLogitsProcessor([4]),
        processors.TemperatureLogitsWarper(0.7),
    ]


def policy(given: list[Any], outputs: list[list[int]], stops: list[Any] | None = None) -> Policy:
    """Of a request whose rows have emitted so much; prompts of four tokens."""
    config = SimpleNamespace(return_dict_in_generate=False, output_scores=False, _pad_token_tensor=torch.tensor(0))
    prompts = torch.arange(PROMPT * len(outputs)).view(len(outputs), PROMPT) % 7
    stops = [criteria.MaxLengthCriteria(99), criteria.EosTokenCriteria(torch.tensor([9]))] if stops is None else stops
    made = Policy(prompts, given, stops, config, None)
    made.outputs = outputs
    return made


def node_by_node(asked: Policy, tree: TokenTree, logits: Tensor) -> Tensor:
    """As plain decoding would ask: for every node, with the text that leads to it."""
    scores = torch.empty_like(logits)
    for row, paths in enumerate(tree.topology.paths.expand(tree.batch_size, -1, -1).tolist()):
        group = asked.groups[row]
        for node, path in enumerate(paths):
            tokens = [int(tree.token_ids[row, step]) for step in path[1:] if step >= 0]
            ids = torch.cat([asked.ids([row]), torch.tensor([tokens], dtype=torch.int64)], dim=1)
            ids = ids[:, : PROMPT + len(asked.outputs[row]) + len(tokens)]
            scores[row, node] = asked.process(group, ids, logits[row, node][None])[0]
    return scores


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_are_those_of_every_node_asked_alone(shared: bool, ragged: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(6):
        tree = random_tree(seed, batch=3, shared=shared)
        outputs = [torch.randint(0, 9, (2 + ragged * row * seed,), generator=generator).tolist() for row in range(3)]
        logits = torch.randn(3, tree.num_nodes, 12, generator=generator)
        for one in (*[[p] for p in forced(PROMPT + 3)], forced(PROMPT + 3)):
            asked = policy(one, outputs)
            assert asked.by_length
            assert torch.equal(asked.score(logits, tree), node_by_node(asked, tree, logits)), type(one[0]).__name__


@pytest.mark.usefixtures("_on_a_device")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_text_on_a_device(name: str, batch: int) -> None:
    assert_same(case(PROCESSORS[name], batch))
    assert_same(case(PROCESSORS[name], batch, do_sample=True), SPECULATING, reference="none", seed=batch)


@pytest.mark.usefixtures("_on_a_device")
@pytest.mark.parametrize("name", sorted(ALONG_THE_WALK))
def test_others_are_asked_along_the_walk_there_too(name: str) -> None:
    assert_same(case(PROCESSORS[name], 3))


def test_who_is_asked_along_the_walk() -> None:
    """What keeps or reads back anything, what a user wrote, and whatever goes with a criterion that reads the ids."""
    penalty = processors.RepetitionPenaltyLogitsProcessor(1.4)
    assert policy([penalty], [[1]]).by_length
    prompts = torch.tensor([[3, 4, 5, 6]])
    lazy = [
        processors.EncoderNoRepeatNGramLogitsProcessor(2, prompts),
        processors.PrefixConstrainedLogitsProcessor(lambda *_: [1], 1),
        processors.TopHLogitsWarper(0.5),
        processors.WatermarkLogitsProcessor(12, "cpu"),
        processors.LogitsProcessor(),
    ]
    for processor in lazy:
        assert not policy([penalty, processor], [[1]]).by_length
    assert not policy([penalty], [[1]], [criteria.StoppingCriteria()]).by_length
    # One prompt for two rows, as num_return_sequences makes them.
    assert not policy([processors.EncoderRepetitionPenaltyLogitsProcessor(1.5, prompts)], [[1], [2]]).by_length


def calls_of(monkeypatch: pytest.MonkeyPatch, batch: int) -> list[tuple[int, ...]]:
    """Shapes of the ids that a processor is shown while a text is decoded in trees of 13 nodes on 4 levels."""
    shown: list[tuple[int, ...]] = []
    ask = processors.RepetitionPenaltyLogitsProcessor.__call__

    def counted(self: Any, input_ids: Tensor, scores: Tensor) -> Tensor:
        shown.append(tuple(input_ids.shape))
        return ask(self, input_ids, scores)

    arguments = case({"repetition_penalty": 1.2}, batch)
    right = new_text(run("plain", arguments), arguments)
    with monkeypatch.context() as patch:
        patch.setattr(processors.RepetitionPenaltyLogitsProcessor, "__call__", counted)
        chosen = specdec.speculate(model("plain"), RightAmongDecoys(VOCAB, 4, right))
        try:
            assert new_text(chosen.generate(**arguments), arguments) == right
        finally:
            specdec.restore(chosen)
    return shown


@pytest.mark.usefixtures("_on_a_device")
def test_one_call_per_length_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens: one from the prompt, then in trees of 4 levels five per step."""
    levels = [1, 3, 3, 3, 3]
    alone = calls_of(monkeypatch, 1)
    assert alone == [(1, 9), *[(n, 10 + 5 * step + depth) for step in range(3) for depth, n in enumerate(levels)]]
    # Rows that go along together share their calls.
    together = calls_of(monkeypatch, 3)
    assert together == [(3 * rows, length) for rows, length in alone]


def test_on_the_host_only_the_walk_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_of(monkeypatch, 1) == [(1, 9 + position) for position in range(16)]
