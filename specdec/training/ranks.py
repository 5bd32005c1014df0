"""The processes of one training, one per device, as ``torchrun`` and ``accelerate launch`` start them.

The Trainer distributes the training itself. What comes before it (reading texts, claiming the folder, filling the
cache) is agreed on here, through the launcher's key-value store: no tensor travels, no device has to be there, and a
wait is as long as the work that is waited for, where collective operations give up after some minutes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

_EVERY = 0.05  # seconds between two looks at the store
_LAST_WORDS = 5.0  # seconds that the first one has to say what is wrong
_TOLD = (ValueError, OSError, ImportError)  # what a user got wrong; anything else is a bug, and shows its traceback
Value = TypeVar("Value")


class Ranks:
    """This process among those of its launcher.

    Args:
        rank: 0 is the first, which writes and speaks.
        size: how many there are.
        store: of the launcher; None where there is one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._store, self._calls = store, 0

    @classmethod
    def launched(cls) -> Ranks:
        """Those that the environment speaks of (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``)."""
        if launched_rank() is None:
            return cls()
        store, rank, size = next(rendezvous("env://"))
        return cls(rank, size, PrefixStore("specdec", store))

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def share(self, value: Value | None) -> Value:
        """What the first one gives, a value that JSON holds; the others wait for it, and what they give is ignored."""
        return self._gather(value, [0])[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where the block fails on one, it fails on all: nobody waits for a process that will not come.

        Raises:
            ValueError: on the first, where only others failed; says which of them, and why.
            SystemExit: on the others, once the first has said what is wrong.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again, once the others know
            failure = error
        if self.size == 1:
            if failure is not None:
                raise failure
            return
        mine = None if failure is None else f"{failure}" if isinstance(failure, _TOLD) else repr(failure)
        said = self._gather(mine, list(range(self.size)))
        failed = [rank for rank, reason in enumerate(said) if reason is not None]
        if not failed:
            return
        if self.is_first:
            raise failure or ValueError(f"process {failed[0]} of {self.size}: {said[failed[0]]}")
        if failure is not None and not isinstance(failure, _TOLD) and failed[0] == self.rank:
            raise failure
        time.sleep(_LAST_WORDS)  # a launcher stops all of them when one has left
        sys.exit(2)

    def _gather(self, value: Any, givers: list[int]) -> list[Any]:
        """What each of ``givers`` gave in this call; all processes make the same calls in the same order."""
        self._calls += 1
        if self._store is None:
            return [value]
        keys = [f"{self._calls}/{rank}" for rank in givers]
        if self.rank in givers:
            self._store.set(f"{self._calls}/{self.rank}", json.dumps(value))
        while not self._store.check(keys):
            time.sleep(_EVERY)
        return [json.loads(self._store.get(key)) for key in keys]


def launched_rank() -> int | None:
    """This process's number among several that a launcher started; None where it is the only one."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ and dist.is_available()
    return int(os.environ["RANK"]) if several else None
