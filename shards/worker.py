"""What one process of a build does: a plan -> a shard, and a record that it is done.

The record lies in `<out>/.build/` until the build ends; a build that goes on after an interruption takes the
shards with a record of its own hash as they are. It names studies by their place in the plan, never by raw names.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from radhpc.manifest import Shard
from radhpc.sample import Sample, View
from radhpc.store import write_atomically
from shards.listing import Plan, Row
from shards.pixels import BadImage, encode, load
from shards.writer import SampleRow, write

RECORDS = ".build"  # folder of the records, inside the output folder


class Done(BaseModel):
    """The record of a finished shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    build_hash: str
    shard: Shard | None  # None where every study was left out
    rows: tuple[SampleRow, ...]
    skipped: tuple[tuple[int, str, str], ...]  # place in the plan, reason, detail


@dataclass(frozen=True)
class Task:
    """One shard to build."""

    plan: Plan
    dataset: str
    out: Path
    build_hash: str
    longest_side: int
    quality: int


class Stopped(Exception):
    """The build is ending; the shard at hand was dropped."""


def record_path(out: Path, plan: Plan) -> Path:
    return out / RECORDS / f"{plan.name}.json"


def finished(out: Path, plan: Plan, build_hash: str) -> Done | None:
    """The record of a shard that an earlier run of the same build has finished, or None."""
    try:
        done = Done.model_validate_json(record_path(out, plan).read_bytes())
        if done.build_hash != build_hash:
            return None
        if done.shard and (out / done.shard.name).stat().st_size != done.shard.size:
            return None
        return done
    except (FileNotFoundError, ValidationError):
        return None


def build_shard(task: Task, tick: Callable[[], None]) -> Done:
    """Build one shard whole. `tick` is called after each study, and may raise to end it. Raises OSError."""
    skipped: list[tuple[int, str, str]] = []

    def samples() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
        for place, row in enumerate(task.plan.rows):
            try:
                yield row.key, members(row, task)
            except BadImage as error:
                skipped.append((place, error.reason, error.detail))
            except ValidationError as error:
                what = error.errors()[0]
                skipped.append((place, "description refused", f"{'.'.join(map(str, what['loc']))}: {what['msg']}"))
            tick()

    shard, rows = write(task.out / task.plan.name, samples())
    done = Done(build_hash=task.build_hash, shard=shard, rows=tuple(rows), skipped=tuple(skipped))
    write_atomically(record_path(task.out, task.plan), done.model_dump_json().encode(), mode=0o600)
    return done


def members(row: Row, task: Task) -> list[tuple[str, bytes]]:
    """The members of one sample: its description, then its images. Raises BadImage."""
    images: list[bytes] = []
    views: list[View] = []
    for source, projection in row.raw.views:
        raw = load(source) if isinstance(source, Path) else source()
        data, view = encode(raw, task.longest_side, task.quality, projection)
        images.append(data)
        views.append(view)
    sample = Sample(
        dataset=task.dataset,
        patient=row.patient,
        study=row.study,
        split=row.split,
        images=tuple(views),
        report=row.raw.report,
        language=row.raw.language,
        labels=row.raw.labels,
        question=row.raw.question,
        answer=row.raw.answer,
    )
    assert sample.key == row.key
    return [("json", sample.model_dump_json().encode()), *((f"{n}.jpg", data) for n, data in enumerate(images))]


# The two things that a worker process shares with the build: how many studies are done, and whether to stop.
_counter: "Synchronized[int] | None" = None
_stop: Event | None = None


def start_process(counter: "Synchronized[int]", stop: Event) -> None:
    """Run once in each worker process: take what is shared, and never outlive the build."""
    global _counter, _stop
    _counter, _stop = counter, stop
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End with the build: a pool's workers would wait forever for one that was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_task(task: Task) -> Done | None:
    """Build one shard in a worker process; None where the build is ending."""
    assert _counter is not None
    assert _stop is not None
    counter, stop = _counter, _stop

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1
        if stop.is_set():
            raise Stopped

    with contextlib.suppress(Stopped):
        return build_shard(task, tick)
    return None
