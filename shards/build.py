"""Builds a dataset: list the studies, build the shards in worker processes, prove the whole, write the manifest.

    result = build("phantom", None, "runs/phantom", {"studies": "200"}, Settings(), lambda done, total: None)

The same input gives the same bytes, whatever the number of workers and whatever was interrupted. The manifest
is written last: a folder without one is an unfinished build, and the same command goes on with it.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from radhpc.errors import UserError
from radhpc.manifest import INDEX, MANIFEST, Index, Manifest
from radhpc.sample import SPLITS, Split
from radhpc.store import Store
from shards import datasets, duplicates, salt
from shards.card import CARD, SHEET, card, contact_sheet, pictures
from shards.indexing import assemble, fingerprints_of
from shards.listing import Listing, Skip, write_listing
from shards.output import Output
from shards.pixels import PERCENTILES, Target
from shards.pool import run_here, run_pool
from shards.settings import Result, Settings
from shards.summary import Summary
from shards.worker import LISTING, Job, Task, finished, others_path, read_record, record_path

__all__ = ["Result", "Settings", "build"]

FORMAT = 1  # of the shards' contents: raise it when the same input gives other bytes
VERSIONED = ("numpy", "pillow", "pydicom", "imagecodecs")  # their versions may change the bytes
SHOWN = 3  # names in a message
DEFAULTS = Settings()

Progress = Callable[[int, int], None]  # (studies done, studies in all)
# How tasks are worked off: (tasks, what to call with the studies done) -> the tasks, as they are finished.
Run = Callable[[Sequence[Task], Callable[[int], None]], Generator[Task]]


def build(
    dataset: str,
    raw: Path | None,
    out: str,
    options: Mapping[str, str] | None = None,
    settings: Settings = DEFAULTS,
    progress: Progress = lambda done, total: None,
    run: Run | None = None,
) -> Result:
    """Build the shards of a raw archive. Raises UserError, and nothing half-written has a final name.

    `dataset` names the reader, `raw` the archive, `options` the reader's key=value options, `out` a folder or a URL;
    `run` works the shards off somewhere else than in processes on this machine.
    """
    started = time.monotonic()
    reader = datasets.reader(dataset)
    chosen = datasets.parse_options(dataset, reader.OPTIONS, options or {})
    secret = salt.load(reader.SYNTHETIC)
    output = Output(out, settings.work)
    drop = settings.duplicates == "drop" and not chosen.shares_images
    with output.hold():
        fresh = output.work / f"{LISTING}.new"
        told = _list(fresh, reader, raw, chosen, chosen.name or dataset, secret, settings)
        with Listing(fresh) as listing:
            recipe = _recipe(dataset, chosen, settings, secret, listing)
            build_hash = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
            manifest = output.earlier(recipe, build_hash, settings.force)
            reused, skipped = manifest is not None, list[Skip]()
            if manifest is None:
                _place_listing(output.work, listing.digest)
                target = Target(settings.longest_side, settings.quality, settings.image_format)
                job = Job(output.url, output.work, build_hash, target)
                tasks = [Task(plan, job) for plan in listing.plans]
                apart = [duplicates.load(url) for url in settings.apart_from] if drop else None
                skipped = _build_shards(tasks, listing, settings, progress, run, apart)
                records = ((task.plan.split, done) for task in tasks if (done := read_record(task)))
                reasons = Counter(skip.reason for skip in skipped)
                manifest, files = assemble(listing.dataset, records, recipe, build_hash, reasons)
                summary = sum((done.summary for task in tasks if (done := read_record(task))), Summary())
                files[CARD] = card(manifest, summary, [skip.told() for skip in skipped], told).encode()
                files[SHEET] = contact_sheet(pictures(output.store, manifest, Index.from_bytes(files[INDEX])))
                for name, data in files.items():
                    output.store.write(name, data)
                output.store.write(MANIFEST, manifest.to_bytes())
                output.clean(manifest)
            else:
                told += [f"{n} studies were left out when it was built: {why}" for why, n in manifest.skipped.items()]
    if not drop:
        told += _overlaps(out, settings)
    return Result(
        url=out,
        samples=manifest.samples,
        shards=len(manifest.shards),
        manifest_hash=manifest.hash,
        seconds=time.monotonic() - started,
        splits=manifest.splits,
        patients=manifest.patients,
        skipped=[skip.shown() for skip in skipped],
        warnings=told,
        reused=reused,
    )


def _list(
    path: Path,
    reader: datasets.Reader,
    raw: Path | None,
    options: datasets.Options,
    name: str,
    secret: bytes,
    settings: Settings,
) -> list[str]:
    """Read the metadata into a listing. Returns what its user should know."""
    base = raw.resolve() if raw else None
    folder = base.parent if base and base.is_file() else base
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", datasets.DatasetWarning)
        studies = reader.read(base, options)
        write_listing(path, studies, name, secret, settings.ratios, settings.shard_samples, folder)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, datasets.DatasetWarning)]
    with Listing(path) as listing:
        if not listing.studies:
            raise UserError(f"{name}: no study found")
        _check_budget(list(listing.skipped()), listing.studies, settings)
        told += [
            f"split '{split}' would have been empty: it took the patient whose hash lies nearest; "
            "the splits of so small a set may change when it grows"
            for split in listing.filled
        ]
    return told


def _place_listing(work: Path, digest: str) -> None:
    """Give the new listing its name; one of the same studies stays, as jobs of an earlier command may be reading it."""
    fresh, path = work / f"{LISTING}.new", work / LISTING
    if path.exists():
        with Listing(path) as earlier:
            if earlier.digest == digest:
                return
    path.unlink(missing_ok=True)
    path.hardlink_to(fresh)  # `fresh` stays open here


def _recipe(
    dataset: str, options: datasets.Options, settings: Settings, secret: bytes, listing: Listing
) -> dict[str, Any]:
    """Everything that decides the bytes: equal recipes give equal shards."""
    return {
        "reader": dataset,
        "options": options.model_dump(mode="json", exclude_none=True),
        "longest_side": settings.longest_side,
        "quality": settings.quality,
        "image_format": settings.image_format,
        "duplicates": "report" if options.shares_images else settings.duplicates,
        "apart_from": sorted(Manifest.load(Store(url)).hash for url in settings.apart_from),
        "percentiles": list(PERCENTILES),
        "ratios": list(settings.ratios),
        "shard_samples": settings.shard_samples,
        "source": listing.digest,
        "salt": hashlib.sha256(b"radhpc fingerprint" + secret).hexdigest()[:16],
        "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
        "format": FORMAT,
    }


def _build_shards(
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
    phases: list[tuple[Split, ...]] = [SPLITS] if apart is None else [(split,) for split in duplicates.ORDER]
    try:
        _check_budget([*known, *_flat(skipped.values())], listing.studies, settings)
        for splits in phases:
            todo = [task for task in tasks if task.plan.split in splits and task not in done]
            if todo and apart is not None:
                _save_others(tasks, splits[0], apart)
            before = ready
            with contextlib.closing(_running(run, settings, todo, lambda n: progress(before + n, total))) as running:  # noqa: B023
                for task in running:
                    skipped[task.plan.name] = _skipped(task, listing)
                    _check_budget([*known, *_flat(skipped.values())], listing.studies, settings)
            ready += sum(task.plan.samples for task in todo)
    except UserError:
        for task in tasks:
            if skipped.get(task.plan.name):  # to be tried again: the user may mend the files
                record_path(task).unlink(missing_ok=True)
        raise
    return [*known, *_flat(skipped[task.plan.name] for task in tasks)]


def _running(
    run: Run | None, settings: Settings, tasks: list[Task], progress: Callable[[int], None]
) -> Generator[Task]:
    """Work the tasks off where they shall be."""
    if run is None:
        processes = min(settings.processes, len(tasks))
        run = partial(run_pool, processes) if processes > 1 else run_here
    return run(tasks, progress)


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


def _overlaps(url: str, settings: Settings) -> list[str]:
    """What to tell of images that stand in several splits, here and in the datasets to be apart from."""
    told, ours = [], duplicates.load(url)
    for theirs in (url, *settings.apart_from):
        for split, other, images, of in duplicates.overlaps(ours, duplicates.load(theirs)):
            if theirs != url or duplicates.ORDER.index(split) > duplicates.ORDER.index(other):
                where = "" if theirs == url else f" of {theirs}"
                told.append(f"{images} of {of} images in {split} are near-duplicates of images in {other}{where}")
    return told


def _skipped(task: Task, listing: Listing) -> list[Skip]:
    record = read_record(task)
    assert record is not None
    return [
        Skip(listing.name(study), study, reason, detail, fault=reason != duplicates.REASON)
        for study, reason, detail in record.skipped
    ]


def _flat(parts: Iterable[list[Skip]]) -> list[Skip]:
    return [skip for part in parts for skip in part]


def _check_budget(skipped: Sequence[Skip], studies: int, settings: Settings) -> None:
    """Raise UserError where too many studies were left out, or all of them."""
    budget = settings.skip_budget(studies)
    if len(skipped) == studies:
        budget = 0
    else:
        skipped = [skip for skip in skipped if skip.fault]
    if len(skipped) <= budget:
        return
    shown = [skip.shown() for skip in skipped[:SHOWN]]
    first = "; ".join(f"{skip['name']}: {skip['reason']}" for skip in shown)
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    raise UserError(
        f"{len(skipped)} of {studies} studies cannot be used, and max_skipped allows {budget}: {first}{more}"
    )
