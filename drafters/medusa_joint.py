"""Medusa-2: heads and backbone learn together (Cai et al., 2401.10774, section 2.2), the backbone by LoRA adapters.

Loss: L_base + lambda_0 s(t) sum over k = 1..K of decay^k CE_k. L_base keeps the backbone what it was: cross-entropy on
the data, or with ``distill`` the divergence from the same network with its adapters switched off, for data that the
target has written itself. s(t) is a schedule over the share t of the training that is done. In two stages the heads
come from Medusa-1 (``path``) and s is constant; in one stage they are new and s grows.

The adapted model is another model than the one that was trained: decoding with the heads is lossless for it, and
``save`` writes both into one folder, which serves as the target's and the drafter's path.

Differences from the authors' code: the divergence is a mean over the wanted positions (theirs divides by all of them).
Adapters are not merged while they learn, so the model's own weights stay bit for bit as they were.

Shapes: B rows, T tokens of a row, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafters.medusa_heads import WITHIN_MODEL, MedusaHeads, check_common, judged, steps_of
from specdec import capabilities
from specdec.checkpoints import CONFIG
from specdec.interfaces import Tap
from specdec.target import Target
from specdec.training.objectives import ahead, cross_entropy, shared, wanted_ahead

SCHEDULES = ("constant", "linear", "sine", "sine_R (such as sine_0.1)")
_ADAPTER = "default"


def scheduled(schedule: str, progress: float) -> float:
    """s(t): the share of its weight that the heads' loss has after ``progress`` of the training, both in [0, 1].

    ``sine`` is a quarter of a wave, ``sine_R`` reaches 1 after the share R and stays there.

    Raises:
        ValueError: an unknown schedule.
    """
    ramp = re.fullmatch(r"sine(?:_(0?\.\d+|1|1\.0))?", schedule)
    if ramp:
        share = float(ramp[1] or 1)
        if share > 0:
            return math.sin(math.pi / 2 * min(progress / share, 1.0))
    elif schedule == "constant":
        return 1.0
    elif schedule == "linear":
        return progress
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


class JointLesson(nn.Module):
    """Medusa-2. Adapters are put into the target's model and stay there; nothing else of it learns.

    Registered are the heads and the adapters, which the model shares. Data-parallel training sees both, ZeRO-1 and
    ZeRO-2 too; what cuts up weights (FSDP, ZeRO-3) would hide the adapters from the model, and is refused.

    Args:
        heads: to be trained, in float32.
        target: its model gets the adapters.
        decay: head k (from 0) weighs decay^(k+1).
        weight: lambda_0, 0.2 for two stages, 0.01 for one.
        schedule: s(t): ``constant``, ``linear``, ``sine`` or ``sine_R``.
        distill: L_base is the divergence from the model without adapters, not the cross-entropy on the data.
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        dropout: in front of them, while training.
        modules: last parts of the names of the linear maps to adapt; None = all of the decoder layers' and the output
            head (of a Llama: q, k, v, o, gate, up, down and lm_head).
        heads_lr: learning rate of the heads, as a multiple of the adapters'.
        seed: of the adapters' first values.

    Attributes:
        progress: share of the training that is done, in [0, 1]; whoever trains sets it before each step.

    Raises:
        ImportError: there is no peft.
        ValueError: an option out of range, no such modules, a model that has adapters already, or one that lies on
            several devices.
    """

    taps: tuple[Tap, ...] = ()

    def __init__(  # noqa: PLR0913 - the options of one recipe
        self,
        heads: MedusaHeads,
        target: Target,
        decay: float = 0.8,
        weight: float = 0.2,
        schedule: str = "constant",
        distill: bool = False,
        rank: int = 32,
        alpha: float = 16.0,
        dropout: float = 0.05,
        modules: Sequence[str] | None = None,
        heads_lr: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_common(decay, "text")
        scheduled(schedule, 0.0)
        if weight <= 0 or rank < 1 or alpha <= 0 or not 0 <= dropout < 1 or heads_lr <= 0:
            raise ValueError(
                "expected weight > 0, rank >= 1, alpha > 0, 0 <= dropout < 1 and heads_lr > 0; got "
                f"{weight=}, {rank=}, {alpha=}, {dropout=}, {heads_lr=}"
            )
        self.heads, self.decay, self.weight, self.schedule = heads, decay, weight, schedule
        self.distill, self.heads_lr, self.progress = distill, heads_lr, 0.0
        self.steps_ahead = (1, *steps_of(heads))
        places = sorted({str(parameter.device) for parameter in target.model.parameters()})
        if len(places) > 1:
            raise ValueError(
                f"joint training moves what it trains to one device; expected a target on one, got one on "
                f"{', '.join(places)}: leave target.device_map out, or train the heads alone (recipe=medusa_1)"
            )
        self._layers = _adapt(target, {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}, modules, seed)
        # Made anew, because the output head may be wrapped by now.
        self._target = Target(target.model)
        capabilities.check(self._target)
        self._target.head(torch.zeros(1, 1, target.hidden_size, dtype=target.dtype, device=target.device))
        learning = {name: part for name, part in target.model.named_parameters() if part.requires_grad}
        self.adapters = nn.ParameterDict({name.replace(".", "/"): part for name, part in learning.items()})
        self.train()

    def train(self, mode: bool = True) -> JointLesson:
        """Training mode is that of the adapters' dropout; the backbone stays in evaluation mode."""
        super().train(mode)
        for layer in self._layers.values():
            layer.lora_dropout.train(mode)
        return self

    def forward(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor, states: Mapping[Tap, Tensor]
    ) -> dict[str, Tensor]:
        """See ``Lesson``; besides, ``base_loss`` and ``heads_loss`` before their weights."""
        del states  # the backbone learns, so nobody can have computed them
        model, where = self._target.model, wanted_ahead(positions, wanted, 1)
        inputs = {"input_ids": token_ids, "position_ids": positions, "use_cache": False, "return_dict": True}
        teacher = self._teacher(inputs)[where] if self.distill else None
        with self._target.router.taps(("final",)) as recorded:
            logits = model(**inputs).logits
        if teacher is None:
            base = cross_entropy(logits, ahead(token_ids, 1), where)
        else:
            base = _divergence(teacher, logits[where])
        base = shared(base[None], where.sum()[None], [1])[0]
        batch = (token_ids, positions, wanted)
        learnt = judged(self.heads, self._target, recorded["final"][0], batch, self.decay)
        heads = learnt["loss"]
        loss = base + self.weight * scheduled(self.schedule, self.progress) * heads
        return {**learnt, "loss": loss, "base_loss": base.detach(), "heads_loss": heads.detach()}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For the optimiser: adapters at ``lr``, heads at ``heads_lr`` times that."""
        return [
            {"params": list(self.adapters.values()), "lr": lr},
            {"params": list(self.heads.parameters()), "lr": lr * self.heads_lr},
        ]

    @torch.no_grad()
    def _teacher(self, inputs: dict[str, Any]) -> Tensor:
        with self._without_adapters():
            return self._target.model(**inputs).logits

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The model's weights with the adapters merged in, by the names of the model as it was; copies where changed.

        Raises:
            ValueError: weights that cannot be added to (quantised ones).
        """
        weights = {}
        for name, tensor in self._target.model.state_dict().items():
            owner, _, last = name.rpartition(".base_layer.")
            if any(part.startswith("lora_") for part in name.split(".")):
                continue
            if last == "weight" and owner in self._layers:
                if not tensor.is_floating_point():
                    raise ValueError(f"{name} is of {tensor.dtype}; adapters merge into floating-point weights only")
                tensor = (tensor.float() + self._layers[owner].get_delta_weight(_ADAPTER).float()).to(tensor.dtype)
            weights[name.replace(".base_layer.", ".")] = tensor
        return weights

    def save(
        self, folder: Path, heads: Mapping[str, Tensor], acceptance: Sequence[Sequence[float]] | None = None
    ) -> None:
        """Write one model with the heads among its weights, as the published Medusa-2 models have them.

        Args:
            folder: made where it is missing.
            heads: by their published names.
            acceptance: of the heads, for the config.
        """
        model, weights = self._target.model, self.merged()
        output = next(name for name, module in model.named_modules() if module is self._target.router.head)
        copies = {f"{head}.{self.heads.num_layers}.weight" for head in range(self.heads.num_heads)}
        for name, tensor in heads.items():
            # Copies of the target's head are of the one that it has become.
            copied = self.heads.output is None and name in copies
            weights[WITHIN_MODEL + name] = weights[f"{output}.weight"].clone() if copied else tensor
        model.save_pretrained(folder, state_dict=weights)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config |= {"medusa_num_heads": self.heads.num_heads, "medusa_num_layers": self.heads.num_layers}
        if acceptance is not None:
            config["acceptance"] = [list(row) for row in acceptance]
        if output in self._layers and config.get("tie_word_embeddings"):
            config["tie_word_embeddings"] = False  # the output head has parted from the embedding
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _save_tokenizer(getattr(model.config, "_name_or_path", ""), folder)


def _adapt(target: Target, settings: dict[str, Any], modules: Sequence[str] | None, seed: int) -> dict[str, Any]:
    """Put LoRA adapters into the model, all else frozen; returns the adapted layers by name."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ImportError("joint training needs peft: pip install 'specdec-hf[peft]'") from error
    model = target.model
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError(f"this {target.name} has adapters already; expected a model without, so load it anew")
    names = _linear_maps(target, modules)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # About a tied output head, which merging unties, and about GPT-2's transposed maps, which peft then handles.
        warnings.filterwarnings("ignore", message=r"(?s).*(tie_word_embeddings|fan_in_fan_out)")
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(target_modules=names, **settings), model, _ADAPTER)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for layer in layers.values():
        layer.lora_A.float()
        layer.lora_B.float()
    model.eval()
    return layers


def _linear_maps(target: Target, modules: Sequence[str] | None) -> list[str]:
    """Names of the linear maps to adapt.

    Raises:
        ValueError: none of these names; lists those there are.
    """
    from transformers.pytorch_utils import Conv1D

    parts = {id(part) for layer in target.layers for part in layer.modules()} | {id(target.router.head)}
    maps = [
        name
        for name, module in target.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in parts
    ]
    chosen = [name for name in maps if modules is None or name.rpartition(".")[2] in modules]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in maps})) or "none"
        raise ValueError(f"{target.name} has no linear maps {list(modules or [])} to adapt; known: {known}")
    return chosen


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over positions of KL(teacher || student) in nats: logits ``[M, V]`` -> scalar, 0 where M = 0."""
    if len(teacher) == 0:
        return student.float().sum() * 0
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _save_tokenizer(path: str, folder: Path) -> None:
    """Put the target's tokenizer beside the model, so that the folder is complete."""
    from transformers import AutoTokenizer

    if not path:
        return
    try:
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    except (OSError, ValueError) as error:
        warnings.warn(f"{folder} holds no tokenizer, because {path} gave none: {error}", stacklevel=2)
