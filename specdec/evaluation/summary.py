"""From the records of a run to its figures. Every definition is in ``specdec.metrics``; here is which texts they take.

All methods of a setting (temperature and batch size) are compared on the same texts: those that every one of them
answered. Two subsets: all of these, and those whose plain text does not end in a loop, since loops inflate acceptance.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from specdec.evaluation.records import (
    BUG,
    COLD,
    IDENTICAL,
    JOB_FAILED,
    NEAR_TIE,
    SUMMARY,
    Answer,
    RunRecords,
    StepTrace,
    Summary,
    SummaryRow,
    Variant,
    read_run,
    read_summary,
)
from specdec.metrics import SpeculationStats, Throughput, median_repeat, shared

OVERALL = "overall"
_MACHINE = ("git", "versions", "device", "threads", "dtype")  # what figures of several processes should share
Key = tuple[int | str, int]  # question and turn


@dataclass
class Text:
    """One text of one method: the repeat that stands for it, and its trace where there is one."""

    category: str
    tokens: int
    seconds: float
    prefill_seconds: float
    accept_lengths: list[int]
    looping: bool
    identical: str | None
    trace: StepTrace | None


@dataclass
class Texts:
    """All texts of one variant, and what did not become one."""

    variant: Variant
    texts: dict[Key, Text]
    failed: Counter[str]
    skipped: Counter[str]


def summarise(folder: Path, provenance: Mapping[str, Any]) -> Summary:
    """The summary of what a run folder holds: all its shards, finished or not."""
    run = read_run(folder)
    groups: dict[tuple[float, int], list[Texts]] = {}
    for variant in dict.fromkeys([*run.answers, *run.failed]):
        groups.setdefault((variant.temperature, variant.batch_size), []).append(_texts(run, variant))
    rows = [row for key in sorted(groups) for row in _setting(sorted(groups[key], key=_order))]
    return Summary(dict(provenance), rows)


def best(summary: Summary, metric: str, drafter: str) -> float | None:
    """What a sweeper is to maximise: a metric over all texts of a run's first setting; None where there is none.

    Raises:
        ValueError: rows have no such number.
    """
    checked_metric(metric)
    rows = [row for row in summary.rows if row.drafter == drafter and row.task == OVERALL and row.subset == "all"]
    if not rows:
        return None
    warm = [row for row in rows if row.state != "cold"]
    value = getattr((warm or rows)[0], metric)
    return None if value is None else float(value)


def checked_metric(metric: Any) -> str:
    """The name of a number of ``SummaryRow``.

    Raises:
        ValueError: rows have no such number; names those they have.
    """
    numbers = [item.name for item in fields(SummaryRow) if item.type in ("float", "int", "float | None", "int | None")]
    if metric not in numbers:
        raise ValueError(
            f"expected metric to be a number of the summary, such as speedup_vs_plain; got {metric!r}; "
            f"known: {', '.join(numbers)}"
        )
    return str(metric)


def join(folder: Path) -> Summary:
    """One summary of all jobs of a multirun: rows say which job they are from and what it overrode.

    A job that failed is named with its reason under ``failed_jobs``; what an earlier sweep left in its folder is not
    this sweep's, and not joined.

    Raises:
        ValueError: no job has left a summary.
    """
    failed = {path.parent.name: path.read_text(encoding="utf-8").strip() for path in _of_jobs(folder, JOB_FAILED)}
    paths = [path for path in _of_jobs(folder, SUMMARY) if path.parent.name not in failed]
    if not paths:
        reasons = "".join(f"; job {job} failed: {reason}" for job, reason in failed.items())
        raise ValueError(f"no job in {folder} has left a {SUMMARY}{reasons}")
    rows, jobs = list[SummaryRow](), dict[str, Any]()
    for path in paths:
        job = read_summary(path)
        overrides = list(job.provenance.get("overrides", []))
        jobs[path.parent.name] = job.provenance
        rows += [replace(row, job=path.parent.name, overrides=overrides) for row in job.rows]
    return Summary({"jobs": jobs} | ({"failed_jobs": failed} if failed else {}), rows)


def _of_jobs(folder: Path, name: str) -> list[Path]:
    """A file of all jobs that have it, in the order of their numbers."""
    return sorted(folder.glob(f"*/{name}"), key=lambda path: (len(path.parent.name), path.parent.name))


def _order(texts: Texts) -> tuple[int, str, bool]:
    """Baselines first, the plain loop before all; a drafter's usual state before its cold one."""
    kinds = ("plain", "transformers", "transformers_prompt_lookup", "transformers_assistant", "drafter")
    return kinds.index(texts.variant.kind), texts.variant.method, texts.variant.state == COLD


def _texts(run: RunRecords, variant: Variant) -> Texts:
    traces = {(trace.question_id, trace.turn, trace.repeat): trace for trace in run.steps.get(variant, [])}
    found = Texts(variant, {}, Counter(), Counter())
    for answer in run.answers.get(variant, {}).values():
        found.texts |= _of_question(answer, traces)
        found.skipped[answer.category] += len(answer.skipped)
    for answer in run.failed.get(variant, {}).values():
        found.failed[answer.category] += answer.error is not None
        found.skipped[answer.category] += len(answer.skipped)
    return found


def _of_question(answer: Answer, traces: Mapping[tuple[int | str, int, int], StepTrace]) -> dict[Key, Text]:
    choices = answer.choices
    chosen = median_repeat([sum(c.new_tokens) for c in choices], [sum(c.wall_time) for c in choices])
    choice, texts, start = choices[chosen], {}, 0
    for turn, steps in enumerate(choice.decoding_steps):
        texts[answer.question_id, turn] = Text(
            answer.category,
            choice.new_tokens[turn],
            choice.wall_time[turn],
            choice.prefill_time[turn],
            choice.accept_lengths[start : start + steps],
            choice.looping[turn],
            choice.identical[turn],
            traces.get((answer.question_id, turn, choice.index)),
        )
        start += steps
    return texts


def _setting(methods: Sequence[Texts]) -> Iterable[SummaryRow]:
    """Rows of all methods under one setting, on the texts that all of them have."""
    reference = methods[0]  # the plain loop, else transformers
    common = shared(method.texts for method in methods)
    keys = [key for key in reference.texts if key in common]  # in the order of the file
    calm = [key for key in keys if not reference.texts[key].looping]
    everything = [*reference.texts.values()]
    seen = [text.category for text in everything] + [c for m in methods for c in (*m.failed, *m.skipped)]
    for subset, chosen in (("all", keys), ("non_looping", calm)):
        for task in (OVERALL, *dict.fromkeys(seen)):
            wanted = [key for key in chosen if task in (OVERALL, reference.texts[key].category)]
            speeds = {method.variant: _speed(method, wanted) for method in methods}
            loops = sum(reference.texts[key].looping for key in wanted)
            for method in methods:
                row = _row(method, wanted, speeds[method.variant])
                row.task, row.subset = task, subset
                row.looping_share = loops / len(wanted) if wanted else None
                row.failed = _total(method.failed, task)
                row.skipped = _total(method.skipped, task)
                row.speedup_vs_plain = _against("plain", method, speeds)
                row.speedup_vs_transformers = _against("transformers", method, speeds)
                yield row


def _row(method: Texts, keys: Collection[Key], speed: Throughput) -> SummaryRow:
    variant, texts = method.variant, [method.texts[key] for key in keys]
    row = SummaryRow(variant.method, OVERALL, variant.temperature, variant.batch_size)
    row.lossless, row.method_kind, row.state, row.rows = variant.lossless, variant.kind, variant.state, len(texts)
    if not texts:
        return row
    row.tokens_per_second, row.new_tokens, row.wall_seconds = speed.rate, speed.tokens, speed.seconds
    assisted = variant.kind in ("transformers_prompt_lookup", "transformers_assistant")
    # The prompt's pass of assisted generation emits more than one token, so the rest is not all there is to decode.
    row.decode_tokens_per_second = None if assisted else speed.decode_rate
    verdicts = Counter(text.identical for text in texts)
    if set(verdicts) - {None}:
        row.identical_rows, row.near_ties, row.bugs = verdicts[IDENTICAL], verdicts[NEAR_TIE], verdicts[BUG]
    stats = _statistics(texts)
    row.seconds = _seconds(texts, speed, stats)
    row.mean_accepted_tokens = stats.mean_accepted_tokens  # of transformers' plain generate 1.0 by definition
    if variant.kind != "transformers":
        row.accepted_lengths = {str(k): n for k, n in sorted(stats.accepted_lengths.items())}
        row.acceptance_by_depth = stats.acceptance_by_depth
    if all(text.trace is not None for text in texts):
        row.draft_share, row.tree_nodes = stats.draft_share, stats.nodes_per_verification
        row.conditional_acceptance_by_depth = stats.conditional_acceptance_by_depth
    return row


def _statistics(texts: Sequence[Text]) -> SpeculationStats:
    stats = SpeculationStats()
    for text in texts:
        accepted = [length - 1 for length in text.accept_lengths]
        if text.trace is None:  # what was offered is not known: at least what was accepted
            stats.add_text([[1] * length for length in accepted], accepted, [0] * len(accepted))
            continue
        stats.add_text(text.trace.offered, text.trace.accepted, text.trace.computed)
        for phase, seconds in text.trace.seconds.items():
            stats.seconds[phase] += sum(seconds) if isinstance(seconds, list) else seconds
    return stats


def _seconds(texts: Sequence[Text], speed: Throughput, stats: SpeculationStats) -> dict[str, float]:
    if any(text.trace is None for text in texts):
        return {"prefill": speed.prefill_seconds, "decode": speed.seconds - speed.prefill_seconds}
    return {**stats.seconds, "other": speed.seconds - sum(stats.seconds.values())}


def _speed(method: Texts, keys: Iterable[Key]) -> Throughput:
    speed = Throughput()
    for key in keys:
        text = method.texts[key]
        speed.add(text.tokens, text.seconds, text.prefill_seconds)
    return speed


def _against(kind: str, method: Texts, speeds: Mapping[Variant, Throughput]) -> float | None:
    for variant, speed in speeds.items():
        if variant.kind == kind:
            return speeds[method.variant].speedup(speed)
    return None


def _total(counts: Counter[str], task: str) -> int:
    return counts.total() if task == OVERALL else counts[task]


def provenance_of(folder: Path) -> dict[str, Any]:
    """What the processes of a run said of themselves.

    The words are those of the last process that asked anything, since figures are not made by one that found nothing
    left to do. ``processes`` says of each when, how and on what it was at work; ``mixed``, where it is there, names
    what is not the same for all of those that asked.
    """
    said = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "processes").glob("*.json"))]
    said.sort(key=lambda words: words["started"])
    if not said:
        return {}
    brief = ("shard", "started", "finished", "command", "asked", "interrupted", *_MACHINE)
    at_work = [words for words in said if words.get("asked") != 0] or said[-1:]
    mixed = [key for key in _MACHINE if any(words.get(key) != at_work[0].get(key) for words in at_work)]
    found = {**at_work[-1], "interrupted": said[-1].get("interrupted")}
    found |= {"processes": [{key: words.get(key) for key in brief} for words in said]}
    return found | ({"mixed": mixed} if mixed else {})
