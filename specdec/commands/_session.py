"""What several commands share: build the target of a config, make it speculate, decode plainly and speculatively."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig

from specdec.adaptive import Adaptive
from specdec.audit import Pair
from specdec.build import Tree, build, build_attention, build_drafter, build_verifier, with_tree
from specdec.evaluation.losslessness import plain_pair
from specdec.generation import attach
from specdec.loading import Loaded


def checked_temperature(temperature: Any) -> float:
    """A temperature as the config has it, None = 0.

    Raises:
        ValueError: it is no number, or negative.
    """
    if temperature is None:
        return 0
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or temperature < 0:
        raise ValueError(f"expected temperature >= 0 (0 = greedy), got {temperature!r}")
    return temperature


def say_ignored(drafter: Any, say: Callable[[str], None], most: int = 3) -> None:
    """Tell a user what the file of a drafter's weights holds besides them, in one line.

    Args:
        drafter: that may have loaded weights, or the adaptive one around it.
        say: told the line, where there is one.
        most: so many entries by name.
    """
    drafter = getattr(drafter, "drafter", drafter)
    ignored = getattr(drafter, "ignored", [])
    if ignored:
        more = f" and {len(ignored) - most} more" if len(ignored) > most else ""
        say(f"{drafter.name}: ignored in {drafter.loaded_from}: {', '.join(ignored[:most])}{more}")


class Session:
    """One target with one drafter, as a config describes them."""

    def __init__(self, config: DictConfig) -> None:
        if OmegaConf.is_missing(config.target, "path"):
            raise ValueError("target=hf needs a model: target.path=FOLDER_OR_HUB_ID")
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        self.config: dict[str, Any] = {str(key): value for key, value in plain.items()}
        target = dict(self.config["target"])
        if self.config.get("dtype") is not None:
            target["dtype"] = self.config["dtype"]
        self.loaded: Loaded = build(target)
        self._told = set[str]()  # of which weights it was said what they hold besides
        if self.config.get("threads"):
            torch.set_num_threads(self.config["threads"])

    @property
    def model(self) -> Any:
        """The target."""
        return self.loaded.model

    def speculate(self) -> Any:
        """Make the target speculate with the configured drafter; returns the model."""
        return self.attach(self.config["drafter"], tree=self.config.get("tree"))

    def attach(
        self,
        drafter: str | Mapping[str, Any],
        configured_rule: bool = True,
        tree: Tree | None = None,
    ) -> Any:
        """Make the target speculate with a drafter, named or as its config; returns the model.

        ``configured_rule=False`` leaves the config's ``acceptance`` out, as a baseline needs it. ``tree``: as
        ``specdec.build.with_tree`` takes it.
        """
        verifier = build_verifier(self.config["verifier"])
        if configured_rule and self.config.get("acceptance"):
            verifier.rule = build(self.config["acceptance"])
        compiling = Console(stderr=True).print if self.loaded.compile else None
        attention = build_attention(self.config.get("attention"))
        built = with_tree(build_drafter(drafter), tree, self.model)
        if isinstance(built, Adaptive):
            built.announce = Console(stderr=True).print
        model = attach(self.model, built, verifier, compiling, self.loaded.cuda_graphs, attention)
        say_ignored(built, self._say_once)
        return model

    def _say_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate`` that the config sets.

        Raises:
            ValueError: a value that is no number, or out of range.
        """
        temperature, new_tokens = checked_temperature(self.config["temperature"]), self.config["max_new_tokens"]
        if not isinstance(new_tokens, int):
            raise ValueError(f"expected max_new_tokens to be a whole number, got {new_tokens!r}")
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
        return options | ({"temperature": temperature, **self.warpers()} if temperature > 0 else {})

    def warpers(self) -> dict[str, Any]:
        """``top_k`` and ``top_p`` where they are set."""
        return {key: self.config[key] for key in ("top_k", "top_p") if self.config[key] is not None}

    def generate(self, ids: Tensor, **extra: Any) -> Any:
        """``model.generate`` with the config's options on ids ``[1, W]``."""
        torch.manual_seed(self.config["seed"])
        mask = torch.ones_like(ids)
        return self.model.generate(input_ids=ids, attention_mask=mask, **self.options(), **extra)

    def without_processors(self) -> None:
        """Drop what the model's own generation config adds (penalties, ...): the audit judges argmaxes."""
        own = self.model.generation_config
        kept = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.model.generation_config = GenerationConfig(**kept)

    def fill_pad(self) -> None:
        """Name a padding token where the model has none; transformers would say so each time."""
        own, tokenizer = self.model.generation_config, self.loaded.tokenizer
        if own.pad_token_id is None:
            known = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None]
            own.pad_token_id = known[0] if known else 0

    def pair(self, ids: Tensor, speculative: Tensor) -> Pair:
        """Decode a prompt plainly, for the audit of a speculative text of it."""
        torch.manual_seed(self.config["seed"])
        return plain_pair(self.model, ids, speculative, self.options())

    def show_token(self, token: int) -> str:
        """A token as text; -1 is the end of the text."""
        return repr(self.loaded.tokenizer.decode([token])) if token >= 0 else "the end"

    def prompts(self) -> list[str]:
        """The configured prompts; ``prompt`` goes before the ``prompts`` of a recipe.

        Raises:
            ValueError: there is none.
        """
        prompts = self.config["prompt"] or self.config["prompts"]
        if not prompts:
            raise ValueError('no prompt; give prompt="..." or prompts=[...]')
        texts = prompts if isinstance(prompts, list) else [prompts]
        return [str(text) for text in texts]
