"""The folder of a run: whose it is, which questions are finished, and how results get into it.

A question is finished when its answers line stands in the files of all methods of its setting. What an interruption
left half written is dropped when the run goes on.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from specdec.evaluation.data import shard_of
from specdec.evaluation.records import (
    ANSWERS,
    FAILED,
    QUESTIONS,
    STEPS,
    SUMMARY,
    Answer,
    StepTrace,
    Variant,
    append_lines,
    read_answers,
    read_steps,
    write_lines,
)

CONFIG = "config.yaml"
STATE = "state"
_OURS = (ANSWERS, FAILED, STEPS, QUESTIONS, STATE, "processes", SUMMARY, "summary.csv", "summary.md", CONFIG)


class RunFolder:
    """One run's folder, seen from one process (one shard).

    Args:
        path: the folder; made where it is not there.
        shard: ``i/n``, or None for the whole.
    """

    def __init__(self, path: Path, shard: str | None = None) -> None:
        self.path = path
        first, count = shard_of(shard)
        self.suffix = "" if shard is None else f".shard{first}of{count}"

    def claim(self, before: Mapping[str, Any] | None, config: Mapping[str, Any], overwrite: bool) -> None:
        """Make sure that the folder is this run's.

        Args:
            before: the configuration found in it, None where there is none; what may change between two starts of one
                run is left out by the caller, here and in ``config``.
            config: of this run.
            overwrite: drop what is there.

        Raises:
            ValueError: it holds another run's results.
        """
        if before is not None and "measured" not in before:
            raise ValueError(f"{self.path / CONFIG} is not a run's; use another output=FOLDER")
        if overwrite:
            if self.suffix:
                raise ValueError("overwrite=true with shard=... would drop the other shards; clear the folder first")
            self.clear()
        elif before is None and any((self.path / name).exists() for name in (ANSWERS, SUMMARY)):
            raise ValueError(
                f"{self.path} holds results without their {CONFIG}; use overwrite=true or another output=FOLDER"
            )
        elif before is not None and before != config:
            changed = sorted(set(differences(before, config)))
            raise ValueError(
                f"{self.path} holds the results of another run ({'; '.join(changed[:4])}); use overwrite=true or "
                "another output=FOLDER"
            )
        with told_when_full(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Drop what a run left, and nothing else."""
        for name in _OURS:
            place = self.path / name
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)

    def resume(self, variants: Sequence[Variant], groups: Sequence[Collection[int | str]]) -> set[int | str]:
        """The finished questions of one setting; drops the rest from the files.

        Args:
            variants: all methods of the setting.
            groups: ids of the questions that are asked in one call, of which all are finished or none.
        """
        finished: list[set[int | str]] = []
        failed: set[int | str] = set()
        for variant in variants:
            left_out = self._read(FAILED, variant)
            failed |= {answer.question_id for answer in left_out if answer.error is not None}
            finished.append({answer.question_id for answer in [*self._read(ANSWERS, variant), *left_out]})
        whole = (set.intersection(*finished) if finished else set()) - failed
        done = {identity for group in groups if whole.issuperset(group) for identity in group}
        for variant in variants:
            for kind in (ANSWERS, FAILED):
                self._rewrite(kind, variant, self._read(kind, variant), done)
            path = self._file(STEPS, variant)
            self._rewrite(STEPS, variant, read_steps(path) if path.is_file() else [], done)
        return done

    def add(
        self, variant: Variant, counted: Sequence[Answer], aside: Sequence[Answer], traces: Sequence[StepTrace]
    ) -> None:
        """Write the questions of one call; the answers last, because they make a question finished.

        Args:
            variant: the method.
            counted: answers of which figures are made.
            aside: those of questions that failed for some method, or did not fit.
            traces: the steps; those of questions set aside are left out.

        Raises:
            OSError: with what to do, where the disk is full.
        """
        known = {answer.question_id for answer in counted}
        steps = [trace for trace in traces if trace.question_id in known]
        with told_when_full(self.path):
            for kind, records in ((STEPS, steps), (FAILED, aside), (ANSWERS, counted)):
                if records:
                    append_lines(self._file(kind, variant), records)

    def save_state(self, variant: Variant, state: Mapping[str, Any]) -> None:
        """Keep what a warm method has learnt, for a later start of this run."""
        with told_when_full(self.path):
            path = self._state(variant)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(dict(state), path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)

    def load_state(self, variant: Variant) -> dict[str, Any] | None:
        """What ``save_state`` kept; None where there is nothing."""
        path = self._state(variant)
        return torch.load(path, weights_only=True) if path.is_file() else None

    def drop_state(self, variants: Iterable[Variant]) -> None:
        """A setting is complete; nobody will go on from its states."""
        for variant in variants:
            self._state(variant).unlink(missing_ok=True)
        if (self.path / STATE).is_dir() and not any((self.path / STATE).iterdir()):
            (self.path / STATE).rmdir()

    def _file(self, kind: str, variant: Variant) -> Path:
        return self.path / kind / f"{variant.stem}{self.suffix}.jsonl"

    def _state(self, variant: Variant) -> Path:
        return self.path / STATE / f"{variant.stem}{self.suffix}.pt"

    def _read(self, kind: str, variant: Variant) -> list[Answer]:
        path = self._file(kind, variant)
        return read_answers(path) if path.is_file() else []

    def _rewrite(self, kind: str, variant: Variant, records: Sequence[Any], done: set[int | str]) -> None:
        path = self._file(kind, variant)
        if not path.is_file():
            return
        with told_when_full(self.path):
            write_lines(path, [record for record in records if record.question_id in done])


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Within the block a full disk is an error that says how to go on.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk is full; finished questions in {folder} are kept: free some space and start the same command "
            f"again with output={folder}",
        ) from error


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Where two configurations differ, as ``key: before -> now``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in before.keys() | now.keys():
            yield from differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif before != now:
        yield f"{place}: {before} -> {now}"
