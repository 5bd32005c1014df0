"""Which recorded figures go where. Nothing is computed: rows of summaries are chosen, named and put in order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from specdec.evaluation.records import COLD, STATELESS, WARM, SummaryRow
from specdec.report.charts import PARTS, Bar, Histogram, Line, Panel, Split
from specdec.report.runs import SELECTION, Run

OVERALL, ALL_ROWS, NON_LOOPING = "overall", "all", "non_looping"
_PARTS = ("drafter.", "acceptance", "verifier", "tree")  # overrides that say what a method is
_LONGEST_VARIANT = 40
_KIND_NAMES = {
    "plain": "plain",
    "transformers": "transformers generate",
    "transformers_prompt_lookup": "transformers prompt lookup",
    "transformers_assistant": "transformers assistant",
}


@dataclass(frozen=True)
class Setting:
    """What must agree for two speeds to be in one chart."""

    target: str
    dtype: str
    device: str
    temperature: float
    batch_size: int
    workload: tuple[tuple[str, str], ...] = ()

    def label(self, among: Sequence[Setting]) -> str:
        """Its name, of the parts in which the settings differ."""
        parts = [
            ("target", f"{self.target}"),
            ("dtype", self.dtype),
            ("device", self.device),
            ("temperature", "greedy" if not self.temperature else f"temperature {self.temperature:g}"),
            ("batch_size", f"batch {self.batch_size}"),
        ]
        varying = [text for name, text in parts if len({getattr(other, name) for other in among}) > 1]
        own = dict(self.workload)
        varying += [f"{key.replace('_', ' ')} {own.get(key, '–')}" for key in differing(s.workload for s in among)]
        return ", ".join(varying or [parts[3][1], parts[4][1]])


@dataclass
class Method:
    """One method, in one variant, under one setting; ``rows`` are its summary rows, of all tasks, subsets and states.

    Attributes:
        setting: under which.
        recorded: its name in the records.
        kind: as recorded.
        variant: what tells it from other variants of the same drafter; usually empty.
        run: where it was measured.
        rows: its figures.
    """

    setting: Setting
    recorded: str
    kind: str
    variant: str
    run: Run
    rows: list[SummaryRow]

    @property
    def lossless(self) -> bool:
        """Whether every row says so."""
        return all(row.lossless for row in self.rows)

    @property
    def drafter(self) -> str:
        """Name of the drafter, which may be recorded under another."""
        return self.run.drafter_of(self.recorded)

    @property
    def name(self) -> str:
        """Its name in words, and the variant."""
        name = _KIND_NAMES.get(self.kind, self.recorded)
        return f"{name} {self.variant}" if self.variant else name

    @property
    def label(self) -> str:
        """Its name, lossy rules marked."""
        return self._marked(self.name)

    @property
    def family(self) -> str:
        """Its drafter, likewise."""
        return self._marked(_KIND_NAMES.get(self.kind, self.drafter))

    def _marked(self, name: str) -> str:
        return name if self.lossless else f"{name} (lossy)"

    def row(self, task: str = OVERALL, subset: str | None = None, state: str | None = None) -> SummaryRow | None:
        """The figures of a task; by default of the rows that do not loop, and with what was learnt kept.

        None where there are no such rows: figures of looping rows never stand in for them.
        """
        states = (state,) if state else (WARM, STATELESS, COLD)
        wanted = subset or NON_LOOPING
        found = {row.state: row for row in self.rows if row.task == task and row.subset == wanted and row.rows}
        return next((found[state] for state in states if state in found), None)

    def speedup(self, task: str = OVERALL, subset: str | None = None, state: str | None = None) -> float | None:
        """Speed-up against plain decoding of ``row(...)``."""
        row = self.row(task, subset, state)
        return row.speedup_vs_plain if row else None


class Figures:
    """All figures of a report, by setting.

    Args:
        runs: what was found.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.methods = _methods(self.runs)
        measured = [(run.target, run.dtype, run.device, run.workload) for run in self.runs]
        self.settings = sorted(
            {method.setting for method in self.methods},
            key=lambda s: (measured.index((s.target, s.dtype, s.device, s.workload)), s.temperature, s.batch_size),
        )
        self.drafters = sorted({method.drafter for method in self.methods if method.kind == "drafter"})
        self.colors = {name: index for index, name in enumerate(self.drafters)}

    def color(self, method: Method) -> int | None:
        """The same for a drafter everywhere; None for what is none of ours."""
        return self.colors.get(method.drafter) if method.kind == "drafter" else None

    def of(self, setting: Setting) -> list[Method]:
        """Methods of a setting, each in its fastest variant, fastest first; plain decoding left out."""
        best: dict[tuple[str, str], Method] = {}
        for method in self.all_of(setting):
            best.setdefault((method.kind, method.recorded), method)
        return [method for method in best.values() if method.kind != "plain"]

    def all_of(self, setting: Setting) -> list[Method]:
        """All methods and variants of a setting, fastest first."""
        methods = [method for method in self.methods if method.setting == setting]
        return sorted(methods, key=lambda method: -(method.speedup() or 0.0))

    def tasks(self, setting: Setting) -> list[str]:
        """Task names but for the overall one, in the order of the records."""
        return [task for task in _unique(row.task for m in self.all_of(setting) for row in m.rows) if task != OVERALL]

    def bars(self, setting: Setting, task: str = OVERALL) -> list[Bar]:
        """Speed-ups of a task, longest first."""
        bars = []
        for method in self.of(setting):
            row = method.row(task)
            if row is None or row.speedup_vs_plain is None:
                continue
            all_rows = method.speedup(task, ALL_ROWS)
            cold = method.speedup(task, row.subset, COLD) if row.state == WARM else None
            tokens = row.mean_accepted_tokens
            note = f"{tokens:.2f} tokens per pass" if tokens is not None else ""
            bars.append(Bar(method.label, self.color(method), row.speedup_vs_plain, all_rows, cold, note))
        return sorted(bars, key=lambda bar: -bar.value)

    def panels(self, setting: Setting) -> list[Panel]:
        """Speed-ups of every task that has any."""
        panels = [Panel(task_name(task), self.bars(setting, task)) for task in self.tasks(setting)]
        return [panel for panel in panels if panel.bars]

    def histograms(self, setting: Setting) -> list[Histogram]:
        """Accepted lengths of the drafters."""
        rows = [(method, method.row()) for method in self.of(setting)]
        return [
            Histogram(
                method.label,
                self.color(method),
                {int(length): count for length, count in row.accepted_lengths.items()},
                row.mean_accepted_tokens,
            )
            for method, row in rows
            if row is not None and row.accepted_lengths
        ]

    def depths(self, setting: Setting, conditional: bool) -> list[Line]:
        """Acceptance by depth of the drafters."""
        lines = []
        for method in self.of(setting):
            row = method.row()
            if row is None or not row.acceptance_by_depth:
                continue
            shares = row.conditional_acceptance_by_depth if conditional else row.acceptance_by_depth
            # Beyond the first depth at which nothing was accepted no pass has been.
            reached = [*itertools.takewhile(lambda share: share > 0, row.acceptance_by_depth), 0.0]
            if shares:
                lines.append(Line(method.label, self.color(method), list(enumerate(shares[: len(reached)], start=1))))
        return lines

    def splits(self, setting: Setting) -> list[Split]:
        """Seconds by phase over all rows, plain decoding included, shortest first."""
        plain = [method for method in self.all_of(setting) if method.kind == "plain"][:1]
        splits = []
        for method in [*self.of(setting), *plain]:
            row = method.row(subset=ALL_ROWS)
            if row is not None and any(row.seconds.values()):
                seconds = [row.seconds.get(phase, 0.0) for phase in PARTS]
                splits.append(Split(method.label, self.color(method), seconds))
        return sorted(splits, key=lambda split: sum(split.seconds))

    def by_tree_size(self, setting: Setting) -> list[Line]:
        """Speed-up against nodes per pass, for drafters measured at several sizes."""
        points: dict[tuple[str, int | None], dict[float, float]] = {}
        for method in self.all_of(setting):
            row = method.row()
            if method.kind == "drafter" and row and row.tree_nodes is not None and row.speedup_vs_plain is not None:
                sizes = points.setdefault((method.family, self.color(method)), {})
                sizes.setdefault(round(row.tree_nodes, 1), row.speedup_vs_plain)
        return [Line(*key, sorted(sizes.items())) for key, sizes in points.items() if len(sizes) > 1]

    def by_batch_size(self, setting: Setting) -> list[Line]:
        """Speed-up against batch size, for methods measured at several; other parts as in ``setting``."""
        points: dict[tuple[str, int | None], dict[int, float]] = {}
        for other in self.settings:
            if _but_batch(other) != _but_batch(setting):
                continue
            for method in self.of(other):
                speedup = method.speedup()
                if speedup is not None:
                    points.setdefault((method.family, self.color(method)), {})[other.batch_size] = speedup
        return [Line(*key, sorted(sizes.items())) for key, sizes in points.items() if len(sizes) > 1]

    def variants_shown(self, setting: Setting) -> bool:
        """Whether some drafter has several variants, of which the charts show the fastest."""
        return any(count > 1 for count in Counter((m.kind, m.recorded) for m in self.all_of(setting)).values())


def task_name(task: str) -> str:
    """As shown: words instead of underscores."""
    return task.replace("_", " ")


def differing(workloads: Iterable[tuple[tuple[str, str], ...]]) -> list[str]:
    """Names of what several workloads do not share."""
    distinct = [dict(workload) for workload in dict.fromkeys(workloads)]
    names = _unique(name for workload in distinct for name in workload)
    found = [name for name in names if len({workload.get(name) for workload in distinct}) > 1]
    # Other questions are told by how they were chosen, where that differs.
    return [name for name in found if name != "questions" or not SELECTION.intersection(found)]


def _but_batch(setting: Setting) -> Setting:
    return replace(setting, batch_size=1)


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _methods(runs: Sequence[Run]) -> list[Method]:
    """Rows put together by setting, method and job; what is no drafter of ours is kept once, of the first job."""
    grouped: dict[tuple[Setting, str, str], dict[tuple[int, str | None], list[SummaryRow]]] = {}
    for index, run in enumerate(runs):
        for row in run.summary.rows:
            setting = Setting(run.target, run.dtype, run.device, row.temperature, row.batch_size, run.workload)
            jobs = grouped.setdefault((setting, row.drafter, row.method_kind), {})
            jobs.setdefault((index, row.job), []).append(row)
    methods = []
    for (setting, name, kind), jobs in grouped.items():
        chosen = list(jobs)[:1] if kind != "drafter" else list(jobs)
        variants = _variant_names(
            [runs[job[0]].overrides or jobs[job][0].overrides or [] for job in chosen],
            [job[1] or runs[job[0]].folder.name for job in chosen],
        )
        methods += [
            Method(setting, name, kind, variant, runs[job[0]], jobs[job])
            for job, variant in zip(chosen, variants, strict=True)
        ]
    return methods


def _variant_names(overrides: Sequence[Sequence[str]], folders: Sequence[str]) -> list[str]:
    """What tells jobs of one drafter apart: differing overrides, else their folders."""
    if len(folders) == 1:
        return [""]
    common = set.intersection(*map(set, overrides))
    names = []
    for texts in overrides:
        own = [text.partition("=") for text in texts if text not in common and text.startswith(_PARTS)]
        names.append(" ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in own))
    fit = len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_VARIANT
    return names if fit else [f"[{folder}]" for folder in folders]
