"""The answers of all methods, packed for the page: every text once, every token's source as one character.

Methods that lose nothing write the same text, so a text costs its space once however many methods wrote it. What is
left goes through gzip and base64 into the page, where the browser unpacks it.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.evaluation.records import (
    ANSWERS,
    COLD,
    FAILED,
    KINDS,
    PREFILL,
    QUESTIONS,
    TARGET,
    Answer,
    answer_of,
    read_lines,
)
from specdec.report.figures import Figures, Method, Setting
from specdec.report.runs import Run

UNRECORDED = "not recorded"
_FIRST = 48  # of the characters that stand for sources: "0", "1", ...


@dataclass
class Book:
    """What the page browses; ``packed`` is how it travels.

    Attributes:
        sources: where tokens come from.
        methods: label, colour and setting of each, and the index of the plain method it is compared with.
        questions: id and category of each, and its text where the run kept it.
        texts: the distinct texts, as lists of token texts.
        answers: per method, question index -> answer.
    """

    sources: list[dict[str, Any]] = field(default_factory=list)
    methods: list[dict[str, Any]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    answers: list[dict[int, dict[str, Any]]] = field(default_factory=list)

    def packed(self) -> str:
        """gzip, then base64, of the whole as JSON."""
        plain = json.dumps(self.__dict__, ensure_ascii=False, separators=(",", ":"))
        return base64.b64encode(gzip.compress(plain.encode(), mtime=0)).decode("ascii")


def collect(figures: Figures) -> Book:
    """Read the answers of every run of a report.

    Raises:
        ValueError: a line that is no answer; names it.
    """
    return _Binder(figures).bind()


class _Binder:
    def __init__(self, figures: Figures) -> None:
        self.figures = figures
        self.book = Book()
        self._sources: dict[str, str] = {}
        self._texts: dict[tuple[str, ...], int] = {}
        self._questions: dict[str, int] = {}
        self._methods: dict[tuple[Any, ...], int] = {}
        self._known = figures.drafters
        self._labels = {(id(m.run), m.recorded, m.kind, m.setting): m for m in figures.methods}
        for name in (PREFILL, TARGET, *figures.drafters):
            self._source(name)

    def bind(self) -> Book:
        for run in self.figures.runs:
            for path in sorted((run.folder / QUESTIONS).glob("*.jsonl")):
                for number, question in enumerate(read_lines(path), start=1):
                    self._ask(question, f"{path}:{number}")
            for folder in (ANSWERS, FAILED):
                for path in sorted((run.folder / folder).glob("*.jsonl")):
                    for answer in _read(path):
                        self._add(run, answer)
        self._pair_with_plain()
        return self.book

    def _add(self, run: Run, answer: Answer) -> None:
        mine = self.book.answers[self._method(run, answer)]
        question = self._question(answer.question_id, answer.category)
        if question not in mine or "e" in mine[question]:  # answered after all, when the run was resumed
            mine[question] = self._packed(answer)

    def _method(self, run: Run, answer: Answer) -> int:
        variant = answer.variant
        setting = Setting(run.target, run.dtype, run.device, variant.temperature, variant.batch_size, run.workload)
        known = self._labels.get((id(run), variant.method, variant.kind, setting))
        # What is no drafter of ours is the same in all jobs of a multirun: one entry.
        job = str(run.folder) if variant.kind == "drafter" else ""
        key = (setting, variant.method, variant.kind, variant.state, job)
        if key not in self._methods:
            method = known or Method(setting, variant.method, variant.kind, "", run, [])
            self._methods[key] = len(self.book.methods)
            self.book.answers.append({})
            self.book.methods.append(
                {
                    "label": method.label + (", cold" if variant.state == COLD else ""),
                    "color": self.figures.color(method),
                    "setting": self._setting(setting),
                    "plain": None,
                    "kind": variant.kind,
                    "lossless": variant.lossless,
                }
            )
        return self._methods[key]

    def _setting(self, setting: Setting) -> str:
        settings = self.figures.settings
        return setting.label(settings) if len(settings) > 1 else ""

    def _ask(self, question: dict[str, Any], place: str) -> None:
        if not {"question_id", "category", "turns"} <= question.keys():
            raise ValueError(f"{place}: expected a question with question_id, category and turns, got {list(question)}")
        number = self._question(question["question_id"], question["category"])
        self.book.questions[number]["turns"] = question["turns"]

    def _question(self, identity: int | str, category: str) -> int:
        key = f"{category} {identity}"
        if key not in self._questions:
            self._questions[key] = len(self.book.questions)
            self.book.questions.append({"id": identity, "category": category})
        return self._questions[key]

    def _packed(self, answer: Answer) -> dict[str, Any]:
        if answer.error is not None:
            return {"e": answer.error}
        packed: dict[str, Any] = {"k": answer.skipped} if answer.skipped else {}
        if not answer.choices:
            return packed
        first = answer.choices[0]
        turns = first.tokens or [[(text, UNRECORDED)] for text in first.turns]
        return {
            **packed,
            "t": [self._text([piece for piece, _ in turn]) for turn in turns],
            "s": ["".join(self._source(source) for _, source in turn) for turn in turns],
            "v": first.identical,
            "l": [int(looping) for looping in first.looping],
            "n": first.new_tokens,
            "p": first.decoding_steps,
            "w": [round(seconds, 4) for seconds in first.wall_time],
        }

    def _text(self, pieces: Sequence[str]) -> int:
        key = tuple(pieces)
        if key not in self._texts:
            self._texts[key] = len(self.book.texts)
            self.book.texts.append(list(pieces))
        return self._texts[key]

    def _source(self, name: str) -> str:
        if name not in self._sources:
            self._sources[name] = chr(_FIRST + len(self._sources))
            self.book.sources.append({"name": name, "color": self._color(name)})
        return self._sources[name]

    def _color(self, source: str) -> int | None:
        """The drafter's; parts of a mixture get colours after those of the drafters."""
        if source in (PREFILL, TARGET, UNRECORDED) or source in KINDS:
            return None
        others = [item for item in self.book.sources if item["color"] is not None and item["name"] not in self._known]
        return self.figures.colors.get(source, len(self._known) + len(others))

    def _pair_with_plain(self) -> None:
        plain = {key[0]: index for key, index in self._methods.items() if key[2] == "plain"}
        for key, index in self._methods.items():
            self.book.methods[index]["plain"] = plain.get(key[0])


def _read(path: Path) -> Iterator[Answer]:
    for number, line in enumerate(read_lines(path), start=1):
        try:
            answer = answer_of(line)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not an answer of specdec evaluate: {error}") from error
        yield answer
