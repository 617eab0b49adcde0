"""Define one study as a shard holds it: `<key>.<n>.jpg` (or png, jxl) for each view and `<key>.json`, described here.

The JSON is all that training may know about a study. Unknown fields are refused, so that a date, a
name or an accession number cannot slip into a shard with a new reader. Patient and study are salted hashes.
The fields that came with format 2 of the manifest are written only where the archive has them.
"""

import hashlib
import hmac
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Split = Literal["train", "validate", "test"]
SPLITS: tuple[Split, ...] = ("train", "validate", "test")

# The fourteen observations of CheXpert (Irvin et al., 2019), in the order of its train.csv.
CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
)  # fmt: skip


_HASH = r"^[0-9a-f]{16}$"
# Days between two studies of a patient, as coarse as they may be told.
DaysSince = Literal["0-1", "2-7", "8-30", "31-180", "181-365", "over 365"]


def _is_empty(value: Any) -> bool:
    return value is None or value == ()


def optional(default: Any, description: str, **constraints: Any) -> Any:
    """Return a field that is written only where it has a value, so that descriptions without one keep their bytes."""
    return Field(default, exclude_if=_is_empty, description=description, **constraints)


class View(BaseModel):
    """One image of the study, in the order of its members `<key>.0.jpg`, `<key>.1.jpg`, ..."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    view: str | None = Field(None, description="projection as the archive names it: PA, AP, L, ...")
    width: int = Field(gt=0, description="pixels, as stored in the shard")
    height: int = Field(gt=0, description="pixels, as stored in the shard")
    source_bits: int = Field(8, gt=0, le=32, description="bits per pixel of the raw image")
    window: tuple[float, float] | None = Field(
        None,
        description="values that become black and white: raw ones behind a JPEG, those stored in a 16-bit member; null "
        "where the raw image was 8-bit already",
    )
    done: tuple[str, ...] = Field(
        (),
        exclude_if=lambda done: not done,
        description="what else was done to the picture: 'window replaced by percentiles', 'padding ignored', "
        "'colours converted from YBR_FULL'",
    )


class Box(BaseModel):
    """A rectangle on one image of the study: x from the left, y from the top, in pixels of the stored picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = Field(min_length=1, max_length=200)
    image: int = Field(ge=0, description="number of the image in `images`")
    x0: float = Field(ge=0, allow_inf_nan=False)
    y0: float = Field(ge=0, allow_inf_nan=False)
    x1: float = Field(allow_inf_nan=False, description="exclusive")
    y1: float = Field(allow_inf_nan=False, description="exclusive")
    source: str | None = optional(None, "who drew it: radiologist, the name of a detector, ...", max_length=200)

    @model_validator(mode="after")
    def _check_area(self) -> Self:
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise ValueError(f"box '{self.label}' has no area: allowed are x0 < x1 and y0 < y1")
        return self


class Report(BaseModel):
    """The report's sections; `other` holds text that belongs to no known section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    findings: str | None = None
    impression: str | None = None
    other: str | None = None
    indication: str | None = optional(None, "why the study was asked for")
    history: str | None = optional(None, "what was known of the patient")
    comparison: str | None = optional(None, "the earlier studies that the radiologist looked at")
    technique: str | None = optional(None, "how the images were made")

    def text(self, sections: tuple[str, ...] = ("findings", "impression", "other")) -> str:
        """Join the requested sections, headed by their names, or bare if there is just `other`."""
        parts: dict[str, str] = {name: value for name in sections if (value := getattr(self, name))}
        if set(parts) == {"other"}:
            return parts["other"]
        return " ".join(f"{name.capitalize()}: {value}" for name, value in parts.items())


class Sample(BaseModel):
    """One study: the content of `<key>.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str = Field(min_length=1, description="the name of the dataset it comes from")
    patient: str = Field(pattern=_HASH, description="salted hash")
    study: str = Field(pattern=_HASH, description="salted hash, unique in its dataset")
    split: Split
    images: tuple[View, ...] = Field(min_length=1)
    report: Report = Report()
    language: str = Field("en", min_length=2)
    labels: dict[str, dict[str, int | None]] = Field(
        default_factory=dict,
        description="by vocabulary ('chexpert' and others), by name: 1 present, 0 absent, -1 uncertain, null unsaid",
    )
    question: str | None = None
    answer: str | None = None
    person: str | None = optional(
        None, "salted hash of the patient in the namespace of the manifest, where it is not `patient`", pattern=_HASH
    )
    boxes: tuple[Box, ...] = optional((), "rectangles on the images")
    study_rank: int | None = optional(None, "its place among the studies of its patient, from 0", ge=0, le=1_000_000)
    prior: str | None = optional(
        None, "key of the study of the same patient before it", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}-[0-9a-f]{16}$"
    )
    days_since_prior: DaysSince | None = optional(None, "days since that study, as a coarse range")

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        for box in self.boxes:
            if box.image >= len(self.images):
                raise ValueError(f"box '{box.label}' is on image {box.image}, but there are {len(self.images)}")
            view = self.images[box.image]
            if box.x1 > view.width or box.y1 > view.height:
                raise ValueError(f"box '{box.label}' reaches beyond its image of {view.width} x {view.height} pixels")
        if self.prior == self.key:
            raise ValueError("prior: a study cannot be its own")
        return self

    @field_validator("labels")
    @classmethod
    def _known(cls, labels: dict[str, dict[str, int | None]]) -> dict[str, dict[str, int | None]]:
        for vocabulary, values in labels.items():
            for name, value in values.items():
                if vocabulary == "chexpert" and name not in CHEXPERT:
                    raise ValueError(f"label '{name}' is none of CheXpert's fourteen")
                if value not in (1, 0, -1, None):
                    raise ValueError(f"label '{name}' is {value}: allowed are 1, 0, -1 and null")
        return labels

    @property
    def key(self) -> str:
        """Return the name of its members in the tar, without a dot: WebDataset readers split names at the first dot."""
        return f"{self.dataset}-{self.study}"


def salted_hash(salt: bytes, *identifiers: str) -> str:
    """Turn raw identifiers into 16 hexadecimal digits that cannot be traced back without the salt.

    HMAC-SHA256 over the identifiers joined by a unit separator, cut to 64 bits: for a million patients the
    chance that any two collide is below 3e-8.
    """
    return hmac.new(salt, "\x1f".join(identifiers).encode(), hashlib.sha256).hexdigest()[:16]
