"""The target's own answers to the prompts of a corpus: what a drafter learns best from.

Prompts of like length are answered together, through ``model.generate`` as it is, so speculatively where the model
speculates. The greedy answers are the target's own whatever the batch; sampled ones follow its law, but depend on the
seed together with the batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from specdec.evaluation.data import Question, shard_of
from specdec.evaluation.methods import Batch
from specdec.loading import Loaded
from specdec.metrics import emitted
from specdec.training.corpus import Corpus, Document, Message

_TORN = "\ufffd"  # what decodes from a part of a character


@dataclass(frozen=True)
class Task:
    """One thing for the target to write: its answers to a user's turns, or how a text goes on.

    Attributes:
        task_id: each task has its own.
        turns: what the user says, turn by turn; each answer goes into the next turn's prompt.
        history: messages before the first turn.
        text: in place of turns, a text of which the beginning is the prompt.
    """

    task_id: int | str
    turns: tuple[str, ...] = ()
    history: tuple[Message, ...] = ()
    text: str = ""


@dataclass
class Answered:
    """A task with what the target wrote; conversations have ``messages``, continued texts ``text`` and ``prompt``.

    Attributes:
        task: what was asked.
        messages: the conversation so far.
        text: prompt and continuation.
        prompt: how the text began.
        finished: whether the target ended the last of it itself, within the token limit.
        num_tokens: written by the target, end tokens included.
        skipped: why (the rest of) it was not asked.
    """

    task: Task
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    prompt: str = ""
    finished: bool = True
    num_tokens: int = 0
    skipped: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """As a line of the output."""
        identity = {"id": self.task.task_id}
        if self.task.text:
            return {**identity, "text": self.text, "prompt": self.prompt, "finished": self.finished}
        return {**identity, "messages": [dict(message) for message in self.messages], "finished": self.finished}


def tasks_of(source: Sequence[Question] | Corpus) -> list[Task]:
    """The prompts of a source: of a conversation the user's turns, all of which are answered anew.

    An id that comes again gets a number behind it.

    Raises:
        ValueError: there is no user's turn in the whole source.
    """
    found: Sequence[Question | Document] = source.documents if isinstance(source, Corpus) else source
    tasks, seen = list[Task](), Counter[int | str]()
    for number, item in enumerate(found, start=1):
        task = _task(item, number)
        if task is None:
            continue
        seen[task.task_id] += 1
        while seen[task.task_id] > 1:
            task = Task(f"{task.task_id}#{seen[task.task_id]}", task.turns, task.history, task.text)
            seen[task.task_id] += 1
        tasks.append(task)
    if not tasks:
        raise ValueError(f"no user's turn to answer in {len(found)} texts")
    return tasks


def _task(item: Question | Document, number: int) -> Task | None:
    if isinstance(item, Question):
        return Task(item.question_id, item.turns, item.history)
    identity = number if item.document_id is None else item.document_id
    if not item.messages:
        return Task(identity, text=item.text)
    turns = [index for index, message in enumerate(item.messages) if message["role"] == "user"]
    if not turns:
        return None
    return Task(identity, tuple(item.messages[i]["content"] for i in turns), tuple(item.messages[: turns[0]]))


def fingerprint(tasks: Sequence[Task]) -> str:
    """SHA-256 of tasks in their order; a file of answers does not go on with others."""
    return hashlib.sha256(json.dumps([asdict(task) for task in tasks], sort_keys=True).encode()).hexdigest()


def selected(tasks: Sequence[Task], limit: int | None, shard: str | None) -> list[Task]:
    """The first ``limit`` tasks, and of them every n-th from the i-th of ``shard=i/n``.

    Raises:
        ValueError: a limit below 1, a malformed shard, or nothing left.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"expected limit to be a whole number of at least 1, got {limit!r}")
    first, step = shard_of(shard)
    if not (chosen := list(tasks[:limit])[first - 1 :: step]):
        raise ValueError(f"nothing is left to answer: {len(tasks)} prompts, limit={limit}, shard={shard}")
    return chosen


@dataclass(frozen=True)
class Plan:
    """How the target is asked.

    Attributes:
        batch_size: prompts per call.
        max_new_tokens: per answer.
        options: further keyword arguments of ``generate``.
        chat: put prompts into the chat template; None = where there is one.
        prompt_tokens: of a plain text, how many tokens are its prompt; at most half of them are.
        seed: of sampling.
    """

    batch_size: int = 8
    max_new_tokens: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)
    chat: bool | None = None
    prompt_tokens: int = 32
    seed: int = 0


@dataclass
class Outcome:
    """What one batch came to: its answers, seconds of wall clock in ``generate``, and what failed."""

    answers: list[Answered] = field(default_factory=list)
    seconds: float = 0.0
    failures: list[tuple[Task, Exception]] = field(default_factory=list)


class Distiller:
    """Asks the target.

    Args:
        loaded: it, with its tokenizer.
        plan: how.
    """

    def __init__(self, loaded: Loaded, plan: Plan) -> None:
        self.loaded, self.plan = loaded, plan
        tokenizer = loaded.tokenizer
        self._pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Tasks of like length and as many turns together, the longest first: what does not fit shows at once."""

        def size(task: Task) -> tuple[int, int]:
            return len(task.turns), sum(map(len, (task.text, *task.turns, *(m["content"] for m in task.history))))

        ordered = sorted(tasks, key=size, reverse=True)
        count = self.plan.batch_size
        return [ordered[start : start + count] for start in range(0, len(ordered), count)]

    def run(self, batches: Sequence[Sequence[Task]], again: Callable[[], None]) -> Iterator[Outcome]:
        """Answer batch by batch.

        A batch that fails is asked again one by one, so that neither a prompt that cannot be answered nor one too long
        for the memory takes its neighbours with it.

        Args:
            batches: of tasks.
            again: called after a failure, to bring the model's drafter into a known state.

        Raises:
            ValueError: the very first prompt is refused: it is the configuration that does not suit.
        """
        anything = False
        for batch in batches:
            outcome = Outcome()
            groups = [list(batch)]
            while groups:
                group = groups.pop(0)
                started = time.perf_counter()
                try:
                    outcome.answers += self.answer(group)
                    anything = True
                except Exception as error:  # whatever it is, it is reported and counted
                    again()
                    if len(group) > 1:
                        groups = [[task] for task in group]
                    elif not anything and isinstance(error, ValueError | NotImplementedError):
                        raise ValueError(f"{self.loaded.name} cannot be asked: {error}") from error
                    else:
                        outcome.failures.append((group[0], error))
                outcome.seconds += time.perf_counter() - started
            yield outcome

    def answer(self, tasks: Sequence[Task]) -> list[Answered]:
        """All turns of some tasks, which are asked together."""
        answers = [Answered(task, list(task.history)) for task in tasks]
        for turn in range(max(max(len(task.turns) for task in tasks), 1)):
            asked = {index: self._prompt(answer, turn) for index, answer in enumerate(answers)}
            prompts = {index: ids for index, ids in asked.items() if ids is not None}
            if not prompts:
                break
            torch.manual_seed(zlib.crc32(f"{self.plan.seed}/{tasks[next(iter(prompts))].task_id}/{turn}".encode()))
            batch = Batch.of(list(prompts.values()), self._pad)
            made = self.loaded.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=self.plan.max_new_tokens,
                **self.plan.options,
            )
            for (index, prompt), row in zip(prompts.items(), made[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                self._note(answers[index], prompt, emitted(row, self.loaded.eos_ids))
        return answers

    def _prompt(self, answer: Answered, turn: int) -> Tensor | None:
        """Ids ``[1, W]`` of the next prompt; None where there is none, or where it does not fit."""
        task, messages = answer.task, answer.messages
        if turn >= max(len(task.turns), 1) or answer.skipped or (turn and not _goes_on(answer)):
            return None
        try:
            if task.text:
                ids = self._beginning(task.text)
            else:
                messages = [*messages, {"role": "user", "content": task.turns[turn]}]
                ids = self.loaded.encode(messages, self.plan.chat)
        except (ValueError, TemplateError) as error:  # the latter: roles that a chat template does not take
            answer.skipped = str(error)
            return None
        context, wanted = self.loaded.context_length, ids.shape[1] + self.plan.max_new_tokens
        if context is not None and wanted > context:
            answer.skipped = (
                f"its prompt has {ids.shape[1]} tokens and may be answered with {self.plan.max_new_tokens}; "
                f"{self.loaded.name} holds {context}"
            )
            return None
        answer.messages = messages
        return ids

    def _beginning(self, text: str) -> Tensor:
        """Ids ``[1, W]`` of how a text begins, whole characters."""
        tokenizer = self.loaded.tokenizer
        ids = tokenizer(text)["input_ids"]
        count = min(self.plan.prompt_tokens, max(len(ids) // 2, 1))
        while count > 1 and self._decode(ids[:count]).endswith(_TORN):
            count -= 1
        return torch.tensor([ids[:count]], device=self.loaded.model.device)

    def _note(self, answer: Answered, prompt: Tensor, ids: list[int]) -> None:
        answer.finished = bool(ids) and ids[-1] in self.loaded.eos_ids
        answer.num_tokens += len(ids)
        written = ids[:-1] if answer.finished else ids
        if answer.task.text:
            begun = prompt[0].tolist()
            whole, answer.prompt = self._decode([*begun, *written]), self._decode(begun)
            answer.text = whole if answer.finished else whole.rstrip(_TORN)
            # How two tokens join may take a space back.
            answer.prompt = os.path.commonprefix([answer.prompt, answer.text])
            return
        said = self._decode(written)
        said = said if answer.finished else said.rstrip(_TORN)
        answer.messages = [*answer.messages, {"role": "assistant", "content": said}]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _goes_on(answer: Answered) -> bool:
    """Whether a conversation may: nobody would ask on behind an answer that was cut, or that says nothing."""
    return answer.finished and bool(answer.messages[-1]["content"].strip())
