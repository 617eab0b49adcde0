"""Who hangs is named, nobody waits for it, and nobody is blamed who only takes long.

The ranks are real: processes that meet over gloo and train a tiny run. A forkserver that has imported everything starts
them in a moment.
"""

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from radhpc.files import read_json, read_lines
from radhpc.heartbeat import EXIT_STATUS
from radhpc.ledger import consumed
from radhpc.recipe import load
from radhpc.run_dir import RunDir
from tests.radhpc.test_training import wait_for

pytestmark = pytest.mark.timeout(120)

LIMIT = 4.0
HOST = socket.gethostname()
START = Callable[..., list[ForkServerProcess]]


def rank_main(run: str, rank: int, port: int, limit: float, trouble: str) -> None:
    """One rank, in a process of its own, with something wrong on rank 1."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
        RADHPC_HANG_SECONDS=str(limit), RADHPC_HANG_SLOW_SECONDS="60",
    )  # fmt: skip
    from radhpc import worker

    if rank == 1 and trouble:
        TROUBLES[trouble]()
    worker.run(run)


def sleeping_reader() -> None:
    from radhpc.stream import Stream

    before = Stream._assemble

    def the_store_never_answers(self: Stream, number: int, tasks: Any) -> Any:
        if number == 4:
            time.sleep(600)
        return before(self, number, tasks)

    Stream._assemble = the_store_never_answers  # type: ignore[method-assign]


def at_step(number: int, trouble: Callable[[], Any]) -> None:
    """Inside a step, between the ranks' agreement and the engine's first collective."""
    from radhpc import loop

    before = loop.schedule

    def schedule(stage: Any, step: int, steps: int) -> float:
        if number in (step, -1):
            trouble()
        return before(stage, step, steps)

    loop.schedule = schedule


def endless_loop() -> None:
    while True:
        pass


def holding_the_lock() -> None:
    re.match(r"(a+)+b", "a" * 60)  # exponential, in C, and no other thread of Python runs


TROUBLES: dict[str, Callable[[], None]] = {
    "reader": sleeping_reader,
    "loop": lambda: at_step(4, endless_loop),
    "lock": lambda: at_step(4, holding_the_lock),
}


@pytest.fixture(scope="module")
def nursery() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["radhpc.worker", "transformers.models.mllama.modeling_mllama"])
    return context


@pytest.fixture
def start(nursery: Any, tmp_path: Path, recipe_file: Path) -> Iterator[START]:
    """Start two ranks of a new run; whatever is left of them is killed."""
    ranks: list[ForkServerProcess] = []

    def call(trouble: str = "", limit: float = LIMIT, *changes: str) -> list[ForkServerProcess]:
        RunDir.create(
            tmp_path / "run", load(recipe_file, ["stages.scratch.steps=400", "checkpoint.every=100", *changes])
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            ranks.append(nursery.Process(target=rank_main, args=(str(tmp_path / "run"), rank, port, limit, trouble)))
            ranks[-1].start()
        return ranks

    yield call
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()


def ended(ranks: list[ForkServerProcess], seconds: float) -> list[int | None]:
    until = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.1, until - time.monotonic()))
    return [rank.exitcode for rank in ranks]


def end(run: Path, rank: int) -> dict[str, Any] | None:
    found: dict[str, Any] | None = read_json(run / "logs" / f"end.rank-{rank:05d}.json")
    return found


def stacks(run: Path, rank: int) -> str:
    return (run / "logs" / f"stacks.rank-{rank:05d}.txt").read_text()


def step(run: Path) -> int:
    return max(consumed(run / "ledger").steps, default=0)


def test_a_stopped_rank_is_named_and_nothing_is_left(start: START, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start()
    wait_for(lambda: step(run) >= 5, 60)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    assert ended(ranks, 4 * LIMIT) == [EXIT_STATUS, -signal.SIGKILL], "the stopped process is ended by its peer"
    assert time.monotonic() - stopped < 2 * LIMIT + 5
    found = end(run, 0)
    assert found is not None
    assert found["state"] == "hung"
    assert found["culprits"] == [{"rank": 1, "host": HOST}]
    assert re.fullmatch(rf"rank 1 on {HOST}: no sign of life for \d+ s, last seen in .*step \d+", found["cause"])
    assert "in _reduce" in stacks(run, 0) or "radhpc/engine.py" in stacks(run, 0), "where rank 0 waits"
    (told,) = [event for event in read_lines(run / "events.jsonl") if event["event"] == "stuck"]
    assert told["cause"] == found["cause"]


@pytest.mark.parametrize(
    ("trouble", "phase", "function"),
    [("reader", "data of step 5", "the_store_never_answers"), ("loop", "step 5", "endless_loop")],
)
def test_a_rank_that_hangs_is_named_with_its_stack(
    start: START, tmp_path: Path, trouble: str, phase: str, function: str
) -> None:
    run = tmp_path / "run"
    assert ended(start(trouble), 60) == [EXIT_STATUS, EXIT_STATUS]
    ends = [end(run, rank) for rank in range(2)]
    for found in ends:
        assert found is not None
        assert found["state"] == "hung"
        assert found["culprits"] == [{"rank": 1, "host": HOST}]
        assert re.fullmatch(rf"rank 1 on {HOST}: no progress for \d+ s in {phase}", found["cause"])
    assert function in stacks(run, 1)
    assert function not in stacks(run, 0)
    assert "radhpc/loop.py" in stacks(run, 0)
    assert step(run) == 4


def test_a_rank_that_holds_pythons_lock_is_named_and_ended(start: START, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = ended(start("lock"), 60)
    assert codes[0] == EXIT_STATUS
    assert codes[1] in (-signal.SIGKILL, 1), "killed by its peer, or by its own second timer"
    found = end(run, 0)
    assert found is not None
    assert (found["state"], found["culprits"]) == ("hung", [{"rank": 1, "host": HOST}])
