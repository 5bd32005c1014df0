"""Make the initial table of the ``trigram`` drafter from a corpus.

    python scripts/build_trigram.py --tokenizer FOLDER_OR_HUB_ID --output table.safetensors corpus.jsonl notes.txt
    specdec generate drafter=trigram drafter.path=table.safetensors ...

A ``.jsonl`` file holds one JSON object per line, whose text fields are named by ``--field`` (in that order; several are
joined by a line break); a value may also be a list of strings or of chat messages with ``content``. Any other file is
text, one document per line (``--whole`` makes a file one document). Tri-grams never cross documents. Bad lines are
named and counted, and the work goes on.

Scores are shares: of all tri-grams that begin with a pair, the part that goes on with this token. Memory is bounded:
when more than ``--max-trigrams`` distinct tri-grams have been seen, the rarer ones are dropped until half of that is
left. The same corpus, tokenizer and options give the same file. What it was made from is in the file's metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

_TOKEN_BITS = 21  # three tokens share one int64
_BATCH = 256  # documents per call of the tokenizer
console = Console(stderr=True)


@dataclass
class Counts:
    """Counts of distinct tri-grams under a bound.

    Attributes:
        most: distinct tri-grams kept after a merge.
        chunk: tri-grams collected before they are merged.
        tokens, documents, seen: read so far; ``seen`` counts tri-grams.
        dropped: tri-grams seen that pruning threw away.
    """

    most: int
    chunk: int = 2**22
    tokens: int = 0
    documents: int = 0
    seen: int = 0
    dropped: int = 0
    _codes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _waiting: list[np.ndarray] = field(default_factory=list)
    _num_waiting: int = 0

    def add(self, ids: Sequence[int]) -> None:
        """The token ids of one document.

        Raises:
            ValueError: an id too large to be packed.
        """
        self.documents += 1
        self.tokens += len(ids)
        if len(ids) < 3:
            return
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.max() >= 1 << _TOKEN_BITS:
            raise ValueError(f"expected token ids below {1 << _TOKEN_BITS}, got {tokens.max()}")
        self._waiting.append(tokens[:-2] << 2 * _TOKEN_BITS | tokens[1:-1] << _TOKEN_BITS | tokens[2:])
        self._num_waiting += len(tokens) - 2
        self.seen += len(tokens) - 2
        if self._num_waiting >= min(self.chunk, self.most):
            self._merge()

    def _merge(self) -> None:
        new, counts = np.unique(np.concatenate([*self._waiting, self._codes[:0]]), return_counts=True)
        codes, where = np.unique(np.concatenate([self._codes, new]), return_inverse=True)
        total = np.bincount(where, weights=np.concatenate([self._counts, counts]), minlength=len(codes))
        self._codes, self._counts = codes, total.astype(np.int64)
        self._waiting, self._num_waiting = [], 0
        if len(self._codes) > self.most:
            # Down to half, so that pruning is rare; among equals the smaller tokens stay.
            kept = np.sort(np.argsort(-self._counts, kind="stable")[: self.most // 2])
            self.dropped += int(self._counts.sum() - self._counts[kept].sum())
            self._codes, self._counts = self._codes[kept], self._counts[kept]

    def table(self, num_successors: int, max_pairs: int) -> dict[str, torch.Tensor]:
        """What ``TrigramTable.load_state_dict`` takes: the most frequent pairs first, each with its best successors."""
        self._merge()
        pair_codes, starts = np.unique(self._codes >> _TOKEN_BITS, return_index=True)
        if not len(pair_codes):
            raise ValueError("the corpus has no document of three tokens; nothing to make a table from")
        sums = np.add.reduceat(self._counts, starts)
        order = np.argsort(-sums, kind="stable")[:max_pairs]
        owner = np.searchsorted(pair_codes, self._codes >> _TOKEN_BITS)
        # Within a pair the most frequent first, then the smaller token; codes are in order already.
        best = np.lexsort((-self._counts, owner))
        rank = np.arange(len(best)) - starts[owner[best]]
        best, rank = best[rank < num_successors], rank[rank < num_successors]
        row = np.empty(len(pair_codes), np.int64)
        row[order] = np.arange(len(order))
        wanted = np.isin(owner[best], order)
        best, rank = best[wanted], rank[wanted]
        tokens = np.full((len(order), num_successors), -1, np.int32)
        scores = np.zeros((len(order), num_successors), np.float32)
        at = (row[owner[best]], rank)
        tokens[at] = self._codes[best] & ((1 << _TOKEN_BITS) - 1)
        scores[at] = self._counts[best] / sums[owner[best]]
        first, second = pair_codes[order] >> _TOKEN_BITS, pair_codes[order] & ((1 << _TOKEN_BITS) - 1)
        parts = {"pairs": first << 32 | second, "successors": tokens, "scores": scores}
        learnt = torch.zeros(len(order), dtype=torch.int64)
        return {**{name: torch.from_numpy(part) for name, part in parts.items()}, "learnt": learnt}


class Corpus:
    """The documents of some files in order, read line by line.

    Args:
        files: ``.jsonl`` files, and text files.
        fields: of the objects in ``.jsonl`` files.
        whole: a text file is one document.
        read: called with the number of bytes of every line.
    """

    def __init__(
        self, files: Sequence[Path], fields: Sequence[str], whole: bool, read: Callable[[int], Any] = lambda _: None
    ) -> None:
        self.files, self.fields, self.whole, self.read = files, fields, whole, read
        self.bad_lines = 0
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            with path.open("rb") as file:
                if self.whole and path.suffix != ".jsonl":
                    yield self._take(file.read()).decode("utf-8", errors="replace")
                    continue
                for number, line in enumerate(file, start=1):
                    text = self._document(path, number, self._take(line))
                    if text:
                        yield text

    def _take(self, data: bytes) -> bytes:
        self.digest.update(data)
        self.read(len(data))
        return data

    def _document(self, path: Path, number: int, line: bytes) -> str | None:
        if path.suffix != ".jsonl":
            return line.decode("utf-8", errors="replace").rstrip("\r\n") or None
        if not line.strip():
            return None
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            missing = [name for name in self.fields if name not in row]
            if missing:
                raise ValueError(f"no field {missing[0]!r}; it has: {', '.join(map(str, row)) or 'none'}")
            return "\n".join(_text(row[name], name) for name in self.fields)
        except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
            self.bad_lines += 1
            console.print(f"{path}:{number}: {error}", style="yellow", markup=False, soft_wrap=True)
            return None


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(_text(entry.get("content") if isinstance(entry, dict) else entry, name) for entry in value)
    raise ValueError(f"field {name!r}: expected text, a list of texts or of chat messages; got {type(value).__name__}")


def batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Lists of ``_BATCH`` documents."""
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def count(corpus: Corpus, tokenizer: Any, counts: Counts) -> None:
    """Read the whole corpus."""
    for batch in batches(iter(corpus)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            counts.add(ids)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line.

    Raises:
        FileNotFoundError: a corpus file is missing.
        ValueError: nothing to learn from.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="+")
    parser.add_argument("--tokenizer", required=True, help="a folder, a hub id, or 'demo' for the embedded target's")
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--field", action="append", help="of JSONL objects; repeatable; default: text")
    parser.add_argument("--whole", action="store_true", help="text files are one document each")
    parser.add_argument("--num-successors", type=int, default=12)
    parser.add_argument("--max-pairs", type=int, default=2**20)
    parser.add_argument("--max-trigrams", type=int, default=20_000_000)
    options = parser.parse_args(arguments)
    if min(options.num_successors, options.max_pairs) < 1 or options.max_trigrams < 2:
        parser.error("expected --num-successors and --max-pairs >= 1 and --max-trigrams >= 2")
    if options.output.suffix != ".safetensors":
        parser.error(f"expected --output to end in .safetensors, got {options.output}")
    for path in options.corpus:
        if not path.is_file():
            raise FileNotFoundError(f"corpus file {path} does not exist")
    counts, corpus = Counts(options.max_trigrams), Corpus(options.corpus, options.field or ["text"], options.whole)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("counting", total=sum(path.stat().st_size for path in options.corpus))
        corpus.read = lambda size: progress.advance(task, size)
        count(corpus, _tokenizer(options.tokenizer), counts)
    table = counts.table(options.num_successors, options.max_pairs)
    about = _provenance(options, counts, corpus, len(table["pairs"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(table, options.output, metadata={"provenance": json.dumps(about, sort_keys=True)})
    console.print_json(json.dumps(about))


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from specdec.loading import DEMO_FOLDER

    return AutoTokenizer.from_pretrained(DEMO_FOLDER if name == "demo" else name)


def _provenance(options: argparse.Namespace, counts: Counts, corpus: Corpus, num_pairs: int) -> dict[str, Any]:
    return {
        "corpus": [path.name for path in options.corpus],
        "corpus_sha256": corpus.digest.hexdigest(),
        "tokenizer": options.tokenizer,
        "fields": corpus.fields,
        "whole": options.whole,
        "num_successors": options.num_successors,
        "max_pairs": options.max_pairs,
        "max_trigrams": options.max_trigrams,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "trigrams": counts.seen,
        "trigrams_dropped": counts.dropped,
        "pairs": num_pairs,
        "bad_lines": corpus.bad_lines,
        "versions": {name: version(name) for name in ("numpy", "torch", "transformers")},
    }


if __name__ == "__main__":
    main()
