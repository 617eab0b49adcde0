"""Find the rank that the others wait for in every step: a slow GPU, a slow disk, a busy node.

The ranks leave every step together, so each has the same seconds per step; what tells them apart is how long each of
them waited in collectives. The slowest arrives last and waits least. With t the seconds of a step and c those of them
in collectives, a rank's own seconds are t - c plus its share of the transfer, which costs all ranks the same: the
smallest c of all.

    0.31 s a step; in collectives 0.21, 0.22, 0.01, 0.21 s  ->  own 0.11, 0.10, 0.31, 0.11: rank 2 is 2.8 times slower
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from radhpc.core.board import Board
from radhpc.core.protocol import Event
from radhpc.core.run_folder import RunFolder, node_name
from radhpc.distributed.ranks import Ranks
from radhpc.training.loop import Position, StepMetrics, StepTiming

log = logging.getLogger("radhpc")

WINDOW = 50  # steps, whose medians are compared: one slow step does not make a slow rank
RATIO = 1.5  # of a rank's own seconds to the median rank's, from which it is called a straggler
SECONDS = 0.01  # that it costs per step at least


@dataclass(frozen=True)
class SlowestRank:
    """The rank with the most seconds of its own in a step."""

    rank: int
    host: str
    ratio: float  # to the median rank
    seconds: float
    data_seconds: float  # of them: waiting for data

    @property
    def is_straggler(self) -> bool:
        return self.ratio >= RATIO and self.seconds * (1 - 1 / self.ratio) >= SECONDS


def find_slowest(hosts: Sequence[str], timings: Sequence[StepTiming]) -> tuple[SlowestRank, list[float]]:
    """Return the slowest rank, and the own seconds of every rank, in the order of ranks."""
    transfer = min(timing.collective_seconds for timing in timings)
    own = [timing.seconds - timing.collective_seconds + transfer for timing in timings]
    rank = max(range(len(own)), key=own.__getitem__)
    ratio = own[rank] / max(1e-9, statistics.median_low(own))
    slowest = SlowestRank(rank, hosts[rank], round(ratio, 2), round(own[rank], 4), round(timings[rank].data_seconds, 4))
    return slowest, own


class StragglerMonitor:
    """A hook of every step, on all ranks: every WINDOW steps the ranks exchange their timings."""

    def __init__(self, run: RunFolder, ranks: Ranks, board: Board) -> None:
        self.run, self.ranks, self.board = run, ranks, board
        self.slowest: SlowestRank | None = None  # of the last window; None before it ends, or with one rank
        self._timings: list[StepTiming] = []

    def __call__(self, position: Position, metrics: StepMetrics) -> None:
        self._timings.append(metrics.timing)
        if self.ranks.world == 1 or len(self._timings) < WINDOW:
            del self._timings[:-WINDOW]
            return
        local = StepTiming(
            statistics.median(timing.seconds for timing in self._timings),
            statistics.median(timing.collective_seconds for timing in self._timings),
            statistics.median(timing.data_seconds for timing in self._timings),
        )
        self._timings.clear()
        gathered = self.ranks.gather((node_name(), local))
        slowest, own = find_slowest([host for host, _ in gathered], [timing for _, timing in gathered])
        self.slowest, self.ranks.watchdog.seconds = slowest, own[self.ranks.rank]
        self.board.scalars(position.step, {"speed/slowest_rank": float(slowest.rank), "speed/spread": slowest.ratio})
        if self.ranks.first and slowest.is_straggler:
            self._report(position, slowest)

    def _report(self, position: Position, slowest: SlowestRank) -> None:
        """Record a straggler, once for each rank and life."""
        this_life = 0
        events = self.run.events(Event.STARTED, Event.STRAGGLER)
        for n, event in enumerate(events):
            this_life = n if event["event"] == Event.STARTED else this_life
        if any(event.get("rank") == slowest.rank for event in events[this_life:]):
            return
        line = (
            f"rank {slowest.rank} on {slowest.host} is slow: {slowest.seconds:.3f} s a step of its own, "
            f"{slowest.ratio:.1f} times the median rank; of it {slowest.data_seconds:.3f} s waiting for data"
        )
        log.warning("%s", line)
        self.board.event(position.step, Event.STRAGGLER, line)
        self.run.record(
            Event.STRAGGLER, step=position.step, rank=slowest.rank, host=slowest.host, ratio=slowest.ratio,
            seconds=slowest.seconds, data_seconds=slowest.data_seconds,
        )  # fmt: skip
