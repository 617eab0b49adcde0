"""Scores a generated text against its reference without a model."""

import re
from collections import Counter


def words(text: str) -> list[str]:
    """Return words and numbers in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def token_f1(generated: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words as bags (Rajpurkar et al., SQuAD, 2016)."""
    own, expected = Counter(words(generated)), Counter(words(reference))
    common = (own & expected).total()
    if not own or not expected:
        return float(own == expected)
    return 2 * common / (own.total() + expected.total())
