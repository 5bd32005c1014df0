"""The benchmark's parts: laps in turns, steps that are alike, parts that add up, peaks, the record and its tables."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec import decoding
from specdec.bench import bandwidth, clock
from specdec.bench.gpu import VARIANTS, GpuOptions, gpu
from specdec.bench.meter import held, request_peaks
from specdec.bench.profiling import FORWARD, PARTS, Stopwatch, profile
from specdec.bench.records import BENCH, Book, without_places
from specdec.bench.sections import GrowthOptions
from specdec.bench.stepping import FixedTree, RawForward, Stepper, handle_of, listening, request_of, tree_of
from specdec.bench.subjects import Subject, random_llama
from specdec.bench.tables import markdown
from specdec.bench.texts import figures
from specdec.build import build_drafter, build_verifier
from specdec.decoding import decode
from specdec.evaluation.records import Summary, SummaryRow
from specdec.interfaces import DecodeState, Prefill
from specdec.metrics import SpeculationStats
from specdec.tree import TokenTree
from test_contract import NEW_TOKENS, model_of, plain_text, prompts
from test_graphs import _fresh_graphs as _fresh_graphs  # a fixture

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CPU = torch.device("cpu")


def subject(**changes: Any) -> Subject:
    return Subject("tiny", random_llama({**SHAPE, **changes}, "float32", "cpu"))


# clocks


def test_laps_take_turns_and_the_first_moves_on() -> None:
    order: list[str] = []

    def lap(name: str) -> clock.Lap:
        def take() -> float:
            order.append(name)
            return float(len(order))

        return take

    seconds = clock.in_turns({name: lap(name) for name in "abc"}, repeats=2, warmup=1)
    assert "".join(order) == "abcbcacab"
    assert seconds == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}, "the warm-up does not count"


def test_milliseconds_are_a_median_and_quartiles() -> None:
    assert clock.milliseconds([0.004, 0.001, 0.002, 0.003, 0.100]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert clock.milliseconds([0.002]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_bandwidth_is_bytes_over_the_best_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    laps = iter([4.0, 4.0, 4.0] + [2.0, 0.5, 2.0] * 9)
    monkeypatch.setattr(bandwidth, "timed", lambda work, _: (work(), next(laps))[1])
    found = bandwidth.read_bandwidth(3 * 4 * 4096 + 5, CPU, repeats=6)
    assert set(found.values()) <= {3 * 4 * 4096 / 0.5, 3 * 4 * 4096 / 2.0}, "whole rows, the best lap"
    assert len(found) == 3


# what is measured


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_pass(tied: bool) -> None:
    tiny = subject(tie_word_embeddings=tied)
    vocabulary, width, inner = 128, 32, 48
    layer = 2 * width * width + 2 * width * (width // 2) + 3 * width * inner + 2 * width
    assert tiny.weight_bytes == 4 * (2 * layer + width + vocabulary * width), "the head, and no input embedding"
    assert tiny.num_parameters == tiny.weight_bytes // 4 + (0 if tied else vocabulary * width)
    assert tiny.kv_bytes(3, 5) == 3 * 5 * 2 * 2 * (width // 2) * 4
    filled = tiny.filled(3, 5)
    assert filled.get_seq_length() == 5
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in filled.layers) == tiny.kv_bytes(3, 5)


def test_random_weights_are_those_of_their_seed() -> None:
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (random_llama(SHAPE, "bfloat16", "cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), before), "torch's own generator is left alone"
    assert torch.get_default_dtype() == torch.float32
    weights = [model.lm_head.weight for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'float17'; expected float32"):
        random_llama(SHAPE, "float17", "cpu")


# steps


@pytest.mark.parametrize("nodes", [1, 2, 8, 25])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_step_is_alike_and_the_raw_forward_keeps_up(nodes: int, rows: int) -> None:
    tiny = subject()
    stepper = Stepper(tiny, rows, 20, nodes, accepted=2, steps=6)
    emitted = {1: 1, 2: 2}.get(nodes, 3)
    assert len(stepper.path) == emitted
    if nodes > 2:
        assert stepper.path != [0, 1, 2], "the path's K/V has to move"
    raw = RawForward(tiny, rows, stepper.length, nodes, emitted)
    for _ in range(4):
        assert stepper.length == raw.cache.get_seq_length()
        before = stepper.length
        assert stepper.lap() > 0
        assert raw.lap() > 0
        assert stepper.length == before + emitted
    assert stepper.stats.mean_accepted_tokens == emitted
    assert stepper.stats.nodes_per_verification == nodes
    stepper.close()


def test_trees_are_nested_and_of_the_size_asked_for() -> None:
    assert [tree_of(size).num_nodes for size in (1, 8, 16, 25, 64)] == [1, 8, 16, 25, 64]
    assert tree_of(64).topology.max_depth >= 3


def test_a_request_is_what_generate_would_have_run() -> None:
    model = model_of("llama")
    handle = handle_of(model, build_drafter("prompt_lookup"), build_verifier("tree_attention"), {})
    inputs = prompts(3)
    request = request_of(
        model, handle, inputs["input_ids"], inputs["attention_mask"], max_new_tokens=NEW_TOKENS, do_sample=False
    )
    with torch.no_grad():
        *_, (state, _) = decode(handle.target, handle.drafter, handle.verifier, request, SpeculationStats())
    width = inputs["input_ids"].shape[1]
    for row, text in enumerate(plain_text("llama", 3)):
        assert state.policy.outputs[row] == text[width : width + len(state.policy.outputs[row])]
    assert model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist() == plain_text("llama", 3), "plain again"


def test_a_mode_that_specdec_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="specdec.speculate takes no warp_drive; of modes it takes: .*compile"):
        Stepper(subject(), 1, 8, 2, 1, 2, {"warp_drive": True})


def test_a_warning_about_the_model_is_a_refusal() -> None:
    model = model_of("llama")
    with warnings.catch_warnings(record=True) as passed_on:
        warnings.simplefilter("always")
        with listening(model) as refusals:
            warnings.warn("no compiler; the passes of LlamaForCausalLM run uncompiled", stacklevel=1)
            warnings.warn("of something else", stacklevel=1)
    assert [str(warning.message) for warning in passed_on] == ["of something else"]
    assert refusals == ["no compiler; the passes of LlamaForCausalLM run uncompiled"]


def test_growth_measures_every_point_once() -> None:
    options = GrowthOptions([512, 1024], [1, 4], [1, 2, 25], tree=25, accepted=2, repeats=1)
    points = options.points()
    assert len(points) == len(set(points)) == options.count([subject()])
    assert {(1, 1024, 25), (4, 512, 1), (1, 512, 2)} <= set(points)
    assert (4, 1024, 25) not in points, "one axis grows at a time"


# who takes what


def test_time_belongs_to_the_innermost_part() -> None:
    now = [0.0]

    def work(seconds: float) -> float:
        now[0] += seconds
        return now[0]

    watch = Stopwatch(lambda: None, lambda: now[0])
    inner = watch("inner", lambda: work(3))
    outer = watch("outer", lambda: (work(1), inner(), work(1), inner()))
    watch("whole", lambda: (outer(), work(10)))()
    assert watch.seconds == {"inner": 6.0, "outer": 2.0, "whole": 10.0}


def test_a_profile_names_all_parts_and_leaves_nothing_behind() -> None:
    stepper = Stepper(subject(), 1, 20, 8, accepted=2, steps=8)
    commit, forward = decoding._commit, stepper.subject.model.forward
    seconds = profile(stepper, 4)
    assert set(seconds) == {*PARTS} - {"compiled forward"}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds[part] for part in FORWARD[1:]) > 0.2 * sum(seconds.values())
    assert decoding._commit is commit
    assert stepper.subject.model.forward == forward
    assert "forward" not in vars(stepper.subject.model)
    assert "propose" not in vars(stepper.handle.drafter)


@pytest.mark.usefixtures("_fresh_graphs")
def test_a_compiled_forward_is_one_part() -> None:
    stepper = Stepper(subject(), 1, 20, 8, accepted=2, steps=8, modes={"compile": True})
    seconds = profile(stepper, 4)
    assert seconds["compiled forward"] > 0.2 * sum(seconds.values())
    assert not {*FORWARD[1:]} & seconds.keys()
    assert {"draft", "inputs", "masks", "verify", "accept", "keep", "commit"} < seconds.keys()


# memory


class Hoarder(FixedTree):
    """Holds some bytes from the start, takes more for a moment when a request starts, and again in every step."""

    def __init__(self, kept: int, at_start: int, in_steps: int) -> None:
        super().__init__(tree_of(8))
        self.kept, self.at_start, self.in_steps = kept, at_start, in_steps

    def fit(self, target: Any) -> str | None:
        self.hoard = torch.zeros(self.kept, dtype=torch.uint8)
        return super().fit(target)

    def start(self, state: DecodeState, prefill: Prefill) -> None:
        torch.zeros(self.at_start, dtype=torch.uint8)
        super().start(state, prefill)

    def propose(self, state: DecodeState) -> TokenTree:
        torch.zeros(self.in_steps, dtype=torch.uint8)
        return super().propose(state)


def test_peaks_see_what_a_drafter_takes_and_nothing_of_the_cache() -> None:
    tiny = subject()
    ids = tiny.ids(1, 24)
    found = {}
    for name, sizes in {"modest": (0, 0, 0), "hoarder": (3_000_000, 50_000_000, 20_000_000)}.items():
        drafter = Hoarder(*sizes)
        handle, own = held(lambda drafter=drafter: handle_of(tiny.model, drafter, build_verifier("tree_attention"), {}))
        request = request_of(tiny.model, handle, ids, torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        found[name] = own, request_peaks(handle, request, tiny.kv_bytes(1, 24), steps=4)
    (own, peaks), (hoarded, most) = found["modest"], found["hoarder"]
    assert own < 100_000
    assert hoarded == pytest.approx(own + 3_000_000, abs=1_000)
    assert peaks.kv == most.kv == 128 * tiny.kv_bytes(1, 1), "one bucket of slots"
    assert peaks.steps < peaks.kv + 1_000_000
    assert 20_000_000 <= most.steps < 20_000_000 + 1_000_000
    assert 50_000_000 <= most.prefill < 50_000_000 + 1_000_000
    assert most.python is not None
    assert most.python < 2_000_000, "what torch holds is not counted twice"


# records and tables


def said(**changes: Any) -> dict[str, Any]:
    known = {"device": "a CPU", "threads": 2, "versions": {"torch": "2", "transformers": "5"}, "git": None}
    return {**known, "command": "specdec bench", "started": "2026-01-02T03:04:05", **changes}


def test_a_finished_section_stays_until_its_options_change(tmp_path: Path) -> None:
    book = Book(tmp_path, said(command="specdec bench data.gsm8k=/home/me/train.jsonl"))
    book.add("profile", {"nodes": (1, 25)}, {"rows": [1]})
    book.add("step", {"nodes": [1], "place": Path("/home/me/x")}, {"rows": [2]})
    again = Book(tmp_path, said(started="later", git={"sha": "newer"}))
    assert again.finished("profile", {"nodes": [1, 25]})
    assert again.finished("step", {"nodes": [1], "place": "/somewhere/x"})
    assert not again.finished("step", {"nodes": [1, 8], "place": "/home/me/x"})
    assert not again.finished("memory", {})
    text = (tmp_path / BENCH).read_text()
    assert list(json.loads(text)["sections"]) == ["step", "profile"], "in the order of the table"
    assert "/home" not in text
    again.add("memory", {}, {"rows": []})
    shas = {name: section["git"] for name, section in again.content["sections"].items()}
    assert shas == {"step": None, "memory": {"sha": "newer"}, "profile": None}, "by which code each was measured"
    with pytest.raises(ValueError, match="under other conditions .threads: 2 -> 1.; use overwrite=true"):
        Book(tmp_path, said(threads=1))


def test_places_are_left_out() -> None:
    typed = "data.path=~/q.jsonl output='/tmp/a' x=1/2 and/or"
    assert without_places(typed) == "data.path=q.jsonl output='a' x=1/2 and/or"
    assert without_places({"a": [Path("/x/y"), 3, None, "/x/z"]}) == {"a": ["y", 3, None, "z"]}


def summary() -> Summary:
    rates = {
        ("transformers", "transformers"): 100.0,
        ("transformers_float32", "transformers"): 110.0,
        ("transformers_prompt_lookup", "transformers_prompt_lookup"): 160.0,
        ("transformers_prompt_lookup_float32", "transformers_prompt_lookup"): 150.0,
        ("none", "plain"): 105.0,
        ("quick", "drafter"): 330.0,
    }
    rows = []
    for subset, share in (("all", 1.0), ("non_looping", 0.9)):
        for (name, kind), rate in rates.items():
            row = SummaryRow(name, "overall", tokens_per_second=rate * share, method_kind=kind, subset=subset, rows=4)
            row.looping_share, row.mean_accepted_tokens, row.bugs = 0.25, 1.0, 0
            row.identical_rows, row.near_ties, row.draft_share = 4, 0, 0.1
            rows.append(row)
    return Summary({}, rows)


def test_each_ratio_is_against_the_faster_dtype() -> None:
    rows = figures(summary(), "float32")
    (quick,) = (row for row in rows if row["method"] == "quick" and row["subset"] == "all")
    assert quick["vs_generate"] == pytest.approx(330 / 110)
    assert (quick["generate_method"], quick["generate_tokens_per_second"]) == ("transformers_float32", 110.0)
    assert quick["vs_prompt_lookup"] == pytest.approx(330 / 160)
    assert quick["prompt_lookup_method"] == "transformers_prompt_lookup"
    assert "bugs" not in next(row for row in rows if row["method"] == "transformers_float32")
    without = Summary({}, [row for row in summary().rows if "prompt_lookup" not in row.drafter])
    assert {row["vs_prompt_lookup"] for row in figures(without, "float32")} == {None}


def test_tables_carry_both_numbers_of_a_ratio() -> None:
    rows = figures(summary(), "float32")
    text = markdown({"provenance": said(), "sections": {"end_to_end": {"rows": rows, "left_out": {"x": "no g++"}}}})
    assert "| `quick` | 1.00 (1.00) | 297 (330) | 3.00 (3.00) | 2.06 (2.06) | 10 % | 4, 0, 0 |" in text
    assert "`transformers_float32` with 110 tokens/s and `transformers_prompt_lookup` with 160" in text
    assert "25 % end in one" in text
    assert "`x` was left out: no g++." in text
    assert "a CPU, 2 threads" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is written where there is no CUDA")
def test_nothing_is_estimated_without_a_gpu() -> None:
    class Told:
        count = 0

        def advance(self, count: int, said: str = "") -> None:
            assert "no CUDA device" in said
            self.count += count

        def note(self, text: str) -> None: ...

    def attention() -> Any:
        raise AssertionError("attention is measured on CUDA only")

    options, told = GpuOptions(SHAPE, "bfloat16", [512, 2048], [1, 64], accepted=2, repeats=1), Told()
    section = gpu(options, attention, told)
    assert told.count == options.count() == len(section["rows"]) == 4
    for row in section["rows"]:
        assert {row[name] for name in ("raw_ms", "limit_ms", *VARIANTS)} == {"not measured: no CUDA device"}
    text = markdown({"provenance": said(), "sections": {"gpu": section}})
    cells = [line.split("|")[3:-1] for line in text.splitlines() if line.startswith(("| 512", "| 2048"))]
    assert len(cells) == 4
    assert {cell.strip() for line in cells for cell in line} == {"not measured: no CUDA device"}


@pytest.mark.gpu
def test_a_gpu_run_of_a_small_model() -> None:
    class Silent:
        def advance(self, count: int, said: str = "") -> None: ...
        def note(self, text: str) -> None: ...

    options = GpuOptions({**SHAPE, "max_position_embeddings": 512}, "bfloat16", [64], [1, 8], accepted=2, repeats=3)
    section = gpu(options, list, Silent())
    for row in section["rows"]:
        assert row["raw_ms"]["median"] > 0
        assert row["limit_ms"] > 0
        assert all(isinstance(row[name], dict) or "not measured" in row[name] for name in VARIANTS)


def test_speculate_is_left_as_it_was() -> None:
    model = model_of("llama")
    specdec.speculate(model, "prompt_lookup")
    try:
        with pytest.raises(ValueError, match="takes no"):
            handle_of(model, build_drafter("none"), build_verifier("tree_attention"), {"nope": 1})
        assert specdec.speculation_of(model).drafter.name == "prompt_lookup"
    finally:
        specdec.restore(model)
