"""Who is measured: from the names in a config to methods of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException

from specdec.build import choices, load
from specdec.commands._session import Session
from specdec.evaluation.methods import Batch, Method, Speculating, Transformers
from specdec.evaluation.records import COLD, WARM, file_part
from specdec.evaluation.runner import Setting
from specdec.generation import restore, speculation_of

BASELINES = ("transformers", "prompt_lookup", "assistant")
_REFUSALS = (ValueError, OSError, ImportError, NotImplementedError, OmegaConfBaseException)


class Contenders:
    """All methods of one evaluation, each with objects of its own, on one target.

    Args:
        session: the target, and the config that names the methods.
        choice: name of the drafter that the config's group ``drafter`` chose.

    Attributes:
        left_out: method -> why it is not measured.
        first: name of the (first) drafter.

    Raises:
        ValueError: an unknown name, a drafter that does not fit, a name used twice.
    """

    def __init__(self, session: Session, choice: str) -> None:
        self.session, self.left_out = session, dict[str, str]()
        config, model = session.config, session.model
        eos = model.generation_config.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        states = config["states"]
        if (
            not isinstance(states, list)
            or not states
            or sorted({*states}) != sorted(states)
            or {*states} - {WARM, COLD}
        ):
            raise ValueError(f"expected states to be a list of warm and cold, each once; got {states!r}")
        self._plain = self._speculating("none", "none", "plain")
        self._transformers = [self._baseline(name) for name in self._baselines()]
        self._drafters = list(self._all(choice))
        names = [name for name in dict.fromkeys(method.name for method in self._drafters)]
        self.first = names[0] if names else "none"
        restore(model)

    def __call__(self, setting: Setting) -> list[Method]:
        """The methods that can run under a setting, the plain loop first."""
        theirs = [m for m in self._transformers if setting.batch_size == 1 or not m.extra]
        return [self._plain, *theirs, *self._drafters]

    def _baselines(self) -> list[str]:
        config = self.session.config
        wanted = list(
            dict.fromkeys([*(config["baselines"] or []), *([config["baseline"]] if config["baseline"] else [])])
        )
        unknown = [name for name in wanted if name not in BASELINES]
        if unknown:
            raise ValueError(
                f"unknown baseline {unknown[0]!r}; known: {', '.join(BASELINES)} (none is always measured)"
            )
        batches = config["batch_size"] if isinstance(config["batch_size"], list) else [config["batch_size"]]
        if any(size != 1 for size in batches):
            own = [name for name in wanted if name != "transformers"]
            self.left_out |= {f"transformers_{name}": "its speculation takes one row at a time" for name in own}
        return wanted

    def _baseline(self, name: str) -> Transformers:
        config, model = self.session.config, self.session.model
        if name == "transformers":
            return Transformers(model, self._eos, name)
        if name == "prompt_lookup":
            extra = {"prompt_lookup_num_tokens": config["prompt_lookup_num_tokens"]}
            return Transformers(model, self._eos, "transformers_prompt_lookup", extra)
        if not config["assistant"]:
            raise ValueError("baseline=assistant needs a smaller model: assistant=FOLDER_OR_HUB_ID")
        from transformers import AutoModelForCausalLM

        assistant = AutoModelForCausalLM.from_pretrained(config["assistant"], dtype=model.dtype)
        return Transformers(
            model, self._eos, "transformers_assistant", {"assistant_model": assistant.to(model.device).eval()}
        )

    def _wanted(self, choice: str) -> Iterator[tuple[str, str | Mapping[str, Any], Any]]:
        """Names for tables, names or configs of drafters, and their trees."""
        config = self.session.config
        wanted, tree = config["drafters"], config.get("tree")
        if wanted is None:
            yield choice, config["drafter"], tree
            return
        if tree not in (None, load("tree", "published")):
            raise ValueError(
                "tree=... goes with drafter=...; of several drafters each has its own: {name: ..., tree: FILE}"
            )
        if wanted == "all":
            wanted = [name for name in choices("drafter") if name not in config["exclude"]]
        for entry in [wanted] if isinstance(wanted, str) else wanted:
            if isinstance(entry, str):
                yield entry, load("drafter", entry), None
                continue
            options = dict(entry)
            name = options.pop("name", None)
            if not isinstance(name, str):
                raise ValueError(f"expected drafters to be names or {{name: ..., option: ...}}, got {entry!r}")
            label = str(options.pop("label", name))
            tree = _own_tree(options)
            yield label, load("drafter", name, options), tree

    def _all(self, choice: str) -> Iterator[Speculating]:
        lenient, seen = self.session.config["drafters"] == "all", {"none"}
        for name, config, tree in self._wanted(choice):
            if isinstance(config, Mapping) and config.get("_target_") == load("drafter", "none")["_target_"]:
                continue  # the plain loop is measured anyway
            if file_part(name) in seen:
                raise ValueError(f"two methods are called {name!r}, or alike in file names; give one of them a label")
            seen.add(file_part(name))
            try:
                yield from self._states(name, config, tree)
            except _REFUSALS as error:
                if not lenient:
                    raise
                self.left_out[name] = str(error).splitlines()[0]

    def _states(self, name: str, config: str | Mapping[str, Any], tree: Any) -> list[Speculating]:
        """The method once where it learns nothing, else once per state that is asked for."""
        method = self._speculating(name, config, tree=tree)
        if not self._learns(method):
            return [method]
        states = self.session.config["states"]
        methods = [method] + [self._speculating(name, config, tree=tree) for _ in states[1:]]
        for each, state in zip(methods, states, strict=True):
            each.state = state
        return methods

    def _learns(self, method: Speculating) -> bool:
        ids = self.session.loaded.encode("one two three one two three", self.session.config["chat"])
        method.generate(Batch(ids, torch.ones_like(ids)), {"max_new_tokens": 8, "do_sample": False})
        stateful = method.stateful
        method.forget()
        return stateful

    def _speculating(
        self, name: str, config: str | Mapping[str, Any], kind: str = "drafter", tree: Any = None
    ) -> Speculating:
        model = self.session.attach(config, configured_rule=kind != "plain", tree=tree)
        return Speculating(name, model, speculation_of(model), self._eos, kind)


def _own_tree(options: dict[str, Any]) -> Any:
    """Take the tree out of an entry's options, where it is one for any drafter: a file, or a name in ``conf/tree``."""
    tree = options.get("tree")
    if isinstance(tree, str) and (tree in choices("tree") or Path(tree).suffix):
        return options.pop("tree")
    return None


def labels(methods: Sequence[Method]) -> list[str]:
    """What a run measures, in words that a configuration can be compared by."""
    return [f"{method.name}/{method.kind}/{method.state}" for method in methods]
