"""Pass times, on a clock that a fake target moves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from specdec.target import Target
from specdec.tree import TokenTree
from specdec.tuning import timing
from specdec.tuning.timing import curve, pass_seconds, sizes_up_to


class Device:
    """A target whose passes cost a staircase of 8 nodes, the first pass over a size ten times as much, plus hiccups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seen = 0.0, list[int]()
        self.device, self.vocab_size, self.graphs = torch.device("cpu"), 11, None
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def run(self, context: Any, tree: TokenTree, taps: Any = ()) -> None:  # noqa: ARG002 - a target's signature
        tree.check()
        cost = self.cost(tree.num_nodes) * (10 if tree.num_nodes not in self.seen else 1)
        self.seen.append(tree.num_nodes)
        self.now += cost * (5 if len(self.seen) % 7 == 0 else 1)

    @staticmethod
    def cost(nodes: int) -> float:
        return 1.0 + -(-nodes // 8)


CONTEXT: Any = SimpleNamespace(lengths=[5, 9])


def test_medians_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rounds = Device(monkeypatch), list[int]()
    sizes = sizes_up_to(40)
    assert sizes == [*range(1, 33), 34, 36, 38, 40]
    found = pass_seconds(cast(Target, device), CONTEXT, sizes, 5, progress=lambda done, _: rounds.append(done))
    assert found == {size: Device.cost(size) for size in sizes}
    assert rounds == [1, 2, 3, 4, 5]
    assert device.seen[len(sizes) : 2 * len(sizes)] == sizes[::-1], "sizes take turns"


def test_a_measurement_that_somebody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device, sizes = Device(monkeypatch), sizes_up_to(64, coarse=True)
    assert sizes == [1, 4, 8, 16, 24, 32, 48, 64]
    pass_seconds(cast(Target, device), CONTEXT, sizes, 50, limit_s=1.0)
    assert device.seen == [64, 64, 1], "the largest size is warmed up, then the two ends are enough"
    device.seen.clear()
    found = pass_seconds(cast(Target, device), CONTEXT, sizes, 50, limit_s=100.0)
    assert {*found} == {1, 32, 48, 64}, "and as many others as there is time for"
    device.seen.clear()
    pass_seconds(cast(Target, device), CONTEXT, sizes, 50, limit_s=1000.0)
    assert 3 * len(sizes) < len(device.seen) < 50 * len(sizes)


def test_making_a_graph_is_no_part_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    device, sizes = Device(monkeypatch), [1, 8, 32]
    device.graphs = cast(Any, "some")
    found = pass_seconds(cast(Target, device), CONTEXT, sizes, 50, limit_s=1.0)
    assert device.seen == [*sizes, *sizes[::-1]]
    assert found == {size: Device.cost(size) for size in sizes}


def test_curves() -> None:
    assert curve({1: 1.0, 3: 2.0, 5: 1.0}).tolist() == [1.0, 1.25, 1.5, 1.5, 1.5]
    assert curve({1: 1.0, 2: 2.0, 8: 3.0}, stairs=True).tolist() == [1.0, 2.0, *[3.0] * 6]
    assert sizes_up_to(20, compiled=[1, 8, 16, 25]) == [1, 8, 16]
    assert sizes_up_to(4, compiled=[8]) == [4]
