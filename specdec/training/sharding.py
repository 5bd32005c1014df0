"""Training that is cut up over processes: FSDP of torch (``fully_shard``) and DeepSpeed's ZeRO.

The Trainer cuts up the lesson: its weights, their gradients and moments. What is added here: the layers of the frozen
target are cut up too under FSDP, weights are put together where a drafter is saved, and what cannot be is refused
before anything is written. The target's embedding and output head stay whole, because lessons use them by themselves.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from specdec import identity
from specdec.target import Target

FSDP, ZERO_3 = "FSDP", "ZeRO-3"
# What DeepSpeed is to take from the Trainer's own options.
_AUTO = {
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of FSDP and DeepSpeed among the Trainer's, with what they leave open; not where they name a file."""
    made: dict[str, Any] = {}
    config, zero = options.get("fsdp_config") or {}, options.get("deepspeed")
    if options.get("fsdp") and isinstance(config, Mapping):
        made["fsdp_config"] = {"version": 2} | copy.deepcopy(dict(config))
    if isinstance(zero, Mapping):
        made["deepspeed"] = copy.deepcopy(_AUTO) | copy.deepcopy(dict(zero))
        stage = made["deepspeed"].setdefault("zero_optimization", {})
        if stage.get("stage") == 3:
            stage.setdefault("stage3_gather_16bit_weights_on_model_save", True)  # else checkpoints lack whole weights
    return made


def kind(arguments: TrainingArguments) -> str | None:
    """What cuts up a lesson's weights, ``FSDP`` or ``ZeRO-3``, by option or launcher; None where they are whole."""
    if arguments.fsdp or _environment("ACCELERATE_USE_FSDP"):
        return FSDP
    stage = getattr(getattr(arguments, "deepspeed_plugin", None), "zero_stage", 0)
    return ZERO_3 if stage == 3 or _environment("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else None


def check(arguments: TrainingArguments) -> None:
    """Raise ValueError where the processes or their devices do not serve what is asked for."""
    if kind(arguments) != FSDP:
        return
    if arguments.world_size < 2:
        raise ValueError(
            "trainer.fsdp cuts a drafter up over several processes, and this is one; expected torchrun "
            "--nproc-per-node N, or trainer.fsdp left out"
        )
    version = getattr(arguments, "fsdp_config", None) or {}
    if int(version.get("version", 2) if arguments.fsdp else os.environ.get("FSDP_VERSION", "1")) != 2:
        raise ValueError("FSDP of version 1 leaves no weights to save a drafter from; expected version 2 (fully_shard)")
    accelerators = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    if arguments.use_cpu and accelerators:
        raise ValueError(
            "FSDP cuts up over this machine's accelerators; expected a target on one, not target.device=cpu"
        )


def check_lesson(arguments: TrainingArguments, lesson: Any, target: Target) -> None:
    """Hold a lesson to what cuts it up.

    Raises:
        ValueError: weights that the target's model uses by itself would be cut up behind its back.
    """
    wanted, learning = kind(arguments), {id(parameter) for parameter in lesson.parameters()}
    if wanted is not None and any(id(parameter) in learning for parameter in target.model.parameters()):
        raise ValueError(
            f"{wanted} cuts up what a lesson holds, and this one learns through the target, whose layers would not "
            "find their adapters again; expected plain torchrun (each process trains all adapters), or ZeRO-1 or ZeRO-2"
        )


def enable(accelerator: Any, arguments: TrainingArguments) -> None:
    """Make an accelerator use what its arguments ask for, FSDP in the precision of training without it.

    Accelerate leaves both FSDP and DeepSpeed out on CPUs, unsaid; they work there as well.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    on_cpu, state = accelerator.device.type == "cpu", accelerator.state
    if kind(arguments) == FSDP:
        if on_cpu:
            options = arguments.fsdp_plugin_args
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**({} if options is None else options))
            _set_type(state, DistributedType.FSDP)
        # Weights and sums in float32 under autocast; accelerate would cut both down to the autocast's dtype.
        state.fsdp_plugin.mixed_precision_policy = None
    elif on_cpu and arguments.deepspeed_plugin is not None:
        plugin = arguments.deepspeed_plugin
        plugin.set_mixed_precision("bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no")
        _set_type(state, DistributedType.DEEPSPEED)
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = {"default": plugin}


def _set_type(state: Any, kind: Any) -> None:
    from accelerate import PartialState

    PartialState().distributed_type = kind  # from which every later state takes it
    state.distributed_type = kind


def shard_target(target: Target) -> None:
    """Cut up the decoder layers over the processes; each is put together for the time of its own pass.

    From now on passes are the work of all processes together. What is asked of the weights at other times (the
    fingerprint, how the head is reached) is answered before.
    """
    from torch.distributed.fsdp import fully_shard

    identity.remember(target)
    target.prepare()
    for layer in target.layers:
        fully_shard(layer, reshard_after_forward=True)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within the block the model's weights are whole, on every process; all of them enter it together.

    Args:
        model: cut up by FSDP or ZeRO-3, or as it was.
    """
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    cut = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    with ExitStack() as stack:
        for part in parts:
            part.unshard()
            stack.callback(part.reshard)
        for module in model.modules() if parts else ():
            # FSDP cuts up again whatever is asked for its state.
            stack.callback(setattr, module, "_state_dict_pre_hooks", module._state_dict_pre_hooks)
            module._state_dict_pre_hooks = OrderedDict()
        if cut:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(cut))
        yield


def _environment(name: str) -> str:
    """What ``accelerate launch`` has set; empty where it has not."""
    value = os.environ.get(name, "").lower()
    return "" if value in ("0", "false", "no") else value
