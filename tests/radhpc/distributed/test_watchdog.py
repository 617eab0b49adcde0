"""Who hangs is named, nobody waits for it, and nobody is blamed who only takes long.

The ranks are real: processes that meet over gloo and train a tiny run. A forkserver that has imported everything starts
them in a moment.
"""

import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from radhpc.core.files import read_json, read_lines
from radhpc.core.ledger import read_ledger
from radhpc.core.recipe import load
from radhpc.core.run_folder import RunFolder
from radhpc.distributed.watchdog import EXIT_STATUS, Beat, Limits, Watchdog, describe, judge, read
from radhpc.training.loop import StepTiming
from radhpc.training.straggler import find_slowest
from tests.conftest import free_port
from tests.waiting import wait_for

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(120)]

LIMIT = 2.5
LONG = 4.0
WINDOW = 3
HOST = socket.gethostname()
START = Callable[..., list[ForkServerProcess]]


def rank_main(run: str, rank: int, port: int, limit: float, slow: float, trouble: str) -> None:
    """One rank, in a process of its own, with something wrong on rank 1."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
        RADHPC_HANG_SECONDS=str(limit), RADHPC_HANG_SLOW_SECONDS=str(slow),
    )  # fmt: skip
    from radhpc import worker

    if trouble:
        of_rank, prepare = TROUBLES[trouble]
        if of_rank in (None, rank):
            prepare()
    worker.run(run)


def sleeping_reader() -> None:
    from radhpc.data.stream import Stream

    before = Stream._assemble

    def the_store_never_answers(self: Stream, number: int, tasks: Any) -> Any:
        if number == 4:
            time.sleep(600)
        return before(self, number, tasks)

    Stream._assemble = the_store_never_answers  # type: ignore[method-assign]


def at_step(numbers: int | range, trouble: Callable[[], Any]) -> None:
    """Inside a step, between the ranks' agreement and the engine's first collective."""
    from radhpc.training import loop

    before = loop.learning_rate_factor

    def factor(stage: Any, step: int, steps: int) -> float:
        if step in (numbers if isinstance(numbers, range) else [numbers]):
            trouble()
        return before(stage, step, steps)

    loop.learning_rate_factor = factor


def endless_loop() -> None:
    while True:
        pass


def holding_the_lock() -> None:
    re.match(r"(a+)+b", "a" * 60)  # exponential, in C, and no other thread of Python runs


def long_pieces() -> None:
    """Longer than a step may take, and no hang: one rank loads, writes and scores while the other waits."""
    from radhpc import worker
    from radhpc.engine.checkpoint import Checkpoints
    from radhpc.evaluation import evaluate

    def slow(owner: Any, name: str, of_rank: str) -> None:
        before, left = getattr(owner, name), [os.environ["RANK"] == of_rank]

        def call(*arguments: Any, **options: Any) -> Any:
            if left.pop() if left else False:
                time.sleep(LONG)
            return before(*arguments, **options)

        setattr(owner, name, call)

    slow(worker, "build_engine", "1")
    slow(Checkpoints, "save", "0")
    slow(evaluate, "trivial", "0")


def endless_load() -> None:
    """In a thread of its own, while the main threads agree again and again whether to stop."""
    from radhpc.models.families.mllama import MllamaFamily

    def weights_that_never_come(self: MllamaFamily, seed: int) -> Any:
        time.sleep(600)

    MllamaFamily.build = weights_that_never_come  # type: ignore[method-assign]


def one_slow_rank() -> None:
    """Steps of 0.3 s on both, and on rank 1 four times as long after two windows, however busy the machine is."""
    from radhpc.training import straggler

    straggler.WINDOW = WINDOW
    begun: list[float] = []

    def sleep() -> None:
        time.sleep(0.3)
        begun.append(time.monotonic())
        if os.environ["RANK"] == "1" and len(begun) > 2 * WINDOW:
            steps = [after - before for before, after in itertools.pairwise(begun[: 2 * WINDOW])]
            time.sleep(3 * statistics.median(steps))

    at_step(range(1000), sleep)


def another_recipe() -> None:
    """As on a node whose file system still shows the file of yesterday."""
    before = RunFolder.recipe
    RunFolder.recipe = lambda self: before(self).model_copy(update={"seed": 77})  # type: ignore[method-assign]


def full_gpu() -> None:
    import torch

    from radhpc.training import out_of_memory as explanation

    explanation.FORECAST_SECONDS = 0  # what it would predict is tested in test_engines.py

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    at_step(4, out_of_memory)


TROUBLES: dict[str, tuple[int | None, Callable[[], None]]] = {
    "reader": (1, sleeping_reader),
    "loop": (1, lambda: at_step(4, endless_loop)),
    "lock": (1, lambda: at_step(4, holding_the_lock)),
    "away": (0, lambda: at_step(4, lambda: time.sleep(600))),
    "load": (1, endless_load),
    "slow": (None, one_slow_rank),
    "recipe": (1, another_recipe),
    "memory": (1, full_gpu),
    "long": (None, long_pieces),
}


@pytest.fixture(scope="module")
def nursery() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["radhpc.worker", "deepspeed", "transformers.models.mllama.modeling_mllama"])
    return context


@pytest.fixture
def start(nursery: Any, tmp_path: Path, recipe_file: Path) -> Iterator[START]:
    """Start ranks of a new run on two; whatever is left of them is killed."""
    ranks: list[ForkServerProcess] = []

    def call(
        trouble: str = "", limit: float = LIMIT, slow: float = 60, steps: int = 400, world: int = 2, more: Any = ()
    ) -> list[ForkServerProcess]:
        changes = [f"stages.scratch.steps={steps}", "checkpoint.every=1000", *more]
        RunFolder.create(tmp_path / "run", load(recipe_file, changes))
        port = free_port()
        for rank in range(world):
            args = (str(tmp_path / "run"), rank, port, limit, slow, trouble)
            ranks.append(nursery.Process(target=rank_main, args=args))
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
    return max(read_ledger(run / "ledger").steps, default=0)


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
    assert "in _reduce" in stacks(run, 0) or "radhpc/engine/fsdp.py" in stacks(run, 0), "where rank 0 waits"
    (event,) = told(run, "stuck")
    assert event["cause"] == found["cause"]


def test_a_load_that_hangs_is_named_although_the_main_threads_go_on(start: START, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start("load", slow=LIMIT), 60) == [EXIT_STATUS, EXIT_STATUS]
    found = end(run, 0)
    assert found is not None
    assert re.fullmatch(rf"rank 1 on {HOST}: no progress for \d+ s in loading stage scratch", found["cause"])
    assert "weights_that_never_come" in stacks(run, 1)


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
    assert "radhpc/training/loop.py" in stacks(run, 0)
    assert step(run) == 4


def test_a_rank_that_holds_pythons_lock_is_named_and_ended(start: START, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = ended(start("lock"), 60)
    assert codes[0] == EXIT_STATUS
    assert codes[1] in (-signal.SIGKILL, 1), "killed by its peer, or by its own second timer"
    found = end(run, 0)
    assert found is not None
    assert (found["state"], found["culprits"]) == ("hung", [{"rank": 1, "host": HOST}])


def test_a_rank_that_never_starts_is_named(start: START, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start(limit=2, slow=2, world=1), 60) == [EXIT_STATUS]
    found = end(run, 0)
    assert found is not None
    assert (found["state"], found["cause"]) == ("hung", "rank 1: has not started")
    assert "init_process_group" in stacks(run, 0)


def test_a_rank_whose_peer_died_does_not_wait_for_it(start: START, tmp_path: Path) -> None:
    """Its main thread cannot notice: it is not in a collective."""
    run = tmp_path / "run"
    ranks = start("away", limit=20)

    def away() -> bool:
        beat = read(RunFolder(run)).get(0)
        return beat is not None and beat.phase == "step 5" and not beat.waiting

    wait_for(away, 60)
    ranks[1].kill()
    killed = time.monotonic()
    assert ended(ranks, 30) == [EXIT_STATUS, -signal.SIGKILL]
    assert time.monotonic() - killed < 15
    found = end(run, 0)
    assert found is not None
    assert found["state"] == "lost_peer"
    assert found["cause"] == f"rank 1 on {HOST}: process {ranks[1].pid} is gone"


@pytest.mark.parametrize(
    "engine",
    [["engine=fsdp"], ["engine=deepspeed"], ["engine=deepspeed", "zero.stage=2"]],
    ids=["fsdp", "zero3", "zero2"],
)
def test_a_slow_rank_is_named_once_and_equal_ranks_never(start: START, tmp_path: Path, engine: list[str]) -> None:
    run = tmp_path / "run"
    start("slow", limit=60, more=engine)  # the slow steps are as long as the machine is busy, and no hang
    wait_for(lambda: step(run) >= 4 * WINDOW + 1, 90)
    (event,) = told(run, "straggler")  # not in the first two windows, and not in the fourth again
    assert (event["rank"], event["host"], event["step"]) == (1, HOST, 3 * WINDOW)
    assert event["ratio"] > 1.5
    wait_for(lambda: RunFolder(run).progress()["slowest"] is not None, 10)
    found = RunFolder(run).progress()["slowest"]
    assert (found["rank"], found["host"]) == (1, HOST)
    assert not told(run, "stuck")


def test_ranks_on_another_recipe_are_told_so_and_all_leave(start: START, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start("recipe"), 60) == [1, 1]
    for rank in range(2):
        found = end(run, rank)
        assert found is not None
        assert found["state"] == "mistake"
        said = (
            r"rank 1 reads another .*/recipe\.yaml than rank 0: fsdp \w+ there, fsdp \w+ on rank 0; all nodes must .*"
        )
        assert re.fullmatch(said, found["cause"])
    assert not told(run, "first_step")


def test_a_gpu_without_memory_is_one_line_and_its_peers_leave(start: START, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = ended(start("memory", limit=60), 60)
    assert codes[1] == 1
    assert codes[0] in (1, EXIT_STATUS), "by the broken connection, or by the heartbeat"
    ends = [end(run, rank) for rank in range(2)]
    assert [found and found["state"] for found in ends] == ["lost_peer", "mistake"]
    assert ends[1] is not None
    assert ends[1]["cause"].startswith("rank 1's GPU is out of memory; change, in this order: ")
    assert step(run) == 4


def test_long_pieces_of_work_are_no_hang(start: START, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start("long", limit=LONG / 2, steps=6), 90) == [0, 0]
    assert not told(run, "stuck")
    assert [end(run, rank)["state"] for rank in range(2)] == ["finished", "finished"]  # type: ignore[index]


def told(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if event["event"] == name]


def test_what_a_life_before_left_does_not_count_whatever_its_clock_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "12001")
    run = RunFolder(tmp_path)
    for rank, port in ((1, 12000), (2, 12001)):
        beat = replace(beats({})[0], rank=rank, time=time.time() + (7200 if rank == 1 else -7200), life=f"node0:{port}")
        (run.folder("logs") / f"heartbeat.rank-{rank:05d}.json").write_text(json.dumps(asdict(beat)))
    watchdog = Watchdog(run, 0, 3, Limits(0, 0))
    try:
        assert set(watchdog._read()) - {0} == {2}
    finally:
        watchdog.close()


# The judgement, without processes


def beats(*changes: dict[str, Any], ticks: int = 9) -> dict[int, Beat]:
    """Ranks that all wait in one collective for too long, but for these changes."""
    common = {
        "pid": 1, "process_start": "1", "time": 1000.0, "ticks": ticks, "phase": "step 7", "step": 7, "age": 610.0,
        "limit": 600.0, "collectives": 812, "waiting": True, "seconds": 0.0,
    }  # fmt: skip
    return {n: Beat(**{**common, "rank": n, "host": f"node{n}", **change}) for n, change in enumerate(changes)}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ([{}, {"collectives": 811, "waiting": False}], "rank 1 on node1: no progress for 610 s in step 7"),
        ([{}, {"collectives": 811, "age": 590}], None),  # not yet over its limit
        ([{"waiting": False, "limit": 1800, "collectives": 811}, {}], None),  # rank 0 scores, which may take longer
        ([{}, {"waiting": False}], "rank 1 on node1: no progress for 610 s in step 7"),  # the same collective is over
        ([{}, {}], "all 2 ranks wait in one collective for 610 s in step 7: the network of node0, node1"),
        ([{}, {"ticks": 5, "age": 1}], "rank 1 on node1: no sign of life for 1011 s, last seen in step 7"),
        ([{}, {"ticks": 5, "age": 1, "limit": 1800}], None),  # holds Python's lock, and may
        ([{}, {"rank": 2}], "rank 1: has not started"),
        (
            [{}, *[{"collectives": 1, "phase": "data of step 7"}] * 6],
            "; ".join(f"rank {n} on node{n}: no progress for 610 s in data of step 7" for n in range(1, 5))
            + "; and 2 more",
        ),
    ],
)
def test_who_is_to_blame(changes: list[dict[str, Any]], cause: str | None) -> None:
    now = {beat.rank: beat for beat in beats(*changes).values()}
    culprits = judge(beats(*changes, ticks=5), now, len(changes), clock=2010.0)
    assert (None if culprits is None else describe(culprits, now)) == cause


def test_the_collectives_timeout_comes_after_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADHPC_HANG_SECONDS", "600")
    monkeypatch.setenv("RADHPC_HANG_SLOW_SECONDS", "30")
    limits = Limits.from_environment()
    assert limits == Limits(600, 600), "the slow limit is never the smaller one"
    assert limits.collective > 600 + 10 * 15  # two looks, three beats apart, and the files
    monkeypatch.setenv("RADHPC_HANG_SECONDS", "ten")
    with pytest.raises(UserError, match="RADHPC_HANG_SECONDS=ten: allowed are seconds"):
        Limits.from_environment()


def test_the_slowest_rank_is_the_one_that_waits_least() -> None:
    timings = [StepTiming(0.31, waits, 0.0) for waits in (0.21, 0.22, 0.01, 0.21)]
    found, own = find_slowest(["a", "a", "b", "b"], timings)
    assert own == pytest.approx([0.11, 0.10, 0.31, 0.11])
    assert (found.rank, found.host, found.ratio, found.is_straggler) == (2, "b", 2.82, True)
    found, _ = find_slowest(["a", "b"], [StepTiming(0.0031, 0.0021, 0.0), StepTiming(0.0031, 0.0001, 0.0)])
    assert not found.is_straggler, "two milliseconds are no straggler"
