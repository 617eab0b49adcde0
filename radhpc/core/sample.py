"""Define one study as a shard holds it: `<key>.<n>.jpg` (or png, jxl) for each view and `<key>.json`, described here.

The JSON is all that training may know about a study. Unknown fields are refused, so that a date, a
name or an accession number cannot slip into a shard with a new reader. Patient and study are salted hashes.
"""

import hashlib
import hmac
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Split = Literal["train", "validate", "test"]
SPLITS: tuple[Split, ...] = ("train", "validate", "test")

# The fourteen observations of CheXpert (Irvin et al., 2019), in the order of its train.csv.
CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
)  # fmt: skip


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


class Report(BaseModel):
    """The report's sections; `other` holds text that belongs to no known section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    findings: str | None = None
    impression: str | None = None
    other: str | None = None

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
    patient: str = Field(pattern=r"^[0-9a-f]{16}$", description="salted hash")
    study: str = Field(pattern=r"^[0-9a-f]{16}$", description="salted hash, unique in its dataset")
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
