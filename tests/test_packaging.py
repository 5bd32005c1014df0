"""The wheel: exactly the three packages, with recipes and demo target inside; and it runs away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("specdec", "drafters", "verifiers")
MODELS = ("target", "draft", "medusa", "hydra_heads", "kangaroo")
LEFT_BEHIND = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "outputs", "multirun")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command} exited with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools would pack what an older build left behind in ``build/``."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_BEHIND)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    metadata = {name for name in held if name.split("/")[0].endswith(".dist-info")}

    def files(folder: Path, pattern: str, shipped_as: str) -> set[str]:
        found = (path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
        return {f"{shipped_as}/{path.relative_to(folder).as_posix()}" for path in found}

    expected = {name for package in PACKAGES for name in files(ROOT / package, "*", package)}
    expected |= files(ROOT / "conf", "*.yaml", "specdec/conf")
    assert held - metadata == expected
    shipped = ("README.md", "config.json", "model.safetensors")
    assert held >= {f"specdec/demo/{name}/{file}" for name in MODELS for file in shipped}
    assert held >= {f"specdec/demo/{name}/provenance.json" for name in ("medusa", "hydra_heads", "kangaroo")}
    assert {name.rpartition("/")[2] for name in metadata} >= {"METADATA", "LICENSE", "entry_points.txt"}


@pytest.mark.slow
def test_installed_wheel_generates_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    # The dependencies come from the environment of the tests: a plain path entry, so that the .pth files in there,
    # an editable install of the checkout among them, are not read.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    paths = sysconfig.get_paths()
    (Path(site) / "dependencies.pth").write_text(f"{paths['purelib']}\n{paths['platlib']}\n")

    for package in PACKAGES:
        place = run(python, "-c", f"import {package}; print({package}.__file__)", cwd=tmp_path).strip()
        assert Path(place).is_relative_to(site)
    specdec = environment / "bin" / "specdec"
    assert run(specdec, "generate", "prompt=def add(a, b):", "max_new_tokens=8", cwd=tmp_path).strip()
