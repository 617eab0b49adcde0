"""Scores of a generated text against its reference that need no weights."""

import re
from collections import Counter


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def token_f1(generated: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words as bags (Rajpurkar et al., SQuAD, 2016)."""
    mine, wanted = Counter(words(generated)), Counter(words(reference))
    common = (mine & wanted).total()
    if not mine or not wanted:
        return float(mine == wanted)
    return 2 * common / (mine.total() + wanted.total())
