"""Search offline for the settings of a drafter that suit a target and its texts, and write them as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from specdec.commands._session import Session
from specdec.generation import speculation_of
from specdec.interfaces import Tunable
from specdec.textlines import lines_of


def run(config: DictConfig) -> None:
    """Hand the prompts to the drafter's own search and write what it finds under the target's name."""
    session, console = Session(config), Console()
    texts = _prompts(session)
    session.speculate()
    handle = speculation_of(session.model)
    if not isinstance(handle.drafter, Tunable):
        raise ValueError(f"drafter {handle.drafter.name!r} has nothing to tune; expected one that has, such as swift")
    ids = [session.loaded.encode(text, config.chat) for text in texts]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tuning", total=None)

        def progress(done: int, of: int, what: str) -> None:
            bar.update(task, completed=done, total=of, description=what)

        found = handle.drafter.tune(handle.target, ids, session.generate, progress)
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {**found, "model": session.loaded.name, "drafter": handle.drafter.name, "versions": _versions()}
    path.write_text(json.dumps({session.loaded.name: entry}, indent=1) + "\n", encoding="utf-8")
    console.print_json(json.dumps(found))
    console.print(f"written to {path}", highlight=False)


def _prompts(session: Session) -> list[str]:
    """The prompts of ``prompts_file`` where it is given; else those of the configuration.

    Raises:
        ValueError: the file holds none.
    """
    if session.config["prompts_file"] is None:
        return session.prompts()
    lines = lines_of(Path(session.config["prompts_file"]).expanduser())
    texts = [_text(line) for _, line in lines][: session.config["num_prompts"]]
    if not texts:
        raise ValueError(f"{session.config['prompts_file']} holds no prompt; expected one per line, or JSON lines")
    return texts


def _text(line: str) -> str:
    """A line of text, or the prompt in a line of JSON.

    Raises:
        ValueError: JSON without a prompt; names the keys it may have.
    """
    if not line.lstrip().startswith("{"):
        return line
    row: dict[str, Any] = json.loads(line)
    for key in ("prompt", "question", "turns"):
        if key in row:
            return str(row[key][0] if isinstance(row[key], list) else row[key])
    raise ValueError(f"expected a key prompt, question or turns in a line of JSON, got {sorted(row)}")


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}
