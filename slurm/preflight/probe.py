"""Submit a job of two minutes that sees what only a job can see: `radhpc doctor --on PROFILE --probe`.

    checks = run_probe(profile, Path("runs"), urls=["s3://bucket/padchest"], preempt_with="urgent")

It takes the line of a training: the profile, the frozen code, submitit, srun, slurm.job. Its ranks (radhpc/probe.py)
write what they measure and every signal they get until they are killed: by the time limit, or, because a preemption
cannot be provoked without a second job, by one that `preempt_with` names the partition for. Leaves checks as doctor.py.
"""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import submitit

from radhpc.core.errors import UserError
from radhpc.core.files import read_lines, write_atomically
from radhpc.core.run_folder import RunFolder
from slurm import frozen_code, job as slurm_job, scheduler
from slurm.profile import Profile
from slurm.submission import refusals_as_user_errors
from slurm.submit import executor, host_python, slurm_parameters, submission_environment

Check = dict[str, Any]
MINUTES = 2  # SLURM may send the warning a minute early, and the ranks want half a minute to be ready for it
WARNING = 30  # seconds before the time limit at which --signal asks for SIGUSR2
URGENT_MINUTES = 1
CLOCK_SECONDS = 1.0  # by which the nodes' clocks may differ
JOIN_SECONDS = 60.0


def run_probe(
    profile: Profile,
    folder: Path,
    urls: Sequence[str] = (),
    preempt_with: str | None = None,
    patience: float = 900,
    progress: Callable[[str], None] = lambda phase: None,
) -> list[Check]:
    """Submit, wait until the job is gone, and judge. Raises UserError where it cannot be submitted or does not start.

    `patience`: seconds to wait for it to start. Every file is left in `folder`/probe-DATE for a look.
    """
    if preempt_with is not None and profile.cluster != "slurm":
        raise UserError(
            f"--preempt-with {preempt_with}: only SLURM preempts; the profile's cluster is {profile.cluster}"
        )
    run = _prepare(profile, folder, urls)
    short = profile.model_copy(update={"minutes": MINUTES, "signal_seconds": WARNING, "requeue": False})
    with submission_environment(run, short), refusals_as_user_errors():
        job = _submit(run, short)
    owner = {"cluster": profile.cluster, "id": str(job.job_id), "environment": profile.environment}
    submitted = time.time()
    urgent: list[str] = []
    why = ""
    try:
        _wait(run, owner, job, preempt_with, urgent, profile, patience, progress)
    finally:
        (run.path / "probe" / "end").touch()  # should a rank still live
        if profile.cluster == "slurm":
            why = _why_not_preempted(owner, urgent)
            for left in (owner, *({**owner, "id": job_id} for job_id in urgent)):
                if scheduler.state(left):
                    scheduler.cancel(left)
    checks = judge(_lines(run), profile, submitted, None if why else preempt_with)
    if why:
        checks[-1] = {**checks[-1], "ok": False, "found": why, "wanted": "a partition whose jobs preempt these"}
    return checks


def _why_not_preempted(owner: dict[str, Any], urgent: list[str]) -> str:
    """Return why an urgent job did not preempt the probe; "" where it did, or where there was none."""
    environment = owner["environment"]
    if not urgent or scheduler.show_job(owner["id"], environment).get("PreemptTime", "None") != "None":
        return ""
    shown = scheduler.show_job(urgent[0], environment)
    if shown.get("JobState") == "PENDING":
        return f"not preempted: the urgent job waits for {shown.get('Reason', '?')}"
    return "not preempted: the urgent job got its nodes only when the probe was over"


def _prepare(profile: Profile, folder: Path, urls: Sequence[str]) -> RunFolder:
    run = RunFolder(folder / f"probe-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        (run.path / "probe").mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise UserError(f"{run.path}: {error.strerror}") from error
    run.path.chmod(0o700)
    write_atomically(run.path / "probe" / "ask.json", json.dumps({"urls": list(urls)}).encode(), 0o600)
    frozen_code.freeze(run.code, profile.python is None and profile.container is None)
    return run


def _submit(run: RunFolder, profile: Profile) -> submitit.Job[Any]:
    made = executor(run, profile)
    if isinstance(made, submitit.SlurmExecutor):
        # Nothing is decided when the ranks are gone: this job does not come back.
        made.update_parameters(**{**slurm_parameters(run, profile, host_python(profile)), "teardown": []})
    job = made.submit(slurm_job.probe, str(run.path))
    if profile.cluster == "inline":
        (run.path / "probe" / "end").touch()
        job.result()
    return job


def _wait(
    run: RunFolder,
    owner: dict[str, Any],
    job: submitit.Job[Any],
    preempt_with: str | None,
    urgent: list[str],
    profile: Profile,
    patience: float,
    progress: Callable[[str], None],
) -> None:
    """Wait until the job is gone; when all ranks have measured, send the urgent job and put its id into `urgent`."""
    deadline = time.monotonic() + patience
    while True:
        lines = _lines(run)
        measured = sum(any(line["what"] == "measured" for line in rank) for rank in lines.values())
        alive = scheduler.state(owner) if profile.cluster == "slurm" else "" if job.done() else "RUNNING"
        progress(f"{alive.lower() or 'gone'}, {measured} of {profile.world} ranks have measured")
        if not alive:
            return
        if measured == profile.world and profile.cluster != "slurm":
            (run.path / "probe" / "end").touch()
        if measured == profile.world and preempt_with is not None and not urgent:
            urgent.append(_preempt(profile, preempt_with))
        if not lines and time.monotonic() > deadline:
            reason = scheduler.show_job(owner["id"], profile.environment).get("Reason", "?")
            raise UserError(f"the probe did not start in {patience:.0f} s: job {owner['id']} waits for {reason}")
        time.sleep(0.5)


def _preempt(profile: Profile, partition: str) -> str:
    """Send an urgent job that wants all of the probe's nodes for a moment; returns its id."""
    command = [
        "sbatch", "--parsable", f"--partition={partition}", f"--nodes={profile.most_nodes}", "--exclusive",
        f"--time={URGENT_MINUTES}", "--job-name=urgent", "--output=/dev/null", "--no-requeue", "--wrap", "sleep 2",
    ]  # fmt: skip
    if profile.account:
        command.insert(1, f"--account={profile.account}")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=scheduler.clean_environment(profile.environment)
    )
    if done.returncode:
        raise UserError(f"--preempt-with {partition}: {done.stderr.strip().removeprefix('sbatch: error: ')}")
    return done.stdout.strip()


def _lines(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: list(read_lines(path)) for path in sorted((run.path / "probe").glob("rank-*.jsonl"))}


def judge(
    ranks: dict[str, list[dict[str, Any]]], profile: Profile, submitted: float, preempt_with: str | None
) -> list[Check]:
    """Make checks from what the ranks wrote down."""
    from slurm.preflight.doctor import check

    lines = [line for rank in ranks.values() for line in rank]
    of: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        of.setdefault(line["what"], []).append(line)
    started = of.get("started", [])
    hosts = sorted({line["host"] for line in started})
    gpus = sorted({line["gpu"] for line in started if line["gpu"]})
    waited = min((line["time"] for line in started), default=submitted) - submitted
    checks = [
        check(
            "probe: ranks started",
            len(started) == profile.world,
            f"{len(started)} on {', '.join(hosts) or 'no node'} {waited:.0f} s after they were submitted"
            + (f"; {', '.join(gpus)}" if gpus else ""),
            f"{profile.world}, and each writes where this machine reads it: is the run folder on a shared disk?",
        )
    ]
    for failed in of.get("failed", [])[:4]:
        checks.append(check(f"probe: {failed['part']}", False, failed["error"], "no error"))
    if measured := of.get("ranks"):
        worst = min(measured, key=lambda line: float(line["megabytes_per_second"]))
        skew = max(line["clock_seconds"] for line in measured)
        joined = max(line["join_seconds"] for line in measured)
        right = all(line["right"] for line in measured) and len(measured) == profile.world
        checks += [
            check(
                "probe: ranks see each other",
                right and joined < JOIN_SECONDS,
                f"all-reduce over {worst['world']} rank(s) by {worst['backend']} {'right' if right else 'WRONG'}, "
                f"{worst['megabytes_per_second']:.0f} MB/s; joined in {joined:.1f} s",
                f"{profile.world} ranks, within {JOIN_SECONDS:.0f} s; try NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME",
            ),
            check(
                "probe: clocks", skew < CLOCK_SECONDS, f"{skew * 1000:.0f} ms apart", f"less than {CLOCK_SECONDS:.0f} s"
            ),
        ]
    if scontrol_lines := of.get("scontrol"):
        bad = next((line["error"] for line in scontrol_lines if not line["works"]), None)
        checks.append(
            check(
                "probe: scontrol inside the job",
                bad is None,
                "works" if bad is None else f"does not: {bad}",
                "works, for the requeue; in a container bind scontrol, /etc/slurm and munge's socket",
            )
        )
    for name in sorted({line["name"] for line in of.get("disk", [])}):
        free = min(line["free_gigabytes"] for line in of["disk"] if line["name"] == name)
        checks.append(check(f"probe: room in {name}", free >= 1, f"{free:.0f} GB on the fullest node", "1 GB or more"))
    for url in sorted({line["url"] for line in of.get("store", [])}):
        reads = [line for line in of["store"] if line["url"] == url]
        rate = sum(line["megabytes_per_second"] for line in reads)
        checks.append(
            check(
                f"probe: {url}",
                len(reads) == profile.world,
                f"{rate:.0f} MB/s by {len(reads)} rank(s), a read of 1 MB in {_ms(reads, 'median_seconds')}, at worst "
                f"{_ms(reads, 'slowest_seconds')}",
                "every rank reads it",
            )
        )
    return checks + (_signals(ranks, preempt_with) if profile.cluster == "slurm" else [])


def _signals(ranks: dict[str, list[dict[str, Any]]], preempt_with: str | None) -> list[Check]:
    """Check which signals came, how long after the start, and how long SIGKILL took from the first SIGTERM."""
    from slurm.preflight.doctor import check

    rows: list[
        tuple[float, float, str]
    ] = []  # seconds from the first signal and from SIGTERM to SIGKILL, and the signals
    for lines in ranks.values():
        begin = next((line["time"] for line in lines if line["what"] == "started"), 0.0)
        signals = [(line["name"], line["time"] - begin) for line in lines if line["what"] == "signal"]
        asks = [seconds for name, seconds in signals if name in ("SIGTERM", "SIGUSR1", "SIGUSR2")]
        terms = [seconds for name, seconds in signals if name == "SIGTERM"]
        if asks and lines[-1]["what"] != "ended":
            end = lines[-1]["time"] - begin
            signals_in_words = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in signals)
            rows.append((end - asks[0], end - terms[0] if terms else 0.0, signals_in_words))
    how = (
        f"the urgent job in partition {preempt_with}"
        if preempt_with
        else f"the time limit of {MINUTES} minutes, --signal=USR2@{WARNING}"
    )
    least, after_term, signals_in_words = min(rows, default=(0.0, 0.0, "nothing"))
    checks = [
        check(
            "probe: warning",
            len(rows) == len(ranks) > 0,
            f"{how}; after the start came {signals_in_words}",
            "a signal on every rank before SIGKILL",
        ),
        check(
            "probe: seconds to save",
            least >= 10,
            f"{least:.1f} s between the first signal and SIGKILL, {after_term:.1f} s after the first SIGTERM, on the "
            "rank that had least",
            "10 s or more, and longer than a step and a save take",
        ),
    ]
    if preempt_with is None:
        hint = "not provoked, since that takes a second job: --preempt-with PARTITION, one whose jobs preempt these"
        checks.append(check("probe: preemption", True, hint, ""))
    return checks


def _ms(lines: list[dict[str, Any]], key: str) -> str:
    return f"{max(line[key] for line in lines) * 1000:.0f} ms"
