"""The command ``tune``: what it writes is what the drafter reads back."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drafters.skip_search import load_skip_set
from specdec import cli
from specdec.commands import _tree
from specdec.commands.tune import _text
from specdec.tuning.calibration import StepCost
from specdec.tuning.choice import Costs
from specdec.tuning.files import TreeFile

SMALL = ("threads=1", "dtype=float32", "max_new_tokens=8", "drafter.search.context_window=4")


def test_a_tuned_set_is_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "set.json"
    data.write_text('{"question": "How many eggs are left?"}\n\nplain text\n{"turns": ["one", "two"]}\n')
    monkeypatch.setattr("sys.argv", ["specdec"])
    options = ("drafter.search.max_iterations=2", "drafter.search.max_score=1", f"prompts_file={data}", "num_prompts=2")
    cli.main(["tune", f"output={output}", *options, *SMALL])
    written = json.loads(output.read_text())
    assert list(written) == ["demo"]
    entry = written["demo"]
    assert entry["drafter"] == "swift"
    assert entry["texts"] == 2
    assert entry["candidates"] == 3
    assert entry["versions"].keys() == {"torch", "transformers"}
    assert load_skip_set(output).as_dict() == {"attention": entry["attention"], "mlp": entry["mlp"]}


@pytest.mark.parametrize("drafter", ["token_recycling", "prompt_lookup", "suffix_automaton", "draft_model"])
def test_a_tuned_tree_is_written_and_read_back(
    drafter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "prompts.txt", tmp_path / "new" / "tree.yaml"
    data.write_text("def total(items):\nHow many eggs are left?\n")
    monkeypatch.setattr("sys.argv", ["specdec"])
    small = ("threads=1", "dtype=float32", "max_new_tokens=16", "max_nodes=12", "max_depth=4", "calibration_nodes=20")
    options = ("contexts=[8,40]", "repeats=2", f"prompts_file={data}", f"output={output}")
    chosen = [f"drafter={drafter}", *(["drafter.shape=chain"] if drafter == "draft_model" else [])]
    cli.main(["tune", *chosen, *options, *small])
    said = capsys.readouterr().out
    assert "chosen" in said
    assert str(output.with_suffix(".png")) in said.replace("\n", "")
    assert output.with_suffix(".png").stat().st_size > 10_000
    file = TreeFile.read(output)
    assert (file.drafter, file.vocab_size, file.made_on["target"]) == (drafter, 4096, "demo")
    assert file.made_on["threads"] == 1
    assert file.made_on["prompts"] == 2
    assert 1 <= len(file.paths) <= 80
    assert len(file.costs.passes) == max(12, file.expected["published"]["nodes"])
    assert file.expected.keys() == {"chosen", "published", "plain"}
    rates = {name: values["tokens_per_second"] for name, values in file.expected.items()}
    assert rates["chosen"] >= rates["published"]
    assert ("plain decoding is faster" in said) == file.plain_is_faster == (rates["plain"] > rates["chosen"])
    assert set(file.more["pass_seconds_by_context"]) == {8, 40}
    learns = drafter == "token_recycling"
    assert ("rates_cold" in file.more) == learns
    assert file.profile.is_chain == (not learns)
    cli.main(["generate", "prompt=def f(x):", "compare=true", *chosen, f"tree.path={output}", *small[:3]])
    assert "identical texts: 1 of 1" in capsys.readouterr().out


def test_a_plain_step_is_a_share_of_the_step_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    paces = iter([1.0, 9.0, 4.0])
    now = [0.0]

    def beside(*_: Any, **__: Any) -> Any:
        now[0] = next(paces)
        return SimpleNamespace(costs=[StepCost(5, 2, 0.1 * now[0], now[0])] * 3)

    monkeypatch.setattr(_tree, "calibrate", beside)
    monkeypatch.setattr(_tree, "plain_seconds", lambda *_: 0.6 * now[0])
    monkeypatch.setattr(_tree, "using", lambda *_: nullcontext())
    tuner: Any = object.__new__(_tree.TreeTuner)
    tuner.drafter, tuner.published, tuner.ids = SimpleNamespace(reshape=lambda _: None), [(0,)], [None] * 12
    tuner.session, tuner.handle, tuner.plain = SimpleNamespace(model=None, generate=None), None, None
    tuner.depth, tuner.width, tuner.is_chain = 2, 2, False
    costs = Costs(np.linspace(2.0, 3.0, 8), 1.0, draft=(0.1, 0.0, 0.0))
    found = tuner._with_plain(costs)
    assert found.plain == pytest.approx(0.6 * float(costs.seconds(np.array(5), np.array(2)))), "whatever the pace"


def test_lines_of_a_file() -> None:
    assert _text("plain {text}") == "plain {text}"
    assert _text('{"prompt": "a"}') == "a"
    assert _text('{"turns": ["b", "c"]}') == "b"
    with pytest.raises(ValueError, match="prompt, question or turns.*got .'text'."):
        _text('{"text": "a"}')


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tune", "drafter=none"], "'none' has nothing to tune"),
        (["tune", "what=drafter", "drafter=medusa"], "'medusa' has no search"),
        (["tune", "what=leaves"], "known: tree, drafter"),
        (["tune", "drafter=trigram"], "token_recycling"),
        (["tune", "drafter=kangaroo", "drafter.shape=top_k"], "no tree to tune as it is set up"),
        (["tune", "drafter=draft_model"], "no tree to tune as it is set up: draft_model grows"),
        (
            ["tune", "drafter=suffix_automaton", "drafter.auxiliary=lookahead"],
            "as it is set up: suffix_automaton with a corpus",
        ),
        (["tune", "drafter=prompt_lookup", "contexts=[4000]"], "2048"),
        (["tune", "drafter=prompt_lookup", "state=luke"], "known: warm, cold"),
        (["tune", "drafter=prompt_lookup", "tree=adaptive"], "takes none"),
        (["tune", "drafter.search=false"], "search=false"),
        (["tune", "prompts_file=nowhere.txt"], "nowhere.txt"),
        (["tune", "max_new_tokens=2"], "no text reached"),
    ],
)
def test_mistakes(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["specdec"])
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
