"""Finding runs in folders and reading them. What is missing or malformed is named, with its line where it has one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.evaluation.records import ANSWERS, SUMMARY, Summary, read_summary

SELECTION = frozenset({"data", "categories", "per_category", "limit", "sample", "seed"})
_ASKED = (*sorted(SELECTION - {"seed"}), "chat", "max_new_tokens", "top_k", "top_p")


@dataclass
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        summary: its figures and provenance.
    """

    folder: Path
    summary: Summary

    @property
    def provenance(self) -> dict[str, Any]:
        """As recorded."""
        return self.summary.provenance

    @property
    def target(self) -> str:
        """Name of the target model, as recorded."""
        return self._recorded("target")

    @property
    def dtype(self) -> str:
        """Of the target, without ``torch.``."""
        return self._recorded("dtype").removeprefix("torch.")

    @property
    def device(self) -> str:
        """As recorded."""
        return self._recorded("device")

    @property
    def overrides(self) -> list[str]:
        """``key=value`` as given on the command line, without Hydra's plus signs."""
        return [str(text).lstrip("+") for text in self.provenance.get("overrides") or []]

    @property
    def left_out(self) -> dict[str, str]:
        """Method -> why it was not measured."""
        return dict(self.provenance.get("left_out") or {})

    @property
    def workload(self) -> tuple[tuple[str, str], ...]:
        """What was asked, and with how many threads: (name, value) pairs that must agree for speeds to be compared."""
        config = self.provenance.get("config")
        asked = {key: config[key] for key in _ASKED if key in config} if isinstance(config, dict) else {}
        if isinstance(config, dict) and config.get("sample"):
            asked["seed"] = config.get("seed")
        if isinstance(config, dict) and config.get("questions_sha256"):
            asked["questions"] = str(config["questions_sha256"])[:8]
        asked["threads"] = self.provenance.get("threads")
        return tuple((key, json.dumps(value, default=str)) for key, value in asked.items())

    def drafter_of(self, method: str) -> str:
        """Name of the drafter behind a method, whose label in the configuration may be another."""
        config = self.provenance.get("config")
        entries = config.get("drafters") if isinstance(config, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("label", entry.get("name")) == method:
                return str(entry["name"])
        return method

    def _recorded(self, key: str) -> str:
        found = self.provenance.get(key)
        if isinstance(found, dict):
            found = found.get("name") or found.get("path") or found.get("_target_")
        return str(found) if found is not None else "unknown"


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in run folders and multirun folders, each once, in the order given.

    Raises:
        ValueError: no folder given, one that does not exist or holds no results, a malformed summary.
    """
    if not folders:
        raise ValueError("no folder; give the output folders of specdec evaluate: specdec report DIR...")
    runs: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder}; expected an output folder of specdec evaluate")
        found = list(_runs_in(folder))
        if not found:
            raise ValueError(_nothing_in(folder))
        for run in found:
            runs.setdefault(run.folder.resolve(), run)
    return list(runs.values())


def _runs_in(folder: Path) -> Iterator[Run]:
    """The run that ``folder`` is, else those in its direct children."""
    if (folder / ANSWERS).is_dir() and (folder / SUMMARY).is_file():
        yield Run(folder, _summary(folder / SUMMARY))
        return
    children = sorted((path.parent for path in folder.glob(f"*/{SUMMARY}")), key=_by_number)
    for child in children:
        yield Run(child, _summary(child / SUMMARY))
    if not children and (folder / SUMMARY).is_file():  # the tables alone were kept
        yield Run(folder, _summary(folder / SUMMARY))


def _by_number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else -1, folder.name)


def _nothing_in(folder: Path) -> str:
    if (folder / ANSWERS).is_dir():
        return (
            f"{folder} holds answers but no {SUMMARY}: the run was interrupted; "
            "run the same specdec evaluate command again, it resumes"
        )
    held = sorted(path.name for path in folder.iterdir())
    return (
        f"no results in {folder}: expected {SUMMARY} in it or in its subfolders, found {', '.join(held) or 'nothing'}"
    )


def _summary(path: Path) -> Summary:
    try:
        summary = read_summary(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a summary of specdec evaluate: expected rows with drafter and task; {error}"
        ) from error
    if not summary.rows:
        raise ValueError(f"{path}: no rows; no question was finished in this run")
    return summary
