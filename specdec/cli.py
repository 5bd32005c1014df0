"""``specdec COMMAND [Hydra overrides]``: one file in ``specdec/commands`` and one primary config each."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from specdec import commands
from specdec.build import config_dir
from specdec.evaluation.records import JOB_FAILED

_PARTS = ("target", "drafter", "verifier", "acceptance", "data")
_OPTIONS_WITH_VALUE = (  # of Hydra
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info",
    "-i", "--experimental-rerun",
)  # fmt: skip
_USER_ERRORS = (ValueError, OSError, ImportError, OmegaConfBaseException)


def available() -> list[str]:
    """The commands there are."""
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_"))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Exit codes: 0 done; 1 an audit, a question or a job of a sweep that failed, or an override that Hydra refuses; 2
    other bad input; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True)
    if not arguments or arguments[0] in ("-h", "--help"):
        _help(Console() if arguments else console)
        sys.exit(0 if arguments else 2)
    command, overrides = arguments[0], arguments[1:]
    if command not in available():
        console.print(f"[red]unknown command {command!r}[/red]; known: {', '.join(available())}")
        sys.exit(2)
    module = importlib.import_module(f"specdec.commands.{command}")
    overrides = _gather(overrides, getattr(module, "POSITIONAL", None)) + getattr(module, "extra_overrides", list)()
    parts = (*_PARTS, *getattr(module, "OPEN_PARTS", ()))
    # The bar over weights being read is longer than the reading for the models this shows most.
    disable_progress_bar()
    sys.argv = [f"specdec {command}", *(_override(override, parts) for override in overrides)]
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(_guarded(module.run))()


def _override(argument: str, parts: Sequence[str] = _PARTS) -> str:
    """Read an override as users mean it.

    A prompt is taken as it is typed (Hydra's grammar would read parentheses, commas and colons in it), and options of a
    part need no ``+``: YAML lists only what it changes, and ``build`` names the options there are. A command may have
    further such parts, its ``OPEN_PARTS``.
    """
    key, equals, value = argument.partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in ("'", '"')
    if key == "prompt" and equals and not quoted:
        return f"{key}={_quoted(value)}"
    return f"++{argument}" if equals and key.partition(".")[0] in parts and "." in key else argument


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)(\'|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def _gather(arguments: Sequence[str], key: str | None) -> list[str]:
    """Make the positional arguments of a command that has such, its ``POSITIONAL``, one override: a list named ``key``.

    Positional is what is neither an override nor an option nor an option's value; and every folder that exists, since
    those of a multirun may be called ``drafter=token_recycling``.
    """
    if key is None:
        return list(arguments)
    found, others = list[str](), list[str]()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        bare = "=" not in argument and not argument.startswith(("-", "~")) and before not in _OPTIONS_WITH_VALUE
        (found if bare or Path(argument).is_dir() else others).append(argument)
    return [*others, f"{key}=[{','.join(map(_quoted, found))}]"] if found else others


def _guarded(run: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Show what a user got wrong as one line, and bugs as a traceback.

    A job of a sweep that is joined afterwards does not end the process: it leaves ``job_failed.txt`` in its folder and
    returns None, which is no figure to any sweeper, and the join makes the command's exit code.
    """

    def task(config: DictConfig) -> Any:
        marker = _marker()
        if marker is not None:
            marker.unlink(missing_ok=True)
        try:
            result = run(config)
        except _USER_ERRORS as error:
            # Made here: launchers send this function to other processes, which a console cannot travel to.
            Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
            if marker is None:
                sys.exit(2)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(f"{error}\n", encoding="utf-8")
            return None
        if isinstance(result, int) and result:
            sys.exit(result)
        return result

    return task


def _marker() -> Path | None:
    """Where this job says that it failed; None outside of a sweep, or where nobody would read it."""
    hydra_config = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra_config is None or hydra_config.mode != RunMode.MULTIRUN or "join" not in (hydra_config.callbacks or {}):
        return None
    return Path(hydra_config.runtime.output_dir) / JOB_FAILED


def _help(console: Console) -> None:
    console.print("usage: specdec COMMAND \\[key=value ...]\n")
    for name in available():
        summary = (importlib.import_module(f"specdec.commands.{name}").__doc__ or "").strip().splitlines()[0]
        console.print(f"  [bold]{name:<10}[/bold] {summary}")
    console.print("\nspecdec COMMAND --help lists its options; key=value overrides any of them (Hydra).")


if __name__ == "__main__":  # as launchers of several processes start it
    main()
