"""Tokens as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; the bytes of an unfinished character wait for the token that ends it.

    Special tokens add nothing. A few tokens before are decoded with each one, since they say how it joins on.
    """
    found: list[str] = []
    start = done = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(tokenizer.decode(ids[start:done], skip_special_tokens=True)) :])
        start, done = done, end
    return found
