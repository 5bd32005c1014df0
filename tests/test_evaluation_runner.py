"""The run itself, on a tiny target with the embedded one's tokenizer: the same prompts for all, states, errors,
interruptions, what is written.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specdec.build import build_drafter, build_verifier
from specdec.evaluation import records
from specdec.evaluation.data import Question, demo
from specdec.evaluation.losslessness import Judge
from specdec.evaluation.methods import Batch, Method, Speculating, Transformers, _shares
from specdec.evaluation.progress import Progress
from specdec.evaluation.records import Answer, RunRecords, Variant
from specdec.evaluation.runner import Plan, Runner, Setting, batches
from specdec.evaluation.store import RunFolder
from specdec.evaluation.summary import summarise
from specdec.evaluation.text import pieces
from specdec.generation import attach, restore, speculation_of, using
from specdec.interfaces import DecodeState, Drafter
from specdec.loading import DEMO_FOLDER, Loaded, demo_target
from specdec.tree import TokenTree, chain

EOS = {0}
TOKENS = 10
QUESTIONS = [question for question in demo() if len(question.turns) == 1][:3]
TALK = Question("talk", "code", ("Write a Python function `f(x)`: Return x.", "Now return 2."))
NONE, WARM, COLD = Variant("none", "plain"), Variant("tr", "drafter", "warm"), Variant("tr", "drafter", "cold")


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    model = tiny()
    yield Loaded(model, AutoTokenizer.from_pretrained(str(DEMO_FOLDER)), "tiny")
    restore(model)


def tiny() -> Any:
    """Always the same; its text depends on the prompt, and no two of its logits are close."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.4,
        eos_token_id=0,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def method(loaded: Loaded, name: str, drafter: str | Drafter, state: str = "all") -> Speculating:
    attach(loaded.model, build_drafter(drafter), build_verifier("tree_attention"))
    made = Speculating(name, loaded.model, speculation_of(loaded.model), EOS, "plain" if name == "none" else "drafter")
    made.state = state
    restore(loaded.model)
    return made


def standard(loaded: Loaded) -> list[Method]:
    return [
        method(loaded, "none", "none"),
        Transformers(loaded.model, EOS, "transformers"),
        method(loaded, "tr", "token_recycling", "warm"),
        method(loaded, "tr", "token_recycling", "cold"),
    ]


def run(
    loaded: Loaded, methods: Sequence[Method], folder: Path, questions: Sequence[Question] = QUESTIONS, **plan: Any
) -> tuple[RunRecords, Runner, str]:
    said = io.StringIO()
    settings = Plan(**{"max_new_tokens": TOKENS, "warmup": 0, **plan})
    with Progress(Console(file=said, width=200)) as progress:
        runner = Runner(loaded, lambda _: methods, settings, RunFolder(folder), progress)
        runner.run(questions)
    return records.read_run(folder), runner, said.getvalue()


def ids(answers: dict[int | str, Answer]) -> dict[int | str, list[list[int]]]:
    return {identity: answer.choices[0].ids for identity, answer in answers.items()}


def test_every_method_answers_every_question_alike(loaded: Loaded, tmp_path: Path) -> None:
    made, runner, said = run(loaded, standard(loaded), tmp_path, [*QUESTIONS, TALK], repeats=2)
    assert runner.failures == 0
    assert "4 questions, 4 methods" in said
    variants = [NONE, Variant("transformers", "transformers"), WARM, COLD]
    assert set(made.answers) == set(variants)
    assert not made.failed
    for variant in variants:
        assert ids(made.answers[variant]) == ids(made.answers[NONE])
        for answer in made.answers[variant].values():
            turns = 2 if answer.question_id == "talk" else 1
            assert [len(choice.turns) for choice in answer.choices] == [turns, turns]
            for choice in answer.choices:
                check_choice(variant, choice)
    plain = loaded.encode(QUESTIONS[0].turns[0])
    expected = loaded.model.generate(
        plain, attention_mask=torch.ones_like(plain), max_new_tokens=TOKENS, do_sample=False
    )
    assert made.answers[WARM][QUESTIONS[0].question_id].choices[0].ids == [expected[0, plain.shape[1] :].tolist()]


def check_choice(variant: Variant, choice: records.Choice) -> None:
    for turn, text in enumerate(choice.turns):
        assert "".join(piece for piece, _ in choice.tokens[turn]) == text
        assert choice.new_tokens[turn] == len(choice.ids[turn]) == len(choice.tokens[turn])
        assert 0 < choice.prefill_time[turn] < choice.wall_time[turn]
    assert sum(choice.new_tokens) == sum(choice.accept_lengths) + len(choice.turns), "the prefill emits one per turn"
    assert choice.identical == [None if variant.method == "transformers" else "identical"] * len(choice.turns)
    sources = [source for turn in choice.tokens for _, source in turn]
    assert sources[0] == "prefill"
    assert set(sources) <= {"prefill", "target", "token_recycling"}
    if variant.method == "tr":
        drafted = sum(length - 1 for length in choice.accept_lengths)
        assert sources.count("token_recycling") == drafted


def test_traces_agree_with_answers(loaded: Loaded, tmp_path: Path) -> None:
    made, _, _ = run(loaded, standard(loaded), tmp_path, [*QUESTIONS, TALK])
    for variant in (NONE, WARM, COLD):
        traced = {(trace.question_id, trace.turn): trace for trace in made.steps[variant]}
        for answer in made.answers[variant].values():
            (choice,) = answer.choices
            lengths = []
            for turn, steps in enumerate(choice.decoding_steps):
                trace = traced[answer.question_id, turn]
                assert steps == len(trace.accepted) == len(trace.drafted) == len(trace.ranks) == len(trace.computed)
                assert trace.drafted == [sum(by_depth) for by_depth in trace.offered]
                assert [len(ranks) for ranks in trace.ranks] == trace.accepted
                assert all(rank >= 0 for ranks in trace.ranks for rank in ranks)
                phases = [trace.seconds["prefill"], *(sum(trace.seconds[p]) for p in ("draft", "verify", "commit"))]
                assert 0 < sum(phases) < choice.wall_time[turn]
                lengths += [accepted + 1 for accepted in trace.accepted]
            assert lengths == choice.accept_lengths
    assert not (tmp_path / "steps" / "transformers.jsonl").exists()


def test_the_second_turn_holds_the_first_answer(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    plain = loaded.encode

    def noted(_: Loaded, prompt: Any, chat: bool | None = None) -> Any:
        asked.append([*prompt])
        return plain(prompt, chat)

    monkeypatch.setattr(Loaded, "encode", noted)
    made, _, _ = run(loaded, standard(loaded), tmp_path, [TALK])
    answer = made.answers[NONE]["talk"].choices[0].turns[0]
    roles = [(message["role"], message["content"]) for message in asked[-1]]
    assert roles == [("user", TALK.turns[0]), ("assistant", answer), ("user", TALK.turns[1])]


def test_plain_concatenation_without_a_template(loaded: Loaded, tmp_path: Path) -> None:
    made, _, _ = run(loaded, standard(loaded), tmp_path, [TALK], chat=False)
    answer = made.answers[NONE]["talk"].choices[0].turns
    prompt = loaded.encode("\n".join([TALK.turns[0], answer[0], TALK.turns[1]]), chat=False)
    expected = loaded.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS)
    assert made.answers[WARM]["talk"].choices[0].ids[1] == expected[0, prompt.shape[1] :].tolist()


def test_cold_forgets_and_warm_does_not(loaded: Loaded, tmp_path: Path) -> None:
    first = QUESTIONS[0]
    twice = [first, replace(first, question_id="again")]
    made, _, _ = run(loaded, standard(loaded), tmp_path, twice, repeats=2)

    def steps(variant: Variant, identity: int | str) -> list[int]:
        return [choice.decoding_steps[0] for choice in made.answers[variant][identity].choices]

    assert steps(COLD, first.question_id) == steps(COLD, "again")
    assert steps(WARM, first.question_id) == steps(COLD, first.question_id), "nothing was learnt before"
    assert max(steps(WARM, "again")) < min(steps(WARM, first.question_id))
    assert len(set(steps(WARM, "again"))) == 1, "a repeat does not remember its own answer"


def test_batches(loaded: Loaded, tmp_path: Path) -> None:
    """Ragged ones, of questions with one turn and with two; times are shares of a call."""
    questions = [*QUESTIONS, TALK]
    single, _, _ = run(loaded, standard(loaded), tmp_path / "1", questions)
    made, _, _ = run(loaded, standard(loaded), tmp_path / "3", questions, settings=[Setting(0.0, 3)])
    for variant in made.answers:
        assert variant.batch_size == 3
        assert ids(made.answers[variant]) == ids(single.answers[NONE])
    total = {phase: 0.0 for phase in ("draft", "verify", "commit")}
    warm = replace(WARM, batch_size=3)
    for trace in made.steps[warm]:
        for phase in total:
            total[phase] += sum(trace.seconds[phase])
    assert sum(total.values()) < sum(sum(a.choices[0].wall_time) for a in made.answers[warm].values())
    assert all(
        choice.identical == ["identical"] * len(choice.turns)
        for a in made.answers[warm].values()
        for choice in a.choices
    )


def test_a_text_that_ends_early_does_not_pay_for_the_others(loaded: Loaded) -> None:
    prompts = [loaded.encode(question.turns[0]) for question in QUESTIONS[:2]]
    free = standard(loaded)[0].generate(Batch.of(prompts, 2), {"max_new_tokens": TOKENS, "do_sample": False})
    stop = next(token for token in free[0].ids[1:4] if token not in free[1].ids)
    for each in standard(loaded):
        each.eos_ids = {stop}  # type: ignore[attr-defined]
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": stop}
        short, long = each.generate(Batch.of(prompts, 2), options)
        assert len(short.ids) < len(long.ids)
        assert short.seconds < long.seconds
        assert short.prefill_seconds == long.prefill_seconds < short.seconds
    assert _shares([3, 1]) == pytest.approx([2.5 / 3, 0.5 / 3])
    assert _shares([0, -1]) == [0.5, 0.5]


def test_batches_are_of_one_category() -> None:
    questions = [Question(number, category, ("x",)) for number, category in enumerate("abaabcb")]
    groups = [[question.question_id for question in group] for group in batches(questions, 2)]
    assert groups == [[0, 2], [1, 4], [3], [5], [6]]
    assert batches(questions, 1) == [[question] for question in questions]


def test_sampling_is_the_same_for_all_of_our_methods(loaded: Loaded, tmp_path: Path) -> None:
    settings = [Setting(1.0, 1)]
    made, _, _ = run(loaded, standard(loaded), tmp_path / "a", settings=settings, options={"top_p": 0.9}, repeats=2)
    plain, warm = (made.answers[replace(variant, temperature=1.0)] for variant in (NONE, WARM))
    assert ids(plain) == ids(warm)
    greedy, _, _ = run(loaded, standard(loaded), tmp_path / "b")
    assert ids(plain) != ids(greedy.answers[NONE])
    other, _, _ = run(loaded, standard(loaded), tmp_path / "c", settings=settings, options={"top_p": 0.9}, seed=1)
    assert ids(plain) != ids(other.answers[replace(NONE, temperature=1.0)])
    for answer in warm.values():
        assert answer.choices[0].ids == answer.choices[1].ids, "repeats are for the clock"
        assert answer.choices[0].identical == [None]


def test_transformers_own_speculation(loaded: Loaded, tmp_path: Path) -> None:
    lookup = Transformers(loaded.model, EOS, "transformers_prompt_lookup", {"prompt_lookup_num_tokens": 5})
    assistant = tiny()
    before = assistant.generation_config.to_dict()
    helped = Transformers(loaded.model, EOS, "transformers_assistant", {"assistant_model": assistant})
    made, _, _ = run(loaded, [*standard(loaded)[:2], lookup, helped], tmp_path)
    for name in ("transformers_prompt_lookup", "transformers_assistant"):
        answers = made.answers[Variant(name, name)]
        assert ids(answers) == ids(made.answers[NONE])
        for answer in answers.values():
            (choice,) = answer.choices
            assert sum(choice.accept_lengths) == choice.new_tokens[0], "the prompt's pass verifies too"
            assert choice.identical == ["identical"]
    assert max(choice.accept_lengths[0] for a in answers.values() for choice in a.choices) > 1
    helped.forget()
    assert assistant.generation_config.to_dict() == before, "its schedule starts from the same place for every prompt"
    rows = {row.drafter: row for row in summarise(tmp_path, {}).rows if row.task == "overall" and row.subset == "all"}
    assert (rows["transformers_assistant"].mean_accepted_tokens or 0) >= 2
    assert rows["transformers_assistant"].decode_tokens_per_second is None


class Failing:
    """Raises on the prompt that holds a certain token sequence; else drafts nothing."""

    def __init__(self, at: int) -> None:
        self.inner, self.at, self.calls = build_drafter("none"), at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def propose(self, state: DecodeState) -> TokenTree:
        if self.calls == self.at:
            raise RuntimeError("the drafter broke")
        return self.inner.propose(state)

    def start(self, *_: Any) -> None:
        self.calls += 1


def test_an_error_is_recorded_and_counts_for_nobody(loaded: Loaded, tmp_path: Path) -> None:
    methods = [*standard(loaded)[:2], method(loaded, "breaks", Failing(at=2))]
    made, runner, said = run(loaded, methods, tmp_path)
    bad = QUESTIONS[1].question_id
    assert runner.failures == 1
    assert f"breaks failed on {bad}: RuntimeError: the drafter broke" in said
    for variant in made.answers:
        assert set(made.answers[variant]) == {question.question_id for question in QUESTIONS} - {bad}
        assert set(made.failed[variant]) == {bad}
    broken = made.failed[Variant("breaks", "drafter")][bad]
    assert "RuntimeError: the drafter broke" in (broken.error or "")
    assert "Traceback" in (broken.error or "")
    assert made.failed[NONE][bad].error is None
    assert made.failed[NONE][bad].choices, "what the others said is kept"
    rows = summarise(tmp_path, {}).rows
    assert {row.rows for row in rows if row.task == "overall" and row.subset == "all"} == {2}
    repaired = [*standard(loaded)[:2], method(loaded, "breaks", "none")]
    again, runner, said = run(loaded, repaired, tmp_path)
    assert "3 questions, 2 of them finished before" in said
    assert not again.failed
    assert len(again.answers[NONE]) == 3


def test_where_nobody_gets_through_the_run_goes_on(loaded: Loaded, tmp_path: Path) -> None:
    made, runner, _ = run(loaded, [method(loaded, "breaks", Failing(at=1))], tmp_path, [TALK, *QUESTIONS])
    assert runner.failures == 1
    assert len(made.answers[Variant("breaks", "drafter")]) == 3


def test_a_prompt_beyond_the_context_is_skipped_and_named(loaded: Loaded, tmp_path: Path) -> None:
    long, grows = Question("long", "qa", ("a b " * 3000,)), Question("grows", "qa", ("hello", "a b " * 3000))
    almost = Question("almost", "qa", ("a " * 2040,))
    made, runner, said = run(loaded, standard(loaded), tmp_path, [long, grows, almost, QUESTIONS[0]])
    assert runner.failures == 0
    assert "question long, turn 1 skipped: the prompt has" in said
    assert "question grows, turn 2 skipped" in said
    assert set(made.answers[WARM]) == {"grows", QUESTIONS[0].question_id}
    assert len(made.answers[WARM]["grows"].choices[0].turns) == 1
    assert "turn 2: the prompt has" in made.answers[WARM]["grows"].skipped[0]
    assert f"may be answered with {TOKENS}" in made.failed[WARM]["almost"].skipped[0]
    rows = [row for row in summarise(tmp_path, {}).rows if row.task == "overall" and row.subset == "all"]
    assert {(row.skipped, row.failed, row.rows) for row in rows} == {(3, 0, 2)}
    _, _, said = run(loaded, standard(loaded), tmp_path, [long, grows, almost, QUESTIONS[0]])
    assert "4 of them finished before" in said, "skipping is an answer"


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = run(loaded, standard(loaded), tmp_path / "whole")
    generate, calls = Transformers.generate, [0]

    def interrupted(self: Transformers, batch: Batch, options: dict[str, Any]) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return generate(self, batch, options)

    monkeypatch.setattr(Transformers, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, standard(loaded), tmp_path / "cut")
    cut = records.read_run(tmp_path / "cut")
    assert set(cut.answers[WARM]) == {question.question_id for question in QUESTIONS[:2]}, "readable as it is"
    monkeypatch.setattr(Transformers, "generate", generate)
    resumed, _, said = run(loaded, standard(loaded), tmp_path / "cut")
    assert "3 questions, 2 of them finished before" in said
    for variant in whole.answers:
        assert ids(resumed.answers[variant]) == ids(whole.answers[variant])
    last = QUESTIONS[2].question_id
    taken, expected = (made.answers[WARM][last].choices[0].accept_lengths for made in (resumed, whole))
    assert taken == expected, "a warm drafter remembers what it had learnt"
    assert not (tmp_path / "cut" / "state").exists()


def test_methods_come_in_a_drawn_order(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods, order = standard(loaded), list[int]()
    for number, each in enumerate(methods):

        def noted(*arguments: Any, number: int = number, generate: Any = each.generate) -> Any:
            order.append(number)
            return generate(*arguments)

        monkeypatch.setattr(each, "generate", noted)
    run(loaded, methods, tmp_path)
    groups = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert [sorted(group) for group in groups] == [[0, 1, 2, 3]] * 3
    followers = {pair for group in groups for pair in pairwise(group)}
    assert len(followers) > 4, "a method does not always come after the same one"
    assert len({group[0] for group in groups}) > 1


def test_warming_up_is_not_counted_and_not_remembered(loaded: Loaded, tmp_path: Path) -> None:
    cold, _, _ = run(loaded, standard(loaded), tmp_path / "0", warmup=0)
    warm, _, _ = run(loaded, standard(loaded), tmp_path / "2", warmup=2)
    first = QUESTIONS[0].question_id
    steps = [made.answers[WARM][first].choices[0].accept_lengths for made in (cold, warm)]
    assert steps[0] == steps[1]


def test_a_method_that_cannot_run_says_so_at_once(loaded: Loaded, tmp_path: Path) -> None:
    class Picky(Failing):
        def propose(self, state: DecodeState) -> TokenTree:  # noqa: ARG002
            raise ValueError("only on Sundays")

    with pytest.raises(ValueError, match="picky cannot run: only on Sundays"):
        run(loaded, [method(loaded, "picky", Picky(0))], tmp_path, warmup=1)


class Liar:
    """Passes the target's text through, with one token changed by the method around it."""

    def __init__(self, inner: Speculating) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(self, batch: Batch, options: dict[str, Any]) -> Any:
        texts = self.inner.generate(batch, options)
        for text in texts:
            text.ids[3] = (text.ids[3] + 1) % 4096
        return texts


def test_a_wrong_token_is_a_bug(loaded: Loaded, tmp_path: Path) -> None:
    methods: list[Any] = [method(loaded, "none", "none"), Liar(method(loaded, "liar", "prompt_lookup"))]
    made, _, _ = run(loaded, methods, tmp_path)
    for answer in made.answers[Variant("liar", "drafter")].values():
        assert answer.choices[0].identical == ["bug"]
    rows = {row.drafter: row for row in summarise(tmp_path, {}).rows if row.task == "overall" and row.subset == "all"}
    assert (rows["liar"].bugs, rows["liar"].identical_rows) == (3, 0)


def test_a_near_tie_is_told_from_a_bug() -> None:
    """In bfloat16 the runner-up of a tie passes, a token that nobody would have chosen does not."""
    loaded = demo_target("bfloat16")
    prompt = loaded.encode(QUESTIONS[0].turns[0])
    options = {"max_new_tokens": 40, "do_sample": False}
    output = loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, output_logits=True, **options
    )
    plain = output.sequences[0, prompt.shape[1] :].tolist()
    best = torch.stack([step[0] for step in output.logits]).float().log_softmax(-1).topk(2)
    gaps = best.values[:, 0] - best.values[:, 1]
    judge = Judge(loaded.model, [prompt], options)
    assert judge.verdict(prompt, plain, plain) == "identical"
    far = int(gaps.argmax())
    assert judge.verdict(prompt, plain, [*plain[:far], int(best.indices[far, 1])]) == "bug"
    shortened = plain[:-1]
    assert judge.verdict(prompt, plain, shortened) == "bug"


def test_no_step_keeps_logits_alive(loaded: Loaded) -> None:
    """Observers hold references to what is written, not to a verification."""
    each = method(loaded, "tr", "token_recycling")
    prompt = loaded.encode("def f(x):")
    each.generate(Batch(prompt, torch.ones_like(prompt)), {"max_new_tokens": 20, "do_sample": False})
    gc.collect()
    wide = [
        thing
        for seen in each.tracer._seen
        for thing in vars(seen).values()
        if isinstance(thing, torch.Tensor) and thing.numel() >= loaded.model.config.vocab_size
    ]
    assert not wide


def test_sources_of_mixed_trees_are_told_apart(loaded: Loaded) -> None:
    """The first child is one drafter's, the second another's; the plain text says which is right."""
    prompt = loaded.encode("def add(a, b):")
    mask = torch.ones_like(prompt)
    text = loaded.model.generate(prompt, attention_mask=mask, max_new_tokens=8)[0, prompt.shape[1] :].tolist()

    class Mixed(Failing):
        def propose(self, state: DecodeState) -> TokenTree:
            position = state.emitted[0]
            rest = (text[position : position + 2] + [5, 5])[:2]
            ids = torch.tensor([[int(state.root[0]), *rest]])
            sources = ("left", "right")
            return TokenTree(
                ids, chain(3), source=torch.tensor([[0, 0, 1]]), sources=sources, rank=torch.tensor([[0, 3, 1]])
            )

    drafter = Mixed(-1)
    drafter.inner.needs = replace(drafter.inner.needs, max_nodes=3)
    each = method(loaded, "mixed", drafter)
    (measured,) = each.generate(Batch(prompt, mask), {"max_new_tokens": 7, "do_sample": False})
    assert measured.sources == ["prefill", "left", "right", "target", "left", "right", "target"]
    assert measured.trace is not None
    assert measured.trace.ranks == [[3, 1], [3, 1]]
    assert measured.accept_lengths == [3, 3]


def test_pieces_join_to_the_text(loaded: Loaded) -> None:
    for text in ("def f(x):\n    return x", "naïve – 🙂 café", ""):
        ids = loaded.tokenizer(text)["input_ids"] + [0]
        found = pieces(loaded.tokenizer, ids)
        assert len(found) == len(ids)
        assert "".join(found) == loaded.tokenizer.decode(ids, skip_special_tokens=True)


def test_progress_without_a_terminal_is_lines(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.evaluation.progress._LINE_EVERY", 0.0)
    _, _, said = run(loaded, standard(loaded), tmp_path)
    lines = [line for line in said.splitlines() if line.startswith("[")]
    assert [line.split("]")[0] for line in lines[:3]] == ["[1/3", "[2/3", "[3/3"]
    assert "left | none" in lines[0]
    assert "tok/s" in lines[0]
    assert "\x1b" not in said


def test_progress_on_a_terminal_is_a_table(loaded: Loaded, tmp_path: Path) -> None:
    said = io.StringIO()
    console = Console(file=said, width=120, force_terminal=True)
    with Progress(console) as progress:
        Runner(loaded, lambda _: standard(loaded), Plan(max_new_tokens=4), RunFolder(tmp_path), progress).run(QUESTIONS)
    shown = said.getvalue()
    assert "tr (warm)" in shown
    assert "3/3" in shown
    assert "accepted tokens" in shown


def test_using_puts_everything_back(loaded: Loaded) -> None:
    model = loaded.model
    first, second = method(loaded, "a", "none").handle, method(loaded, "b", "prompt_lookup").handle
    plain = type(model)
    with using(model, first):
        assert speculation_of(model) is first
        with using(model, second):
            assert speculation_of(model) is second
            with using(model, None), pytest.raises(ValueError, match="does not speculate"):
                speculation_of(model)
            assert speculation_of(model) is second
        assert speculation_of(model) is first
    assert type(model) is plain
    with pytest.raises(ValueError, match="attached to another model"), using(tiny(), first):
        pass
