"""Search offline for what suits a target, a device and its texts: a drafter's tree, or its own settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from specdec.build import load, shaped_names
from specdec.commands._session import Session
from specdec.commands._tree import Plan, TreeTuner
from specdec.evaluation.data import demo
from specdec.evaluation.provenance import provenance
from specdec.generation import speculation_of
from specdec.interfaces import Shaped, Tunable
from specdec.textlines import lines_of
from specdec.tuning.files import TreeFile

WHAT = ("tree", "drafter")
_PLAN = ("max_nodes", "max_depth", "max_width", "calibration_nodes", "contexts", "repeats", "state")


def run(config: DictConfig) -> None:
    """Tune the drafter where it has a search of its own, else its tree, and write what was found."""
    if config.what is not None and config.what not in WHAT:
        raise ValueError(f"unknown what={config.what!r}; known: {', '.join(WHAT)}, or null")
    session, console = Session(config), Console()
    if session.config["tree"] != load("tree", "published"):
        raise ValueError(f"tune finds a tree and takes none; got {session.config['tree']}")
    session.speculate()
    drafter = speculation_of(session.model).drafter
    what = config.what or ("drafter" if isinstance(drafter, Tunable) else "tree")
    if what == "drafter" and not isinstance(drafter, Tunable):
        raise ValueError(f"drafter {drafter.name!r} has no search of its own; swift has. what=tree finds a tree")
    if what == "tree" and not isinstance(drafter, Shaped):
        raise ValueError(
            f"drafter {drafter.name!r} has nothing to tune; these have a tree to choose: {', '.join(shaped_names())}"
        )
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tuning", total=None)

        def progress(done: int, of: int, what: str) -> None:
            bar.update(task, completed=done, total=of, description=what)

        (_tune_drafter if what == "drafter" else _tune_tree)(session, console, progress)


def _tune_drafter(session: Session, console: Console, progress: Callable[[int, int, str], None]) -> None:
    """Hand the prompts to the drafter's own search and write what it finds under the target's name."""
    handle = speculation_of(session.model)
    ids = [session.loaded.encode(text, session.config["chat"]) for text in _prompts(session)]
    assert isinstance(handle.drafter, Tunable)
    found = handle.drafter.tune(handle.target, ids, session.generate, progress)
    path = Path(session.config["output"] or "tuned.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {**found, "model": session.loaded.name, "drafter": handle.drafter.name, "versions": _versions()}
    path.write_text(json.dumps({session.loaded.name: entry}, indent=1) + "\n", encoding="utf-8")
    console.print_json(json.dumps(found))
    console.print(f"written to {path}", highlight=False)


def _tune_tree(session: Session, console: Console, progress: Callable[[int, int, str], None]) -> None:
    """Measure, choose, and write the tree with the curves it was chosen from."""
    config = session.config
    plan = Plan(**{name: config[name] for name in _PLAN})
    texts = _prompts(session)
    if config["prompts_file"] is None:
        texts = [*texts, *(question.turns[0] for question in demo())][: max(config["num_prompts"], len(texts))]
    ids = [session.loaded.encode(text, config["chat"]) for text in texts]
    session.without_processors()
    session.fill_pad()
    tuner = TreeTuner(session, ids, plan, progress)
    said = provenance(session.loaded, ["specdec", "tune", *sys.argv[1:]], {}, None, [])
    kept = ("target", "device", "dtype", "attention", "threads", "cpus", "versions", "git", "command", "started")
    made_on = {name: said[name] for name in kept} | {
        "compiled": session.loaded.compile,
        "temperature": config["temperature"],
        "prompts": len(texts),
        "max_new_tokens": config["max_new_tokens"],
        "plan": {name: config[name] for name in _PLAN},
    }
    file = replace(tuner.run(), made_on=made_on)
    path = Path(config["output"] or f"{file.drafter}_tree.yaml").expanduser()
    file.write(path)
    console.print(_table(file))
    if file.plain_is_faster:
        console.print(f"[yellow]plain decoding is faster here than any tree of {file.drafter}[/yellow]: drafter=none")
    console.print(f"written to {path}{_plot(file, path)}", highlight=False, soft_wrap=True)


def _table(file: TreeFile) -> Table:
    target = file.made_on["target"]
    table = Table(title=f"{file.drafter} on {target}: expected by what was measured", title_justify="left")
    names = ("nodes", "levels", "tokens_per_step", "ms_per_step", "tokens_per_second")
    for name in ("tree", *names):
        table.add_column(name.replace("_", " "), justify="left" if name == "tree" else "right")
    for tree, values in file.expected.items():
        table.add_row(tree, *(f"{values[name]:g}" for name in names), style="bold" if tree == "chosen" else None)
    return table


def _plot(file: TreeFile, path: Path) -> str:
    """Draw the curves beside the file; what to say of it."""
    try:
        from specdec.report.tree import draw
    except ImportError:
        return "; pip install specdec-hf[report] draws its curves too"
    picture = path.with_suffix(".png")
    draw(file, picture)
    return f", its curves to {picture}"


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
