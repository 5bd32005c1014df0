"""The file that answers are distilled into: whose it is, and which answers stand in it already."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specdec.evaluation.records import replace_text
from specdec.evaluation.store import differences, told_when_full


class AnswerFile:
    """A JSONL file of answers with its provenance beside it, written line by line and gone on with.

    Args:
        path: the file; the provenance is ``PATH.provenance.json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.provenance_path = Path(f"{path}.provenance.json")

    def claim(self, config: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
        """Make sure that the file is this configuration's.

        Args:
            config: without what may change between two starts.
            overwrite: drop what is there.

        Returns:
            The provenance found there, None where the file is new.

        Raises:
            ValueError: it holds other answers, or answers of unknown origin.
        """
        if overwrite:
            self.path.unlink(missing_ok=True)
            self.provenance_path.unlink(missing_ok=True)
        way_out = "use overwrite=true or another output=FILE"
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no file; give output=FILE")
        if not self.provenance_path.is_file():
            if self.path.is_file() and self.path.stat().st_size:
                raise ValueError(f"{self.path} holds lines without their {self.provenance_path.name}; {way_out}")
            return None
        known: dict[str, Any] = json.loads(self.provenance_path.read_text(encoding="utf-8"))
        if known["claimed"] != json.loads(json.dumps(config)):
            changed = sorted(set(differences(known["claimed"], dict(config))))
            raise ValueError(f"{self.path} holds other answers ({'; '.join(changed[:4])}); {way_out}")
        return known

    def say(self, provenance: Mapping[str, Any]) -> None:
        """Write the provenance."""
        with told_when_full(self.path):
            replace_text(self.provenance_path, json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")

    def finished(self) -> set[int | str]:
        """Ids of the answers that are there; a last line that an interruption cut short is taken off.

        Raises:
            ValueError: another line is none of ours; names it.
        """
        if not self.path.is_file():
            return set()
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            os.truncate(self.path, len(kept))
        found = set[int | str]()
        for number, line in enumerate(kept.splitlines(), start=1):
            try:
                found.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}:{number}: expected an answer with its id, got {line[:60]!r}") from error
        return found

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append lines and hand them to the operating system before returning.

        Raises:
            OSError: with what to do, where the disk is full.
        """
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with told_when_full(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(text)
