"""``specdec evaluate`` as a user types it: recipes, sweeps, resuming, shards, what goes wrong and how it is said."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from specdec import cli
from specdec.build import build, choices, config_dir
from specdec.evaluation import records
from specdec.evaluation.methods import Speculating
from specdec.evaluation.records import RunRecords, Summary

SMALL = ("threads=1", "limit=1", "max_new_tokens=4", "warmup=0", "drafter=prompt_lookup")


def evaluate(*arguments: str) -> int:
    """Run the command in this process; returns its exit code."""
    sys.argv = ["specdec"]
    try:
        cli.main(["evaluate", *arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _same_arguments_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.setenv("COLUMNS", "200")


def summary(folder: Path) -> Summary:
    return records.read_summary(folder / "summary.json")


def drafters(made: Summary) -> list[tuple[str, str]]:
    return [(row.drafter, row.state) for row in made.rows if row.task == "overall" and row.subset == "all"]


def test_the_smoke_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    assert evaluate("recipe=smoke", f"output={tmp_path}") == 0
    assert time.process_time() - started < 120, "CPU seconds on two cores: under a minute"
    made = summary(tmp_path)
    assert drafters(made) == [
        ("none", "all"),
        ("transformers", "all"),
        ("transformers_prompt_lookup", "all"),
        ("prompt_lookup", "all"),
        ("token_recycling", "warm"),
        ("token_recycling", "cold"),
    ]
    for row in made.rows:
        assert row.rows == (4 if row.task == "overall" else 2) or row.subset == "non_looping"
        assert row.bugs in (0, None)
        assert row.speedup_vs_plain and row.speedup_vs_transformers and row.tokens_per_second or not row.rows
    assert {row.task for row in made.rows} == {"overall", "math", "code"}
    known = made.provenance
    assert known["command"].startswith("specdec evaluate recipe=smoke")
    assert known["config"]["max_new_tokens"] == 24
    assert {"python", "torch", "transformers", "specdec"} <= set(known["versions"])
    assert known["dtype"] == "bfloat16"
    assert known["threads"] >= 1
    assert known["device"]
    assert known["seed"] == 0
    assert set(known["git"] or {"sha": "", "dirty": True}) == {"sha", "dirty"}
    shown = capsys.readouterr()
    assert "token_recycling (warm)" in shown.out
    assert f"written to {tmp_path}" in shown.err
    assert "token_recycling (warm)" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "summary.csv").read_text().startswith("drafter,task,temperature,batch_size,")
    assert OmegaConf.load(tmp_path / "config.yaml").drafters == ["prompt_lookup", "token_recycling"]


def test_a_run_goes_on_and_another_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*SMALL, f"output={tmp_path}") == 0
    before = (tmp_path / "answers" / "none.jsonl").read_text()
    assert evaluate(*SMALL, f"output={tmp_path}") == 0
    assert "1 of them finished before" in capsys.readouterr().err
    assert (tmp_path / "answers" / "none.jsonl").read_text() == before
    known = summary(tmp_path).provenance
    assert [words["asked"] for words in known["processes"]] == [1, 0]
    assert known["started"] == known["processes"][0]["started"], "the one that made the figures speaks"
    assert "mixed" not in known
    assert evaluate(*SMALL, f"output={tmp_path}", "max_new_tokens=5") == 2
    assert "another run (max_new_tokens: 4 -> 5)" in capsys.readouterr().err
    assert evaluate(*SMALL, f"output={tmp_path}", "max_new_tokens=5", "overwrite=true") == 0
    assert summary(tmp_path).rows[0].new_tokens == 5


def test_shards_of_one_folder(tmp_path: Path) -> None:
    for shard in ("1/2", "2/2"):
        assert evaluate(*SMALL, "limit=3", f"shard={shard}", f"output={tmp_path}") == 0
    made = summary(tmp_path)
    assert {row.rows for row in made.rows if row.task == "overall" and row.subset == "all"} == {3}
    assert [words["shard"] for words in made.provenance["processes"]] == ["1/2", "2/2"]
    assert {path.name for path in (tmp_path / "answers").glob("none*")} == {
        "none.shard1of2.jsonl",
        "none.shard2of2.jsonl",
    }


@pytest.mark.parametrize("launcher", [None, pytest.param("joblib", marks=pytest.mark.slow)])
def test_a_multirun_is_joined(launcher: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = [] if launcher is None else [f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=2"]
    sweep = ["-m", *SMALL[:-1], "drafter=prompt_lookup,none", f"output={tmp_path}", *how]
    assert evaluate(*sweep) == 0
    made = summary(tmp_path)
    assert [(row.job, row.drafter) for row in made.rows if row.task == "overall" and row.subset == "all"] == [
        ("0", "none"),
        ("0", "transformers"),
        ("0", "prompt_lookup"),
        ("1", "none"),
        ("1", "transformers"),
    ]
    assert "drafter=prompt_lookup" in (made.rows[0].overrides or [])
    assert made.provenance["jobs"]["1"]["command"].startswith("specdec evaluate threads=1")
    assert "2 jobs joined" in capsys.readouterr().err
    assert (tmp_path / "summary.md").is_file()
    assert evaluate(*sweep) == 0, "the same sweep goes on, with nothing left to do"
    assert summary(tmp_path).rows == made.rows


def test_a_failed_question_makes_the_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Speculating.generate

    def breaks(self: Speculating, *arguments: Any) -> Any:
        if self.name == "prompt_lookup" and arguments[1]["max_new_tokens"] == 4:
            raise RuntimeError("out of luck")
        return generate(self, *arguments)

    monkeypatch.setattr(Speculating, "generate", breaks)
    assert evaluate(*SMALL, f"output={tmp_path / 'one'}") == 1
    assert "1 questions failed" in capsys.readouterr().err
    assert evaluate("-m", *SMALL, "seed=0,1", f"output={tmp_path / 'many'}") == 1
    assert len(summary(tmp_path / "many").provenance["jobs"]) == 2, "the sweep went on"


def test_control_c_leaves_a_summary_and_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate, calls = Speculating.generate, [0]

    def pressed(self: Speculating, *arguments: Any) -> Any:
        calls[0] += self.name == "none"
        if calls[0] == 2:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(Speculating, "generate", pressed)
    arguments = (*SMALL, "limit=2", f"output={tmp_path}")
    assert evaluate(*arguments) == 130
    assert f"interrupted; the same command with output={tmp_path} goes on from here" in capsys.readouterr().err
    assert summary(tmp_path).rows[0].rows == 1
    assert summary(tmp_path).provenance["interrupted"]
    monkeypatch.setattr(Speculating, "generate", generate)
    assert evaluate(*arguments) == 0
    assert "2 questions, 1 of them finished before" in capsys.readouterr().err
    assert summary(tmp_path).rows[0].rows == 2


def test_drafters_side_by_side_with_options(tmp_path: Path) -> None:
    named = "drafters=[prompt_lookup,{name:prompt_lookup,label:short,num_draft_tokens:1}]"
    assert evaluate(*SMALL[:-1], named, "baseline=prompt_lookup", "baselines=[]", f"output={tmp_path}") == 0
    made = summary(tmp_path)
    assert [name for name, _ in drafters(made)] == ["none", "transformers_prompt_lookup", "prompt_lookup", "short"]
    assert made.rows[0].speedup_vs_transformers is None


def test_all_drafters_join_by_existing(tmp_path: Path) -> None:
    questions = tmp_path / "question.jsonl"
    lines = [{"question_id": 81, "category": "writing", "turns": ["Hi.", "Again."]}]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ["max_new_tokens=3", "warmup=0", "states=[warm]", "baselines=[]", "exclude=[token_recycling]", "threads=1"]
    arguments = ["recipe=spec_bench_all", f"data.path={questions}", *small, f"output={tmp_path / 'run'}"]
    assert evaluate(*arguments) == 0
    made = summary(tmp_path / "run")
    measured = {row.drafter for row in made.rows}
    assert measured | set(made.provenance["left_out"]) == set(choices("drafter")) - {"token_recycling"}
    assert {"none", "prompt_lookup"} <= measured
    run: RunRecords = records.read_run(tmp_path / "run")
    (answers,) = (a for variant, a in run.answers.items() if variant.method == "none")
    assert len(answers[81].choices[0].turns) == 2


@pytest.mark.parametrize("sizes", ["0,8", "8,0"])
def test_a_job_that_fails_leaves_the_others(sizes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = str(sizes.split(",").index("0")), str(sizes.split(",").index("8"))
    sweep = ["-m", "threads=1", "limit=1", "warmup=0", "drafter=prompt_lookup", "baselines=[]", f"output={tmp_path}"]
    assert evaluate(*sweep, f"max_new_tokens={sizes}") == 1
    made = summary(tmp_path)
    assert {row.job for row in made.rows} == {good}
    assert list(made.provenance["failed_jobs"]) == [bad]
    assert f"job {bad} failed: expected max_new_tokens" in capsys.readouterr().err
    assert "max_new_tokens" in (tmp_path / bad / records.JOB_FAILED).read_text()
    if bad == "0":
        assert evaluate(*sweep, "max_new_tokens=4,8") == 0, "repaired, it is no failed job any more"
        assert {row.job for row in summary(tmp_path).rows} == {"0", "1"}
        assert "failed_jobs" not in summary(tmp_path).provenance


def test_a_sweep_of_which_every_job_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("-m", *SMALL, "repeats=0,-1", f"output={tmp_path}") == 1
    assert "no job in" in capsys.readouterr().err


def test_other_questions_are_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "Hello."}\n{"prompt": "Again."}\n')
    arguments = (*SMALL, "baselines=[]", "data=jsonl", f"data.path={file}", f"output={tmp_path / 'run'}")
    assert evaluate(*arguments) == 0
    file.write_text('{"prompt": "Hello."}\n{"prompt": "Other, and not asked."}\n')
    assert evaluate(*arguments) == 0, "what is asked is the same"
    file.write_text('{"prompt": "Good bye."}\n')
    assert evaluate(*arguments) == 2
    assert "another run (questions_sha256" in capsys.readouterr().err


def test_the_plain_loop_is_lossless_beside_a_lossy_rule(tmp_path: Path) -> None:
    assert evaluate(*SMALL, "baselines=[]", "acceptance=typical", f"output={tmp_path}") == 0
    lossless = {row.drafter: row.lossless for row in summary(tmp_path).rows}
    assert lossless == {"none": True, "prompt_lookup": False}


MISTAKES = {
    "no file": (["data=jsonl", "data.path=nowhere.jsonl"], "no file of questions at nowhere.jsonl"),
    "no path": (["data=spec_bench"], "data=spec_bench needs data.path=..."),
    "unknown category": (["categories=[poetry]"], "unknown category 'poetry'; known: math, code"),
    "unknown source": (["data=nope"], "heldout"),
    "unknown option": (["data.nope=1"], "takes no nope"),
    "unknown baseline": (["baseline=vllm"], "unknown baseline 'vllm'; known: transformers, prompt_lookup, assistant"),
    "no assistant": (["baseline=assistant"], "assistant=FOLDER_OR_HUB_ID"),
    "unknown drafter": (["drafters=[nope]"], "unknown drafter 'nope'"),
    "twice": (["drafters=[prompt_lookup,prompt_lookup]"], "give one of them a label"),
    "one file": (["drafters=[{name:prompt_lookup,label:'a b'},{name:prompt_lookup,label:a_b}]"], "alike in file names"),
    "odd drafter": (["drafters=[{label:x}]"], "expected drafters to be names"),
    "odd state": (["states=[hot]"], "expected states to be a list of warm and cold, each once"),
    "temperature": (["temperature=[0,-1]"], "temperature >= 0"),
    "batch size": (["batch_size=[1,0]"], "expected batch_size to be a whole number of at least 1"),
    "new tokens": (["max_new_tokens=0"], "expected max_new_tokens"),
    "repeats": (["repeats=x"], "expected repeats"),
    "shard": (["shard=3/2"], "expected shard=i/n"),
    "empty shard": (["limit=1", "shard=2/2"], "no question is left to ask"),
    "warm-up": (["warmup=-1"], "expected warmup"),
    "rule": (["acceptance=greedy", "temperature=1", "drafter=prompt_lookup", "limit=1"], "cannot run"),
    "metric": (["metric=seconds"], "expected metric to be a number of the summary"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = MISTAKES[mistake]
    assert evaluate(*arguments, f"output={tmp_path}") in (1, 2)
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said


def test_a_full_disk_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answers").mkdir(parents=True)
    (tmp_path / "answers" / "none.jsonl").symlink_to("/dev/full")
    assert evaluate(*SMALL, f"output={tmp_path}", "overwrite=false") == 2
    assert "results without their config.yaml" in capsys.readouterr().err
    (tmp_path / "answers" / "none.jsonl").unlink()
    (tmp_path / "answers").rmdir()
    assert evaluate(*SMALL, f"output={tmp_path}") == 0
    (tmp_path / "processes").rename(tmp_path / "elsewhere")
    (tmp_path / "steps" / "none.jsonl").unlink()
    (tmp_path / "answers" / "none.jsonl").unlink()
    (tmp_path / "steps" / "none.jsonl").symlink_to("/dev/full")
    assert evaluate(*SMALL, f"output={tmp_path}") == 2
    assert "the disk is full; finished questions" in capsys.readouterr().err


def recipes() -> list[str]:
    """Those of this command: ``train`` has its own in the same folder."""
    folder = config_dir() / "recipe"
    return [name for name in choices("recipe") if "# specdec evaluate" in (folder / f"{name}.yaml").read_text()]


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_composes(recipe: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("evaluate", overrides=[f"recipe={recipe}", "output=x"])
    assert config.max_new_tokens > 0
    assert config.data._target_.startswith("specdec.evaluation.data.")


@pytest.mark.parametrize("source", choices("data"))
def test_every_source_is_a_function_of_ours(source: str, tmp_path: Path) -> None:
    """With a path that is not there, the error is about the path: every key is an argument."""
    config: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "data" / f"{source}.yaml"))
    if source == "demo":
        assert build(config)
        return
    key = next(key for key, value in config.items() if key != "_target_")
    with pytest.raises(FileNotFoundError):
        build({"_target_": config["_target_"], key: str(tmp_path / "nowhere")})
