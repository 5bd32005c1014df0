"""Train and export the demo draft model: two layers that imitate the demo target, for the drafter ``draft_model``.

It starts from the target's own embedding, norm and first and last layer, and learns the target's distribution at every
position of the target's training texts (forward KL, all of the vocabulary). A run is resumed from its newest
checkpoint; the data read by step ``s`` are a pure function of the seed and ``s``.

    python scripts/train_demo_draft.py --steps 1300       # train, or go on; then export and evaluate
    python scripts/train_demo_draft.py --export           # write the newest checkpoint into the package
    python scripts/train_demo_draft.py --evaluate         # agreement with the target on held-out texts
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_target_corpus import DOMAINS, Stream, documents, encode_all, find_gsm8k
from train_demo_target import ROOT, TARGET, Recipe, Run, batch_at, lr_scale, new_optimizers

log = logging.getLogger("train_demo_draft")

DRAFT = ROOT / "specdec" / "demo" / "draft"
# Row length, batch and learning rates; the target's recipe holds for the rest.
RECIPE = replace(
    Recipe(), seed=1, layers=2, tokens_per_domain=1024, stable_len=256, muon_lr=5e-3, adamw_lr=1e-3, warmup_steps=20
)


def load_target(folder: Path) -> LlamaForCausalLM:
    """The demo target as it ships, in bfloat16, for inference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False)


def new_draft(target: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """A float32 model of ``layers`` layers out of the target's, the first and the last among them."""
    settings = {key: value for key, value in target.config.to_dict().items() if key != "layer_types"}
    config = type(target.config)(**(settings | {"num_hidden_layers": layers}))
    draft = LlamaForCausalLM(config)
    draft.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    for index, layer in enumerate(draft.model.layers):
        depth = round(index * (len(target.model.layers) - 1) / max(layers - 1, 1))
        layer.load_state_dict(target.model.layers[depth].state_dict())
    return draft.float()


def divergence(draft: LlamaForCausalLM, target: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """KL of the target's next-token distribution against the draft's in nats: int64 [rows, T] -> float32 [rows, T]."""
    with torch.no_grad():
        wanted = target(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = draft(input_ids=ids, use_cache=False).logits
    return (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1)


def training_step(run: Run, target: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """One update; the mean divergence of each domain, float32 [domains]."""
    scale = lr_scale(run.step, run.steps, run.recipe)
    for optimizer, base in zip(run.optimizers, (run.recipe.muon_lr, run.recipe.adamw_lr), strict=True):
        optimizer.param_groups[0]["lr"] = base * scale
    losses = divergence(run.model, target, batch[:, :-1])
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip_norm)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return losses.detach().view(len(DOMAINS), -1).mean(1)


def train(run: Run, target: LlamaForCausalLM, steps: int, gsm8k: Path, save_every: float) -> None:
    """Train up to ``steps``; checkpoints every ``save_every`` seconds, on SIGTERM and at the end."""
    recipe, run.steps = run.recipe, steps
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    streams = [
        Stream(partial(documents, domain, gsm8k, False), run.tokenizer, recipe.seed * len(DOMAINS) + index)
        for index, domain in enumerate(DOMAINS)
    ]
    run.model.train()
    started = last_save = time.monotonic()
    seconds_before, logged, sums = run.seconds, 0, torch.zeros(len(DOMAINS))
    while run.step < steps and not run.stop:
        sums += training_step(run, target, batch_at(run.step, recipe.stable_len, streams, recipe))
        run.step, logged, now = run.step + 1, logged + 1, time.monotonic()
        run.seconds = seconds_before + now - started
        if run.step % 20 == 0 or run.step == steps:
            means = " ".join(f"{d} {v:.3f}" for d, v in zip(DOMAINS, (sums / logged).tolist(), strict=True))
            left = (steps - run.step) * run.seconds / run.step / 60
            log.info("step %d/%d KL %s, %.0f s, ETA %.1f min", run.step, steps, means, run.seconds, left)
            logged, sums = 0, torch.zeros(len(DOMAINS))
        if now - last_save > save_every:
            run.save()
            last_save = now
    run.save()


def export(run: Run, folder: Path) -> None:
    """Write the model in bfloat16 into ``folder``, each file replaced at once; its tokenizer is the target's."""
    if run.step == 0:
        raise SystemExit(f"--export: expected a checkpoint at {run.checkpoint}, found none. Train first.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy = LlamaForCausalLM(run.model.config)
        copy.load_state_dict(run.model.state_dict())
        copy.generation_config = run.model.generation_config
        copy.to(torch.bfloat16).save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)
    log.info("exported step %d (%d tokens) to %s", run.step, run.step * run.recipe.tokens_per_step, folder)


@torch.inference_mode()
def evaluate(
    draft: LlamaForCausalLM, target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, gsm8k: Path
) -> None:
    """Log, per domain, how often the two agree on held-out texts: on the argmax, and as distributions."""
    draft.eval()
    for domain in DOMAINS:
        flat = np.concatenate(encode_all(tokenizer, documents(domain, gsm8k, True)))
        rows = torch.from_numpy(flat[: 24 * 512].reshape(24, 512))
        same, overlap = [], []
        for ids in rows.split(4):
            p, q = (model(input_ids=ids, use_cache=False).logits.float().softmax(-1) for model in (target, draft))
            same.append((p.argmax(-1) == q.argmax(-1)).float().mean())
            overlap.append(torch.minimum(p, q).sum(-1).mean())
        log.info(
            "%s: same argmax %.3f, sum of min(p, q) %.3f", domain, torch.stack(same).mean(), torch.stack(overlap).mean()
        )


def main() -> None:
    """Parse the command line and train, export or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, default=Path("train.jsonl"), help="fetched if it is not there")
    parser.add_argument("--work", type=Path, default=ROOT / "build/demo_draft", help="checkpoint and log")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--draft", type=Path, default=DRAFT, help="where the exported model goes")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--export", action="store_true", help="only write the newest checkpoint to --draft")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate --draft")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(args.work / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    gsm8k, target = find_gsm8k(args.gsm8k), load_target(args.target)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.target)
    if args.evaluate:
        evaluate(load_target(args.draft), target, tokenizer, gsm8k)
        return
    torch.manual_seed(RECIPE.seed)
    model = new_draft(target, RECIPE.layers)
    run = Run(args.work, RECIPE, tokenizer, model, new_optimizers(model, RECIPE))
    run.load()
    if not args.export:
        train(run, target, args.steps, gsm8k, args.save_every)
    if args.export or not run.stop:
        export(run, args.draft)
        evaluate(load_target(args.draft), target, tokenizer, gsm8k)


if __name__ == "__main__":
    main()
