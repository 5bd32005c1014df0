"""Trees that follow the text: budget and shape are chosen anew every few steps, from what was accepted lately.

``Adaptive`` is a drafter around any drafter whose tree can be exchanged (``Shaped``). It counts which rank at which
depth was accepted, lets old steps fade, and where walks have become longer or shorter than was expected asks
``specdec.tuning.choice`` for the tree with the most expected tokens per second. Costs are those of a tree file,
corrected by what trees turn out to cost beside each other, or, without a file, measured: of passes at the start of the
first request, of all else while decoding. Where plain decoding promises more, it proposes nothing for a while.

What the present tree does not contain is not seen. Such places are believed to be what the prior says (the file's
rates, the drafter's own, or a guess), scaled by how the places that are seen compare with it; as counts fade, all
estimates go back to the prior, so that what was given up is tried again.

The text does not depend on any of this: every tree is verified.

Shapes: B rows, D depth, R ranks.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from specdec.interfaces import DecodeState, Drafter, Prefill, Shaped, Verification
from specdec.target import Target
from specdec.tree import TokenTree, root_only
from specdec.tuning.calibration import StepCost, fit_costs, why_none
from specdec.tuning.choice import Costs, Profile, choose, expect
from specdec.tuning.corrections import CostCorrections
from specdec.tuning.counts import AcceptanceCounts, DraftLengths, Layout
from specdec.tuning.files import TreeFile
from specdec.tuning.timing import curve, graph_sizes, pass_seconds, sizes_up_to

_LOG = logging.getLogger("specdec")
_SIZES = frozenset((*range(2, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 129, 8)))
_GRAPHS = (8, 16, 32)  # sizes beside the first tree's and the largest one's, where passes are graphs
_GUESS, _FALL = 0.45, 1.4  # rates of a drafter that nobody has measured: the best child's, and the power of the rank
_CHAIN_GUESS = (0.6, 0.05)
_SCALES = (0.2, 4.0)  # by which what is seen may move what is not
_REMEMBERED = 96  # steps whose times are kept
_MEASURING_S = 0.2
_FIT_EVERY = 4  # intervals
_CARRIED = 0.5  # of what was counted, from one request to the next
_PATIENCE = 8  # intervals between two choices, at most
_CHANCE = 2.0  # standard errors by which the mean walk may differ from what was expected
_SPREAD = 0.5  # of the lengths of walks, in tokens, at least
_DEEPER = 0.9  # what to expect of a level of a chain, where no file says it, over the rate of the level above


@dataclass(frozen=True)
class Adaptation:
    """How a tree follows the text.

    Attributes:
        path: a tree file of ``specdec tune`` to start from, with its rates and costs; None = the drafter's own tree,
            and costs that are measured.
        interval: steps between two looks at what was accepted. A tree is chosen anew where it differs from what was
            expected by more than chance, and at every eighth look (where costs are measured, at every fourth).
        half_life: steps after which what was seen weighs half.
        strength: steps that the prior is worth.
        gain: share by which a tree must promise more than the present one to take its place; beside the file's tree it
            must promise as much more as others did when ``specdec tune`` looked at that one and kept it. The file's
            tree is gone back to where no other promises more by half this share.
        max_nodes: of the largest tree, the root included.
        max_depth: of the deepest one that is no chain.
        max_width: ranks considered.
        max_chain: draft tokens of the longest chain.

    Raises:
        ValueError: a number out of range.
    """

    path: str | None = None
    interval: int = 12
    half_life: float = 48.0
    strength: float = 16.0
    gain: float = 0.05
    max_nodes: int = 64
    max_depth: int = 12
    max_width: int = 10
    max_chain: int = 48

    def __post_init__(self) -> None:
        counts = self.interval, self.max_depth, self.max_width, self.max_chain
        if min(counts) < 1 or not 2 <= self.max_nodes <= max(_SIZES):
            raise ValueError(
                "expected interval, max_depth, max_width and max_chain >= 1 and 2 <= max_nodes <= "
                f"{max(_SIZES)}; got {self}"
            )
        if min(self.half_life, self.strength) <= 0 or self.gain < 0:
            raise ValueError(f"expected half_life and strength > 0 and gain >= 0; got {self}")

    def shape(self, drafter: Drafter, vocab_size: int) -> Drafter:
        """The drafter with a tree that follows the text; ``drafter`` is ``Shaped``."""
        file = None if self.path is None else TreeFile.read(self.path)
        if file is not None:
            file.refuse(drafter.name, vocab_size)
        return Adaptive(drafter, self, file)


class _Seen(NamedTuple):
    """Of one step what is counted later; not its logits, which are large."""

    path: list[list[int]]
    finished: list[bool]
    was_finished: list[bool]
    offered: list[list[int]]
    own: bool
    nodes: int
    draft_s: float
    whole_s: float


@dataclass
class _Walks:
    """Tokens of some walks: how many walks, their sum, their squares' sum."""

    count: int = 0
    tokens: int = 0
    squares: int = 0

    def add(self, seen: _Seen) -> None:
        for path, done in zip(seen.path, seen.finished, strict=True):
            if path and not done:
                length = len(path)
                self.count, self.tokens, self.squares = self.count + 1, self.tokens + length, self.squares + length**2

    def differ(self, expected: float) -> bool:
        """Whether their mean lies beyond chance from what was expected; without any nobody can say."""
        if not self.count:
            return False
        mean = self.tokens / self.count
        spread = max(math.sqrt(max(self.squares / self.count - mean**2, 0.0)), _SPREAD)
        return abs(mean - expected) > _CHANCE * spread / math.sqrt(self.count)


class Adaptive:
    """A drafter whose tree follows the text.

    Args:
        drafter: ``Shaped``; from now on this object gives it its trees.
        settings: how.
        file: to start from; None = the drafter's own tree, and costs that are measured.

    Attributes:
        choices: trees that it has changed to since it was made or reset, plain decoding included.
        announce: told when a request waits for a measurement.

    Raises:
        ValueError: the drafter has no tree that can be exchanged.
    """

    def __init__(self, drafter: Drafter, settings: Adaptation | None = None, file: TreeFile | None = None) -> None:
        if not isinstance(drafter, Shaped):
            raise ValueError(f"drafter {drafter.name!r} has no tree of a fixed shape to adapt")
        self.settings, self.file = settings or Adaptation(), file
        self.drafter: Drafter = drafter
        self.shaped: Shaped = drafter
        self.name = f"{drafter.name}, adaptive tree"
        if file is not None:
            drafter.reshape(file.paths)
        self.needs = replace(drafter.needs, max_nodes=max(self.settings.max_nodes, drafter.needs.max_nodes))
        self.choices = 0
        self.announce: Callable[[str], None] = _LOG.info
        self._passes: dict[int, np.ndarray] = {}
        self._reckoned: dict[tuple[int, int], float] = {}  # seconds of a step by the file, by nodes and levels
        self._plain, self._paths = False, list[tuple[int, ...]]()
        self._edge = 1.0
        self._knows_costs: bool | None = None  # not before a request: how passes run is settled after fit
        self._given: Costs | None = None  # the file's, as passes run here
        self._began = self._drafting = 0.0
        self._proposed: TokenTree | None = None
        self._target: Target | None = None
        self._saved: dict[str, Any] | None = None

    def fit(self, target: Target) -> str | None:
        """Bind the drafter, and know how far its trees can reach."""
        reason = self.drafter.fit(target)
        if reason is not None:
            return reason
        shaped, settings = self.shaped, self.settings
        if shaped.widest < 1:
            return f"a drafter whose tree can be exchanged as it is set up: {why_none(shaped)}"
        known = self._target is not None and self._target.model is target.model
        if self._target is None:
            self._initial = tuple(shaped.tree_paths)
        self._target, self._is_chain = target, shaped.widest == 1
        first = self._initial
        most = min(settings.max_chain, settings.max_nodes - 1) if self._is_chain else settings.max_depth
        self._depth = max(most, *map(len, first))
        self._depth = min(self._depth, shaped.deepest or self._depth)
        widest = 2 if self._is_chain else max(settings.max_width, 1 + max(path[-1] for path in first))
        self._width = widest if self._is_chain else min(widest, shaped.widest)
        self._limit = max(settings.max_nodes, len(first) + 1)
        most = max(self._limit, self.drafter.needs.max_nodes)
        self.needs = replace(self.drafter.needs, max_nodes=most, sizes=(*_GRAPHS, len(first) + 1))
        if known:
            return None
        self._prior = self._prior_rates()
        self._edge, self._knows_costs = self._beyond_reckoning(), None
        self._passes.clear()
        self._corrections = CostCorrections(len(first) + 1)
        self._forget()
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self.load_state_dict(saved)
        return None

    def _beyond_reckoning(self) -> float:
        """What the file's tree is worth beyond what is reckoned: by rates and costs alone another one may win, but
        this is the one that did when they were tried.
        """
        if self.file is None:
            return 1.0
        profile, costs = self.file.profile, self.file.costs
        best = choose(profile, costs, self._limit, self._depth, quick=True).rate
        return max(best / expect(self.file.paths, profile, costs).rate, 1.0)

    def _trusts_file(self, target: Target) -> bool:
        """Whether the file's costs are those of this target, as it runs now."""
        if self.file is None:
            return False
        other = self.file.made_elsewhere(target)
        if other:
            _LOG.warning("adaptive tree: its file was made with other %s; costs are measured anew", ", ".join(other))
        return not other

    def _prior_rates(self) -> np.ndarray:
        """float64 ``[D, R]``: the file's rates, or those that the drafter knows of itself, or a guess."""
        known: Sequence[Sequence[float]] | None = None
        if self.file is not None:
            known = self.file.profile.rates
        elif not self._is_chain:
            known = getattr(self.drafter, "acceptance", None)
        guess = np.array(_CHAIN_GUESS) if self._is_chain else _GUESS * np.arange(1.0, self._width + 1) ** -_FALL
        if not known:
            return np.tile(guess, (self._depth, 1))
        rows = [np.asarray(row, float)[: self._width] for row in known]
        # Ranks beyond those that are known fall as the guess does; levels beyond repeat the last one, a little worse.
        rows = [np.append(row, row[-1] * guess[len(row) :] / guess[len(row) - 1]) for row in rows]
        rows += [rows[-1] * 0.9**more for more in range(1, self._depth - len(rows) + 1)]
        return np.stack(rows[: self._depth])

    def _forget(self) -> None:
        self._counts = AcceptanceCounts(self._depth, self._width, self._is_chain)
        self._lengths = DraftLengths(self._depth)
        # By batch size, as passes are timed.
        self._recent: dict[int, deque[StepCost]] = {}
        self._fitted: dict[int, tuple[tuple[float, float, float], tuple[float, float]]] = {}
        self._fit_at = dict[int, int]()
        self._steps = self._since = self.choices = 0
        self._walks = _Walks()
        self._seen = list[_Seen]()
        self._expected = 0.0  # tokens of a walk; 0 = the tree is to be chosen at the next look in any case
        self._rows = 0
        self._corrections.interrupt()
        self._take(self._initial)

    def start(self, state: DecodeState, prefill: Prefill) -> None:
        """The drafter begins; where no file says what a pass costs, passes over such a batch are timed once.

        Another text may be of another character: what was counted weighs half, and plain decoding, which shows nothing
        of what a drafter would get right, gives way to the last tree.
        """
        self.drafter.start(state, prefill)
        self._count()
        if self._plain or state.batch_size != self._rows:
            self._plain, self._expected = False, 0.0
            self._since, self._walks = 0, _Walks()
        self._rows = state.batch_size
        self._corrections.interrupt()
        self._counts.decay(_CARRIED)
        self._lengths.decay(_CARRIED)
        rows, target = state.batch_size, self._target
        assert target is not None
        if self._knows_costs is None:
            self._knows_costs = self._trusts_file(target)
            self._reckoned.clear()
            self._given = None if self.file is None else _padded(self.file.costs, graph_sizes(target))
        if rows in self._passes:
            return
        if not self._fits_online(rows):
            assert self._given is not None
            self._passes[rows] = self._given.passes
            return
        context = state.context
        assert context is not None
        compiled = graph_sizes(target)
        begun = perf_counter()
        sizes = sizes_up_to(self._limit, compiled, coarse=True)
        times = pass_seconds(target, context, sizes, 5, self.drafter.needs.taps, _MEASURING_S)
        self._passes[rows] = curve(times, stairs=compiled is not None)
        self.announce(f"adaptive tree: timed passes of {len(times)} sizes in {perf_counter() - begun:.2f} s")

    def propose(self, state: DecodeState) -> TokenTree:
        """The drafter's tree, or none while plain decoding promises more."""
        self._began = perf_counter()
        tree = self._proposed = root_only(state.root) if self._plain else self.drafter.propose(state)
        self._drafting = perf_counter() - self._began
        return tree

    def update(self, state: DecodeState, tree: TokenTree, verification: Verification) -> None:
        """The drafter learns; walks and times are counted; every so many steps the tree is chosen anew."""
        begun, walked = perf_counter(), verification
        self.drafter.update(state, tree, verification)
        now = perf_counter()
        # Between two passes, which leave nothing in the processor's caches, counting would take several times as long.
        own = tree is self._proposed  # within another drafter it may be shown other trees
        seconds = self._drafting + now - begun, now - self._began
        self._seen.append(
            _Seen(walked.path, walked.finished, walked.was_finished, walked.offered, own, tree.num_nodes, *seconds)
        )
        self._steps += 1
        self._since += 1
        if self._since % self.settings.interval == 0:
            self._count()
            if self._is_worth_choosing(state):
                self._choose(state)

    def _count(self) -> None:
        """Count the steps since the last time, all of which had the same tree."""
        for seen in self._seen:
            if seen.own and not self._plain:
                self._layout.count(seen, self._counts)
                self._walks.add(seen)
                if self._is_chain:
                    self._lengths.add(seen, self._layout.length)
            rows = len(seen.path)
            depth = max((sum(map(bool, offered)) for offered in seen.offered), default=0)
            if self._fits_online(rows):
                cost = StepCost(seen.nodes, depth, seen.draft_s, seen.whole_s)
                self._recent.setdefault(rows, deque(maxlen=_REMEMBERED)).append(cost)
            elif seen.own:
                size = 1 if self._plain else len(self._paths) + 1
                if self._corrections.see(size, seen.whole_s, self._by_file(seen.nodes, depth)):
                    self._expected = 0.0
        self._seen.clear()

    def _is_worth_choosing(self, state: DecodeState) -> bool:
        """Whether the last walks were others than expected. Plain steps see nothing: the way back is by time alone."""
        looks = _FIT_EVERY if self._fits_online(state.batch_size) else _PATIENCE
        late = self._since >= looks * self.settings.interval
        differs = self._plain or late or self._walks.differ(self._expected)
        self._walks = _Walks()
        return differs

    def _by_file(self, nodes: int, depth: int) -> float:
        """Seconds of a step; those of a plain one are known as a whole."""
        assert self._given is not None
        costs, known = self._given, self._reckoned
        if self._plain:
            return costs.plain
        if (nodes, depth) not in known:
            known[nodes, depth] = float(costs.seconds(np.array(nodes), np.array(depth)))
        return known[nodes, depth]

    def _fits_online(self, rows: int) -> bool:
        return not self._knows_costs or rows != 1

    def _choose(self, state: DecodeState) -> None:
        """Change the tree where another one promises more."""
        settings = self.settings
        profile, costs = self._profile(), self._costs(state)
        since, self._since = self._since, 0
        fade = 0.5 ** (since / settings.half_life)
        self._counts.decay(fade)
        self._lengths.decay(fade)
        self._corrections.fade(since)
        assert self._target is not None
        graphs = graph_sizes(self._target)
        sizes = _SIZES | {len(self._initial) + 1} if graphs is None else frozenset(graphs)
        fits, depth = self._fits_online(state.batch_size), self._depth
        if fits and self._is_chain:
            depth = min(depth, 2 * len(self._paths))  # what a much longer draft costs nobody has seen
        best = choose(profile, costs, self._limit, depth, sizes, quick=True)
        paths, rate, plain, more = tuple(best.paths), best.rate, 1 / costs.plain, 1 + settings.gain
        present = tuple(self._paths)
        now = expect(present, profile, costs).rate
        if self.file is not None:
            first = expect(self._initial, profile, costs).rate * self._edge
            now = first if present == self._initial else now
            # Tried longer than any other, it is gone back to where none promises much more.
            if rate <= first * (more if present == self._initial else 1 + settings.gain / 2):
                paths, rate = self._initial, first
        returns = self.file is not None and paths == self._initial
        if not self._plain and plain > max(rate, now) * more:
            self._plain = True
            self.choices += 1
        elif rate > plain * more if self._plain else paths != present and (returns or rate > now * more):
            self._take(paths)
            self.choices += 1
            if fits:  # what it costs is to be seen at the next look
                self._fitted.pop(state.batch_size, None)
                self._expected = 0.0
                return
        self._expected = expect(self._paths, profile, costs).tokens

    def _take(self, paths: Sequence[tuple[int, ...]]) -> None:
        self._plain, self._paths = False, list(paths)
        self.shaped.reshape(paths)
        self._layout = Layout.of(paths, self._is_chain)

    def _profile(self) -> Profile:
        """What the drafter gets right lately."""
        reached, strength = self._counts.reached, self.settings.strength
        seen = (self._counts.taken.sum() + strength) / ((reached * self._prior).sum() + strength)
        scaled = np.minimum(self._prior * np.clip(seen, *_SCALES), 0.98)
        if not self._is_chain:
            return Profile(self._counts.rates(scaled, strength).tolist())
        # Of levels that the file does not know the one above says more than a guess.
        known = 1 if self.file is None else len(self.file.profile.rates)
        taken, room, prior = self._counts.taken[:, 0].tolist(), reached[:, 0].tolist(), scaled[:, 0].tolist()
        for level in range(known, self._depth):
            above = (taken[level - 1] + strength * prior[level - 1]) / (room[level - 1] + strength)
            prior[level] = max(prior[level], _DEEPER * above)
        scaled[:, 0] = prior
        rates = self._counts.rates(scaled, strength).tolist()
        return Profile(rates, self._lengths.offered(), self._lengths.widths())

    def _costs(self, state: DecodeState) -> Costs:
        rows = state.batch_size
        passes, recent = self._passes[rows], self._recent.get(rows)
        if not self._fits_online(rows):
            assert self._given is not None
            costs, seen = self._given, self._corrections
            if seen.is_empty:
                return costs
            return replace(costs, plain=costs.plain * seen.plain, corrections=seen.factors(costs.max_nodes))
        # A fit takes about as long as a choice, and costs change slower than texts.
        due = rows not in self._fitted or self._steps - self._fit_at[rows] >= _FIT_EVERY * self.settings.interval
        if recent and due:
            self._fitted[rows], self._fit_at[rows] = fit_costs(recent, passes), self._steps
        draft, rest = self._fitted.get(rows, ((0.0, 0.0, 0.0), (0.0, 0.0)))
        return Costs(passes, float(passes[0]) + max(rest[0], 0.0), draft, rest)

    def finish(self, state: DecodeState) -> None:
        """The request is over; what was counted stays."""
        self._proposed = None
        self.drafter.finish(state)

    def reset(self) -> None:
        """The first tree, nothing counted; what passes cost is no text and stays known."""
        self.drafter.reset()
        self._saved = None
        if self._target is not None:
            self._forget()

    def state_dict(self) -> dict[str, Any]:
        """``drafter``: its own; ``adaptive``: the tree, the counts and the times, nothing before there is a target."""
        saved: dict[str, Any] = {"drafter": self.drafter.state_dict()}
        if self._target is None:
            return saved if self._saved is None else dict(self._saved)
        self._count()
        times = {
            rows: [[cost.nodes, cost.depth, cost.draft_s, cost.whole_s] for cost in costs]
            for rows, costs in self._recent.items()
        }
        saved["adaptive"] = {
            "paths": [list(path) for path in self._paths],
            "plain": self._plain,
            "steps": self._steps,
            "since": self._since,
            "expected": self._expected,
            "rows": self._rows,
            "walks": astuple(self._walks),
            "corrections": self._corrections.state_dict(),
            "fit_at": dict(self._fit_at),
            "counts": self._counts.state_dict(),
            "lengths": self._lengths.state_dict(),
            "times": times,
            "fitted": {rows: [*draft, *rest] for rows, (draft, rest) in self._fitted.items()},
            "passes": {rows: seconds.tolist() for rows, seconds in self._passes.items()},
        }
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it is none of an adaptive tree, or of another drafter.
        """
        if "drafter" not in saved or not saved.keys() <= {"drafter", "adaptive"}:
            raise ValueError(
                f"expected the state of an adaptive tree (drafter, adaptive), got one with {sorted(saved)}"
            )
        if self._target is None:
            self.drafter.load_state_dict(saved["drafter"])
            self._saved = saved
            return
        self.drafter.load_state_dict(saved["drafter"])
        own = saved.get("adaptive")
        self._forget()
        if own is None:
            return
        self._counts.load_state_dict(own["counts"])
        self._lengths.load_state_dict(own["lengths"])
        self._passes = {int(rows): np.array(seconds) for rows, seconds in own["passes"].items()}
        for rows, times in own["times"].items():
            costs = (StepCost(int(n), int(d), draft, whole) for n, d, draft, whole in times)
            self._recent[int(rows)] = deque(costs, maxlen=_REMEMBERED)
        for rows, (draft_s, node_s, level_s, rest_s, more_s) in own["fitted"].items():
            self._fitted[int(rows)] = (draft_s, node_s, level_s), (rest_s, more_s)
        self._take([tuple(path) for path in own["paths"]])
        self._plain, self._steps = own["plain"], own["steps"]
        self._since, self._expected, self._walks = own["since"], own["expected"], _Walks(*own["walks"])
        self._rows = own["rows"]
        self._corrections.load_state_dict(own["corrections"])
        self._fit_at = {int(rows): int(step) for rows, step in own["fit_at"].items()}


def _padded(costs: Costs, sizes: Sequence[int] | None) -> Costs:
    """Costs where passes are padded to some sizes: a file may know of sizes in between that no graph is made for."""
    if sizes is None:
        return costs
    every = np.arange(1, costs.max_nodes + 1)
    ends = np.minimum([*sizes, costs.max_nodes], costs.max_nodes)
    return replace(costs, passes=costs.passes[ends[np.searchsorted(ends, every)] - 1])
