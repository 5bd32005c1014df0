"""Documents as token ids, with the tokens that a draft should predict: those that the target writes itself.

A conversation is rendered by the tokenizer's own chat template. What is wanted of it: each answer with the token that
ends it, and nothing that the template puts behind that token, since ``generate`` has stopped there. Where answers lie
is found on characters of the rendered text: by the template's ``{% generation %}`` blocks where it has them, else from
the prompt that ``generate`` would have read before each answer, checked to be what the whole begins with. Templates
that render earlier answers otherwise than new ones (they drop reasoning) give each answer as a text of its own, behind
the prompt that ``generate`` would have read.

Shapes: T tokens of a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from specdec.loading import Loaded
from specdec.training.corpus import Document, Message

_CHUNK = 256  # documents per call of the tokenizer, which spreads them over its threads
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EncodedText:
    """One text: int32 ``token_ids [T]``, and bool ``wanted [T]``, the tokens to be predicted."""

    token_ids: np.ndarray
    wanted: np.ndarray


@dataclass
class Encoded:
    """What came of some documents.

    Attributes:
        texts: in their order.
        cut: conversations whose end was lost because they were too long.
        pieces: texts that came of plain texts too long for one.
        unwanted: texts left out because no token of them is wanted, such as a prompt that fills the whole length.
        refused: why documents were left out, one entry each.
    """

    texts: list[EncodedText] = field(default_factory=list)
    cut: int = 0
    pieces: int = 0
    unwanted: int = 0
    refused: list[str] = field(default_factory=list)

    def notes(self, length: int) -> list[str]:
        """What a user should be told."""
        said = [f"left out {len(self.refused)} texts, the first: {self.refused[0]}"] if self.refused else []
        said += [f"cut {self.cut} conversations at {length} tokens"] if self.cut else []
        said += [f"split long texts into {self.pieces} pieces of at most {length} tokens"] if self.pieces else []
        return said + ([f"left out {self.unwanted} texts without a token to predict"] if self.unwanted else [])


@dataclass(frozen=True)
class _Rendered:
    """A text before tokenization.

    Attributes:
        text: all of it.
        spans: of the characters whose tokens are wanted.
        closed: put the end token behind it, where it does not end with one.
        bare: it holds no special tokens yet; the tokenizer adds its own, as ``generate`` sees them.
    """

    text: str
    spans: list[tuple[int, int]]
    closed: bool = False
    bare: bool = False


class Encoder:
    """Documents as texts of one target.

    Args:
        tokenizer: a fast one, which says where in the text a token stands.
        eos_ids: tokens that end what the target writes; None = the tokenizer's own.
        chat: put conversations into the chat template; None = where there is one.

    Raises:
        ValueError: the tokenizer cannot say where its tokens stand, or has no chat template where one is asked for.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int] | None = None, chat: bool | None = None) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say where in a text its tokens stand; expected a fast tokenizer"
            )
        if chat and tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; use chat=false")
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.eos_ids = sorted(({own} if own is not None else set()) if eos_ids is None else set(eos_ids))
        self._eos = own if own in self.eos_ids else next(iter(self.eos_ids), None)
        self._template = None if chat is False or tokenizer.chat_template is None else tokenizer.get_chat_template()

    @classmethod
    def of(cls, loaded: Loaded, chat: bool | None = None) -> Encoder:
        """For a target, with the end tokens of its generation config."""
        return cls(loaded.tokenizer, loaded.eos_ids or None, chat)

    def __call__(self, document: Document) -> list[EncodedText]:
        """The texts of one document, usually one.

        Raises:
            ValueError: its conversation does not suit the chat template; gives the template's reason.
        """
        return self._tokenize(self._render(document))

    def encode(
        self, documents: Sequence[Document], length: int, advance: Callable[[int], None] | None = None
    ) -> Encoded:
        """All documents, none longer than ``length``: conversations are cut there, plain texts go on as another one.

        Args:
            documents: those of a corpus.
            length: tokens.
            advance: told how many documents more are done.

        Raises:
            ValueError: a length below 2, or nothing left to learn from.
        """
        if not isinstance(length, int) or length < 2:
            raise ValueError(f"expected length to be a whole number of at least 2, got {length!r}")
        made = Encoded()
        for start in range(0, len(documents), _CHUNK):
            chunk = documents[start : start + _CHUNK]
            for rendered, encoded in self._chunk(chunk, made.refused):
                if rendered.bare and len(encoded.token_ids) > length:
                    parts = list(_pieces(encoded, length))
                    made.pieces += len(parts)
                else:
                    made.cut += int(len(encoded.token_ids) > length)
                    parts = [EncodedText(encoded.token_ids[:length], encoded.wanted[:length])]
                useful = [part for part in parts if part.wanted.any()]
                made.unwanted += len(parts) - len(useful)
                made.texts += useful
            if advance is not None:
                advance(len(chunk))
        if not made.texts:
            raise ValueError(f"nothing to learn from in {len(documents)} texts: {'; '.join(made.notes(length))}")
        return made

    def _chunk(self, documents: Iterable[Document], refused: list[str]) -> list[tuple[_Rendered, EncodedText]]:
        rendered = list[_Rendered]()
        for document in documents:
            try:
                rendered += self._render(document)
            except ValueError as error:
                name = "" if document.document_id is None else f"{document.document_id}: "
                refused.append(f"{name}{error}")
        return list(zip(rendered, self._tokenize(rendered), strict=True))

    def _render(self, document: Document) -> list[_Rendered]:
        if not document.messages:
            span = (len(document.prompt), len(document.text))
            return [_Rendered(document.text, [span], document.finished, bare=True)]
        # What stands at the very beginning answers nothing.
        answers = [index for index, turn in enumerate(document.messages) if index and turn["role"] == "assistant"]
        if not answers:
            raise ValueError("expected an assistant turn that answers something, got none")
        messages = [dict(turn) for turn in document.messages[: answers[-1] + 1]]
        if self._template is None:
            return [self._alone(messages[: index + 1], document.finished or index < answers[-1]) for index in answers]
        try:
            return self._templated(messages, answers, document.finished)
        except (TemplateError, TypeError) as error:  # the template's own refusal, or a form that it does not expect
            raise ValueError(f"the chat template refuses it: {error}") from error

    def _templated(self, messages: list[dict[str, str]], answers: list[int], finished: bool) -> list[_Rendered]:
        assert self._template is not None
        if _GENERATION.search(self._template):
            (whole,), (spans,) = render_jinja_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        else:
            whole, spans = self._show(messages), list[tuple[int, int]]()
            for index in answers:
                begun = self._show(messages[:index], ask=True)
                done = whole if index == answers[-1] else self._show(messages[: index + 1])
                if not (done.startswith(begun) and whole.startswith(done)):
                    return [self._alone(messages[: i + 1], finished or i < answers[-1]) for i in answers]
                spans.append((len(begun), len(done)))
        if not finished:
            whole, spans = self._unfinished(messages, whole, spans)
        return [_Rendered(whole, spans)]

    def _unfinished(
        self, messages: list[dict[str, str]], whole: str, spans: list[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text up to where its last answer was cut: what the template puts behind it was never written."""
        text = self._show(messages, cut=True)
        if not whole.startswith(text):
            raise ValueError("the chat template renders an answer that was cut otherwise than a whole one")
        return text, [(start, min(end, len(text))) for start, end in spans if start < len(text)]

    def _alone(self, messages: list[dict[str, str]], finished: bool) -> _Rendered:
        """The last answer behind the prompt that ``generate`` would have read."""
        begun = self._show(messages[:-1], ask=True)
        if self._template is not None:
            done = self._show(messages, cut=not finished)
            if done.startswith(begun):
                return _Rendered(done, [(len(begun), len(done))])
        text = begun + messages[-1]["content"]
        return _Rendered(text, [(len(begun), len(text))], finished, bare=self._template is None)

    def _show(self, messages: Sequence[Message], ask: bool = False, cut: bool = False) -> str:
        """Messages as text; with the head of the next answer, or without what ends the last one."""
        if self._template is None:
            return "\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask, continue_final_message=cut
        )

    def _tokenize(self, rendered: Sequence[_Rendered]) -> list[EncodedText]:
        made: list[EncodedText | None] = [None] * len(rendered)
        for bare in (False, True):
            where = [index for index, item in enumerate(rendered) if item.bare == bare]
            if not where:
                continue
            texts = [rendered[index].text for index in where]
            tokens = self.tokenizer(texts, add_special_tokens=bare, return_offsets_mapping=True)
            for index, ids, offsets in zip(where, tokens["input_ids"], tokens["offset_mapping"], strict=True):
                made[index] = self._marked(rendered[index], np.asarray(ids, np.int32), offsets)
        return [item for item in made if item is not None]

    def _marked(self, rendered: _Rendered, ids: np.ndarray, offsets: Sequence[tuple[int, int]]) -> EncodedText:
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        if rendered.bare and len(ids) and ids[-1] in self.eos_ids and ends[-1] == 0:
            ids, starts, ends = ids[:-1], starts[:-1], ends[:-1]  # put there by the tokenizer, not by the text
        wanted = np.zeros(len(ids), np.bool_)
        for start, end in rendered.spans:
            # Offsets leave out the space before a word: a token of spaces alone is empty, at the end of its place.
            inside = (starts >= start) & (ends > start) & (ends <= end)
            stops = np.flatnonzero(inside & np.isin(ids, self.eos_ids))
            if len(stops):
                inside[stops[0] + 1 :] = False
            wanted |= inside
        if rendered.closed and self._eos is not None and (not len(ids) or ids[-1] not in self.eos_ids):
            ids, wanted = np.append(ids, np.int32(self._eos)), np.append(wanted, True)
        wanted[:1] = False  # nothing predicts the first token
        return EncodedText(ids, wanted)


def _pieces(encoded: EncodedText, length: int) -> Iterable[EncodedText]:
    for start in range(0, len(encoded.token_ids), length):
        wanted = encoded.wanted[start : start + length].copy()
        wanted[0] = False
        yield EncodedText(encoded.token_ids[start : start + length], wanted)
