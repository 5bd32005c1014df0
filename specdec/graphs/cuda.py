"""CUDA graphs: a pass recorded once over fixed buffers and launched as a whole from then on.

Not run on any device yet; the tests marked ``gpu`` are its proof where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.graphs.passes import Run

_WARM_UPS = 2  # libraries choose their kernels and allocate their workspaces in the first passes


class CudaGraphs:
    """Captures functions over fixed buffers; what they allocate lies in one memory pool.

    A captured function keeps the addresses of all it touched: whoever captures holds its inputs, and the outputs are
    written over by every replay. Captured functions must not run at the same time. Requests have the slabs of earlier
    ones where they fit, with what was captured over them (``graphs.shelf``); else their passes are captured anew.

    Args:
        device: a CUDA device.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need a target on a CUDA device, this one is on {device}; use compile=true there"
            )
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self._first: Run | None = None

    def __call__(self, run: Run) -> Run:
        """Record ``run``, whose buffers hold a valid pass; it may run several times on the way."""
        if self._first is None:
            # A pool must not be captured into again once all its graphs are gone, so one stays.
            self._first = self._record(lambda: [torch.zeros(1, device=self.device)])
        return self._record(run)

    def _record(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = run()

        def replay() -> list[Tensor]:
            graph.replay()
            return outputs

        return replay
