"""The report: what is chosen from the records, what the page and its pictures hold, and what bad input is told."""

from __future__ import annotations

import base64
import gzip
import importlib
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from report_runs import DRAFTERS, QUESTIONS_PER_TASK, TASKS, TRANSFORMERS, Case, Style, make_run, make_sweep
from specdec import cli
from specdec.evaluation.records import ANSWERS, SUMMARY, read_answers, read_summary
from specdec.report.answers import collect
from specdec.report.figures import Figures, Setting
from specdec.report.page import write_report
from specdec.report.runs import find_runs

FAILED_QUESTION = 302


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", case=Case(batch_sizes=(1, 4)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without drafters: quickly drawn."""
    return make_run(tmp_path_factory.mktemp("runs") / "small", ())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("runs") / "sweep")


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report([run], out)
    return out


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(page: str) -> None:
    """No address but of names of XML, no file, and a policy that would refuse both."""
    assert set(re.findall(r"https?://[^\"' <)]*", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page


def test_pictures_are_written_for_every_setting(report: Path) -> None:
    names = ["speedup", "speedup_by_task", "accepted_lengths", "acceptance_by_depth", "conditional_acceptance_by_depth"]
    for name in [*names, "time_split", "speedup_by_batch_size"]:
        for suffix in ("", "_2"):
            head = (report / f"{name}{suffix}.png").read_bytes()[:24]
            width, height = struct.unpack(">II", head[16:24])
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
            assert width > 1200
            assert height > 200


def test_bars_show_the_records(run: Path) -> None:
    """Bars are over rows that do not loop, warm; diamonds over all rows; ticks cold."""
    figures = Figures(find_runs([run]))
    rows = {(r.drafter, r.subset, r.state): r for r in read_summary(run / SUMMARY).rows if r.task == TASKS[1]
            and r.batch_size == 4}  # fmt: skip
    bars = {bar.label: bar for bar in figures.bars(figures.settings[1], TASKS[1])}
    assert set(bars) == {
        "token_recycling", "prompt_lookup", "layer_skip", "medusa_typical (lossy)", "transformers generate",
    }  # fmt: skip
    bar = bars["token_recycling"]
    assert bar.value == rows["token_recycling", "non_looping", "warm"].speedup_vs_plain
    assert bar.all_rows == rows["token_recycling", "all", "warm"].speedup_vs_plain
    assert bar.cold == rows["token_recycling", "non_looping", "cold"].speedup_vs_plain
    assert bars["prompt_lookup"].cold is None
    values = [bar.value for bar in figures.bars(figures.settings[1], TASKS[1])]
    assert values == sorted(values, reverse=True)


def test_looping_rows_never_stand_in_for_others(run: Path) -> None:
    figures = Figures(find_runs([run]))
    setting = figures.settings[0]
    task = figures.tasks(setting)[0]
    assert figures.bars(setting, task)
    for method in figures.methods:
        method.rows = [row for row in method.rows if row.task != task or row.subset == "all"]
    assert figures.bars(setting, task) == []


def test_the_table_counts_losslessness(run: Path, page: str) -> None:
    """Near-ties and bugs of the records stand in the table; a failed question is no row."""
    wanted = ("overall", "all", 1)
    every = {r.drafter: r for r in read_summary(run / SUMMARY).rows if (r.task, r.subset, r.batch_size) == wanted}
    total = len(TASKS) * QUESTIONS_PER_TASK - 1
    assert (every["layer_skip"].identical_rows, every["layer_skip"].near_ties) == (total - 1, 1)
    table = re.sub(r"<wbr>", "", page[page.index("<tbody>") : page.index("</tbody>")])
    rows = {re.sub(r"<[^>]+>", "", row.split("</th>")[0]).strip(): row for row in table.split("<tr>")[1:]}
    assert f"{total - 1} of {total}" in rows["layer_skip"]
    assert 'alarm">1 / 0' in rows["prompt_lookup"]
    assert 'badge lossy">lossy' in rows["medusa_typical lossy"]
    assert "alarm" not in rows["medusa_typical lossy"], "a lossy rule differs by design"
    assert f"{every['layer_skip'].speedup_vs_plain:.2f}×" in rows["layer_skip"]


def test_lossy_methods_are_marked_wherever_they_are_named(run: Path) -> None:
    figures = Figures(find_runs([run]))
    book, setting = collect(figures), figures.settings[0]
    named = [
        *(bar.label for bar in figures.bars(setting)),
        *(bar.label for panel in figures.panels(setting) for bar in panel.bars),
        *(item.label for item in figures.histograms(setting)),
        *(line.label for conditional in (False, True) for line in figures.depths(setting, conditional)),
        *(split.label for split in figures.splits(setting)),
        *(line.label for line in figures.by_batch_size(setting)),
        *(method["label"] for method in book.methods),
    ]
    assert named.count("medusa_typical (lossy)") == 1 + len(TASKS) + 1 + 2 + 1 + 1 + 2
    assert "medusa_typical" not in named


def test_a_drafter_keeps_its_colour(run: Path, sweep: Path) -> None:
    figures = Figures(find_runs([run, sweep]))
    seen: dict[str, set[int | None]] = {}
    for setting in figures.settings:
        for bar in [*figures.bars(setting), *(b for panel in figures.panels(setting) for b in panel.bars)]:
            seen.setdefault(bar.label.split()[0], set()).add(bar.color)
    assert all(len(colors) == 1 for colors in seen.values())
    assert len({next(iter(seen[style.name])) for style in DRAFTERS}) == len(DRAFTERS)
    assert seen["transformers"] == {None}


def test_sweeps(run: Path, sweep: Path) -> None:
    """A multirun folder: a line over tree sizes; elsewhere the fastest variant, named by what was overridden."""
    figures = Figures(find_runs([sweep]))
    (line,) = figures.by_tree_size(figures.settings[0])
    assert [x for x, _ in line.points] == [5, 9, 25]
    shown = [bar.label for bar in figures.bars(figures.settings[0]) if bar.color is not None]
    fastest = max(line.points, key=lambda point: point[1])[0]
    assert shown == [f"token_recycling num_nodes={fastest:g}"]
    assert figures.variants_shown(figures.settings[0])
    assert not figures.by_batch_size(figures.settings[0])
    batches = Figures(find_runs([run]))
    assert {tuple(x for x, _ in line.points) for line in batches.by_batch_size(batches.settings[0])} == {(1, 4)}


def test_labels_of_one_drafter_share_its_colour_and_its_sweep(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", (Style("wide", 0.6, 4, 0.0003), Style("narrow", 0.5, 2, 0.0002)))
    text = json.loads((folder / SUMMARY).read_text())
    labelled = [{"name": "token_recycling", "label": label} for label in ("wide", "narrow")]
    text["provenance"]["config"]["drafters"] = labelled
    for row in text["rows"]:
        row["tree_nodes"] = 9 if row["drafter"] == "wide" else 5
    (folder / SUMMARY).write_text(json.dumps(text))
    figures = Figures(find_runs([folder]))
    assert figures.drafters == ["token_recycling"]
    (line,) = figures.by_tree_size(figures.settings[0])
    assert (line.label, len(line.points)) == ("token_recycling", 2)
    assert {bar.label: bar.color for bar in figures.bars(figures.settings[0])} == {
        "wide": 0,
        "narrow": 0,
        "transformers generate": None,
    }


def test_mixed_targets_are_said_and_kept_apart(tmp_path: Path, small: Path) -> None:
    other = make_run(tmp_path / "other", (), Case(target="other-model", dtype="float32"))
    write_report([small, other], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "These runs do not measure the same thing" in page
    assert "different targets (tiny-llama, other-model) and different dtypes (bfloat16, float32)" in page
    figures = Figures(find_runs([small, other]))
    assert [setting.target for setting in figures.settings] == ["tiny-llama", "other-model"]
    assert all(method.run.target == setting.target for setting in figures.settings for method in figures.of(setting))


def test_different_questions_are_said_and_kept_apart(tmp_path: Path, small: Path) -> None:
    other = make_run(tmp_path / "other", (), Case(max_new_tokens=7))
    write_report([small, other], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "different workloads (max new tokens)" in page
    figures = Figures(find_runs([small, other]))
    assert [setting.label(figures.settings) for setting in figures.settings] == [
        "max new tokens 40",
        "max new tokens 7",
    ]


def test_the_same_selection_of_other_questions_is_told(small: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", ())
    text = json.loads((other / SUMMARY).read_text())
    text["provenance"]["config"]["questions_sha256"] = "0123456789abcdef"
    (other / SUMMARY).write_text(json.dumps(text))
    figures = Figures(find_runs([small, other]))
    assert [setting.label(figures.settings) for setting in figures.settings] == ["questions –", 'questions "01234567"']


def test_lines_end_where_no_pass_went(run: Path) -> None:
    """Beyond the depth at which nothing was accepted, shares of nothing are not drawn."""
    figures = Figures(find_runs([run]))
    for method in figures.methods:
        for row in method.rows:
            if row.acceptance_by_depth:
                row.acceptance_by_depth = [0.5, 0.2, 0.0, 0.0]
                row.conditional_acceptance_by_depth = [0.5, 0.4, 0.0, 0.0]
    for conditional, expected in ((False, [0.5, 0.2, 0.0]), (True, [0.5, 0.4, 0.0])):
        for line in figures.depths(figures.settings[0], conditional):
            assert [y for _, y in line.points] == expected


def test_folders_name_variants_where_overrides_do_not(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, DRAFTERS[1:2]) for name in ("monday", "friday")]
    figures = Figures(find_runs(folders))
    names = {method.name for method in figures.methods if method.kind == "drafter"}
    assert names == {"prompt_lookup [monday]", "prompt_lookup [friday]"}


def test_one_target_is_not_called_mixed(page: str) -> None:
    assert "do not measure the same thing" not in page


def unpacked(page: str) -> dict[str, Any]:
    found = re.search(r'id="answer-data">([^<]*)<', page)
    assert found
    book: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return book


def test_the_page_holds_every_answer(run: Path, page: str) -> None:
    book = unpacked(page)
    index = next(
        i for i, m in enumerate(book["methods"]) if m["label"] == "token_recycling, cold" and "1" in m["setting"]
    )
    for answer in read_answers(run / ANSWERS / "token_recycling.cold.jsonl"):
        question = next(i for i, q in enumerate(book["questions"]) if q["id"] == answer.question_id)
        packed = book["answers"][index][str(question)]
        pieces = book["texts"][packed["t"][0]]
        sources = [book["sources"][ord(letter) - 48]["name"] for letter in packed["s"][0]]
        assert list(zip(pieces, sources, strict=True)) == answer.choices[0].tokens[0]
        assert packed["v"] == answer.choices[0].identical
        assert book["questions"][question]["turns"][0].endswith("a < b?")
        plain = book["answers"][book["methods"][index]["plain"]][str(question)]
        assert plain["t"] == packed["t"], "a text is held once"


def test_a_failed_question_keeps_its_traceback(page: str) -> None:
    book = unpacked(page)
    question = next(str(i) for i, q in enumerate(book["questions"]) if q["id"] == FAILED_QUESTION)
    by_method = {m["label"]: answers.get(question) for m, answers in zip(book["methods"], book["answers"], strict=True)}
    assert "RuntimeError: <simulated> failure" in by_method["prompt_lookup"]["e"]
    assert "e" not in by_method["token_recycling"]


def test_more_methods_with_the_same_text_cost_little(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 9):
        styles = [Style(f"drafter_{index}", 0.5, 4, 0.0003) for index in range(count)]
        folder = make_run(tmp_path / str(count), styles)
        sizes.append(len(collect(Figures(find_runs([folder]))).packed()))
    assert sizes[1] < 3 * sizes[0]


def test_text_cannot_leave_its_place(page: str) -> None:
    """Names, tracebacks and answers are data: none of them is markup."""
    assert "<simulated>" not in page
    assert "<thirty>" not in page


def test_no_figures_at_all_still_give_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", (), Case(temperature=1.0))
    text = json.loads((folder / SUMMARY).read_text())
    for row in text["rows"]:
        row |= {"speedup_vs_plain": None, "speedup_vs_transformers": None, "seconds": {}}
    (folder / SUMMARY).write_text(json.dumps(text))
    write_report([folder], tmp_path / "report")
    assert "No speed-up was recorded under this setting" in (tmp_path / "report" / "index.html").read_text()


def test_settings_are_named_by_what_differs() -> None:
    settings = [Setting("t", "bfloat16", "cpu", temperature, 1) for temperature in (0.0, 0.7)]
    assert [setting.label(settings) for setting in settings] == ["greedy", "temperature 0.7"]
    assert settings[0].label(settings[:1]) == "greedy, batch 1"


def broken(folder: Path, what: str) -> None:
    make_run(folder, (TRANSFORMERS,))
    if what == "no JSON":
        lines = (folder / SUMMARY).read_text().split("\n")
        (folder / SUMMARY).write_text("\n".join([*lines[:6], "oops", *lines[7:]]))
    if what == "no rows":
        (folder / SUMMARY).write_text('{"provenance": {}, "rows": []}')
    if what == "foreign":
        (folder / SUMMARY).write_text('{"results": 1}')
    if what == "interrupted":
        (folder / SUMMARY).unlink()
    if what in ("cut line", "foreign line"):
        path = folder / ANSWERS / "none.jsonl"
        lines = path.read_text().split("\n")
        path.write_text("\n".join([*lines[:2], '{"question_id": 1' if what == "cut line" else "{}", *lines[3:]]))


BROKEN = {
    "no JSON": r"summary\.json:7: not JSON",
    "no rows": "no rows; no question was finished",
    "foreign": "not a summary of specdec evaluate",
    "interrupted": "holds answers but no summary.json: the run was interrupted",
    "cut line": r"none\.jsonl:3: expected one JSON object per line",
    "foreign line": r"none\.jsonl:3: not an answer of specdec evaluate: .*question_id",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_malformed_is_named(tmp_path: Path, what: str) -> None:
    broken(tmp_path / "run", what)
    with pytest.raises(ValueError, match=BROKEN[what]):
        write_report([tmp_path / "run"], tmp_path / "report")
    assert not (tmp_path / "report").exists(), "nothing is written before all is read"


def test_folders_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find_runs([tmp_path / "nowhere"])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"expected summary.json in it or in its subfolders, found notes\.txt"):
        find_runs([tmp_path])
    with pytest.raises(ValueError, match=r"specdec report DIR\.\.\."):
        find_runs([])


def test_a_run_is_taken_once(run: Path) -> None:
    assert len(find_runs([run, run.parent, run / ".." / run.name])) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "b", "out=c"], ["out=c", "folders=['a','b']"]),
        (["--cfg", "job", "it's"], ["--cfg", "job", "folders=['it\\'s']"]),
        (["x=1", "-m", "~y"], ["x=1", "-m", "~y"]),
        (["drafter=a"], ["folders=['drafter=a']"]),
    ],
)
def test_folders_stand_free_on_the_command_line(
    arguments: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one: a folder that exists is a folder, whatever it is called."""
    (tmp_path / "drafter=a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli._gather(arguments, "folders") == expected
    assert cli._gather(arguments, None) == arguments


def specdec_report(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["specdec"])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        cli.main(["report", *arguments])
    except SystemExit as left:
        return left.code
    return 0


def test_the_command(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert specdec_report(str(small), "out=here", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "here/index.html"
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    assert specdec_report(str(tmp_path / "nowhere"), monkeypatch=monkeypatch) == 2
    assert "no such folder" in capsys.readouterr().err


def test_help_says_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert specdec_report("--help", monkeypatch=monkeypatch) == 0
    assert "specdec report DIR... [out=FOLDER]" in capsys.readouterr().out


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(
    library: str, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.import_module

    def without(name: str) -> Any:
        if name == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return find(name)

    monkeypatch.setattr("specdec.commands.report.importlib.import_module", without)
    assert specdec_report(str(small), monkeypatch=monkeypatch) == 2
    assert f"the report needs {library}: pip install specdec-hf[report]" in capsys.readouterr().err
