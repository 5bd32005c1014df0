"""Clocks of the benchmark: things that are compared take turns in one process, and medians are compared.

A lap is a function that does its work once and returns the seconds that count. It looks at the clock itself, so that
what it has to put back afterwards is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Lap = Callable[[], float]


def synchronise(device: torch.device) -> None:
    """Wait for the accelerator, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device idle on both sides."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def in_turns(laps: Mapping[str, Lap], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every lap, round after round; who goes first moves on by one with every round.

    Args:
        laps: by name.
        repeats: rounds that count.
        warmup: rounds before them that do not.
    """
    names, seconds = list(laps), dict[str, list[float]]({name: [] for name in laps})
    for turn in range(warmup + repeats):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            spent = laps[name]()
            if turn >= warmup:
                seconds[name].append(spent)
    return seconds


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """``median`` of some seconds in milliseconds, with the quartiles ``low`` and ``high`` between which half of them
    lie.
    """
    ordered = sorted(1e3 * value for value in seconds)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {"median": statistics.median(ordered), "low": low, "high": high}
