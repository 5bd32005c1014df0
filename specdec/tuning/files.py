"""Tree files: what ``specdec tune`` found, with the curves it was found from, as YAML that a person can read.

A tree belongs to a drafter and a vocabulary; a file made for others is refused by name. On another target, device or
dtype it is a valid tree that nobody has chosen, and its costs are of no use there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from specdec.identity import device_name
from specdec.interfaces import Drafter, Shaped
from specdec.target import Target
from specdec.templates import Template
from specdec.tuning.choice import Choice, Costs, Paths, Profile, choose, expect

FORMAT = 1
_HEAD = """\
# The tree of {drafter} that expects the most tokens per second on the machine named below; made by specdec tune.
# specdec generate drafter={drafter} tree.path={name}          # this tree
# specdec generate drafter={drafter} tree=adaptive tree.path={name}     # adapted to the text, from this one on
"""


@dataclass(frozen=True)
class TreeFile:
    """A chosen tree, for whom, and why.

    Attributes:
        drafter: name of the drafter that it is for.
        vocab_size: V of the target.
        paths: rank paths, root not counted.
        profile: what the drafter got right on the calibration prompts.
        costs: of a step.
        made_on: target, device, dtype, threads, versions, settings, command.
        expected: ``chosen``, ``published`` and ``plain``, each with nodes, tokens_per_step, ms_per_step and
            tokens_per_second.
        more: measured curves that nothing is computed from any more (t(N) by context, rates of a cold start, counts).
    """

    drafter: str
    vocab_size: int
    paths: Paths
    profile: Profile
    costs: Costs
    made_on: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain_is_faster(self) -> bool:
        """Whether plain decoding promises more tokens per second than the chosen tree."""
        expected = self.expected
        if not {"plain", "chosen"} <= expected.keys():
            return False
        return expected["plain"]["tokens_per_second"] > expected["chosen"]["tokens_per_second"]

    def made_elsewhere(self, target: Target) -> list[str]:
        """What of ``made_on`` is not so here, so that the costs are others: device, dtype, threads, compiled."""
        here: dict[str, Any] = {
            "device": device_name(target.device),
            "dtype": str(target.dtype).removeprefix("torch."),
            "compiled": target.graphs is not None,
        }
        if target.device.type == "cpu":
            here["threads"] = torch.get_num_threads()
        return [name for name, value in here.items() if self.made_on.get(name, value) != value]

    def beyond_reckoning(self, max_nodes: int, max_depth: int) -> float:
        """What the tree is worth beyond what is reckoned, at least 1: by rates and costs alone another one within these
        sizes may win, but this is the one that did when they were tried.
        """
        best = choose(self.profile, self.costs, max_nodes, max_depth, quick=True).rate
        return max(best / expect(self.paths, self.profile, self.costs).rate, 1.0)

    def refuse(self, drafter: str, vocab_size: int) -> None:
        """Raise ValueError where it was made for another drafter or vocabulary."""
        if drafter != self.drafter:
            raise ValueError(f"this tree was made for drafter {self.drafter!r}, got {drafter!r}; tune one for it")
        if vocab_size != self.vocab_size:
            raise ValueError(
                f"this tree was made for a vocabulary of {self.vocab_size} tokens ({self.made_on.get('target')}), the "
                f"target has {vocab_size}; tune one for it"
            )

    def write(self, path: Path) -> None:
        """Write it; folders that are missing are made."""
        costs, profile = self.costs, self.profile
        acceptance: dict[str, Any] = {"rates": [[round(float(rate), 5) for rate in row] for row in profile.rates]}
        if profile.offered is not None:
            acceptance |= {"offered": [*map(float, profile.offered)], "widths": [*map(float, profile.widths)]}
        plain = {
            "format": FORMAT,
            "drafter": self.drafter,
            "vocab_size": self.vocab_size,
            "paths": [list(node) for node in self.paths],
            "plain_is_faster": self.plain_is_faster,
            "expected": {name: dict(values) for name, values in self.expected.items()},
            "acceptance": acceptance,
            "seconds": {
                "pass": [round(float(value), 9) for value in costs.passes],
                "draft": [float(value) for value in costs.draft],
                "rest": [float(value) for value in costs.rest],
                "plain": float(costs.plain),
            },
            "made_on": dict(self.made_on),
            "more": dict(self.more),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        head = _HEAD.format(drafter=self.drafter, name=path)
        body = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=120)
        path.write_text(head + body, encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> TreeFile:
        """Read and check one.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no such file, or its tree is none; names the file and what is wrong.
        """
        place = Path(path).expanduser()
        if not place.is_file():
            raise FileNotFoundError(f"no tree file at {place}; specdec tune makes one")
        try:
            return _parsed(yaml.safe_load(place.read_text(encoding="utf-8")))
        except yaml.YAMLError as error:
            raise ValueError(f"{place}: expected YAML as specdec tune writes it; {_short(error)}") from error
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{place}: {error}") from error


@dataclass(frozen=True)
class FixedTree:
    """The tree of a file, one given by its rank paths, or the drafter's own.

    Attributes:
        path: a tree file of ``specdec tune``.
        paths: rank paths such as ``[[0], [1], [0, 0]]``.

    Raises:
        ValueError: both are given.
    """

    path: str | None = None
    paths: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.paths is not None:
            raise ValueError(f"a tree is given by a file or by its paths; got path={self.path!r} and paths")

    def shape(self, drafter: Drafter, vocab_size: int) -> Drafter:
        """The drafter with this tree.

        Raises:
            ValueError: the file was made for another drafter or vocabulary, or the drafter cannot fill its tree.
        """
        paths = self.paths
        if self.path is not None:
            file = TreeFile.read(self.path)
            file.refuse(drafter.name, vocab_size)
            paths = file.paths
        if paths is not None:
            assert isinstance(drafter, Shaped), f"{drafter.name} has no tree that can be exchanged"
            drafter.reshape(paths)
        return drafter


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, all else one entry per line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        flat = all(not isinstance(item, Mapping) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat if flow_style is None else flow_style)


def _parsed(plain: Any) -> TreeFile:
    if not isinstance(plain, Mapping):
        raise ValueError(f"expected a mapping as specdec tune writes it, got {type(plain).__name__}")
    if plain.get("format") != FORMAT:
        raise ValueError(f"expected a tree file of format {FORMAT}, got format={plain.get('format')!r}")
    missing = [key for key in ("drafter", "vocab_size", "paths", "acceptance", "seconds") if key not in plain]
    if missing:
        raise ValueError(f"expected a tree file as specdec tune writes it; it lacks {', '.join(missing)}")
    if not isinstance(plain["drafter"], str) or not isinstance(plain["vocab_size"], int):
        raise ValueError(f"expected a name and a number; got {plain['drafter']=}, {plain['vocab_size']=}")
    acceptance, seconds = _mapping(plain, "acceptance"), _mapping(plain, "seconds")
    offered = acceptance.get("offered")
    profile = Profile(
        [_numbers(row, "acceptance.rates") for row in _listed(acceptance.get("rates"), "acceptance.rates")],
        None if offered is None else _numbers(offered, "acceptance.offered"),
        _numbers(acceptance.get("widths", []), "acceptance.widths"),
    )
    passes = _numbers(seconds.get("pass"), "seconds.pass")
    draft, rest = _numbers(seconds.get("draft"), "seconds.draft"), _numbers(seconds.get("rest"), "seconds.rest")
    if not passes or passes != sorted(passes) or min(passes) <= 0 or len(draft) != 3 or len(rest) != 2:
        raise ValueError(
            "expected seconds.pass > 0 that never fall, 3 numbers in seconds.draft and 2 in seconds.rest; got "
            f"{len(passes)}, {len(draft)} and {len(rest)}"
        )
    costs = Costs(
        np.array(passes),
        _numbers([seconds.get("plain")], "seconds.plain")[0],
        (draft[0], draft[1], draft[2]),
        (rest[0], rest[1]),
    )
    expected = {str(name): _mapping(plain["expected"], name) for name in plain.get("expected") or {}}
    made_on, more = plain.get("made_on") or {}, plain.get("more") or {}
    return TreeFile(
        plain["drafter"], plain["vocab_size"], _paths(plain["paths"]), profile, costs, made_on, expected, more
    )


def _paths(listed: Any) -> Paths:
    whole = all(
        isinstance(path, list) and path and all(isinstance(rank, int) and rank >= 0 for rank in path)
        for path in _listed(listed, "paths")
    )
    if not whole or not listed:
        raise ValueError(f"expected paths such as [[0], [1], [0, 0]], got {str(listed)[:80]}")
    paths = [tuple(path) for path in listed]
    Template.from_paths(paths)  # closed, and no node twice
    return paths


def _mapping(plain: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(plain[key], Mapping):
        raise ValueError(f"expected {key} to be a mapping, got {plain[key]!r:.80}")
    return plain[key]


def _listed(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected {name} to be a list, got {value!r:.80}")
    return value


def _numbers(value: Any, name: str) -> list[float]:
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in _listed(value, name)):
        raise ValueError(f"expected {name} to be numbers, got {value!r:.80}")
    return [float(item) for item in value]


def _short(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())[:160]


def described(choice: Choice) -> dict[str, float]:
    """A choice as ``expected`` has it."""
    return {
        "nodes": len(choice.paths) + 1,
        "levels": max((len(path) for path in choice.paths), default=0),
        "tokens_per_step": round(choice.tokens, 3),
        "ms_per_step": round(1e3 * choice.seconds, 3),
        "tokens_per_second": round(choice.rate, 1),
    }
