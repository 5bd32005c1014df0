"""Lines of a text file, as JSON lines mean them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path


def lines_of(path: Path, skipped: Callable[[str], None] | None = None) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line that is not blank.

    Only a line feed ends a line: the other separators that ``str.splitlines`` knows, such as U+2028, may stand in a
    JSON string as they are. A byte order mark and a carriage return before the line feed are dropped.

    Args:
        path: the file.
        skipped: told of a line that is no UTF-8, which is then left out; None = an error.

    Raises:
        ValueError: a line is no UTF-8; names file and line.
    """
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig").removesuffix("\r")
        except UnicodeDecodeError as error:
            reason = f"{path}:{number}: expected UTF-8, got byte 0x{raw[error.start]:02x}"
            if skipped is None:
                raise ValueError(reason) from error
            skipped(reason)
            continue
        if line.strip():
            yield number, line
