"""Builds a dataset: list the studies, build the shards in worker processes, prove the whole, write the manifest.

    result = build("phantom", None, "runs/phantom", {"studies": "200"}, Settings(), lambda done, total: None)

The same input gives the same bytes, whatever the number of workers and whatever was interrupted. The manifest
is written last: a folder without one is an unfinished build, and the same command goes on with it.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from radhpc.errors import UserError
from radhpc.manifest import INDEX, MANIFEST
from radhpc.store import write_atomically
from shards import datasets, output, salt
from shards.indexing import assemble
from shards.listing import Listing, Plan, Skip, list_studies
from shards.pixels import PERCENTILES
from shards.settings import Result, Settings
from shards.worker import Done, Task, build_shard, finished, record_path, run_task, start_process
from shards.writer import MODE

__all__ = ["Result", "Settings", "build"]

FORMAT = 1  # of the shards' contents: raise it when the same input gives other bytes
VERSIONED = ("numpy", "pillow", "pydicom", "imagecodecs")  # their versions may change the bytes
SHOWN = 3  # names in a message
DEFAULTS = Settings()

Progress = Callable[[int, int], None]  # (studies done, studies in all)
Shards = Generator[tuple[int, Done], None, None]  # (place in the list of tasks, record)


def build(
    dataset: str,
    raw: Path | None,
    out: str,
    options: Mapping[str, str] | None = None,
    settings: Settings = DEFAULTS,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Build the shards of a raw archive. Raises UserError, and nothing half-written has a final name.

    `dataset` names the reader, `raw` the archive, `options` the reader's key=value options, `out` the folder.
    """
    started = time.monotonic()
    reader = datasets.reader(dataset)
    chosen = datasets.parse_options(dataset, reader.OPTIONS, options or {})
    folder = output.folder_of(out)
    name = chosen.name or dataset
    secret = salt.load(reader.SYNTHETIC)
    listing, told = _list(reader, raw, chosen, name, secret, settings)
    recipe = _recipe(dataset, chosen, settings, secret, listing)
    build_hash = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    with output.explain_refusals(folder), output.hold(folder):
        manifest = output.earlier(folder, recipe, build_hash, settings.force)
        reused, skipped = manifest is not None, list[Skip]()
        if manifest is None:
            sizes = settings.longest_side, settings.quality
            tasks = [Task(plan, name, folder, build_hash, *sizes) for plan in listing.plans]
            done = _build_shards(tasks, listing, settings, progress)
            skipped = [*listing.skipped, *_skipped(listing.plans, done)]
            reasons = Counter(skip.reason for skip in skipped)
            manifest, index = assemble(name, listing.plans, done, recipe, build_hash, reasons)
            write_atomically(folder / INDEX, index, MODE)
            write_atomically(folder / MANIFEST, manifest.to_bytes(), MODE)
            output.clean(folder, manifest)
        else:
            told += [f"{n} studies were left out when it was built: {why}" for why, n in manifest.skipped.items()]
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
    reader: datasets.Reader,
    raw: Path | None,
    options: datasets.Options,
    name: str,
    secret: bytes,
    settings: Settings,
) -> tuple[Listing, list[str]]:
    """Read the metadata. Returns the listing and what its user should know."""
    base = raw.resolve() if raw else None
    folder = base.parent if base and base.is_file() else base
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", datasets.DatasetWarning)
        studies = reader.read(base, options)
        listing = list_studies(studies, name, secret, settings.ratios, settings.shard_samples, folder)
    if not listing.studies:
        raise UserError(f"{name}: no study found")
    _check_budget(listing.skipped, listing.studies, settings)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, datasets.DatasetWarning)]
    told += [
        f"split '{split}' would have been empty: it took the patient whose hash lies nearest; "
        "the splits of so small a set may change when it grows"
        for split in listing.filled
    ]
    return listing, told


def _recipe(
    dataset: str, options: datasets.Options, settings: Settings, secret: bytes, listing: Listing
) -> dict[str, Any]:
    """Everything that decides the bytes: equal recipes give equal shards."""
    return {
        "reader": dataset,
        "options": options.model_dump(mode="json", exclude_none=True),
        "longest_side": settings.longest_side,
        "quality": settings.quality,
        "percentiles": list(PERCENTILES),
        "ratios": list(settings.ratios),
        "shard_samples": settings.shard_samples,
        "source": listing.digest,
        "salt": hashlib.sha256(b"radhpc fingerprint" + secret).hexdigest()[:16],
        "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
        "format": FORMAT,
    }


def _build_shards(tasks: list[Task], listing: Listing, settings: Settings, progress: Progress) -> list[Done]:
    """Build what no earlier run has finished, and return all records in the order of the plans."""
    records = {n: done for n, task in enumerate(tasks) if (done := finished(task.out, task.plan, task.build_hash))}
    todo = [n for n in range(len(tasks)) if n not in records]
    total = sum(len(task.plan.rows) for task in tasks)
    ready = sum(len(tasks[n].plan.rows) for n in records)
    progress(ready, total)
    run = _run_here if min(settings.processes, len(todo)) <= 1 else _run_pool
    try:
        _check_records(listing, records, settings)
        with contextlib.closing(
            run([tasks[n] for n in todo], settings.processes, lambda n: progress(ready + n, total))
        ) as shards:
            for place, done in shards:
                records[todo[place]] = done
                _check_records(listing, records, settings)
    except UserError:
        for n, record in records.items():
            if record.skipped:  # to be tried again: the user may mend the files
                record_path(tasks[n].out, tasks[n].plan).unlink(missing_ok=True)
        raise
    return [records[n] for n in range(len(tasks))]


def _run_here(tasks: list[Task], processes: int, progress: Callable[[int], None]) -> Shards:
    """Yield (place, record), shard by shard, in this process."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        progress(count)

    for place, task in enumerate(tasks):
        yield place, build_shard(task, tick)


def _run_pool(tasks: list[Task], processes: int, progress: Callable[[int], None]) -> Shards:
    """Yield (place, record) as worker processes finish shards; on any way out they drop what is at hand."""
    context = get_context("spawn")  # a fork would copy the threads and locks of whoever calls
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(min(processes, len(tasks)), context, start_process, (counter, stop))
    try:
        with _ctrl_c_held_back():
            running: dict[Future[Done | None], int] = {pool.submit(run_task, task): n for n, task in enumerate(tasks)}
        while running:
            for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                done = future.result()
                assert done is not None, "stopped, though nobody asked for it"
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


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, from their first instant: to end them is the build's business."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_records(listing: Listing, records: Mapping[int, Done], settings: Settings) -> None:
    skipped = _skipped([listing.plans[n] for n in records], list(records.values()))
    _check_budget([*listing.skipped, *skipped], listing.studies, settings)


def _check_budget(skipped: Sequence[Skip], studies: int, settings: Settings) -> None:
    """Raise UserError where too many studies were left out, or all of them."""
    budget = settings.skip_budget(studies)
    if len(skipped) <= budget and len(skipped) < studies:
        return
    shown = [skip.shown() for skip in skipped[:SHOWN]]
    first = "; ".join(f"{skip['name']}: {skip['reason']}" for skip in shown)
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    raise UserError(
        f"{len(skipped)} of {studies} studies cannot be used, and max_skipped allows {budget}: {first}{more}"
    )


def _skipped(plans: Sequence[Plan], records: Sequence[Done]) -> list[Skip]:
    return [
        Skip(plan.rows[place].raw.name, reason, detail)
        for plan, record in zip(plans, records, strict=True)
        for place, reason, detail in record.skipped
    ]
