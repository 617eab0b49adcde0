"""Works tasks off: in this process, in worker processes that end whenever the build does, or in jobs elsewhere."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically
from shards.execution.worker import (
    ShardTask,
    build_shard,
    initialize_worker,
    is_finished,
    read_record,
    record_path,
    run_task,
)

# How tasks are worked off: (tasks, what to call with the studies done) -> the tasks, as they are finished.
TaskRunner = Callable[[Sequence[ShardTask], Callable[[int], None]], Generator[ShardTask]]
POLL = 1.0  # seconds between looks at what jobs elsewhere have done


class WorkerKilled(UserError):
    """A worker process ended without a word."""


def run_in_process(tasks: Sequence[ShardTask], progress: Callable[[int], None]) -> Generator[ShardTask]:
    """Yield the tasks, each when its shard is done, in this process."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        progress(count)

    for task in tasks:
        build_shard(task, tick)
        yield task


@contextlib.contextmanager
def local_pool(processes: int) -> Iterator[TaskRunner]:
    """How tasks are worked off on this machine: by worker processes that serve until the context ends, or by none."""
    if processes <= 1:
        yield run_in_process
        return
    context = get_context("spawn")  # a fork would copy the threads and locks of whoever calls
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(processes, context, initialize_worker, (counter, stop))

    def run(tasks: Sequence[ShardTask], progress: Callable[[int], None]) -> Generator[ShardTask]:
        """Yield the tasks as the processes finish their shards."""
        before = counter.value
        try:
            with _block_ctrl_c():
                running: dict[Future[bool], ShardTask] = {pool.submit(run_task, task): task for task in tasks}
            while running:
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    assert future.result(), "stopped, though nobody asked for it"
                    yield running.pop(future)
                progress(counter.value - before)
        except BrokenProcessPool as error:
            raise WorkerKilled(
                f"{tasks[0].job.url}: a worker process was killed, perhaps for want of memory; "
                "finished shards are kept: run the same command again, with fewer --workers"
            ) from error

    try:
        yield run
    finally:  # on any way out they drop what is at hand
        stop.set()
        pool.shutdown(cancel_futures=True)


class JobArray(Protocol):
    """Jobs of a scheduler that were started together; slurm.job_array.Array is one."""

    def alive(self) -> bool:
        """Whether any of them still runs, or waits to run."""

    def cancel(self) -> None:
        """End them all."""


def run_on_array(
    start: Callable[[Callable[[list[ShardTask]], None], list[list[ShardTask]]], JobArray],
    jobs: int,
    tasks: Sequence[ShardTask],
    progress: Callable[[int], None],
) -> Generator[ShardTask]:
    """Yield the tasks as jobs elsewhere finish them; they must see the work folder. `start` submits function calls."""
    if not tasks:
        return
    waiting = {task.plan.name: task for task in tasks}
    for task in tasks:  # what is there is not whole, or lies elsewhere no more
        record_path(task).unlink(missing_ok=True)
        _error_path(task).unlink(missing_ok=True)
    started = start(run_array_task, [list(tasks[n::jobs]) for n in range(min(jobs, len(tasks)))])
    try:
        done = 0
        while waiting:
            alive = started.alive()  # asked before the records are looked at, so that none is missed
            for task in [task for task in waiting.values() if record_path(task).exists() and read_record(task)]:
                del waiting[task.plan.name]
                done += task.plan.samples
                yield task
            progress(done)
            for task in waiting.values():
                if _error_path(task).exists():
                    raise UserError(_error_path(task).read_text())
            if waiting and not alive:
                raise UserError(
                    f"{tasks[0].job.url}: the jobs ended before {len(waiting)} of {len(tasks)} shards were built; "
                    f"finished shards are kept: run the same command again (logs: {tasks[0].job.work}/logs)"
                )
            time.sleep(POLL if waiting else 0)
    finally:
        if waiting:
            started.cancel()


def run_array_task(tasks: list[ShardTask]) -> None:
    """What one such job does: its tasks, on all processors that it has. A job that comes back goes on where it was."""
    todo = [task for task in tasks if not is_finished(task)]
    try:
        with local_pool(min(len(os.sched_getaffinity(0)), len(todo))) as run:
            for _ in run(todo, lambda done: None):
                pass
    except WorkerKilled:
        raise  # by the scheduler, most often: the job comes back, or its absence is noticed
    except (UserError, OSError) as error:
        write_atomically(_error_path(todo[0]), f"{socket.gethostname()}: {error}".encode(), 0o600)
        raise


def _error_path(task: ShardTask) -> Path:
    return record_path(task).with_suffix(".error")


@contextlib.contextmanager
def _block_ctrl_c() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, from their first instant: to end them is the build's business."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
