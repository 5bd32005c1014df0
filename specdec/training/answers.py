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
            overwrite: drop the answers that are there.

        Returns:
            The provenance found there, None where the file is new.

        Raises:
            ValueError: it holds other answers, or lines of unknown origin, which are not overwritten either.
        """
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no file; give output=FILE")
        known = self._known()
        if known is None and self.path.is_file() and self.path.stat().st_size:
            raise ValueError(
                f"{self.path} holds lines without their {self.provenance_path.name}, so they may be anybody's; use "
                "another output=FILE"
            )
        if overwrite:
            self.path.unlink(missing_ok=True)
            self.provenance_path.unlink(missing_ok=True)
            return None
        if known is not None and known["claimed"] != json.loads(json.dumps(config)):
            changed = "; ".join(sorted(set(differences(known["claimed"], dict(config))))[:4])
            raise ValueError(f"{self.path} holds other answers ({changed}); use overwrite=true or another output=FILE")
        return known

    def _known(self) -> dict[str, Any] | None:
        """The provenance that is there; None where there is none."""
        if not self.provenance_path.is_file():
            return None
        try:
            known = json.loads(self.provenance_path.read_text(encoding="utf-8"))
        except ValueError:
            known = None
        if not isinstance(known, dict) or "claimed" not in known or not isinstance(known.get("starts"), list):
            raise ValueError(f"{self.provenance_path} is no provenance of answers; use another output=FILE")
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
