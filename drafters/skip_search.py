"""Skip sets, and SWIFT's search for a good one (2410.06916): which sub-layers a draft can do without.

A skip set names the attention and the feed-forward parts that a draft leaves out, each by layer. A candidate is scored
by its *matchness*: run once over tokens that the target has emitted already, all in parallel, it is the share of
them that the draft's argmax gets right. The search proposes sets of a fixed number of sub-layers at random, and every
25th by Bayesian optimisation.

Differences from the authors' code: a request's text is first scored with the set in use, so that candidates are
compared on one text (theirs keeps the score of an earlier, perhaps easier one, and never scores the first set); the
committed K/V are set aside in the same cache while a candidate runs, instead of cloning the cache.

Shapes: B rows, W tokens of a scored text, L layers, D = 2 (L - 2) sub-layers that may be skipped.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.interfaces import Context
from specdec.routing import Route
from specdec.selection import argmax
from specdec.target import Target
from specdec.tree import TokenTree, chain

_STATE = ("attention", "mlp", "best_score", "iteration", "tolerance", "points", "scores", "generator")


@dataclass(frozen=True)
class SkipSet:
    """The layers whose attention, and those whose feed-forward part, a draft leaves out."""

    attention: frozenset[int]
    mlp: frozenset[int]

    @classmethod
    def of(cls, attention: Iterable[int], mlp: Iterable[int]) -> SkipSet:
        """From layer numbers.

        Raises:
            ValueError: something else than layer numbers.
        """
        sets = [list(attention), list(mlp)]
        wrong = [n for numbers in sets for n in numbers if not isinstance(n, int) or isinstance(n, bool) or n < 0]
        if wrong:
            raise ValueError(f"a skip set lists layer numbers from 0 on; got {wrong[0]!r}")
        return cls(frozenset(sets[0]), frozenset(sets[1]))

    @property
    def last(self) -> int:
        """The highest layer named, -1 where there is none."""
        return max(self.attention | self.mlp, default=-1)

    @property
    def route(self) -> Route:
        """A pass without these sub-layers."""
        return Route(skip_attention=self.attention, skip_mlp=self.mlp)

    def as_dict(self) -> dict[str, list[int]]:
        """The layout of the published files: ``{"attention": [...], "mlp": [...]}``."""
        return {"attention": sorted(self.attention), "mlp": sorted(self.mlp)}


def uniform(num_layers: int) -> SkipSet:
    """SWIFT's first guess: every odd layer but the last, whole."""
    odd = frozenset(range(1, num_layers - 1, 2))
    return SkipSet(odd, odd)


def unified(num_layers: int, speedup: float) -> SkipSet:
    """Unified Layer Skipping (2404.06954): ``K = floor(L / speedup)`` layers stay, evenly spread, first and last too.

    Raises:
        ValueError: a speed-up that keeps fewer than two layers, or more than there are.
    """
    kept = int(num_layers / speedup) if speedup >= 1 else 0
    if kept < 2:
        raise ValueError(f"expected 1 <= speedup <= {num_layers / 2:g} for {num_layers} layers, got {speedup:g}")
    interval = num_layers // (kept - 1)
    inner = [layer for layer in range(1, num_layers - 1) if layer % interval == 0][: kept - 2]
    skipped = frozenset(range(1, num_layers - 1)) - frozenset(inner)
    return SkipSet(skipped, skipped)


def load_skip_set(path: str | Path, key: str | None = None) -> SkipSet:
    """Read a skip set, published or tuned: ``{"attention": [...], "mlp": [...]}``, alone or under the model's name.

    Args:
        path: a JSON file.
        key: which entry; None where there is only one.

    Raises:
        ValueError: the file holds no such entry; lists those it holds.
    """
    held = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    entries = {"": held} if isinstance(held, dict) and "attention" in held else held
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and {"attention", "mlp"} <= e.keys() for e in entries.values()
    ):
        raise ValueError(f'{path} is no file of skip sets; expected {{"model": {{"attention": [...], "mlp": [...]}}}}')
    if key is None and len(entries) == 1:
        key = next(iter(entries))
    if key not in entries:
        raise ValueError(f"{path} holds skip sets for {', '.join(entries)}; got key={key!r}")
    return SkipSet.of(entries[key]["attention"], entries[key]["mlp"])


@torch.no_grad()
def matchness(target: Target, context: Context, texts: Sequence[Sequence[int] | np.ndarray], route: Route) -> float:
    """How often a draft agrees with what the target emitted, run once over all of it in parallel.

    The draft reads the prompt's own K/V and writes its K/V for the emitted tokens where the committed ones stand;
    these wait behind the committed tokens meanwhile and are put back, bit by bit.

    Args:
        target: of the request.
        context: of the request, somewhere behind the first W emitted tokens.
        texts: per row its first W + 1 emitted tokens; an empty one is not scored.
        route: the draft.

    Returns:
        The share of the W tokens behind the first that the draft's argmax equals, all rows together.
    """
    width = max(len(text) for text in texts) - 1
    scored = torch.tensor([len(text) > 0 for text in texts])
    tokens = torch.tensor([[*text] if len(text) else [0] * (width + 1) for text in texts], device=target.device)
    base, cache = context.base_lengths, context.cache
    offsets = torch.arange(width, device=target.device)
    place = torch.tensor(base, device=target.device)[:, None] + offsets
    # A stopped row may hold fewer than W tokens behind its prompt: what waits must not lie where the draft writes.
    behind = [max(now, start + width) for now, start in zip(context.lengths, base, strict=True)]
    aside = torch.tensor(behind, device=target.device)[:, None] + offsets
    cache.reserve(max(behind) + width)
    past = replace(context, lengths=list(base), budgets=[width + 1] * len(base))
    cache.move(place, aside)
    try:
        logits = target.run(past, TokenTree(tokens[:, :-1], chain(width, target.device)), route=route).logits
    finally:
        cache.move(aside, place)
    return float((argmax(logits) == tokens[:, 1:])[scored].double().mean())


class SkipSearch:
    """The state of a search; it lives as long as the stream of requests.

    Args:
        ratio: r, share of the D sub-layers to skip, rounded down to a number.
        context_window: W, emitted tokens that a candidate is scored on.
        max_score: stop when the best set scores more than this.
        max_tolerance: stop when more candidates than this in a row were no better.
        max_iterations: stop after more candidates than this.
        bayesian_interval: every so many candidates, one comes from Bayesian optimisation; 0 = all are random.
        seed: of the random candidates. The search has a stream of its own, because a request's begins anew each time
            and would propose the same sets again.

    Raises:
        ValueError: values out of range.
    """

    def __init__(
        self,
        ratio: float = 0.45,
        context_window: int = 50,
        max_score: float = 0.93,
        max_tolerance: int = 300,
        max_iterations: int = 1000,
        bayesian_interval: int = 25,
        seed: int = 2024,
    ) -> None:
        if not 0 <= ratio <= 1 or context_window < 1 or bayesian_interval < 0:
            raise ValueError(
                "expected 0 <= ratio <= 1, context_window >= 1 and bayesian_interval >= 0; got "
                f"{ratio=}, {context_window=}, {bayesian_interval=}"
            )
        self.ratio, self.context_window, self.max_score = ratio, context_window, max_score
        self.max_tolerance, self.max_iterations = max_tolerance, max_iterations
        self.bayesian_interval, self.seed = bayesian_interval, seed
        self.num_layers = 0
        self._initial = self.best = SkipSet(frozenset(), frozenset())
        self.reset()

    def bind(self, num_layers: int, initial: SkipSet) -> None:
        """Search for a model of so many layers, from a first set on; a search that is bound to such a one goes on."""
        if num_layers != self.num_layers:
            self.num_layers, self._initial = num_layers, initial
            self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.best, self.best_score, self.iteration, self.tolerance = self._initial, 0.0, 0, 0
        self._points: list[np.ndarray] = []
        self._scores: list[float] = []
        self._generator = torch.Generator("cpu").manual_seed(self.seed)

    @property
    def count(self) -> int:
        """Sub-layers that every candidate skips: ``floor(D r)``."""
        return int(self._dimensions * self.ratio)

    @property
    def done(self) -> bool:
        """Whether one of the three limits has been reached."""
        return (
            self.count == 0
            or self.best_score > self.max_score
            or self.tolerance > self.max_tolerance
            or self.iteration > self.max_iterations
        )

    @property
    def _dimensions(self) -> int:
        return 2 * max(self.num_layers - 2, 0)

    def settle(self) -> None:
        """Do without Bayesian optimisation, and warn of it once, where its library is not installed."""
        if self.bayesian_interval and importlib.util.find_spec("bayes_opt") is None:
            self.bayesian_interval = 0
            warnings.warn(
                "the search for a skip set has random candidates only: the package bayesian-optimization is missing "
                "(pip install 'specdec-hf[swift]'; search.bayesian_interval=0 or search=false asks for none)",
                UserWarning,
                stacklevel=2,
            )

    def rebase(self, score: float) -> None:
        """The set in use scores this on the text that candidates are compared on from now on."""
        self.best_score = score

    def propose(self) -> SkipSet:
        """The next candidate; its score is to be told before another is asked for."""
        interval = self.bayesian_interval
        if interval and self._points and (self.iteration + 1) % interval == 0:
            self._candidate = self._suggest()
        else:
            self._candidate = np.zeros(self._dimensions)
            self._candidate[torch.randperm(self._dimensions, generator=self._generator)[: self.count].numpy()] = 1.0
        return self._skip_set(self._candidate)

    def tell(self, score: float) -> None:
        """The latest candidate's score: it becomes the best, or is dropped."""
        self.iteration += 1
        self._points.append(self._candidate)
        self._scores.append(score)
        if score > self.best_score:
            self.best, self.best_score, self.tolerance = self._skip_set(self._candidate), score, 0
        else:
            self.tolerance += 1

    def _suggest(self) -> np.ndarray:
        """A point ``[D]`` in [0, 1] of high upper confidence bound under a Gaussian process over all that was told."""
        from bayes_opt.acquisition import UpperConfidenceBound
        from bayes_opt.target_space import TargetSpace
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import Matern

        # Names in the order of the dimensions, whether the library sorts them or not.
        bounds = {f"x{index:05d}": (0.0, 1.0) for index in range(self._dimensions)}
        space = TargetSpace(None, bounds)
        # A set that came up again, on another text perhaps, enters once, with its mean score.
        points, which = np.unique(np.stack(self._points), axis=0, return_inverse=True)
        means = np.bincount(which.ravel(), self._scores) / np.bincount(which.ravel())
        for point, score in zip(points, means, strict=True):
            space.register(point, float(score))
        process = GaussianProcessRegressor(Matern(nu=2.5), alpha=1e-2, normalize_y=True, random_state=self.iteration)
        # The point is rounded to a set: far less than the library's usual effort suggests the same.
        acquisition = UpperConfidenceBound(kappa=2.5)
        return np.asarray(acquisition.suggest(process, space, 2000, 1, random_state=self.iteration))

    def _skip_set(self, point: np.ndarray) -> SkipSet:
        """The ``count`` largest entries: attention of layers 1..L-2, then their feed-forward parts."""
        chosen = np.argsort(-point, kind="stable")[: self.count]
        inner = self.num_layers - 2
        return SkipSet.of(
            (int(index) + 1 for index in chosen if index < inner),
            (int(index) - inner + 1 for index in chosen if index >= inner),
        )

    def state_dict(self) -> dict[str, Any]:
        """The best set and everything the search goes on from."""
        points = np.stack(self._points) if self._points else np.zeros((0, self._dimensions))
        return {
            **self.best.as_dict(),
            "best_score": self.best_score,
            "iteration": self.iteration,
            "tolerance": self.tolerance,
            "points": torch.from_numpy(points.copy()),
            "scores": torch.tensor(self._scores, dtype=torch.float64),
            "generator": self._generator.get_state(),
        }

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError where this is no saved search, or one over other layers than those it is bound to."""
        if set(saved) != set(_STATE):
            raise ValueError(f"expected the state of a search ({', '.join(_STATE)}), got {sorted(saved)}")
        best = SkipSet.of(saved["attention"], saved["mlp"])
        _check_values(saved)
        if not self.num_layers:
            return
        if saved["points"].shape[1] != self._dimensions:
            raise ValueError(
                f"expected the state of a search over {self._dimensions} sub-layers ({self.num_layers} layers), got "
                f"one over {saved['points'].shape[1]}"
            )
        if best.last >= self.num_layers:
            raise ValueError(f"expected a set of layers 0 to {self.num_layers - 1}, got one that names {best.last}")

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved search.

        Raises:
            ValueError: it is none, or belongs to a model of another depth.
        """
        self.check_state(saved)
        self.best = SkipSet.of(saved["attention"], saved["mlp"])
        self.best_score, self.iteration, self.tolerance = saved["best_score"], saved["iteration"], saved["tolerance"]
        self._points, self._scores = list(saved["points"].numpy().copy()), saved["scores"].tolist()
        self._generator.set_state(saved["generator"])


def _check_values(saved: Mapping[str, Any]) -> None:
    """Raise ValueError where an entry of a saved search is of another type or size than ``state_dict`` writes."""
    for name in ("iteration", "tolerance"):
        if type(saved[name]) is not int or saved[name] < 0:
            raise ValueError(f"{name}: expected a whole number from 0 on, got {saved[name]!r}")
    if not isinstance(saved["best_score"], int | float):
        raise ValueError(f"best_score: expected a number, got {saved['best_score']!r}")
    for name, dimensions in (("points", 2), ("scores", 1)):
        held = saved[name]
        if not isinstance(held, Tensor) or held.ndim != dimensions or held.dtype != torch.float64:
            raise ValueError(f"{name}: expected {dimensions} dimensions of torch.float64, got {_kind(held)}")
    if len(saved["points"]) != len(saved["scores"]):
        raise ValueError(f"expected a score per point, got {len(saved['points'])} and {len(saved['scores'])}")
    try:
        torch.Generator("cpu").set_state(saved["generator"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"generator: expected the state of one, got {_kind(saved['generator'])}") from error


def _kind(held: Any) -> str:
    return f"{tuple(held.shape)}, {held.dtype}" if isinstance(held, Tensor) else repr(held)
