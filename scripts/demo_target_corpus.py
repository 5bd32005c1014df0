"""The corpus of the demo target: documents, tokenizer and the deterministic token stream that training reads.

GSM8K problems are rendered in the chat format; functions of the standard library in the chat format where they have
a docstring, as plain text otherwise (and in a quarter of the other cases, so that plain prompts work as well).
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specdec.demo.heldout import gsm8k_problems, stdlib_functions

DOMAINS = ("gsm8k", "code")
BOS, EOS, PAD, END = "<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|end|>"
SPECIAL = [EOS, BOS, PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
PLAIN_EPOCHS = 2
SYSTEM_PROMPT = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_NAME_WITH_VERB = re.compile(
    r"\b([A-Z][a-z]+) (?:has|had|is|was|wants|needs|buys|bought|sells|sold|makes|made|gets|got|goes|went|works|eats)\b"
)
_SHE = re.compile(r"\b(?:she|her|hers|She|Her)\b")
_HE = re.compile(r"\b(?:he|his|him|He|His)\b")


def chat_document(user: str, assistant: str, *, system: bool = False) -> str:
    """One exchange as the chat template renders it."""
    head = f"<|system|>{SYSTEM_PROMPT}{END}" if system else ""
    return f"{BOS}{head}<|user|>{user}{END}<|assistant|>{assistant}{EOS}"


def documents(domain: str, gsm8k: Path, heldout: bool, epoch: int = 0) -> list[str]:
    """The documents of one domain on one side of the split, in a fixed order.

    Epochs from ``PLAIN_EPOCHS`` on vary the texts: GSM8K with other first names, functions in the other format.
    """
    variant = max(0, epoch + 1 - PLAIN_EPOCHS)
    texts = []
    if domain == "gsm8k":
        problems = gsm8k_problems(gsm8k, heldout=heldout)
        rename = NameSwap([p.question for p in problems], variant) if variant else str
        for index, problem in enumerate(problems):
            # Every 20th with a system turn, so that its token is trained as well.
            system = (index + variant) % 20 == 0
            texts.append(rename(chat_document(problem.question, problem.answer, system=system)))
        return texts
    for index, function in enumerate(stdlib_functions(heldout=heldout)):
        if function.summary and (index + variant) % 4:
            texts.append(chat_document(function.request, function.source))
        else:
            texts.append((BOS if (index + variant) % 2 else "") + function.source + EOS)
    return texts


class NameSwap:
    """Replaces the first names in a text, consistently and by names used with the same pronouns.

    A model that has read each problem under several names has to copy the name from the question. A name is a
    capitalised word that ``has``, ``buys`` ... something and never occurs in lower case.
    """

    def __init__(self, questions: list[str], seed: int) -> None:
        self._random = random.Random(seed)
        lower = {word for text in questions for word in re.findall(r"\b[a-z]+\b", text)}
        found = Counter(name for text in questions for name in _NAME_WITH_VERB.findall(text))
        names = {name for name, count in found.items() if count >= 2 and name.lower() not in lower}
        lean: Counter[str] = Counter()
        for text in questions:
            if len(inside := names.intersection(re.findall(r"[A-Z][a-z]+", text))) == 1:
                lean[inside.pop()] += len(_SHE.findall(text)) - len(_HE.findall(text))
        self._lean = {name: (lean[name] > 0) - (lean[name] < 0) for name in names}
        self._pools = {sign: sorted(name for name in names if self._lean[name] == sign) for sign in (-1, 0, 1)}
        self._pattern = re.compile(r"\b(" + "|".join(sorted(names)) + r")\b")

    def __call__(self, text: str) -> str:
        inside = sorted(set(self._pattern.findall(text)))
        swap: dict[str, str] = {}
        for name in inside:
            swap[name] = self._random.choice([n for n in self._pools[self._lean[name]] if n not in swap.values()])
        return self._pattern.sub(lambda match: swap[match[0]], text)


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
    """An endless token stream: the documents of each epoch, ``texts(epoch)``, in a new order.

    Position ``p`` of the stream depends on the seed alone, so a run is resumed by computing where it stood. To that
    end all epochs get the length of the first: longer ones are cut, shorter ones begin again.
    """

    def __init__(self, texts: Callable[[int], list[str]], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._texts, self._tokenizer, self._seed = texts, tokenizer, seed
        self._epoch, self._tokens = 0, self._epoch_ids(0)
        self.epoch_tokens = len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` token ids from position ``start``."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.epoch_tokens)
            if epoch != self._epoch:
                self._epoch, self._tokens = epoch, np.resize(self._epoch_ids(epoch), self.epoch_tokens)
            parts.append(self._tokens[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _epoch_ids(self, epoch: int) -> np.ndarray:
        docs = encode_all(self._tokenizer, self._texts(epoch))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(docs))
        return np.concatenate([docs[i] for i in order])


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each document; special tokens are written out in the texts."""
    return [np.asarray(ids, np.int64) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
