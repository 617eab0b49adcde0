"""Check whether a run would survive on this cluster: what was found and what is expected, in plain words.

    for check in examine(profile, Path("runs")):
        print(check["name"], check["ok"], check["found"], check["wanted"])

Enters: a profile and the folder of the runs. Leaves: dictionaries {name, ok, found, wanted}. It reads what
scontrol and sinfo say and submits nothing; what only a job can see is in probe.py.
"""

import shutil
import socket
from pathlib import Path
from typing import Any

from radhpc.core.files import file_system
from radhpc.core.run_folder import RunFolder
from slurm import precheck
from slurm.cluster import Cluster, call, minutes, preempts
from slurm.preflight.plan import write_rate
from slurm.profile import Profile
from slurm.submit import slurm_parameters

Check = dict[str, Any]
FREE_GIGABYTES = 10


def check(name: str, ok: bool, measured: str, expected: str) -> Check:
    return {"name": name, "ok": ok, "found": measured, "wanted": expected}


def examine(profile: Profile, folder: Path) -> list[Check]:
    """Return all checks that can be made from here. Raises UserError where there is no scheduler to ask."""
    if profile.cluster != "slurm":
        return [*_here(profile), *_folder(profile, None, folder)]
    cluster = Cluster.ask(profile.environment)
    return [
        *_job(profile, cluster, folder),
        *_preemption(profile, cluster),
        *_ends(profile, cluster),
        *_folder(profile, cluster, folder),
    ]


def _job(profile: Profile, cluster: Cluster, folder: Path) -> list[Check]:
    """Check whether sbatch would take the job."""
    parameters = slurm_parameters(RunFolder(folder / "doctor"), profile, "python")
    problems = [*precheck.environment_problems(profile), *precheck.problems(profile, cluster, parameters)]
    nodes = cluster.nodes_of(profile.partition)
    names = sorted({f"{count} {kind or 'GPU'}" for node in nodes for kind, count in node.gpus.items()})
    version = cluster.config.get("SLURM_VERSION", "unknown")
    summary = f"{len(nodes)} nodes in partition {profile.partition or cluster.default}, SLURM {version}"
    return [
        check("job is accepted", not problems, "; ".join(problems) or summary, "sbatch --test-only takes the profile"),
        check(
            "GPUs",
            not profile.gpus_per_node or bool(names),
            ", ".join(names) + " per node" if names else "no GPU is known to SLURM there",
            f"{profile.gpus_per_node} per node" if profile.gpus_per_node else "none asked for",
        ),
    ]


def _preemption(profile: Profile, cluster: Cluster) -> list[Check]:
    """Check what happens when another job wants the nodes."""
    config = cluster.config
    row = cluster.partitions.get(profile.partition or cluster.default or "", {})
    partition = row.get("PartitionName", "?")
    mode = row.get("PreemptMode", config.get("PreemptMode", "OFF")).upper()
    if not preempts(config, row):
        how = f"PreemptType={config.get('PreemptType')}, PreemptMode={mode}"
        return [check("preemption", True, f"jobs of partition {partition} are never preempted ({how})", "")]
    grace, wait = int(row.get("GraceTime", "0")), cluster.seconds("KillWait") or 0
    requeues = {
        "REQUEUE": (True, "a preempted job goes back into the queue"),
        "CANCEL": (False, "a preempted job is cancelled; only radhpc's own requeue inside the grace brings it back"),
        "SUSPEND": (True, "a preempted job is frozen in memory, not ended; it needs no save"),
        "GANG": (True, "jobs take turns, frozen in memory"),
    }
    ok, meaning = next((m for name, m in requeues.items() if name in mode), (False, f"PreemptMode={mode}"))
    checks = [
        check("preempt mode", ok, f"PreemptMode={mode}: {meaning}", f"PreemptMode=REQUEUE on partition {partition}"),
        check(
            "grace",
            (grace or wait) >= 20,
            f"GraceTime={grace} s on partition {partition}; SIGTERM first, SIGKILL after {grace or wait} s or more"
            + ("" if grace else " (KillWait alone)"),
            "20 s or more, and longer than a step and a save take (see `plan`): ask for GraceTime=120 on the partition",
        ),
    ]
    checks.append(
        check(
            "grace that the profile states",
            profile.grace_seconds <= (grace or wait),
            f"grace_seconds {profile.grace_seconds:g}; the site gives {grace or wait} s",
            f"grace_seconds {grace or wait}: a run that counts on more is killed while it saves",
        )
    )
    user_signal = "preempt_send_user_signal" in config.get(
        "SlurmctldParameters", ""
    ) or "send_user_signal" in config.get("PreemptParameters", "")
    checks.append(
        check(
            "signal of a preemption",
            user_signal or bool(grace),
            "SIGUSR2 (preempt_send_user_signal is set)"
            if user_signal
            else "SIGTERM on every rank as the grace begins (preempt_send_user_signal is not set)"
            if grace
            else "none before the kill: GraceTime=0 and preempt_send_user_signal is not set",
            "SIGTERM or SIGUSR2 with a grace behind it; radhpc saves on either of them",
        )
    )
    return checks


def _ends(profile: Profile, cluster: Cluster) -> list[Check]:
    """Check requeue, time limits, the last seconds, and accounting."""
    config = cluster.config
    row = cluster.partitions.get(profile.partition or cluster.default or "", {})
    limit = minutes(row.get("MaxTime", "UNLIMITED"))
    wait, stuck = cluster.seconds("KillWait") or 0, cluster.seconds("UnkillableStepTimeout") or 0
    accounting = config.get("AccountingStorageType", "").endswith("/slurmdbd")
    exit_codes = config.get("RequeueExit", "(null)")
    return [
        check(
            "requeue",
            True,
            f"JobRequeue={config.get('JobRequeue')}; the job asks for {'--requeue' if profile.requeue else 'none'} "
            "by itself, so the site's default does not matter",
            "scontrol requeue is allowed to users; --probe sees whether scontrol works inside the job",
        ),
        check(
            "time limit",
            limit is None or profile.minutes <= limit,
            f"MaxTime={row.get('MaxTime')}, DefaultTime={row.get('DefaultTime')}",
            f"minutes {profile.minutes} of the profile or more; a run may have many lives, so less costs little",
        ),
        check(
            "KillWait",
            wait >= 10,
            f"{wait} s between SIGTERM and SIGKILL at the time limit",
            "10 s or more (default 30)",
        ),
        check(
            "unkillable steps",
            stuck >= 60,
            f"UnkillableStepTimeout={stuck} s",
            "60 s or more (ask for 180): a rank in a slow write must not drain its node",
        ),
        check(
            "exit statuses",
            exit_codes in ("(null)", ""),
            f"RequeueExit={exit_codes}",
            "none: SLURM must not requeue by exit status what radhpc has decided to end",
        ),
        check(
            "accounting",
            True,
            "slurmdbd: sacct knows jobs that have ended"
            if accounting
            else "none: what has ended is known from the run folder alone, which is enough",
            "",
        ),
    ]


def _here(profile: Profile) -> list[Check]:
    """Check what a run on this machine needs."""
    gpus = len(call(["nvidia-smi", "--list-gpus"], {}).splitlines()) if shutil.which("nvidia-smi") else 0
    requested = profile.gpus_per_node or 0
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        resolves = True
    except OSError:
        resolves = False
    return [
        check("scheduler", True, f"cluster: {profile.cluster}; nobody preempts here but Ctrl-C", ""),
        check("GPUs", gpus >= requested, f"{gpus} seen by nvidia-smi", f"{requested} asked for"),
        check(
            "name of this machine",
            resolves or profile.world == 1,
            f"{socket.gethostname()} {'resolves' if resolves else 'does not resolve'}",
            "resolves, so that ranks find each other",
        ),
    ]


def _folder(profile: Profile, cluster: Cluster | None, folder: Path) -> list[Check]:
    """Check the folder of the runs."""
    kind, faults = file_system(folder), precheck.folder_problems(profile, cluster, folder) if cluster else []
    rate = write_rate(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return [
        check(
            "run folder is shared",
            not faults,
            "; ".join(faults) or f"{folder.absolute()}: {kind}",
            "a file system that all nodes see" if cluster else "any",
        ),
        check("run folder has room", free >= FREE_GIGABYTES, f"{free:,.0f} GB free", f"{FREE_GIGABYTES} GB or more"),
        check("run folder's speed", rate >= 20e6, f"{rate / 1e6:.0f} MB/s written and flushed", "20 MB/s or more"),
    ]
