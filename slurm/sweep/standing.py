"""Tell where a sweep stands: the state and the score of each trial, which is best, and whose jobs live.

    summary(study)["best"]          # {"run": ".../trials/0007", "value": 4.61, "parameters": {...}, ...}
    live_states(study)               # {3: "RUNNING", 4: "PENDING"}

The run folders are the truth about what became of a trial, and the scheduler about what still lives.
"""

import math
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.files import read_json, write_atomically
from radhpc.core.protocol import LIFE_ENDS, Event, RunState
from radhpc.core.run_folder import RunFolder
from slurm import scheduler
from slurm.sweep.study import SweepStudy, scores

_STOPPED = tuple(name for name, state in LIFE_ENDS.items() if state == RunState.STOPPED)


def summary(study: SweepStudy) -> dict[str, Any]:
    """Return the keys of `status SWEEP --json`: sweep, trials (best first) and best; best.yaml is written beside it."""
    study.settle()
    frozen, living = study.frozen_trials(), live_states(study)
    trials = [_trial(study, number, frozen[number].params, living.get(number, "")) for number in range(len(frozen))]
    sign = -1 if study.sweep.maximizes else 1
    order = {RunState.FINISHED: 0, RunState.PRUNED: 2}

    def rank(trial: dict[str, Any]) -> tuple[float, ...]:
        if trial["value"] is None:
            return 3, 0, trial["number"]
        return order.get(trial["state"], 1), sign * trial["value"], trial["number"]

    trials.sort(key=rank)
    best = next((trial for trial in trials if trial["state"] == RunState.FINISHED and trial["value"] is not None), None)
    if best is not None:
        write_atomically(study.path / "best.yaml", Path(best["recipe"]).read_bytes())
    return {
        "sweep": str(study.path),
        "metric": study.sweep.metric,
        "direction": "maximize" if study.sweep.maximizes else "minimize",
        "trials": trials,
        "best": best,
        "best_recipe": str(study.path / "best.yaml") if best else None,
    }


def _trial(study: SweepStudy, number: int, parameters: dict[str, Any], living: str) -> dict[str, Any]:
    run = RunFolder(study.run_path(number))
    values = scores(run.path, study.sweep.metric, study.base.evaluation.split)
    last = list(values.items())[-1] if values else None
    state, why = trial_state(study, number, living)
    progress = run.progress()
    return {
        "number": number,
        "run": str(run.path),
        "state": state,
        "why": why,
        "value": None if last is None or math.isnan(last[1]) else last[1],
        "value_step": None if last is None else last[0],
        "step": progress.get("step", 0),
        "steps": progress.get("steps"),
        "parameters": {key: study.sweep.space[key].original_value(value) for key, value in parameters.items()},
        "labels": {key: study.sweep.space[key].label(value) for key, value in parameters.items()},
        "recipe": str(run.recipe_path) if run.recipe_path.exists() else None,
    }


def trial_state(study: SweepStudy, number: int, living: str) -> tuple[RunState, str]:
    """Return a trial's state and why; `living`: SLURM's state of its job, as `live_states` gives it."""
    run = RunFolder(study.run_path(number))
    events = run.events() if run.path.exists() else []
    names = [event["event"] for event in events]
    for end in (Event.FINISHED, Event.PRUNED):
        if end in names:
            return RunState(end), ""
    if living:
        waits = living in scheduler.WAITING
        return RunState.PENDING if waits else RunState.RUNNING, ""
    if not run.recipe_path.exists():
        job = submitted_jobs(study).get(run.path.name, {}).get("id")
        return RunState.MISSING, f"job {job} ended before it began; logs/{job}_0_log.err says why" if job else ""
    last = next(
        (event for event in reversed(events) if event["event"] in (*LIFE_ENDS, Event.SUBMITTED, Event.STARTED)),
        None,
    )
    if last is None:
        return RunState.MISSING, "its parameters are drawn, but no job was given to it"
    if last["event"] not in LIFE_ENDS:
        return RunState.FAILED, "its job is gone without a word"
    why = str(last.get("why") or last.get("cause") or last["event"])
    return (RunState.STOPPED if last["event"] in _STOPPED else RunState.FAILED), why


def submitted_jobs(study: SweepStudy) -> dict[str, dict[str, Any]]:
    """Return the job that each trial was given last, by the name of its folder."""
    return read_json(study.path / "jobs.json") or {}


def live_states(study: SweepStudy) -> dict[int, str]:
    """Return number and SLURM's state of each trial whose job is in the queue or runs."""
    return {number: state for number, (_, state) in live_jobs(study).items()}


def live_jobs(study: SweepStudy) -> dict[int, tuple[dict[str, Any], str]]:
    """Return the job, as in job.json, and SLURM's state of each trial whose job is in the queue or runs."""
    candidates = []
    for number in range(study.sweep.count):
        run = RunFolder(study.run_path(number))
        for job in (run.job() if run.path.exists() else None, submitted_jobs(study).get(run.path.name)):
            if job is not None:
                candidates.append((number, job))
    living: dict[int, tuple[dict[str, Any], str]] = {}
    for (number, job), entry in zip(candidates, scheduler.queue_entries([job for _, job in candidates]), strict=True):
        if entry.problem and job["cluster"] == "slurm":
            raise UserError(entry.problem)  # who does not know what lives must not submit it again
        if entry.living:
            living.setdefault(number, (job, entry.state))
    return living
