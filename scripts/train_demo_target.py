"""Train, export and evaluate the demo target: a small Llama-architecture causal LM with tokenizer and chat template.

The corpus is GSM8K (chat format) and the short functions of the standard library of the running interpreter (chat
format where there is a docstring, plain text otherwise). A run is resumed from its newest checkpoint. The data read
by step ``s`` are a pure function of the seed and ``s``, so a resumed run sees what an uninterrupted one would have.

    python scripts/train_demo_target.py --steps 1900      # train, or go on; then export
    torchrun --nproc-per-node 2 scripts/train_demo_target.py --steps 1900      # the same with two processes
    python scripts/train_demo_target.py --export          # write the newest checkpoint into the package
    python scripts/train_demo_target.py --evaluate        # held-out losses, share of loops, samples
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_target_corpus import DOMAINS, Stream, documents, encode_all, find_gsm8k, train_tokenizer
from demo_target_loops import chat_prompt, greedy, repeat_origins
from specdec.demo.heldout import heldout_functions, heldout_gsm8k
from specdec.metrics import ends_in_loop

log = logging.getLogger("train_demo_target")

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "specdec" / "demo" / "target"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the number of steps. Lengths and batches are in tokens."""

    seed: int = 0
    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    ffn_size: int = 768
    max_positions: int = 2048
    stable_len: int = 256
    decay_len: int = 512
    tokens_per_domain: int = 4096
    muon_lr: float = 1e-2
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 60
    decay_share: float = 0.25
    clip_norm: float = 1.0

    @property
    def tokens_per_step(self) -> int:
        return len(DOMAINS) * self.tokens_per_domain


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model in float32."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.ffn_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # Each block starts as the identity.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def batch_at(step: int, length: int, streams: list[Stream], recipe: Recipe) -> Tensor:
    """Batch ``step``, int64 [rows, length + 1], as many tokens of each domain, one domain after the other."""
    count = recipe.tokens_per_domain
    rows: list[np.ndarray] = []
    for stream in streams:
        flat = stream.read(step * count, count + 1)
        rows.extend(flat[i : i + length + 1] for i in range(0, count, length))
    return torch.from_numpy(np.stack(rows))


def token_losses(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token: int64 [rows, length + 1] -> float32 [rows, length]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
    return losses.view(batch.shape[0], -1)


def new_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def lr_scale(step: int, steps: int, recipe: Recipe) -> float:
    """Warm-up, stable phase, linear decay to zero over the last share of the steps."""
    decay_steps = max(1, round(steps * recipe.decay_share))
    return min(1.0, (step + 1) / recipe.warmup_steps, (steps - step) / decay_steps)


@dataclass
class Run:
    """The state of a training run; ``save`` and ``load`` keep all of it but the tokenizer in one file."""

    folder: Path
    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    stop: bool = False

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Replace the checkpoint; a kill at any moment leaves the old or the new one whole."""
        if not is_main():
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "progress": {"step": self.step, "steps": self.steps, "seconds": self.seconds},
        }
        unfinished = self.checkpoint.with_suffix(".partial")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)

    def load(self) -> None:
        """Take the state from the checkpoint, if there is one."""
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        self.step, self.steps, self.seconds = (state["progress"][key] for key in ("step", "steps", "seconds"))
        log.info("resumed at step %d of %d", self.step, self.steps)


def open_run(folder: Path, recipe: Recipe, gsm8k: Path, *, resume: bool = True) -> Run:
    """The run in ``folder`` with its newest checkpoint, or a new one with a new tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "tokenizer"
    if not (resume and (saved / "tokenizer.json").is_file()):
        texts = [text for domain in DOMAINS for text in documents(domain, gsm8k, False)]
        train_tokenizer(texts, recipe.vocab_size, recipe.max_positions).save_pretrained(saved)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    model = new_model(recipe, tokenizer)
    run = Run(folder, recipe, tokenizer, model, new_optimizers(model, recipe))
    if resume:
        run.load()
    return run


def train(run: Run, steps: int, gsm8k: Path, save_every: float) -> None:
    """Train up to ``steps``; checkpoints every ``save_every`` seconds, on SIGTERM and at the end."""
    recipe = run.recipe
    stable_end = steps - round(steps * recipe.decay_share)
    if run.steps not in (0, steps) and run.step > stable_end:
        raise SystemExit(
            f"--steps {steps}: the checkpoint stands at step {run.step}, past the stable phase of such a run (step "
            f"{stable_end}). Give --steps {round(run.step / (1 - recipe.decay_share)) + 1} or more, or {run.steps}."
        )
    run.steps = steps
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    streams = [
        Stream(partial(documents, domain, gsm8k, False), run.tokenizer, recipe.seed * len(DOMAINS) + index)
        for index, domain in enumerate(DOMAINS)
    ]
    log.info("tokens per epoch: %s", {d: s.epoch_tokens for d, s in zip(DOMAINS, streams, strict=True)})
    losses_of = torch.compile(token_losses, dynamic=False)
    run.model.train()
    started = last_save = last_log = time.monotonic()
    seconds_before, logged, sums = run.seconds, 0, torch.zeros(len(DOMAINS))
    while run.step < steps and not run.stop:
        # Attention is the dearest part on a CPU: short rows in the stable phase, long ones in the decay.
        length = recipe.stable_len if run.step < stable_end else recipe.decay_len
        batch = own_share(batch_at(run.step, length, streams, recipe))
        sums += training_step(run, losses_of, batch)
        run.step, logged, now = run.step + 1, logged + 1, time.monotonic()
        run.seconds = seconds_before + now - started
        if run.step % 20 == 0 or run.step == steps:
            means = " ".join(f"{d} {v:.3f}" for d, v in zip(DOMAINS, (sums / logged).tolist(), strict=True))
            pace = (now - last_log) / logged
            log.info(
                "step %d/%d %s lr x%.2f %.0f tokens/s ETA %.1f min", run.step, steps, means,
                lr_scale(run.step, steps, recipe), recipe.tokens_per_step / pace, pace * (steps - run.step) / 60,
            )  # fmt: skip
            logged, last_log, sums = 0, now, torch.zeros(len(DOMAINS))
        if now - last_save > save_every:
            run.save()
            last_save = now
    run.save()


def is_main() -> bool:
    """Whether this process writes the files: the only one, or the first of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_share(batch: Tensor) -> Tensor:
    """The rows of a batch that this process trains on: its share of each domain, [rows / processes, length + 1]."""
    if not dist.is_initialized():
        return batch
    by_domain = batch.view(len(DOMAINS), -1, batch.shape[-1])
    return by_domain.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].flatten(0, 1).contiguous()


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each float32 tensor by its mean over all processes, in one exchange."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def training_step(run: Run, losses_of: Callable[[LlamaForCausalLM, Tensor], Tensor], batch: Tensor) -> Tensor:
    """One update; the mean loss of each domain, float32 [domains]."""
    scale = lr_scale(run.step, run.steps, run.recipe)
    for optimizer, base in zip(run.optimizers, (run.recipe.muon_lr, run.recipe.adamw_lr), strict=True):
        optimizer.param_groups[0]["lr"] = base * scale
    losses = losses_of(run.model, batch)
    losses.mean().backward()
    report = torch.tensor([*losses.detach().view(len(DOMAINS), -1).mean(1), float(run.stop)])
    if dist.is_initialized():
        average_over_processes([*(p.grad for p in run.model.parameters() if p.grad is not None), report])
    run.stop = report[-1].item() > 0  # Told to one process, a stop must end all of them at the same step.
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip_norm)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return report[:-1]


def export(run: Run, target: Path) -> None:
    """Write the model in bfloat16 and the tokenizer into ``target``, each file replaced at once."""
    if run.step == 0:
        raise SystemExit(
            f"--export: expected a checkpoint at {run.checkpoint}, found none. Train first, or pass --work."
        )
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        copy = new_model(run.recipe, run.tokenizer)
        copy.load_state_dict(run.model.state_dict())
        copy.to(torch.bfloat16).save_pretrained(scratch)
        run.tokenizer.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.chmod(0o644)
            os.replace(file, target / file.name)
    log.info("exported step %d (%d tokens) to %s", run.step, run.step * run.recipe.tokens_per_step, target)


@torch.inference_mode()
def heldout_loss(model: LlamaForCausalLM, docs: list[np.ndarray], recipe: Recipe, rows: int = 64) -> float:
    """Mean loss in nats per token over the documents, packed to at most ``rows`` rows of the longer training length."""
    flat = np.concatenate(docs)
    width = recipe.decay_len + 1
    count = min(rows, len(flat) // width)
    batches = torch.from_numpy(flat[: count * width].reshape(count, width)).split(8)
    return float(torch.cat([token_losses(model, batch) for batch in batches]).mean())


def heldout_prompts(gsm8k: Path, count: int) -> dict[str, list[str]]:
    """``count`` held-out prompts of each kind, spread evenly over those there are: two in chat form, one plain."""
    functions = heldout_functions()
    every = {
        "gsm8k": [chat_prompt(question) for question in heldout_gsm8k(gsm8k)],
        "code": [chat_prompt(function.request) for function in functions],
        "header": [function.header for function in functions],
    }
    return {kind: [texts[i * len(texts) // count] for i in range(count)] for kind, texts in every.items()}


def evaluate(target: Path, recipe: Recipe, gsm8k: Path, samples: int = 3, count: int = 40) -> None:
    """Log the held-out losses, and for each kind of prompt the share of greedy answers that loop and a few answers."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
        for domain in DOMAINS if dtype == torch.bfloat16 else ():
            loss = heldout_loss(model, encode_all(tokenizer, documents(domain, gsm8k, True)), recipe)
            log.info("%s: held-out loss %.3f nats/token", domain, loss)
        for kind, prompts in heldout_prompts(gsm8k, count).items():
            answers = [answer for _, answer in greedy(model, tokenizer, prompts, 128)]
            for prompt, answer in list(zip(prompts, answers, strict=True))[:: max(1, count // samples)]:
                log.info("[%s] %s\n--> %s\n", kind, prompt, tokenizer.decode(answer))
            loops, ended = sum(map(ends_in_loop, answers)), sum(len(answer) < 128 for answer in answers)
            repeats = sum((repeat_origins(answer) >= 0).any() for answer in answers)
            log.info(
                "%s, %s: of %d answers %d loop, %d repeat something, %d end by themselves",
                kind, dtype, count, loops, repeats, ended,
            )  # fmt: skip


def main() -> None:
    """Parse the command line and train, export or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, default=Path("train.jsonl"), help="fetched if it is not there")
    parser.add_argument("--work", type=Path, default=ROOT / "build/demo_target", help="checkpoint, tokenizer and log")
    parser.add_argument("--target", type=Path, default=TARGET, help="where the exported model goes")
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", action="store_true", help="only write the newest checkpoint to --target")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate --target")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(args.work / "train.log")]
    logging.basicConfig(
        level=logging.INFO if is_main() else logging.WARNING, format="%(asctime)s %(message)s", handlers=handlers
    )
    recipe, gsm8k = Recipe(), find_gsm8k(args.gsm8k)
    if args.evaluate:
        evaluate(args.target, recipe, gsm8k)
        return
    run = open_run(args.work, recipe, gsm8k, resume=args.resume)
    if not args.export:
        train(run, args.steps, gsm8k, args.save_every)
    if is_main() and (args.export or not run.stop):
        export(run, args.target)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
