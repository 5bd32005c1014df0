"""How near a step is to this machine's limit: bench.json, tables and plots; finished sections are kept."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from specdec.bench.gpu import GpuOptions, gpu
from specdec.bench.records import BENCH, SECTIONS, Book
from specdec.bench.sections import (
    GrowthOptions,
    MemoryOptions,
    ProfileOptions,
    StepOptions,
    growth,
    memory,
    profiles,
    step,
)
from specdec.bench.subjects import Subject, random_llama
from specdec.build import build, choices
from specdec.commands._data import questions_of
from specdec.commands._end_to_end import TextOptions, chosen, end_to_end
from specdec.commands._session import Session
from specdec.evaluation.data import Question, demo
from specdec.evaluation.provenance import now, provenance
from specdec.training.progress import Bar

INTERRUPTED = 130
_NEEDED = ("jinja2", "matplotlib")
_ATTENTION = "verifiers.kernels.bench.attention_table"
Options = TypeVar("Options")


@dataclass(frozen=True)
class Section:
    """One section: the options that it is known by, how many measurements it takes (0: it has a progress of its own),
    and what measures.
    """

    options: dict[str, Any]
    count: int
    measure: Callable[[Bar], dict[str, Any]]


def run(config: DictConfig) -> int:
    """Measure the sections that are not finished; exit code 130 where it was interrupted.

    Raises:
        ImportError: the extra is not installed.
        ValueError: an unknown section or option, a folder of another machine.
    """
    for library in _NEEDED:
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            raise ImportError(f"the benchmark needs {library}: pip install specdec-hf[report]") from error
    from specdec.bench.page import write_page

    console, plan = Console(stderr=True), Plan(config)
    sections, folder = plan.sections(), _folder(config)
    if config.overwrite:
        (folder / BENCH).unlink(missing_ok=True)
    session = plan.session
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    command = ["specdec", "bench", *sys.argv[1:]]
    book = Book(folder, provenance(session.loaded, command, {"seed": config.seed}, None, overrides))
    interrupted = False
    for number, (name, section) in enumerate(sections.items(), start=1):
        title = f"{name} ({number} of {len(sections)})"
        if book.finished(name, section.options):
            console.print(f"{title}: finished before", highlight=False)
            continue
        started = now()
        try:
            with Bar(console, title, max(section.count, 1)) as bar, _Told(bar):
                figures = section.measure(bar)
        except KeyboardInterrupt:
            interrupted = True
            break
        book.add(name, section.options, {**figures, "started": started, "finished": now()})
    if book.content["sections"]:
        write_page(folder, book.content)
        console.print(f"written to {folder}", highlight=False, soft_wrap=True)
    if interrupted:
        console.print(f"interrupted; the same command with output={folder} goes on from here", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


class Plan:
    """What a config asks for; nothing is loaded before it is needed, and everything is checked before that.

    Args:
        config: of the command.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        self.settings: dict[str, Any] = {str(key): value for key, value in plain.items()}
        if config.quick:
            self.settings = _laid_over(self.settings, self.settings["small"])

    def sections(self) -> dict[str, Section]:
        """The sections asked for, in the order of ``SECTIONS``.

        Raises:
            ValueError: an unknown section or option; no questions for ``end_to_end``.
        """
        asked = self.settings["sections"]
        unknown = [name for name in asked if name not in SECTIONS]
        if unknown or not asked:
            raise ValueError(f"expected sections of {', '.join(SECTIONS)}; got {unknown[0] if unknown else 'none'}")
        return {name: getattr(self, f"_{name}")() for name in SECTIONS if name in asked}

    @cached_property
    def session(self) -> Session:
        """With the target."""
        return Session(self.config)

    @cached_property
    def target(self) -> Subject:
        """The target."""
        return Subject(self.session.loaded.name, self.session.model)

    @cached_property
    def llama(self) -> Subject:
        """The Llama of random weights, on the target's device."""
        known = self.settings["llama"]
        model = random_llama(known["shape"], known["dtype"], str(self.target.device), self.settings["seed"])
        return Subject(f"llama-{Subject('', model).num_parameters / 1e6:.3g}m", model)

    def _step(self) -> Section:
        options = self._options("step", StepOptions)
        return self._section("step", options, 2 * len(options.nodes), lambda bar: step(self._both, options, bar))

    def _growth(self) -> Section:
        options = self._options("growth", GrowthOptions)
        count = len(options.points())
        return self._section("growth", options, count, lambda bar: growth([self.llama], options, bar))

    def _profile(self) -> Section:
        options = self._options("profile", ProfileOptions)
        count = 2 * len(options.points())
        return self._section("profile", options, count, lambda bar: profiles(self._both, options, bar))

    def _memory(self) -> Section:
        every = choices("drafter")
        if unknown := [name for name in self.settings["memory"]["drafters"] or [] if name not in every]:
            raise ValueError(f"unknown drafter {unknown[0]!r}; known: {', '.join(every)}")
        options = self._options("memory", MemoryOptions, drafters=self.settings["memory"]["drafters"] or every)
        return self._section(
            "memory", options, options.count(), lambda bar: memory(self.target, self._prompt(options), options, bar)
        )

    def _gpu(self) -> Section:
        options = self._options("gpu", GpuOptions)
        seed = self.settings["seed"]
        return self._section("gpu", options, options.count(), lambda bar: gpu(options, _attention, bar, seed))

    def _end_to_end(self) -> Section:
        selected, known = chosen(self._questions(), self.settings["end_to_end"]["limit"])
        options = self._options("end_to_end", TextOptions, questions_sha256=known)

        def measure(bar: Bar) -> dict[str, Any]:  # noqa: ARG001 - the evaluation shows a table of its own
            return end_to_end(self.config, self.session, selected, options, _folder(self.config))

        return self._section("end_to_end", options, 0, measure)

    def _questions(self) -> list[Question]:
        return questions_of(self.config)

    @property
    def _both(self) -> list[Subject]:
        return [self.target, self.llama]

    def _prompt(self, options: MemoryOptions) -> Tensor:
        """Text of the demo's questions, ids ``[1, W]``."""
        text = "\n".join(question.turns[0] for question in demo())
        return self.session.loaded.encode(text, chat=False)[:, : options.context]

    def _options(self, name: str, kind: type[Options], **known: Any) -> Options:
        given = {**self.settings[name], **known}
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        if wrong := [key for key in given if key not in names]:
            raise ValueError(f"{name} takes no {', '.join(wrong)}; it takes: {', '.join(names)}")
        return kind(**given)

    def _section(self, name: str, options: Any, count: int, measure: Callable[[Bar], dict[str, Any]]) -> Section:
        """What figures depend on: the section's own options, and what the models are."""
        known = {"target": self.settings["target"], "dtype": self.settings["dtype"], "seed": self.settings["seed"]}
        if name in ("step", "growth", "profile"):
            known["llama"] = self.settings["llama"]
        return Section({**asdict(options), **known}, count, measure)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _laid_over(below[key], above[key]) for key in below if isinstance(above.get(key), Mapping)}
    return {**below, **above, **both}


def _attention() -> Any:
    """Attention alone, from the kernels' own benchmark.

    Raises:
        ImportError: this build has none.
    """
    return build({"_target_": _ATTENTION, "device": "cuda"})


def _folder(config: DictConfig) -> Path:
    return Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else config.output)


class _Told(logging.Handler):
    """Within the block what specdec logs (graphs being compiled) goes above the bar."""

    def __init__(self, bar: Bar) -> None:
        super().__init__(logging.INFO)
        self.bar, self.logger = bar, logging.getLogger("specdec")
        self.before = self.logger.level, self.logger.disabled

    def emit(self, record: logging.LogRecord) -> None:
        self.bar.note(record.getMessage())

    def __enter__(self) -> None:
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)
        self.logger.disabled = False  # which Hydra makes of all that it does not configure

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before[0])
        self.logger.disabled = self.before[1]
