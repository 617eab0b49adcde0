"""After the last rank is gone: why did this life end, and does the job come back?

The batch script calls it behind srun: `python -m slurm.requeue RUN EXIT_STATUS`. Not the ranks, because the requeue
ends them, and one that still writes would be killed; not a rank's exit handler, because a killed rank has none. Here
every rank has committed or is dead, and the scheduler can be asked whether the job was preempted or cancelled.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from radhpc.files import read_json
from radhpc.run_dir import Event, RunDir
from slurm import scheduler
from slurm.profile import Profile, load


@dataclass(frozen=True)
class Verdict:
    """Why a life ended and what follows."""

    cause: Event
    comes_back: bool
    why: str = ""


def decide(
    job: dict[str, str],
    ends: list[dict[str, Any]],
    world: int,
    exit_status: int,
    profile: Profile,
    losses: int,
    restarts: int = 0,
) -> Verdict:
    """The policy, as a pure function.

    `job`: fields of scontrol; `ends`: what the ranks wrote on their way out; `losses`: lives lost to dead ranks since
    the last new checkpoint, this one included; `restarts`: how often SLURM had started the job again before this life.
    """
    states = {end["state"] for end in ends}
    causes = {end["cause"] for end in ends if end["state"] == "interrupted"}
    said = next((end["cause"] for end in ends if end["state"] in ("mistake", "crashed")), "")
    if "finished" in states and len(ends) == world and states == {"finished"}:
        return Verdict("finished", False)
    if len(ends) == world and states == {"pruned"}:
        return Verdict("pruned", False)
    if job.get("JobState") in ("COMPLETING", "CANCELLED"):
        if int(job.get("Restarts", "0")) > restarts:
            return Verdict("preempted", False, "SLURM has put the job back into the queue by itself")
        # scancel. A requeue would succeed at this moment, and bring a cancelled job back; PreemptTime may be set.
        return Verdict("cancelled", False)
    if "stop" in causes:
        return Verdict("stopped", False)
    if "mistake" in states:
        return Verdict("failed", False, said)
    if "crashed" in states:
        return Verdict("crashed", False, said)
    if states == {"interrupted"} and len(ends) == world:
        preempted = job.get("PreemptTime", "None") != "None" or "SIGUSR2" not in causes
        return Verdict("preempted" if preempted else "time_limit", profile.requeue)
    if job.get("PreemptTime", "None") != "None":
        return Verdict("preempted", profile.requeue, "before all ranks had saved")
    why = f"{world - len(ends)} of {world} ranks ended without a word, exit status {exit_status}"
    return Verdict("rank_lost", profile.requeue and losses <= profile.retries, why)


def losses(run: RunDir) -> int:
    """Lives lost to dead ranks since the last new checkpoint."""
    count = 0
    for event in run.events("rank_lost", "saved"):
        count = count + 1 if event["event"] == "rank_lost" else 0
    return count


def main(run_path: str, exit_status: int) -> None:
    """Decide, record, and requeue if so decided."""
    run = RunDir.open(run_path)
    profile = load(str(run.path / "profile.yaml"))
    job_id = os.environ["SLURM_JOB_ID"]
    found = [read_json(path) for path in sorted((run.path / "logs").glob("end.rank-*.json"))]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    verdict = decide(scheduler.show_job(job_id), found, profile.world, exit_status, profile, losses(run) + 1, restarts)
    step = max((end["step"] for end in found), default=0)
    if verdict.cause not in ("finished", "pruned"):
        run.record(verdict.cause, job=job_id, step=step, why=verdict.why)
    print(f"slurm.requeue: {verdict.cause} {verdict.why}", file=sys.stderr, flush=True)
    if not verdict.comes_back:
        return
    for left in (run.path / "logs").glob("*.save_tmp"):
        left.unlink()  # submitit refuses to write a result where a killed rank left half of one
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job_id
    run.record("requeued", job=job_id, cause=verdict.cause)
    done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
    if done.returncode:
        run.record("failed", job=job_id, why=f"scontrol requeue: {done.stderr.strip()}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
