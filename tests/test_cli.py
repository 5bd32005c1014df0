"""The command line: what a user types, what comes back, and what a mistake is answered with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from safetensors.torch import load_file

from specdec import cli
from specdec.build import build, choices, config_dir
from specdec.commands._session import Session
from specdec.loading import DEMO_FOLDER

PROMPT = "def total(items):"
SMALL = ("threads=1", "max_new_tokens=12")


def specdec(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, wide enough that no line is broken."""
    root = Path(__file__).resolve().parent.parent
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from specdec.cli import main; main()"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"COLUMNS": "200"}, check=False)


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command in this process, which takes a tenth of the time; gives its exit code and what it wrote."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["specdec"])

    def run(*arguments: str) -> Any:
        code: Any = 0
        try:
            cli.main(list(arguments))
        except SystemExit as left:
            code = left.code or 0
        wrote = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=wrote.out, stderr=wrote.err)

    return run


@pytest.mark.parametrize("text", ['def f(x): "it\'s", a\\b', "a\\", "it\\'s {x: 1}, [y] # ${z}", "x", "a=b"])
def test_a_prompt_is_taken_as_typed(text: str) -> None:
    parsed = OverridesParser.create().parse_overrides([cli._override(f"prompt={text}")])[0]
    assert parsed.value() == text


def test_options_of_a_part_need_no_plus() -> None:
    assert cli._override("drafter.num_nodes=3") == "++drafter.num_nodes=3"
    assert cli._override("drafter=none") == "drafter=none"


@pytest.mark.parametrize("command", cli.available())
def test_every_command_has_a_config_that_composes(command: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose(command)
    parts = {"report": {"folders", "out"}, "bench": {"target", "data", "sections"}}
    assert parts.get(command, {"target", "drafter", "verifier"}) <= set(OmegaConf.to_container(config))  # type: ignore[arg-type]


def test_generate_shows_text(tmp_path: Path) -> None:
    """From another folder, leaving nothing behind in it."""
    done = specdec("generate", f"prompt={PROMPT}", *SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mean accepted tokens" in done.stdout
    assert PROMPT in done.stdout
    assert not list(tmp_path.iterdir())


def test_what_a_checkpoint_holds_besides_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = DEMO_FOLDER.parent / "medusa"
    torch.save({**load_file(shipped / "model.safetensors"), "step": 3}, tmp_path / "medusa_lm_head.pt")
    shutil.copy(shipped / "config.json", tmp_path)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        overrides = ["target.device=cpu", "drafter=medusa", f"drafter.path={tmp_path}"]
        session = Session(compose("generate", overrides=overrides))
    session.speculate()
    session.speculate()
    # Progress bars of transformers, which the command line switches off, are no part of this.
    said = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    assert said == [f"medusa: ignored in {tmp_path}: step (no tensor but int)"]


def test_demo_compares_and_is_exact_in_float32(inside: Callable[..., Any]) -> None:
    done = inside("demo", "dtype=float32", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "identical texts: 4 of 4" in done.stdout
    for row in ("tokens per second", "speed-up", "time in verify"):
        assert row in done.stdout


def test_a_picture_needs_no_network(tmp_path: Path, inside: Callable[..., Any]) -> None:
    picture = tmp_path / "shown.svg"
    assert inside("generate", f"prompt={PROMPT}", f"picture={picture}", *SMALL).returncode == 0
    assert 'url("http' not in picture.read_text(encoding="utf-8")
    assert "specdec" in picture.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", choices("acceptance"))
def test_the_command_line_takes_every_rule(name: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("generate", overrides=[f"acceptance={name}"])
    assert build(OmegaConf.to_container(config.acceptance)).name == name  # type: ignore[arg-type]


def test_a_lossy_rule_is_said_to_be_one(inside: Callable[..., Any]) -> None:
    said = "the acceptance rule is lossy by design"
    sampled = ("generate", f"prompt={PROMPT}", "temperature=1", *SMALL)
    assert said in inside(*sampled, "acceptance=typical").stdout
    assert said not in inside(*sampled, "acceptance=traversal").stdout


def test_audit_passes_and_writes_its_rows(tmp_path: Path, inside: Callable[..., Any]) -> None:
    output = tmp_path / "audit.json"
    done = inside("audit", f"output={output}", "drafter=prompt_lookup", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert OmegaConf.load(output).mismatches == 0
    assert OmegaConf.load(output).lossless is True


MISTAKES = {
    "unknown command": (["frobnicate"], "known: audit, bench, demo, distill, evaluate, generate, report"),
    "unknown drafter": (["generate", "prompt=x", "drafter=nope"], "token_recycling"),
    "unknown target": (["generate", "prompt=x", "target=nope"], "demo"),
    "unknown verifier": (["generate", "prompt=x", "verifier=nope"], "tree_attention"),
    "unknown attention": (["generate", "prompt=x", "attention=nope"], "triton"),
    "bad option of an attention": (["generate", "prompt=x", "attention=triton", "attention.splits=0"], "splits >= 1"),
    "unknown option": (["generate", "prompt=x", "drafter.nope=1"], "num_nodes"),
    "unknown key": (["generate", "prompt=x", "nope=1"], "nope"),
    "no prompt": (["generate"], "no prompt"),
    "empty prompt": (["generate", "prompt=", "chat=false"], "no prompt"),
    "too long a prompt": (["generate", f"prompt={'a b ' * 3000}"], "reads at most 2048"),
    "no path": (["generate", "prompt=x", "target=hf"], "target.path=FOLDER_OR_HUB_ID"),
    "no number": (["generate", "prompt=x", "max_new_tokens=abc"], "whole number"),
    "negative temperature": (["generate", "prompt=x", "temperature=-1"], "temperature >= 0"),
    "unknown rule": (["generate", "prompt=x", "acceptance=nope"], "recursive_rejection"),
    "bad constant of a rule": (["generate", "prompt=x", "acceptance=typical", "acceptance.delta=-1"], "delta >= 0"),
    "rule for the other mode": (["generate", "prompt=x", "acceptance=greedy", "temperature=1"], "leave it out"),
    "no such folder": (["generate", "prompt=x", "target=hf", "target.path=./nowhere"], "names no folder"),
    "no new tokens": (["generate", "prompt=x", "max_new_tokens=0"], "max_new_tokens"),
    "sampled audit": (["audit", "temperature=1"], "expected 0"),
    "bad option value": (["generate", "prompt=x", "drafter.num_nodes=81"], "1 to 80"),
    "unknown dtype": (["generate", "prompt=x", "dtype=float99"], "expected auto, float32"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear line, no traceback."""
    arguments, expected = MISTAKES[mistake]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["specdec"])
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code in (1, 2)
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said


def test_one_prompt_goes_before_the_recipes_own(tmp_path: Path, inside: Callable[..., Any]) -> None:
    output = tmp_path / "audit.json"
    assert inside("audit", "prompt='tis odd: [", f"output={output}", *SMALL).returncode == 0
    assert OmegaConf.load(output).rows == 1


def test_help_goes_to_standard_output() -> None:
    done = specdec("--help")
    assert done.returncode == 0
    assert "generate" in done.stdout


def test_the_choices_are_those_of_the_folder() -> None:
    assert choices("drafter") == sorted(path.stem for path in (config_dir() / "drafter").glob("*.yaml"))
