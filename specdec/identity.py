"""By what a model is known again, wherever it lies, and the device that it runs on."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from specdec.target import Target

_REMEMBERED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def remember(target: Target) -> None:
    """Keep the fingerprint as it is now, for a model whose weights will no longer be in one place."""
    _REMEMBERED[target.model] = fingerprint(target)


@torch.no_grad()
def fingerprint(target: Target) -> str:
    """Of the config and of some numbers of every parameter: another model, or another training of it, has another."""
    if target.model in _REMEMBERED:
        return _REMEMBERED[target.model]
    config = {key: value for key, value in target.model.config.to_dict().items() if not key.startswith("_")}
    for key in ("transformers_version", "use_cache"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in target.model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(flat.numel() // 64, 1)].float().cpu()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform.startswith("linux"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
