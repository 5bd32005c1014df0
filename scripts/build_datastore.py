"""Build a datastore for the drafters ``rest`` and ``suffix_automaton`` from text or JSONL files and a tokenizer.

    python scripts/build_datastore.py corpus.jsonl --tokenizer FOLDER_OR_HUB_ID --output store --fields question answer
    specdec generate drafter=rest drafter.path=store prompt=...

A line of a JSONL file is a document: its fields, strings or lists of strings, joined by newlines. Other files are text
and become documents of whole lines, some 64 KiB each. Files are read as a stream; memory is bounded by the size of a
shard, of which sorting needs up to 30 bytes per token (50 without pydivsufsort). Malformed lines are named, skipped and
counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from drafters.datastore import HAS_LIBRARY, Meta, vocabulary_fingerprint, write_meta, write_shard

TEXT_BLOCK = 1 << 16
BATCH = 256  # documents per call of the tokenizer
NAMED = 20  # malformed lines named one by one
MAX_SHARD = 1 << 28
console = Console(stderr=True)


class Corpus:
    """The documents of some files, one after the other.

    Args:
        files: JSONL where the name ends in ``.jsonl``, else text.
        fields: what makes up a document of a JSONL file.

    Attributes:
        skipped: malformed lines so far.
        position: bytes read so far, of all files together.
    """

    def __init__(self, files: Sequence[Path], fields: Sequence[str]) -> None:
        self.files, self.fields = files, fields
        self.skipped = self.position = 0

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            with path.open("rb") as lines:
                documents = self._records(path, lines) if path.suffix == ".jsonl" else self._blocks(lines)
                yield from (text for text in documents if text.strip())

    def _records(self, path: Path, lines: Iterator[bytes]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            self.position += len(line)
            if line.strip():
                try:
                    text = self._document(json.loads(line))
                except ValueError as error:
                    self.skipped += 1
                    if self.skipped <= NAMED:
                        console.print(escape(f"{path}:{number}: {error}; skipped"), soft_wrap=True)
                else:
                    yield text

    def _document(self, record: Any) -> str:
        if not isinstance(record, dict):
            raise ValueError(f"expected an object, got {type(record).__name__}")
        parts = []
        for field in self.fields:
            if field not in record:
                raise ValueError(f"no field {field!r}; it has {', '.join(record) or 'none'} (--fields)")
            value = record[field]
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"field {field!r}: expected a string or a list of strings")
            parts += texts
        return "\n".join(parts)

    def _blocks(self, lines: Iterator[bytes]) -> Iterator[str]:
        block, size = list[bytes](), 0
        for line in lines:
            self.position += len(line)
            block.append(line)
            size += len(line)
            if size >= TEXT_BLOCK:
                yield b"".join(block).decode("utf-8", errors="replace")
                block, size = [], 0
        yield b"".join(block).decode("utf-8", errors="replace")


def build(corpus: Corpus, tokenizer: Any, name: str, folder: Path, shard_tokens: int) -> Meta:
    """Write the datastore; returns what it says about itself.

    Raises:
        ValueError: the corpus holds no document.
    """
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    dtype = np.uint16 if size < 1 << 16 else np.uint32
    folder.mkdir(parents=True, exist_ok=True)
    waiting, tokens, documents, shards = list[np.ndarray](), 0, 0, 0
    in_shard = 0
    with Progress(console=console) as progress:
        task = progress.add_task("reading", total=sum(path.stat().st_size for path in corpus.files))
        texts = iter(corpus)
        while batch := list(itertools.islice(texts, BATCH)):
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                waiting.append(np.array([*(token + 1 for token in ids), 0], dtype=dtype))
                tokens, documents, in_shard = tokens + len(ids), documents + 1, in_shard + len(ids) + 1
                if in_shard >= shard_tokens:
                    write_shard(folder, shards, np.concatenate(waiting))
                    waiting, in_shard, shards = [], 0, shards + 1
            progress.update(task, completed=corpus.position)
        if waiting:
            progress.update(task, description="sorting")
            write_shard(folder, shards, np.concatenate(waiting))
            shards += 1
    if not documents:
        raise ValueError(f"no document in {', '.join(map(str, corpus.files))} ({corpus.skipped} malformed lines)")
    meta = Meta(name, size, vocabulary_fingerprint(vocabulary), shards, tokens, documents)
    write_meta(folder, meta)
    return meta


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSONL (by the name's end) or text")
    parser.add_argument("--tokenizer", required=True, help="the target's tokenizer: a local folder or a hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not hold a datastore yet")
    parser.add_argument("--fields", nargs="+", default=["text"], help="of a JSONL line, joined by newlines")
    parser.add_argument("--shard-tokens", type=int, default=8_000_000, help="tokens sorted at a time")
    options = parser.parse_args(argv)
    missing = [str(path) for path in options.files if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    if not 1 <= options.shard_tokens <= MAX_SHARD:
        parser.error(f"--shard-tokens: expected 1 to {MAX_SHARD}, got {options.shard_tokens}")
    if any(options.output.glob("*.npy")) or (options.output / "meta.json").exists():
        parser.error(f"--output: {options.output} holds a datastore, or part of one; remove it or name another folder")
    if not HAS_LIBRARY:
        console.print("pydivsufsort is not installed (extra 'retrieval'); sorting with numpy, several times slower")
    from transformers import AutoTokenizer

    corpus = Corpus(options.files, options.fields)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    try:
        meta = build(corpus, tokenizer, options.tokenizer, options.output, options.shard_tokens)
    except ValueError as error:
        parser.error(str(error))
    console.print(
        f"{options.output}: {meta.documents:,} documents, {meta.tokens:,} tokens, {meta.shards} shard(s); "
        f"{corpus.skipped} malformed line(s) skipped",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
