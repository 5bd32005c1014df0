"""By what a model is known again, wherever it lies."""

from __future__ import annotations

import hashlib
import json

import torch

from specdec.target import Target


@torch.no_grad()
def fingerprint(target: Target) -> str:
    """Of the config and of some numbers of every parameter: another model, or another training of it, has another."""
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
