"""Which rank the others wait for in every step: a slow GPU, a slow disk, a busy node.

The ranks leave every step together, so each has the same seconds per step; what tells them apart is how long each of
them stood in collectives. The slowest arrives last and waits least. With c the seconds in collectives of a step and t
all its seconds, a rank's own are t - c, and its share of a transfer that costs all of them the same: the smallest c.

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
from radhpc.training.loop import Pace, Position, Report

log = logging.getLogger("radhpc")

WINDOW = 50  # steps; of each, medians: one slow step of a rank is not a slow rank
RATIO = 1.5  # of a rank's own seconds to the median rank's, from which on it is called a straggler
SECONDS = 0.01  # that it costs in a step at the least


@dataclass(frozen=True)
class Slowest:
    """The rank that took longest for its own part of a step."""

    rank: int
    host: str
    ratio: float  # to the median rank
    seconds: float
    data_seconds: float  # of them, standing still for data

    @property
    def straggles(self) -> bool:
        return self.ratio >= RATIO and self.seconds * (1 - 1 / self.ratio) >= SECONDS


def slowest(hosts: Sequence[str], paces: Sequence[Pace]) -> tuple[Slowest, list[float]]:
    """Who is slowest, and the own seconds of every rank, in the order of ranks."""
    shortest = min(pace.collective_seconds for pace in paces)
    own = [pace.seconds - pace.collective_seconds + shortest for pace in paces]
    rank = max(range(len(own)), key=own.__getitem__)
    ratio = own[rank] / max(1e-9, statistics.median_low(own))
    return Slowest(rank, hosts[rank], round(ratio, 2), round(own[rank], 4), round(paces[rank].data_seconds, 4)), own


class Stragglers:
    """A hook of every step, on all ranks: every WINDOW steps they tell each other how long they took."""

    def __init__(self, run: RunFolder, ranks: Ranks, board: Board) -> None:
        self.run, self.ranks, self.board = run, ranks, board
        self.slowest: Slowest | None = None  # of the last window; none yet, or one rank alone
        self._paces: list[Pace] = []

    def __call__(self, position: Position, report: Report) -> None:
        self._paces.append(report.pace)
        if self.ranks.world == 1 or len(self._paces) < WINDOW:
            del self._paces[:-WINDOW]
            return
        mine = Pace(
            statistics.median(pace.seconds for pace in self._paces),
            statistics.median(pace.collective_seconds for pace in self._paces),
            statistics.median(pace.data_seconds for pace in self._paces),
        )
        self._paces.clear()
        told = self.ranks.gather((node_name(), mine))
        found, own = slowest([host for host, _ in told], [pace for _, pace in told])
        self.slowest, self.ranks.watchdog.seconds = found, own[self.ranks.rank]
        self.board.scalars(position.step, {"speed/slowest_rank": float(found.rank), "speed/spread": found.ratio})
        if self.ranks.first and found.straggles:
            self._tell(position, found)

    def _tell(self, position: Position, found: Slowest) -> None:
        """Once for a rank and life."""
        this_life = 0
        events = self.run.events(Event.STARTED, Event.STRAGGLER)
        for n, event in enumerate(events):
            this_life = n if event["event"] == Event.STARTED else this_life
        if any(event.get("rank") == found.rank for event in events[this_life:]):
            return
        line = (
            f"rank {found.rank} on {found.host} is slow: {found.seconds:.3f} s a step of its own, "
            f"{found.ratio:.1f} times the median rank; of it {found.data_seconds:.3f} s standing still for data"
        )
        log.warning("%s", line)
        self.board.event(position.step, Event.STRAGGLER, line)
        self.run.record(
            Event.STRAGGLER, step=position.step, rank=found.rank, host=found.host, ratio=found.ratio,
            seconds=found.seconds, data_seconds=found.data_seconds,
        )  # fmt: skip
