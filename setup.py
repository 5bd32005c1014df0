"""Only what pyproject.toml cannot say: the recipes in ``conf/`` are shipped inside the package, as ``specdec/conf``."""

from setuptools import find_packages, setup

OURS = ("specdec", "drafters", "verifiers")

setup(
    packages=[*find_packages(include=[*OURS, *(f"{name}.*" for name in OURS)]), "specdec.conf"],
    package_dir={"specdec.conf": "conf"},
)
