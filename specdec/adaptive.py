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
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from specdec.interfaces import DecodeState, Drafter, Prefill, Shaped, Verification
from specdec.target import Target
from specdec.tree import TokenTree, root_only
from specdec.tuning.beliefs import Beliefs, Seen, Walks
from specdec.tuning.calibration import StepCost, why_none
from specdec.tuning.choice import Costs, choose, expect
from specdec.tuning.corrections import CostCorrections, FittedCosts
from specdec.tuning.counts import Layout
from specdec.tuning.files import TreeFile
from specdec.tuning.timing import curve, graph_sizes, pass_seconds, sizes_up_to

_LOG = logging.getLogger("specdec")
_SIZES = frozenset((*range(2, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 129, 8)))
_GRAPHS = (8, 16, 32)  # sizes beside the first tree's and the largest one's, where passes are graphs
_MEASURING_S = 0.2
_FIT_EVERY = 4  # intervals
_CARRIED = 0.5  # of what was counted, from one request to the next
_PATIENCE = 8  # intervals between two choices, at most


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
        self._depth = min(max(most, *map(len, first)), shaped.deepest or max(_SIZES))
        widest = 2 if self._is_chain else max(settings.max_width, 1 + max(path[-1] for path in first))
        self._width = widest if self._is_chain else min(widest, shaped.widest)
        self._limit = max(settings.max_nodes, len(first) + 1)
        most = max(self._limit, self.drafter.needs.max_nodes)
        self.needs = replace(self.drafter.needs, max_nodes=most, sizes=(*_GRAPHS, len(first) + 1))
        if known:
            return None
        self._edge = 1.0 if self.file is None else self.file.beyond_reckoning(self._limit, self._depth)
        self._knows_costs = None
        self._passes.clear()
        self._corrections = CostCorrections(len(first) + 1)
        self._forget()
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self.load_state_dict(saved)
        return None

    def _trusts_file(self, target: Target) -> bool:
        """Whether the file's costs are those of this target, as it runs now."""
        if self.file is None:
            return False
        other = self.file.made_elsewhere(target)
        if other:
            _LOG.warning("adaptive tree: its file was made with other %s; costs are measured anew", ", ".join(other))
        return not other

    def _forget(self) -> None:
        known = None if self._is_chain else getattr(self.drafter, "acceptance", None)
        known = known if self.file is None else self.file.profile.rates
        self._beliefs = Beliefs(known, self._depth, self._width, self._is_chain, self.settings.strength)
        self._fits = FittedCosts(_FIT_EVERY * self.settings.interval)
        self._steps = self._since = self.choices = 0
        self._walks = Walks()
        self._seen = list[Seen]()
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
            self._since, self._walks = 0, Walks()
        self._rows = state.batch_size
        self._corrections.interrupt()
        self._beliefs.decay(_CARRIED)
        rows, target = state.batch_size, self._target
        assert target is not None
        if self._knows_costs is None:
            self._knows_costs = self._trusts_file(target)
            self._reckoned.clear()
            self._given = None if self.file is None else self.file.costs.padded(graph_sizes(target))
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
            Seen(walked.path, walked.finished, walked.was_finished, walked.offered, own, tree.num_nodes, *seconds)
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
                self._beliefs.add(seen, self._layout)
                self._walks.add(seen)
            rows, depth = len(seen.path), seen.depth
            if self._fits_online(rows):
                self._fits.see(rows, StepCost(seen.nodes, depth, seen.draft_s, seen.whole_s))
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
        self._walks = Walks()
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
        profile, costs = self._beliefs.profile(), self._costs(state)
        since, self._since = self._since, 0
        fade = 0.5 ** (since / settings.half_life)
        self._beliefs.decay(fade)
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
                self._fits.renew(state.batch_size)
                self._expected = 0.0
                return
        self._expected = expect(self._paths, profile, costs).tokens

    def _take(self, paths: Sequence[tuple[int, ...]]) -> None:
        self._plain, self._paths = False, list(paths)
        self.shaped.reshape(paths)
        self._layout = Layout.of(paths, self._is_chain)

    def _costs(self, state: DecodeState) -> Costs:
        rows = state.batch_size
        passes = self._passes[rows]
        if not self._fits_online(rows):
            assert self._given is not None
            costs, seen = self._given, self._corrections
            if seen.is_empty:
                return costs
            return replace(costs, plain=costs.plain * seen.plain, corrections=seen.factors(costs.max_nodes))
        return self._fits.costs(rows, passes, self._steps)

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
        saved["adaptive"] = {
            "paths": [list(path) for path in self._paths],
            "plain": self._plain,
            "steps": self._steps,
            "since": self._since,
            "expected": self._expected,
            "rows": self._rows,
            "walks": astuple(self._walks),
            "corrections": self._corrections.state_dict(),
            "fits": self._fits.state_dict(),
            "beliefs": self._beliefs.state_dict(),
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
        self._beliefs.load_state_dict(own["beliefs"])
        self._passes = {int(rows): np.array(seconds) for rows, seconds in own["passes"].items()}
        self._fits.load_state_dict(own["fits"])
        self._take([tuple(path) for path in own["paths"]])
        self._plain, self._steps = own["plain"], own["steps"]
        self._since, self._expected, self._walks = own["since"], own["expected"], Walks(*own["walks"])
        self._rows = own["rows"]
        self._corrections.load_state_dict(own["corrections"])
