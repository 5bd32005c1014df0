"""Graphs of any number of rows: one row has its own, all batches share one, and none is made in a timed call."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

import specdec
from drafters.draft_model import DraftModel
from specdec.build import build_drafter, build_verifier
from specdec.evaluation import methods, records
from specdec.evaluation.data import demo
from specdec.evaluation.methods import Speculating
from specdec.evaluation.progress import Progress
from specdec.evaluation.runner import Plan, Runner, Setting
from specdec.evaluation.store import RunFolder
from specdec.generation import attach, speculation_of
from specdec.graphs import passes, store
from specdec.graphs.buffers import PassShape
from specdec.loading import DEMO_FOLDER, Loaded
from test_bench_command import QUICK, bench
from test_contract import model_of, plain_text, prompts
from test_evaluation_runner import tiny
from test_graphs import _fresh_graphs as _fresh_graphs  # a fixture
from test_graphs import generate_code, graphs_of, interpreted, one_layer, speculating
from test_graphs import traced as traced  # a fixture
from zoo import FAMILIES, build, untrained

NEW_TOKENS = 24
SLOW = pytest.mark.slow
WITHOUT = ("gpt_neo", "xglm")  # whose code asks for the slots seen, so that they have no graphs at any number of rows
pytestmark = untrained("early_exit", "draft_model")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[PassShape, Any]:
    """Stands in for the folder of graphs, which outlives what a process holds."""
    kept: dict[PassShape, Any] = {}

    def keep(program: Any, shape: PassShape, store: Any) -> Callable[[list[Tensor]], list[Tensor]]:
        kept[shape] = interpreted(program, shape, store)
        return kept[shape]

    monkeypatch.setattr(passes, "inductor", keep)
    monkeypatch.setattr(store.Store, "load", lambda _, shape: kept.get(shape))
    return kept


def tokens(model: Any, batch: int, seed: int = 3, **options: Any) -> list[list[int]]:
    return model.generate(**prompts(batch, seed), **{"max_new_tokens": NEW_TOKENS, **options}).tolist()


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=SLOW) for name in ("gemma3_text", "gpt2"))])
def test_batches_share_graphs_and_a_single_row_has_its_own(family: str, traced: list[PassShape]) -> None:
    model, told = model_of(family), list[str]()
    speculating(model, "prompt_lookup", told)
    try:
        for batch in (2, 3, 8, 5, 2):
            assert tokens(model, batch) == plain_text(family, batch)
        shared = list(traced)
        assert {shape.batch for shape in shared} == {None}
        assert len({shape.nodes for shape in shared}) == len(shared), "one for every size"
        assert tokens(model, 1) == plain_text(family, 1)
        assert {shape.batch for shape in traced[len(shared) :]} == {1}
        assert graphs_of(model).failures == {}
    finally:
        specdec.restore(model)
    assert len(told) == 2 * len(traced)
    assert any("x any number of rows" in line for line in told)


def test_rows_that_stop_make_no_graph(traced: list[PassShape]) -> None:
    """Eight rows that end one after the other, drafted for by a tree that shrinks with what is left to emit."""
    model, new_tokens = model_of("llama"), 40
    free = model.generate(**prompts(8), max_new_tokens=new_tokens)
    stop = free[:, -new_tokens:].flatten().bincount().argmax().item()  # the token that most rows emit
    options: dict[str, Any] = {"eos_token_id": stop, "max_new_tokens": new_tokens}
    expected = tokens(model, 8, **options)
    first = [row.index(stop) if stop in row else new_tokens for row in free[:, -new_tokens:].tolist()]
    assert len(set(first)) > 3, "rows stop at different places"
    speculating(model, "token_recycling", [])
    try:
        specdec_tokens = tokens(model, 8, **options)
        made = passes.makings()
        assert len(traced) <= len(graphs_of(model).buckets)
        for batch in (8, 7, 4, 2):
            tokens(model, batch, **options)
        assert passes.makings() == made
    finally:
        specdec.restore(model)
    assert specdec_tokens == expected


def test_very_large_batches_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch, traced: list[PassShape]) -> None:
    monkeypatch.setattr(passes, "MOST_ROWS", 2)
    model = one_layer()
    expected = {batch: tokens(model, batch, max_new_tokens=4) for batch in (2, 3)}
    speculating(model, "none", [])
    assert expected == {batch: tokens(model, batch, max_new_tokens=4) for batch in (2, 3)}
    assert [shape.batch for shape in traced] == [None, 3]


@SLOW
@pytest.mark.parametrize("attention", ["plain", None])
def test_masks_of_either_kind(attention: str | None, traced: list[PassShape]) -> None:
    model = model_of("gemma3_text")
    specdec.speculate(model, "prompt_lookup", attention=attention, compile=True)
    try:
        for batch in (2, 3):
            assert tokens(model, batch) == plain_text("gemma3_text", batch)
        assert graphs_of(model).failures == {}
    finally:
        specdec.restore(model)
    assert {(shape.batch, shape.words > 0) for shape in traced} == {(None, attention is not None)}
    assert len({shape.nodes for shape in traced}) == len(traced)


@SLOW
def test_parts_of_the_model_and_states_that_enter(monkeypatch: pytest.MonkeyPatch, traced: list[PassShape]) -> None:
    monkeypatch.setattr(passes, "RECURS", 1)
    model = model_of("llama")
    speculating(model, "early_exit", [], confidence=0.0)
    try:
        assert tokens(model, 3) == plain_text("llama", 3)
        known = len(traced)
        assert tokens(model, 2) == plain_text("llama", 2)
        assert graphs_of(model).failures == {}
    finally:
        specdec.restore(model)
    assert any(shape.enters for shape in traced)
    assert any(shape.taps for shape in traced)
    assert len(traced) == known


@SLOW
def test_a_draft_model_shares_its_graphs_too(traced: list[PassShape]) -> None:
    model = model_of("llama")
    drafter: Any = DraftModel(build("llama", seed=1), width=3, depth=3, num_nodes=8)
    specdec.speculate(model, drafter, compile=True)
    try:
        assert tokens(model, 2) == plain_text("llama", 2)
        known = set(traced)
        assert tokens(model, 3) == plain_text("llama", 3)
    finally:
        specdec.restore(model)
    assert {shape.batch for shape in traced} == {None}
    assert {shape.nodes for shape in traced if shape not in known} <= {1}, "a chain that was longer before"


def test_capture_is_per_number_of_rows(traced: list[PassShape]) -> None:
    """A CUDA graph stands on fixed buffers; what it captures is the graph that all batches share."""
    captured = list[int]()

    def again(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        captured.append(run()[0].shape[0])
        return run

    model = model_of("llama")
    specdec.speculate(model, "prompt_lookup")
    handle = speculation_of(model)
    target, most = handle.target, handle.drafter.needs.max_nodes
    target.graphs = passes.GraphPasses(model, target.router, target.kinds, most, print, passes.inductor, again)
    try:
        for batch in (2, 3):
            assert tokens(model, batch) == plain_text("llama", batch)
        assert target.graphs.failures == {}
    finally:
        specdec.restore(model)
    assert {2, 3} <= set(captured)
    assert {shape.batch for shape in traced} == {None}
    assert len({shape.nodes for shape in traced}) == len(traced)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT])
def test_every_family(family: str, traced: list[PassShape]) -> None:
    model = model_of(family)
    expected = {batch: tokens(model, batch, max_new_tokens=8) for batch in (2, 3)}
    speculating(model, "prompt_lookup", [], num_draft_tokens=2)
    try:
        for batch in (2, 3):
            assert tokens(model, batch, max_new_tokens=8) == expected[batch]
        assert graphs_of(model).failures == {}
    finally:
        specdec.restore(model)
    if family != "llama4_text":  # which asks for the number of rows
        assert {shape.batch for shape in traced} == {None}
        assert len({shape.nodes for shape in traced}) == len(traced)


def test_a_model_that_asks_for_the_rows_has_a_graph_per_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    expected = {batch: tokens(model, batch, max_new_tokens=6) for batch in (2, 3)}
    forward = model.model.layers[0].mlp.forward.__func__
    kind = type(model.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x if x.shape[0] in (1, 2) else x + 0))
    speculating(model, "none", [])
    for batch in (2, 3, 2):
        assert tokens(model, batch, max_new_tokens=6) == expected[batch]
    assert graphs_of(model).failures == {}
    assert {shape.batch for shape, _ in passes._MADE[model].graphs} == {2, 3}


def test_a_request_loads_before_it_decodes(disk: dict[PassShape, Any]) -> None:
    model, told, loaded = model_of("llama"), list[str](), list[int]()
    speculating(model, "token_recycling", told)
    expected = tokens(model, 2)
    assert {line.split()[0] for line in told} == {"compiling", "compiled"}
    passes._MADE.clear()  # another process
    told.clear()
    speculating(model, "token_recycling", told)
    speculation_of(model).observers.append(lambda state, _: loaded.append(len(told) if state.context else 0))
    assert tokens(model, 2) == expected
    specdec.restore(model)
    assert {line.split()[0] for line in told} == {"loaded"}
    assert set(loaded) == {0, len(told)}, "none after the first step"
    assert len(told) == len(disk)


def test_within_as_made_nothing_is_made(disk: dict[PassShape, Any]) -> None:
    model, told = model_of("llama"), list[str]()
    speculating(model, "token_recycling", told)
    try:
        with passes.as_made():
            assert tokens(model, 2) == plain_text("llama", 2)
        assert told == []
        assert not disk
        assert tokens(model, 2) == plain_text("llama", 2)
        assert disk
    finally:
        specdec.restore(model)


def test_searched_routes_are_bounded_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "RECURS", 0)
    monkeypatch.setattr(passes, "_MOST_OF_MANY", 0)
    model = model_of("llama")
    speculating(model, "swift", [], confidence=0.05, num_draft_tokens=3, max_width=2)
    try:
        with pytest.warns(UserWarning, match="0 graphs with skipped parts .* at most; others .* run"):
            assert tokens(model, 1) == plain_text("llama", 1)
        made = [shape.route.skips for shape, _ in passes._MADE[model].graphs]
    finally:
        specdec.restore(model)
    assert made
    assert not any(made)


def test_a_folder_that_cannot_be_read_is_told_of_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError("the folder of graphs is not yours")

    monkeypatch.setattr(store.Store, "load", denied)
    model = model_of("llama")
    speculating(model, "prompt_lookup", [])
    try:
        with pytest.warns(UserWarning, match="not yours"):
            assert tokens(model, 1) == plain_text("llama", 1)
    finally:
        specdec.restore(model)


@pytest.mark.parametrize("where", ["trace", pytest.param("inductor", marks=SLOW)])
def test_what_fails_for_any_number_of_rows_is_tried_for_each(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = list[Any](), getattr(passes, where)

    def only_for_numbers(first: Any, second: Any, *rest: Any) -> Any:
        shape = first.shape if where == "trace" else second
        asked.append(shape.batch)
        if shape.batch is None:
            raise RuntimeError("no symbols here")
        return real(first, second, *rest)

    monkeypatch.setattr(passes, where, only_for_numbers)
    model, told = model_of("llama"), list[str]()
    for process in range(2):
        passes._MADE.clear()
        speculating(model, "none", told)
        try:
            for batch in (2, 3, 1):
                assert tokens(model, batch, max_new_tokens=4) == [
                    row[: -NEW_TOKENS + 4] for row in plain_text("llama", batch)
                ]
            assert graphs_of(model).failures == {}, "a single row keeps its graph"
        finally:
            specdec.restore(model)
        if process == 0:
            assert asked == [None, 2, 3, 1]
            assert sum("no symbols here" in line for line in told) == 1
    # What cannot be traced is known from then on; what a compiler could not do once, it may do the next time.
    assert asked[4:] == ([2, 3, 1] if where == "trace" else [None, 2, 3, 1])


def test_numbers_of_rows_are_bounded(monkeypatch: pytest.MonkeyPatch, traced: list[PassShape]) -> None:
    monkeypatch.setattr(passes, "MOST_ROWS", 1)
    monkeypatch.setattr(passes, "_MOST_OF_MANY", 2)
    model = one_layer()
    speculating(model, "none", [])
    for batch in (2, 3):
        tokens(model, batch, max_new_tokens=4)
    with pytest.warns(UserWarning, match="2 graphs .* for one number of rows are made at most"):
        tokens(model, 4, max_new_tokens=4)
    tokens(model, 1, max_new_tokens=4)
    assert [shape.batch for shape in traced] == [2, 3, 1]


def timed_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """Seconds of every call that looked at the clock, and how many graphs were made in it."""
    calls, timed = list[tuple[float, int]](), methods._timed

    def spy(*args: Any) -> Any:
        before = passes.makings()
        found = timed(*args)
        calls.append((found[1], passes.makings() - before))
        return found

    monkeypatch.setattr(methods, "_timed", spy)
    return calls


def lengths_of(run: Path) -> dict[Any, list[int]]:
    answers = records.read_run(run).answers
    return {
        (variant.batch_size, number): answer.choices[0].accept_lengths
        for variant, found in answers.items()
        for number, answer in found.items()
    }


@pytest.mark.parametrize(
    ("drafter", "warmup"),
    [
        ("token_recycling", 1),
        *(pytest.param(*case, marks=SLOW) for case in [("early_exit", 1), ("token_recycling", 0), ("early_exit", 0)]),
    ],
)
def test_no_graph_is_made_in_a_call_that_counts(
    drafter: str, warmup: int, disk: dict[PassShape, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of two questions and a single one; ``early_exit`` runs parts of the model, which get their graphs late."""
    calls, model = timed_calls(monkeypatch), tiny()
    loaded = Loaded(model, AutoTokenizer.from_pretrained(str(DEMO_FOLDER)), "tiny")
    options = {"confidence": 0.0, "exit_layer": 1} if drafter == "early_exit" else {}
    attach(model, build_drafter(drafter, **options), build_verifier("tree_attention"), lambda _: None)
    method = Speculating(drafter, model, speculation_of(model), {0})
    method.state = records.WARM if method.stateful else records.STATELESS
    specdec.restore(model)
    questions = [question for question in demo() if len(question.turns) == 1][:3]
    same = questions[0].category
    for question in questions:
        object.__setattr__(question, "category", same)
    plan = Plan([Setting(0.0, 2), Setting(0.0, 1)], max_new_tokens=40, warmup=warmup)
    with Progress(Console(file=io.StringIO())) as progress:
        runner = Runner(loaded, lambda _: [method], plan, RunFolder(tmp_path / "run"), progress)
        runner.run(questions)
    assert runner.failures == 0
    assert {shape.batch for shape in disk} == {None, 1}
    quiet = [seconds for seconds, made in calls if not made]
    counted: dict[tuple[int, int], float] = {}
    for variant, answers in records.read_run(tmp_path / "run").answers.items():
        groups = [[0, 1], [2]] if variant.batch_size == 2 else [[0], [1], [2]]
        for number, group in enumerate(groups):
            shares = [answers[questions[index].question_id].choices[0].wall_time[0] for index in group]
            counted[variant.batch_size, number] = sum(shares)
    assert len(counted) == 5
    for seconds in counted.values():
        assert any(seconds == pytest.approx(each, rel=1e-9) for each in quiet)
    made = [made for _, made in calls if made]
    assert made, "this would pass without graphs"
    if warmup:
        assert len(made) == 2, "warming up makes all: once for two rows, once for one"
    # A call that is asked again begins with what was known before, not with its own answer.
    specdec.speculate(model, build_drafter(drafter, **options))
    ordinary = Speculating(drafter, model, speculation_of(model), {0})
    ordinary.state = method.state
    specdec.restore(model)
    with Progress(Console(file=io.StringIO())) as progress:
        Runner(loaded, lambda _: [ordinary], plan, RunFolder(tmp_path / "ordinary"), progress).run(questions)
    assert lengths_of(tmp_path / "run") == lengths_of(tmp_path / "ordinary")


@SLOW
def test_the_benchmark_makes_graphs_before_it_measures(
    disk: dict[PassShape, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec"])
    inside, generate = list[int](), Speculating.generate

    def spy(*args: Any) -> Any:
        before = passes.makings()
        texts = generate(*args)
        inside.append(passes.makings() - before)
        return texts

    monkeypatch.setattr(Speculating, "generate", spy)
    small = ["small.end_to_end.drafters=[{name:token_recycling,compile:true}]", "small.end_to_end.max_new_tokens=6"]
    assert bench(*QUICK, "sections=[end_to_end]", *small, f"output={tmp_path / 'run'}") == 0
    assert {shape.batch for shape in disk} == {None, 1}
    assert inside
    assert not any(inside)


_LATER = """
import sys
from specdec.graphs import passes
from test_contract import prompts
from test_graphs import one_layer, speculating
told, model = [], one_layer()
plain = [model.generate(**prompts(batch), max_new_tokens=12).tolist() for batch in (3, 8)]
speculating(model, "none", told)
assert plain == [model.generate(**prompts(batch), max_new_tokens=12).tolist() for batch in (3, 8)]
assert [line.split()[0] for line in told] == ["loaded"], told
"""


@SLOW
def test_another_process_loads_generated_code_for_other_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(passes, "inductor", generate_code)
    model, told = one_layer(), list[str]()
    plain = [tokens(model, batch) for batch in (2, 5)]
    speculating(model, "none", told)
    assert plain == [tokens(model, batch) for batch in (2, 5)]
    assert graphs_of(model).failures == {}
    assert [line.split()[0] for line in told] == ["compiling", "compiled"]
    assert len(list((tmp_path / "graphs").iterdir())) == 1
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", _LATER], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_generated_code_of_ragged_batches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "inductor", generate_code)
    model, told = model_of(family), list[str]()
    speculating(model, "prompt_lookup", told)
    try:
        for batch in (2, 3, 8):
            assert tokens(model, batch) == plain_text(family, batch)
        assert graphs_of(model).failures == {}
    finally:
        specdec.restore(model)
    assert all("any number of rows" in line for line in told)
