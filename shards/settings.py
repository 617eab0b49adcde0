"""The settings of a build, and its result."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from radhpc.core.errors import UserError
from shards.images.encoding import ImageFormat
from shards.splits import RATIOS, Ratios


@dataclass(frozen=True)
class BuildSettings:
    """The settings of a build of any dataset. Raises UserError for a value that is not allowed."""

    workers: int | None = None  # processes; None: one for each CPU that this process may use
    longest_side: int = 1120  # pixels: larger images are shrunk to it
    quality: int = 95  # of the JPEGs, 1 to 100
    image_format: ImageFormat = "jpeg"  # or without loss and with 16 bits: png16, jxl16
    ratios: Ratios = RATIOS  # train, validate, test: for patients without an official split
    shard_samples: int = 1000  # samples in a shard at most
    max_skipped: int | str = "1%"  # a count, or a share of all studies, rounded up
    duplicates: Literal["drop", "report"] = "drop"  # of a study with a near-duplicate in another split
    apart_from: tuple[str, ...] = ()  # shards of other datasets whose other splits must not be repeated
    unscrubbed: bool = False  # build texts in languages that the privacy gate has no rules for
    remove_names: Path | None = None  # a file of names to take out of texts, one a line
    force: bool = False  # replace what another build left in the output folder
    work: Path | None = None  # private folder of a build under way; None: see shards/execution/output.py

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers: {self.workers} is too few; allowed are whole numbers from 1")
        if not 16 <= self.longest_side <= 65500:
            raise UserError(f"longest_side: {self.longest_side} pixels; allowed are 16 to 65500")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality: {self.quality}; allowed are 1 to 100")
        if self.shard_samples < 1:
            raise UserError(f"shard_samples: {self.shard_samples} is too few; allowed are whole numbers from 1")
        if len(self.ratios) != 3 or min(self.ratios) < 0 or not math.isclose(sum(self.ratios), 1, abs_tol=1e-6):
            raise UserError(f"ratios: {self.ratios} for train, validate and test must add up to 1")
        self.skip_budget(100)

    def skip_budget(self, studies: int) -> int:
        """Return how many of `studies` may be left out."""
        text = str(self.max_skipped).strip()
        if re.fullmatch(r"\d+", text):
            return int(text)
        if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
            return min(studies, math.ceil(studies * float(share[1]) / 100))
        raise UserError(f"max_skipped: '{self.max_skipped}'; allowed are a count such as 20 or a share such as 1%")

    @property
    def processes(self) -> int:
        """The number of worker processes to start."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class BuildResult:
    """The outcome of a build."""

    url: str
    samples: int
    shards: int
    manifest_hash: str
    seconds: float
    splits: dict[str, int] = field(default_factory=dict)  # samples
    patients: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)  # {name, reason}; names stay out of the output
    skipped_file: Path | None = None  # all of them, in the user's own folder
    scrubbed: dict[str, int] = field(default_factory=dict)  # words taken out of texts, by rule
    warnings: list[str] = field(default_factory=list)
    reused: bool = False  # the folder held this very build already, nothing was done
