"""Builds one shard in one process: a plan in, a shard and the record that it is finished out.

The rows come from the listing in the work folder. The record goes there too, and stays until the build ends; a build
that goes on after an interruption takes the shards with a record of its own hash as they are. Records name studies by
their salted hashes, never by raw names.
"""

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from radhpc.core.manifest import Shard
from radhpc.core.sample import Sample, Split
from radhpc.storage.store import Store, write_atomically
from shards import raw_files
from shards.checksums import FileChecks
from shards.duplicates import REASON, ExcludedImages
from shards.execution.writer import SampleRow, write_shard
from shards.images.decoding import load
from shards.images.encoding import EncodingSettings, encode
from shards.images.raw_image import BadImage
from shards.images.text_in_pixels import Box
from shards.listing import Listing, ShardPlan, StudyRow
from shards.people import REASON as PATIENT_REASON, ExcludedPatients
from shards.raw_files import Archive
from shards.reports.contact_sheet import Suspect
from shards.summary import Summary
from shards.text import deidentification

# DICOM modalities that are taken: computed, digital and dental radiography, mammography, fluoroscopy and angiography,
# captures of a screen, others, and none.
RADIOGRAPHS = (None, "CR", "DX", "DR", "RG", "MG", "IO", "PX", "RF", "XA", "SC", "OT")
LISTING = "listing.sqlite"  # in the work folder


class ShardRecord(BaseModel):
    """The record of a finished shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    build_hash: str
    files: str  # of its plan: the images that it was built from
    shard: Shard | None  # None where every study was left out
    rows: tuple[SampleRow, ...]
    patients: tuple[str, ...]  # of the rows
    people: tuple[str, ...]  # of the rows: patients in their namespace
    fingerprints: tuple[str, ...]  # of all images, in the order of the rows, hexadecimal
    attributions: tuple[tuple[str, str], ...]  # key, the authors that its licence asks to name
    skipped: tuple[tuple[str, str, str], ...]  # study, reason, detail
    suspects: tuple[Suspect, ...] = ()  # images that text may be written into
    checked: int = 0  # image files that have the checksum of the archive's own table
    unchecked: int = 0  # those that the table does not name
    summary: Summary


@dataclass(frozen=True)
class BuildContext:
    """The settings that all shards of a build share."""

    url: str  # where the shards go
    work: Path  # the build's private folder: listing, records
    build_hash: str  # of the recipe without the state of the files, of which each plan has its own
    images: EncodingSettings
    archive: Archive = Archive()  # of the raw files


@dataclass(frozen=True)
class ShardTask:
    """One shard to build."""

    plan: ShardPlan
    context: BuildContext
    studies: frozenset[str] | None = None  # of a shard that is rebuilt: those that are in it; None: all of the plan


class IdentifierError(Exception):
    """An identifier of a person is where it cannot be scrubbed, in the name of a label for instance."""


class BuildStopped(Exception):
    """The build is ending; the unfinished shard was dropped."""


def excluded_path(work: Path, split: Split) -> Path:
    """Return the file of images that a split must not repeat (shards/duplicates.py)."""
    return work / f"others-{split}.npz"


def excluded_patients_path(work: Path, split: Split) -> Path:
    """Return the file of patients that a split must not hold (shards/people.py)."""
    return work / f"patients-{split}.npz"


def record_path(task: ShardTask) -> Path:
    """Return the file of a shard's record."""
    return task.context.work / f"{task.plan.name}.json"


def read_record(task: ShardTask) -> ShardRecord | None:
    """Return the record of a shard that this build or an earlier run of it has finished, or None."""
    try:
        record = ShardRecord.model_validate_json(record_path(task).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    same = (record.build_hash, record.files) == (task.context.build_hash, task.plan.files)
    return record if same else None


def is_finished(task: ShardTask) -> bool:
    """Return whether a shard is finished: it has a record, and is stored in full size."""
    record = read_record(task)
    if record is None or record.shard is None:
        return record is not None
    try:
        return Store(task.context.url).size(record.shard.name) == record.shard.size
    except FileNotFoundError:
        return False


def build_shard(task: ShardTask, tick: Callable[[], None]) -> ShardRecord:
    """Build one shard. `tick` is called after each study, and may raise to end it. Raises OSError."""
    patients: list[str] = []
    people: list[str] = []
    summary = Summary()
    attributions: list[tuple[str, str]] = []
    fingerprints: list[str] = []
    excluded = ExcludedImages(excluded_path(task.context.work, task.plan.split))
    elsewhere = ExcludedPatients(excluded_patients_path(task.context.work, task.plan.split))
    skipped: list[tuple[str, str, str]] = []
    suspects: list[Suspect] = []

    def samples(listing: Listing, rules: deidentification.RuleSet) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
        for row in listing.rows(task.plan):
            if task.studies is not None and row.study not in task.studies:
                continue
            if elsewhere.holds(row.person, row.patient):
                skipped.append((row.study, PATIENT_REASON, ""))
                tick()
                continue
            try:
                encoded = encode_study(row, listing.dataset, task.context.images, rules, checks)
            except BadImage as error:
                skipped.append((row.study, error.reason, error.detail))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"]))
                skipped.append((row.study, "description refused", f"{field}: {first['msg']}"))
            except IdentifierError as error:
                skipped.append((row.study, "identifier refused", str(error)))
            else:
                if twin := excluded.find(encoded.fingerprints):
                    skipped.append((row.study, REASON, twin))
                else:
                    patients.append(row.patient)
                    people.append(row.person)
                    summary.count(encoded.sample, encoded.scrubbed)
                    if row.raw.attribution:
                        attributions.append((row.key, row.raw.attribution))
                    fingerprints.extend(value.hex() for value in encoded.fingerprints)
                    suspects.extend(Suspect(row.key, n, boxes) for n, boxes in enumerate(encoded.text) if boxes)
                    yield row.key, encoded.members
            tick()

    store = Store(task.context.url)
    folder = store.folder or task.context.work  # a shard for an object store is written here first
    with raw_files.inside(task.context.archive), Listing(task.context.work / LISTING) as listing:
        checks = listing.file_checks()
        shard, rows = write_shard(folder / task.plan.name, samples(listing, deidentification.with_names(listing.names)))
    if store.folder is None and shard:
        store.upload(folder / shard.name, shard.name)
        (folder / shard.name).unlink()
    record = ShardRecord(
        build_hash=task.context.build_hash,
        files=task.plan.files,
        shard=shard,
        rows=tuple(rows),
        patients=tuple(patients),
        people=tuple(people),
        fingerprints=tuple(fingerprints),
        attributions=tuple(attributions),
        skipped=tuple(skipped),
        suspects=tuple(suspects),
        checked=checks.checked if checks else 0,
        unchecked=checks.unchecked if checks else 0,
        summary=summary,
    )
    write_atomically(record_path(task), record.model_dump_json().encode(), mode=0o600)
    return record


class StudyMembers(NamedTuple):
    """A study as it goes into a shard."""

    sample: Sample
    members: list[tuple[str, bytes]]  # its description, then its images: (suffix, data)
    fingerprints: list[bytes]
    text: list[tuple[Box, ...]]  # for each image, where text may be written into it
    scrubbed: Mapping[str, int]  # applications of each rule of the privacy gate


def encode_study(
    row: StudyRow,
    dataset: str,
    settings: EncodingSettings,
    rules: deidentification.RuleSet = deidentification.STANDARD,
    checks: FileChecks | None = None,
) -> StudyMembers:
    """Read the images of a study and write its description. Raises BadImage, ValidationError, IdentifierError."""
    images = []
    for source, projection in row.raw.views:
        raw = load(source, checks.check if checks else None) if isinstance(source, Path) else source()
        if raw.modality not in RADIOGRAPHS:
            raise BadImage(str(source), "DICOM that is no radiograph", f"modality {raw.modality}")
        images.append(encode(raw, settings, projection))
    report, scrubbed = deidentification.scrub_report(row.raw.report, rules)
    question, answer = (_scrub_text(text, scrubbed, rules) for text in (row.raw.question, row.raw.answer))
    if answer is not None and not answer.replace(deidentification.MARK, "").strip(" .,;"):
        raise IdentifierError("answer: nothing else in it")
    sample = Sample(
        dataset=dataset,
        patient=row.patient,
        person=None if row.person == row.patient else row.person,
        study=row.study,
        split=row.split,
        images=tuple(image.view for image in images),
        report=report,
        language=row.raw.language,
        labels=row.raw.labels,
        question=question,
        answer=answer,
    )
    assert sample.key == row.key
    if findings := deidentification.remaining_identifiers(sample):
        raise IdentifierError(findings[0])
    members = [("json", sample.model_dump_json().encode())]
    members += [(f"{n}.{image.suffix}", image.data) for n, image in enumerate(images)]
    fingerprints, text = [image.fingerprint for image in images], [image.text for image in images]
    return StudyMembers(sample, members, fingerprints, text, scrubbed)


def _scrub_text(text: str | None, counts: Counter[str], rules: deidentification.RuleSet) -> str | None:
    if text is None:
        return None
    clean, applied = deidentification.scrub(text, rules)
    counts.update(applied)
    return clean


# Shared by a worker process with the build: the number of studies done, and the request to stop.
_counter: "Synchronized[int] | None" = None
_stop: Event | None = None


def initialize_worker(counter: "Synchronized[int]", stop: Event) -> None:
    """Initialize a worker process: take the shared state, ignore the scheduler's signals, exit with the build."""
    global _counter, _stop
    _counter, _stop = counter, stop
    for number in (signal.SIGTERM, signal.SIGUSR2):  # schedulers send them to all processes; the build decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit with the build: the workers of a pool would wait forever after the build was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_task(task: ShardTask) -> bool:
    """Build one shard in a worker process. Returns False if the build is ending."""
    assert _counter is not None
    assert _stop is not None
    counter, stop = _counter, _stop

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1
        if stop.is_set():
            raise BuildStopped

    with contextlib.suppress(BuildStopped):
        build_shard(task, tick)
        return True
    return False
