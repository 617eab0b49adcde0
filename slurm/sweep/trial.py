"""Connect a run to the sweep that it is a trial of: what radhpc.worker asks of the sweep while it trains.

trial = SweepTrial.of("runs/sweep-1/trials/0007")     # None for a run that belongs to no sweep
trial.should_prune(step=100)
"""

from pathlib import Path

from slurm.sweep.definition import Scalar
from slurm.sweep.study import SweepStudy, is_sweep


class SweepTrial:
    """A run's trial in its sweep, as radhpc.worker uses it."""

    def __init__(self, run: Path) -> None:
        self._study, self._number = SweepStudy(run.parent.parent), int(run.name)

    @classmethod
    def of(cls, run: str) -> "SweepTrial | None":
        """Return the trial of a run folder; None for a run that belongs to no sweep."""
        path = Path(run).absolute()
        inside = path.parent.name == "trials" and path.name.isdecimal() and is_sweep(path.parent.parent)
        return cls(path) if inside else None

    @property
    def metric(self) -> str:
        return self._study.sweep.metric

    def parameters(self) -> dict[str, Scalar]:
        """Return the drawn parameters by key, as tables show them."""
        drawn = self._study.parameters(self._number)
        return {key: self._study.sweep.space[key].label(value) for key, value in drawn.items()}

    def should_prune(self, step: int) -> bool:
        """Report, and ask whether to save and end here; called on rank 0 after an evaluation."""
        return self._study.should_prune(self._number, step)

    def close(self) -> None:
        """Tell the study how the run stands."""
        self._study.report(self._number)
