"""Describes a dataset reader: a raw archive in, its studies as RawStudy out, one at a time.

A reader is a module with

    OPTIONS: type[ReaderOptions]                                       its key=value options
    SYNTHETIC: bool                                                    drawn from a seed, nobody's data
    def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]

`read` opens metadata alone, so that a listing takes seconds; images are opened in the build's workers, one study at a
time, hence a RawStudy must be picklable. It keeps at most a few studies in memory: what must be sorted or joined lies
on the disk (shards/tabular/external_sort.py). shards/datasets/registry.py lists the readers; those of other packages
are announced by an entry point `radhpc.datasets`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radhpc.core.errors import UserError, nearest
from radhpc.core.sample import Report, Split
from shards.images.raw_image import RawImage
from shards.tabular.faults import DatasetWarning as DatasetWarning, UnusableRecord as UnusableRecord

PixelSource = Path | Callable[[], RawImage]  # where a view's pixels come from: a file, or a drawing


@dataclass(frozen=True)
class RawStudy:
    """One study of the archive, before its images are opened and its identifiers are hashed.

    The names of the fields are part of the identity of a build (shards/listing.py).
    """

    study: str  # raw identifier, unique in the dataset
    patient: str  # raw identifier
    views: tuple[tuple[PixelSource, str | None], ...]  # (pixels, projection: PA, AP, L, ... or None)
    name: str  # for messages where it is left out: a file or a row, shown to the user only
    split: Split | None = None  # the official one, None: by the hash of the patient
    report: Report = Report()
    language: str = "en"
    labels: dict[str, dict[str, int | None]] = field(default_factory=dict)
    question: str | None = None
    answer: str | None = None
    attribution: str | None = None  # authors that its licence asks to name: for attribution.jsonl beside the shards
    fault: str | None = None  # what is broken, if the metadata show it: counts against the budget
    gap: str | None = None  # what the archive itself lacks or excludes: left out by name, but not broken


def unusable_study(name: str, fault: UnusableRecord | str) -> RawStudy:
    """Return the study that takes the place of a record that cannot be used: left out by name and counted as broken."""
    return RawStudy(study="", patient="", views=(), name=name, fault=str(fault))


class ReaderOptions(BaseModel):
    """The options of every reader; each adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$",
        description="what to call the dataset in keys and tables, instead of the reader's name",
    )
    people: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$",
        description="whose patients these are, such as mimic for a table made from MIMIC-CXR, so that patients of "
        "several datasets are compared; default: the archive's family, or the dataset's name",
    )
    outside: Literal["allow"] | None = Field(
        None,
        description="allow: also read files outside of --raw, where its tables or links lead to them",
    )

    @property
    def shares_images(self) -> bool:
        """Return whether the official split puts the same image into several splits, as those of some VQA sets do.

        Then near-duplicates across splits are reported; otherwise those outside the test set are left out.
        """
        return False


class DatasetReader(Protocol):
    """The interface of a reader's module."""

    OPTIONS: type[ReaderOptions]
    SYNTHETIC: bool

    def read(self, raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]: ...


def parse_options(dataset: str, schema: type[ReaderOptions], values: Mapping[str, str]) -> ReaderOptions:
    """Parse key=value texts into a reader's options. Raises UserError that names the key and what is allowed."""
    allowed = schema.model_fields
    for key in values:
        if key not in allowed:
            raise UserError(
                f"{dataset}: option '{key}' is unknown{nearest(key, allowed)}; allowed are {', '.join(allowed)}"
            )
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "options"
        option = f"{key}={values[key]}" if key in values else key
        raise UserError(f"{dataset}: option {option}: {first['msg']} ({allowed[key].description})") from error
