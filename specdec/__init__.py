"""specdec: speculative decoding with token trees for any Hugging Face decoder; the output is the target's own."""

from specdec.build import speculate
from specdec.generation import restore, speculation_of
from specdec.interfaces import AcceptanceRule, Drafter, Verifier
from specdec.metrics import SpeculationStats
from specdec.tree import TokenTree

__version__ = "0.1.0"
__all__ = [
    "AcceptanceRule",
    "Drafter",
    "SpeculationStats",
    "TokenTree",
    "Verifier",
    "restore",
    "speculate",
    "speculation_of",
]
