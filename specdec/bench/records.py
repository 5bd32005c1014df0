"""``bench.json``: what was measured, section by section, with where it comes from. Owns the file, computes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from specdec.evaluation.records import replace_text

BENCH = "bench.json"
SECTIONS = ("step", "end_to_end", "growth", "memory", "profile", "gpu")
NOT_MEASURED = "not measured"
_MACHINE = ("device", "threads", "versions")


class Book:
    """The file of one run; a section that is finished stays.

    Args:
        folder: where it lies.
        said: provenance of this process.

    Raises:
        ValueError: the folder holds the figures of another machine, number of threads or set of versions.
    """

    def __init__(self, folder: Path, said: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / BENCH
        self.content: dict[str, Any] = {"sections": {}}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
            before = self.content["provenance"]
            changed = [f"{key}: {before[key]} -> {said[key]}" for key in _MACHINE if before[key] != said[key]]
            if changed:
                raise ValueError(
                    f"{self.path} was measured under other conditions ({'; '.join(changed)}); "
                    "use overwrite=true or another output=FOLDER"
                )
            for section in self.content["sections"].values():
                section.setdefault("git", before["git"])
        self._git = said["git"]
        self.content = {"provenance": without_places(said), "sections": self.content["sections"]}

    def finished(self, section: str, options: Mapping[str, Any]) -> bool:
        """Whether a section stands in the file, measured with the same options."""
        known = self.content["sections"].get(section)
        return known is not None and known["options"] == without_places(options)

    def add(self, section: str, options: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Write down a finished section and the state of the code that it was measured with, the file in one move."""
        self.content["sections"][section] = without_places({**figures, "git": self._git, "options": dict(options)})
        order = {name: index for index, name in enumerate(SECTIONS)}
        self.content["sections"] = dict(sorted(self.content["sections"].items(), key=lambda item: order[item[0]]))
        replace_text(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")


def without_places(value: Any) -> Any:
    """Plain values in which folders of this machine are left out: of an absolute path its last part stays."""
    if isinstance(value, Mapping):
        return {str(key): without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    return " ".join(_last_part(word) for word in value.split(" "))


def _last_part(word: str) -> str:
    key, equals, place = word.rpartition("=")
    quote = place[:1] if place[:1] in ("'", '"') else ""
    bare = place.strip("'\"")
    return f"{key}{equals}{quote}{PurePosixPath(bare).name}{quote}" if bare.startswith(("/", "~/")) else word
