"""The target's own answers to the prompts of a corpus, speculative and batched: what drafters learn best from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from specdec.commands._data import source_of
from specdec.commands._session import Session
from specdec.evaluation.data import shard_of
from specdec.evaluation.provenance import now, provenance
from specdec.generation import speculation_of
from specdec.metrics import SpeculationStats
from specdec.training.answers import AnswerFile
from specdec.training.corpus import Corpus
from specdec.training.distillation import Distiller, Outcome, Plan, Task, fingerprint, selected, tasks_of
from specdec.training.progress import Bar

# What may differ between two starts that write one file.
_VOLATILE = ("output", "overwrite", "limit", "shard", "batch_size", "threads")
INTERRUPTED = 130


@dataclass
class _Totals:
    """Of one start: answers written, those of them cut at the token limit, prompts that did not fit, failures."""

    answers: int = 0
    cut: int = 0
    skipped: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second of wall clock in ``generate``."""
        return self.tokens / self.seconds if self.seconds else 0.0


def run(config: DictConfig) -> int | None:
    """Have every prompt answered. Returns 1 where one failed, 130 where it was interrupted."""
    console = Console(stderr=True)
    source = source_of(config)
    for note in source.notes() if isinstance(source, Corpus) else ():
        console.print(escape(note), highlight=False, soft_wrap=True)
    tasks = tasks_of(source)
    chosen = selected(tasks, config.limit, config.shard)
    session = Session(config)
    plan = _plan(session)
    file = AnswerFile(_path(config))
    claimed = {key: value for key, value in session.config.items() if key not in _VOLATILE}
    claimed["prompts_sha256"] = fingerprint(tasks)
    before = file.claim(claimed, config.overwrite)
    session.without_processors()
    session.fill_pad()
    session.speculate()
    said = _provenance(session, claimed, before, config.shard)
    file.say(said)
    done = file.finished()
    totals, interrupted = _Totals(), False
    left = [task for task in chosen if task.task_id not in done]
    with Bar(console, "answering", len(chosen), len(chosen) - len(left)) as bar:
        if len(left) < len(chosen):
            bar.note(f"{len(chosen) - len(left)} of {len(chosen)} prompts were answered before")
        try:
            _answer(session, Distiller(session.loaded, plan), left, file, bar, totals)
        except KeyboardInterrupt:
            interrupted = True
    stats = speculation_of(session.model).stats
    said["starts"][-1] |= {"finished": now(), "interrupted": interrupted, **vars(totals)}
    file.say(said)
    _conclude(console, file.path, totals, stats, interrupted)
    return INTERRUPTED if interrupted else 1 if totals.failed else None


def _answer(
    session: Session, distiller: Distiller, tasks: Sequence[Task], file: AnswerFile, bar: Bar, totals: _Totals
) -> None:
    handle = speculation_of(session.model)
    for outcome in distiller.run(distiller.batches(tasks), handle.drafter.reset):
        written = [answer for answer in outcome.answers if answer.num_tokens]
        if written:
            file.add([answer.record for answer in written])
        _count(totals, outcome)
        for answer in outcome.answers:
            if answer.skipped is not None:
                what = "ends early" if answer.num_tokens else "left out"
                bar.note(f"{answer.task.task_id} {what}: {answer.skipped}")
        for task, error in outcome.failures:
            bar.note(f"{task.task_id} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        accepted = f"{handle.stats.mean_accepted_tokens:.2f} accepted"
        bar.advance(len(outcome.answers) + len(outcome.failures), f"{totals.rate:.0f} tokens/s, {accepted}")


def _count(totals: _Totals, outcome: Outcome) -> None:
    written = [answer for answer in outcome.answers if answer.num_tokens]
    totals.answers += len(written)
    totals.cut += sum(not answer.finished for answer in written)
    totals.skipped += sum(answer.skipped is not None for answer in outcome.answers)
    totals.failed += len(outcome.failures)
    totals.tokens += sum(answer.num_tokens for answer in written)
    totals.seconds += outcome.seconds


def _plan(session: Session) -> Plan:
    """How the target is asked.

    Raises:
        ValueError: a number out of range.
    """
    config, options = session.config, session.options()
    for name in ("batch_size", "max_new_tokens", "prompt_tokens"):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
    new_tokens = options.pop("max_new_tokens")
    return Plan(config["batch_size"], new_tokens, options, config["chat"], config["prompt_tokens"], config["seed"])


def _path(config: DictConfig) -> Path:
    """The file; each shard has its own.

    Raises:
        ValueError: it is not named.
    """
    if config.output is None:
        raise ValueError("distill needs a file to write to: output=answers.jsonl")
    path = Path(str(config.output)).expanduser()
    if config.shard is None:
        return path
    first, count = shard_of(config.shard)
    return path.with_name(f"{path.stem}.shard{first}of{count}{path.suffix}")


def _provenance(
    session: Session, claimed: dict[str, Any], before: dict[str, Any] | None, shard: str | None
) -> dict[str, Any]:
    """That of the first start, with an entry for every start."""
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    command = ["specdec", "distill", *sys.argv[1:]]
    here = provenance(session.loaded, command, session.config, shard, overrides)
    said = before or {**here, "claimed": claimed, "starts": []}
    entry = {key: here[key] for key in ("command", "started", "git", "versions", "device", "threads")}
    said["starts"].append(entry)
    return said


def _conclude(console: Console, path: Path, totals: _Totals, stats: SpeculationStats, interrupted: bool) -> None:
    lines = [f"written to {escape(str(path))}: {totals.answers} answers"]
    if totals.answers:
        lines[0] += (
            f", {totals.cut} of them cut at the token limit; {totals.tokens} tokens, {totals.rate:.0f} tokens/s, "
            f"{stats.mean_accepted_tokens:.2f} mean accepted tokens"
        )
    if not stats.lossless:
        lines.append("[yellow]the acceptance rule is lossy: these are not quite the target's own answers[/yellow]")
    if totals.skipped:
        lines.append(f"{totals.skipped} prompts were left out, in whole or in part: they do not fit")
    if totals.failed:
        lines.append(f"[red]{totals.failed} prompts failed[/red]; the same command asks them again")
    if interrupted:
        lines.append("interrupted; the same command goes on from here")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
