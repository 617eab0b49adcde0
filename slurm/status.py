"""Where a run stands, read from its folder and from the scheduler."""

import time
from datetime import datetime
from typing import Any

from radhpc.files import read_json
from radhpc.run_dir import RunDir
from slurm import scheduler

_ENDED = {
    "finished": "finished", "stopped": "stopped", "cancelled": "stopped", "failed": "failed", "crashed": "failed",
    "interrupted": "stopped", "rank_lost": "failed", "preempted": "stopped", "time_limit": "stopped",
    "pruned": "stopped",
}  # fmt: skip
_RESTARTS = ("preempted", "time_limit", "rank_lost")


def status(run: RunDir) -> dict[str, Any]:
    """The keys of `launch.py status --json`: state, cause, stage, step, loss, restarts by cause and others."""
    events = run.events()
    progress = run.progress()
    now = time.time()
    living = scheduler.state(run.job())
    ends = [event for event in events if event["event"] in _ENDED]
    last = ends[-1] if ends else None
    if living:
        state = "pending" if living in ("PENDING", "REQUEUED", "CONFIGURING") else "running"
    elif last is not None and events.index(last) > max(
        (n for n, e in enumerate(events) if e["event"] == "started"), default=-1
    ):
        state = _ENDED[last["event"]]
    else:
        state = "failed"  # the job is gone and has not said a word
    saved = [event for event in events if event["event"] == "saved"]
    return {
        "run": str(run.path),
        "state": state,
        "cause": "" if last is None else last.get("cause") or last.get("why") or last["event"],
        "stage": progress.get("stage"),
        "step": progress.get("step", 0),
        "steps": progress.get("steps"),
        "loss": progress.get("loss"),
        "samples_per_second": progress.get("samples_per_second") if state == "running" else 0.0,
        "checkpoint_step": saved[-1]["step"] if saved else None,
        "checkpoint_age_seconds": round(now - _seconds(saved[-1]), 1) if saved else None,
        "restarts": {cause: sum(event["event"] == cause for event in events) for cause in _RESTARTS},
        "goodput": goodput(events, now),
        "evaluation": _newest_evaluation(run),
    }


def goodput(events: list[dict[str, Any]], now: float) -> float | None:
    """The share of the ranks' time that led to a checkpoint that was kept: seconds from each start to its last save,
    over seconds from each start to its end.
    """
    useful = total = 0.0
    started = saved = end = None
    for event in [*events, None]:
        if event is None or event["event"] == "started":
            if started is not None:
                closing = end or (now if event is None else saved or started)
                total += closing - started
                useful += (saved or started) - started
            if event is not None:
                started, saved, end = _seconds(event), None, None
        elif event["event"] == "saved":
            saved = _seconds(event)
        elif event["event"] in _ENDED:
            end = _seconds(event)
    return round(useful / total, 3) if total else None


def _seconds(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _newest_evaluation(run: RunDir) -> dict[str, Any] | None:
    found = sorted((run.path / "evaluation").glob("step-*/scores.json"))
    if not found:
        return None
    scores = read_json(found[-1])
    return {"step": scores["step"], "split": scores["split"], **{n: s["value"] for n, s in scores["scores"].items()}}
