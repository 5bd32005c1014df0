"""What stands beside a training: the loss curve as JSON lines, the bar, and provenance beside every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from specdec.evaluation.records import replace_text
from specdec.training.progress import Bar

PROVENANCE = "provenance.json"


class LossCurve(TrainerCallback):
    """One line per logged entry: step, loss, learning rate, ...; or a judgement of the held-out texts.

    Whatever was logged after the checkpoint from which a run goes on is dropped, and logged again.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Write what the checkpoint remembers; nothing where the run begins."""
        if state.is_world_process_zero:
            replace_text(self.path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Append."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class Told(TrainerCallback):
    """What a user sees meanwhile; use it as a context, so that the bar goes away whatever happens.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Bar | None = None
        self._open, self._said = ExitStack(), ""

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show the bar."""
        if state.is_world_process_zero:
            self._bar = self._open.enter_context(Bar(self.console, "steps", state.max_steps, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """One step on."""
        if self._bar is not None:
            self._bar.advance(1, self._said)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Say the loss, and how well the held-out texts are drafted."""
        if "loss" in logs:
            self._said = f"loss {logs['loss']:.3f}"
        elif "eval_loss" in logs and state.is_world_process_zero:
            line = f"step {state.global_step}, held out: {figures(logs)}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """The bar goes away."""
        self._open.close()
        self._bar = None


class AtCheckpoints(TrainerCallback):
    """Puts something into every checkpoint, in the first process.

    A run that goes on makes up for the checkpoint from which it does, where a kill came before this.

    Args:
        act: told the checkpoint's folder.
        made: the name of what it puts there.
        within: a context that every process enters meanwhile.
    """

    def __init__(
        self,
        act: Callable[[Path], None],
        made: str,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.act, self.made, self.within = act, made, within

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A checkpoint has been made."""
        with self.within():
            if state.is_world_process_zero:
                self.act(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A checkpoint has been taken up, or none."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step == 0:
            return
        with self.within():
            if state.is_world_process_zero and folder.is_dir() and not (folder / self.made).exists():
                self.act(folder)


class Provenance(AtCheckpoints):
    """Writes where a checkpoint comes from beside it.

    Args:
        said: command, config, versions, ...
    """

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__(lambda folder: write_provenance(folder, said, int(folder.name.rpartition("-")[2])), PROVENANCE)


class Steps(TrainerCallback):
    """Tells the lesson how far the training is; sees to it that what is saved has been logged.

    The Trainer forgets the losses that it has summed since it logged last, so a checkpoint between two lines of the
    loss curve would change the first line after it.
    """

    def __init__(self, lesson: Any) -> None:
        self._lesson = lesson

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Before each step of the optimizer."""
        if hasattr(self._lesson, "progress"):
            self._lesson.progress = state.global_step / state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        """After each step."""
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end


def write_provenance(folder: Path, said: Mapping[str, Any], step: int) -> None:
    """Write ``provenance.json``."""
    replace_text(folder / PROVENANCE, json.dumps({**said, "step": step}, indent=1) + "\n")


def figures(logs: Mapping[str, float]) -> str:
    """Loss and top-1 rates of an evaluation, in one line."""
    tops = [f"{value:.3f}" for name, value in logs.items() if name.startswith("eval_depth_") and name.endswith("top_1")]
    return f"loss {logs['eval_loss']:.3f}, top-1 by depth {' '.join(tops)}"
