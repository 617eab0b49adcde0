"""Counts for a dataset's card, sample by sample: a few kilobytes, however many samples there are.

    summary = Summary()
    summary.count(sample, {"date": 2})       # in place, in the worker, one summary a shard
    total = summary + another                # shards add up to the dataset, in any order

All counts are integers by name, so sums are exact. Only counts of a sample are kept: no text, no key.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from radhpc.core.sample import SPLITS, Sample

LONGEST = 1000  # words: longer texts are counted as this long
SIDE = 256  # pixels: images are counted by their longest side, in steps of it
TEXTS = ("findings", "impression", "other", "question", "answer")
VALUES = ("1", "0", "-1", "null")  # of a label: present, absent, uncertain, not mentioned
UNNAMED = "unnamed"  # a projection that is not in the archive

Counts = dict[str, int]
Key = TypeVar("Key", str, int)


class SplitSummary(BaseModel):
    """The counts of one split."""

    model_config = ConfigDict(extra="forbid")

    samples: int = 0
    images: int = 0
    without_report: int = Field(default=0, description="samples whose report has no text")
    labels: dict[str, dict[str, Counts]] = Field(
        default_factory=dict, description="by vocabulary and name: how many are '1', '0', '-1' and 'null'"
    )
    views: Counts = Field(default_factory=dict, description="images by projection")
    images_per_study: dict[int, int] = Field(default_factory=dict, description="samples by their number of images")
    languages: Counts = Field(default_factory=dict, description="samples by language")
    words: dict[str, dict[int, int]] = Field(
        default_factory=dict, description="by text (findings, ...): how many are so many words long, empty ones not"
    )
    bits: dict[int, int] = Field(default_factory=dict, description="images by bits per pixel before the build")
    sides: dict[int, int] = Field(default_factory=dict, description="images by longest side, rounded up to 256 pixels")


def _empty_splits() -> dict[str, SplitSummary]:
    return {split: SplitSummary() for split in SPLITS}


class Summary(BaseModel):
    """The counts of all splits, and how often each rule of the privacy gate was applied."""

    model_config = ConfigDict(extra="forbid")

    splits: dict[str, SplitSummary] = Field(default_factory=_empty_splits)
    scrubbed: Counts = Field(default_factory=dict, description="by rule: how many words were replaced by ___")
    scrubbed_samples: int = Field(default=0, description="samples with anything replaced")

    @classmethod
    def of(cls, sample: Sample, scrubbed: Mapping[str, int]) -> "Summary":
        """Return the summary of one sample; `scrubbed` counts how often each rule was applied to it."""
        summary = cls()
        summary.count(sample, scrubbed)
        return summary

    def count(self, sample: Sample, scrubbed: Mapping[str, int]) -> None:
        """Add one sample in place."""
        part = self.splits[sample.split]
        part.samples += 1
        part.images += len(sample.images)
        _increment(part.images_per_study, len(sample.images))
        _increment(part.languages, sample.language)
        for image in sample.images:
            _increment(part.views, image.view or UNNAMED)
            _increment(part.bits, image.source_bits)
            _increment(part.sides, -(-max(image.width, image.height) // SIDE) * SIDE)
        for vocabulary, values in sample.labels.items():
            names = part.labels.setdefault(vocabulary, {})
            for name, value in values.items():
                counts = names.get(name)
                if counts is None:
                    counts = names[name] = dict.fromkeys(VALUES, 0)
                counts["null" if value is None else str(value)] += 1
        report = sample.report
        texts = (report.findings, report.impression, report.other, sample.question, sample.answer)
        if not any(texts[:3]):
            part.without_report += 1
        for name, text in zip(TEXTS, texts, strict=True):
            if text:
                _increment(part.words.setdefault(name, {}), min(len(text.split()), LONGEST))
        if scrubbed:
            self.scrubbed_samples += 1
            for rule, times in scrubbed.items():
                _increment(self.scrubbed, rule, times)

    def add(self, other: "Summary") -> None:
        """Add another summary in place."""
        _add(self.__dict__, other.__dict__)

    def __add__(self, other: "Summary") -> "Summary":
        total = self.model_copy(deep=True)
        total.add(other)
        return total

    @property
    def total(self) -> SplitSummary:
        """The counts over all splits."""
        total = SplitSummary()
        for part in self.splits.values():
            _add(total.__dict__, part.__dict__)
        return total


def percentile(counts: Mapping[int, int], share: float) -> int:
    """Return the smallest value that `share` (0 to 1) of all values do not exceed. Raises ValueError for none."""
    total = sum(counts.values())
    if not total:
        raise ValueError("no values")
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= share * total:
            return value
    return max(counts)


def _increment(counts: dict[Key, int], name: Key, times: int = 1) -> None:
    counts[name] = counts.get(name, 0) + times


def _add(into: dict[Any, Any], other: Mapping[Any, Any]) -> None:
    """Add the counts of the same names, recursively."""
    for name, value in other.items():
        if isinstance(value, BaseModel):
            _add(into[name].__dict__, value.__dict__)
        elif isinstance(value, dict):
            _add(into.setdefault(name, {}), value)
        else:
            into[name] = into.get(name, 0) + value
