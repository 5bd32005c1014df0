"""What a run leaves on disk, typed: answers, step traces and the summary. Owns the file format, computes nothing.

Answers follow Spec-Bench's schema (hemingkx/Spec-Bench, ``model_answer/*.jsonl``), so its ``speed.py`` reads them; keys
of our own stand beside theirs and never change what theirs mean::

    RUN/answers/STEM.jsonl   one line per question that every method answered
    RUN/failed/STEM.jsonl    the same for questions that failed for some method, or whose first prompt did not fit
    RUN/steps/STEM.jsonl     one line per question, turn and repeat of a method that runs through our loop
    RUN/questions/*.jsonl    the questions as asked, a file per shard
    RUN/summary.json         provenance, units and one row per method, task and setting
    RUN/config.yaml          the resolved configuration

A *row* of a summary counts texts, one per question and turn. Seconds are wall clock; within a batch each text carries
its share of the call, so that sums over texts are sums over calls.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

ANSWERS, FAILED, STEPS, QUESTIONS, SUMMARY = "answers", "failed", "steps", "questions", "summary.json"
JOB_FAILED = "job_failed.txt"
"""In the folder of a multirun's job: why it could not run."""

PREFILL, TARGET = "prefill", "target"
"""Sources of a token beside the names of drafters: the prompt's pass, and the target's own token of a later pass."""

IDENTICAL, NEAR_TIE, BUG = "identical", "near_tie", "bug"
COLD, WARM, STATELESS = "cold", "warm", "all"
"""States of a drafter: reset before each question, kept across them, or nothing that could be kept."""

KINDS = ("drafter", "plain", "transformers", "transformers_prompt_lookup", "transformers_assistant")
Record = TypeVar("Record")


def file_part(method: str) -> str:
    """How a method is called in the names of its files; two methods whose parts are the same would share them."""
    return re.sub(r"[^\w.+-]+", "_", method)


@dataclass(frozen=True)
class Variant:
    """One method under one setting: what one answers file holds.

    Attributes:
        method: name in tables, such as ``token_recycling`` or ``none``.
        kind: one of ``KINDS``.
        state: ``cold``, ``warm`` or ``all``.
        temperature: 0 = greedy.
        batch_size: questions per call.
        lossless: whether the law of the text is the target's own.
    """

    method: str
    kind: str
    state: str = STATELESS
    temperature: float = 0.0
    batch_size: int = 1
    lossless: bool = True

    @property
    def stem(self) -> str:
        """Name of its files; what is left out is greedy, batch 1 and warm (or nothing to keep)."""
        parts = [file_part(self.method)]
        parts += ["cold"] if self.state == COLD else []
        parts += [f"t{self.temperature:g}"] if self.temperature else []
        parts += [f"b{self.batch_size}"] if self.batch_size != 1 else []
        return ".".join(parts)


@dataclass
class Choice:
    """One repeat of a question. Lists have an entry per turn, but for ``accept_lengths``.

    Attributes:
        index: of the repeat.
        turns: decoded texts, special tokens left out.
        decoding_steps: target passes after the prompt's.
        new_tokens: tokens emitted, EOS included, padding not.
        wall_time: seconds of the call, prefill included; in a batch its share of them.
        accept_lengths: tokens emitted by each verification of all turns, in one list; the prompt's pass is none.
        prefill_time: seconds until the first token, likewise a share.
        ids: the tokens emitted.
        tokens: for each token its text and its source: ``prefill``, ``target`` or the name of a drafter.
        looping: whether the text ends in a repeated block.
        identical: greedy text against the plain loop, the plain loop's own against transformers: ``identical``,
            ``near_tie``, ``bug``; None where not compared.
    """

    index: int = 0
    turns: list[str] = field(default_factory=list)
    decoding_steps: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    wall_time: list[float] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    prefill_time: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    tokens: list[list[tuple[str, str]]] = field(default_factory=list)
    looping: list[bool] = field(default_factory=list)
    identical: list[str | None] = field(default_factory=list)


@dataclass
class Answer:
    """One question answered by one method: a line of ``answers`` or of ``failed``.

    Attributes:
        question_id, category, model_id, choices, tstamp, answer_id: as in Spec-Bench.
        method, method_kind, state, temperature, batch_size, lossless: of the ``Variant``.
        error: traceback; None where this method went through.
        skipped: why turns were left out, such as a prompt beyond the context; usually empty.
    """

    question_id: int | str
    category: str
    model_id: str = ""
    choices: list[Choice] = field(default_factory=list)
    tstamp: float = 0.0
    answer_id: str = ""
    method: str = ""
    method_kind: str = "drafter"
    state: str = STATELESS
    temperature: float = 0.0
    batch_size: int = 1
    lossless: bool = True
    error: str | None = None
    skipped: list[str] = field(default_factory=list)

    @property
    def variant(self) -> Variant:
        """Whose answer it is."""
        method = self.method or self.model_id
        return Variant(method, self.method_kind, self.state, self.temperature, self.batch_size, self.lossless)


@dataclass
class StepTrace:
    """The steps of one text. Lists have an entry per step (verification of this text), ``seconds["prefill"]`` aside.

    Attributes:
        question_id, turn, repeat: which text.
        state, temperature, batch_size: the setting.
        drafted: candidates offered.
        computed: nodes computed, the root and feed-only ones included.
        accepted: of the offered ones, after stops.
        offered: candidates at depths 1..D.
        ranks: rank of each accepted node among its siblings, 0 best, -1 where the drafter gives none.
        seconds: ``{"prefill": s, "draft": [s..], "verify": [s..], "commit": [s..]}``; in a batch a step's seconds are
            shared by the texts it ran for.
    """

    question_id: int | str
    turn: int = 0
    repeat: int = 0
    state: str = STATELESS
    temperature: float = 0.0
    batch_size: int = 1
    drafted: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    offered: list[list[int]] = field(default_factory=list)
    ranks: list[list[int]] = field(default_factory=list)
    seconds: dict[str, Any] = field(default_factory=dict)


@dataclass
class SummaryRow:
    """One method on one task under one setting. None where a metric does not exist; units: ``UNITS``.

    The definitions are those of ``specdec.metrics``.
    """

    drafter: str
    task: str
    temperature: float = 0.0
    batch_size: int = 1
    mean_accepted_tokens: float | None = None
    tokens_per_second: float | None = None
    speedup_vs_plain: float | None = None
    speedup_vs_transformers: float | None = None
    draft_share: float | None = None
    acceptance_by_depth: list[float] | None = None
    identical_rows: int | None = None
    rows: int = 0
    lossless: bool = True
    method_kind: str = "drafter"
    state: str = STATELESS
    subset: str = "all"
    decode_tokens_per_second: float | None = None
    new_tokens: int = 0
    wall_seconds: float = 0.0
    looping_share: float | None = None
    near_ties: int | None = None
    bugs: int | None = None
    failed: int = 0
    skipped: int = 0
    accepted_lengths: dict[str, int] | None = None
    conditional_acceptance_by_depth: list[float] | None = None
    tree_nodes: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    job: str | None = None
    overrides: list[str] | None = None


UNITS = {
    "mean_accepted_tokens": "tokens emitted per verification, bonus included, the prefill's token not",
    "tokens_per_second": "tokens emitted per second of the whole call, prefill included, all rows together",
    "decode_tokens_per_second": "tokens emitted after the prefill per second after the prefill",
    "speedup_vs_plain": "ratio of tokens_per_second to that of the plain loop on the same rows",
    "speedup_vs_transformers": "ratio of tokens_per_second to that of transformers' generate on the same rows",
    "draft_share": "share of the time after the prefill spent drafting and learning",
    "acceptance_by_depth": "share of verifications that accepted at least d tokens, entry d-1",
    "conditional_acceptance_by_depth": "of those that reached depth d and had a candidate there, the accepted share",
    "accepted_lengths": "accepted draft tokens -> verifications",
    "tree_nodes": "nodes computed per verification, root included",
    "identical_rows": "rows equal to the plain loop's (its own: to transformers'), token by token; greedy only",
    "near_ties": "rows that differ by no more than rounding, by the audit",
    "bugs": "rows that differ by more than rounding",
    "rows": "texts: one per question and turn, the same for all methods",
    "failed": "questions that failed for this method; they count for nobody",
    "skipped": "turns whose prompt and answer do not fit the context",
    "looping_share": "share of rows whose plain text ends in a repeated block",
    "new_tokens": "tokens emitted, EOS included, padding not",
    "wall_seconds": "seconds of the calls, the median repeat of each question",
    "seconds": "phase -> seconds; other = inside the call and outside the phases",
}


@dataclass
class Summary:
    """``summary.json``: rows, units and where they come from."""

    provenance: dict[str, Any]
    rows: list[SummaryRow]
    units: dict[str, str] = field(default_factory=lambda: dict(UNITS))


def append_lines(path: Path, records: Iterable[Any]) -> None:
    """Append records to a JSONL file and hand them to the operating system before returning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Replace a JSONL file in one move: readers see the old one or the new one."""
    replace_text(path, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))


def replace_text(path: Path, text: str) -> None:
    """Write a whole file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a JSONL file; a last line that an interruption cut short is left out.

    Raises:
        ValueError: a line in the middle is no JSON object; names it.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no line break behind it: the writer did not get that far
                return
            raise ValueError(f"{path}:{number}: expected one JSON object per line, got {line[:60]!r}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
        yield record


def answer_of(plain: Mapping[str, Any]) -> Answer:
    """An answer from its JSON; Spec-Bench's own lines do as well."""
    choices = [_known(Choice, choice) for choice in plain.get("choices", [])]
    for choice in choices:
        choice.tokens = [[(piece, source) for piece, source in turn] for turn in choice.tokens]
    return _known(Answer, {**plain, "choices": choices})


def read_answers(path: Path) -> list[Answer]:
    """The lines of one file."""
    return [answer_of(line) for line in read_lines(path)]


def read_steps(path: Path) -> list[StepTrace]:
    """The lines of one file."""
    return [_known(StepTrace, line) for line in read_lines(path)]


@dataclass
class RunRecords:
    """All answers and traces of a run folder, of all its shards. A question is in one of ``answers`` and ``failed``."""

    answers: dict[Variant, dict[int | str, Answer]] = field(default_factory=dict)
    failed: dict[Variant, dict[int | str, Answer]] = field(default_factory=dict)
    steps: dict[Variant, list[StepTrace]] = field(default_factory=dict)


def read_run(folder: Path) -> RunRecords:
    """Everything that a run folder holds, whatever state it was left in."""
    run = RunRecords()
    stems = {}
    for path in sorted((folder / ANSWERS).glob("*.jsonl")):
        for answer in read_answers(path):
            run.answers.setdefault(answer.variant, {})[answer.question_id] = answer
            stems[path.name] = answer.variant
    for path in sorted((folder / FAILED).glob("*.jsonl")):
        for answer in read_answers(path):
            if answer.question_id not in run.answers.get(answer.variant, {}):
                run.failed.setdefault(answer.variant, {})[answer.question_id] = answer
    for name, variant in stems.items():
        path = folder / STEPS / name
        # An interruption may have come between the traces of a question and its answer.
        finished = run.answers[variant]
        if path.is_file():
            run.steps.setdefault(variant, []).extend(t for t in read_steps(path) if t.question_id in finished)
    return run


def summary_json(summary: Summary) -> str:
    """The text of ``summary.json``; ``job`` and ``overrides`` only where jobs were joined."""
    rows = [asdict(row) for row in summary.rows]
    for row in rows:
        if row["job"] is None:
            del row["job"], row["overrides"]
    plain = {"provenance": summary.provenance, "units": summary.units, "rows": rows}
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def read_summary(path: Path) -> Summary:
    """``summary.json`` of a run or of a joined multirun."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    rows = [_known(SummaryRow, row) for row in plain["rows"]]
    return Summary(plain.get("provenance", {}), rows, plain.get("units", dict(UNITS)))


def _known(kind: type[Record], plain: Mapping[str, Any]) -> Record:
    """A record from those keys that it has; others belong to somebody else."""
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in plain.items() if key in names})
