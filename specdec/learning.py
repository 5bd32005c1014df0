"""What a drafter with weights is to whoever trains it: the two protocols between ``drafters`` and ``specdec.training``.

Shapes: B rows of a batch, T tokens of a row, H hidden size, K depths of the draft, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from specdec.interfaces import Tap

if TYPE_CHECKING:
    from specdec.target import Target


class Lesson(Protocol):
    """What is minimised while a drafter learns: an ``nn.Module`` that registers the parameters that learn, no others.

    Attributes:
        taps: states of the frozen target to learn from.
        steps_ahead: how far ahead of a position the tokens are that its losses are about. A loss is a mean over the
            positions whose token so far ahead is wanted; these are counted over all batches of a step before it begins.
    """

    taps: tuple[Tap, ...]
    steps_ahead: tuple[int, ...]

    def __call__(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor, states: Mapping[Tap, Tensor]
    ) -> dict[str, Tensor]:
        """Judge one batch of packed texts (``specdec.training.objectives`` has the pieces that lessons share).

        Args:
            token_ids: int64 ``[B, T]``; a row holds several texts one after the other.
            positions: int64 ``[B, T]``, of each token in its own text: a 0 starts a text.
            wanted: bool ``[B, T]``, the tokens to be predicted (an assistant's, none of the padding).
            states: tap -> ``[B, T, H]`` of the target over those texts.

        Returns:
            ``loss``, a scalar to descend; ``hits`` int64 ``[K, R]``, for each of the K depths how often the wanted
            token was among the draft's best 1..R; ``counted`` int64 ``[K]``, of how many. Anything else is a scalar to
            be logged.
        """
        ...


@runtime_checkable
class Trainable(Protocol):
    """A drafter whose weights can be learnt for the target that it is bound to."""

    def lesson(self, target: Target, **options: Any) -> Lesson:
        """The module to train; it shares its parameters with this drafter.

        Args:
            target: the one it is bound to, frozen.
            **options: of the loss, as its recipe has them.

        Raises:
            ValueError: an option that this drafter's loss does not have (names those it has), or a value out of range.
        """
        ...

    def settled(self) -> dict[str, Any]:
        """Constructor options that its weights decide, by name, as they are; asked once it is bound to a target.

        A run's config says these, whatever the command said of them, so that it names the run where they were left
        open (null), too. One that was given and disagrees has been refused by then.
        """
        ...

    def save(self, folder: Path, layout: str = "specdec") -> None:
        """Write the weights with a config, so that ``path=folder`` finds them.

        Args:
            folder: made where it is missing.
            layout: ``specdec``, or the name of a public layout of the method.

        Raises:
            ValueError: an unknown layout (lists those there are).
        """
        ...
