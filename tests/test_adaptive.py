"""Trees that follow the text: exact whatever they do, and doing what the rates and costs say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import specdec
from drafters.base import BaseDrafter
from drafters.medusa import Medusa
from drafters.none import NoDrafter
from drafters.suffix_automaton import SamDecoding
from drafters.token_recycling import TokenRecycling
from specdec import adaptive
from specdec.adaptive import Adaptation, Adaptive
from specdec.build import build_drafter
from specdec.interfaces import DecodeState, Needs, Prefill, Verification
from specdec.target import Target
from specdec.templates import Template, chain_paths, kept_template
from specdec.tree import TokenTree
from specdec.tuning.choice import Costs, Paths, Profile, choose, expect
from specdec.tuning.files import TreeFile
from test_contract import check_cache, check_statistics, generate, model_of, plain_text, prompts
from zoo import untrained

pytestmark = untrained("medusa", "hydra_heads", "kangaroo", "draft_model")

CHAINS: dict[str, dict[str, Any]] = {"draft_model": {"shape": "chain"}}  # by default it grows trees of its own
WRAPPED = ["token_recycling", "medusa", "hydra_heads", "prompt_lookup", "suffix_automaton", "draft_model"]
WRAPPED += ["kangaroo", "early_exit", "swift"]
NOW = [0.0]  # seconds
GENERATOR = torch.Generator()
SOON = Adaptation(interval=2, half_life=8, strength=2, gain=0.0, max_nodes=12, max_depth=4, max_width=4)


@pytest.fixture(autouse=True)
def _still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes where a test says so."""
    monkeypatch.setattr(adaptive, "perf_counter", lambda: NOW[0])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes cost a staircase, all else a little; nothing depends on the machine."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 1e-3 * next(ticks))
    monkeypatch.setattr(
        adaptive, "pass_seconds", lambda _t, _c, sizes, *_: {size: 0.004 + 0.002 * (size // 5) for size in sizes}
    )


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("name", "family", "batch"),
    [*((name, "llama", 3) for name in WRAPPED), ("token_recycling", "gemma3_text", 1), ("medusa", "gpt2", 1)],
)
def test_greedy_text_is_the_targets_own(name: str, family: str, batch: int) -> None:
    model, inputs = model_of(family), prompts(batch)
    built = Adaptive(build_drafter(name, **CHAINS.get(name, {})), SOON)
    sizes = set()
    for _ in range(2):
        output, trace = generate(model, built, inputs)
        assert output.sequences.tolist() == plain_text(family, batch)
        check_cache(model, inputs, output.sequences, trace)
        check_statistics(output.speculation, trace)
        sizes |= {step.tree.num_nodes for step in trace.steps if step.tree is not None}
    assert max(sizes) <= built.needs.max_nodes
    if built.shaped.widest > 1:
        assert built.choices > 0, "the tree was exchanged on the way"


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("name", ["token_recycling", "medusa"])
def test_sampled_text_equals_plain_decoding_with_the_same_seed(name: str) -> None:
    model, inputs = model_of("llama"), prompts(3)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 6, "seed": 1}
    reference, _ = generate(model, "none", inputs, acceptance="target_sampling", **settings)
    output, _ = generate(model, Adaptive(build_drafter(name), SOON), inputs, acceptance="target_sampling", **settings)
    assert output.sequences.tolist() == reference.sequences.tolist()


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("name", ["token_recycling", "prompt_lookup"])
def test_reset_save_and_load(name: str) -> None:
    model, inputs, other = model_of("llama"), prompts(3), prompts(1, seed=4)
    built = Adaptive(build_drafter(name), SOON)
    _, first = generate(model, built, inputs)
    generate(model, built, other)
    saved = copy.deepcopy(built.state_dict())
    _, expected = generate(model, built, inputs)
    built.reset()
    _, again = generate(model, built, inputs)
    assert again.proposals == first.proposals, "reset makes it as new"
    restored = Adaptive(build_drafter(name), SOON)
    restored.load_state_dict(saved)
    _, got = generate(model, restored, inputs)
    assert got.proposals == expected.proposals
    assert restored.state_dict().keys() == {"drafter", "adaptive"}
    for wrong in ({"foreign": 1}, {}):
        with pytest.raises(ValueError, match="expected the state of an adaptive tree"):
            built.load_state_dict(wrong)


@pytest.mark.usefixtures("clock")
def test_beside_another_drafter() -> None:
    """It is shown trees that are in part another's, whose nodes it must not take for its own."""
    model, inputs = model_of("llama"), prompts(3)
    built = SamDecoding(auxiliary=Adaptive(TokenRecycling(), SOON), auxiliary_below=2)
    for _ in range(2):
        output, trace = generate(model, built, inputs)
        assert output.sequences.tolist() == plain_text("llama", 3)
    sources = {step.tree.sources for step in trace.steps if step.tree is not None}
    assert ("suffix_automaton", "token_recycling") in sources


class Toy(BaseDrafter):
    """Proposes nothing of use; the walks that it is told of are the test's."""

    name, widest, deepest = "toy", 4, 6

    def __init__(self) -> None:
        self.needs = Needs(max_nodes=4)
        self.reshape([(0,), (0, 0)] if self.widest == 1 else [(0,), (1,), (0, 0)])

    @property
    def tree_paths(self) -> list[tuple[int, ...]]:
        return self.template.paths

    def reshape(self, paths: Sequence[Sequence[int]]) -> None:
        self.template: Template = kept_template(tuple(map(tuple, paths)), torch.device("cpu"))

    def propose(self, state: DecodeState) -> TokenTree:  # noqa: ARG002 - the protocol's signature
        return TokenTree(torch.zeros(1, self.template.num_nodes, dtype=torch.int64), self.template.topology)


class ToyChain(Toy):
    """Likewise, in chains."""

    widest, deepest = 1, None  # type: ignore[assignment]


def bare() -> Target:
    """Nothing but what an adaptive tree asks of a target."""
    known = {"graphs": None, "model": None, "device": torch.device("cpu"), "dtype": torch.float32}
    return cast(Target, SimpleNamespace(**known))


class Bench:
    """An adaptive tree with costs of its own, and texts of a known character.

    Attributes:
        truth: what steps take; what the file says unless a test says otherwise.
    """

    def __init__(
        self,
        costs: Costs,
        settings: Adaptation,
        rates: list[list[float]],
        paths: Paths | None = None,
        toy: type[Toy] = Toy,
        **made_on: Any,
    ) -> None:
        whole = [1.0] * len(rates)
        profile = Profile(rates, whole, whole) if issubclass(toy, ToyChain) else Profile(rates)
        best = choose(profile, costs, settings.max_nodes, 6).paths
        file = TreeFile("toy", 9, best if paths is None else paths, profile, costs, made_on)
        self.truth = costs
        self.toy = toy()
        self.adaptive = Adaptive(self.toy, settings, file)
        target = bare()
        assert self.adaptive.fit(target) is None
        if made_on.get("compiled"):  # which is settled after fit
            target.graphs = cast(Any, SimpleNamespace(buckets=[1, 8, 16, 32]))
        state = DecodeState(cast(Any, None), cast(Any, None), torch.zeros(1, dtype=torch.int64), [], [False], GENERATOR)
        state.context = cast(Any, "some")
        self.state = state
        self.adaptive.start(self.state, cast(Prefill, None))
        self.random = np.random.default_rng(0)

    def text(self, rates: list[float], steps: int, deepest: int = 99) -> list[int]:
        """Decode: the child of rank r is right with ``rates[r]``, down to a depth; the sizes that were proposed."""
        sizes = []
        for _ in range(steps):
            tree = self.adaptive.propose(self.state)
            sizes.append(tree.num_nodes)
            paths = [(), *(self.toy.template.paths if tree.num_nodes > 1 else [])]
            end: tuple[int, ...] = ()
            while (rank := int(self.random.choice(len(rates) + 1, p=[*rates, 1 - sum(rates)]))) < len(rates):
                if (*end, rank) not in paths or len(end) == deepest:
                    break
                end = (*end, rank)
            path = [paths.index(end[:depth]) for depth in range(len(end) + 1)]
            offered, nodes = tree.candidates_by_depth().tolist(), np.array(tree.num_nodes)
            levels = np.array(len(offered[0]))
            NOW[0] += self.truth.plain if tree.num_nodes == 1 else float(self.truth.seconds(nodes, levels))
            walk = Verification([path], [[0] * len(path)], [False], [False], torch.zeros(0), offered)
            self.adaptive.update(self.state, tree, walk)
        return sizes

    def share_of_best(self, rates: list[float]) -> float:
        """Tokens per second of the present tree on such a text, over those of the best one."""
        truth, costs = Profile([rates] * 6), cast(TreeFile, self.adaptive.file).costs
        return expect(self.toy.tree_paths, truth, costs).rate / choose(truth, costs, 32, 6).rate


STAIRS = Costs(np.repeat([1.0, 1.1, 1.6, 3.0], 8), plain=1.0, draft=(0.05, 0.0, 0.0))
PRIOR = [[0.5, 0.2, 0.1]] * 6


def test_the_tree_follows_the_character_of_the_text() -> None:
    settings = Adaptation(max_nodes=32, max_depth=6)
    bench = Bench(STAIRS, settings, PRIOR)
    copying = bench.text([0.95, 0.02], 160)
    deep = max(map(len, bench.toy.tree_paths))
    assert deep == 6, "text that is copied gets deep trees"
    assert copying[-1] <= 16
    assert bench.share_of_best([0.95, 0.02]) > 0.9
    guessing = bench.text([0.3, 0.25, 0.2, 0.15], 320)
    assert max(path[0] for path in bench.toy.tree_paths) >= 2, "text with many ways on gets wide ones"
    assert bench.share_of_best([0.3, 0.25, 0.2, 0.15]) > 0.9
    assert min(*copying, *guessing) > 1
    assert bench.adaptive.choices < 40


def test_plain_decoding_where_nothing_is_right_and_back() -> None:
    costs = Costs(STAIRS.passes, plain=1.0, draft=(0.3, 0.0, 0.0))
    bench = Bench(costs, Adaptation(max_nodes=32, max_depth=6), PRIOR)
    assert min(bench.text([0.7, 0.1], 200)) > 1
    hopeless = bench.text([0.01, 0.0], 400)
    assert sum(size == 1 for size in hopeless[200:]) > 100, "where nothing is right nothing is proposed"
    again = bench.text([0.9, 0.02], 400)
    assert again[-1] > 1, "what was given up is tried again"
    assert bench.share_of_best([0.9, 0.02]) > 0.9


@pytest.mark.parametrize("more", [0, 5, 11])
def test_a_new_request_is_given_a_tree_again(more: int) -> None:
    costs = Costs(STAIRS.passes, plain=1.0, draft=(0.3, 0.0, 0.0))
    bench = Bench(costs, Adaptation(max_nodes=32, max_depth=6), PRIOR)
    bench.text([0.01, 0.0], 60)
    for _ in range(100):
        if bench.text([0.01, 0.0], 12 + more)[-1] == 1:
            break
    assert bench.adaptive._plain
    saved = bench.adaptive.state_dict()
    bench.adaptive.start(bench.state, cast(Prefill, None))
    assert bench.adaptive._since == 0
    assert min(bench.text([0.01, 0.0], 12)) > 1, "for a whole interval, wherever the last request ended"
    bench.adaptive.load_state_dict(saved)
    counted = bench.adaptive._beliefs.counts.steps
    bench.adaptive.start(bench.state, cast(Prefill, None))
    assert bench.adaptive._beliefs.counts.steps == pytest.approx(counted / 2)
    assert min(bench.text([0.9, 0.02], 60)) > 1, "plain decoding would not see that this text is another"


@pytest.mark.parametrize(("plain", "size"), [(1.0, 1), (3.0, 4)])
def test_what_a_plain_step_costs_is_seen(plain: float, size: int) -> None:
    """The file says that plain decoding is much faster, which is so or is not."""
    passes, threads = np.full(32, 3.0), torch.get_num_threads()
    bench = Bench(Costs(passes, plain=1.0), Adaptation(max_nodes=4), PRIOR, [(0,), (1,), (0, 0)], threads=threads)
    bench.truth = Costs(passes, plain)
    sizes = []
    for _ in range(8):  # requests
        bench.adaptive.start(bench.state, cast(Prefill, None))
        sizes += bench.text(PRIOR[0], 60)
    assert 1 in sizes[:60], "the file is believed at first"
    assert sum(each == size for each in sizes[240:]) > 0.7 * 240


def test_requests_are_not_compared_with_each_other() -> None:
    """Plain steps at the end of one, the tree at the beginning of the next, which is slower for its own reasons."""
    here: dict[str, Any] = {"threads": torch.get_num_threads()}
    bench = Bench(Costs(np.full(32, 3.0), plain=1.0), Adaptation(max_nodes=4), PRIOR, [(0,)], **here)
    assert bench.text(PRIOR[0], 60)[-20:] == [1] * 20
    believed = bench.adaptive._corrections.plain
    bench.adaptive.start(bench.state, cast(Prefill, None))
    bench.truth = Costs(np.full(32, 6.0), plain=2.0)
    bench.text(PRIOR[0], 12)
    assert bench.adaptive._corrections.plain == pytest.approx(believed, abs=0.02)


@pytest.mark.parametrize(("larger", "size"), [(1.0, 16), (1.5, 8)])
def test_what_a_tree_costs_beside_another_is_seen(larger: float, size: int) -> None:
    """Trees of 16 nodes take as long as the file says, or longer, so that they are left again."""
    costs = Costs(np.repeat([1.0, 1.15, 1.9, 3.0], 8), plain=1.0)
    bench = Bench(costs, Adaptation(max_nodes=16), PRIOR, choose(Profile(PRIOR), costs, 8, 6).paths)
    bench.truth = Costs(costs.passes * np.repeat([1.0, larger, larger, larger], 8), plain=1.0)
    wide = [0.6, 0.25, 0.1]
    assert 16 in bench.text(wide, 100), "the file is believed at first"
    assert sum(each == size for each in bench.text(wide, 200)) > 150


def test_the_files_tree_is_gone_back_to() -> None:
    """After a text that is copied, on one for which a longer chain promises 1 % more, which is no reason to stay."""
    bench = Bench(
        Costs(np.linspace(1.0, 3.0, 64), plain=0.9), Adaptation(), [[0.62, 0.0]] * 4, chain_paths(4), toy=ToyChain
    )
    costs, truth = bench.truth, Profile([[0.62, 0.0]] * 9, [1.0] * 9, [1.0] * 9)
    rates = [expect(chain_paths(length), truth, costs).rate for length in (4, 6)]
    assert 1.0 < rates[1] / rates[0] < 1.015
    bench.text([1.0], 100)
    assert len(bench.toy.tree_paths) > 6
    bench.text([0.62], 500)
    assert len(bench.toy.tree_paths) == 4


def test_a_steady_text_is_not_looked_at_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = list[int]()
    bench = Bench(STAIRS, Adaptation(max_nodes=32, max_depth=6), PRIOR)
    chosen = bench.adaptive._choose

    def look(state: DecodeState) -> None:
        looked.append(1)
        chosen(state)

    monkeypatch.setattr(bench.adaptive, "_choose", look)
    bench.text(PRIOR[0], 12)
    assert len(looked) == 1, "nothing was expected before"
    bench.text(PRIOR[0], 20 * 12)
    steady = len(looked)
    assert 2 <= steady <= 11, "every eighth look at least, and where chance has it"
    bench.text([0.95, 0.02], 12)
    assert len(looked) == steady + 1, "a text of another character is seen at the next look"


def test_chains_grow_beyond_what_was_ever_drafted() -> None:
    flat = Costs(np.linspace(1.0, 1.5, 64), plain=0.9)
    bench = Bench(flat, Adaptation(max_chain=30), [[0.6, 0.0]] * 4, chain_paths(4), toy=ToyChain)
    bench.text([1.0], 300)
    assert len(bench.toy.tree_paths) >= 20, "a text that copies itself is worth the longest chains"
    bench.text([0.3], 400)
    assert len(bench.toy.tree_paths) <= 12


def test_a_level_that_fails_is_not_believed_by_the_one_above() -> None:
    """Four tokens are mostly right, what is deeper hardly ever; no file says so."""
    bench = Bench(Costs(np.linspace(1.0, 2.0, 64), plain=0.9), Adaptation(), [[0.6, 0.0]], [(0,)], toy=ToyChain)
    lengths = []
    for _ in range(60):
        bench.text([0.9], 12, deepest=4)
        lengths.append(len(bench.toy.tree_paths))
    assert np.mean(lengths[20:]) < 8


def test_another_batch_size_is_chosen_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "pass_seconds", lambda _t, _c, sizes, *_: {size: 0.9 + 0.1 * size for size in sizes})
    here: dict[str, Any] = {"threads": torch.get_num_threads()}
    bench = Bench(Costs(np.ones(32), plain=1.0), Adaptation(max_nodes=32, max_depth=6), PRIOR, **here)
    assert set(bench.text(PRIOR[0], 100)) == {32}
    bench.state.finished[:] = [False, False]
    bench.adaptive.start(bench.state, cast(Prefill, None))
    bench.truth = Costs(0.9 + 0.1 * np.arange(1.0, 33.0), plain=1.0)
    assert set(bench.text(PRIOR[0], 13)[12:]) != {32}, "a node costs something where there are several rows"


def test_what_was_compared_is_saved() -> None:
    here: dict[str, Any] = {"threads": torch.get_num_threads()}
    costs = Costs(np.full(32, 3.0), plain=1.0)
    benches = [Bench(costs, Adaptation(max_nodes=4), PRIOR, [(0,)], **here) for _ in range(2)]
    benches[0].truth = Costs(np.full(32, 3.0), plain=2.0)
    first, again = (bench.adaptive for bench in benches)
    benches[0].text(PRIOR[0], 60)
    assert first._corrections.plain > 1.5
    again.load_state_dict(first.state_dict())
    assert again.state_dict() == first.state_dict()
    assert again._corrections.plain == first._corrections.plain


def test_a_chain_costs_what_the_next_graph_does() -> None:
    """The file knows passes of every size; here those of 5 to 16 nodes are padded to 16."""
    rising = Costs(np.linspace(1.0, 4.0, 32), plain=0.9)
    rates = [[0.72, 0.0]] * 20
    here: dict[str, Any] = {"threads": torch.get_num_threads()}
    lengths = []
    for sizes in (None, [1, 4, 16, 32]):
        bench = Bench(rising, Adaptation(max_nodes=32), rates, chain_paths(5), toy=ToyChain, **here)
        assert bench.adaptive._target is not None
        bench.adaptive._target.graphs = None if sizes is None else cast(Any, SimpleNamespace(buckets=sizes))
        bench.adaptive._knows_costs = None
        bench.adaptive._passes.clear()
        bench.adaptive.start(bench.state, cast(Prefill, None))
        assert bench.adaptive._given is not None
        bench.truth = bench.adaptive._given
        bench.text([0.72], 400)
        lengths.append(len(bench.toy.tree_paths))
    assert lengths[0] in range(4, 9)
    assert lengths[1] == 3, "what is beyond four nodes costs as much as sixteen"


def test_near_the_best_tree_on_a_steady_text() -> None:
    for rates in ([0.6, 0.2, 0.05], [0.2, 0.1, 0.1], [0.4, 0.39, 0.0]):
        bench = Bench(STAIRS, Adaptation(max_nodes=32, max_depth=6), PRIOR)
        bench.text(rates, 300)
        assert bench.share_of_best(rates) > 0.95


def test_the_files_tree_comes_first_and_stays_where_it_is_best() -> None:
    flat = Costs(np.array([1.0, 1.0, 1.0, 1.0, *[9.0] * 28]), plain=1.0)
    bench = Bench(flat, Adaptation(max_nodes=32), [[0.5, 0.2]] * 2)
    assert set(bench.text([0.5, 0.2], 200)) == {4}
    assert bench.adaptive.choices == 0


def test_what_tuning_looked_at_is_worth_more_than_what_is_reckoned() -> None:
    kept, best = choose(Profile(PRIOR), STAIRS, 8, 3).paths, choose(Profile(PRIOR), STAIRS, 32).paths
    bench = Bench(STAIRS, Adaptation(max_nodes=32, max_depth=6), PRIOR, kept)
    reckoned = [expect(paths, Profile(PRIOR), STAIRS).rate for paths in (best, kept)]
    assert reckoned[0] > 1.03 * reckoned[1], "by its rates the file would have another tree"
    assert set(bench.text(PRIOR[0], 200)) == {8}
    bench.text([0.95, 0.02], 200)
    assert max(map(len, bench.toy.tree_paths)) == 6, "a text of another character still gets another tree"
    bench.text(PRIOR[0], 300)
    assert bench.share_of_best(PRIOR[0]) > 0.93


def test_costs_of_a_file_that_was_made_elsewhere_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(adaptive._LOG, "warning", lambda text, *names: told.append(text % names))
    monkeypatch.setattr(adaptive, "pass_seconds", lambda _t, _c, sizes, *_: dict.fromkeys(sizes, 0.5))
    here = {"dtype": "float32", "threads": torch.get_num_threads()}
    cases = (({**here, "compiled": False}, ""), ({**here, "compiled": True}, ""), ({"dtype": "bfloat16"}, "dtype"))
    for made_on, other in cases:
        told.clear()
        bench = Bench(STAIRS, Adaptation(max_nodes=32, max_depth=6), PRIOR, **made_on)
        bench.text(PRIOR[0], 30)
        assert (bench.adaptive._passes[1][0] == 0.5) == bool(other)
        assert bool(bench.adaptive._fits.recent) == bool(other), "and followed while decoding"
        assert [text.count(f"other {other};") for text in told] == [1] * bool(other)


def test_walks_through_trees_of_others_do_not_count() -> None:
    bench = Bench(STAIRS, Adaptation(), PRIOR)
    bench.text([0.5], 3)
    own = bench.adaptive.propose(bench.state)
    walk = Verification([[0, 1]], [[0, 0]], [False], [False], torch.zeros(0), [[2, 1]])
    bench.adaptive.update(bench.state, copy.copy(own), walk)
    bench.adaptive._count()
    assert bench.adaptive._beliefs.counts.steps == 3
    bench.adaptive.update(bench.state, own, walk)
    bench.adaptive._count()
    assert bench.adaptive._beliefs.counts.steps == 4


def test_within_the_sizes_that_there_are_graphs_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "graph_sizes", lambda _: [1, 6, 8, 16, 32])
    bench = Bench(STAIRS, Adaptation(max_nodes=32, max_depth=6), PRIOR)
    sizes = {*bench.text([0.7, 0.2], 200), *bench.text([0.3, 0.1], 300)}
    assert sizes <= {6, 8, 16, 32}, "the file's tree of 16 comes first"
    assert len(sizes) > 1


@pytest.mark.usefixtures("clock")
def test_costs_are_measured_once_per_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], Any]] = []

    def timed(_target: Any, context: Any, sizes: list[int], *_: Any) -> dict[int, float]:
        asked.append((sizes, len(context.lengths)))
        return {size: 1.0 + size for size in sizes}

    monkeypatch.setattr(adaptive, "pass_seconds", timed)
    model, built = model_of("llama"), Adaptive(TokenRecycling(), Adaptation(max_nodes=40))
    for batch in (1, 3, 1):
        generate(model, built, prompts(batch))
    assert asked == [([1, 4, 8, 16, 24, 32, 40], 1), ([1, 4, 8, 16, 24, 32, 40], 3)]
    assert built.needs.max_nodes == 40


def test_what_drafting_costs_is_known_by_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Slower(Toy):
        def propose(self, state: DecodeState) -> TokenTree:
            clock[0] += 1e-4 * state.batch_size**2
            return super().propose(state)

    monkeypatch.setattr(adaptive, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(adaptive, "pass_seconds", lambda _t, _c, sizes, *_: dict.fromkeys(sizes, 0.01))
    built, again = (Adaptive(Slower(), Adaptation(interval=3, max_nodes=8)) for _ in range(2))
    for each in (built, again):
        assert each.fit(bare()) is None
    for step in range(30):
        rows = (1, 4)[step // 5 % 2]
        state: Any = SimpleNamespace(batch_size=rows, root=torch.zeros(rows, dtype=torch.int64), context="some")
        if step % 5 == 0:
            built.start(state, cast(Prefill, None))
        tree = built.propose(state)
        clock[0] += 0.01
        offered = tree.candidates_by_depth().tolist() * rows
        walk = Verification([[0, 1]] * rows, [[0, 0]] * rows, [False] * rows, [False] * rows, torch.zeros(0), offered)
        built.update(state, tree, walk)
    saved = built.state_dict()
    fitted = saved["adaptive"]["fits"]["fitted"]
    assert {rows: sum(draft[:3]) for rows, draft in fitted.items()} == pytest.approx({1: 1e-4, 4: 16e-4})
    again.load_state_dict(saved)
    assert again.state_dict() == saved


def test_without_a_file_what_longer_drafts_cost_is_seen_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(ToyChain):
        def propose(self, state: DecodeState) -> TokenTree:
            NOW[0] += 0.5 * len(self.tree_paths)
            return super().propose(state)

    monkeypatch.setattr(adaptive, "pass_seconds", lambda _t, _c, sizes, *_: dict.fromkeys(sizes, 1.0))
    costs = Costs(np.ones(64), plain=1.0)
    bench = Bench(costs, Adaptation(), [[0.8, 0.0]], [(0,), (0, 0)], toy=Slow, dtype="of another")
    began, sizes = NOW[0], bench.text([0.85], 600)
    assert max(sizes) < 17, "no longer than twice what was seen"
    best = choose(Profile([[0.85, 0.0]] * 30, [1.0] * 30, [1.0] * 30), Costs(np.ones(64), 1.0, (0.0, 0.5, 0.0)), 64)
    assert (NOW[0] - began) / 600 < 1.3 * best.seconds


def test_bad_settings_and_drafters(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"interval": 0}, {"max_nodes": 1}, {"max_nodes": 500}, {"half_life": 0}]
    settings.append({"max_chain": 0})
    for wrong in settings:
        with pytest.raises(ValueError, match="expected"):
            Adaptation(**wrong)
    with pytest.raises(ValueError, match="no tree of a fixed shape"):
        Adaptive(NoDrafter())
    path = tmp_path / "tree.yaml"
    TreeFile("medusa", 97, chain_paths(2), Profile([[0.5]]), STAIRS).write(path)
    with pytest.raises(ValueError, match="made for drafter 'medusa'"):
        Adaptation(str(path)).shape(TokenRecycling(), 97)
    assert Adaptation(str(path)).shape(Medusa(), 97).name == "medusa, adaptive tree"
    model = model_of("llama")
    with pytest.raises(ValueError, match="can be exchanged as it is set up"):
        specdec.speculate(
            model, build_drafter("kangaroo", shape="top_k", num_draft_tokens=2, width=2, num_nodes=4), tree="adaptive"
        )
