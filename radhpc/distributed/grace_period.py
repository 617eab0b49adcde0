"""Decide what a run can still commit in the grace period between a signal and the kill. Pure arithmetic.

training/async_checkpoint.py acts on it.

choose(left=28.0, current_saved=False, in_flight=None, new_save=11.0)   # "this step"
choose(left=12.0, current_saved=False, in_flight=4.0, new_save=11.0)    # "last snapshot": the save in flight can land
choose(left=5.0, current_saved=False, in_flight=None, new_save=11.0)    # "last checkpoint": nothing new can land
"""

from collections import deque
from collections.abc import Iterable
from typing import Literal

RESERVE = 3.0  # seconds: the ranks end, then slurm.requeue asks the scheduler and puts the job back
SAFETY = 1.25  # times what was measured

Plan = Literal["this step", "last snapshot", "last checkpoint"]


class RecentMaximum:
    """A pessimistic running estimate of a duration: the largest of the last few, as deadlines need."""

    def __init__(self, seconds: Iterable[float] = (), remembered: int = 5) -> None:
        self._seconds = deque(seconds, maxlen=remembered)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    @property
    def seconds(self) -> float:
        """Return the estimate, 0.0 before the first measurement: an unknown save is tried, and cancelled in time."""
        return max(self._seconds, default=0.0)


def choose(left: float, current_saved: bool, in_flight: float | None, new_save: float) -> Plan:
    """Choose what to commit before leaving.

    `left`: seconds until the kill, infinite where nobody kills; `current_saved`: whether the state of this very step is
    committed or in flight already; `in_flight`: seconds that the save in flight still needs, None where there is none;
    `new_save`: seconds of a save of this step from its start to its commit.
    """
    usable = (left - RESERVE) / SAFETY
    pending = in_flight or 0.0
    if current_saved and in_flight is None:
        return "this step"
    if pending + (0.0 if current_saved else new_save) <= usable:
        return "this step"
    if not current_saved and in_flight is not None and pending <= usable:
        return "last snapshot"
    return "last checkpoint"
