"""Drafters side by side on the same questions: speed-ups, acceptance, losslessness, as files and as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from specdec.commands._contenders import Contenders, labels
from specdec.commands._data import choice
from specdec.commands._data import questions_of as all_questions
from specdec.commands._session import Session, checked_temperature
from specdec.evaluation.data import Question, Selection, fingerprint, shard_of
from specdec.evaluation.progress import Progress
from specdec.evaluation.provenance import now, provenance
from specdec.evaluation.records import QUESTIONS, Summary, replace_text, write_lines
from specdec.evaluation.runner import Plan, Runner, Setting
from specdec.evaluation.store import CONFIG, RunFolder, told_when_full
from specdec.evaluation.summary import best, checked_metric, provenance_of, summarise
from specdec.evaluation.tables import show, write_summary

# What may differ between two starts of one run, and between its shards.
_VOLATILE = ("output", "overwrite", "shard", "metric")
INTERRUPTED = 130


def run(config: DictConfig) -> float | int | None:
    """Evaluate. Returns the metric for sweepers; outside a sweep exit code 1 where a question failed or a text is not
    the target's own, 130 where it was interrupted.
    """
    checked_metric(config.metric)
    console, selected, plan = Console(stderr=True), questions_of(config), plan_of(config)
    questions = _of_shard(selected, config.shard)
    session = Session(config)
    session.without_processors()
    session.fill_pad()
    contenders = Contenders(session, choice("drafter", str(config.drafter.get("_target_", "drafter"))))
    folder = RunFolder(_folder(config), config.shard)
    resolved = {**session.config, "measured": labels(contenders(Setting(0.0, 1)))}
    resolved["questions_sha256"] = fingerprint(selected)
    folder.claim(_found(folder.path), _stable(resolved), config.overwrite)
    with told_when_full(folder.path):
        replace_text(folder.path / CONFIG, OmegaConf.to_yaml(OmegaConf.create(resolved)))
        write_lines(folder.path / QUESTIONS / f"questions{folder.suffix}.jsonl", questions)
    said = provenance(session.loaded, _command(), resolved, config.shard, _overrides())
    said |= {"left_out": contenders.left_out, "questions": len(questions)}
    interrupted = False
    with Progress(console) as progress:
        for name, reason in contenders.left_out.items():
            progress.note(f"left out: {name}: {reason}")
        runner = Runner(session.loaded, contenders, plan, folder, progress)
        try:
            runner.run(questions)
        except KeyboardInterrupt:
            interrupted = True
    summary = _summarise(folder, {**said, "finished": now(), "asked": runner.asked, "interrupted": interrupted})
    show(summary)
    _say_where(console, folder.path, interrupted, runner.failures)
    metric = best(summary, config.metric, contenders.first)
    if _in_sweep():
        if interrupted:
            raise KeyboardInterrupt
        return metric
    bugs = any(row.bugs for row in summary.rows if row.lossless)
    return INTERRUPTED if interrupted else 1 if runner.failures or bugs else metric


def questions_of(config: DictConfig) -> list[Question]:
    """The questions that the config selects, those of all shards.

    Raises:
        ValueError: bad input, by file and line where there is one.
    """
    source = all_questions(config)
    names = ("categories", "per_category", "limit", "sample", "seed")
    chosen = {name: config[name] for name in names}
    if config.categories is not None:
        chosen["categories"] = _listed(config.categories)
    return Selection(**chosen)(source)


def _of_shard(selected: list[Question], shard: str | None) -> list[Question]:
    first, step = shard_of(shard)
    if not (questions := selected[first - 1 :: step]):
        raise ValueError(f"no question is left to ask: {len(selected)} in all, shard={shard}")
    return questions


def plan_of(config: DictConfig) -> Plan:
    """How they are asked.

    Raises:
        ValueError: a number out of range.
    """
    temperatures = [checked_temperature(value) for value in _listed(config.temperature)]
    sizes, whole = _listed(config.batch_size), ("max_new_tokens", "repeats")
    for name, value in [*(("batch_size", size) for size in sizes), *((name, config[name]) for name in whole)]:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
    if not isinstance(config.warmup, int) or config.warmup < 0:
        raise ValueError(f"expected warmup to be a whole number, got {config.warmup!r}")
    options = {key: config[key] for key in ("top_k", "top_p") if config[key] is not None}
    settings = [Setting(float(temperature), size) for temperature in temperatures for size in sizes]
    return Plan(settings, config.max_new_tokens, options, config.chat, config.repeats, config.warmup, config.seed)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, ListConfig) else [value]


def _folder(config: DictConfig) -> Path:
    """Hydra's folder of this job, which is ``output`` outside a sweep."""
    return Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else config.output)


def _command() -> list[str]:
    """As typed; of a job, which may run in a process of a launcher, what its sweep came to."""
    return ["specdec", "evaluate", *(_overrides() if _in_sweep() else sys.argv[1:])]


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _found(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run that a folder holds."""
    path = folder / CONFIG
    return _stable(OmegaConf.to_container(OmegaConf.load(path))) if path.is_file() else None


def _stable(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE}


def _summarise(folder: RunFolder, said: dict[str, Any]) -> Summary:
    """Figures of all that is there, other shards and earlier starts included."""
    name = f"{said['started'].replace(':', '-')}{folder.suffix}.json"
    with told_when_full(folder.path):
        replace_text(folder.path / "processes" / name, json.dumps(said, indent=1) + "\n")
        summary = summarise(folder.path, provenance_of(folder.path))
        write_summary(folder.path, summary)
    return summary


def _say_where(console: Console, folder: Path, interrupted: bool, failures: int) -> None:
    lines = [f"written to {folder}"]
    if failures:
        lines.append(f"[red]{failures} questions failed[/red] and count for nobody: {escape(str(folder / 'failed'))}")
    if interrupted:
        lines.append(f"interrupted; the same command with output={escape(str(folder))} goes on from here")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
