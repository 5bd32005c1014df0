"""Texts to learn from, and where they come from. Knows nothing about tokens or models.

Every source gives a ``Corpus``. A line that cannot be read is left out and named by file and number; the others count.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from specdec.demo.heldout import gsm8k_problems, stdlib_functions
from specdec.textlines import lines_of

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
SAMPLE_BY = ("document", "paragraph", "line")
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing"), "assistant"),
}
_NO_ANSWER = "expected an assistant turn, got none"
_TABLES = (".jsonl", ".json")
_SUFFIXES = (".txt", ".md", *_TABLES)
_PROVENANCE = "provenance.json"  # how the names end of what stands beside answers and checkpoints


@dataclass(frozen=True)
class Document:
    """One conversation, or one plain text.

    Attributes:
        messages: of a conversation, each with ``role`` (system, user, assistant) and ``content``.
        text: the whole of a plain text, prompt included.
        prompt: how a plain text begins, where the target was given that part and wrote the rest.
        finished: False where the last answer (or the text) was cut at a limit, so that nothing ended it.
        document_id: as in the source; None = counted.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    prompt: str = ""
    finished: bool = True
    document_id: int | str | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content, whatever its id and place in the source."""
        content = [[dict(message) for message in self.messages], self.text, self.prompt, self.finished]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Corpus:
    """What a source holds.

    Attributes:
        documents: in the source's order.
        skipped: why lines were left out, one entry each, such as ``FILE:3: expected ...``.
    """

    documents: list[Document]
    skipped: list[str] = field(default_factory=list)

    def notes(self, most: int = 20) -> list[str]:
        """What a user should be told of the lines left out: at most so many of them by name, then how many."""
        if not self.skipped:
            return []
        total = len(self.skipped) + len(self.documents)
        more = [f"... and {len(self.skipped) - most} more"] if len(self.skipped) > most else []
        return [*self.skipped[:most], *more, f"left out {len(self.skipped)} of {total} texts"]


def chat(path: str | Sequence[str]) -> Corpus:
    """Conversations, one JSON object per line: ``messages`` (role and content), or ShareGPT's ``conversations`` (from
    and value), with ``id`` and ``finished`` where they have them; a file that is one JSON array does as well.

    What ``specdec distill`` writes is read as it is, its continued texts (``text`` and ``prompt``) too.

    Args:
        path: a file, a pattern, a folder, or several of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty file, or no assistant turn in any of its lines.
    """
    files = _files(path, _TABLES)
    return _read(files, lambda record: _document(record, "text", needs_prompt=True), "an assistant turn")


def text(path: str | Sequence[str], field: str = "text", sample_by: str = "document") -> Corpus:
    """Plain texts: text files, and JSONL files with the text in a field.

    Args:
        path: a file, a pattern, a folder, or several of them.
        field: of a JSONL file, where the text is.
        sample_by: what one text is in a text file: the whole file (``document``), a block between blank lines
            (``paragraph``) or a ``line``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown ``sample_by``, or no text in any of the files; says what is wrong with the first.
    """
    if sample_by not in SAMPLE_BY:
        raise ValueError(f"expected sample_by to be one of {', '.join(SAMPLE_BY)}; got {sample_by!r}")
    files = _files(path, _SUFFIXES)
    documents, skipped, refused = list[Document](), list[str](), list[ValueError]()
    for file in files:
        try:
            if file.suffix in _TABLES:
                part = _read([file], lambda record: _document(record, field), f"a field {field!r}")
                documents += part.documents
                skipped += part.skipped
            else:
                documents += _texts_of(file, sample_by)
        except ValueError as error:
            skipped.append(str(error))
            refused.append(error)
    if not documents:
        raise refused[0]
    return Corpus(documents, skipped)


def demo_corpus(gsm8k: str) -> Corpus:
    """What the demo target was trained on: GSM8K problems (ids ``math-N``) and functions of the standard library
    (``code-N``), in turn. Functions with a docstring are chats (request, source), the others plain texts.

    Args:
        gsm8k: GSM8K's ``train.jsonl``; what ``data=heldout`` asks is left out of it.
    """
    if not Path(gsm8k).is_file():
        raise FileNotFoundError(f"no file of problems at {gsm8k}; give data.gsm8k=FILE, GSM8K's train.jsonl")
    math = [
        Document(_exchange(problem.question, problem.answer), document_id=f"math-{number}")
        for number, problem in enumerate(gsm8k_problems(Path(gsm8k), heldout=False), start=1)
    ]
    code = [
        Document(_exchange(function.request, function.source), document_id=f"code-{number}")
        if function.summary
        else Document(text=function.source, document_id=f"code-{number}")
        for number, function in enumerate(stdlib_functions(heldout=False), start=1)
    ]
    return Corpus([document for document in chain.from_iterable(zip_longest(math, code)) if document is not None])


def _exchange(user: str, assistant: str) -> tuple[Message, ...]:
    return {"role": "user", "content": user}, {"role": "assistant", "content": assistant}


def _files(path: str | Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files that a path, a pattern, a folder or several of them name, each once.

    Of a folder those with one of the suffixes, but for provenance.
    """
    found = list[Path]()
    for name in [path] if isinstance(path, str) else path:
        place = Path(name).expanduser()
        if place.is_dir():
            within = (file for file in place.rglob("*") if file.is_file() and file.suffix in suffixes)
            named = sorted(file for file in within if not file.name.endswith(_PROVENANCE))
        else:
            named = [place] if place.is_file() else sorted(map(Path, glob.glob(str(place), recursive=True)))
        if not named:
            kinds = ", ".join(f"*{suffix}" for suffix in suffixes)
            raise FileNotFoundError(f"no file of texts at {name}; give data.path=FILE, or a folder with {kinds}")
        found += named
    return list(dict.fromkeys(found))


def _read(files: Iterable[Path], make: Callable[[Any], Document], wanted: str) -> Corpus:
    """The documents of JSON files; what ``make`` refuses is left out and named."""
    documents, skipped = list[Document](), list[str]()
    for file in files:
        before, bad = len(documents), len(skipped)
        for place, record in _records(file, skipped):
            try:
                documents.append(make(record))
            except ValueError as error:
                skipped.append(f"{place}: {error}")
        if len(documents) == before and len(skipped) == bad:
            raise ValueError(f"{file}: expected one JSON object per line, got an empty file")
    if not documents:
        found = "found none"
        if any(reason.endswith(_NO_ANSWER) for reason in skipped):
            found += " (prompts without answers are read by data=jsonl, for specdec distill to have them answered)"
        raise ValueError(f"expected {wanted} in at least one of {len(skipped)} lines, {found}. The first: {skipped[0]}")
    return Corpus(documents, skipped)


def _records(path: Path, skipped: list[str]) -> Iterator[tuple[str, Any]]:
    """Place and content of each JSON object in a file; lines that are none go to ``skipped``."""
    lines = lines_of(path, skipped.append)
    first = next(lines, None)
    if first is not None and first[1].lstrip().startswith("["):
        try:
            records = json.loads(path.read_bytes().decode("utf-8-sig"))
        except ValueError:
            records = None  # no array: its lines will say what is wrong with them
        if records is not None:
            yield from ((f"{path}, entry {number}", record) for number, record in enumerate(records, start=1))
            return
    for number, line in chain([] if first is None else [first], lines):
        try:
            yield f"{path}:{number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            skipped.append(f"{path}:{number}: expected one JSON object per line ({reason}), got {line[:60]!r}")


def _document(record: Any, text_field: str, needs_prompt: bool = False) -> Document:
    """A document from its JSON.

    Raises:
        ValueError: it is none; says what was expected.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    finished, identity = record.get("finished", True), record.get("id")
    if not isinstance(finished, bool):
        raise ValueError(f"expected 'finished' to be true or false, got {finished!r:.40}")
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        identity = None
    if needs_prompt and (record.get("messages") is not None or record.get("conversations") is not None):
        return Document(_messages(record), finished=finished, document_id=identity)
    content, prompt = record.get(text_field), record.get("prompt", "")
    if not isinstance(content, str) or not content.strip() or (needs_prompt and "prompt" not in record):
        known = "'messages', 'conversations' or 'text' with a 'prompt'" if needs_prompt else f"a text in {text_field!r}"
        raise ValueError(f"expected {known}, got {', '.join(map(repr, record)) or 'nothing'}")
    _check_encodable(content)
    if not isinstance(prompt, str) or not content.startswith(prompt):
        # Such a field belongs to somebody else where all of the text is to be learnt.
        if needs_prompt:
            raise ValueError(f"expected the text to begin with its prompt, got {prompt!r:.60}")
        prompt = ""
    return Document(text=content, prompt=prompt, finished=finished, document_id=identity)


def _check_encodable(text: str) -> None:
    # JSON may hold one half of a character beyond the basic plane, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected whole characters, got {text[error.start]!r}, one half of one") from error


def _messages(record: Mapping[str, Any]) -> tuple[Message, ...]:
    if record.get("messages") is not None:
        turns, role_key, content_key, roles = record["messages"], "role", "content", {role: role for role in ROLES}
    else:
        turns, role_key, content_key, roles = record["conversations"], "from", "value", _SHAREGPT_ROLES
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"expected a list of turns, got {turns!r:.60}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        role, content = turn.get(role_key), turn.get(content_key)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"turn {number}: expected {role_key!r} to be one of {', '.join(roles)}; got {role!r:.40}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"turn {number}: expected a text in {content_key!r}, got {content!r:.40}")
        _check_encodable(content)
        messages.append({"role": roles[role], "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(_NO_ANSWER)
    return tuple(messages)


def _texts_of(file: Path, sample_by: str) -> Iterator[Document]:
    """The texts of a text file.

    Raises:
        ValueError: it is no UTF-8, or holds none.
    """
    try:
        content = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, got byte 0x{error.object[error.start]:02x}") from error
    if not content.strip():
        raise ValueError(f"{file}: expected a text, got an empty file")
    if sample_by == "document":
        parts = [content]
    else:
        parts = re.split(r"\n(?:[ \t]*\n)+" if sample_by == "paragraph" else r"\n", content)
    yield from (Document(text=part) for part in parts if part.strip())
