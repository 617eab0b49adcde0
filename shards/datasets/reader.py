"""What a reader is: a raw archive -> RawStudy by RawStudy.

A reader is a module of this folder with

    OPTIONS: type[Options]                                             its key=value options
    SYNTHETIC: bool                                                    drawn from a seed, nobody's data
    def read(raw: Path | None, options: Options) -> Iterator[RawStudy]

`read` looks at metadata alone, so that a listing takes seconds; images are opened in the build's workers, one
study at a time. That is why a RawStudy must be picklable. It holds no more than a few studies in memory: what must be
sorted or joined lies on the disk (shards/tabular/external_sort.py). shards/datasets/registry.py
lists the readers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radhpc.core.errors import UserError, nearest
from radhpc.core.sample import Report, Split
from shards.images.raw_image import RawImage

PixelSource = Path | Callable[[], RawImage]  # where a view's pixels come from: a file, or a drawing


@dataclass(frozen=True)
class RawStudy:
    """One study as the archive has it, before its images are opened and its identifiers are hashed."""

    study: str  # raw identifier, unique in the dataset
    patient: str  # raw identifier
    views: tuple[tuple[PixelSource, str | None], ...]  # (pixels, projection: PA, AP, L, ... or None)
    name: str  # what to call it where it is left out: a file or a row, shown to the user only
    split: Split | None = None  # the official one, None: by the hash of the patient
    report: Report = Report()
    language: str = "en"
    labels: dict[str, dict[str, int | None]] = field(default_factory=dict)
    question: str | None = None
    answer: str | None = None
    attribution: str | None = None  # whom its licence asks to name; goes to attribution.jsonl beside the shards
    fault: str | None = None  # what is broken, where the metadata alone say so: counts against the budget
    gap: str | None = None  # what the archive itself has not, or disowns: left out by name, no fault of this copy


class UnusableRecord(ValueError):
    """A record, row or study cannot be used; the message is a general phrase without particulars of the patient."""


class DatasetWarning(UserWarning):
    """A message from a reader to its user; the build returns it with the result."""


def unusable_study(name: str, fault: UnusableRecord | str) -> RawStudy:
    """Return the study that takes the place of a record that cannot be used: left out by name and counted as broken."""
    return RawStudy(study="", patient="", views=(), name=name, fault=str(fault))


class ReaderOptions(BaseModel):
    """The options that every reader has; each adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$",
        description="what to call the dataset in keys and tables, instead of the reader's name",
    )

    @property
    def shares_images(self) -> bool:
        """Whether the official split puts the same image into several splits, as some VQA sets' do.

        Then near-duplicates across splits are reported; elsewhere those outside the test set are left out.
        """
        return False


class DatasetReader(Protocol):
    """What a module of this folder must have."""

    OPTIONS: type[ReaderOptions]
    SYNTHETIC: bool

    def read(self, raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]: ...


def parse_options(dataset: str, kind: type[ReaderOptions], values: Mapping[str, str]) -> ReaderOptions:
    """Turn key=value texts into a reader's options. Raises UserError that names the key and what is allowed."""
    allowed = kind.model_fields
    for key in values:
        if key not in allowed:
            raise UserError(
                f"{dataset}: option '{key}' is unknown{nearest(key, allowed)}; allowed are {', '.join(allowed)}"
            )
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        what = error.errors()[0]
        key = str(what["loc"][0]) if what["loc"] else "options"
        given = f"{key}={values[key]}" if key in values else key
        raise UserError(f"{dataset}: option {given}: {what['msg']} ({allowed[key].description})") from error
