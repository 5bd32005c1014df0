"""One self-contained HTML page and PNG files from what evaluate wrote: specdec report DIR... out=FOLDER."""

from __future__ import annotations

import importlib
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

POSITIONAL = "folders"
_NEEDED = ("jinja2", "matplotlib")


def run(config: DictConfig) -> int:
    """Write the report; the page's path is the last line of standard output.

    Raises:
        ImportError: the extra is not installed.
        ValueError: a folder that does not exist or holds no results, a malformed file.
    """
    for library in _NEEDED:
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            raise ImportError(f"the report needs {library}: pip install specdec-hf[report]") from error
    from specdec.report.page import write_report

    folders = [Path(str(folder)) for folder in config.folders]
    out = Path(config.out) if config.out is not None else (folders[0] / "report" if folders else Path("report"))
    paths = write_report(folders, out)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(paths) - 1} pictures in {out}", markup=False)
    console.print(str(paths[0]), markup=False)
    return 0
