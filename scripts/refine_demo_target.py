"""The second stage of the demo target's training: further text, and less repetition in its own greedy answers.

Starts from the weights that ``train_demo_target.py`` exported. Each update joins the language-model loss on new
batches of the same corpus to the unlikelihood of repetition (``demo_target_loops.py``) in greedy continuations that
the model has just written to training-side prompts. They are written anew every few updates. A run is resumed from
its newest checkpoint, which is taken between two such rounds; texts and prompts depend on the seed and the step.

    python scripts/refine_demo_target.py --steps 84      # refine, or go on; then export
    python scripts/refine_demo_target.py --export         # write the newest checkpoint into the package
    python scripts/train_demo_target.py --evaluate        # the figures of the model card
"""

from __future__ import annotations

import argparse
import copy
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_target_corpus import DOMAINS, Stream, documents, find_gsm8k
from demo_target_loops import Prompts, greedy, model_unlikelihood, repeated_rows
from train_demo_target import ROOT, TARGET, Recipe, Run, batch_at, export, lr_scale, new_optimizers, token_losses

log = logging.getLogger("refine_demo_target")

RECIPE = Recipe(tokens_per_domain=2048, muon_lr=1.2e-3, adamw_lr=4e-4, warmup_steps=8, decay_share=0.8)


@dataclass(frozen=True)
class Plan:
    """What the second stage adds to the recipe. Prompts are counted as questions, requests and headers."""

    first_token: int = 1900 * 4096
    updates_per_round: int = 4
    prompts: tuple[int, int, int] = (24, 24, 16)
    new_tokens: int = 160
    rows: int = 8
    length: int = 256
    weight: float = 2.0


def open_refinement(folder: Path, start: Path, *, resume: bool = True) -> Run:
    """The run in ``folder`` with its newest checkpoint, or a new one from the exported model in ``start``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    run = Run(folder, RECIPE, tokenizer, model, new_optimizers(model, RECIPE))
    if resume:
        run.load()
    return run


def loop_batches(run: Run, plan: Plan, prompts: Prompts) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """A round of greedy writing: batches of rows with repetition (ids, origins) and the share of such rows.

    One batch for each update of the round, int64 [rows, length + 1] each, padded with rows that have no mark.
    """
    texts = prompts.draw(plan.prompts, run.recipe.seed * 2**32 + run.step)
    writer = copy.deepcopy(run.model).to(torch.bfloat16).eval()
    found = repeated_rows(greedy(writer, run.tokenizer, texts, plan.new_tokens), plan.length)
    order = np.random.default_rng([run.recipe.seed, run.step]).permutation(len(found))
    batches = []
    for update in range(plan.updates_per_round):
        ids = np.zeros((plan.rows, plan.length + 1), np.int64)
        origins = np.full_like(ids, -1)
        for slot, index in enumerate(order[update :: plan.updates_per_round][: plan.rows]):
            ids[slot], origins[slot] = found[index]
        batches.append((torch.from_numpy(ids), torch.from_numpy(origins)))
    return batches, len(found) / len(texts)


def refine(run: Run, steps: int, plan: Plan, gsm8k: Path, save_every: float) -> None:
    """Refine up to ``steps``; checkpoints every ``save_every`` seconds, on SIGTERM and at the end."""
    if run.steps not in (0, steps):
        raise SystemExit(
            f"--steps {steps}: the checkpoint in {run.folder} is of a run of {run.steps} steps. Give --steps "
            f"{run.steps}, or --no-resume to begin again."
        )
    run.steps = steps
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    streams = [
        Stream(partial(documents, domain, gsm8k, False), run.tokenizer, run.recipe.seed * len(DOMAINS) + index)
        for index, domain in enumerate(DOMAINS)
    ]
    first = plan.first_token // run.recipe.tokens_per_domain
    prompts = Prompts(gsm8k)
    losses_of = (torch.compile(token_losses, dynamic=False), torch.compile(model_unlikelihood, dynamic=False))
    started = last_save = time.monotonic()
    seconds_before = run.seconds
    while run.step < steps and not run.stop:
        loops, share = loop_batches(run, plan, prompts)
        run.model.train()
        reports = []
        for ids, origins in loops[: steps - run.step]:
            text = batch_at(first + run.step, run.recipe.decay_len, streams, run.recipe)
            reports.append(update(run, plan, losses_of, text, (ids, origins)))
            run.step += 1
        now = time.monotonic()
        run.seconds = seconds_before + now - started
        means = " ".join(f"{value:.3f}" for value in torch.stack(reports).mean(0).tolist())
        log.info(
            "step %d/%d, %.0f%% of the answers repeat, losses (%s, repetition) %s, %.0f s",
            run.step, steps, 100 * share, ", ".join(DOMAINS), means, run.seconds,
        )  # fmt: skip
        if now - last_save > save_every:
            run.save()
            last_save = now
    run.save()


def update(
    run: Run, plan: Plan, losses_of: tuple[Callable, Callable], text: Tensor, loops: tuple[Tensor, Tensor]
) -> Tensor:
    """One update on a batch of text and one of loops; the mean losses: of each domain, of repetition."""
    scale = lr_scale(run.step, run.steps, run.recipe)
    for optimizer, base in zip(run.optimizers, (run.recipe.muon_lr, run.recipe.adamw_lr), strict=True):
        optimizer.param_groups[0]["lr"] = base * scale
    of_text, of_loops = losses_of
    language = of_text(run.model, text)
    language.mean().backward()
    repetition = of_loops(run.model, *loops).mean()
    (plan.weight * repetition).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip_norm)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([*language.detach().view(len(DOMAINS), -1).mean(1), repetition.detach()])


def main() -> None:
    """Parse the command line and refine or export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, default=Path("train.jsonl"), help="fetched if it is not there")
    parser.add_argument("--work", type=Path, default=ROOT / "build/demo_target_refined", help="checkpoint and log")
    parser.add_argument("--start", type=Path, default=TARGET, help="the exported model of the first stage")
    parser.add_argument("--target", type=Path, default=TARGET, help="where the exported model goes")
    parser.add_argument("--steps", type=int, default=84)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", action="store_true", help="only write the newest checkpoint to --target")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(args.work / "refine.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    run = open_refinement(args.work, args.start, resume=args.resume)
    if not args.export:
        refine(run, args.steps, Plan(), find_gsm8k(args.gsm8k), args.save_every)
    if args.export or not run.stop:
        export(run, args.target)


if __name__ == "__main__":
    main()
