"""The Trainer of transformers around a lesson: what a drafter minimises, with the frozen target beside it.

Batches, mixed precision, accumulation, schedules, checkpoints, resuming and distribution are the Trainer's own. What is
added: the target's states for each batch, checkpoints that hold what learns and nothing else, and how often the wanted
token is among the draft's best.

Shapes: B rows, T tokens of a row, K depths (heads), R ranks.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from specdec.target import Target
from specdec.training.features import Frozen

STATE = "trainer_state.json"
_FIGURES = ("hits", "counted")
# What a run decides elsewhere, and where.
_ELSEWHERE = {
    "output_dir": "output=FOLDER",
    "seed": "seed=",
    "use_cpu": "target.device=",
    "resume_from_checkpoint": "resume=true",
    "eval_strategy": "eval_share= and trainer.eval_steps=",
    "do_train": "the command itself",
    "do_eval": "eval_share=",
    "remove_unused_columns": "the lesson",
    "label_names": "the lesson",
    "disable_tqdm": "the command itself",
    "push_to_hub": "nobody; drafters are folders, to be uploaded as such",
}


def training_arguments(
    options: Mapping[str, Any], output: Path, seed: int, target: Target, evaluates: bool
) -> TrainingArguments:
    """Transformers' own arguments from the section ``trainer`` of a config.

    The device is the target's; a target in half precision trains under autocast in its dtype, unless ``options`` say
    otherwise.

    Args:
        options: any of ``transformers.TrainingArguments``.
        output: the folder that checkpoints are made in.
        seed: of shuffling and dropout.
        target: the frozen model.
        evaluates: whether there are held-out texts.

    Raises:
        ValueError: an unknown option (names the closest), one that is set elsewhere, or a wrong value.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in options:
        if name in _ELSEWHERE:
            raise ValueError(f"trainer.{name} is decided by {_ELSEWHERE[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
            hint = f"; close to it: {', '.join(near)}" if near else ""
            raise ValueError(f"trainer.{name} is no option of transformers' TrainingArguments{hint}")
    cpu = target.device.type == "cpu"
    given: dict[str, Any] = {"output_dir": str(output), "seed": seed, "use_cpu": cpu}
    given |= {"remove_unused_columns": False, "label_names": [], "disable_tqdm": True, "report_to": "none"}
    if evaluates:
        given["eval_strategy"] = "epoch" if options.get("save_strategy") == "epoch" else "steps"
    if not {"bf16", "fp16"} & options.keys():
        given |= {"bf16": target.dtype == torch.bfloat16, "fp16": target.dtype == torch.float16 and not cpu}
    arguments = TrainingArguments(**given | dict(options))
    if arguments.n_gpu > 1:
        # DataParallel would copy the lesson to devices that the target is not on; torchrun gives each its own.
        arguments._n_gpu = 1
    return arguments


class Scores:
    """How often the wanted token was among the draft's best, summed over batches."""

    def __init__(self) -> None:
        self._hits = self._counted = self._loss = torch.zeros(())

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        """Count what a lesson returned; its loss weighs as much as the tokens it was taken over."""
        counted = outputs["counted"].double()
        self._hits = self._hits + outputs["hits"].double()
        self._counted = self._counted + counted
        self._loss = self._loss + outputs["loss"].detach().double() * counted[0]

    def reduce(self, accelerator: Any) -> None:
        """Sum over the processes of a distributed run."""
        for name in ("_hits", "_counted", "_loss"):
            setattr(self, name, accelerator.reduce(getattr(self, name), "sum"))

    def rates(self) -> dict[str, float]:
        """``loss``, and ``depth_k/top_r``: the share of wanted tokens at depth k among the draft's best r.

        Raises:
            ValueError: none was wanted.
        """
        counted = self._counted.tolist()
        if not counted or counted[0] == 0:
            raise ValueError("no token of the held-out texts is wanted; expected texts with an assistant's turn")
        rates = {"loss": float(self._loss) / counted[0]}
        for depth, (hits, of) in enumerate(zip(self._hits.tolist(), counted, strict=True), start=1):
            if of:
                rates |= {f"depth_{depth}/top_{rank}": hit / of for rank, hit in enumerate(hits, start=1)}
        return rates

    def acceptance(self) -> list[list[float]]:
        """``[K][R]``: the share of wanted tokens that are exactly the draft's candidate of each rank, per depth.

        A rank that was never right counts as half a token: a tree drawn from few texts should not stop at it.
        """
        made = []
        for hits, of in zip(self._hits.tolist(), self._counted.tolist(), strict=True):
            if of == 0:
                break
            made.append(
                [round(max(now - before, 0.5) / of, 6) for before, now in zip([0.0, *hits], hits, strict=False)]
            )
        return made


class DrafterTrainer(Trainer):
    """Trains a lesson.

    Args:
        lesson: an ``nn.Module`` as ``specdec.interfaces.Lesson`` has it; its parameters become float32. It may have
            ``parameter_groups(lr)``, groups as optimizers take them, and ``progress``, which is set before each step to
            the share of the training that is done.
        arguments: as ``training_arguments`` makes them.
        frozen: the target's states, for batches that come without.
        train: packed texts to learn from.
        held_out: packed texts to be judged by, or None.
        callbacks: of transformers.
    """

    optimizer: Any  # the Trainer's own, which it does not declare

    def __init__(
        self,
        lesson: Any,
        arguments: TrainingArguments,
        frozen: Frozen,
        train: Any,
        held_out: Any | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        learns = [parameter for parameter in lesson.parameters() if parameter.requires_grad]
        if not learns:
            raise ValueError(f"{type(lesson).__name__} has no parameter that learns")
        super().__init__(
            model=lesson.float(),
            args=arguments,
            data_collator=default_collate,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[*callbacks, _Steps(lesson)],
        )
        self.remove_callback(PrinterCallback)
        # A lesson's loss is a mean over its batch, so accumulated ones are to be divided.
        self.model_accepts_loss_kwargs = False
        self.frozen, self.scores = frozen, Scores()
        self._judged: tuple[int, dict[str, float]] | None = None  # at which step, and how
        self._extras: dict[str, list[Tensor]] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 - the Trainer's signature
    ) -> Any:
        """The lesson's loss on a batch, and what else it returned."""
        inputs = dict(inputs)
        states = inputs.pop("states", None)
        if states is None:
            made = self.frozen(inputs["token_ids"], inputs["positions"])
            states = {tap: tensor.to(self.args.device) for tap, tensor in made.items()}
        outputs = model(**inputs, states=states)
        if model.training:
            for name in outputs.keys() - {"loss", *_FIGURES}:
                self._extras.setdefault(name, []).append(outputs[name].detach().float())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the lesson's other figures since it was done last."""
        if "loss" in logs:
            logs |= {name: float(torch.stack(values).mean()) for name, values in sorted(self._extras.items())}
            self._extras = {}
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: ARG002 - the Trainer's signature
        ignore_keys: Any = None,  # noqa: ARG002
    ) -> tuple[Tensor, None, None]:
        """Judge a batch of the held-out texts."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self.scores.add(outputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Judge all held-out texts; their rates are among the metrics."""
        self.scores = Scores()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        self.scores.reduce(self.accelerator)
        rates = self.scores.rates()
        self._judged = self.state.global_step, rates
        output.metrics.update({f"{metric_key_prefix}_{name}": rate for name, rate in rates.items()})
        return output

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, over the lesson's own groups where it has such; biases and norms never decay."""
        lesson, rate = self.model if model is None else model, self.args.learning_rate
        groups = getattr(self.accelerator.unwrap_model(lesson), "parameter_groups", None)
        if self.optimizer is None and groups is not None:
            names = set(self.get_decay_parameter_names(lesson))
            decaying = {id(parameter) for name, parameter in lesson.named_parameters() if name in names}
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, lesson)
            self.optimizer = kind(_split_by_decay(groups(rate), decaying, self.args.weight_decay), **options)
        return super().create_optimizer(model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Parameters that learn, and buffers; a tensor with two names once."""
        held = self.model.state_dict() if state_dict is None else state_dict
        names = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        names |= {name for name, _ in self.model.named_buffers()}
        super()._save(output_dir, {name: held[name].contiguous() for name in sorted(names & held.keys())})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint of another lesson is an error, not a warning."""
        learns = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing, unknown = sorted(learns & set(load_result.missing_keys)), sorted(load_result.unexpected_keys)
        if missing or unknown:
            raise ValueError(
                f"this checkpoint is of another drafter: it lacks {', '.join(missing[:3]) or 'nothing'} and has "
                f"{', '.join(unknown[:3]) or 'nothing'} besides"
            )

    def learn(self, checkpoint: Path | None = None) -> dict[str, float]:
        """Train to the end, from a checkpoint where one is given, and judge the result.

        Returns:
            what ``Scores.rates`` says of the held-out texts; empty where there are none.
        """
        state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / STATE))
        if state is not None and 0 < state.max_steps <= state.global_step:
            # Nothing is left to do, and the Trainer would do one step more.
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
        else:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.eval_dataset is None:
            return {}
        if self._judged is None or self._judged[0] != self.state.global_step:
            self.evaluate()
        assert self._judged is not None
        return self._judged[1]


class _Steps(TrainerCallback):
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


def last_checkpoint(output: Path) -> Path | None:
    """The latest whole checkpoint of a run; drops what a kill left half written. None where there is none."""
    found = {}
    for folder in output.glob("checkpoint-*"):
        try:
            # Written last, so that the others are whole where this one is.
            found[int(json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"])] = folder
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return found[max(found)] if found else None


def _split_by_decay(groups: Sequence[Mapping[str, Any]], decaying: set[int], decay: float) -> list[dict[str, Any]]:
    made = []
    for group in groups:
        for chosen, weight_decay in ((True, group.get("weight_decay", decay)), (False, 0.0)):
            members = [parameter for parameter in group["params"] if (id(parameter) in decaying) == chosen]
            if members:
                made.append({**group, "params": members, "weight_decay": weight_decay})
    return made
