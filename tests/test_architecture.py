"""The architecture as a test: who may import whom, where configuration stops, and that recipes and modules match.

What a linter can say (number of arguments, ``print``, blanket ``except``, parent-relative imports) ruff says.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("specdec", "drafters", "verifiers")
MAX_FILE_LINES = 400
LONGER_FILES: dict[str, str] = {}  # file -> why it may be longer

# Parts of specdec above the core, lowest first: each may import what stands before it. All other modules are core.
LAYERS = (
    "generation",
    "tuning",
    "adaptive",
    "build",
    "demo",
    "evaluation",
    "report",
    "training",
    "bench",
    "commands",
    "cli",
)
CONFIG_LIBRARIES = ("hydra", "omegaconf")
CONFIG_DOOR = ("specdec.build", "specdec.cli", "specdec.commands")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def layer(module: str) -> int:
    """0 for the core of specdec, 1.. for what stands above it, and the top for ``specdec`` itself (public names)."""
    if module == "specdec":
        return len(LAYERS) + 1
    part = module.split(".")[1]
    return LAYERS.index(part) + 1 if part in LAYERS else 0


def children_run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and what is below it, without function bodies and ``if TYPE_CHECKING`` blocks."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from children_run_on_import(child)


@cache
def imports(module: str, on_import_only: bool = False) -> frozenset[str]:
    """The modules that ``module`` imports, submodules of ours by their full name; itself left out."""
    path = SOURCES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in children_run_on_import(tree) if on_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {name if (name := f"{base}.{alias.name}") in SOURCES else base for alias in node.names}
    return frozenset(found - {module})


def targets(node: Any) -> Iterator[str]:
    """Every ``_target_`` in a configuration, nested ones too."""
    if isinstance(node, dict):
        yield from [node["_target_"]] if "_target_" in node else []
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from targets(child)


def drafter_recipes() -> list[Path]:
    return sorted((ROOT / "conf" / "drafter").glob("*.yaml"))


def recipe_targets(path: Path) -> list[str]:
    return list(targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False)))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    forbidden = {"specdec": ("drafters", "verifiers"), "drafters": ("verifiers",), "verifiers": ("drafters",)}[package]
    wrong = [
        f"{module} imports {name}"
        for module in SOURCES
        if within(module, package)
        for name in sorted(imports(module))
        if within(name, *forbidden)
    ]
    assert not wrong


def test_arrows_inside_specdec_point_inward() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in SOURCES
        if within(module, "specdec")
        for name in sorted(imports(module))
        if within(name, "specdec") and layer(name) > layer(module)
    ]
    assert not wrong


def test_plugins_import_from_defining_modules() -> None:
    wrong = [module for module in SOURCES if within(module, "drafters", "verifiers") and imports(module) & {"specdec"}]
    assert not wrong, "import from the defining module, not from the root of specdec"


def test_no_import_cycle() -> None:
    graph = {module: imports(module, on_import_only=True) & SOURCES.keys() for module in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_configuration_stops_at_the_door() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in SOURCES
        if not within(module, *CONFIG_DOOR)
        for name in sorted(imports(module))
        if within(name, *CONFIG_LIBRARIES)
    ]
    assert not wrong


def test_files_stay_readable() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in SOURCES.values()}
    too_long = {name: count for name, count in lines.items() if count > MAX_FILE_LINES and name not in LONGER_FILES}
    assert not too_long
    assert all(lines.get(name, 0) > MAX_FILE_LINES for name in LONGER_FILES), "an exception that is no longer needed"


@pytest.mark.parametrize("recipe", drafter_recipes(), ids=lambda path: path.stem)
def test_drafter_recipe_names_a_class_in_drafters(recipe: Path) -> None:
    names = recipe_targets(recipe)
    assert names, "no _target_"
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert within(module, "drafters"), f"{name} is not in drafters/"
        assert isinstance(getattr(importlib.import_module(module), attribute), type), f"{name} is no class"


def test_every_drafter_module_has_a_recipe() -> None:
    modules = {module for module in SOURCES if within(module, "drafters") and module != "drafters"}
    named = {target.rpartition(".")[0] for recipe in drafter_recipes() for target in recipe_targets(recipe)}
    helpers = {name for module in modules for name in imports(module)}
    assert not modules - named - helpers, "neither named by a recipe in conf/drafter nor used by another drafter"
