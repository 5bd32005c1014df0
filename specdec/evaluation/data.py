"""Questions: where they come from and which of them are asked. Knows nothing about models.

Every source gives a list of ``Question``; a line that cannot be read is named by file and number.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from specdec.demo.heldout import heldout_functions, heldout_gsm8k
from specdec.textlines import lines_of

DEMO_FILE = Path(__file__).with_name("demo_questions.jsonl")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Question:
    """One question of one or several turns.

    Attributes:
        question_id: as in the source, or counted from 1.
        category: the task it is reported under.
        turns: what the user says, turn by turn; each answer goes into the next turn's prompt.
        history: messages before the first turn, with ``role`` and ``content``.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    history: tuple[Mapping[str, str], ...] = field(default=())


@dataclass(frozen=True)
class Columns:
    """Names of the fields in which a source keeps what a question is made of; one of the first three is there."""

    prompt: str = "prompt"
    turns: str = "turns"
    messages: str = "messages"
    category: str = "category"
    question_id: str = "question_id"


def spec_bench(path: str) -> list[Question]:
    """Spec-Bench's ``question.jsonl`` as it is: 480 questions in 13 categories, 80 of them with two turns.

    Args:
        path: the file (data/spec_bench/question.jsonl of hemingkx/Spec-Bench).
    """
    missing = "it is data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench; give data.path=FILE"
    return _from_file(Path(path), Columns(prompt=""), missing)


def jsonl(
    path: str,
    prompt: str = "prompt",
    turns: str = "turns",
    messages: str = "messages",
    category: str = "category",
    question_id: str = "question_id",
) -> list[Question]:
    """Any file with one JSON object per line: ``turns`` (a list of user turns), ``messages`` (a conversation that ends
    with the user), or ``prompt``.

    Args:
        path: the file.
        prompt: name of the field that holds one prompt.
        turns: of the field that holds the user's turns.
        messages: of the field that holds a conversation.
        category: of the field that holds the task; texts without one are reported under the file's name.
        question_id: of the field that holds the id; questions without one are counted from 1.
    """
    return _from_file(Path(path), Columns(prompt, turns, messages, category, question_id), "give data.path=FILE")


def demo() -> list[Question]:
    """A small set of our own: questions in the style of GSM8K (``math``) and functions to write (``code``)."""
    return _from_file(DEMO_FILE, Columns(), "reinstall specdec")


def heldout(gsm8k: str) -> list[Question]:
    """What the demo target has not been trained on: GSM8K questions (``math``) and functions of the standard library
    (``code``), in turn.

    Args:
        gsm8k: GSM8K's ``train.jsonl``.
    """
    if not Path(gsm8k).is_file():
        raise FileNotFoundError(f"no file of questions at {gsm8k}; give data.gsm8k=FILE, GSM8K's train.jsonl")
    kinds = {"math": heldout_gsm8k(Path(gsm8k)), "code": [function.request for function in heldout_functions()]}
    pairs = zip_longest(*([(category, text) for text in texts] for category, texts in kinds.items()))
    texts = [pair for pair in chain.from_iterable(pairs) if pair is not None]
    return [Question(number, category, (text,)) for number, (category, text) in enumerate(texts, start=1)]


def hf(  # noqa: PLR0913 - one argument per column, as a user writes them
    path: str,
    name: str | None = None,
    split: str = "test",
    data_files: str | None = None,
    revision: str | None = None,
    prompt: str = "prompt",
    turns: str = "turns",
    messages: str = "messages",
    category: str = "category",
    question_id: str = "question_id",
) -> list[Question]:
    """Any dataset of Hugging Face ``datasets``.

    Args:
        path: hub name, folder, or a format such as ``json`` with ``data_files``.
        name: configuration of the dataset.
        split: such as ``test`` or ``train[:100]``.
        data_files: local files.
        revision: of the hub repository.
        prompt: column that holds one prompt.
        turns: column that holds a list of user turns.
        messages: column that holds a conversation.
        category: column that holds the task.
        question_id: column that holds the id.

    Raises:
        ImportError: ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("data=hf needs the package datasets: pip install 'specdec-hf[data]'") from error
    rows = load_dataset(path, name, split=split, data_files=data_files, revision=revision)
    columns = Columns(prompt, turns, messages, category, question_id)
    return _unique(
        question(row, columns, number, name or path, f"{path} ({split}), row {number}")
        for number, row in enumerate(rows, start=1)
    )


def question(plain: Any, columns: Columns, number: int, category: str, place: str) -> Question:
    """One question from its fields.

    Args:
        plain: a mapping.
        columns: the names of its fields.
        number: its id where it has none.
        category: its task where it has none.
        place: what an error calls it, such as ``FILE:LINE``.

    Raises:
        ValueError: it is no mapping, or holds no text where text is expected.
    """
    if not isinstance(plain, Mapping):
        raise ValueError(f"{place}: expected a JSON object, got {type(plain).__name__}")
    history: list[Mapping[str, str]] = []
    if plain.get(columns.turns) is not None:
        turns = plain[columns.turns]
    elif plain.get(columns.messages) is not None:
        *history, last = _messages(plain[columns.messages], place)
        turns = [last["content"]]
    elif columns.prompt and plain.get(columns.prompt) is not None:
        turns = [plain[columns.prompt]]
    else:
        wanted = ", ".join(repr(name) for name in (columns.turns, columns.messages, columns.prompt) if name)
        raise ValueError(f"{place}: expected one of the fields {wanted}, got {', '.join(map(repr, plain)) or 'none'}")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{place}: expected turns to be texts that are not empty, got {turns!r:.80}")
    identity = plain.get(columns.question_id)
    if identity is not None and not isinstance(identity, int | str):
        raise ValueError(f"{place}: expected {columns.question_id!r} to be a number or a text, got {identity!r:.80}")
    task = plain.get(columns.category)
    return Question(
        number if identity is None else identity, category if task is None else str(task), tuple(turns), tuple(history)
    )


def _messages(messages: Any, place: str) -> list[Mapping[str, str]]:
    def sound(message: Any) -> bool:
        return (
            isinstance(message, Mapping)
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
            and bool(message["content"].strip())
        )

    if not isinstance(messages, list) or not messages or not all(map(sound, messages)):
        raise ValueError(
            f"{place}: expected messages with a role ({', '.join(ROLES)}) and a content, got {messages!r:.80}"
        )
    if messages[-1]["role"] != "user":
        raise ValueError(f"{place}: expected the last message to be the user's, got {messages[-1]['role']!r}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _from_file(path: Path, columns: Columns, missing: str) -> list[Question]:
    if not path.is_file():
        raise FileNotFoundError(f"no file of questions at {path}; {missing}")
    found: list[Question] = []
    for number, line in lines_of(path):
        place = f"{path}:{number}"
        try:
            plain = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: expected one JSON object per line ({error.msg}), got {line[:60]!r}") from error
        found.append(question(plain, columns, len(found) + 1, path.stem, place))
    if not found:
        raise ValueError(f"{path}: expected one question per line, got an empty file")
    return _unique(found)


def _unique(questions: Iterable[Question]) -> list[Question]:
    questions = list(questions)
    twice = [identity for identity, count in Counter(item.question_id for item in questions).items() if count > 1]
    if twice:
        raise ValueError(f"expected each question_id once, got {twice[0]!r} several times")
    return questions


def fingerprint(questions: Iterable[Question]) -> str:
    """SHA-256 of questions as they are asked, in their order; a run does not go on with others."""
    plain = json.dumps([asdict(item) for item in questions], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


@dataclass(frozen=True)
class Selection:
    """Which questions are asked.

    Attributes:
        categories: only these; None = all.
        per_category: at most so many of each category.
        limit: at most so many in all.
        sample: choose at random (by ``seed``) instead of from the start; the source's order is kept.
        seed: of the choice.
        shard: ``i/n``: every n-th question, from the i-th; None = all. Shards of a selection do not overlap.
    """

    categories: Sequence[str] | None = None
    per_category: int | None = None
    limit: int | None = None
    sample: bool = False
    seed: int = 0
    shard: str | None = None

    def __call__(self, questions: Sequence[Question]) -> list[Question]:
        """Select.

        Raises:
            ValueError: an unknown category (lists those there are), a number below 1, a malformed shard.
        """
        for name in ("per_category", "limit"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
        known = list(dict.fromkeys(item.category for item in questions))
        wanted = known if self.categories is None else list(self.categories)
        unknown = [category for category in wanted if category not in known]
        if unknown:
            raise ValueError(f"unknown category {unknown[0]!r}; known: {', '.join(known)}")
        order = list(range(len(questions)))
        if self.sample:
            random.Random(self.seed).shuffle(order)
        taken: list[int] = []
        counts: Counter[str] = Counter()
        for index in order:
            category = questions[index].category
            if category in wanted and (self.per_category is None or counts[category] < self.per_category):
                counts[category] += 1
                taken.append(index)
        first, step = shard_of(self.shard)
        return [questions[index] for index in sorted(taken[: self.limit])][first - 1 :: step]


def shard_of(text: str | None) -> tuple[int, int]:
    """``"i/n"`` as numbers; None is ``1/1``.

    Raises:
        ValueError: it is not of this form, or i is not within 1..n.
    """
    if text is None:
        return 1, 1
    first, _, count = str(text).partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise ValueError(f"expected shard=i/n with 1 <= i <= n, such as shard=1/2; got {text!r}")
    return int(first), int(count)
