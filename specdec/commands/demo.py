"""The main job on the embedded target: the same prompts once plainly and once speculatively, side by side."""

from specdec.commands.generate import run

__all__ = ["run"]
