"""Which split a patient belongs to: the official one, else by the salted hash against the ratios.

A patient's place depends on nothing but its hash, so that adding studies later moves nobody. One exception:
in a set so small that a wanted split stays empty, the patient whose hash lies nearest to it goes there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from radhpc.errors import UserError
from radhpc.sample import SPLITS, Split

Ratios = tuple[float, float, float]  # train, validate, test: they add up to one
RATIOS: Ratios = (0.8, 0.1, 0.1)

WORDS: dict[str, Split] = {
    "train": "train", "training": "train",
    "validate": "validate", "validation": "validate", "valid": "validate", "val": "validate", "dev": "validate",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Assignment:
    """The split of each patient by its hash, and which splits had to be filled because they were empty."""

    of: dict[str, Split]
    filled: tuple[Split, ...] = ()


def parse(word: str) -> Split:
    """Read a split's name as archives write it. Raises UserError."""
    try:
        return WORDS[word.strip().lower()]
    except KeyError:
        raise UserError(f"split: '{word}' is unknown; allowed are {', '.join(WORDS)}") from None


def position(patient: str) -> float:
    """Where a patient stands in [0, 1): the salted hash (16 hexadecimal digits) as a fraction."""
    return int(patient, 16) / float(16 ** len(patient))


def by_hash(patient: str, ratios: Ratios = RATIOS) -> Split:
    """The split in whose stretch of [0, 1) the patient stands."""
    place = position(patient)
    for split, (_, end) in zip(SPLITS, _stretches(ratios), strict=True):
        if place < end:
            return split
    return next(split for split, ratio in zip(reversed(SPLITS), reversed(ratios), strict=True) if ratio > 0)


def assign(studies: Iterable[tuple[str, Split | None, str]], ratios: Ratios = RATIOS) -> Assignment:
    """Give each patient one split.

    `studies` yields (patient hash, official split or None, what to call the study). A patient with any
    official split keeps it for all studies. Raises UserError where one has two different ones.
    """
    official: dict[str, Split] = {}
    called: dict[str, str] = {}
    patients: dict[str, None] = {}  # a set that keeps the order
    for patient, split, name in studies:
        patients.setdefault(patient)
        if split is None:
            continue
        if official.setdefault(patient, split) != split:
            raise UserError(
                f"split: '{called[patient]}' is in {official[patient]} and '{name}' in {split}, "
                "but they are of the same patient; a patient may stand in one split only"
            )
        called.setdefault(patient, name)
    of = {patient: official.get(patient) or by_hash(patient, ratios) for patient in patients}
    return Assignment(of) if official else _fill(of, ratios)


def _fill(of: dict[str, Split], ratios: Ratios) -> Assignment:
    """Move the nearest patient into each wanted split that is empty, where another split can spare one."""
    of, filled = dict(of), []
    members = {split: [patient for patient in of if of[patient] == split] for split in SPLITS}
    for split, ratio, stretch in zip(SPLITS, ratios, _stretches(ratios), strict=True):
        spare = [patient for other in SPLITS if len(members[other]) > 1 for patient in members[other]]
        if ratio == 0 or members[split] or not spare:
            continue
        nearest = min(spare, key=lambda patient: (_distance(patient, stretch), patient))
        members[of[nearest]].remove(nearest)
        members[split].append(nearest)
        of[nearest] = split
        filled.append(split)
    return Assignment(of, tuple(filled))


def _distance(patient: str, stretch: tuple[float, float]) -> float:
    place = position(patient)
    return max(stretch[0] - place, place - stretch[1], 0.0)


def _stretches(ratios: Sequence[float]) -> list[tuple[float, float]]:
    ends = [sum(ratios[: n + 1]) for n in range(len(ratios))]
    return list(zip([0.0, *ends[:-1]], ends, strict=True))
