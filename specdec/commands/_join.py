"""The callback that makes one summary of all jobs of a multirun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from specdec.evaluation.summary import join
from specdec.evaluation.tables import show, write_summary


class JoinJobs(Callback):
    """After the last job: ``summary.json``, ``.csv`` and ``.md`` of all of them in the folder of the sweep."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002 - Hydra's signature
        """Join, show; exit code 1 where a job or a question failed or a text was not the target's own."""
        folder, console = Path(config.hydra.sweep.dir), Console(stderr=True)
        try:
            summary = join(folder)
        except ValueError as error:  # said here: what a callback raises is only a warning to Hydra
            console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
            sys.exit(1)
        write_summary(folder, summary)
        show(summary)
        failed = summary.provenance.get("failed_jobs", {})
        console.print(f"{len(summary.provenance['jobs'])} jobs joined in {folder}", highlight=False, soft_wrap=True)
        for job, reason in failed.items():
            console.print(f"[red]job {job} failed:[/red] {escape(reason)}", highlight=False, soft_wrap=True)
        if failed or any(row.failed or (row.bugs and row.lossless) for row in summary.rows):
            sys.exit(1)
