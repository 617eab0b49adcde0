"""A reader's studies -> the rows of the build: hashed identifiers, a split each, in the order of the shards.

Rows are ordered by split, then by key; keys are salted hashes, so patients and classes spread over the
shards. A shard is the next `shard_samples` rows of one split. All of it is a pure function of the studies, the
salt and the settings.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radhpc.sample import SPLITS, Split, salted_hash
from shards import splits
from shards.datasets import RawStudy


@dataclass(frozen=True)
class Row:
    """One study on its way into a shard."""

    raw: RawStudy
    study: str  # salted hash
    patient: str  # salted hash
    split: Split
    key: str  # of its members in the tar


@dataclass(frozen=True)
class Plan:
    """One shard to be: its file name and its rows."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Skip:
    """A study that is left out: what the user calls it, a general reason, and particulars for the user alone."""

    name: str
    reason: str
    detail: str = ""

    def shown(self) -> dict[str, str]:
        return {"name": self.name, "reason": f"{self.reason}: {self.detail}" if self.detail else self.reason}


@dataclass(frozen=True)
class Listing:
    """All studies of a dataset, sorted into shards."""

    plans: tuple[Plan, ...]
    skipped: tuple[Skip, ...]
    filled: tuple[Split, ...]  # splits that would have been empty
    studies: int  # read, those left out included
    digest: str  # of everything the reader yielded, keyed by the salt


def list_studies(
    studies: Iterable[RawStudy], name: str, salt: bytes, ratios: splits.Ratios, shard_samples: int, folder: Path | None
) -> Listing:
    """Hash, split and sort the studies of the dataset `name`. Raises UserError where a patient has two splits.

    `folder` is the raw archive's: the digest holds paths relative to it, so that an archive may be moved.
    """
    digest = hmac.new(salt, digestmod=hashlib.sha256)
    kept: list[tuple[RawStudy, str, str]] = []
    seen: set[str] = set()
    skipped: list[Skip] = []
    count = 0
    for raw in studies:
        count += 1
        digest.update(_canonical(raw, folder))
        study = salted_hash(salt, name, "study", raw.study)
        if raw.fault:
            skipped.append(Skip(raw.name, raw.fault))
        elif study in seen:
            skipped.append(Skip(raw.name, "duplicate key"))
        else:
            seen.add(study)
            kept.append((raw, study, salted_hash(salt, name, "patient", raw.patient)))
    assignment = splits.assign(((patient, raw.split, raw.name) for raw, _, patient in kept), ratios)
    rows = [Row(raw, study, patient, assignment.of[patient], f"{name}-{study}") for raw, study, patient in kept]
    rows.sort(key=lambda row: (SPLITS.index(row.split), row.key))
    plans = []
    for split in SPLITS:
        own = [row for row in rows if row.split == split]
        for number, start in enumerate(range(0, len(own), shard_samples)):
            plans.append(Plan(f"{split}-{number:06d}.tar", tuple(own[start : start + shard_samples])))
    return Listing(tuple(plans), tuple(skipped), assignment.filled, count, digest.hexdigest())


def _canonical(raw: RawStudy, folder: Path | None) -> bytes:
    """The same bytes for the same study, on every machine."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value.relative_to(folder)) if folder and value.is_relative_to(folder) else str(value)
        text = repr(value)
        if re.search(r" at 0x[0-9a-f]+>", text):
            raise TypeError(f"{type(value).__name__} needs a repr that says what it draws")
        return text

    views = [(plain(source), view) for source, view in raw.views]
    fields = {name: value for name, value in vars(raw).items() if name not in ("views", "report", "name")}
    return json.dumps([fields, views, raw.report.model_dump()], sort_keys=True).encode()
