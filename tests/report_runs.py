"""Hand-made runs for the tests of the report: every figure is counted by ``specdec.metrics`` from simulated passes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.evaluation.data import Question
from specdec.evaluation.records import (
    ANSWERS,
    BUG,
    COLD,
    FAILED,
    IDENTICAL,
    NEAR_TIE,
    QUESTIONS,
    STATELESS,
    STEPS,
    SUMMARY,
    UNITS,
    WARM,
    Answer,
    Choice,
    StepTrace,
    Summary,
    SummaryRow,
    Variant,
    append_lines,
    read_summary,
    replace_text,
    summary_json,
    write_lines,
)
from specdec.metrics import SpeculationStats

TASKS = ("translation", "math_reasoning", "coding")
PROSE = (
    *("The", "baker", "makes", "twenty", "four", "rolls", "and", "sells", "<thirty>", "of", "them", "&", "keeps"),
    *("the", "rest", "for", "tomorrow", "morning.\n\n", "def", "keep(rolls):\n   ", "return", '"rolls"\n'),
)
TOKENS, QUESTIONS_PER_TASK, NODES = 40, 4, 9


@dataclass(frozen=True)
class Style:
    """A simulated method: chance that a draft token is accepted, depth of its drafts, seconds of drafting per pass."""

    name: str
    chance: float
    depth: int
    draft_seconds: float
    stateful: bool = False
    lossless: bool = True
    kind: str = "drafter"

    @property
    def states(self) -> tuple[str, ...]:
        """Those it is measured in."""
        return (COLD, WARM) if self.stateful else (STATELESS,)


PLAIN = Style("none", 0.0, 0, 0.0, kind="plain")
DRAFTERS = (
    Style("token_recycling", 0.68, 5, 0.0004, stateful=True),
    Style("prompt_lookup", 0.45, 8, 0.0001),
    Style("layer_skip", 0.75, 4, 0.0035),
    Style("medusa_typical", 0.8, 4, 0.0006, lossless=False),
)
TRANSFORMERS = Style("transformers", 0.0, 0, 0.0001, kind="transformers")


@dataclass
class Case:
    """What one run is measured with."""

    target: str = "tiny-llama"
    dtype: str = "bfloat16"
    temperature: float = 0.0
    batch_sizes: Sequence[int] = (1,)
    nodes: int = NODES
    pass_seconds: float = 0.006
    overrides: Sequence[str] = ()
    max_new_tokens: int = TOKENS


def make_run(folder: Path, styles: Sequence[Style] = (*DRAFTERS, TRANSFORMERS), case: Case | None = None) -> Path:
    """A finished run: the second drafter fails a question, the third differs by a near-tie, the lossy one differs."""
    case = case or Case()
    rows: list[SummaryRow] = []
    for batch in case.batch_sizes:
        speeds: dict[tuple[str, str, str], float] = {}
        for style in (TRANSFORMERS, PLAIN, *(s for s in styles if s is not TRANSFORMERS)):
            for state in style.states:
                texts = list(_decode(style, state, case, batch))
                variant = Variant(style.name, style.kind, state, case.temperature, batch, style.lossless)
                _write(folder, variant, texts)
                rows += _rows(variant, texts, speeds)
    questions = [
        Question(100 * (i + 1) + n, task, (f"Question {n} of {task}: a < b?",))
        for i, task in enumerate(TASKS)
        for n in range(QUESTIONS_PER_TASK)
    ]
    write_lines(folder / QUESTIONS / "questions.jsonl", questions)
    summary = Summary(_provenance(case), rows, dict(UNITS))
    replace_text(folder / SUMMARY, summary_json(summary))
    return folder


def make_sweep(folder: Path, nodes: Sequence[int] = (5, 9, 25)) -> Path:
    """A multirun of one drafter over tree sizes: a job folder each, and the joined summary."""
    joined = []
    for job, count in enumerate(nodes):
        overrides = ["drafter=token_recycling", f"++drafter.num_nodes={count}"]
        case = Case(nodes=count, pass_seconds=0.006 * (1 + count / 60), overrides=overrides)
        grown = Style("token_recycling", min(0.4 + count / 60, 0.8), 5, 0.0004, stateful=True)
        child = make_run(folder / str(job), (grown,), case)
        for row in read_summary(child / SUMMARY).rows:
            row.job, row.overrides = str(job), list(case.overrides)
            joined.append(row)
    replace_text(folder / SUMMARY, summary_json(Summary(_provenance(Case()), joined, dict(UNITS))))
    return folder


@dataclass
class Text:
    """One simulated answer."""

    answer: Answer
    trace: StepTrace
    looping: bool


def _decode(style: Style, state: str, case: Case, batch: int) -> Iterator[Text]:
    for index, task in enumerate(TASKS):
        for number in range(QUESTIONS_PER_TASK):
            identity = 100 * (index + 1) + number
            dice = random.Random(f"{style.name} {state} {identity} {case.nodes}")
            chance = style.chance - 0.1 * index - (0.2 if state == COLD else 0.0)
            yield _text(style, Variant(style.name, style.kind, state, case.temperature, batch, style.lossless),
                        (identity, task, chance), dice, case)  # fmt: skip


def _text(style: Style, variant: Variant, question: tuple[int, str, float], dice: random.Random, case: Case) -> Text:
    identity, task, chance = question
    looping = identity % 100 == 3
    pieces = _pieces(identity, looping)
    verdict = IDENTICAL
    if style.name == "layer_skip" and identity == 201:
        pieces, verdict = [*pieces[:20], " nearly", *pieces[21:]], NEAR_TIE
    if not style.lossless and identity % 2:
        pieces, verdict = [*pieces[:10], " otherwise", *pieces[11:]], BUG
    trace = StepTrace(identity, 0, 0, variant.state, variant.temperature, variant.batch_size)
    sources = ["prefill"]
    while len(sources) < TOKENS:
        accepted = 0
        while accepted < style.depth and dice.random() < (0.95 if looping and style.depth else chance):
            accepted += 1
        accepted = min(accepted, TOKENS - len(sources) - 1)
        sources += [style.name] * accepted + ["target"]
        trace.accepted.append(accepted)
        trace.offered.append([1] * style.depth)
        trace.drafted.append(style.depth)
        trace.computed.append(case.nodes if style.depth else 1)
        trace.ranks.append([0] * accepted)
    steps = len(trace.accepted)
    slower = case.pass_seconds * (1 + 0.1 * (variant.batch_size - 1)) / variant.batch_size
    trace.seconds = {
        "prefill": 0.01, "draft": [style.draft_seconds] * steps, "verify": [slower] * steps, "commit": [0.0002] * steps,
    }  # fmt: skip
    compared = variant.kind != "plain" and not variant.temperature
    choice = Choice(
        0, ["".join(pieces)], [steps], [TOKENS], [_seconds(trace)], [count + 1 for count in trace.accepted], [0.01],
        [list(range(TOKENS))], [list(zip(pieces, sources, strict=True))], [looping], [verdict if compared else None],
    )  # fmt: skip
    answer = Answer(
        identity, task, variant.method, [choice], 0.0, f"{identity}", variant.method, variant.kind, variant.state,
        variant.temperature, variant.batch_size, variant.lossless,
    )  # fmt: skip
    return Text(answer, trace, looping)


def _pieces(identity: int, looping: bool) -> list[str]:
    start = identity % len(PROSE)
    words = [PROSE[(start + offset) % (6 if looping else len(PROSE))] for offset in range(TOKENS)]
    return [f" {word}" for word in words]


def _seconds(trace: StepTrace) -> float:
    spent = trace.seconds
    return spent["prefill"] + sum(spent["draft"]) + sum(spent["verify"]) + sum(spent["commit"])


def _failed(text: Text) -> bool:
    return text.answer.method == "prompt_lookup" and text.answer.question_id == 302


def _write(folder: Path, variant: Variant, texts: Sequence[Text]) -> None:
    good = [text for text in texts if text.answer.question_id != 302]
    append_lines(folder / ANSWERS / f"{variant.stem}.jsonl", [text.answer for text in good])
    if variant.kind != "transformers":
        append_lines(folder / STEPS / f"{variant.stem}.jsonl", [text.trace for text in good])
    for text in texts:
        if text.answer.question_id == 302:
            if _failed(text):
                text.answer.error = "Traceback (most recent call last):\n  ...\nRuntimeError: <simulated> failure"
                text.answer.choices = []
            append_lines(folder / FAILED / f"{variant.stem}.jsonl", [text.answer])


def _rows(variant: Variant, texts: Sequence[Text], speeds: dict[tuple[str, str, str], float]) -> Iterator[SummaryRow]:
    for task in ("overall", *TASKS):
        of_task = [t for t in texts if task in ("overall", t.answer.category)]
        for subset in ("all", "non_looping"):
            # A question that failed for one method counts for nobody.
            kept = [t for t in of_task if t.answer.question_id != 302 and (subset == "all" or not t.looping)]
            stats = _count(kept)
            seconds = sum(_seconds(t.trace) for t in kept)
            speed = stats.emitted_tokens / seconds
            speeds[variant.kind, task, subset] = speed
            verdicts = [t.answer.choices[0].identical[0] for t in kept]
            judged = verdicts[0] is not None
            drafter = variant.kind == "drafter"
            yield SummaryRow(
                variant.method, task, variant.temperature, variant.batch_size,
                stats.mean_accepted_tokens if variant.kind != "transformers" else None, speed,
                speed / speeds["plain", task, subset] if "plain" in [key[0] for key in speeds] else 0.97,
                speed / speeds["transformers", task, subset],
                stats.draft_share if drafter else None,
                stats.acceptance_by_depth if drafter else None,
                verdicts.count(IDENTICAL) if judged else None, len(kept), variant.lossless, variant.kind, variant.state,
                subset, stats.tokens_per_second, stats.emitted_tokens, seconds,
                sum(t.looping for t in of_task) / len(of_task) if subset == "all" else 0.0,
                verdicts.count(NEAR_TIE) if judged else None, verdicts.count(BUG) if judged else None,
                sum(map(_failed, of_task)), 0,
                {str(k): v for k, v in sorted(stats.accepted_lengths.items())} if drafter else None,
                stats.conditional_acceptance_by_depth if drafter else None,
                stats.computed_nodes / stats.verifications if drafter else None,
                _shares(variant, stats, seconds),
            )  # fmt: skip


def _shares(variant: Variant, stats: SpeculationStats, seconds: float) -> dict[str, float]:
    if variant.kind == "transformers":
        return {"prefill": stats.seconds["prefill"], "decode": seconds - stats.seconds["prefill"]}
    return {**stats.seconds, "other": 0.02 * seconds}


def _count(texts: Sequence[Text]) -> SpeculationStats:
    stats = SpeculationStats(rows=len(texts), emitted_tokens=TOKENS * len(texts))
    for trace in (text.trace for text in texts):
        stats.verifications += len(trace.accepted)
        stats.accepted_lengths.update(trace.accepted)
        stats.computed_nodes += sum(trace.computed)
        for accepted, offered in zip(trace.accepted, trace.offered, strict=True):
            depths = range(1, len(offered) + 1)
            stats.offered_at_depth.update(depths)
            stats.reached_at_depth.update(depth for depth in depths if depth <= accepted + 1)
        stats.seconds["prefill"] += trace.seconds["prefill"]
        for phase in ("draft", "verify", "commit"):
            stats.seconds[phase] += sum(trace.seconds[phase])
    return stats


def _provenance(case: Case) -> dict[str, object]:
    return {
        "overrides": list(case.overrides),
        "command": "specdec evaluate recipe=smoke",
        "target": case.target, "dtype": case.dtype, "device": "cpu", "threads": 2, "seed": 0,
        "git": {"sha": "0" * 40, "dirty": False},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "config": {"target": {"_target_": "specdec.loading.load"}, "max_new_tokens": case.max_new_tokens},
    }  # fmt: skip
