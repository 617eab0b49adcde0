"""Drawn chest radiographs whose findings are known: for tests, for the quickstart, and for load.

Study i of seed s is a pure function of (s, i): the patient, what is found where, the wording of the report and,
in the build's workers, the pixels. Each study has none to three findings; labels stand under the vocabulary
"phantom" (LABELS) and, where CheXpert has a name for it, under "chexpert".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from radhpc.core.sample import CHEXPERT
from shards.datasets.reader import RawStudy, ReaderOptions
from shards.images.raw_image import BadImage, RawImage
from shards.phantom import image, report

SYNTHETIC = True

Side = Literal["left", "right"]
LABELS: dict[str, tuple[str, ...]] = {  # label: its CheXpert names
    "effusion left": ("Pleural Effusion",),
    "effusion right": ("Pleural Effusion",),
    "cardiomegaly": ("Cardiomegaly",),
    "pneumothorax": ("Pneumothorax",),
    "nodule upper": ("Lung Lesion",),
    "nodule middle": ("Lung Lesion",),
    "nodule lower": ("Lung Lesion",),
    "consolidation right upper": ("Consolidation", "Lung Opacity"),
    "consolidation right middle": ("Consolidation", "Lung Opacity"),
    "consolidation right lower": ("Consolidation", "Lung Opacity"),
    "consolidation left upper": ("Consolidation", "Lung Opacity"),
    "consolidation left lower": ("Consolidation", "Lung Opacity"),
}
COUNTS = (0.16, 0.32, 0.31, 0.21)  # chances of none, one, two and three findings
BLOCK = (1, 2, 3)  # studies per patient, in every run of six studies, in an order drawn for it
_LABELS = tuple(LABELS)
# Findings that occupy much of the chest are rejected more often, and so are drawn with a higher weight.
_WEIGHTS = np.array([1.0, 1.0, 1.0, 1.4, 1.0, 1.0, 1.0, 1.1, 1.1, 1.1, 1.1, 1.1])


class PhantomOptions(ReaderOptions):
    """phantom: drawn chest radiographs."""

    studies: int = Field(2000, gt=0, description="how many studies")
    seed: int = Field(0, ge=0, description="another seed, other patients: a whole number from 0")
    size: int = Field(256, ge=32, le=4096, description="pixels on a side: 32 to 4096")
    two_views: float = Field(0.3, ge=0, le=1, description="share of studies with a lateral view: 0 to 1")
    damaged: float = Field(0, ge=0, le=1, description="share of studies whose images cannot be read: 0 to 1")


OPTIONS = PhantomOptions


@dataclass(frozen=True)
class Picture:
    """A view that is drawn when it is called: 12 bits, in 16.

    The names of the class and its fields are part of the identity of a build, by their repr.
    """

    seed: int
    study: int
    view: image.Projection
    size: int

    def __call__(self) -> RawImage:
        anatomy = np.random.default_rng((self.seed, 1, *_patient(self.seed, self.study)))
        exposure = np.random.default_rng((self.seed, 2, self.study, image.PROJECTIONS.index(self.view)))
        shown = findings(self.seed, self.study)
        return RawImage(image.draw(self.view, self.size, shown, anatomy, exposure), bits=image.BITS)


@dataclass(frozen=True)
class Damaged:
    """A view that cannot be read."""

    study: int

    def __call__(self) -> RawImage:
        raise BadImage(f"study {self.study}", "broken image", "damaged on purpose")


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies; `raw` is not needed."""
    assert isinstance(options, PhantomOptions)
    for number in range(options.studies):
        yield study(number, options)


def study(number: int, options: PhantomOptions) -> RawStudy:
    """Draw study `number` of the options' seed."""
    seed = options.seed
    shown = findings(seed, number)
    rng = np.random.default_rng((seed, 3, number))
    views: tuple[image.Projection, ...] = ("PA", "L") if rng.random() < options.two_views else ("PA",)
    present = {finding.label for finding in shown}
    block, member = _patient(seed, number)
    damaged = np.random.default_rng((seed, 5, number)).random() < options.damaged
    return RawStudy(
        study=f"{seed}/{number}",
        patient=f"{seed}/{block}/{member}",
        views=tuple(
            (Damaged(number) if damaged else Picture(seed, number, view, options.size), view) for view in views
        ),
        name=f"study {number}",
        report=report.write(shown, len(views), rng),
        labels={"phantom": {label: int(label in present) for label in LABELS}, "chexpert": _chexpert(present)},
    )


def findings(seed: int, number: int) -> list[image.Finding]:
    """Draw none to three findings that can be told apart: no two of them in the same part of the chest."""
    rng = np.random.default_rng((seed, 4, number))
    count = rng.choice(len(COUNTS), p=COUNTS)
    taken: set[str] = set()
    chosen: list[image.Finding] = []
    for label in rng.choice(len(_LABELS), size=len(_LABELS), replace=False, p=_WEIGHTS / _WEIGHTS.sum()):
        if len(chosen) == count:
            break
        name = _LABELS[label]
        sides = [side for side in _sides(name, rng) if not taken & _room(name, side)]
        if sides:
            taken |= _room(name, sides[0])
            chosen.append(image.Finding(name, sides[0], float(rng.random())))
    return sorted(chosen, key=lambda finding: _LABELS.index(finding.label))


def _sides(label: str, rng: np.random.Generator) -> tuple[Side, ...]:
    """Return the sides that a finding may be on, in the order of preference."""
    either: tuple[Side, ...] = ("left", "right") if rng.random() < 0.5 else ("right", "left")
    return tuple(side for side in either if side in label) or either


def _room(label: str, side: Side) -> set[str]:
    """Return the parts of the chest that a finding occupies."""
    if label == "cardiomegaly":
        return {"heart", "left heart border"}
    if label == "pneumothorax":
        return {f"{side} upper", f"{side} middle", f"{side} lower"}
    if label == "consolidation left upper":
        return {"left upper", "left middle"}
    zone = "lower" if label.startswith("effusion") else label.split()[-1]
    hidden = {"left heart border"} if side == "left" and label.endswith("lower") else set()
    return {f"{side} {zone}"} | hidden


def _patient(seed: int, number: int) -> tuple[int, int]:
    """Return the patient of a study: the number of its run of six studies, and of the patient in that run."""
    block, place = divmod(number, sum(BLOCK))
    sizes = np.random.default_rng((seed, 0, block)).permutation(BLOCK)
    return block, int(np.searchsorted(np.cumsum(sizes), place, side="right"))


def _chexpert(present: set[str]) -> dict[str, int | None]:
    drawn = {name for names in LABELS.values() for name in names}
    shown = {name for label in present for name in LABELS[label]}
    values: dict[str, int | None] = {name: int(name in shown) if name in drawn else None for name in CHEXPERT}
    values["No Finding"] = int(not present)
    return values
