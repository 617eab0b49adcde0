"""Builds a dataset: list the studies, build the shards in worker processes, prove the whole, write the manifest.

    result = build("phantom", None, "runs/phantom", {"studies": "200"}, Settings(), lambda done, total: None)

The same input gives the same bytes, whatever the number of workers and whatever was interrupted. The manifest
is written last: a folder without one is an unfinished build, and the same command goes on with it.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from radhpc.errors import UserError, first_line
from radhpc.manifest import INDEX, MANIFEST, Manifest
from radhpc.store import Store, write_atomically
from shards import datasets, salt
from shards.indexing import assemble
from shards.listing import Listing, Plan, Skip, list_studies
from shards.pixels import PERCENTILES
from shards.settings import Result, Settings
from shards.worker import RECORDS, Done, Task, build_shard, finished, record_path, run_task, start_process
from shards.writer import MODE

__all__ = ["Result", "Settings", "build"]

Progress = Callable[[int, int], None]  # (studies done, studies in all)
VERSIONED = ("numpy", "pillow", "pydicom", "imagecodecs")  # their versions may change the bytes
SHOWN = 3  # names in a message


def build(
    dataset: str,
    raw: Path | None,
    out: str,
    options: Mapping[str, str] | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    progress: Progress = lambda done, total: None,
) -> Result:
    """Build the shards of a raw archive. Raises UserError, and nothing half-written has a final name.

    `dataset` names the reader, `raw` the archive, `options` the reader's key=value options, `out` the folder.
    """
    started = time.monotonic()
    reader = datasets.reader(dataset)
    chosen = datasets.parse_options(dataset, reader.OPTIONS, options or {})
    folder = _folder(out)
    name = chosen.name or dataset
    secret = salt.load(reader.SYNTHETIC)
    base = raw.resolve() if raw else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", datasets.DatasetWarning)
        listing = list_studies(
            reader.read(base, chosen), name, secret, settings.ratios, settings.shard_samples, base
        )
    recipe = _recipe(dataset, chosen, settings, secret, listing)
    build_hash = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    with _refuse_full_disk(folder), _alone(folder):
        if earlier := _earlier(folder, recipe, build_hash, settings.force):
            return _reuse(out, earlier, started)
        _check_listing(listing, settings, dataset)
        tasks = [
            Task(plan, name, folder, build_hash, settings.longest_side, settings.quality) for plan in listing.plans
        ]
        done = _build_shards(tasks, listing, settings, progress)
        skipped = [*listing.skipped, *_skipped(listing.plans, done)]
        manifest, index = assemble(name, listing.plans, done, recipe, build_hash, Counter(s.reason for s in skipped))
        write_atomically(folder / INDEX, index, MODE)
        write_atomically(folder / MANIFEST, manifest.to_bytes(), MODE)
        _clean(folder, manifest)
    return Result(
        url=out,
        samples=manifest.samples,
        shards=len(manifest.shards),
        manifest_hash=manifest.hash,
        seconds=time.monotonic() - started,
        splits=manifest.splits,
        patients=manifest.patients,
        skipped=[skip.shown() for skip in skipped],
        warnings=_warnings(listing, caught),
    )


def _folder(out: str) -> Path:
    if "://" in out:
        raise UserError(f"--out {out}: URLs are not supported yet; allowed is a folder")
    folder = Path(out).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: a file is in the way; allowed is a folder")
    return folder


def _recipe(
    dataset: str, options: datasets.Options, settings: Settings, secret: bytes, listing: Listing
) -> dict[str, Any]:
    """Everything that decides the bytes: equal recipes give equal shards."""
    return {
        "reader": dataset,
        "options": options.model_dump(mode="json"),
        "longest_side": settings.longest_side,
        "quality": settings.quality,
        "percentiles": list(PERCENTILES),
        "ratios": list(settings.ratios),
        "shard_samples": settings.shard_samples,
        "source": listing.digest,
        "salt": hashlib.sha256(b"radhpc fingerprint" + secret).hexdigest()[:16],
        "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
        "format": 1,
    }


def _earlier(folder: Path, recipe: dict[str, Any], build_hash: str, force: bool) -> Manifest | None:
    """The finished build that the folder holds, where it is this very one. Raises UserError for another."""
    if not (folder / MANIFEST).exists():
        return None
    if force:
        (folder / MANIFEST).unlink()  # first of all: what follows is no whole dataset
        return None
    manifest = Manifest.load(Store(folder))
    if manifest.build_hash == build_hash:
        manifest.check_sizes(Store(folder))
        return manifest
    differing = [key for key in recipe if manifest.build.get(key) != recipe[key]]
    raise UserError(
        f"{folder}: holds another build (other {', '.join(differing) or 'contents'}); "
        "use another folder, or --force to replace it"
    )


def _reuse(out: str, manifest: Manifest, started: float) -> Result:
    left_out = [f"{count} studies were left out when it was built: {reason}" for reason, count in manifest.skipped.items()]
    return Result(
        url=out,
        samples=manifest.samples,
        shards=len(manifest.shards),
        manifest_hash=manifest.hash,
        seconds=time.monotonic() - started,
        splits=manifest.splits,
        patients=manifest.patients,
        warnings=left_out,
        reused=True,
    )


def _build_shards(tasks: list[Task], listing: Listing, settings: Settings, progress: Progress) -> list[Done]:
    """Build what no earlier run has finished, and return all records in the order of the plans."""
    records = [finished(task.out, task.plan, task.build_hash) for task in tasks]
    todo = [n for n, record in enumerate(records) if record is None]
    total = sum(len(task.plan.rows) for task in tasks)
    ready = total - sum(len(tasks[n].plan.rows) for n in todo)
    progress(ready, total)
    budget = settings.skip_budget(listing.studies)
    run = _run_here if min(settings.processes, len(todo)) <= 1 else _run_pool
    for place, done in run([tasks[n] for n in todo], settings.processes, lambda n: progress(ready + n, total)):
        records[todo[place]] = done
        _check_budget(listing, records, budget, tasks)
    _check_budget(listing, records, budget, tasks)
    assert all(records)
    return [record for record in records if record]


def _run_here(tasks: list[Task], processes: int, progress: Callable[[int], None]) -> Iterator[tuple[int, Done]]:
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        progress(count)

    for place, task in enumerate(tasks):
        yield place, build_shard(task, tick)


def _run_pool(tasks: list[Task], processes: int, progress: Callable[[int], None]) -> Iterator[tuple[int, Done]]:
    """Yield (place, record) as worker processes finish shards; on any way out they drop what is at hand."""
    context = get_context("spawn")  # a fork would copy threads and locks of whoever calls
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(min(processes, len(tasks)), context, start_process, (counter, stop))
    try:
        running: dict[Future[Done | None], int] = {pool.submit(run_task, task): n for n, task in enumerate(tasks)}
        while running:
            for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                done = future.result()
                assert done is not None
                yield running.pop(future), done
            progress(counter.value)
    except BrokenProcessPool as error:
        raise UserError(
            f"{tasks[0].out}: a worker process was killed, perhaps for want of memory; "
            "finished shards are kept: run the same command again, with fewer --workers"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _check_listing(listing: Listing, settings: Settings, dataset: str) -> None:
    budget = settings.skip_budget(listing.studies)
    if len(listing.skipped) > budget:
        raise _over_budget(listing.skipped, listing.studies, budget)
    if not listing.plans:
        raise UserError(f"{dataset}: no study found")


def _check_budget(listing: Listing, records: list[Done | None], budget: int, tasks: list[Task]) -> None:
    skipped = [*listing.skipped, *_skipped(listing.plans, records)]
    if len(skipped) > budget or len(skipped) == listing.studies:
        for task, record in zip(tasks, records, strict=True):
            if record and record.skipped:  # to be tried again: the user may mend the files
                record_path(task.out, task.plan).unlink(missing_ok=True)
        raise _over_budget(skipped, listing.studies, budget)


def _over_budget(skipped: list[Skip] | tuple[Skip, ...], studies: int, budget: int) -> UserError:
    first = "; ".join(f"{skip['name']}: {skip['reason']}" for skip in (s.shown() for s in skipped[:SHOWN]))
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return UserError(
        f"{len(skipped)} of {studies} studies cannot be used, and max_skipped allows {budget}: {first}{more}"
    )


def _skipped(plans: tuple[Plan, ...], records: list[Done] | list[Done | None]) -> list[Skip]:
    return [
        Skip(plan.rows[place].raw.name, reason, detail)
        for plan, record in zip(plans, records, strict=True)
        for place, reason, detail in (record.skipped if record else ())
    ]


def _warnings(listing: Listing, caught: list[warnings.WarningMessage]) -> list[str]:
    told = [str(message.message) for message in caught if issubclass(message.category, datasets.DatasetWarning)]
    return told + [
        f"split '{split}' would have been empty: it took the patient whose hash lies nearest; "
        "the splits of so small a set may change when it grows"
        for split in listing.filled
    ]


def _clean(folder: Path, manifest: Manifest) -> None:
    """Remove the records, and the shards of a replaced build."""
    shutil.rmtree(folder / RECORDS, ignore_errors=True)
    own = {shard.name for shard in manifest.shards}
    for path in folder.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
        if path.name not in own:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock, so that two builds do not mix."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    (folder / RECORDS).mkdir(exist_ok=True, mode=0o700)
    lock = os.open(folder / RECORDS / "lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{folder}: another build is writing there; wait for it, or use another folder") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(lock)
        if (folder / MANIFEST).exists():
            shutil.rmtree(folder / RECORDS, ignore_errors=True)


@contextlib.contextmanager
def _refuse_full_disk(folder: Path) -> Iterator[None]:
    """Turn the file system's refusals into one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: no space left; finished shards are kept: make room, then run it again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{folder}: cannot be written ({first_line(error)})") from error
        raise
