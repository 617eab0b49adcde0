"""Assigns patients to splits: the official one, else by the salted hash and the ratios.

A patient's split depends on nothing but its hash, so adding studies later moves nobody. One exception: in a set so
small that a split of a ratio above 0 stays empty, the patient whose hash lies nearest to it goes there
(shards/listing.py, which also refuses a patient in two official splits).
"""

from collections.abc import Sequence

from radhpc.core.errors import UserError
from radhpc.core.sample import SPLITS, Split

Ratios = tuple[float, float, float]  # train, validate, test: they add up to one
RATIOS: Ratios = (0.8, 0.1, 0.1)

WORDS: dict[str, Split] = {
    "train": "train", "training": "train",
    "validate": "validate", "validation": "validate", "valid": "validate", "val": "validate", "dev": "validate",
    "test": "test", "testing": "test",
}  # fmt: skip


def parse(word: str) -> Split:
    """Read a split's name as archives write it. Raises UserError."""
    try:
        return WORDS[word.strip().lower()]
    except KeyError:
        raise UserError(f"split: '{word}' is unknown; allowed are {', '.join(WORDS)}") from None


def position(patient: str) -> float:
    """Return a patient's position in [0, 1): the salted hash (16 hexadecimal digits) as a fraction."""
    return int(patient, 16) / float(16 ** len(patient))


def by_hash(patient: str, ratios: Ratios = RATIOS) -> Split:
    """Return the split whose interval of [0, 1) contains the patient's position."""
    place = position(patient)
    for split, (_, end) in zip(SPLITS, _intervals(ratios), strict=True):
        if place < end:
            return split
    return next(split for split, ratio in zip(reversed(SPLITS), reversed(ratios), strict=True) if ratio > 0)


def distance(patient: str, split: Split, ratios: Ratios) -> float:
    """Return the distance of a patient's position from the interval of a split, 0 inside it."""
    start, end = _intervals(ratios)[SPLITS.index(split)]
    place = position(patient)
    return max(start - place, place - end, 0.0)


def _intervals(ratios: Sequence[float]) -> list[tuple[float, float]]:
    ends = [sum(ratios[: n + 1]) for n in range(len(ratios))]
    return list(zip([0.0, *ends[:-1]], ends, strict=True))
