"""Where figures come from: command, code, versions, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from specdec.identity import device_name
from specdec.loading import Loaded

_PACKAGES = ("torch", "transformers", "numpy", "hydra-core", "tokenizers", "triton", "accelerate", "peft")


def provenance(
    loaded: Loaded, command: Sequence[str], config: Mapping[str, Any], shard: str | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """What has to be known to believe, and to repeat, a run.

    Args:
        loaded: the target.
        command: as typed.
        config: resolved.
        shard: ``i/n``, None for all.
        overrides: what was set on the command line.
    """
    versions = {"python": platform.python_version(), "specdec": _version("specdec-hf") or "not installed: a checkout"}
    versions |= {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "command": shlex.join(command),
        "overrides": list(overrides),
        "config": dict(config),
        "git": git_state(Path(__file__).resolve().parent),
        "versions": versions,
        "target": loaded.name,
        "device": device_name(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "attention": getattr(loaded.model.config, "_attn_implementation", None),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "seed": config.get("seed"),
        "shard": shard,
        "started": now(),
    }


def now() -> str:
    """Time of day, UTC, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def git_state(folder: Path) -> dict[str, Any] | None:
    """SHA of the checkout that this code runs from, and whether tracked files differ; None outside of one."""
    sha = _git(folder, "rev-parse", "HEAD")
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    if sha is None or tracked is None:  # installed into an environment that happens to lie within a checkout
        return None
    return {"sha": sha, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
