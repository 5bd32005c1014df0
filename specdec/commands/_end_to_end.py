"""The benchmark's section ``end_to_end``: an evaluation whose methods differ in dtype and in how passes are run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from specdec.bench.stepping import handle_of, listening
from specdec.bench.texts import GENERATE, PROMPT_LOOKUP, baseline, figures
from specdec.build import build_drafter, build_verifier, choices, load
from specdec.commands._session import Session
from specdec.evaluation.data import Question, Selection, fingerprint
from specdec.evaluation.methods import Batch, Method, Speculating
from specdec.evaluation.progress import Progress
from specdec.evaluation.records import WARM, file_part
from specdec.evaluation.runner import Plan, Runner, Setting
from specdec.evaluation.store import RunFolder
from specdec.evaluation.summary import summarise

_NAMES = ("name", "label")
_MODES = ("compile", "tree", "attention", "cuda_graphs")  # of specdec.speculate, which refuses those it does not have


@dataclass(frozen=True)
class TextOptions:
    """Of the section ``end_to_end``; the words are those of ``specdec evaluate``.

    Attributes:
        baseline_dtype: transformers' own methods are measured in this dtype as well.
        prompt_lookup_num_tokens: of transformers' prompt lookup.
        limit: questions.
        max_new_tokens: per question.
        batch_size: one pass over the questions each.
        repeats: of every question.
        warmup: untimed calls per method.
        drafters: names, or names with options, modes and a label.
        more: likewise.
        questions_sha256: of the questions, as found.
    """

    baseline_dtype: str
    prompt_lookup_num_tokens: int
    limit: int
    max_new_tokens: int
    batch_size: Sequence[int]
    repeats: int
    warmup: int
    drafters: Sequence[str | Mapping[str, Any]]
    more: Sequence[str | Mapping[str, Any]]
    questions_sha256: str = ""


def chosen(questions: Sequence[Question], limit: int) -> tuple[list[Question], str]:
    """The questions to ask, at random but always the same, and their fingerprint."""
    selected = Selection(limit=limit, sample=True)(list(questions))
    return selected, fingerprint(selected)


def end_to_end(
    config: DictConfig, session: Session, questions: Sequence[Question], options: TextOptions, output: Path
) -> dict[str, Any]:
    """Ask all questions of all methods, going on where an earlier start stopped.

    Raises:
        ValueError: a wrong option of a drafter, or a label used twice.
        RuntimeError: questions failed.
    """
    folder = RunFolder(_folder(output, options))
    folder.path.mkdir(parents=True, exist_ok=True)
    session.without_processors()
    session.fill_pad()
    methods = _Methods(config, session, options)
    settings = [Setting(0.0, size) for size in options.batch_size]
    plan = Plan(settings, options.max_new_tokens, {}, config.chat, options.repeats, options.warmup, config.seed)
    with Progress(Console(stderr=True)) as progress:
        runner = Runner(session.loaded, methods, plan, folder, progress)
        runner.run(questions)
    if runner.failures:
        raise RuntimeError(f"{runner.failures} questions failed, see {folder.path / 'failed'}")
    rows = figures(summarise(folder.path, {}), options.baseline_dtype)
    return {"questions": len(questions), "left_out": methods.left_out, "rows": rows}


def _folder(output: Path, options: TextOptions) -> Path:
    """A folder of its own for every set of options: answers under other options are another run's."""
    said = json.dumps(options.__dict__, sort_keys=True, default=str)
    return output / "end_to_end" / hashlib.sha256(said.encode()).hexdigest()[:12]


def _is_mode(key: str, value: Any) -> bool:
    """Whether an option is for ``specdec.speculate``: a tree that is but a name may be one that the drafter knows."""
    return key != "tree" or not isinstance(value, str) or bool(Path(value).suffix) or value in choices("tree")


class _Methods:
    """Who is measured under a setting: the plain loop, transformers in both dtypes, drafters in their modes.

    Attributes:
        left_out: drafter -> why the target does not run in its modes, in the words of the warning that said so.
    """

    def __init__(self, config: DictConfig, session: Session, options: TextOptions) -> None:
        self.session, self.batch_size = session, options.batch_size
        model, eos = session.model, session.loaded.eos_ids
        other = Session(OmegaConf.merge(config, {"dtype": options.baseline_dtype}))  # type: ignore[arg-type]
        other.without_processors()
        other.fill_pad()
        lookup = {"prompt_lookup_num_tokens": options.prompt_lookup_num_tokens}
        self._plain = self._speculating("none", "none", {}, "plain")
        # The target's own dtype last: of several of one kind the last is what the plain loop's texts are held to.
        self._theirs = [
            baseline(name, dtype, target, eos, dict(extra))
            for name, extra in ((GENERATE, {}), (PROMPT_LOOKUP, lookup))
            for dtype, target in ((options.baseline_dtype, other.model), ("", model))
        ]
        self.left_out = dict[str, str]()
        entries = [self._entry(entry) for entry in [*options.drafters, *options.more]]
        self._drafters = [method for method in entries if method.name not in self.left_out]
        names = [method.name for method in (self._plain, *entries)]
        parts = [file_part(name) for name in names]
        twice = [name for name, part in zip(names, parts, strict=True) if parts.count(part) > 1]
        if twice:
            raise ValueError(f"two methods are called {twice[-1]!r}, or alike in file names; give one of them a label")

    def __call__(self, setting: Setting) -> list[Method]:
        """The plain loop first, since its answers are what others are compared with."""
        theirs = [method for method in self._theirs if setting.batch_size == 1 or not method.extra]
        return [self._plain, *theirs, *self._drafters]

    def _entry(self, entry: str | Mapping[str, Any]) -> Speculating:
        given = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = given.get("name")
        if not isinstance(name, str):
            raise ValueError(f"expected drafters to be names or {{name: ..., option: ...}}, got {entry!r}")
        modes = {key: given[key] for key in _MODES if key in given and _is_mode(key, given[key])}
        rest = {key: value for key, value in given.items() if key not in (*_NAMES, *modes)}
        ids = self.session.loaded.encode("one two three one two three")
        batches = [ids.repeat(rows, 1) for rows in sorted({min(self.batch_size), max(self.batch_size)})]
        with listening(self.session.model) as refusals:
            method = self._speculating(str(given.get("label", name)), load("drafter", name, rest), modes)
            for some in batches:  # a single row has graphs of its own
                method.warm_up(Batch(some, torch.ones_like(some)), {"max_new_tokens": 8, "do_sample": False})
        if refusals:
            self.left_out[method.name] = refusals[0]
        if method.stateful:
            method.state = WARM
        method.forget()
        return method

    def _speculating(
        self, name: str, drafter: str | Mapping[str, Any], modes: Mapping[str, Any], kind: str = "drafter"
    ) -> Speculating:
        handle = handle_of(self.session.model, build_drafter(drafter), build_verifier("tree_attention"), modes)
        return Speculating(name, self.session.model, handle, self.session.loaded.eos_ids, kind)
