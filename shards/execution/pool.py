"""Runs the tasks of a build: in this process, in worker processes that end with the build, or in a job array."""

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

# Runs tasks: (tasks, callback with the number of studies done) -> the tasks, as they are finished.
TaskRunner = Callable[[Sequence[ShardTask], Callable[[int], None]], Generator[ShardTask]]
POLL = 1.0  # seconds between looks at what jobs elsewhere have done


class WorkerKilled(UserError):
    """A worker process ended without an error."""


def run_in_process(tasks: Sequence[ShardTask], progress: Callable[[int], None]) -> Generator[ShardTask]:
    """Run the tasks in this process, and yield each when its shard is done."""
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
    """Give a runner on this machine: worker processes that live until the context ends, or this process for one."""
    if processes <= 1:
        yield run_in_process
        return
    context = get_context("spawn")  # a fork would copy the threads and locks of the caller
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
                    assert future.result(), "stopped without a request"
                    yield running.pop(future)
                progress(counter.value - before)
        except BrokenProcessPool as error:
            raise WorkerKilled(
                f"{tasks[0].context.url}: a worker process was killed, perhaps for lack of memory; "
                "finished shards are kept: run the same command again, with fewer --workers"
            ) from error

    try:
        yield run
    finally:  # on any exit the workers drop their unfinished shards
        stop.set()
        pool.shutdown(cancel_futures=True)


class JobHandle(Protocol):
    """Jobs of a scheduler that were started together, such as slurm.job_array.Array."""

    def alive(self) -> bool:
        """Return whether any of them still runs, or waits to run."""

    def cancel(self) -> None:
        """Cancel them all."""


def run_on_array(
    start: Callable[[Callable[[list[ShardTask]], None], list[list[ShardTask]]], JobHandle],
    jobs: int,
    tasks: Sequence[ShardTask],
    progress: Callable[[int], None],
) -> Generator[ShardTask]:
    """Yield the tasks as the jobs finish them; all nodes must see the work folder. `start` submits function calls."""
    if not tasks:
        return
    pending = {task.plan.name: task for task in tasks}
    for task in tasks:  # a record that is present belongs to an incomplete or a missing shard
        record_path(task).unlink(missing_ok=True)
        _error_path(task).unlink(missing_ok=True)
    array = start(run_array_task, [list(tasks[n::jobs]) for n in range(min(jobs, len(tasks)))])
    try:
        done = 0
        while pending:
            alive = array.alive()  # asked before the records are looked at, so that none is missed
            for task in [task for task in pending.values() if record_path(task).exists() and read_record(task)]:
                del pending[task.plan.name]
                done += task.plan.samples
                yield task
            progress(done)
            for task in pending.values():
                if _error_path(task).exists():
                    raise UserError(_error_path(task).read_text())
            if pending and not alive:
                raise UserError(
                    f"{tasks[0].context.url}: the jobs ended before {len(pending)} of {len(tasks)} shards were built; "
                    f"finished shards are kept: run the same command again (logs: {tasks[0].context.work}/logs)"
                )
            time.sleep(POLL if pending else 0)
    finally:
        if pending:
            array.cancel()


def run_array_task(tasks: list[ShardTask]) -> None:
    """Run the tasks of one job on all its processors. A requeued job continues with the unfinished ones."""
    unfinished = [task for task in tasks if not is_finished(task)]
    try:
        with local_pool(min(len(os.sched_getaffinity(0)), len(unfinished))) as run:
            for _ in run(unfinished, lambda done: None):
                pass
    except WorkerKilled:
        raise  # mostly by the scheduler: the job is requeued, or run_on_array notices that it is gone
    except (UserError, OSError) as error:
        write_atomically(_error_path(unfinished[0]), f"{socket.gethostname()}: {error}".encode(), 0o600)
        raise


def _error_path(task: ShardTask) -> Path:
    return record_path(task).with_suffix(".error")


@contextlib.contextmanager
def _block_ctrl_c() -> Iterator[None]:
    """Block Ctrl-C in processes that are started inside, from their first instant: the build ends them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
