"""The run: every method on every question in turn, so that whatever drifts hits all of them alike.

Order of things, outermost first: settings (temperature, batch size), groups of questions (a batch, all of one
category), repeats, turns, methods. Every group draws the order of methods, since who comes after whom matters too.
All methods get the same prompts: what goes into the next turn is the answer of the first method (the plain loop where
it is measured). Nothing but ``generate`` stands between two looks at a clock, and no graph is compiled or loaded
there: warming up makes what batches of this size and single rows need, and a call that made another one all the same
is asked again.
"""

from __future__ import annotations

import itertools
import random
import time
import traceback
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.evaluation.data import Question
from specdec.evaluation.losslessness import Judge
from specdec.evaluation.methods import Batch, Measured, Method
from specdec.evaluation.progress import Progress
from specdec.evaluation.records import WARM, Answer, Choice, StepTrace, Variant
from specdec.evaluation.store import RunFolder
from specdec.evaluation.text import pieces
from specdec.graphs.passes import as_made, makings
from specdec.loading import Loaded
from specdec.metrics import ends_in_loop

_CONTROLS = 3  # prompts from which the judge takes how far rounding moves a decision
_WARM_UP_TOKENS = 32
_SAVE_EVERY = 60.0  # seconds between two savings of what warm methods have learnt


@dataclass(frozen=True)
class Setting:
    """One temperature (0 = greedy) and one batch size."""

    temperature: float = 0.0
    batch_size: int = 1


@dataclass(frozen=True)
class Plan:
    """How the questions are asked.

    Attributes:
        settings: one pass over the questions each.
        max_new_tokens: per turn.
        options: keyword arguments of ``generate`` when sampling, such as ``top_p``.
        chat: put prompts into the chat template; None = where there is one.
        repeats: of every question; texts are the same, times may differ.
        warmup: calls per method and setting before anything is timed.
        seed: of sampling; each question and turn has its own, the same for all methods and repeats.
    """

    settings: Sequence[Setting] = (Setting(),)
    max_new_tokens: int = 128
    options: dict[str, Any] = field(default_factory=dict)
    chat: bool | None = None
    repeats: int = 1
    warmup: int = 1
    seed: int = 0

    def arguments(self, setting: Setting) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        sampled = setting.temperature > 0
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": sampled}
        return options | ({"temperature": setting.temperature, **self.options} if sampled else {})


@dataclass
class _Results:
    """What one method made of a group of questions."""

    answers: list[Answer]
    traces: list[StepTrace] = field(default_factory=list)
    error: str | None = None


@dataclass
class _Call:
    """A group of questions on its way through all methods.

    Attributes:
        setting, methods, group: who is asked what.
        before: what each warm method had learnt before.
        order: of the methods.
        prompts: ids ``[1, W]`` by question, turn and repeat.
        pieces: texts of tokens, by their ids.
        results: one per method.
    """

    setting: Setting
    methods: Sequence[Method]
    group: Sequence[Question]
    before: Sequence[dict[str, Any]]
    order: Sequence[int]
    prompts: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    pieces: dict[tuple[int, ...], list[str]] = field(default_factory=dict)
    results: list[_Results] = field(default_factory=list)

    def __post_init__(self) -> None:
        for method in self.methods:
            known: dict[str, Any] = {"method": method.name, "method_kind": method.kind, "state": method.state}
            known |= {"temperature": self.setting.temperature, "batch_size": self.setting.batch_size}
            known |= {"lossless": method.lossless}
            self.results.append(_Results([Answer(q.question_id, q.category, **known) for q in self.group]))


def variant_of(method: Method, setting: Setting) -> Variant:
    """What the files of a method under a setting are called by."""
    return Variant(method.name, method.kind, method.state, setting.temperature, setting.batch_size, method.lossless)


class Runner:
    """Asks all questions of all methods and writes down what came back.

    Args:
        loaded: the target with its tokenizer.
        methods: for a setting, the methods that can run under it; the first one that succeeds answers for the next
            turn, so the plain loop stands first.
        plan: how to ask.
        folder: where to write.
        progress: what a user sees meanwhile.
    """

    def __init__(
        self,
        loaded: Loaded,
        methods: Callable[[Setting], Sequence[Method]],
        plan: Plan,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.loaded, self.methods, self.plan, self.folder, self.progress = loaded, methods, plan, folder, progress
        self.failures = self.asked = 0
        pad = loaded.tokenizer.pad_token_id
        self._pad = next((token for token in (pad, loaded.tokenizer.eos_token_id) if token is not None), 0)
        loaded.encode("a", plan.chat)  # no chat template where one is asked for: every prompt would say so

    def run(self, questions: Sequence[Question]) -> None:
        """Ask everything that is not finished yet. Whatever stops it, what was written is whole."""
        for setting in self.plan.settings:
            methods, size = list(self.methods(setting)), setting.batch_size
            variants = [variant_of(method, setting) for method in methods]
            groups = batches(questions, size)
            done = self.folder.resume(variants, [[question.question_id for question in group] for group in groups])
            self.progress.start(setting, methods, len(questions), len(done))
            open_groups = [group for group in groups if group[0].question_id not in done]
            if open_groups:
                self._pass(setting, methods, open_groups, fresh=not done)
            self.folder.drop_state(variants)

    def _pass(
        self, setting: Setting, methods: Sequence[Method], groups: Sequence[Sequence[Question]], fresh: bool
    ) -> None:
        judge = Judge(self.loaded.model, self._prompts(groups)[:_CONTROLS], self.plan.arguments(setting))
        self._warm_up(setting, methods, groups)
        for method in methods:
            method.forget()
            saved = None if fresh else self.folder.load_state(variant_of(method, setting))
            if saved is not None:
                method.load_state_dict(saved)
        saved_at = time.monotonic()
        for number, group in enumerate(groups):
            before = [_learnt(method) for method in methods]
            try:
                order = random.Random(number).sample(range(len(methods)), len(methods))
                call = _Call(setting, methods, group, before, order)
                self._ask(call)
                if setting.temperature == 0:
                    _compare(call, judge)
                self._write(call)
            except BaseException:
                self._save(setting, methods, before)
                raise
            if time.monotonic() - saved_at > _SAVE_EVERY:
                self._save(setting, methods, [_learnt(method) for method in methods])
                saved_at = time.monotonic()

    def _prompts(self, groups: Sequence[Sequence[Question]]) -> list[Tensor]:
        """First turns that fit, for warming up and for controls."""
        prompts = []
        for question in (question for group in groups for question in group):
            encoded = self._encode([*question.history, _user(question.turns[0])])
            if isinstance(encoded, Tensor):
                prompts.append(encoded)
            if len(prompts) == max(_CONTROLS, len(groups[0])):
                break
        return prompts

    def _warm_up(self, setting: Setting, methods: Sequence[Method], groups: Sequence[Sequence[Question]]) -> None:
        """Untimed calls; the first passes of a process pay for its allocations and for graphs, and a wrong option shows
        here. A single row, which some group may come down to, has graphs of its own.
        """
        prompts = self._prompts(groups)[: setting.batch_size]
        counts = dict.fromkeys((len(prompts), 1))
        options = self.plan.arguments(setting)
        options["max_new_tokens"] = min(options["max_new_tokens"], _WARM_UP_TOKENS)
        for method in methods if prompts else ():
            try:
                for rows in itertools.islice(counts, 2 if method.compiled else 1):
                    for _ in range(self.plan.warmup):
                        method.warm_up(Batch.of(prompts[:rows], self._pad), options)
            except (ValueError, NotImplementedError) as error:
                raise ValueError(f"{method.name} cannot run: {error}") from error
            except Exception as error:  # noqa: BLE001 - a question's own failure is recorded when it is asked
                self.progress.note(f"{method.name} failed in the warm-up: {type(error).__name__}: {error}")

    def _encode(self, messages: Sequence[Mapping[str, str]]) -> Tensor | str:
        """Ids ``[1, W]``, or why prompt and answer do not fit."""
        try:
            ids = self.loaded.encode(messages, self.plan.chat)
        except ValueError as error:
            return str(error)
        context, wanted = self.loaded.context_length, ids.shape[1] + self.plan.max_new_tokens
        if context is not None and wanted > context:
            return (
                f"the prompt has {ids.shape[1]} tokens and may be answered with {self.plan.max_new_tokens}; "
                f"{self.loaded.name} holds {context}"
            )
        return ids

    def _ask(self, call: _Call) -> None:
        """All repeats of all turns of a group, of all methods."""
        for repeat in range(self.plan.repeats):
            for method, learnt in zip(call.methods, call.before, strict=True):
                if repeat and learnt:
                    method.load_state_dict(learnt)  # else it would remember its own answer
                method.begin()
            talks = {index: [*question.history] for index, question in enumerate(call.group)}
            for turn in range(max(len(question.turns) for question in call.group)):
                prompts = self._next_prompts(call, talks, turn, repeat)
                if not prompts or not self._turn(call, prompts, turn, repeat):
                    break
                first = next(result for result in call.results if result.error is None)
                for index in prompts:
                    answer = first.answers[index].choices[repeat].turns[-1]
                    talks[index].append({"role": "assistant", "content": answer})

    def _next_prompts(
        self, call: _Call, talks: dict[int, list[Mapping[str, str]]], turn: int, repeat: int
    ) -> dict[int, Tensor]:
        prompts = {}
        for index, question in enumerate(call.group):
            if index not in talks or turn >= len(question.turns):
                continue
            talks[index].append(_user(question.turns[turn]))
            encoded = self._encode(talks[index])
            if isinstance(encoded, Tensor):
                prompts[index] = encoded
                call.prompts[index, turn, repeat] = encoded
                continue
            del talks[index]
            if repeat == 0:
                for result in call.results:
                    left = len(question.turns) - turn
                    result.answers[index].skipped += [f"turn {turn + 1}: {encoded}"] * left
                self.progress.note(f"question {question.question_id}, turn {turn + 1} skipped: {encoded}")
        return prompts

    def _turn(self, call: _Call, prompts: dict[int, Tensor], turn: int, repeat: int) -> bool:
        """One call per method; False where nobody got through."""
        batch, options = Batch.of(list(prompts.values()), self._pad), self.plan.arguments(call.setting)
        for number in call.order:
            method, result = call.methods[number], call.results[number]
            if result.error is not None:
                continue
            seed = _seed(self.plan.seed, call.group[next(iter(prompts))], turn)
            try:
                texts = self._undisturbed(method, batch, options, seed)
            except Exception:  # noqa: BLE001 - whatever it is, it is recorded and counts for nobody
                result.error = traceback.format_exc()
                if call.before[number]:
                    method.load_state_dict(call.before[number])
                continue
            for index, text in zip(prompts, texts, strict=True):
                self._note(call, result, index, (turn, repeat), text)
        return any(result.error is None for result in call.results)

    def _undisturbed(self, method: Method, batch: Batch, options: dict[str, Any], seed: int) -> list[Measured]:
        """The texts of a call in which no graph was made; where one was, the call is undone and asked again."""
        learnt, before = method.state_dict() if method.compiled else {}, makings()
        torch.manual_seed(seed)
        texts = method.generate(batch, options)
        if makings() == before:
            return texts
        if learnt:
            method.load_state_dict(learnt)
        torch.manual_seed(seed)
        with as_made():
            return method.generate(batch, options)

    def _note(self, call: _Call, result: _Results, index: int, place: tuple[int, int], text: Measured) -> None:
        (turn, repeat), answer = place, result.answers[index]
        if len(answer.choices) <= repeat:
            answer.choices.append(Choice(index=repeat))
        choice, key = answer.choices[repeat], tuple(text.ids)
        if key not in call.pieces:
            call.pieces[key] = pieces(self.loaded.tokenizer, text.ids)
        choice.turns.append(self.loaded.tokenizer.decode(text.ids, skip_special_tokens=True))
        choice.decoding_steps.append(len(text.accept_lengths))
        choice.new_tokens.append(len(text.ids))
        choice.wall_time.append(text.seconds)
        choice.prefill_time.append(text.prefill_seconds)
        choice.accept_lengths += text.accept_lengths
        choice.ids.append(text.ids)
        choice.tokens.append(list(zip(call.pieces[key], text.sources, strict=True)))
        choice.looping.append(ends_in_loop(text.ids))
        choice.identical.append(None)
        if text.trace is not None:
            text.trace.question_id, text.trace.turn, text.trace.repeat = answer.question_id, turn, repeat
            text.trace.state, text.trace.temperature = answer.state, answer.temperature
            text.trace.batch_size = answer.batch_size
            result.traces.append(text.trace)

    def _write(self, call: _Call) -> None:
        """Hand a group to the folder: a question that failed for one method counts for none."""
        failed = any(result.error is not None for result in call.results)
        for method, result in zip(call.methods, call.results, strict=True):
            variant = variant_of(method, call.setting)
            for answer in result.answers:
                answer.model_id, answer.error = f"{self.loaded.name}-{variant.stem}", result.error
                answer.tstamp, answer.answer_id = time.time(), uuid.uuid4().hex
            counted = [answer for answer in result.answers if answer.choices and not failed]
            aside = [answer for answer in result.answers if failed or not answer.choices]
            self.folder.add(variant, counted, aside, result.traces)
            self.progress.advance(method, result.answers, result.error)
        self.asked += len(call.group)
        if failed:
            self.failures += len(call.group)

    def _save(self, setting: Setting, methods: Sequence[Method], learnt: Sequence[dict[str, Any]]) -> None:
        for method, state in zip(methods, learnt, strict=True):
            if state:
                self.folder.save_state(variant_of(method, setting), state)


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Groups of at most ``size`` questions of one category each, so that a call's time belongs to one task.

    The order within a category is kept, and groups stand in the order of their first questions: with size 1 this is
    the order of the questions.
    """
    groups, filling = list[list[Question]](), dict[str, list[Question]]()
    for question in questions:
        group = filling.get(question.category)
        if group is None or len(group) == size:
            group = filling[question.category] = []
            groups.append(group)
        group.append(question)
    return groups


def _learnt(method: Method) -> dict[str, Any]:
    return method.state_dict() if method.state == WARM else {}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _seed(seed: int, question: Question, turn: int) -> int:
    """The same for every method and repeat, another one for every question and turn."""
    return zlib.crc32(f"{seed}/{question.question_id}/{turn}".encode())


def _compare(call: _Call, judge: Judge) -> None:
    """Token by token: drafters with the plain loop, the plain loop with transformers, where both were measured."""
    by_kind = {method.kind: result for method, result in zip(call.methods, call.results, strict=True)}
    plain, theirs = by_kind.get("plain"), by_kind.get("transformers")
    for method, result in zip(call.methods, call.results, strict=True):
        reference = theirs if method.kind in ("plain", "transformers") else plain or theirs
        if reference is None or reference is result or reference.error or result.error:
            continue
        for index, (answer, other) in enumerate(zip(result.answers, reference.answers, strict=True)):
            for choice, expected in zip(answer.choices, other.choices, strict=True):
                for turn, ids in enumerate(choice.ids):
                    prompt = call.prompts[index, turn, choice.index]
                    choice.identical[turn] = judge.verdict(prompt, expected.ids[turn], ids)
