"""Names become objects here, and nowhere else. Config stops at this door: classes take plain typed arguments.

A name is a file in ``conf/GROUP/NAME.yaml``; it is read with OmegaConf alone, so a library call never touches Hydra's
global state and works inside somebody else's ``@hydra.main``.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, OmegaConf

from specdec.adaptive import Adaptation
from specdec.attention import AttentionBackend
from specdec.generation import attach, unwrap
from specdec.interfaces import Drafter, Shaped, Verifier
from specdec.tuning.files import FixedTree

_ALLOWED = ("drafters.", "verifiers.", "specdec.")
_OWNER = "specdec"
_LOG = logging.getLogger("specdec")
Tree = str | Mapping[str, Any] | FixedTree | Adaptation | Sequence[Sequence[int]]


def config_dir() -> Path:
    """The config folder: the copy inside the installed package, else the checkout's."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "drafter").is_dir():
            return folder
    raise FileNotFoundError(f"no config folder beside {here}; reinstall specdec, or run from a complete checkout")


def choices(group: str) -> list[str]:
    """The names that a config group knows."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def load(group: str, name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read ``conf/GROUP/NAME.yaml`` and lay ``overrides`` over it.

    Raises:
        ValueError: there is no such file; lists those there are.
    """
    path = config_dir() / group / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"unknown {group} {name!r}; known: {', '.join(choices(group))}")
    config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.create(dict(overrides or {})))
    loaded = OmegaConf.to_container(config, resolve=True)
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items()}


def build(config: Mapping[str, Any]) -> Any:
    """Instantiate ``{_target_: ..., **constructor arguments}``.

    Raises:
        ImportError: a foreign distribution occupies one of our package names.
        ValueError: the class is outside the packages a recipe may name, or does not take such an argument.
    """
    check_owners()
    config = _named_drafters(config)
    # A recipe is code: it may name what is ours and nothing else, at any depth.
    for name in (config.get("_target_"), *_nested_targets(list(config.values()))):
        if not isinstance(name, str) or not name.startswith(_ALLOWED):
            raise ValueError(
                f"_target_ must name a class or function in {', '.join(p + '*' for p in _ALLOWED)}; got {name!r}"
            )
    name = config["_target_"]
    made = get_object(name)
    known = inspect.signature(made).parameters
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    if unknown:
        raise ValueError(f"{name} takes no {', '.join(unknown)}; it takes: {', '.join(known) or 'no arguments'}")
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        # Hydra wraps what the constructor said; users need the constructor's own words.
        raise (error.__cause__ if isinstance(error.__cause__, ValueError | OSError) else error) from None


def _named_drafters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the recipe in place of the name, at any depth, where a drafter's argument is a drafter."""
    config = {key: _named_drafters(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    name = config.get("_target_")
    if isinstance(name, str) and name.startswith("drafters."):
        for key, parameter in inspect.signature(get_object(name)).parameters.items():
            if isinstance(config.get(key), str) and "Drafter" in str(parameter.annotation):
                config[key] = _named_drafters(load("drafter", config[key]))
    return config


def _nested_targets(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        yield from [node["_target_"]] if "_target_" in node else []
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _nested_targets(child)


def check_owners() -> None:
    """Raise ImportError where ``drafters`` or ``verifiers`` is somebody else's package."""
    for name in ("drafters", "verifiers"):
        module = importlib.import_module(name)
        if getattr(module, "__owner__", None) != _OWNER:
            from importlib.metadata import packages_distributions

            owners = ", ".join(packages_distributions().get(name, [])) or "unknown"
            raise ImportError(
                f"the package {name!r} at {module.__file__} is not specdec's (distribution: {owners}); "
                "uninstall it or use a separate environment"
            )


def build_drafter(drafter: str | Mapping[str, Any] | Drafter, **options: Any) -> Drafter:
    """A drafter from its name in ``conf/drafter``, from a config, or as it is."""
    if isinstance(drafter, str):
        return build(load("drafter", drafter, options))
    if isinstance(drafter, Mapping):
        return build({**drafter, **options})
    if options:
        raise ValueError(f"options {sorted(options)} go with a drafter's name, got a built {type(drafter).__name__}")
    return drafter


def shaped_names() -> list[str]:
    """The drafters in ``conf/drafter`` whose tree can be chosen (``Shaped``)."""
    return [name for name in choices("drafter") if hasattr(get_object(load("drafter", name)["_target_"]), "reshape")]


def with_tree(drafter: Drafter, tree: Tree | None, model: Any) -> Drafter:
    """The drafter with a chosen tree.

    Args:
        drafter: built, and bound to no other model.
        tree: a name in ``conf/tree``, a file that ``specdec tune`` made, a config with ``_target_``, what one
            builds, or rank paths; None = the drafter's own.
        model: the target's, for its vocabulary.

    Returns:
        ``drafter``, or one around it.

    Raises:
        FileNotFoundError: no such name or file.
        ValueError: the drafter has no tree that can be chosen, or not this one.
    """
    if tree is None:
        return drafter
    if isinstance(tree, str):
        tree = load("tree", tree) if tree in choices("tree") else {**load("tree", "tuned"), "path": tree}
    if isinstance(tree, Mapping) and tree.get("path") == MISSING:
        raise ValueError("tree=tuned needs a file that specdec tune made: tree.path=FILE")
    if isinstance(tree, Mapping):
        recipe = build(tree)
    else:
        recipe = tree if isinstance(tree, FixedTree | Adaptation) else FixedTree(paths=tree)
    if recipe == FixedTree():
        return drafter
    if not isinstance(drafter, Shaped):
        raise ValueError(
            f"drafter {drafter.name!r} has no tree of a fixed shape to choose; these have: {', '.join(shaped_names())}"
        )
    shaped: Drafter = recipe.shape(drafter, unwrap(model).get_output_embeddings().weight.shape[0])
    return shaped


def build_verifier(verifier: str | Mapping[str, Any] | Verifier, acceptance: str | None = None) -> Verifier:
    """A verifier from its name in ``conf/verifier``, from a config, or as it is; ``acceptance`` names a rule."""
    if not isinstance(verifier, str | Mapping):
        if acceptance is not None:
            raise ValueError(f"acceptance={acceptance!r} goes with a verifier's name, got a {type(verifier).__name__}")
        return verifier
    config = load("verifier", verifier) if isinstance(verifier, str) else dict(verifier)
    built: Verifier = build(config)
    if acceptance is not None:
        built.rule = build(load("acceptance", acceptance))
    return built


def build_attention(attention: str | Mapping[str, Any] | AttentionBackend | None) -> AttentionBackend | None:
    """An attention backend from its name in ``conf/attention``, from a config, or as it is; None = the model's own."""
    if isinstance(attention, str):
        return build(load("attention", attention))
    return build(attention) if isinstance(attention, Mapping) else attention


def speculate(  # noqa: PLR0913 - the options of one call
    model: Any,
    drafter: str | Mapping[str, Any] | Drafter = "token_recycling",
    verifier: str | Verifier = "tree_attention",
    acceptance: str | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
    attention: str | AttentionBackend | None = None,
    tree: Tree | None = None,
    **options: Any,
) -> Any:
    """Make ``model.generate()`` speculate: same arguments, same result, sooner.

    Args:
        model: any decoder of transformers, untouched; ``torch.compile``, PEFT and DDP wrappers are looked through.
        drafter: a name in ``conf/drafter``, or a drafter.
        verifier: a name in ``conf/verifier``, or a verifier.
        acceptance: a name in ``conf/acceptance``; None takes the lossless rule that suits the request.
        compile: run the target's passes as compiled graphs. Making one takes seconds to minutes, once per machine;
            later processes load it (``specdec.graphs.store``). What compiles is logged (``logging``, name ``specdec``).
        cuda_graphs: capture the target's passes as CUDA graphs, compiled or not.
        attention: a name in ``conf/attention``, of tree passes; where it cannot serve this model, one warning says why
            and the model's own stays. None = the model's own.
        tree: a file that ``specdec tune`` made, ``"adaptive"`` for a tree that follows the text, or rank paths; None =
            the drafter's own. Names that the drafter itself has for trees (``mc_sim_7b_63``) are taken too.
        **options: constructor arguments of the drafter.

    Returns:
        ``model``; ``model.speculation`` holds the statistics. A second call replaces the first.

    Raises:
        ValueError: an unknown name or option, a model that cannot run token trees, a drafter that does not fit it,
            CUDA graphs of a model that is not on a CUDA device.
    """
    unwrap(model)
    compiling = _LOG.info if compile else None
    if isinstance(tree, str) and not Path(tree).suffix and tree not in choices("tree"):
        options["tree"], tree = tree, None
    built, checked = with_tree(build_drafter(drafter, **options), tree, model), build_verifier(verifier, acceptance)
    return attach(model, built, checked, compiling, cuda_graphs, build_attention(attention))
