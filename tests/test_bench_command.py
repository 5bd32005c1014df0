"""``specdec bench`` as a user types it: every section small, going on, and what goes wrong."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from specdec import cli
from specdec.bench.records import SECTIONS
from specdec.bench.stepping import handle_of
from specdec.commands import _end_to_end

QUICK = ("quick=true", "threads=1", "data=demo")


def bench(*arguments: str) -> int:
    """Run the command in this process; returns its exit code."""
    sys.argv = ["specdec"]
    try:
        cli.main(["bench", *arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _same_arguments_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.setenv("COLUMNS", "200")


def content(folder: Path) -> Any:
    return json.loads((folder / "bench.json").read_text())


def test_every_section(tmp_path: Path) -> None:
    assert bench(*QUICK, f"output={tmp_path}") == 0
    made = content(tmp_path)
    assert list(made["sections"]) == list(SECTIONS)
    assert str(tmp_path.parent) not in (tmp_path / "bench.json").read_text(), "no folders of this machine"
    for row in (*made["sections"]["step"]["rows"], *made["sections"]["growth"]["rows"]):
        assert row["overhead"] == pytest.approx(row["step_ms"]["median"] / row["raw_ms"]["median"] - 1)
        assert row["limit_ms"] > 0
        assert row["over_limit"] == pytest.approx(row["step_ms"]["median"] / row["limit_ms"])
    texts = made["sections"]["end_to_end"]["rows"]
    names = {row["method"] for row in texts if row["batch_size"] == 1}
    assert {"none", "prompt_lookup", "transformers", "transformers_float32"} <= names
    assert {"transformers_prompt_lookup", "transformers_prompt_lookup_float32"} <= names
    assert not any("lookup_" in row["method"] for row in texts if row["batch_size"] == 2)
    assert all(row["bugs"] in (0, None) for row in texts if "bugs" in row)
    tables, page = (tmp_path / "performance_tables.md").read_text(), (tmp_path / "index.html").read_text()
    for title in (
        "Step",
        "End to end, batch size 2",
        "Memory",
        "Who takes what in one step (demo)",
        "GPU: attention alone",
    ):
        assert f"### {title}" in tables
        assert f"<h2>{title}</h2>" in page
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert {"step_demo", "growth_context", "growth_rows", "growth_nodes", "memory", "profile"} <= pictures
    assert page.count("<svg") == len(pictures)
    assert "http" not in page.replace("http://www.w3.org", ""), "needs no network"


def test_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*QUICK, "sections=[growth,gpu]", f"output={tmp_path}")
    assert bench(*arguments) == 0
    before = content(tmp_path)["sections"]
    capsys.readouterr()
    assert bench(*arguments, "small.gpu.nodes=[1,2,8]") == 0
    told = capsys.readouterr().err
    assert "growth (1 of 2): finished before" in told
    assert told.count("finished before") == 1, "the other one's options changed"
    after = content(tmp_path)["sections"]
    assert after["growth"] == before["growth"]
    assert [row["nodes"] for row in after["gpu"]["rows"]] == [1, 2, 8]


MISTAKES = {
    "section": (["sections=[speed]"], "expected sections of step, end_to_end"),
    "no section": (["sections=[]"], "got none"),
    "option": (["sections=[step]", "+step.wide=1"], "step takes no wide; it takes: nodes, context"),
    "drafter": (["sections=[memory]", "small.memory.drafters=[nope]"], "unknown drafter 'nope'; known: aggressive"),
    "questions": (["sections=[end_to_end]", "data=heldout"], "data=heldout needs data.gsm8k=..."),
    "one file": (
        ["sections=[end_to_end]", "small.end_to_end.drafters=[{name:none,label:'a b'},{name:none,label:a_b}]"],
        "alike in file names",
    ),
    "twice": (
        ["sections=[end_to_end]", "small.end_to_end.drafters=[prompt_lookup,prompt_lookup]"],
        "two methods are called 'prompt_lookup'",
    ),
    "mode": (
        ["sections=[end_to_end]", "small.end_to_end.drafters=[{name:none,label:x,compile:1,nope:2}]"],
        "takes no nope",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[mistake]
    assert bench(*QUICK, f"output={tmp_path}", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "bench.json").exists()


def test_a_mode_that_the_target_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: Any, drafter: Any, verifier: Any, modes: Any) -> Any:
        if modes:
            warnings.warn(f"no compiler; the passes of {type(model).__name__} run uncompiled", stacklevel=1)
        return handle_of(model, drafter, verifier, {})

    monkeypatch.setattr(_end_to_end, "handle_of", refused)
    more = "small.end_to_end.drafters=[prompt_lookup,{name:prompt_lookup,label:graphs,compile:true}]"
    small = ("small.end_to_end.limit=1", "small.end_to_end.max_new_tokens=3", "small.end_to_end.batch_size=[1]")
    assert bench(*QUICK, "sections=[end_to_end]", more, *small, f"output={tmp_path}") == 0
    section = content(tmp_path)["sections"]["end_to_end"]
    assert list(section["left_out"]) == ["graphs"]
    assert "run uncompiled" in section["left_out"]["graphs"]
    assert {"none", "prompt_lookup"} <= {row["method"] for row in section["rows"]}
    assert "graphs" not in {row["method"] for row in section["rows"]}
