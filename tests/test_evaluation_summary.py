"""From records made by hand to figures: which texts count, speed-ups, states, shards, joined jobs, tables."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from specdec.evaluation import records, summary, tables
from specdec.evaluation.records import Answer, Choice, StepTrace, Summary, SummaryRow, Variant

PLAIN, THEIRS = Variant("none", "plain"), Variant("transformers", "transformers")
OURS = Variant("ours", "drafter", "warm")


def choice(seconds: list[float], accept: list[list[int]], index: int = 0, looping: bool = False) -> Choice:
    """A repeat: per turn its seconds and the tokens of each verification; the prefill adds one token and 0.1 s."""
    turns = len(seconds)
    return Choice(
        index=index,
        turns=["x"] * turns,
        decoding_steps=[len(steps) for steps in accept],
        new_tokens=[1 + sum(steps) for steps in accept],
        wall_time=seconds,
        accept_lengths=[length for steps in accept for length in steps],
        prefill_time=[0.1] * turns,
        ids=[[7] * (1 + sum(steps)) for steps in accept],
        tokens=[[("x", "target")] * (1 + sum(steps)) for steps in accept],
        looping=[looping] * turns,
        identical=["identical"] * turns,
    )


def write(
    folder: Path,
    variant: Variant,
    identity: int,
    *choices: Choice,
    category: str = "qa",
    shard: str = "",
    **more: object,
) -> None:
    """One line of answers (of failures, where ``error`` or ``aside`` says so), with the traces of a drafter."""
    aside = bool(more.pop("aside", False)) or "error" in more
    settings: dict[str, Any] = {"method": variant.method, "method_kind": variant.kind, "state": variant.state}
    settings |= {"temperature": variant.temperature, "batch_size": variant.batch_size, "lossless": variant.lossless}
    answer = Answer(identity, category, "m", list(choices), **settings, **more)  # type: ignore[arg-type]
    name = f"{variant.stem}{shard}.jsonl"
    records.append_lines(folder / ("failed" if aside else "answers") / name, [answer])
    if variant.kind not in ("drafter", "plain"):
        return
    for taken in choices:
        start = 0
        for turn, steps in enumerate(taken.decoding_steps):
            accepted = [length - 1 for length in taken.accept_lengths[start : start + steps]]
            start += steps
            drafter = variant.kind == "drafter"
            trace = StepTrace(identity, turn, taken.index, accepted=accepted)
            trace.offered = [[3, 2] if drafter else [] for _ in accepted]
            trace.drafted, trace.ranks = [5 * drafter] * steps, [[0] * length for length in accepted]
            trace.computed = [6 if drafter else 1] * steps
            seconds = {"draft": [0.01 * drafter] * steps, "verify": [0.02] * steps, "commit": [0.01] * steps}
            trace.seconds = {"prefill": 0.1, **seconds}
            records.append_lines(folder / "steps" / name, [trace])


def row(made: Summary, drafter: str, task: str = "overall", subset: str = "all", **more: object) -> SummaryRow:
    (found,) = (
        r
        for r in made.rows
        if (r.drafter, r.task, r.subset) == (drafter, task, subset) and all(getattr(r, k) == v for k, v in more.items())
    )
    return found


def test_speedups_and_acceptance(tmp_path: Path) -> None:
    write(tmp_path, PLAIN, 1, choice([2.0], [[1, 1, 1]]))
    write(tmp_path, THEIRS, 1, choice([1.6], [[1, 1, 1]]))
    write(tmp_path, OURS, 1, choice([0.8], [[2, 1]]))
    made = summary.summarise(tmp_path, {"seed": 0})
    ours, plain, theirs = (row(made, name) for name in ("ours", "none", "transformers"))
    assert made.provenance == {"seed": 0}
    assert (ours.tokens_per_second, plain.tokens_per_second) == (5.0, 2.0)
    assert ours.speedup_vs_plain == pytest.approx(2.5)
    assert ours.speedup_vs_transformers == pytest.approx(2.0)
    assert ours.decode_tokens_per_second == pytest.approx(3 / 0.7)
    assert ours.mean_accepted_tokens == 1.5
    assert (plain.mean_accepted_tokens, theirs.mean_accepted_tokens) == (1.0, 1.0)
    assert ours.acceptance_by_depth == [0.5, 0.0]
    assert ours.conditional_acceptance_by_depth == [0.5, 0.0]
    assert ours.accepted_lengths == {"0": 1, "1": 1}
    assert ours.draft_share == pytest.approx(0.25)
    assert (ours.tree_nodes, plain.tree_nodes, theirs.tree_nodes) == (6, 1, None)
    assert ours.seconds == pytest.approx({"prefill": 0.1, "draft": 0.02, "verify": 0.04, "commit": 0.02, "other": 0.62})
    assert theirs.seconds == pytest.approx({"prefill": 0.1, "decode": 1.5})
    assert (ours.identical_rows, ours.near_ties, ours.bugs, ours.rows) == (1, 0, 0, 1)
    assert (ours.lossless, ours.state, ours.method_kind) == (True, "warm", "drafter")


def test_our_figures_are_those_of_spec_benchs_definitions(tmp_path: Path) -> None:
    """Mean accepted tokens as its speed.py defines them: the mean of all accept_lengths, pooled."""
    for variant, accepts in ((PLAIN, [[1] * 5, [1] * 9]), (OURS, [[3, 2], [1, 4, 2, 2]])):
        for identity in (1, 2):
            write(tmp_path, variant, identity, choice([1.0, 2.0], accepts))
    made = summary.summarise(tmp_path, {})
    for variant in (PLAIN, OURS):
        lines = (tmp_path / "answers" / f"{variant.stem}.jsonl").read_text().splitlines()
        first = [json.loads(line)["choices"][0] for line in lines]
        pooled = [length for part in first for length in part["accept_lengths"]]
        assert row(made, variant.method).mean_accepted_tokens == pytest.approx(statistics.mean(pooled))
        # Theirs is a mean of rates, ours a rate of sums; texts of equal length agree.
        rate = statistics.mean(sum(part["new_tokens"]) / sum(part["wall_time"]) for part in first)
        assert row(made, variant.method).tokens_per_second == pytest.approx(rate)


def test_a_failed_question_counts_for_nobody(tmp_path: Path) -> None:
    for variant in (PLAIN, OURS):
        write(tmp_path, variant, 1, choice([1.0], [[1]]))
    write(tmp_path, PLAIN, 2, choice([100.0], [[1]]), aside=True)
    write(tmp_path, OURS, 2, error="Traceback ...", category="code")
    made = summary.summarise(tmp_path, {})
    assert (row(made, "none").rows, row(made, "ours").rows) == (1, 1)
    assert row(made, "none").tokens_per_second == 2.0
    assert (row(made, "none").failed, row(made, "ours").failed) == (0, 1)
    assert (row(made, "ours", "code").failed, row(made, "ours", "code").rows) == (1, 0)
    assert row(made, "ours", "code").speedup_vs_plain is None


def test_what_only_some_have_finished_is_left_out(tmp_path: Path) -> None:
    """An interrupted run, read as it is."""
    for identity in (1, 2):
        write(tmp_path, PLAIN, identity, choice([1.0], [[1]]))
    write(tmp_path, OURS, 1, choice([1.0], [[1]]))
    made = summary.summarise(tmp_path, {})
    assert (row(made, "none").rows, row(made, "ours").rows) == (1, 1)


def test_looping_texts_are_told_by_the_plain_run(tmp_path: Path) -> None:
    for identity, loops in ((1, False), (2, True)):
        write(tmp_path, PLAIN, identity, choice([1.0], [[1, 1]], looping=loops))
        write(tmp_path, OURS, identity, choice([0.5], [[1, 1] if identity == 1 else [2]], looping=False))
    made = summary.summarise(tmp_path, {})
    assert row(made, "ours").rows == 2
    assert row(made, "ours").looping_share == 0.5
    calm = row(made, "ours", subset="non_looping")
    assert (calm.rows, calm.mean_accepted_tokens) == (1, 1.0)
    assert row(made, "ours").mean_accepted_tokens == pytest.approx(4 / 3)


def test_tasks_turns_and_skips(tmp_path: Path) -> None:
    for variant in (PLAIN, OURS):
        write(tmp_path, variant, 1, choice([1.0, 3.0], [[1], [1]]), category="writing")
        write(tmp_path, variant, 2, choice([2.0], [[1]]), category="qa", skipped=["turn 2: too long"])
        write(tmp_path, variant, 3, category="rag", skipped=["turn 1: too long"], aside=True)
    made = summary.summarise(tmp_path, {})
    assert [r.task for r in made.rows if r.drafter == "ours" and r.subset == "all"] == [
        "overall",
        "writing",
        "qa",
        "rag",
    ]
    assert row(made, "ours", "writing").rows == 2, "one text per turn"
    assert row(made, "ours").wall_seconds == 6.0
    assert (row(made, "ours").skipped, row(made, "ours", "rag").skipped, row(made, "ours", "rag").rows) == (2, 1, 0)


def test_the_median_repeat_stands_for_a_question(tmp_path: Path) -> None:
    repeats = [choice([seconds], [[1]], index) for index, seconds in enumerate((9.0, 1.0, 2.0))]
    write(tmp_path, PLAIN, 1, *repeats)
    assert row(summary.summarise(tmp_path, {}), "none").tokens_per_second == 1.0


def test_settings_and_states_have_rows_of_their_own(tmp_path: Path) -> None:
    for temperature, seconds in ((0.0, 1.0), (0.7, 4.0)):
        write(tmp_path, Variant("none", "plain", temperature=temperature), 1, choice([seconds], [[1]]))
        for state in ("warm", "cold"):
            variant = Variant("ours", "drafter", state, temperature, lossless=False)
            write(tmp_path, variant, 1, choice([seconds / (2 if state == "warm" else 1)], [[1]]))
    made = summary.summarise(tmp_path, {})
    assert [(r.temperature, r.drafter, r.state) for r in made.rows if r.task == "overall" and r.subset == "all"] == [
        (temperature, *method)
        for temperature in (0.0, 0.7)
        for method in (("none", "all"), ("ours", "warm"), ("ours", "cold"))
    ]
    assert row(made, "ours", state="warm", temperature=0.7).speedup_vs_plain == 2.0
    assert row(made, "ours", state="cold", temperature=0.7).speedup_vs_plain == 1.0
    assert not row(made, "ours", state="cold", temperature=0.0).lossless


def test_shards_merge(tmp_path: Path) -> None:
    for variant in (PLAIN, OURS):
        for identity in (1, 2):
            write(tmp_path, variant, identity, choice([1.0], [[1]]), shard=f".shard{identity}of2")
    assert row(summary.summarise(tmp_path, {}), "ours").rows == 2


def test_without_a_plain_run(tmp_path: Path) -> None:
    write(tmp_path, OURS, 1, choice([1.0], [[2]]))
    made = row(summary.summarise(tmp_path, {}), "ours")
    assert (made.speedup_vs_plain, made.speedup_vs_transformers) == (None, None)
    assert made.mean_accepted_tokens == 2.0


def test_jobs_are_joined(tmp_path: Path) -> None:
    for job, nodes in (("0", 8), ("1", 16), ("10", 32)):
        provenance = {"overrides": [f"drafter.num_nodes={nodes}", "limit=3"]}
        rows = [SummaryRow("x", "overall", rows=nodes)]
        records.replace_text(tmp_path / job / "summary.json", records.summary_json(Summary(provenance, rows)))
    made = summary.join(tmp_path)
    assert [(r.job, r.rows, r.overrides) for r in made.rows] == [
        (job, nodes, [f"drafter.num_nodes={nodes}", "limit=3"]) for job, nodes in (("0", 8), ("1", 16), ("10", 32))
    ]
    assert set(made.provenance["jobs"]) == {"0", "1", "10"}
    text = tables.to_markdown(made)
    assert "job 1 (drafter.num_nodes=16)" in text
    assert "limit=3" not in text, "what all jobs share is not repeated"
    with pytest.raises(ValueError, match="no job in"):
        summary.join(tmp_path / "0")


def test_processes_that_differ_are_told(tmp_path: Path) -> None:
    for number, (sha, asked) in enumerate((("a", 2), ("b", 1), ("c", 0))):
        said = {"started": f"{number}", "git": {"sha": sha, "dirty": False}, "threads": 2, "asked": asked}
        records.replace_text(tmp_path / "processes" / f"{number}.json", json.dumps(said))
    known = summary.provenance_of(tmp_path)
    assert (known["started"], known["git"]["sha"], known["mixed"]) == ("1", "b", ["git"])
    assert [words["git"]["sha"] for words in known["processes"]] == ["a", "b", "c"]
    write(tmp_path, PLAIN, 1, choice([2.0], [[1]]))
    assert "differ in git**" in tables.to_markdown(summary.summarise(tmp_path, known))
    assert "differ in" not in tables.to_markdown(summary.summarise(tmp_path, {}))


def test_the_metric_of_a_sweep(tmp_path: Path) -> None:
    write(tmp_path, PLAIN, 1, choice([2.0], [[1]]))
    for state, seconds in (("cold", 2.0), ("warm", 1.0)):
        write(tmp_path, Variant("ours", "drafter", state), 1, choice([seconds], [[1]]))
    made = summary.summarise(tmp_path, {})
    assert summary.best(made, "speedup_vs_plain", "ours") == 2.0
    assert summary.best(made, "mean_accepted_tokens", "nobody") is None
    with pytest.raises(ValueError, match="expected metric to be a number of the summary"):
        summary.best(made, "seconds", "ours")


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for identity, loops in ((1, False), (2, True)):
        write(tmp_path, PLAIN, identity, choice([1.0], [[1]], looping=loops), category="qa" if loops else "rag")
        lossy = Variant("risky", "drafter", "cold", lossless=False)
        write(tmp_path, lossy, identity, choice([0.5 * identity], [[1]]), category="qa" if loops else "rag")
    made = summary.summarise(tmp_path, {})
    text = tables.to_markdown(made)
    assert "| risky (cold) **lossy** | 1.00 (1.00) | 4 (3) | 2.00 (1.33) |" in text, (
        "non-looping first, all in brackets"
    )
    assert "50 % of the texts end in a loop" in text
    assert "| method | overall | rag | qa |" in text
    cells = list(csv.DictReader(io.StringIO(tables.to_csv(made))))
    assert len(cells) == len(made.rows)
    assert json.loads(cells[0]["accepted_lengths"]) == {"0": 2}
    assert "job" not in cells[0]
    tables.write_summary(tmp_path, made)
    assert records.read_summary(tmp_path / "summary.json") == made
    tables.show(made)
    shown = capsys.readouterr().out
    assert "risky (cold) lossy" in shown
    assert "2.00 (1.33)" in shown
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True)
    monkeypatch.setattr(tables, "Console", lambda: terminal)
    tables.show(made)
    narrow = Text.from_ansi(terminal.file.getvalue()).plain  # type: ignore[attr-defined]
    assert "(1.33)" in narrow
    assert "2/0/0" in narrow
    assert max(map(len, narrow.splitlines())) <= 80
