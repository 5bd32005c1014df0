"""What each step of the loop did, per text. While the clock runs only references are collected.

Shapes: B rows, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.decoding import Step
from specdec.evaluation.records import PREFILL, TARGET, StepTrace
from specdec.generation import Speculation
from specdec.interfaces import DecodeState
from specdec.metrics import PHASES


@dataclass
class _Seen:
    """One step: what the verification decided, what the tree said of its nodes, the clock of all phases so far."""

    path: list[list[int]]
    tokens: list[list[int]]
    was_finished: list[bool]
    offered: list[list[int]]
    num_nodes: int
    rank: Tensor | None
    source: Tensor | None
    sources: tuple[str, ...]
    clock: tuple[float, ...]


class Tracer:
    """An observer of one speculation; holds no logits and no states, so nothing of a step stays in memory for it.

    Args:
        handle: the speculation that it observes.
    """

    def __init__(self, handle: Speculation) -> None:
        self.handle = handle
        self._seen: list[_Seen] = []

    def start(self) -> None:
        """Forget the last call and observe the next one."""
        self._seen = []
        self.handle.observers = [self.observe]

    def observe(self, state: DecodeState, step: Step) -> None:  # noqa: ARG002 - the observer's signature
        """Take references to one step."""
        done, tree = step.verification, step.tree
        clock = tuple(self.handle.last.seconds.values())
        if tree is None:
            seen = _Seen(done.path, done.tokens, done.was_finished, [], 0, None, None, (), clock)
        else:
            described = (tree.num_nodes, tree.rank, tree.source, tree.sources)
            seen = _Seen(done.path, done.tokens, done.was_finished, done.offered, *described, clock)
        self._seen.append(seen)

    def row(self, row: int) -> tuple[StepTrace, list[str]]:
        """After the call: the trace of one row (its question is for the caller to fill in), and each token's source."""
        rows = len(self._seen[0].tokens)
        # The prefill goes on after its first token: the drafter starts in it.
        trace = StepTrace("", seconds={PREFILL: self.handle.last.seconds[PREFILL] / rows})
        spent: dict[str, list[float]] = {phase: [] for phase in PHASES if phase != PREFILL}
        origin = [PREFILL] * len(self._seen[0].tokens[row])
        for before, seen in zip(self._seen, self._seen[1:], strict=False):
            if seen.was_finished[row]:
                break
            nodes = seen.path[row][1:]
            trace.offered.append(seen.offered[row])
            trace.drafted.append(sum(seen.offered[row]))
            trace.computed.append(seen.num_nodes)
            trace.accepted.append(len(nodes))
            trace.ranks.append(_values(seen.rank, row, nodes, -1))
            origin += [seen.sources[index] for index in _values(seen.source, row, nodes, 0)] + [TARGET]
            running = rows - sum(seen.was_finished)
            for phase, start, end in zip(PHASES, before.clock, seen.clock, strict=True):
                if phase in spent:
                    spent[phase].append((end - start) / running)
        trace.seconds |= spent
        return trace, origin


def _values(table: Tensor | None, row: int, nodes: list[int], missing: int) -> list[int]:
    """Entries of ``[1 or B, N]`` for some nodes of a row."""
    if table is None or not nodes:
        return [missing] * len(nodes)
    values = table[min(row, table.shape[0] - 1)].tolist()
    return [values[node] for node in nodes]
