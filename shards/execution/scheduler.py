"""Schedules the shards of a build: split after split, none built twice; collects the studies that were left out."""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Self

import numpy as np

from radhpc.core.errors import UserError
from radhpc.core.people import DatasetPatients
from radhpc.core.sample import SPLITS, Split
from shards import duplicates, people
from shards.execution.assembly import fingerprints_of
from shards.execution.pool import TaskRunner, local_pool
from shards.execution.worker import (
    ShardTask,
    excluded_path,
    excluded_patients_path,
    is_finished,
    read_record,
    record_path,
)
from shards.listing import Listing, SkippedStudy
from shards.settings import BuildSettings
from shards.source import check_budget

BuildProgress = Callable[[int, int], None]  # (studies done, studies in all)


class ApartDatasets(NamedTuple):
    """The other datasets whose images and patients must not be in another split here."""

    images: list[duplicates.ImageHashes]
    patients: list[DatasetPatients]

    @classmethod
    def load(cls, urls: Iterable[str]) -> Self:
        """Load finished shards. Raises UserError."""
        urls = tuple(urls)
        return cls([duplicates.load(url) for url in urls], [people.load(url) for url in urls])


def build_shards(
    tasks: list[ShardTask],
    listing: Listing,
    settings: BuildSettings,
    progress: BuildProgress,
    run: TaskRunner | None,
    apart: ApartDatasets | None,
) -> list[SkippedStudy]:
    """Build the shards that no earlier run has finished, and return the studies left out, in the order of the rows.

    The splits are built one after the other, each without near-duplicates of those before and of `apart`, and without
    patients of other splits of `apart`; all at once where that is None.
    """
    done = _finished(tasks, apart is not None)
    skipped = {task.plan.name: _skipped_of(task, listing) for task in done}
    total, ready = (sum(task.plan.samples for task in some) for some in (tasks, done))
    known = list(listing.skipped())
    progress(ready, total)
    unfinished = [task for task in tasks if task.plan.name not in skipped]
    phases: list[tuple[Split, ...]] = [SPLITS] if apart is None else [(split,) for split in duplicates.BUILD_ORDER]
    try:
        check_budget([*known, *_flatten(skipped.values())], listing.studies, settings)
        with (
            local_pool(min(settings.processes, len(unfinished)))
            if run is None
            else contextlib.nullcontext(run) as runner
        ):
            for splits in phases:
                phase = [task for task in unfinished if task.plan.split in splits]
                if phase and apart is not None:
                    _save_excluded(tasks, splits[0], apart)
                with contextlib.closing(runner(phase, partial(_report_progress, progress, ready, total))) as running:
                    for task in running:
                        skipped[task.plan.name] = _skipped_of(task, listing)
                        check_budget([*known, *_flatten(skipped.values())], listing.studies, settings)
                ready += sum(task.plan.samples for task in phase)
    except UserError:
        for task in tasks:
            if skipped.get(task.plan.name):  # these are built again: the user may repair the files
                record_path(task).unlink(missing_ok=True)
        raise
    return [*known, *_flatten(skipped[task.plan.name] for task in tasks)]


def _finished(tasks: list[ShardTask], ordered: bool) -> list[ShardTask]:
    """Return the tasks that an earlier run has finished.

    Splits that are built in order depend on those before: where one of these has a shard to build again, such as one
    whose images were repaired, the shards of later splits do not count.
    """
    if not ordered:
        return [task for task in tasks if is_finished(task)]
    done: list[ShardTask] = []
    for split in duplicates.BUILD_ORDER:
        own = [task for task in tasks if task.plan.split == split]
        finished = [task for task in own if is_finished(task)]
        done += finished
        if len(finished) < len(own):
            for task in tasks:
                if duplicates.BUILD_ORDER.index(task.plan.split) > duplicates.BUILD_ORDER.index(split):
                    record_path(task).unlink(missing_ok=True)
            break
    return done


def _report_progress(progress: BuildProgress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _save_excluded(tasks: list[ShardTask], split: Split, apart: ApartDatasets) -> None:
    """Write what `split` must not repeat: images of earlier splits; images and patients of other datasets' splits."""
    people.save_excluded(excluded_patients_path(tasks[0].context.work, split), split, apart.patients)
    parts = [images.of(set(SPLITS) - {split}) for images in apart.images]
    for task in tasks:
        if duplicates.BUILD_ORDER.index(task.plan.split) < duplicates.BUILD_ORDER.index(split):
            record = read_record(task)
            assert record is not None, "a split is built after those that it must not repeat"
            images = [row.key for row in record.rows for _ in row.members[1:]]
            number = np.full(len(images), SPLITS.index(task.plan.split), np.uint8)
            parts.append(duplicates.ImageHashes(fingerprints_of(record), number, np.array(images, "S")))
    duplicates.save(excluded_path(tasks[0].context.work, split), duplicates.join(parts))


def _skipped_of(task: ShardTask, listing: Listing) -> list[SkippedStudy]:
    record = read_record(task)
    assert record is not None
    return [
        SkippedStudy(listing.name(study), study, reason, detail, fault=reason not in (duplicates.REASON, people.REASON))
        for study, reason, detail in record.skipped
    ]


def _flatten(parts: Iterable[list[SkippedStudy]]) -> list[SkippedStudy]:
    return [skip for part in parts for skip in part]
