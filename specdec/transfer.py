"""From the host to the device without waiting.

A plain copy waits until the device has done all that was asked of it before, as reading back does. In the loop only one
thing may wait: the verifier, for what was accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(values: Sequence[Any] | np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Host values as a tensor on a device; they may be changed at once."""
    # Memory that is not pinned is staged before the copy returns, so nothing has to be kept alive.
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.as_tensor(values, device="cpu")
    return host.to(device, non_blocking=True)
