"""Decide, after the last rank is gone, why this life ended and whether the job comes back.

The batch script calls it behind srun: `python -m slurm.requeue RUN EXIT_STATUS`. Not the ranks, because the requeue
ends them, and one that still writes would be killed; not a rank's exit handler, because a killed rank has none. Here
every rank has committed or is dead, and the scheduler can be asked whether the job was preempted or cancelled.

| why a life ended | how it is known | what follows (slurm/profile.py has the numbers) |
|---|---|---|
| finished | every rank says so | - |
| cancelled, stopped | scancel leaves the job COMPLETING; `radhpc stop` is what the ranks say | never comes back |
| preempted | every rank was interrupted, by SIGTERM or with PreemptTime set | comes back, without limit |
| time_limit | every rank was interrupted, by SIGUSR2 | comes back if this life left a new checkpoint |
| node_lost | SLURM has put the job back, or a rank is gone, and one of its nodes is down | comes back elsewhere |
| hung | the ranks' watchdogs (radhpc/distributed/watchdog.py) ended them and named the culprit | as a lost rank |
| rank_lost | a rank is gone without a word: killed, out of memory | `retries` times without a new checkpoint |
| crashed | a rank left a traceback | `crash_retries` times, and only while the traceback is new |
| failed | a rank says what the user has to mend, such as a full disk | stays down |

Whatever the causes, `lives_without_progress` lives in a row without a new checkpoint are the end ("gave_up"). A node
that is lost, or hangs, `node_losses` times is left out from then on, where enough others remain.
"""

import contextlib
import hashlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from radhpc.core.files import write_with_reserve
from radhpc.core.ownership.lease import Life, later_life, life_name
from radhpc.core.protocol import JOB_BEGINNINGS, LIFE_BEGINNINGS, REQUEUE_VERDICTS, Cause, Event, OutcomeState
from radhpc.core.run_folder import RunFolder
from slurm import compat_submitit, scheduler
from slurm.profile import Profile, load

# By weight: what one rank says outweighs what its peers say of the consequences.
_FAULTS = {
    OutcomeState.MISTAKE: Event.FAILED,
    OutcomeState.CRASHED: Event.CRASHED,
    OutcomeState.HUNG: Event.HUNG,
}
_LATE = 10.0  # seconds that a file may come late from another node
_SAID = (Event.FINISHED, Event.INTERRUPTED, Event.PRUNED)  # by rank 0, in the words of its outcome
_LOSSES = (Event.NODE_LOST, Event.RANK_LOST, Event.HUNG)


@dataclass(frozen=True)
class Decision:
    """The reason why a life ended, and what follows."""

    cause: Event
    requeue: bool
    why: str = ""
    nodes: tuple[str, ...] = ()  # that were lost, or on which a rank hung
    crash_signature: str = ""  # of a crash
    gave_up: str = ""  # why a cause that may come back does not


@dataclass(frozen=True)
class History:
    """The lives of a run since it was last submitted, up to the one that has just ended, as its events tell them."""

    fruitless: int = 0  # lives in a row that left no new checkpoint, this one included
    losses: int = 0  # of a rank, a node or patience since the last new checkpoint, before this life's end
    crashes: int = 0
    crash_signatures: frozenset[str] = frozenset()  # of the crashes since the last new checkpoint
    nodes: Mapping[str, int] = field(default_factory=dict)  # how often each was lost or hung, in the whole run


def history(events: Iterable[Mapping[str, Any]]) -> History:
    """Read a run's events when a life has ended and its end is not recorded yet."""
    best, progress = -1, False
    fruitless = losses = crashes = 0
    signatures: set[str] = set()
    nodes: Counter[str] = Counter()
    for event in events:
        name = event["event"]
        if name == Event.SAVED and event["step"] > best:
            best, progress = event["step"], True
            losses, signatures = 0, set()
        elif name == Event.SUBMITTED:  # a person has looked at it
            fruitless = losses = crashes = 0
            signatures, progress = set(), False
        elif name in REQUEUE_VERDICTS:
            fruitless, progress = 0 if progress else fruitless + 1, False
            losses += name in _LOSSES
            if name == Event.CRASHED:
                crashes += 1
                signatures.add(event.get("fingerprint", ""))
            nodes.update(event.get("nodes", ()))
    return History(0 if progress else fruitless + 1, losses, crashes, frozenset(signatures), dict(nodes))


def decide(
    job: Mapping[str, str],
    ends: Mapping[int, Mapping[str, Any]],
    world: int,
    exit_status: int,
    profile: Profile,
    history: History = History(),
    restarts: int = 0,
    down: Sequence[str] = (),
) -> Decision:
    """Apply the policy: a pure function.

    `job`: fields of scontrol; `ends`: what the ranks wrote on their way out; `restarts`: how often SLURM had started
    the job again before this life; `down`: nodes of the job that do not answer.
    """
    decision = _cause(job, ends, world, exit_status, restarts, tuple(down))
    if not decision.requeue:
        return decision
    refusal = _refusal(decision, profile, history)
    return replace(decision, requeue=refusal is None, gave_up=refusal or "")


def _cause(
    job: Mapping[str, str],
    ends: Mapping[int, Mapping[str, Any]],
    world: int,
    exit_status: int,
    restarts: int,
    down: tuple[str, ...],
) -> Decision:
    """Return why the life ended, and whether such a life may come back at all."""
    states = {end["state"] for end in ends.values()}
    causes = {end["cause"] for end in ends.values() if end["state"] == OutcomeState.INTERRUPTED}
    preempted = job.get("PreemptTime", "None") != "None"
    if states == {OutcomeState.FINISHED} and len(ends) == world:
        return Decision(Event.FINISHED, False)
    if len(ends) == world and states == {OutcomeState.PRUNED}:
        return Decision(Event.PRUNED, False)
    if job.get("JobState") in ("COMPLETING", "CANCELLED"):
        if int(job.get("Restarts", "0")) > restarts:
            why = "SLURM has put the job back into the queue by itself"
            return Decision(Event.NODE_LOST if down else Event.PREEMPTED, True, why, down)
        # scancel. A requeue would succeed at this moment, and bring a cancelled job back; PreemptTime may be set.
        return Decision(Event.CANCELLED, False)
    if Cause.STOP in causes:
        return Decision(Event.STOPPED, False)
    for state, cause in _FAULTS.items():
        own_ends = [end for _, end in sorted(ends.items()) if end["state"] == state]
        if not own_ends:
            continue
        why = own_ends[0]["cause"]
        if cause == Event.CRASHED:
            return Decision(Event.CRASHED, True, why, crash_signature=crash_signature(own_ends[0].get("traceback", "")))
        if cause == Event.HUNG:
            # A rank that never started has no host.
            hosts = {one["host"] for one in own_ends[0].get("culprits", ())} - {""}
            return Decision(Event.HUNG, True, why, tuple(sorted(hosts)))
        return Decision(Event.FAILED, False, why)
    if states == {OutcomeState.INTERRUPTED} and len(ends) == world:
        return Decision(Event.PREEMPTED if preempted or Cause.SIGUSR2 not in causes else Event.TIME_LIMIT, True)
    if preempted:
        return Decision(Event.PREEMPTED, True, "before all ranks had saved")
    missing = [str(rank) for rank in range(world) if rank not in ends]
    named = f"rank{'s' * (len(missing) > 1)} {', '.join(missing[:8])}{' and others' * (len(missing) > 8)}"
    why = f"{named} of {world} ended without a word, exit status {exit_status}"
    return (
        Decision(Event.NODE_LOST, True, f"{', '.join(down)}: {why}", down)
        if down
        else Decision(Event.RANK_LOST, True, why)
    )


def _refusal(decision: Decision, profile: Profile, history: History) -> str | None:
    """Return why a life that may come back does not, or None."""
    if not profile.requeue:
        return "the profile says requeue: false"
    if history.fruitless >= profile.lives_without_progress:
        return f"{history.fruitless} lives in a row have left no new checkpoint (lives_without_progress)"
    if decision.cause == Event.TIME_LIMIT and history.fruitless:
        return f"the time limit of {profile.minutes} minutes came before a new checkpoint; allow more minutes"
    if decision.cause in _LOSSES and history.losses >= profile.retries:
        return f"{history.losses + 1} losses without a new checkpoint (retries: {profile.retries})"
    if decision.cause == Event.CRASHED:
        if decision.crash_signature in history.crash_signatures:
            return "it has crashed at the same place since the last new checkpoint"
        if history.crashes >= profile.crash_retries:
            return f"{history.crashes + 1} crashes (crash_retries: {profile.crash_retries})"
    return None


def crash_signature(traceback: str) -> str:
    """Hash what two crashes at the same place share: the calls and the kind of error, not what it says of numbers."""
    calls = re.findall(r'^ *File "(.+?)", line (\d+), in (.+)$', traceback, re.MULTILINE)
    places = [f"{'/'.join(Path(file).parts[-2:])}:{line}:{function}" for file, line, function in calls]
    kinds = re.findall(r"^([\w.]+)(?::|$)", traceback, re.MULTILINE)
    return hashlib.sha256("\n".join([*places, *kinds[-1:]]).encode()).hexdigest()[:12]


def excluded_nodes(
    job: Mapping[str, str], decision: Decision, history: History, profile: Profile, usable: Sequence[str]
) -> str:
    """Return the job's new list of nodes to avoid, or "" where nothing changes.

    `usable`: nodes of its partition that could run it. None is left out if too few would remain.
    """
    named = set(scheduler.hostnames(job.get("ExcNodeList", "(null)").replace("(null)", "")))
    losses = Counter(history.nodes) + Counter(decision.nodes)
    bad = named | {node for node, count in losses.items() if count >= profile.node_losses}
    return ",".join(sorted(bad)) if bad > named and len(set(usable) - bad) >= profile.least_nodes else ""


def record_unseen_end(run: RunFolder) -> None:
    """Record, at the start of a life, the end of the one before if the batch script was killed with its ranks.

    Nobody has submitted the run since, so it is this very job that SLURM has started again.
    """
    events = run.events(Event.SUBMITTED, *LIFE_BEGINNINGS, *REQUEUE_VERDICTS, Event.FINISHED)
    if not events or events[-1]["event"] not in LIFE_BEGINNINGS:
        return
    last = events[-1]
    nodes = scheduler.hostnames(last.get("nodes", ""))
    since = datetime.fromisoformat(last["time"])
    gone = tuple(node for node in nodes if scheduler.node_restarted(node, since))
    if gone:
        run.record(Event.NODE_LOST, job=last["job"], why="and with it whoever could have said so", nodes=gone)
    else:
        run.record(Event.PREEMPTED, job=last["job"], why="the batch script was killed before it could say so")


def split_earlier_attempt(events: Sequence[dict[str, Any]], job_id: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the events without those that a failed first attempt at this decision recorded, and the names of those."""
    begun = max((n for n, event in enumerate(events) if event["event"] in JOB_BEGINNINGS), default=0)
    own = [event for event in events[begun:] if event["event"] in REQUEUE_VERDICTS and event.get("job") == job_id]
    return [event for event in events if event not in own], [event["event"] for event in own]


def read_ends(run: RunFolder, world: int, exit_status: int, patience: float | None = None) -> dict[int, dict[str, Any]]:
    """Return what the ranks of this life have written on their way out.

    Another node's files may come seconds late. Where srun says that all ranks ended well, they are waited for longer,
    and what rank 0 has recorded last stands for those that do not come.
    """
    if patience is None:
        patience = _LATE if exit_status == 0 else _LATE / 5
    until = time.monotonic() + patience
    while True:
        ends = {rank: end for rank, end in run.ends().items() if end.get("life") in (None, "", life_name())}
        if len(ends) >= world or time.monotonic() >= until:
            break
        time.sleep(min(0.5, patience))
        for rank in range(world):  # asks for the very name, where a listing may come from a client's memory
            with contextlib.suppress(OSError), open(run.end_path(rank), "rb"):
                pass
    words = run.events(*LIFE_BEGINNINGS, *_SAID)
    if exit_status == 0 and len(ends) < world and words and words[-1]["event"] in _SAID:
        last = words[-1]
        spoken = {"state": str(last["event"]), "cause": last.get("cause", ""), "step": last.get("step", 0)}
        ends = {rank: ends.get(rank, spoken) for rank in range(world)}
    return ends


def main(run_path: str, exit_status: int) -> None:
    """Decide, record, and requeue if so decided. The batch script calls it once more where it fails."""
    run = RunFolder.open(run_path)
    profile = load(str(run.path / "profile.yaml"))
    job_id = os.environ["SLURM_JOB_ID"]
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = (
        f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job_id
    )  # the array's id alone means all elements
    owner, life = run.job(), Life.here(None, job_id)
    if not life.owns(owner) or later_life(run.path, life):
        print(f"slurm.requeue: {run.path} belongs to another job or a later life: nothing is decided", file=sys.stderr)
        return

    def record(event: Event, **details: Any) -> None:
        write_with_reserve(run.reserve_path("decision"), lambda: run.record(event, **details))

    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    earlier, recorded = split_earlier_attempt(run.events(), job_id)
    job, before = scheduler.own_job(name), history(earlier)
    down = scheduler.down_nodes(os.environ.get("SLURM_JOB_NODELIST", ""))
    world = int(os.environ["SLURM_JOB_NUM_NODES"]) * profile.tasks_per_node  # of this life: `nodes` may be a range
    ends = read_ends(run, world, exit_status)
    if owner is not None and not owner.get("id"):
        record(Event.FAILED, job=job_id, why="its submission was cut short, so that no rank could start")
        return
    decision = decide(job, ends, world, exit_status, profile, before, restarts, down)
    step = max((end["step"] for end in ends.values()), default=0)
    if decision.cause not in (Event.FINISHED, Event.PRUNED, *recorded):
        more: dict[str, Any] = {"nodes": decision.nodes} if decision.nodes else {}
        more |= {"fingerprint": decision.crash_signature} if decision.crash_signature else {}
        record(decision.cause, job=job_id, step=step, why=decision.why, **more)
    with contextlib.suppress(OSError):  # the log may lie on a full disk
        print(
            f"slurm.requeue: {decision.cause} {decision.why} {decision.gave_up}".rstrip(), file=sys.stderr, flush=True
        )
    if decision.gave_up and profile.requeue:
        record(Event.GAVE_UP, job=job_id, after=decision.cause, why=decision.gave_up)
    put_back = int(job.get("Restarts", "0")) > restarts
    if not decision.requeue:
        if put_back and decision.gave_up:
            with contextlib.suppress(scheduler.NoAnswer):
                scheduler.cancel({"id": name})
        return
    compat_submitit.remove_partial_results(run.path / "logs")
    record(Event.REQUEUED, job=job_id, cause=decision.cause)
    if not put_back and (refused := scheduler.requeue(name)):
        record(Event.FAILED, job=job_id, why=f"scontrol requeue: {refused}")
        return
    # Only a job that does not run can be told to stay away from a node. The requeue has sent this script a SIGTERM,
    # which it ignores; SIGKILL follows after KillWait.
    away = excluded_nodes(job, decision, before, profile, scheduler.usable_nodes(job.get("Partition", "")))
    if away and scheduler.exclude_nodes(name, away):
        record(Event.EXCLUDED, job=job_id, nodes=away.split(","))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
