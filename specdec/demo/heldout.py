"""The rule that splits the demo target's corpus, and the texts on the held-out side of it.

The demo target is trained on GSM8K and on functions of the Python standard library. A text is held out by a hash
of what identifies it, so every machine draws the same line without a list having to be shipped. Benchmarks take
their prompts from here: nothing that these functions return was trained on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specdec.textlines import lines_of

HELDOUT_SHARE = 0.05
MAX_FUNCTION_LINES = 40
MAX_FUNCTION_CHARS = 1400
MIN_FUNCTION_LINES = 3

# Test data, bundled wheels, codec tables and help texts teach a small model nothing about functions.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "_bundled", "config", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data"}
    | {"dist-packages", "site-packages", "test", "tests", "turtledemo", "idle_test"}
)
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Problem:
    """One GSM8K item: the question and its worked answer, calculator marks removed, ending in ``#### result``."""

    question: str
    answer: str


@dataclass(frozen=True)
class Function:
    """One function or method of the standard library, dedented to column 0.

    ``header`` is the signature with the docstring: all of the source that precedes the first real statement, without
    the last line break, which belongs to the same token as the indentation after it. ``summary`` is the first line of
    the docstring, or ``""``.
    """

    name: str
    signature: str
    summary: str
    header: str
    source: str

    @property
    def request(self) -> str:
        """The user turn that asks for this function in the chat format."""
        return f"Write a Python function `{self.signature}`: {self.summary}"


def is_heldout(text: str) -> bool:
    """Whether the text with this identity belongs to the held-out 5 % (SHA-256 of the stripped UTF-8 text)."""
    digest = hashlib.sha256(text.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


def gsm8k_problems(path: Path, *, heldout: bool) -> list[Problem]:
    """One side of a GSM8K ``.jsonl`` file (keys ``question`` and ``answer``), split by a hash of the question."""
    problems = []
    for _, line in lines_of(path):
        row = json.loads(line)
        if is_heldout(row["question"]) == heldout:
            problems.append(Problem(row["question"].strip(), _CALCULATOR_MARK.sub("", row["answer"]).strip()))
    return problems


def heldout_gsm8k(path: Path) -> list[str]:
    """The held-out questions of a GSM8K ``.jsonl`` file, in file order."""
    return [problem.question for problem in gsm8k_problems(path, heldout=True)]


def stdlib_functions(*, heldout: bool) -> list[Function]:
    """One side of the standard library's short functions, in order of file path, without duplicates.

    A function is kept if it spans 3..40 lines and at most 1400 characters. The split hashes ``def NAME``: all
    functions of one name fall on one side, because variants of one function are often near copies.
    """
    seen: set[str] = set()
    functions = []
    for path in _stdlib_files():
        for function in _functions_in(path):
            if function.source not in seen and is_heldout(f"def {function.name}") == heldout:
                seen.add(function.source)
                functions.append(function)
    return functions


def heldout_functions() -> list[Function]:
    """The held-out functions that have a docstring: prompt with ``request`` (chat) or with ``header`` (plain text)."""
    return [function for function in stdlib_functions(heldout=True) if function.summary]


def _stdlib_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in folders):
            yield path


def _functions_in(path: Path) -> Iterator[Function]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    # Only the outermost functions: a nested one is already part of the function around it.
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = _function(node, lines)
            if function is not None:
                yield function
        else:
            pending.extend(ast.iter_child_nodes(node))


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function | None:
    last = node.end_lineno or node.lineno
    body = lines[node.lineno - 1 : last]
    source = textwrap.dedent("\n".join(body)).rstrip() + "\n"
    if not MIN_FUNCTION_LINES <= len(body) <= MAX_FUNCTION_LINES or len(source) > MAX_FUNCTION_CHARS:
        return None
    docstring = ast.get_docstring(node) or ""
    body_start = node.body[1].lineno if docstring and len(node.body) > 1 else node.body[0].lineno
    if docstring and len(node.body) == 1 or body_start <= node.lineno:
        return None  # Nothing would be left to write after the header.
    header = "\n".join(source.splitlines()[: body_start - node.lineno])
    summary = docstring.strip().splitlines()[0].strip() if docstring.strip() else ""
    signature = f"{node.name}({ast.unparse(node.args)})"
    return Function(node.name, signature, summary, header, source)
