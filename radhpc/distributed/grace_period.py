"""Grace is a budget: what a run can still commit between a signal and the kill. Pure arithmetic.

training/async_checkpoint.py acts on it.

choose(left=28.0, here=False, in_flight=None, new=11.0)   # "this step"
choose(left=12.0, here=False, in_flight=4.0, new=11.0)    # "last snapshot": the save in flight can still land
choose(left=5.0, here=False, in_flight=None, new=11.0)    # "last checkpoint": leave now, nothing new can land
"""

from collections import deque
from collections.abc import Iterable
from typing import Literal

RESERVE = 3.0  # seconds: the ranks end, then slurm.requeue asks the scheduler and puts the job back
SAFETY = 1.25  # times what was measured

Plan = Literal["this step", "last snapshot", "last checkpoint"]


class RecentMaximum:
    """A running estimate of something's seconds: the largest of the last few, as a deadline forgives no optimism."""

    def __init__(self, seconds: Iterable[float] = (), remembered: int = 5) -> None:
        self._seconds = deque(seconds, maxlen=remembered)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    @property
    def seconds(self) -> float:
        """0.0 where nothing was measured yet: what is not known is tried, and given up in time."""
        return max(self._seconds, default=0.0)


def choose(left: float, here: bool, in_flight: float | None, new: float) -> Plan:
    """What to commit before leaving.

    `left`: seconds until the kill, infinite where nobody kills; `here`: whether the state of this very step is
    committed or in flight already; `in_flight`: seconds that the save in flight still needs, None where there is none;
    `new`: seconds of a save of this step from its start to its commit.
    """
    usable = (left - RESERVE) / SAFETY
    rest = in_flight or 0.0
    if here and in_flight is None:
        return "this step"
    if rest + (0.0 if here else new) <= usable:
        return "this step"
    if not here and in_flight is not None and rest <= usable:
        return "last snapshot"
    return "last checkpoint"
