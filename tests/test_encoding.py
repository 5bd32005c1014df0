"""Documents as tokens: what is wanted is what the target writes, behind what ``generate`` would have read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specdec.loading import DEMO_FOLDER, Loaded
from specdec.training.corpus import Document
from specdec.training.encoding import EncodedText, Encoder

# Puts a line break behind the token that ends a turn, as many templates do; the target never writes it.
LINES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Drops the reasoning of every answer but the last, and begins new answers with it.
REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
# The same, but new answers begin like the last one.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Takes the space around what is said away.
TRIMMED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Nothing but the turn itself says that an answer begins.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_FOLDER)


def talk(*contents: str, finished: bool = True, system: str | None = None) -> Document:
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return Document((*head, *turns), finished=finished)


def wanted(tokenizer: Any, text: EncodedText) -> list[str]:
    """What is wanted of a text, as its unbroken stretches."""
    marks = np.flatnonzero(np.diff(np.concatenate([[0], text.wanted.astype(int), [0]])))
    return [tokenizer.decode(text.token_ids[first:last].tolist()) for first, last in marks.reshape(-1, 2)]


def prompt_of(tokenizer: Any, messages: list[Any]) -> list[int]:
    """What ``generate`` reads."""
    loaded = Loaded(SimpleNamespace(device="cpu", config=SimpleNamespace(get_text_config=dict)), tokenizer, "test")
    return loaded.encode(messages)[0].tolist()


def encoder(tokenizer: Any, template: str) -> Encoder:
    tokenizer.chat_template = template
    return Encoder(tokenizer, [tokenizer.convert_tokens_to_ids("<|end|>")])


def test_answers_with_their_end(tokenizer: Any) -> None:
    document = talk("How many?", "Two.\n#### 2", "And then?", "    Three", system="Be brief.")
    (text,) = Encoder(tokenizer)(document)
    messages = [dict(turn) for turn in document.messages]
    assert text.token_ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert wanted(tokenizer, text) == ["Two.\n#### 2<|endoftext|>", "    Three<|endoftext|>"]
    for first, turns in zip(np.flatnonzero(np.diff(text.wanted.astype(int)) == 1) + 1, (2, 4), strict=True):
        assert text.token_ids[:first].tolist() == prompt_of(tokenizer, messages[:turns])


def test_nothing_behind_the_end_of_an_answer(tokenizer: Any) -> None:
    (text,) = encoder(tokenizer, LINES)(talk("How many?", "Two.", "Thanks", "Bye"))
    assert wanted(tokenizer, text) == ["Two.<|end|>", "Bye<|end|>"]
    assert tokenizer.decode(text.token_ids[-4:].tolist()) == "Bye<|end|>\n"


def test_generation_blocks_say_it_themselves(tokenizer: Any) -> None:
    document = talk("How many?", "Two.", "And?", "No more.")
    (text,) = encoder(tokenizer, GENERATION)(document)
    messages = [dict(turn) for turn in document.messages]
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert text.token_ids.tolist() == theirs["input_ids"]
    assert text.wanted.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]
    (text,) = encoder(tokenizer, GENERATION)(talk("Code?", "    return 1\n", finished=False))
    assert wanted(tokenizer, text) == ["    return 1\n"]


@pytest.mark.parametrize("template", [None, LINES, GENERATION, STRICT, TRIMMED])
def test_a_cut_answer_ends_where_it_was_cut(template: str | None, tokenizer: Any) -> None:
    made = Encoder(tokenizer) if template is None else encoder(tokenizer, template)
    end = "<|endoftext|>" if template is None else "<|end|>"
    (text,) = made(talk("How many?", "Two.", "And?", "The en", finished=False))
    assert wanted(tokenizer, text) == [f"Two.{end}", "The en"]
    assert text.wanted[-1], "nothing stands behind it"


def test_a_template_that_trims(tokenizer: Any) -> None:
    (text,) = encoder(tokenizer, TRIMMED)(talk("a", " Two. ", "b", " The en ", finished=False))
    assert wanted(tokenizer, text) == ["Two.<|end|>", "The en"]


def test_brackets(tokenizer: Any) -> None:
    tokenizer.chat_template = BRACKETS
    (text,) = Encoder(tokenizer)(talk("a", "Two.", "b", "The en", finished=False))
    assert wanted(tokenizer, text) == [" Two.<|endoftext|>", " The en"]


def test_offsets_without_the_space_before_a_word(tokenizer: Any) -> None:
    """As GPT-2's and Llama-3's tokenizers have them."""
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    document = talk("  a  ", "    return  1   ", "b", "   ")
    (text,) = Encoder(tokenizer)(document)
    assert wanted(tokenizer, text) == ["    return  1   <|endoftext|>", "   <|endoftext|>"]
    (text,) = Encoder(tokenizer)(talk("a", "b  c   ", finished=False))
    assert wanted(tokenizer, text) == ["b  c   "]
    (text,) = Encoder(tokenizer)(Document(text="def f():\n    <|end|>", prompt="def f():\n    ", finished=False))
    assert wanted(tokenizer, text) == ["<|end|>"]


def test_a_tokenizer_that_marks_words() -> None:
    """As Llama-2's and Mistral's: a word carries the space before it, and the first one gets one."""
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    words.train_from_iterator(["two three four"] * 9, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = BRACKETS.replace("[INST]", "two").replace("[/INST]", "three")
    (text,) = Encoder(fast)(talk("four", "two four", "three", "four two"))
    assert [said.strip() for said in wanted(fast, text)] == ["two four</s>", "four two</s>"]
    assert fast.decode(text.token_ids.tolist()) == fast.decode(
        fast.apply_chat_template([dict(turn) for turn in talk("four", "two four", "three", "four two").messages])[
            "input_ids"
        ]
    )


@pytest.mark.parametrize("template", [REASONING, FORGETFUL])
def test_a_template_that_drops_reasoning_gives_each_answer_its_own_text(template: str, tokenizer: Any) -> None:
    document = talk("a", "<think>x</think>b", "c", "y</think>d")
    first, second = encoder(tokenizer, template)(document)
    messages = [dict(turn) for turn in document.messages]
    for text, turns in ((first, 1), (second, 3)):
        prompt = prompt_of(tokenizer, messages[:turns])
        assert text.token_ids[: len(prompt)].tolist() == prompt
        assert not text.wanted[: len(prompt)].any()
        assert text.wanted[len(prompt) :].all()
    assert wanted(tokenizer, first) == ["<think>x</think>b<|end|>"]
    assert wanted(tokenizer, second) == ["y</think>d<|end|>"]
    assert "<think>x" not in tokenizer.decode(second.token_ids.tolist())


def test_what_a_template_refuses_is_left_out_with_its_reason(tokenizer: Any) -> None:
    odd = Document(tuple({"role": "user", "content": "x"} for _ in range(2)) + talk("a", "b").messages, document_id=9)
    made = encoder(tokenizer, STRICT).encode([talk("a", "b"), odd, talk("c", "d")], 64)
    assert len(made.texts) == 2
    assert made.refused == ["9: the chat template refuses it: roles must alternate"]
    assert made.notes(64) == ["left out 1 texts, the first: 9: the chat template refuses it: roles must alternate"]


def test_an_answer_to_nothing_is_none(tokenizer: Any) -> None:
    greeting = Document(({"role": "assistant", "content": "Hello"}, *talk("a", "b").messages))
    (text,) = Encoder(tokenizer)(greeting)
    assert wanted(tokenizer, text) == ["b<|endoftext|>"]
    with pytest.raises(ValueError, match="an assistant turn that answers something"):
        Encoder(tokenizer)(Document(greeting.messages[:1]))


def test_without_a_template_the_answer_follows_the_prompt_that_generate_reads(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    document = talk("How many?", " Two.", "And?", " Three.", finished=False)
    first, second = Encoder(tokenizer)(document)
    for text, turns in ((first, 1), (second, 3)):
        prompt = prompt_of(tokenizer, [dict(turn) for turn in document.messages[:turns]])
        assert text.token_ids[: len(prompt)].tolist() == prompt
    assert wanted(tokenizer, first) == [" Two.<|endoftext|>"]
    assert wanted(tokenizer, second) == [" Three."]
    with pytest.raises(ValueError, match="use chat=false"):
        Encoder(tokenizer, chat=True)


def test_chat_false_leaves_the_template_alone(tokenizer: Any) -> None:
    (text,) = Encoder(tokenizer, chat=False)(talk("a", "b"))
    assert tokenizer.decode(text.token_ids.tolist()) == "ab<|endoftext|>"


def test_plain_texts(tokenizer: Any) -> None:
    source = "def total(items):\n    return sum(items)\n"
    (text,) = Encoder(tokenizer)(Document(text=source))
    assert text.token_ids.tolist() == [*tokenizer(source)["input_ids"], tokenizer.eos_token_id]
    assert text.wanted.tolist() == [False] + [True] * (len(text.wanted) - 1)
    (text,) = Encoder(tokenizer)(Document(text=source, prompt="def total(items):", finished=False))
    assert wanted(tokenizer, text) == ["\n    return sum(items)\n"]


@pytest.mark.parametrize("single", ["<|startoftext|> $A", "<|startoftext|> $A <|endoftext|>"])
def test_what_the_tokenizer_adds_itself(single: str, tokenizer: Any) -> None:
    known = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|startoftext|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)
    for finished, end in ((True, "<|endoftext|>"), (False, "")):
        (text,) = Encoder(tokenizer)(Document(text="one two", finished=finished))
        assert tokenizer.decode(text.token_ids.tolist()) == f"<|startoftext|>one two{end}"
        assert wanted(tokenizer, text) == [f"one two{end}"]
    (text,) = Encoder(tokenizer)(talk("a", "b"))
    assert tokenizer.decode(text.token_ids.tolist()).count("<|startoftext|>") == 1


def test_characters_of_several_tokens(tokenizer: Any) -> None:
    (text,) = Encoder(tokenizer)(talk("λ → 𝛼", "ü 𝛼𝛽 →"))
    assert wanted(tokenizer, text) == ["ü 𝛼𝛽 →<|endoftext|>"]


def test_too_long(tokenizer: Any) -> None:
    made = Encoder(tokenizer)
    long_text, long_talk, long_prompt = Document(text="x y " * 20), talk("a", "b " * 40), talk("b " * 40, "a")
    said = made.encode([long_text, long_talk, long_prompt, talk("a", "b")], 16)
    assert all(len(text.token_ids) <= 16 for text in said.texts)
    whole = made(long_text)[0]
    assert np.concatenate([text.token_ids for text in said.texts[: said.pieces]]).tolist() == whole.token_ids.tolist()
    assert not any(text.wanted[0] for text in said.texts)
    assert (said.cut, said.unwanted, len(said.texts)) == (2, 1, said.pieces + 2)
    assert said.notes(16) == [
        "cut 2 conversations at 16 tokens",
        f"split long texts into {said.pieces} pieces of at most 16 tokens",
        "left out 1 texts without a token to predict",
    ]
    with pytest.raises(
        ValueError, match="nothing to learn from in 1 texts: cut 1 conversations at 16 tokens; left out"
    ):
        made.encode([long_prompt], 16)
    with pytest.raises(ValueError, match="expected length to be a whole number of at least 2, got 1"):
        made.encode([long_prompt], 1)


def test_many_at_once_are_as_one_by_one(tokenizer: Any) -> None:
    documents = [talk(f"{n} + {n}?", f"{2 * n}") if n % 3 else Document(text=f"{n} is {n}") for n in range(600)]
    steps = list[int]()
    made = Encoder(tokenizer).encode(documents, 64, steps.append)
    assert sum(steps) == 600
    for document, text in zip(documents, made.texts, strict=True):
        (alone,) = Encoder(tokenizer)(document)
        assert text.token_ids.tolist() == alone.token_ids.tolist()
        assert text.wanted.tolist() == alone.wanted.tolist()


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand() -> None:
    with pytest.raises(ValueError, match="expected a fast tokenizer"):
        Encoder(SimpleNamespace(is_fast=False))
