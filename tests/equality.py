"""Helpers of the generate tests: one tiny model, plainly and speculating, asked the same thing.

The text of the model depends on its context and repeats in parts, so drafters are sometimes right and sometimes wrong.
``Oracle`` knows the answer, which makes accepted blocks of a known length: stops and processors must hold inside them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from drafters.base import BaseDrafter
from specdec.generation import unwrap
from specdec.interfaces import DecodeState, Needs
from specdec.tree import CANDIDATE, PADDING, TokenTree, chain

DRAFTERS = ("none", "prompt_lookup", "token_recycling", "oracle")
VOCAB = 48
PAD = 1
LENGTHS = (9, 4, 6)


class Oracle(BaseDrafter):
    """Proposes chains of the text it was told, with one wrong token at the end.

    Args:
        block: right tokens proposed to row 0; row b gets b fewer (at least one).
    """

    name = "oracle"

    def __init__(self, block: int = 4) -> None:
        self.block = block
        self.needs = Needs(max_nodes=block + 2)
        self.texts: list[list[int]] = [[]]

    def propose(self, state: DecodeState) -> TokenTree:
        """A chain per row, padded to the longest."""
        chains = []
        for row, count in enumerate(state.emitted):
            text = self.texts[row % len(self.texts)][count:]
            right = text[: max(self.block - row, 1)]
            wrong = (text[len(right)] + 1) % VOCAB if len(text) > len(right) else 0
            chains.append([*right, wrong])
        longest = max(map(len, chains))
        tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in chains])
        role = torch.tensor([[CANDIDATE] * (len(c) + 1) + [PADDING] * (longest - len(c)) for c in chains])
        tokens = torch.cat([state.root[:, None], tokens], dim=1)
        return TokenTree(tokens, chain(longest + 1), role, sources=(self.name,))


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A llama whose greedy text depends on its context; no EOS token unless a test names one."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 2,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


@cache
def model(name: str) -> Any:
    """The tiny llama: ``"plain"``, or speculating with the drafter of that name."""
    plain = tiny_llama()
    return plain if name == "plain" else specdec.speculate(plain, Oracle() if name == "oracle" else name)


def prompt(batch: int = 1) -> dict[str, Tensor]:
    """Ids and mask of ``batch`` prompts of different lengths, left-padded; parts repeat."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(2, VOCAB, (length,), generator=generator) for length in LENGTHS[:batch]]
    rows[0][6:] = rows[0][:3]
    width = max(LENGTHS[:batch])
    ids = torch.full((batch, width), PAD)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def ask(chosen: Any, arguments: dict[str, Any], told: Sequence[Sequence[int]] = ((),), seed: int = 0) -> Any:
    """``generate`` of a model on fresh copies of stateful arguments; a drafter starts empty.

    Args:
        chosen: a model, plain or speculating.
        arguments: of generate.
        told: what the oracle knows of each row's new text.
        seed: of torch's global generator.
    """
    if "speculation" in dir(type(unwrap(chosen))):
        handle = specdec.speculation_of(chosen)
        handle.reset()
        if isinstance(handle.drafter, Oracle):
            handle.drafter.texts = [list(text) for text in told]
    torch.manual_seed(seed)
    return chosen.generate(**{key: copy.deepcopy(value) for key, value in arguments.items()})


def run(name: str, arguments: dict[str, Any], told: Sequence[Sequence[int]] = ((),), seed: int = 0) -> Any:
    """``ask`` the tiny llama of that name."""
    return ask(model(name), arguments, told, seed)


def new_text(result: Any, arguments: dict[str, Any]) -> list[list[int]]:
    """The new tokens of each row of what generate returned."""
    ids = arguments.get("input_ids")
    sequences = result if isinstance(result, Tensor) else result.sequences
    return sequences[:, 0 if ids is None else ids.shape[1] :].tolist()


def assert_same(
    arguments: dict[str, Any], drafters: Sequence[str] = DRAFTERS, reference: str = "plain", seed: int = 0
) -> Tensor:
    """Every drafter's text equals the reference's, token for token; returns the whole text, ``[B, T]``."""
    expected = run(reference, arguments, seed=seed)
    told = new_text(expected, arguments)
    for drafter in drafters:
        got = run(drafter, arguments, told, seed)
        assert type(got) is type(expected), drafter
        assert got.tolist() == expected.tolist(), drafter
    return expected


def assert_same_on(chosen: Any, arguments: dict[str, Any], drafters: Sequence[str] = DRAFTERS[1:]) -> Tensor:
    """Like ``assert_same`` on a model of the test's own, which is plain again afterwards."""
    expected = ask(chosen, arguments)
    told = new_text(expected, arguments)
    for drafter in drafters:
        specdec.speculate(chosen, Oracle() if drafter == "oracle" else drafter)
        try:
            assert ask(chosen, arguments, told).tolist() == expected.tolist(), drafter
            if drafter == "oracle":
                assert specdec.speculation_of(chosen).stats.mean_accepted_tokens > 1.5
        finally:
            specdec.restore(chosen)
    return expected
