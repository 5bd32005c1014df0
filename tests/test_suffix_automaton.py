"""The suffix automaton against brute force; the drafter's chains, corpus trees and auxiliary rows.

Shapes: B rows, N nodes of a tree, T tokens of a text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import specdec
from drafters.automaton import SuffixAutomaton
from drafters.datastore import Datastore, Meta, sort_suffixes
from drafters.draft_model import SHAPES, DraftModel
from drafters.none import NoDrafter
from drafters.prompt_lookup import PromptLookup
from drafters.suffix_automaton import SamDecoding
from drafters.token_recycling import TokenRecycling
from drafters.tries import by_row, chain_nodes, most_frequent
from specdec.build import build_drafter
from specdec.demo.heldout import heldout_functions
from specdec.interfaces import DecodeState, History, Prefill, Verification
from specdec.loading import demo_target
from specdec.metrics import SpeculationStats, ends_in_loop
from specdec.templates import chain_paths
from specdec.tree import PADDING, Draws, TokenTree, Topology, pad_rows
from test_acceptance import random_tree
from test_contract import generate, model_of, prompts
from zoo import VOCAB, untrained


def brute_force(text: list[int]) -> tuple[int, int]:
    """By the definition: length of the longest suffix that occurred before, and the last place where it ended."""
    for size in range(len(text) - 1, 0, -1):
        for end in range(len(text) - 2, size - 2, -1):
            if text[end - size + 1 : end + 1] == text[len(text) - size :]:
                return size, end
    return 0, -1


@pytest.mark.parametrize("symbols", [1, 2, 3, 8])
def test_match_equals_brute_force_after_every_token(symbols: int) -> None:
    source = random.Random(symbols)
    matched = 0
    for size in range(60):
        text = [source.randrange(symbols) for _ in range(size)]
        automaton = SuffixAutomaton()
        for count in range(1, size + 1):
            automaton.extend(text[count - 1 : count])
            length, end = brute_force(text[:count])
            assert automaton.match_length == length, text[:count]
            assert length == 0 or automaton.match_end == end, text[:count]
            matched += length > 0
        whole = SuffixAutomaton()
        whole.extend(text)
        assert (whole.match_length, whole.text) == (automaton.match_length, text)
        assert whole.num_states <= max(2 * size, 2)
    assert matched > 500


def accepts(automaton: SuffixAutomaton, word: list[int]) -> bool:
    state = 0
    for token in word:
        if token not in automaton._next[state]:
            return False
        state = automaton._next[state][token]
    return True


def test_it_accepts_the_substrings_and_nothing_else() -> None:
    source = random.Random(5)
    for _ in range(30):
        text = [source.randrange(3) for _ in range(14)]
        automaton = SuffixAutomaton()
        automaton.extend(text)
        inside = {tuple(text[i:j]) for i in range(15) for j in range(i, 15)}
        for _ in range(300):
            word = [source.randrange(3) for _ in range(source.randrange(8))]
            assert accepts(automaton, word) == (tuple(word) in inside)


@pytest.mark.parametrize(
    "text", [[1] * 4000, [1, 2, 3] * 1400, list(range(4000)), [0, 1, 1] * 700 + [5] + [0, 1] * 900]
)
def test_work_per_token_is_bounded(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    assert automaton.num_states <= 2 * len(text)
    assert sum(map(len, automaton._next)) <= 3 * len(text)
    # Deep inside a loop the recency of short matches is given up, never the truth of the occurrence.
    length, end = automaton.match_length, automaton.match_end
    assert length == 0 or text[end - length + 1 : end + 1] == text[len(text) - length :]
    assert end < len(text) - 1


def test_continuation_copies_and_goes_on_in_a_repetition() -> None:
    automaton = SuffixAutomaton()
    assert automaton.continuation(4) == []
    automaton.extend([5, 6, 7, 8, 5, 6])
    assert automaton.continuation(3) == [7, 8, 5]
    assert automaton.continuation(9) == [7, 8, 5, 6, 7, 8, 5, 6, 7]
    automaton.extend([6])
    assert automaton.continuation(5) == [6, 6, 6, 6, 6]
    automaton.extend([9])
    assert automaton.continuation(5) == []


def state_of(rows: list[list[int]], finished: list[bool] | None = None) -> DecodeState:
    finished = finished or [False] * len(rows)
    root = torch.tensor([row[-1] for row in rows])
    return DecodeState(None, History(rows), root, [1] * len(rows), finished, torch.Generator())  # type: ignore[arg-type]


def begun(drafter: SamDecoding, state: DecodeState) -> SamDecoding:
    drafter.start(state, Prefill(torch.zeros(state.batch_size, 0, dtype=torch.int64), [0] * state.batch_size))
    return drafter


def known(tree: TokenTree) -> list[list[int]]:
    tree.check()
    role = torch.zeros_like(tree.token_ids) if tree.role is None else tree.role
    return tree.token_ids.where(role != PADDING, -1).tolist()


def test_a_chain_per_row_as_long_as_its_match_allows() -> None:
    rows = [[5, 6, 7, 8, 9, 5, 6], [1, 2, 3, 1], [1, 2, 3], [5, 6, 5, 6]]
    state = state_of(rows, [False, False, False, True])
    drafter = begun(SamDecoding(num_draft_tokens=4, length_factor=1.0), state)
    assert known(drafter.propose(state)) == [[6, 7, 8, 9], [1, 2, 3, -1], [3, -1, -1, -1], [6, -1, -1, -1]]
    drafter = begun(SamDecoding(num_draft_tokens=2, min_match=2), state)
    assert known(drafter.propose(state)) == [[6, 7, 8], [1, -1, -1], [3, -1, -1], [6, -1, -1]]


def test_the_longest_draft_may_change_between_steps() -> None:
    state = state_of([[5, 6, 7, 8, 9, 5, 6], [1, 2, 3, 1]])
    drafter = begun(SamDecoding(length_factor=2.0), state)
    assert (drafter.widest, drafter.deepest, drafter.tree_paths) == (1, None, chain_paths(10))
    # Matches of two tokens and of one: they allow 5 and 3 tokens, of which the longest draft leaves some.
    drafts = {
        1: [[6, 7], [1, 2]],
        9: [[6, 7, 8, 9, 5, 6], [1, 2, 3, 1, -1, -1]],
        4: [[6, 7, 8, 9, 5], [1, 2, 3, 1, -1]],
    }
    for longest, expected in drafts.items():
        drafter.reshape(chain_paths(longest))
        assert known(drafter.propose(state)) == expected
        assert (drafter.tree_paths, drafter.needs.max_nodes) == (chain_paths(longest), longest + 1)


def test_only_copies_from_the_text_have_a_length_to_choose() -> None:
    with_corpus = SamDecoding()
    with_corpus.corpus = corpus([[1, 2, 3]])
    for drafter in (with_corpus, SamDecoding(auxiliary=TokenRecycling())):
        assert (drafter.widest, drafter.tree_paths) == (0, [])
        before = drafter.needs
        with pytest.raises(ValueError, match="expected path=null and auxiliary=null"):
            drafter.reshape(chain_paths(3))
        assert (drafter.num_draft_tokens, drafter.needs) == (10, before)


def test_the_automata_follow_the_text() -> None:
    state = state_of([[5, 6, 7], [1, 2, 3]])
    drafter = begun(SamDecoding(num_draft_tokens=2), state)
    assert drafter.propose(state).num_nodes == 1
    for row, token in enumerate([5, 1]):
        state.history.append(row, [9, token])
    state.root = torch.tensor([5, 1])
    assert known(drafter.propose(state)) == [[5, 6, 7], [1, 2, 3]]
    begun(drafter, state_of([[1]]))
    assert drafter.propose(state_of([[5]])).num_nodes == 1, "another request, another text"


def corpus(documents: list[list[int]], vocab_size: int = VOCAB) -> Datastore:
    tokens = np.array([token for document in documents for token in [*(t + 1 for t in document), 0]], dtype=np.uint16)
    meta = Meta("test", vocab_size, "", 1, len(tokens) - len(documents), len(documents))
    return Datastore(meta, [(tokens, sort_suffixes(tokens))])


def test_the_corpus_gives_a_tree_by_counts() -> None:
    documents = [[1, 2, 3, 4, 5]] * 3 + [[1, 2, 3, 6, 7]] * 2 + [[1, 2, 3, 4, 8]]
    drafter = SamDecoding(num_draft_tokens=4, static_bias=1, length_factor=9.0)
    drafter.corpus = corpus(documents)
    state = state_of([[9, 1, 2, 3], [3, 50, 1, 2, 3], [9, 9], [2, 3, 77, 2, 3]])
    tree = begun(drafter, state).propose(state)
    # Counts: 4 four times, 4 5 three times, 6 and 6 7 twice. The corpus matches 3 tokens in rows 0 and 1, the text 1 in
    # row 1; rows 2 and 3 have the text's match alone, or one that the corpus does not beat.
    assert known(tree) == [[3, 4, 6, 5, 7], [3, 4, 6, 5, 7], [9] * 5, [3, 77, 2, 3, 77]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 2]] * 2 + [[0, 0, 1, 2, 3]] * 2
    drafter.static_bias = 5
    assert known(begun(drafter, state).propose(state))[1] == [3, 50, 1, 2, 3], "now the text's match counts for more"


def test_sequences_of_equal_counts_are_closed_trees() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        rows = generator.integers(3, size=(generator.integers(1, 30), generator.integers(1, 6)))
        rows[np.logical_or.accumulate(generator.random(rows.shape) < 0.15, axis=1)] = -1
        budget = int(generator.integers(1, 20))
        counts: dict[tuple[int, ...], int] = {}
        for row in rows.tolist():
            for size in range(1, len(row) + 1):
                if row[size - 1] >= 0:
                    counts[tuple(row[:size])] = counts.get(tuple(row[:size]), 0) + 1
        tokens, parents = most_frequent(rows, budget)
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(tokens, parents, strict=True):
            paths.append((*paths[parent], token))
        assert len(set(paths)) == len(paths)
        best = sorted(counts.values(), reverse=True)[:budget]
        assert sorted((counts[path] for path in paths[1:]), reverse=True) == best


def test_short_matches_go_to_the_auxiliary_drafter() -> None:
    drafter = SamDecoding(num_draft_tokens=3, auxiliary=PromptLookup(4), auxiliary_below=2)
    rows = [[5, 6, 7, 8, 5, 6], [1, 2, 3, 1], [1, 2, 3], [1, 2, 1]]
    state = state_of(rows, [False, False, False, True])
    tree = begun(drafter, state).propose(state)
    assert known(tree) == [[6, 7, 8, 5], [1, 2, 3, 1], [3, -1, -1, -1], [1, -1, -1, -1]]
    assert tree.sources == ("suffix_automaton", "prompt_lookup")
    assert tree.source is not None
    assert tree.source[:2].tolist() == [[0] * 4, [1] * 4]
    alone = state_of(rows[1:3])
    assert begun(drafter, alone).propose(alone).sources == ("prompt_lookup",), "asked alone where no match is long"
    alone = state_of(rows[:1])
    assert begun(drafter, alone).propose(alone).sources == ("suffix_automaton",), "not asked where all are"


def test_rows_of_two_trees_in_one() -> None:
    for seed in range(30):
        trees = [random_tree(2 * seed + i, batch=4, shared=seed % 2 == i, roles=i == 1) for i in (0, 1)]
        takes = [bool(seed >> row & 1) for row in range(4)]
        if len(set(takes)) == 1:
            continue
        mixed = by_row(trees[0], trees[1], takes, NoDrafter())
        for row, first in enumerate(takes):
            tree = trees[0] if first else trees[1]
            size = tree.num_nodes
            role = torch.zeros_like(tree.token_ids) if tree.role is None else tree.role
            assert mixed.role is not None
            assert torch.equal(mixed.token_ids[row, :size], tree.token_ids[row])
            assert torch.equal(mixed.parents[row, :size], tree.parents[row])
            assert torch.equal(mixed.role[row, :size], role[row])
            assert bool((mixed.role[row, size:] == PADDING).all())
        assert mixed.topology.max_depth >= int(mixed.topology.depths.max())


def test_trees_that_cannot_share_a_pass_are_refused() -> None:
    tree = TokenTree(torch.tensor([[1, 2], [1, 2]]), Topology(torch.zeros(1, 2, dtype=torch.int64), 1))
    none = torch.zeros(2, 1, dtype=torch.int64)
    sampled = replace(tree, draws=Draws(none, none, none, torch.ones(2, 1, 5)))
    begun_inside = replace(tree, entry=(1, torch.zeros(2, 2, 4)))
    for other in (sampled, begun_inside):
        with pytest.raises(ValueError, match="'none' proposes trees that cannot share"):
            by_row(tree, other, [True, False], NoDrafter())


@pytest.mark.parametrize("auxiliary", ["token_recycling", "lookahead", "prompt_lookup"])
@pytest.mark.parametrize("batch", [1, 3])
def test_hybrid_keeps_the_text(auxiliary: str, batch: int) -> None:
    model, inputs = model_of("llama"), prompts(batch)
    drafter = build_drafter("suffix_automaton", auxiliary=auxiliary, auxiliary_below=2)
    expected, _ = generate(model, "none", inputs)
    output, trace = generate(model, drafter, inputs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    used = {source for step in trace.steps if step.tree is not None for source in step.tree.sources}
    assert used - {"draft"} == {"suffix_automaton", auxiliary}, "(a tree without proposals has no author)"


class Watched(DraftModel):
    """Compares the follower's K/V with those of a fresh pass over what it has read."""

    compared = 0

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
        super().update(state, tree, verification)
        assert self.follower is not None and self.follower.context is not None  # noqa: PT018
        context, model = self.follower.context, self.follower.target.model
        for row, length in enumerate(context.lengths):
            if verification.finished[row]:
                continue
            text = state.history.row(row)
            assert length < len(text)
            ids = torch.from_numpy(text[:length].copy())[None]
            fresh = model(input_ids=ids, use_cache=True).past_key_values.layers
            for mine, expected in zip(context.cache.layers, fresh, strict=True):
                torch.testing.assert_close(mine.keys[row, :, :length], expected.keys[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(mine.values[row, :, :length], expected.values[0], rtol=1e-4, atol=1e-4)
            self.compared += 1


@untrained("draft_model")
@pytest.mark.parametrize("auxiliary", ["early_exit", "swift", "top_k", "chain", "rsd_c"])
def test_hybrid_with_drafters_that_run_a_model(auxiliary: str) -> None:
    model, inputs = model_of("llama"), prompts(3)
    shaped = auxiliary in SHAPES
    theirs = Watched(shape=auxiliary) if shaped else build_drafter(auxiliary)
    drafter = SamDecoding(auxiliary=theirs, auxiliary_below=2)
    expected, _ = generate(model, "none", inputs)
    output, trace = generate(model, drafter, inputs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    kinds = {step.tree.sources for step in trace.steps if step.tree is not None}
    assert (theirs.name,) in kinds
    assert drafter._together == (auxiliary == "early_exit")
    assert drafter._together or ("suffix_automaton", theirs.name) in kinds
    generate(model, drafter, inputs, do_sample=True, top_k=8)
    assert drafter._together == (auxiliary in ("early_exit", "chain", "rsd_c"))
    assert not isinstance(theirs, Watched) or theirs.compared > 20


@untrained("draft_model")
@pytest.mark.parametrize("mixed", [True, False])
def test_nodes_of_others_are_not_taken_for_ones_own(mixed: bool) -> None:
    """Beside, or instead of, a draft of one node stands the text that plain decoding writes."""
    model, inputs = model_of("llama"), prompts(3)
    expected = generate(model, "none", inputs)[0].sequences.tolist()
    texts = [row[inputs["input_ids"].shape[1] :] for row in expected]

    class Beside(Watched):
        def propose(self, state: DecodeState) -> TokenTree:
            served = [done or row == 0 or not mixed for row, done in enumerate(state.finished)]
            asked = replace(state, finished=served if mixed else state.finished)
            theirs = None if all(asked.finished) else super().propose(asked)
            right = [texts[row][count : count + 4] for row, count in enumerate(state.emitted)]
            rows = [chain_nodes([] if done else right[row]) for row, done in enumerate(state.finished)]
            ours = pad_rows(state.root, [ids for ids, _ in rows], [above for _, above in rows], ("text",))
            return ours if theirs is None or not mixed else by_row(ours, theirs, served, self)

    drafter = Beside(shape="chain", depth=1)
    assert generate(model, drafter, inputs)[0].sequences.tolist() == expected
    assert drafter.compared > 3


def test_rows_go_together_where_trees_cannot_share() -> None:
    class Sampled(NoDrafter):
        asked: ClassVar[list[list[bool]]] = []

        def propose(self, state: DecodeState) -> TokenTree:
            self.asked.append(state.finished)
            none = torch.full((state.batch_size, 1), -1)
            return replace(super().propose(state), draws=Draws(none, none, none, torch.ones(state.batch_size, 1, 5)))

    drafter = SamDecoding(auxiliary=Sampled(), auxiliary_below=2)
    state = state_of([[5, 6, 7, 5, 6], [1, 2, 3]])
    begun(drafter, state)
    assert all(drafter.propose(state).draws is not None for _ in range(2))
    assert Sampled.asked == [[True, False], [False, False]], "from then on for all rows"
    ours = state_of([[5, 6, 7, 5, 6], [1, 2, 1, 2]])
    assert begun(drafter, ours).propose(ours).sources == ("suffix_automaton",)


def test_the_auxiliary_drafter_learns_forgets_and_is_saved() -> None:
    model, inputs = model_of("llama"), prompts(1)
    drafter = build_drafter("suffix_automaton", auxiliary="token_recycling")
    assert isinstance(drafter, SamDecoding)
    assert isinstance(drafter.auxiliary, TokenRecycling)
    assert drafter.needs.prompt_top_k == 8
    assert drafter.needs.max_nodes == 25
    generate(model, drafter, inputs)
    saved = drafter.state_dict()
    assert bool((saved["auxiliary"]["matrix"] >= 0).any())
    drafter.reset()
    assert bool((drafter.state_dict()["auxiliary"]["matrix"] < 0).all())
    drafter.load_state_dict(saved)
    assert torch.equal(drafter.state_dict()["auxiliary"]["matrix"], saved["auxiliary"]["matrix"])
    with pytest.raises(ValueError, match=r"expected a state with \['auxiliary'\]"):
        drafter.load_state_dict({})


def test_an_auxiliary_is_given_by_name_by_config_or_built() -> None:
    by_name = build_drafter("suffix_automaton", auxiliary="rest")
    nested = {"_target_": "drafters.suffix_automaton.SamDecoding", "auxiliary": "token_recycling"}
    by_config = build_drafter("suffix_automaton", auxiliary=nested)
    assert isinstance(by_name, SamDecoding) and by_name.auxiliary is not None  # noqa: PT018
    assert by_name.auxiliary.name == "rest"
    assert isinstance(by_config, SamDecoding) and isinstance(by_config.auxiliary, SamDecoding)  # noqa: PT018
    assert isinstance(by_config.auxiliary.auxiliary, TokenRecycling)
    assert isinstance(SamDecoding(auxiliary=PromptLookup()).auxiliary, PromptLookup)
    with pytest.raises(ValueError, match="unknown drafter 'tokn'; known: "):
        build_drafter("suffix_automaton", auxiliary="tokn")
    with pytest.raises(ValueError, match="expected a drafter"):
        SamDecoding(auxiliary=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"num_draft_tokens": 0}, {"length_factor": -1.0}, {"min_match": 0}, {"min_match": 17}]
)
def test_settings_that_allow_no_draft(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected num_draft_tokens >= 1"):
        SamDecoding(**settings)


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no datastore in .*gone.*build_datastore"):
        SamDecoding(path=str(tmp_path / "gone"))


def passes_needed(draft: Callable[[list[int]], list[int]], text: list[int], start: int) -> int:
    """Verifications until ``text`` is written, from ``start`` on, when ``draft`` proposes what follows a prefix."""
    at, passes = start + 1, 0
    while at < len(text):
        chain, right = draft(text[:at]), 0
        while right < min(len(chain), len(text) - at) and chain[right] == text[at + right]:
            right += 1
        passes, at = passes + 1, at + right + 1
    return passes


def test_accepts_as_many_as_prompt_lookup() -> None:
    """On known texts, held-out functions: with chains of up to 10 tokens, and with chains of equal length."""
    loaded = demo_target("float32")
    lookup = PromptLookup()
    theirs = ours = equal = 0
    for function in heldout_functions()[:40]:
        prompt = loaded.encode(function.request)[0].tolist()
        text = [*prompt, *loaded.tokenizer(function.source)["input_ids"]]

        def looked_up(known: list[int]) -> list[int]:
            return lookup.lookup(np.array(known)).tolist()

        def retrieved(known: list[int], automaton: SuffixAutomaton, like: bool) -> list[int]:
            automaton.extend(known[len(automaton.text) :])
            return automaton.continuation(len(looked_up(known)) if like else 10)

        theirs += passes_needed(looked_up, text, len(prompt))
        ours += passes_needed(partial(retrieved, automaton=SuffixAutomaton(), like=False), text, len(prompt))
        equal += passes_needed(partial(retrieved, automaton=SuffixAutomaton(), like=True), text, len(prompt))
    assert theirs > 700
    assert ours <= equal <= theirs, "fewer passes for the same text"


@pytest.mark.slow
def test_accepts_as_many_as_prompt_lookup_on_the_demo_target() -> None:
    """Its own text on held-out functions, both drafting up to 10 tokens, through the real loop."""
    loaded = demo_target("float32")
    functions = heldout_functions()
    totals = {"prompt_lookup": SpeculationStats(), "suffix_automaton": SpeculationStats()}
    for function in functions[:: len(functions) // 12][:12]:
        ids = loaded.encode(function.request)
        for name, total in totals.items():
            specdec.speculate(loaded.model, name)
            text = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=96)
            if not ends_in_loop(text[0, ids.shape[1] :].tolist()):
                total += specdec.speculation_of(loaded.model).last
            specdec.restore(loaded.model)
    ours, theirs = totals["suffix_automaton"], totals["prompt_lookup"]
    assert ours.emitted_tokens == theirs.emitted_tokens > 300
    assert ours.mean_accepted_tokens >= theirs.mean_accepted_tokens
