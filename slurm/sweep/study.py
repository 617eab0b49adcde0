"""Keep a sweep's folder: the parameters of its trials, their results, and the decision to prune.

    sweep.yaml    the frozen sweep             trials/0007/  an ordinary run folder for each trial
    base.yaml     the recipe they start from   jobs.json     the job that each trial was given last
    journal.log   Optuna's study               logs/         of the array's batch scripts
    best.yaml     the best recipe so far       profiles/     where it was submitted to, each time

Optuna decides what to try and what to end early; the run folders are the truth about what came of it, and the study is
told from them again and again, so that a job killed anywhere loses nothing. All processes of all nodes share the
journal: a file, locked by a link, which NFS has made atomically since its second version.

    study = SweepStudy.create(Path("runs/sweep-1"), sweep, base)
    run = study.prepare(7)            # draws the parameters of trial 7, once and for all
    study.standing()["best"]
"""

import contextlib
import math
import os
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radhpc.core import recipe as recipes
from radhpc.core.errors import UserError, nearest
from radhpc.core.files import read_json, write_atomically
from radhpc.core.ownership.folder_lock import beside, hold
from radhpc.core.protocol import Event
from radhpc.core.recipe import Recipe, read_yaml, validate
from radhpc.core.run_folder import RunFolder
from slurm import compat_optuna
from slurm.sweep.definition import Scalar, Sweep

if TYPE_CHECKING:
    import optuna

_NAME = "sweep"  # of the one study in the journal
_CHANGEABLE = ("concurrent", "trials")  # keys that a sweep may change in its life; trials upwards


class SweepStudy:
    """One sweep, from its folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    # The folder

    @classmethod
    def create(cls, path: Path, sweep: Sweep, base: Recipe) -> "SweepStudy":
        """Make the folder, or go on with the one that is there. Raises UserError where that is another sweep."""
        with hold(beside(path), "sweep", 60):
            return cls._create(path, sweep, base)

    @classmethod
    def _create(cls, path: Path, sweep: Sweep, base: Recipe) -> "SweepStudy":
        study, frozen = cls(path), sweep.model_copy(update={"recipe": "base.yaml", "overrides": ()})
        if is_sweep(path):
            if why := study.difference(sweep, base):
                raise UserError(f"{path}: another sweep is there: {why}; name another folder with --sweep")
            frozen = (
                frozen.model_copy(update={"trials": max(sweep.count, study.sweep.count)}) if sweep.trials else frozen
            )
        else:
            try:
                study.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                if {file.name for file in study.path.iterdir()} - {"base.yaml", "trials", "logs"}:  # half made
                    raise UserError(f"{path}: the folder is not empty, and no sweep; name another one with --sweep")
                study.path.chmod(0o700)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from error
            write_atomically(study.path / "base.yaml", base.to_yaml().encode())
        for name in ("trials", "logs"):
            (study.path / name).mkdir(mode=0o700, exist_ok=True)
        write_atomically(study.path / "sweep.yaml", frozen.to_yaml().encode())
        study.__dict__.pop("sweep", None)
        study._fill()
        return study

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "SweepStudy":
        """Open an existing sweep. Raises UserError where there is none."""
        if not is_sweep(Path(path)):
            beside = [p.parent.name for p in Path(path).absolute().parent.glob("*/sweep.yaml")]
            raise UserError(f"{path}: no sweep there (no sweep.yaml){nearest(Path(path).name, beside)}")
        return cls(path)

    def difference(self, sweep: Sweep, base: Recipe) -> str:
        """Return why this folder belongs to another sweep, or an empty string."""
        own = self.sweep.model_dump(mode="json", exclude={"recipe", "overrides", *_CHANGEABLE})
        theirs = sweep.model_dump(mode="json", exclude={"recipe", "overrides", *_CHANGEABLE})
        keys = [key for key in own if own[key] != theirs[key]]
        if keys:
            return f"its '{keys[0]}' is another"
        return "" if self.base == base else "its recipe is another"

    @cached_property
    def sweep(self) -> Sweep:
        return validate(Sweep, read_yaml(self.path / "sweep.yaml"), self.path / "sweep.yaml")

    @cached_property
    def base(self) -> Recipe:
        return recipes.load(self.path / "base.yaml")

    def run_path(self, number: int) -> Path:
        """Return the run folder of a trial, there or not."""
        return self.path / "trials" / f"{number:04d}"

    # Parameters

    @cached_property
    def _storage(self) -> "optuna.storages.JournalStorage":
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = str(self.path / "journal.log")
        # A holder that was killed is waited for half a minute; the path is absolute, because the link is followed.
        lock = JournalFileSymlinkLock(journal)
        _mend(Path(journal), lock)
        return optuna.storages.JournalStorage(JournalFileBackend(journal, lock))

    def _optuna(self, number: int = 0) -> "optuna.Study":
        """Load the study with its sampler and its pruner.

        The sampler's random numbers are a function of the sweep's seed and the trial's number: not of the process that
        asks, nor of when a preempted one asks again.
        """
        import optuna

        seed = (self.sweep.seed * 1_000_003 + number) % 2**32
        sampler: optuna.samplers.BaseSampler
        if self.sweep.method == "tpe":
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # trials side by side keep apart
        else:
            sampler = optuna.samplers.RandomSampler(seed=seed)
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if asha := self.sweep.pruner:
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=asha.min_steps, reduction_factor=asha.reduction, min_early_stopping_rate=0
            )
        return optuna.load_study(study_name=_NAME, storage=self._storage, sampler=sampler, pruner=pruner)

    def _fill(self) -> None:
        """Give every trial its place in the study; those of a grid their parameters, too."""
        import optuna

        with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
            directions = optuna.study.StudyDirection
            direction = directions.MAXIMIZE if self.sweep.maximizes else directions.MINIMIZE
            optuna.create_study(study_name=_NAME, storage=self._storage, direction=direction)
        study, grid = self._optuna(), self.sweep.grid() if self.sweep.method == "grid" else None
        for number in range(len(study.get_trials(deepcopy=False)), self.sweep.count):
            study.enqueue_trial(grid[number] if grid else {})

    def parameters(self, number: int) -> dict[str, Scalar]:
        """Return the parameters of a trial: drawn when it is asked for the first time, from what is known by then."""
        study = self._optuna(number)
        frozen = study.get_trials(deepcopy=False)[number]
        if frozen.state.is_finished():
            return dict(frozen.params)
        # Of this trial and no other: a job that comes back finds what it had drawn before.
        trial = compat_optuna.claim(study, self._storage, frozen)
        return {key: _draw(trial, key, axis) for key, axis in self.sweep.space.items()}

    def frozen_trials(self) -> "list[optuna.trial.FrozenTrial]":
        """Return the study's trials in the order of their numbers."""
        return self._optuna().get_trials(deepcopy=False)

    def prepare(self, number: int) -> RunFolder:
        """Return the run of a trial, made with its frozen recipe where it is not there yet."""
        path = self.run_path(number)
        if (path / "recipe.yaml").exists():
            return RunFolder(path)
        if path.exists():
            shutil.rmtree(path)  # a job was killed while it made it: there is no recipe, so nothing was trained
        overrides = self.sweep.trial_overrides(self.parameters(number))
        data = self.base.model_dump(mode="json")
        return RunFolder.create(path, recipes.build(data, overrides, path))

    # Results

    def report(self, number: int) -> None:
        """Tell the study what the run folder says: every score so far, and how the trial ended if it has."""
        from optuna.exceptions import UpdateFinishedTrialError

        with contextlib.suppress(UpdateFinishedTrialError):  # another job has settled it at this moment
            self._report(number)

    def _report(self, number: int) -> None:
        from optuna.trial import TrialState

        study, values = self._optuna(), scores(self.run_path(number), self.sweep.metric, self.base.evaluation.split)
        frozen = study.get_trials(deepcopy=False)[number]
        if frozen.state != TrialState.RUNNING:
            return
        for step, value in values.items():
            if step not in frozen.intermediate_values:  # after a resume a step may be evaluated again
                compat_optuna.report(self._storage, frozen, step, value)
        ends = {event["event"] for event in RunFolder(self.run_path(number)).events(Event.FINISHED, Event.PRUNED)}
        if Event.FINISHED in ends:
            last = list(values.values())[-1] if values else math.nan
            if math.isnan(last):
                study.tell(number, state=TrialState.FAIL, skip_if_finished=True)  # at its end, but without a score
            else:
                study.tell(number, last, skip_if_finished=True)
        elif Event.PRUNED in ends:
            study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def should_prune(self, number: int, step: int) -> bool:
        """Return whether the trial ends at this step. A yes is kept: a job killed before it has saved asks again."""
        self.report(number)
        study = self._optuna()
        frozen = study.get_trials()[number]
        if frozen.state.is_finished():
            return False
        if "pruned_at" in frozen.user_attrs:
            return True
        if not study.pruner.prune(study, frozen):
            return False
        compat_optuna.set_attribute(self._storage, frozen, "pruned_at", step)
        return True

    def settle(self) -> None:
        """Tell the study how all trials ended, also those whose job was killed before it could say so."""
        for number, frozen in enumerate(self._optuna().get_trials(deepcopy=False)):
            if frozen.state.name == "RUNNING" and self.run_path(number).exists():
                self.report(number)


def is_sweep(path: Path) -> bool:
    """Return whether a folder is a sweep's."""
    return (path / "sweep.yaml").exists()


def scores(run: Path, metric: str, split: str) -> dict[int, float]:
    """Return step and value of each evaluation of a run so far, in the order of steps.

    Raises UserError for a score that its evaluations do not have.
    """
    values = {}
    for path in (run / "evaluation").glob("step-*/scores.json"):
        evaluation = read_json(path) if re.fullmatch(r"step-\d+", path.parent.name) else None
        if evaluation is None or evaluation["split"] != split:
            continue
        if metric not in evaluation["scores"]:
            raise UserError(f"metric '{metric}': {path} does not have it; it has {', '.join(evaluation['scores'])}")
        values[int(evaluation["step"])] = float(evaluation["scores"][metric]["value"])
    return dict(sorted(values.items()))


def _draw(trial: "optuna.Trial", key: str, axis: Any) -> Scalar:
    """Draw a value of an axis, or give what was drawn before."""
    if axis.values is not None:
        value: Scalar = trial.suggest_categorical(key, axis.corners())
        return value
    if axis.whole:
        return trial.suggest_int(key, axis.low, axis.high, step=axis.step or 1, log=axis.log)
    return trial.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log)


def _mend(journal: Path, lock: Any) -> None:
    """Cut off a last line that a full disk left without its end: the next line would be glued to it."""
    try:
        if not journal.exists() or _whole(journal):
            return
    except OSError:
        return
    lock.acquire()
    try:
        if not _whole(journal):
            data = journal.read_bytes()
            os.truncate(journal, data.rfind(b"\n") + 1)
    finally:
        lock.release()


def _whole(journal: Path) -> bool:
    with journal.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
