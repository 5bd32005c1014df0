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
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from specdec.target import Target
from specdec.training import recomputing, sharding
from specdec.training.callbacks import AtCheckpoints, Steps
from specdec.training.features import Frozen
from specdec.training.objectives import of_step, wanted_ahead
from specdec.training.scores import Even, Scores, check_dealing, once

STATE = "trainer_state.json"
# Names of before, which later releases of transformers warn of.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
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

    The device is the target's; a target in half precision trains under autocast in its dtype, unless ``options`` or a
    config of DeepSpeed say otherwise.

    Args:
        options: any of ``transformers.TrainingArguments``.
        output: the folder that checkpoints are made in.
        seed: of shuffling and dropout.
        target: the frozen model.
        evaluates: whether there are held-out texts.

    Returns:
        With one attribute more: ``autocast_dtype``, of the autocast that the lesson enters by itself (None = it does
            not), where FSDP or DeepSpeed cut it up.

    Raises:
        ValueError: an unknown option (names the closest), one that is set elsewhere, a wrong value, options that
            contradict each other, or a way of distributing that these processes cannot have.
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
    # A lesson uses all that it registers; searching for what it does not would take time in every step.
    given["ddp_find_unused_parameters"] = False
    if evaluates:
        given["eval_strategy"] = "epoch" if options.get("save_strategy") == "epoch" else "steps"
    if not {"bf16", "fp16"} & options.keys():
        given |= {"bf16": target.dtype == torch.bfloat16, "fp16": target.dtype == torch.float16 and not cpu}
    given |= {_RENAMED[name] if _RENAMED.get(name) in known else name: value for name, value in options.items()}
    given |= sharding.completed(given)
    instead, autocast = sharding.half_precision(given, options)
    arguments = TrainingArguments(**given | instead)
    arguments.autocast_dtype = autocast
    sharding.settle(arguments)
    sharding.check(arguments)
    check_dealing(arguments)
    if arguments.n_gpu > 1:
        # DataParallel would copy the lesson to devices that the target is not on; torchrun gives each its own.
        arguments._n_gpu = 1
    return arguments


class DrafterTrainer(Trainer):
    """Trains a lesson.

    Args:
        lesson: an ``nn.Module`` as ``specdec.learning.Lesson`` has it; its parameters become float32. It may have
            ``parameter_groups(lr)``, groups as optimizers take them, and ``progress``, which is set before each step to
            the share of the training that is done.
        arguments: as ``training_arguments`` makes them.
        frozen: the target's states, for batches that come without.
        train: packed texts to learn from.
        held_out: packed texts to be judged by, or None.
        callbacks: of transformers.

    Raises:
        ValueError: nothing learns; or an option of the Trainer that means nothing for a drafter.
    """

    optimizer: Any  # the Trainer's own, which it does not declare
    accelerator: Any

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
        if arguments.world_size > 1 and held_out is not None:
            held_out = Even(held_out, arguments.world_size * arguments.per_device_eval_batch_size)
        self.frozen, self.scores = frozen, Scores()
        if arguments.autocast_dtype is not None:
            # Within the lesson, because DeepSpeed's engine leaves an autocast around itself.
            lesson.forward = torch.autocast(arguments.device.type, arguments.autocast_dtype)(lesson.forward)
        super().__init__(
            model=lesson.float(),
            args=arguments,
            data_collator=default_collate,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[*callbacks, Steps(lesson)],
        )
        if recomputing.asked(arguments):
            recomputing.allow(lesson, frozen.target)
        self.remove_callback(PrinterCallback)
        # A lesson's loss is its batch's part of a mean over batches, so accumulated ones are to be divided.
        self.model_accepts_loss_kwargs = False
        self._judged: tuple[int, dict[str, float]] | None = None  # at which step, and how
        self._best: int | None = None  # the step whose weights were taken up at the end
        self._extras: dict[str, list[Tensor]] = {}
        self._steps_ahead: tuple[int, ...] = tuple(lesson.steps_ahead)
        self._counts: dict[int, Tensor] = {}

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's accelerator, and FSDP on what it leaves out; the frozen layers are then cut up, too."""
        super().create_accelerator_and_postprocess()
        sharding.enable(self.accelerator, self.args)
        self.is_fsdp_enabled = sharding.kind(self.args) == sharding.FSDP
        self.is_deepspeed_enabled = self.args.deepspeed_plugin is not None
        if self.is_fsdp_enabled:
            sharding.shard_target(self.frozen.target)

    def whole(self) -> AbstractContextManager[None]:
        """Within the block the lesson's weights are whole, as saving it needs them; for all processes at once."""
        return sharding.whole(self.model)

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """The batches of a step, whose wanted tokens are counted before the first of them is learnt from."""
        batches, items = super().get_batch_samples(*args, **options)
        size = self.args.world_size
        if size > 1 and self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last:
            batches[-1] = once(batches[-1], len(self.train_dataset), self.args.process_index, size)
        self._counts = self._average(batches) if len(batches) * size > 1 else {}
        return batches, items

    def _average(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[int, Tensor]:
        """Steps ahead -> wanted positions of a batch of this step: the mean over its batches of all processes."""
        counts = [
            torch.stack([wanted_ahead(batch["positions"], batch["wanted"], step).sum() for step in self._steps_ahead])
            for batch in batches
        ]
        total = self.accelerator.reduce(torch.stack(counts).sum(0).to(self.args.device), "sum")
        return dict(zip(self._steps_ahead, total / (len(batches) * self.args.world_size), strict=True))

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
        with of_step(self._counts) if model.training and self._counts else nullcontext():
            outputs = model(**inputs, states=states)
        if model.training:
            for name in outputs.keys() - {"loss", *_FIGURES}:
                self._extras.setdefault(name, []).append(outputs[name].detach().float())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the lesson's other figures since it was done last."""
        if "loss" in logs:
            for name, values in sorted(self._extras.items()):
                logs[name] = float(self.accelerator.reduce(torch.stack(values).mean(), "mean"))
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
        self._judged = self.reached, rates
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

    def _take_up(self, checkpoint: Path) -> None:
        """Read a checkpoint's weights, which are whole there, to judge and save them: nothing is cut up any more."""
        file = checkpoint / SAFE_WEIGHTS_NAME
        if not file.is_file():
            raise ValueError(f"{file} is missing; a later trainer.max_steps goes on from what else {checkpoint} holds")
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        self._issue_warnings_after_load(self.model.load_state_dict(load_file(file), strict=False))

    def _load_best_model(self) -> None:
        """Take up the best checkpoint's weights; it is looked for in this run's folder, wherever that was before."""
        assert self.state.best_model_checkpoint is not None
        assert self.args.output_dir is not None
        best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name
        if not best.is_dir():
            raise ValueError(
                f"the best checkpoint, {best}, is gone; trainer.load_best_model_at_end=false takes the last weights"
            )
        self.state.best_model_checkpoint, self._best = str(best), self.state.best_global_step
        super()._load_best_model()

    @property
    def reached(self) -> int:
        """After how many steps the weights were what they are: the last, or the best one's."""
        return self.state.global_step if self._best is None else self._best

    def acceptance(self) -> list[list[float]] | None:
        """What ``Scores.acceptance`` says of the weights as they are; None where nobody has judged them."""
        return self.scores.acceptance() if self._judged is not None and self._judged[0] == self.reached else None

    def learn(self, checkpoint: Path | None = None) -> dict[str, float]:
        """Train to the end, from a checkpoint where one is given, and judge the result.

        Returns:
            what ``Scores.rates`` says of the held-out texts; empty where there are none.
        """
        state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / STATE))
        if state is not None and state.global_step >= self._total_steps():
            assert checkpoint is not None
            # Nothing is left to do, and the Trainer would do one step more.
            self._take_up(checkpoint)
            self.state = state
            state.is_world_process_zero = self.is_world_process_zero()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, AtCheckpoints):
                    callback.on_train_begin(self.args, state, self.control)
            if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._load_best_model()
        else:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.eval_dataset is None:
            return {}
        if self._best is not None:
            self.evaluation_loop(self.get_eval_dataloader(), "the best checkpoint")  # is no step of the loss curve
        elif self._judged is None or self._judged[0] != self.state.global_step:
            self.evaluate()
        assert self._judged is not None
        return self._judged[1]

    def end(self) -> None:
        """Part from the other processes; nothing is trained or judged any more."""
        # DDP goes first. Were it the last to hold the process group, it would wait for the group's threads without
        # letting go of the interpreter's lock, and they for the lock.
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        in_epoch = max(math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps), 1)
        return math.ceil(self.args.num_train_epochs * in_epoch)


def last_checkpoint(output: Path) -> Path | None:
    """The latest whole checkpoint of a run; drops what a kill left half written. None where there is none."""
    found = {}
    for folder in output.glob("checkpoint-*"):
        if not re.fullmatch(r"checkpoint-\d+", folder.name) or not folder.is_dir():
            continue  # somebody else's
        try:
            # Written last, so that the others are whole where this one is.
            found[int(json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"])] = folder
        except (OSError, ValueError, KeyError, TypeError):
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
