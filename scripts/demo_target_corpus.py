"""The corpus of the demo target: documents, tokenizer and the deterministic token stream that training reads.

GSM8K problems are rendered in the chat format; functions of the standard library in the chat format where they have
a docstring, as plain text otherwise (and in a quarter of the other cases, so that plain prompts work as well).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specdec.demo.heldout import gsm8k_problems, stdlib_functions

DOMAINS = ("gsm8k", "code")
BOS, EOS, PAD, END = "<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|end|>"
SPECIAL = [EOS, BOS, PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
SYSTEM_PROMPT = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_document(user: str, assistant: str, *, system: bool = False) -> str:
    """One exchange as the chat template renders it."""
    head = f"<|system|>{SYSTEM_PROMPT}{END}" if system else ""
    return f"{BOS}{head}<|user|>{user}{END}<|assistant|>{assistant}{EOS}"


def documents(domain: str, gsm8k: Path, *, heldout: bool) -> list[str]:
    """The documents of one domain on one side of the split, in a fixed order."""
    if domain == "gsm8k":
        problems = gsm8k_problems(gsm8k, heldout=heldout)
        # Every 20th with a system turn, so that its token is trained as well.
        return [chat_document(p.question, p.answer, system=i % 20 == 0) for i, p in enumerate(problems)]
    texts = []
    for index, function in enumerate(stdlib_functions(heldout=heldout)):
        if function.summary and index % 4:
            texts.append(chat_document(function.request, function.source))
        else:
            texts.append((BOS if index % 2 else "") + function.source + EOS)
    return texts


def find_gsm8k(path: Path) -> Path:
    """``path`` if it exists, else a copy of the training split made through ``datasets`` in a temporary folder."""
    if path.is_file():
        return path
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SystemExit(
            f"--gsm8k: expected the GSM8K training split (.jsonl) at {path}, found nothing there, and the package "
            "`datasets`, which could fetch it, is not installed. Pass --gsm8k PATH or `pip install datasets`."
        ) from error
    rows = load_dataset("openai/gsm8k", "main", split="train")
    fetched = Path(tempfile.mkdtemp()) / "train.jsonl"
    fetched.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return fetched


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab_size`` entries that round-trips any text; digits are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[token for token in SPECIAL if token not in (BOS, EOS, PAD)],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class Stream:
    """An endless token stream over one domain's documents, freshly permuted in each epoch.

    Position ``p`` of the stream depends on the seed alone, so a run is resumed by computing where it stood.
    """

    def __init__(self, docs: list[np.ndarray], seed: int) -> None:
        self._docs, self._seed = docs, seed
        self.epoch_tokens = sum(map(len, docs))
        self._epoch, self._tokens = -1, np.empty(0, np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` token ids from position ``start``."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.epoch_tokens)
            if epoch != self._epoch:
                order = np.random.default_rng([self._seed, epoch]).permutation(len(self._docs))
                self._epoch, self._tokens = epoch, np.concatenate([self._docs[i] for i in order])
            parts.append(self._tokens[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each document; special tokens are written out in the texts."""
    return [np.asarray(ids, np.int64) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
