"""The command ``tune``: what it writes is what the drafter reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drafters.skip_search import load_skip_set
from specdec import cli
from specdec.commands.tune import _text

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
