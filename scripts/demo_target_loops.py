"""Repetition in the demo target's own greedy text: prompts that provoke it, where it is, and the loss against it.

The loss is sequence-level unlikelihood (Welleck et al. 2019, arXiv:1908.04319, equation 5), with two differences. A
token is penalised for belonging to a repeated block, not for closing an n-gram that occurred before: code repeats
n-grams all the time. And it counts as much as it was a free choice in the first copy of its block, ``1 - p`` there:
what syntax or spelling forces is forced in every copy, and unlearning it would damage the language instead.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_target_corpus import BOS, END, NameSwap
from specdec.demo.heldout import Function, gsm8k_problems, stdlib_functions
from specdec.metrics import LONG_REPETITION, MIN_LOOP_SPAN

MAX_BLOCK = 64
MIN_PAIR_BLOCK = 8
BRIDGE = 5


def repeat_origins(ids: Sequence[int]) -> np.ndarray:
    """Which tokens repeat a block, int64 [len(ids)]: the position of the token's like in the first copy, or -1.

    A block of 1..64 tokens counts as repeated wherever three whole copies follow each other (spanning 8 tokens or
    more), where 48 tokens continue its period, or where a block of 8 tokens or more stands twice in a row. A token that
    differs from copy to copy does not end the repetition if the five before and after it agree (a counter, say); it is
    not marked itself. Where periods compete, the shortest one counts.
    """
    tokens = np.asarray(ids, np.int64)
    origins = np.full(len(tokens), -1, np.int64)
    for block in range(1, min(MAX_BLOCK, len(tokens) - 1) + 1):
        same = np.zeros(len(tokens), bool)
        same[block:] = tokens[block:] == tokens[:-block]
        if np.count_nonzero(same) <= BRIDGE:
            continue  # Nothing that counts repeats so little.
        for start, end in _runs(_bridged(same)):
            length = end - start
            copies = length + block >= max(3 * block, MIN_LOOP_SPAN)
            if copies or length >= LONG_REPETITION or (block >= MIN_PAIR_BLOCK and length >= block):
                where = np.arange(start, end)
                where = where[same[start:end] & (origins[start:end] < 0)]
                origins[where] = start - block + (where - start) % block
    return origins


def _bridged(same: np.ndarray) -> np.ndarray:
    """``same`` with each single gap closed that has ``BRIDGE`` agreeing positions on both sides."""
    padded = np.concatenate([np.zeros(BRIDGE, np.int64), same, np.zeros(BRIDGE, np.int64)])
    sums = np.convolve(padded, np.ones(BRIDGE, np.int64), mode="valid")  # sums[i]: of the BRIDGE positions before i
    return same | ((sums[: len(same)] == BRIDGE) & (sums[-len(same) :] == BRIDGE))


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """The maximal stretches of true flags as half-open intervals."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def unlikelihood(logits: Tensor, tokens: Tensor, origins: Tensor) -> Tensor:
    """The penalty of each token, ``-(1 - p_origin) log(1 - p)`` where it repeats, 0 elsewhere; float32 [rows, length].

    Args:
        logits: predictions of the tokens, float [rows, length, vocabulary].
        tokens: int64 [rows, length].
        origins: int64 [rows, length], position along ``length`` of the first copy, -1 where nothing is repeated. The
            probability there only weighs the penalty and gets no gradient.
    """
    scores = logits.float()
    chosen = tokens.unsqueeze(-1)
    everything = scores.logsumexp(-1)
    # The logarithm of 1 - p as a sum over the other tokens: exact where p rounds to one.
    others = scores.scatter(-1, chosen, float("-inf")).logsumexp(-1)
    p = (scores.gather(-1, chosen).squeeze(-1) - everything).exp().detach()
    freedom = 1 - p.gather(-1, origins.clamp(min=0))
    return torch.where(origins >= 0, freedom * (everything - others), 0.0)


def model_unlikelihood(model: LlamaForCausalLM, batch: Tensor, origins: Tensor) -> Tensor:
    """``unlikelihood`` of tokens 1.. of each row: int64 [rows, length + 1] twice -> float32 [rows, length]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return unlikelihood(logits, batch[:, 1:], (origins[:, 1:] - 1).clamp(min=-1))


def chat_prompt(turn: str) -> str:
    """A user turn as the chat template renders it, up to where the answer begins."""
    return f"{BOS}<|user|>{turn}{END}<|assistant|>"


class Prompts:
    """Prompts from the training side of the split, in the three forms the target is used in.

    Half of those for functions join the signature of one function to the docstring of another, and the first names in
    GSM8K are swapped: what the model has not read as it stands, it answers as it answers held-out prompts.
    """

    def __init__(self, gsm8k: Path) -> None:
        self._questions = [problem.question for problem in gsm8k_problems(gsm8k, heldout=False)]
        self._functions = [function for function in stdlib_functions(heldout=False) if function.summary]

    def draw(self, counts: tuple[int, int, int], seed: int) -> list[str]:
        """So many GSM8K questions (chat), function requests (chat) and function headers (plain text)."""
        rng = random.Random(seed)
        rename = NameSwap(self._questions, seed)
        questions, requests, headers = counts
        texts = [chat_prompt(rename(question)) for question in rng.sample(self._questions, questions)]
        texts += [chat_prompt(self._crossed(index, rng).request) for index in range(requests)]
        return texts + [self._crossed(index, rng).header for index in range(headers)]

    def _crossed(self, index: int, rng: random.Random) -> Function:
        function, other = rng.sample(self._functions, 2)
        if index % 2:
            return function
        header = f'def {function.signature}:\n    """{other.summary}"""'
        return Function(function.name, function.signature, other.summary, header, "")


@torch.inference_mode()
def greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], new_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Each prompt's ids with its greedy continuation, end-of-text and what follows it removed."""
    # Padded here: the tokenizer would keep the padding as a setting of its own and save it.
    rows = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)[:, width:]
    ends = [row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row) for row in out.tolist()]
    return [(prompt, row[:end]) for prompt, row, end in zip(rows, out.tolist(), ends, strict=True)]


def repeated_rows(pairs: list[tuple[list[int], list[int]]], length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of prompts with continuations, those with a repetition: ids and origins, int64 [length + 1] each.

    Rows are cut or padded on the right (a causal model does not see it). Repetition of the prompt does not count.
    """
    rows = []
    for prompt, continuation in pairs:
        ids, origins = np.zeros(length + 1, np.int64), np.full(length + 1, -1, np.int64)
        text = np.asarray(prompt + continuation, np.int64)[: length + 1]
        ids[: len(text)] = text
        found = repeat_origins(continuation)
        marks = np.concatenate([np.full(len(prompt), -1), np.where(found >= 0, found + len(prompt), -1)])[: length + 1]
        origins[: len(marks)] = marks
        if (origins >= 0).any():
            rows.append((ids, origins))
    return rows
