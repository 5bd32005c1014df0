"""What several commands share: build the target of a config, make it speculate, decode plainly and speculatively."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from specdec.build import build, build_drafter, build_verifier
from specdec.generation import attach
from specdec.loading import Loaded


class Session:
    """One target with one drafter, as a config describes them."""

    def __init__(self, config: DictConfig) -> None:
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        self.config: dict[str, Any] = {str(key): value for key, value in plain.items()}
        target = dict(self.config["target"])
        if self.config.get("dtype") is not None:
            target["dtype"] = self.config["dtype"]
        self.loaded: Loaded = build(target)
        if self.config.get("threads"):
            torch.set_num_threads(self.config["threads"])

    @property
    def model(self) -> Any:
        """The target."""
        return self.loaded.model

    def speculate(self) -> Any:
        """Make the target speculate with the configured drafter; returns the model."""
        verifier = build_verifier(self.config["verifier"])
        if self.config.get("acceptance"):
            verifier.rule = build(self.config["acceptance"])
        return attach(self.model, build_drafter(self.config["drafter"]), verifier)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate`` that the config sets."""
        temperature = self.config.get("temperature") or 0
        options: dict[str, Any] = {"max_new_tokens": self.config["max_new_tokens"], "do_sample": temperature > 0}
        if temperature > 0:
            options |= {
                key: self.config[key] for key in ("temperature", "top_k", "top_p") if self.config.get(key) is not None
            }
        return options

    def generate(self, ids: Tensor, **extra: Any) -> Any:
        """``model.generate`` with the config's options on ids ``[1, W]``."""
        torch.manual_seed(self.config.get("seed", 0))
        mask = torch.ones_like(ids)
        return self.model.generate(input_ids=ids, attention_mask=mask, **self.options(), **extra)

    def prompts(self) -> list[str]:
        """The configured prompts, as a list.

        Raises:
            ValueError: there is none.
        """
        prompts = self.config.get("prompts") or self.config.get("prompt")
        if not prompts:
            raise ValueError('no prompt; give prompt="..." or prompts=[...]')
        return [prompts] if isinstance(prompts, str) else list(prompts)
