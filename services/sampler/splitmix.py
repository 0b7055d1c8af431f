"""splitmix64: words that share nothing with each other, made from neighbouring ones."""

from __future__ import annotations

STEP = 0x9E3779B97F4A7C15
"""What a stream counts up by."""
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
WORD = 0xFFFFFFFFFFFFFFFF


def finished(word: int) -> int:
    """The hash of a word in [0, 2**64)."""
    word = ((word ^ (word >> 30)) * FACTORS[0]) & WORD
    word = ((word ^ (word >> 27)) * FACTORS[1]) & WORD
    return word ^ (word >> 31)
