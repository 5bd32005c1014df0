"""How sure the difference of two methods of an evaluation is: paired resampling of its texts.

    python scripts/compare_methods.py RUN hydra++-63 hydra-63 [--resamples 10000] [--all-texts]

RUN is a folder of ``specdec evaluate`` with its answers. Every resampling draws as many texts as there are, with
replacement, and computes mean accepted tokens and tokens per second of both methods over the same draw. Said are the
difference of the first and the ratio of the second, with the interval that 95 % of the resamplings fall into. Texts
whose plain decoding ends in a loop are left out unless ``--all-texts`` is given. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from specdec.evaluation.records import Answer, read_run

INTERVAL = (2.5, 97.5)


def counted(answer: Answer) -> np.ndarray:
    """float64 ``[4]``: tokens by verifications, verifications, tokens, seconds; of the first repeat of a question."""
    choice = answer.choices[0]
    lengths = choice.accept_lengths
    return np.array([sum(lengths), len(lengths), sum(choice.new_tokens), sum(choice.wall_time)], float)


def compared(folder: Path, names: tuple[str, str], resamples: int, all_texts: bool) -> dict[str, object]:
    """The two differences with their intervals.

    Raises:
        ValueError: a method that the run does not have (lists those it has), or no text in common.
    """
    by_name = {variant.method: answers for variant, answers in read_run(folder).answers.items()}
    if missing := [name for name in (*names, "none") if name not in by_name]:
        raise ValueError(f"{folder} has no answers of {', '.join(missing)}; it has: {', '.join(sorted(by_name))}")
    plain = by_name["none"]
    shared = [key for key in plain if all(key in by_name[name] for name in names)]
    kept = [key for key in shared if all_texts or not any(plain[key].choices[0].looping)]
    if not kept:
        raise ValueError(f"{' and '.join(names)} have no text in common that counts")
    totals = np.stack([[counted(by_name[name][key]) for key in kept] for name in names])
    draws = np.random.default_rng(0).integers(len(kept), size=(resamples, len(kept)))
    drawn = np.concatenate([totals.sum(1)[None], totals[:, draws].sum(2).swapaxes(0, 1)])  # [1 + resamples, 2, 4]
    accepted, rate = drawn[..., 0] / drawn[..., 1], drawn[..., 2] / drawn[..., 3]
    found = {"accepted_tokens_difference": accepted[:, 0] - accepted[:, 1], "speed_ratio": rate[:, 0] / rate[:, 1]}
    intervals = {name: np.percentile(values[1:], INTERVAL).round(4).tolist() for name, values in found.items()}
    said = {name: {"value": round(float(values[0]), 4), "interval": intervals[name]} for name, values in found.items()}
    return {"methods": list(names), "texts": len(kept), **said}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("methods", nargs=2)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--all-texts", action="store_true")
    arguments = parser.parse_args()
    try:
        found = compared(arguments.run, tuple(arguments.methods), arguments.resamples, arguments.all_texts)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    Console().out(json.dumps(found), highlight=False)


if __name__ == "__main__":
    main()
