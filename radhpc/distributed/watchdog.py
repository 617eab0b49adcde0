"""Watch the ranks by their heartbeats: when one hangs, find out which and where, and let no other wait for it.

A thread of each rank writes `logs/heartbeat.rank-N.json` every few seconds; the main thread only says what it does:

    watchdog.beat("step 120", 120)   # progress; the engine's and Ranks' collectives count as progress by themselves

    {"rank": 3, "host": "node7", "pid": 4711, "ticks": 88, "phase": "step 120", "age": 12.1, "limit": 600.0,
     "collectives": 812, "waiting": false, ...}

When ranks wait in a collective for one that does not come, all of them stop making progress. The one to blame is
behind: it has begun fewer collectives than its peers, or gives no sign of life at all (a stopped process, a lost node).
A rank that has made no progress for longer than its limit reads its peers' files twice; the first one to find a
culprit writes `logs/hang.json`, and every rank follows it: the stacks of all its threads go to
`logs/stacks.rank-N.txt`, the cause to its end record, and the process leaves at once, whatever the main thread does.

One thing this thread cannot outlive: code that holds Python's lock for good. Then its peers name the rank as one
without a sign of life, and a second timer, which lives outside Python, prints the stacks to the rank's log and ends it.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError, first_line
from radhpc.core.files import read_record
from radhpc.core.process import process_start, started_at
from radhpc.core.protocol import CulpritRecord, Event, OutcomeState
from radhpc.core.run_folder import RunFolder, node_name

log = logging.getLogger("radhpc")

STEP_VARIABLE, SLOW_VARIABLE = "RADHPC_HANG_SECONDS", "RADHPC_HANG_SLOW_SECONDS"
EXIT_STATUS = 70  # of a rank that leaves because of a hang
_NAMED = 4  # culprits in the one line


@dataclass(frozen=True)
class Limits:
    """The seconds without progress after which a rank counts as hung; 0: no limit."""

    step: float = 600.0  # in a step
    slow: float = 1800.0  # where progress cannot be seen well: starting, loading, a stage's first step, saving, scoring

    @classmethod
    def from_environment(cls) -> "Limits":
        """Read the limits that slurm.submit hands to the job. Raises UserError."""
        seconds = []
        for name, default in ((STEP_VARIABLE, cls.step), (SLOW_VARIABLE, cls.slow)):
            text = os.environ.get(name, str(default))
            try:
                seconds.append(float(text))
            except ValueError:
                raise UserError(f"{name}={text}: allowed are seconds, or 0 for no limit") from None
        step, slow = seconds
        return cls(step, slow and max(step, slow))

    @property
    def collective(self) -> float:
        """Return the timeout of a collective: so long that the hang's report, which names the culprit, comes first."""
        return 1.5 * max(self.step, self.slow) + 120 if self.step and self.slow else 24 * 3600.0


@dataclass(frozen=True)
class Beat:
    """The content of a rank's heartbeat file."""

    rank: int
    host: str
    pid: int
    process_start: str  # with the pid it names the process for good
    time: float  # of writing, by its own clock
    ticks: int  # files written so far: it grows while the process lives
    phase: str
    step: int
    age: float  # seconds since its last progress
    limit: float  # on them, in this phase
    collectives: int  # begun so far: the ranks begin the same ones in the same order
    waiting: bool  # for its peers, inside a collective
    seconds: float  # of its own for a step, the waiting for peers left out; 0: not known yet
    life: str = ""  # where its peers meet: the same for all ranks of a life, and another one in the next


@dataclass(frozen=True)
class Culprit:
    """A rank that the others wait for."""

    rank: int
    host: str  # "" where it has never written a word
    reason: str
    silent: bool  # it cannot end itself


def judge(before: dict[int, Beat], now: dict[int, Beat], world: int, clock: float) -> list[Culprit] | None:
    """Find the ranks that hang: None while none is over its limit, an empty list if all wait in one collective.

    `before` and `now`: the heartbeat files of this life at two moments some beats apart; `clock`: time.time() now. Call
    it on a rank that is over its own limit.
    """
    missing = [rank for rank in range(world) if rank not in now]
    if missing:
        return [Culprit(rank, "", "has not started", True) for rank in missing]
    beats = list(now.values())
    silent = [beat for beat in beats if beat.rank in before and before[beat.rank].ticks == beat.ticks]
    if silent:
        unseen = {beat.rank: beat.age + max(0.0, clock - beat.time) for beat in silent}
        over = [beat for beat in silent if 0 < beat.limit < unseen[beat.rank]]
        message = "no sign of life for {:.0f} s, last seen in {}"
        return [Culprit(b.rank, b.host, message.format(unseen[b.rank], b.phase), True) for b in over] or None
    most = max(beat.collectives for beat in beats)
    behind = [beat for beat in beats if beat.collectives < most] or [beat for beat in beats if not beat.waiting]
    over = [beat for beat in behind if 0 < beat.limit < beat.age]
    if behind:
        return [Culprit(b.rank, b.host, f"no progress for {b.age:.0f} s in {b.phase}", False) for b in over] or None
    return [] if all(0 < beat.limit < beat.age for beat in beats) else None


def describe(culprits: list[Culprit], beats: dict[int, Beat]) -> str:
    """Return the verdict in one line."""
    if not culprits:
        age, phase = min(beat.age for beat in beats.values()), next(iter(beats.values())).phase
        hosts = ", ".join(sorted({beat.host for beat in beats.values()})[:_NAMED])
        return f"all {len(beats)} ranks wait in one collective for {age:.0f} s in {phase}: the network of {hosts}"
    messages = [f"rank {c.rank}{' on ' + c.host if c.host else ''}: {c.reason}" for c in culprits]
    more = f"; and {len(messages) - _NAMED} more" if len(messages) > _NAMED else ""
    return "; ".join(messages[:_NAMED]) + more


class Watchdog:
    """The watchdog of this rank. Without a run every call works and does nothing."""

    def __init__(
        self,
        run: RunFolder | None = None,
        rank: int = 0,
        world: int = 1,
        limits: Limits | None = None,
        end: Callable[[OutcomeState, str, int, list[CulpritRecord]], None] | None = None,
    ) -> None:
        """Start the thread. `end` records how this rank ends: state (HUNG, LOST_PEER), cause, step, culprits."""
        self.limits = limits or Limits()
        self.rank, self.world = rank, world
        self.collectives: Callable[[], int] = lambda: 0  # Ranks sets it once it has met its peers
        self.waiting = False
        # In a loop of agreements beside long work, which are no progress: whether this rank only waits for its peers.
        self.polling: bool | None = None
        self._counted = 0
        self.seconds = 0.0
        self._run, self._end = run, end
        self._phase = ("starting", 0, self.limits.slow)
        self._beats = self._ticks = 0
        self._seen: tuple[int, int] = (0, 0)
        self._progressed = self._ticked = time.monotonic()
        self._before: dict[int, Beat] | None = None
        self._look_again = self._written = 0.0
        self._neighbours: list[tuple[int, int, str]] = []
        self._left: dict[int, float] = {}
        # Not by the clock: those of two nodes differ, and any may be set back.
        self._life = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        self._process = (node_name(), os.getpid(), process_start(os.getpid()))
        shortest = min((limit for limit in (self.limits.step, self.limits.slow) if limit), default=600.0)
        self.interval = min(15.0, shortest / 20)
        self._closing, self._leaving = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if run is not None:
            for path in (self._path("heartbeat", "json"), self._path("stacks", "txt"), self._verdict_path):
                path.unlink(missing_ok=True)  # of the life before
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()

    # What the main thread says

    def beat(self, phase: str, step: int | None = None, slow: bool = False) -> None:
        """Report progress: `phase` begins now. `slow`: work that cannot report often, so the longer limit counts."""
        self._phase = (phase, self._phase[1] if step is None else step, self.limits.slow if slow else self.limits.step)
        self._beats += 1

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Mark a call in which this rank waits for its peers."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    @contextlib.contextmanager
    def poll(self) -> Iterator[None]:
        """Mark a loop of agreements while work goes on in another thread; set `polling` on ranks that only wait."""
        self.beat(self._phase[0], slow=True)
        self._counted = self.collectives()
        self.polling = True
        try:
            yield
        finally:
            self.polling = None

    def meet(self, processes: list[tuple[int, str, int, str]]) -> None:
        """Take the (rank, host, pid, start of the process) of all ranks: those on this host can be seen to die."""
        local = [(rank, pid, start) for rank, host, pid, start in processes if host == self._process[0]]
        # In a container each rank may see its own processes only.
        self._neighbours = [
            (rank, pid, start) for rank, pid, start in local if rank != self.rank and started_at(pid) == start
        ]

    @property
    def process(self) -> tuple[int, str, int, str]:
        """Return this rank's process, for meet()."""
        return self.rank, *self._process

    def give_way(self) -> None:
        """Call before recording an error of the main thread: one that comes of leaving would hide the cause."""
        if self._leaving.is_set():
            threading.Event().wait()  # the other thread ends this process

    def close(self) -> None:
        """End the watch: this rank's work is done."""
        self.give_way()
        if self._thread is not None and self._run is not None:
            self._closing.set()
            self._thread.join(5)
            faulthandler.cancel_dump_traceback_later()
            self._phase = ("ended", *self._phase[1:])
            with contextlib.suppress(OSError):
                self._write(0.0)
            self._thread = None

    # What the thread does

    def _watch(self) -> None:
        reported: set[str] = set()
        while not self._closing.wait(min(2.0, self.interval)):
            try:
                self._tick()
            except Exception as error:  # a full disk, say: the run will see it too, and the watch goes on
                if (line := first_line(error)) not in reported:
                    reported.add(line)
                    log.warning("heartbeat: %s", line)

    def _tick(self) -> None:
        now, limit = time.monotonic(), self._phase[2]
        if limit:  # anew each time: it comes to pass only when this thread does not
            faulthandler.dump_traceback_later(1.25 * limit + 10 * self.interval, exit=True, file=2)
        if now - self._ticked > 5 * self.interval + 1:
            self._progressed, self._before = now, None  # the whole process stood still, a suspended job for instance
        self._ticked = now
        if self.polling is None:
            self._counted = self.collectives()
        if (seen := (self._beats, self._counted)) != self._seen:
            self._seen, self._progressed, self._before = seen, now, None
        age = now - self._progressed
        self._miss_neighbours(now)
        if now - self._written >= self.interval:
            self._written = now
            self._write(age)
            if verdict := self._verdict():
                self._leave(verdict)
        if limit and age > limit:
            self._look(now)

    def _look(self, now: float) -> None:
        """Read the peers' files twice, some beats apart: a rank that wrote nothing in between is silent."""
        if now < self._look_again:
            return
        beats = self._read()
        if self._before is None:
            self._before, self._look_again = beats, now + 3 * self.interval + 0.2
            return
        culprits = judge(self._before, beats, self.world, time.time())
        self._before, self._look_again = None, now + 5 * self.interval
        if culprits is not None:
            self._declare(culprits, beats)

    def _declare(self, culprits: list[Culprit], beats: dict[int, Beat]) -> None:
        """Write the verdict, unless another rank was first; then the next tick follows that one."""
        silent = [culprit.rank for culprit in culprits if culprit.silent]
        # Where all have stopped by themselves, at a store that is down for instance, no node is to blame.
        blamed = [] if len(culprits) == self.world > 1 else culprits
        verdict = {
            "cause": describe(culprits, beats),
            "culprits": [{"rank": culprit.rank, "host": culprit.host} for culprit in blamed],
            "silent": silent,
            "step": self._phase[1],
        }
        try:
            descriptor = os.open(self._verdict_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return
        try:
            os.write(descriptor, json.dumps(verdict).encode())
        finally:
            os.close(descriptor)
        assert self._run is not None
        self._run.record(Event.STUCK, cause=verdict["cause"], culprits=verdict["culprits"], step=verdict["step"])
        for rank in silent:
            if rank in beats:
                self._kill(beats[rank])
        self._leave(verdict)

    def _kill(self, beat: Beat) -> None:
        """End a process of this host that cannot end itself. A scheduler would; without one it would stay."""
        with contextlib.suppress(OSError):
            if beat.host == self._process[0] and started_at(beat.pid) == beat.process_start:
                os.kill(beat.pid, signal.SIGKILL)

    def _leave(self, verdict: dict[str, Any]) -> None:
        """Write the stacks and the cause and end the process: the main thread may never come back."""
        assert self._run is not None
        assert self._end is not None
        self._leaving.set()
        try:
            log.error("hung: %s", verdict["cause"])
            with open(self._path("stacks", "txt"), "w", opener=_private) as file:
                phase, step, _ = self._phase
                print(f"rank {self.rank} on {self._process[0]}, {phase}, at the hang: {verdict['cause']}", file=file)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._end(OutcomeState.HUNG, verdict["cause"], verdict["step"], verdict["culprits"])
            # The first one to leave ends the others where a scheduler or launcher sees to that: let them write first.
            until = time.monotonic() + 3 * self.interval + 1
            living = self.world - len(verdict["silent"])
            while time.monotonic() < until and len(self._run.end_paths()) < living:
                time.sleep(min(0.5, self.interval))
        finally:
            sys.stderr.flush()
            os._exit(EXIT_STATUS)

    def _miss_neighbours(self, now: float) -> None:
        """Leave when another rank of this host is gone without a good end: submitit's own launcher of ranks on one
        machine does not, and some transports wait for a dead peer as if it lived.
        """
        for rank, pid, start in self._neighbours:
            if started_at(pid) == start:
                continue
            since = self._left.setdefault(rank, now)
            if now - since < 5:  # the main thread may notice by itself, and says more
                continue
            assert self._run is not None
            assert self._end is not None
            end = self._run.ends().get(rank)
            if end is not None and end["state"] in (OutcomeState.FINISHED, OutcomeState.INTERRUPTED):
                continue
            cause = f"rank {rank} on {self._process[0]}: process {pid} is gone"
            self._leaving.set()
            try:
                log.error("%s", cause)
                self._end(OutcomeState.LOST_PEER, cause, self._phase[1], [{"rank": rank, "host": self._process[0]}])
            finally:
                sys.stderr.flush()
                os._exit(EXIT_STATUS)

    # Files

    def _write(self, age: float) -> None:
        """Write the heartbeat file atomically, but without a flush: it is worth nothing after a crash of the node."""
        self._ticks += 1
        phase, step, limit = self._phase
        host, pid, start = self._process
        beat = Beat(
            self.rank, host, pid, start, time.time(), self._ticks, phase, step, round(age, 2), limit,
            self._counted, self.waiting if self.polling is None else self.polling, round(self.seconds, 6), self._life,
        )  # fmt: skip
        path = self._path("heartbeat", "json")
        temporary = path.with_name(f".{path.name}")
        with open(temporary, "w", opener=_private) as file:
            file.write(json.dumps(asdict(beat)))
        os.replace(temporary, path)

    def _read(self) -> dict[int, Beat]:
        assert self._run is not None
        local = read(self._run).items()
        return {rank: beat for rank, beat in local if rank < self.world and beat.life == self._life}

    def _verdict(self) -> dict[str, Any] | None:
        return read_record(self._verdict_path)

    @property
    def _verdict_path(self) -> Path:
        assert self._run is not None
        return self._run.folder("logs") / "hang.json"

    def _path(self, kind: str, ending: str) -> Path:
        assert self._run is not None
        return self._run.folder("logs") / f"{kind}.rank-{self.rank:05d}.{ending}"


def read(run: RunFolder) -> dict[int, Beat]:
    """Return the newest heartbeat of every rank that has ever had one, by rank."""
    known = {field.name for field in fields(Beat)}
    beats = {}
    for path in sorted((run.path / "logs").glob("heartbeat.rank-*.json")):
        data = read_record(path)
        if data is not None and known == data.keys():
            beats[data["rank"]] = Beat(**data)
    return beats


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
