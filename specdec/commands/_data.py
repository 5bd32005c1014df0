"""What several commands share: the source that a config's ``data`` names."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from specdec.build import build, choices, load
from specdec.evaluation.data import Question
from specdec.training.corpus import Corpus

_CORPORA = "specdec.training.corpus."


def choice(group: str, otherwise: str) -> str:
    """What the command line chose of a config group; ``otherwise`` where no command line is."""
    return str(HydraConfig.get().runtime.choices.get(group)) if HydraConfig.initialized() else otherwise


def source_of(config: DictConfig) -> Any:
    """What ``data`` names: questions, or a corpus.

    Raises:
        ValueError: an argument without which it cannot be read is missing, or bad input, by file and line.
    """
    plain = OmegaConf.to_container(config.data, resolve=True)
    assert isinstance(plain, dict)
    missing = [f"data.{key!s}=..." for key, value in plain.items() if value == "???"]
    if missing:
        raise ValueError(f"data={choice('data', 'this')} needs {', '.join(missing)}")
    return build({str(key): value for key, value in plain.items()})


def questions_of(config: DictConfig) -> list[Question]:
    """``source_of`` where only questions will do.

    Raises:
        ValueError: as there, or texts to learn from.
    """
    source = source_of(config)
    if isinstance(source, Corpus):
        raise ValueError(
            f"data={choice('data', 'this')} holds texts to learn from; expected questions: {', '.join(_named(False))}"
        )
    return source


def corpus_of(config: DictConfig) -> Corpus:
    """``source_of`` where only texts to learn from will do.

    Raises:
        ValueError: as there, or questions, which have no answers.
    """
    source = source_of(config)
    if not isinstance(source, Corpus):
        raise ValueError(
            f"data={choice('data', 'this')} holds questions without answers; expected texts to learn from: "
            f"{', '.join(_named(True))} (specdec distill has the target answer questions)"
        )
    return source


def _named(corpora: bool) -> list[str]:
    return [name for name in choices("data") if load("data", name)["_target_"].startswith(_CORPORA) == corpora]
