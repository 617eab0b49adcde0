"""The shards of a build: split after split, none built twice, and what was left out of them."""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from radhpc.core.errors import UserError
from radhpc.core.sample import SPLITS, Split
from shards import duplicates
from shards.execution.assembly import fingerprints_of
from shards.execution.pool import Run, here
from shards.execution.worker import Task, finished, others_path, read_record, record_path
from shards.listing import Listing, Skip
from shards.settings import Settings
from shards.source import check_budget

Progress = Callable[[int, int], None]  # (studies done, studies in all)


def build_shards(
    tasks: list[Task],
    listing: Listing,
    settings: Settings,
    progress: Progress,
    run: Run | None,
    apart: list[duplicates.Images] | None,
) -> list[Skip]:
    """Build what no earlier run has finished, and return what was left out, in the order of the rows.

    One split after the other, each apart from those before and from `apart`; all at once where that is None.
    """
    done = [task for task in tasks if finished(task)]
    skipped = {task.plan.name: _skipped(task, listing) for task in done}
    total, ready = (sum(task.plan.samples for task in some) for some in (tasks, done))
    known = list(listing.skipped())
    progress(ready, total)
    todo = [task for task in tasks if task.plan.name not in skipped]
    phases: list[tuple[Split, ...]] = [SPLITS] if apart is None else [(split,) for split in duplicates.ORDER]
    try:
        check_budget([*known, *_flat(skipped.values())], listing.studies, settings)
        with here(min(settings.processes, len(todo))) if run is None else contextlib.nullcontext(run) as work_off:
            for splits in phases:
                phase = [task for task in todo if task.plan.split in splits]
                if phase and apart is not None:
                    _save_others(tasks, splits[0], apart)
                with contextlib.closing(work_off(phase, partial(_tell, progress, ready, total))) as running:
                    for task in running:
                        skipped[task.plan.name] = _skipped(task, listing)
                        check_budget([*known, *_flat(skipped.values())], listing.studies, settings)
                ready += sum(task.plan.samples for task in phase)
    except UserError:
        for task in tasks:
            if skipped.get(task.plan.name):  # to be tried again: the user may mend the files
                record_path(task).unlink(missing_ok=True)
        raise
    return [*known, *_flat(skipped[task.plan.name] for task in tasks)]


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _save_others(tasks: list[Task], split: Split, apart: list[duplicates.Images]) -> None:
    """Write what `split` must not repeat: the splits built before it, and the other splits of other datasets."""
    parts = [images.of(set(SPLITS) - {split}) for images in apart]
    for task in tasks:
        if duplicates.ORDER.index(task.plan.split) < duplicates.ORDER.index(split):
            record = read_record(task)
            assert record is not None, "a split is built before the one that it must be apart from"
            images = [row.key for row in record.rows for _ in row.members[1:]]
            place = np.full(len(images), SPLITS.index(task.plan.split), np.uint8)
            parts.append(duplicates.Images(fingerprints_of(record), place, np.array(images, "S")))
    duplicates.save(others_path(tasks[0].job.work, split), duplicates.join(parts))


def _skipped(task: Task, listing: Listing) -> list[Skip]:
    record = read_record(task)
    assert record is not None
    return [
        Skip(listing.name(study), study, reason, detail, fault=reason != duplicates.REASON)
        for study, reason, detail in record.skipped
    ]


def _flat(parts: Iterable[list[Skip]]) -> list[Skip]:
    return [skip for part in parts for skip in part]
