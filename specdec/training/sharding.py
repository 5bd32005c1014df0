"""Training that is cut up over processes: FSDP of torch (``fully_shard``) and DeepSpeed's ZeRO.

The Trainer cuts up the lesson: its weights, their gradients and moments. What is added here: the layers of the frozen
target are cut up too under FSDP, weights are put together where a drafter is saved, and what cannot be is refused
before anything is written. The target's embedding and output head stay whole, because lessons use them by themselves.

Half precision is what it is without them: weights, gradients and moments in float32, the lesson under autocast. The
one exception is a mode of DeepSpeed's own, which a config of DeepSpeed turns on by name (``bf16.enabled: true``).
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

FSDP, ZERO_3, DEEPSPEED = "FSDP", "ZeRO-3", "DeepSpeed"
# What DeepSpeed is to take from the Trainer's own options.
_AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of FSDP and DeepSpeed among the Trainer's, with what they leave open; not where they name a file."""
    made: dict[str, Any] = {}
    config, zero = options.get("fsdp_config") or {}, options.get("deepspeed")
    if options.get("fsdp") and isinstance(config, Mapping):
        made["fsdp_config"] = {"version": 2} | copy.deepcopy(dict(config))
    if isinstance(zero, Mapping):
        made["deepspeed"] = _AUTO | copy.deepcopy(dict(zero))
        stage = made["deepspeed"].setdefault("zero_optimization", {})
        if stage.get("stage") == 3:
            stage.setdefault("stage3_gather_16bit_weights_on_model_save", True)  # else checkpoints lack whole weights
    return made


def half_precision(options: Mapping[str, Any], said: Mapping[str, Any]) -> tuple[dict[str, bool], torch.dtype | None]:
    """How a lesson that is cut up trains in half precision.

    DeepSpeed's own modes hold the weights in it, which rounds them, and a lesson computes in float32 where it has to;
    so it is told of none, unless its config turns one on by name (``enabled: true``). Where that turns one off
    (``enabled: false``), neither a launcher nor the target's dtype turn it on again.

    Args:
        options: of the Trainer, with ``bf16`` and ``fp16`` as the target's dtype suggests where nobody said them.
        said: those that a user gave.

    Returns:
        The Trainer's ``bf16`` and ``fp16`` where they become others, which are DeepSpeed's own modes then (``settle``);
        and the dtype of the autocast that nobody else enters, None = somebody does, or float32 is asked for.

    Raises:
        ValueError: two dtypes at once, a user and DeepSpeed's config contradict each other, or a dtype in which nobody
            would scale gradients under DeepSpeed.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    asked = [name for name in _HALF if options.get(name)]
    if len(asked) == len(_HALF):
        raise ValueError("trainer.bf16=true and trainer.fp16=true are two precisions; expected one of them")
    wanted = asked[0] if asked else launched
    if not (options.get("deepspeed") or _environment("ACCELERATE_USE_DEEPSPEED")):
        if not (options.get("fsdp") or _environment("ACCELERATE_USE_FSDP")):
            return {}, None
        # As without FSDP: loss scaling needs an accelerator, so that float16 means float32 on a CPU.
        return {}, None if wanted == "fp16" and options.get("use_cpu") else _HALF.get(wanted)
    modes = _modes(options.get("deepspeed") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    own = next((name for name, enabled in modes.items() if enabled), None)
    _check_agreed(modes, own, said)
    if own is None:
        wanted = wanted if modes.get(wanted, True) else "no"
        if wanted not in (*_HALF, "no"):
            raise ValueError(f"DeepSpeed trains lessons in bf16, fp16 or float32; got mixed_precision={launched}")
        if wanted == "fp16":
            raise ValueError(
                "float16 needs its loss scaled, which DeepSpeed does in its own mode only; expected trainer.bf16=true, "
                "or trainer.deepspeed.fp16.enabled=true, where the weights are float16, too"
            )
    return {name: name == own for name in _HALF}, _HALF.get(own or wanted)


def _modes(config: Any) -> dict[str, bool]:
    """Which modes of half precision a config of DeepSpeed turns on or off by name; not those it leaves open."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    read = HfDeepSpeedConfig(config) if config else None
    found = {} if read is None else {name: read.get_value(f"{name}.enabled") for name in _HALF}
    return {name: enabled for name, enabled in found.items() if isinstance(enabled, bool)}


def _check_agreed(modes: Mapping[str, bool], own: str | None, said: Mapping[str, Any]) -> None:
    """Hold what a user said of half precision to what DeepSpeed's config says of it."""
    for name in _HALF:
        mine, its = said.get(name), modes.get(name, None if own is None else False)
        if mine is not None and its is not None and bool(mine) != its:
            turned = f"{name}.enabled={str(modes[name]).lower()}" if name in modes else f"{own}.enabled=true"
            raise ValueError(
                f"trainer.{name}={str(bool(mine)).lower()}, and DeepSpeed's config has {turned}; expected one of them "
                "left out"
            )


def settle(arguments: TrainingArguments) -> None:
    """Leave DeepSpeed the mode that ``half_precision`` chose, whatever precision a launcher spoke of."""
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        return
    chosen = {name: bool(getattr(arguments, name)) for name in _HALF}
    # From here accelerate takes what it turns on in the plugin's config, where the launcher's word may be by now.
    arguments.mixed_precision = next((name for name in _HALF if chosen[name]), "no")
    for name, enabled in chosen.items():
        plugin.deepspeed_config.setdefault(name, {})["enabled"] = enabled


def kind(arguments: TrainingArguments) -> str | None:
    """What cuts up a lesson's weights, ``FSDP`` or ``ZeRO-3``, by option or launcher; None where they are whole."""
    if arguments.fsdp or _environment("ACCELERATE_USE_FSDP"):
        return FSDP
    stage = getattr(getattr(arguments, "deepspeed_plugin", None), "zero_stage", 0)
    return ZERO_3 if stage == 3 or _environment("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else None


def check(arguments: TrainingArguments) -> None:
    """Hold processes, devices and options to what cuts a lesson up, or parts of its training.

    Raises:
        ValueError: one of them does not serve.
        ImportError: torch is too old.
    """
    name = FSDP if kind(arguments) == FSDP else DEEPSPEED if arguments.deepspeed_plugin is not None else None
    if name is None:
        return
    option = f"trainer.{name.lower()}"
    # DeepSpeed serves a single process, too, which it may relieve of memory, but a launcher has to have started it.
    if arguments.world_size < 2 and (name == FSDP or "LOCAL_RANK" not in os.environ):
        raise ValueError(
            f"{option} cuts a drafter up over several processes, and this is one; expected torchrun "
            f"--nproc-per-node N, or {option} left out"
        )
    if name == FSDP:
        try:
            from torch.distributed.fsdp import fully_shard  # noqa: F401
        except ImportError as error:
            raise ImportError(f"FSDP needs torch 2.6 or later here; this is {torch.__version__}") from error
        version = getattr(arguments, "fsdp_config", None) or {}
        if int(version.get("version", 2) if arguments.fsdp else os.environ.get("FSDP_VERSION", "1")) != 2:
            raise ValueError(
                "FSDP of version 1 leaves no weights to save a drafter from; expected version 2 (fully_shard)"
            )
    accelerators = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    if arguments.use_cpu and accelerators:
        raise ValueError(
            f"{name} cuts up over this machine's accelerators; expected a target on one, not target.device=cpu"
        )
    if arguments.save_only_model:
        raise ValueError(
            f"trainer.save_only_model=true leaves nothing from which {name} goes on; expected it left out "
            "(trainer.save_total_limit= bounds what checkpoints take)"
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
    """Make an accelerator use what its arguments ask for.

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
        plugin.set_mixed_precision(arguments.mixed_precision)
        _set_type(state, DistributedType.DEEPSPEED)
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = {"default": plugin}


def _set_type(state: Any, distributed_type: Any) -> None:
    from accelerate import PartialState

    PartialState().distributed_type = distributed_type  # from which every later state takes it
    state.distributed_type = distributed_type


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
