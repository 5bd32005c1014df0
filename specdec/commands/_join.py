"""The callback that makes one summary of all jobs of a multirun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from specdec.evaluation.summary import join
from specdec.evaluation.tables import show, write_summary


class JoinJobs(Callback):
    """After the last job: ``summary.json``, ``.csv`` and ``.md`` of all of them in the folder of the sweep."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002 - Hydra's signature
        """Join, show, and leave with exit code 1 where a question failed or a text was not the target's own."""
        folder = Path(config.hydra.sweep.dir)
        summary = join(folder)
        write_summary(folder, summary)
        show(summary)
        said = f"{len(summary.provenance['jobs'])} jobs joined in {folder}"
        Console(stderr=True).print(said, highlight=False, soft_wrap=True)
        if any(row.failed or (row.bugs and row.lossless) for row in summary.rows):
            sys.exit(1)
