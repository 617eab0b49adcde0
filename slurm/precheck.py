"""Find what would fail in the queue before sbatch is called: one line per mistake, with what is allowed.

    refuse(run, profile, parameters)      # UserError: partition 'gpuu': no such partition (did you mean 'gpu'?) ...

Enters: a profile, the run's folder and what submitit shall put into the batch script. scontrol is asked first, because
it can say what is allowed; then sbatch itself, with --test-only and the very same options.
"""

import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError, nearest
from radhpc.core.files import NODE_LOCAL, file_system
from radhpc.core.protocol import Event
from radhpc.core.run_folder import RunFolder
from slurm import compat_submitit, scheduler
from slurm.cluster import Cluster, call, minutes
from slurm.profile import Profile

# Of a cluster that is busy or partly down sbatch --test-only says so, but a job may well wait for it.
_WAITS = re.compile(r"down, drained or reserved|nodes are busy|temporarily unavailable", re.I)
_GPU_OPTIONS = ("gres", "gpus-per-node", "gpus_per_node")


def refuse(run: RunFolder, profile: Profile, parameters: Mapping[str, Any], elements: int = 0) -> None:
    """Raise UserError for what is known to fail; all of it, in one line. `elements`: of a job array, 0 for a job."""
    faults = environment_problems(profile)
    if profile.cluster == "slurm":
        cluster = Cluster.ask(profile.environment)
        faults += [*time_problems(run, profile), *folder_problems(profile, cluster, run.path)]
        faults += array_problems(cluster, elements) or problems(profile, cluster, parameters, elements)
    if faults:
        raise UserError("; ".join(faults))


def array_problems(cluster: Cluster, elements: int) -> list[str]:
    """Return a problem if an array has more elements than the site takes."""
    most = int(cluster.config.get("MaxArraySize", "1001"))
    if elements <= most:
        return []
    return [f"a job array of {elements}: this site takes {f'up to {most}' if most else 'none'} (MaxArraySize)"]


def problems(profile: Profile, cluster: Cluster, parameters: Mapping[str, Any], elements: int = 0) -> list[str]:
    """Return what the cluster would refuse."""
    names = (profile.partition or cluster.default or "").split(",")
    for name in names:
        if name not in cluster.partitions:
            hint = nearest(name, cluster.partitions)
            return [f"partition '{name}': no such partition{hint}; there are {', '.join(cluster.partitions)}"]
    messages = [
        *_limits(profile, cluster, names),
        *_accounts(profile, cluster, names),
        *_features(profile, cluster),
        *_gpus(profile, cluster),
    ]
    return messages or _refused(profile, parameters, elements)


def _limits(profile: Profile, cluster: Cluster, names: list[str]) -> list[str]:
    """Return problems with nodes, time, CPUs and memory."""
    where = f"partition '{','.join(names)}'"
    row, nodes = cluster.partitions[names[0]], cluster.nodes_of(profile.partition)
    messages = []
    if profile.least_nodes > len(nodes):
        messages.append(f"nodes {profile.nodes}: {where} has {len(nodes)}")
    if (most := row.get("MaxNodes", "UNLIMITED")).isdecimal() and profile.least_nodes > int(most):
        messages.append(f"nodes {profile.nodes}: {where} allows {most} per job")
    limit = minutes(row.get("MaxTime", "UNLIMITED"))
    if limit is not None and profile.minutes > limit:
        messages.append(f"minutes {profile.minutes}: {where} allows {limit:.0f}; a run may have many lives")
    cpus = profile.tasks_per_node * (profile.cpus_per_task or 1)
    if nodes and cpus > (most_cpus := max(node.cpus for node in nodes)):
        messages.append(
            f"tasks_per_node {profile.tasks_per_node}, cpus_per_task {profile.cpus_per_task or 1}: {cpus} CPUs on a "
            f"node; the largest of {where} has {most_cpus}"
        )
    if nodes and profile.memory_gb and profile.memory_gb * 1024 > (most_memory := max(n.megabytes for n in nodes)):
        messages.append(f"memory_gb {profile.memory_gb}: the largest node of {where} has {most_memory // 1024}")
    return messages


def _accounts(profile: Profile, cluster: Cluster, names: list[str]) -> list[str]:
    """Return a problem with an account that the partition does not take or, if SLURM keeps accounts, the user lacks."""
    allowed = cluster.partitions[names[0]].get("AllowAccounts", "ALL")
    if allowed != "ALL" and profile.account not in allowed.split(","):
        hint = nearest(profile.account or "", allowed.split(","))
        return [f"account '{profile.account or ''}': partition '{names[0]}' takes {allowed}{hint}"]
    if profile.account is None or not cluster.config.get("AccountingStorageType", "").endswith("/slurmdbd"):
        return []
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", "format=account"]
    try:
        accounts = set(call([*command, f"user={_user()}"], profile.environment).split())
    except UserError:  # it may be missing on a login node; sbatch --test-only has the last word
        return []
    if not accounts or profile.account in accounts:
        return []
    return [
        f"account '{profile.account}': not yours{nearest(profile.account, accounts)}; "
        f"you have {', '.join(sorted(accounts))}"
    ]


def _user() -> str:
    """Return the user of the jobs: SLURM looks at the process, not at $USER, which cron and containers leave out."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # known to the cluster alone
        return os.environ.get("USER", str(os.getuid()))


def _features(profile: Profile, cluster: Cluster) -> list[str]:
    features = frozenset[str]().union(*(node.features for node in cluster.nodes_of(profile.partition)))
    known = ", ".join(sorted(features)) or "none"
    return [
        f"constraint '{name}': no node has this feature{nearest(name, features)}; there are {known}"
        for name in re.findall(r"[^\s&|!,()\[\]*]+", profile.constraint or "")
        if not name.isdecimal() and name not in features
    ]


def _gpus(profile: Profile, cluster: Cluster) -> list[str]:
    """Return problems with GPUs that no node of the partition has: too many of them, or of another type."""
    asked = [str(profile.sbatch[key]).removeprefix("gpu:") for key in _GPU_OPTIONS if key in profile.sbatch]
    types = [text.partition(":")[0] for text in asked if not text.partition(":")[0].isdecimal()]
    if not profile.gpus_per_node and not asked:
        return []
    where = f"partition '{profile.partition or cluster.default}'"
    gpus = [node.gpus for node in cluster.nodes_of(profile.partition)]
    known = sorted({kind for kinds in gpus for kind in kinds if kind})
    most = max((sum(kinds.values()) for kinds in gpus), default=0)
    count = profile.gpus_per_node or 1
    if most < count:
        others = [name for name in cluster.partitions if any(node.gpus for node in cluster.nodes_of(name))]
        hint = f"at most {most}" if most else f"none; partitions with GPUs: {', '.join(others) or 'none'}"
        return [f"gpus_per_node {count}: a node of {where} has {hint}"]
    return [
        f"sbatch: GPU type '{kind}': no node of {where} has it{nearest(kind, known)}; "
        f"there are {', '.join(known) or 'GPUs without a type'}"
        for kind in types
        if kind not in known
    ]


def _refused(profile: Profile, parameters: Mapping[str, Any], elements: int) -> list[str]:
    """Return what sbatch objects to in the very script that would be submitted, without submitting it."""
    script = compat_submitit.batch_script("true", Path("logs"), parameters, elements)
    done = subprocess.run(
        ["sbatch", "--test-only"],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=scheduler.clean_environment(profile.environment),
    )
    if not done.returncode or _WAITS.search(done.stderr):
        return []
    lines = [re.sub(r"^(sbatch: )?(error: )?(allocation failure: )?", "", line) for line in done.stderr.splitlines()]
    return [f"sbatch would refuse the job: {'; '.join(filter(None, lines))}"]


def time_problems(run: RunFolder, profile: Profile) -> list[str]:
    """Return a problem if a life is too short to save in, judged by the run's own saves if there are any."""
    if profile.signal_seconds >= profile.minutes * 60:
        return [
            f"minutes {profile.minutes}: the warning of signal_seconds {profile.signal_seconds} would come at once; "
            f"allowed are {profile.signal_seconds // 60 + 1} minutes or more, or a later warning"
        ]
    saves = [event["seconds"] for event in run.events(Event.SAVED) if "seconds" in event][-3:]
    if saves and max(saves) > profile.signal_seconds:
        return [
            f"signal_seconds {profile.signal_seconds}: a save of this run took {max(saves):.0f} s; "
            f"allowed is {int(max(saves)) + 1} or more"
        ]
    return []


def folder_problems(profile: Profile, cluster: Cluster, folder: Path) -> list[str]:
    """Return a problem if the run folder is on a disk that only this machine has, though the job runs elsewhere."""
    kind = file_system(folder)
    if kind not in NODE_LOCAL or profile.shared or cluster.is_here(profile.partition):
        return []
    return [
        f"{folder}: on a local disk of {socket.gethostname()} ({kind}), which the nodes do not see; choose a folder on "
        "the shared file system, or say 'shared: true' in the profile if this one is exported to them"
    ]


def environment_problems(profile: Profile) -> list[str]:
    """Return problems with a missing Python, container or file to source; lines with variables are skipped."""
    messages = []
    words = shlex.split(profile.python or "")
    if words:
        program = words[0]
        if "/" in program and not Path(program).exists():
            messages.append(f"python: {program}: no such program")
        elif "/" not in program and not profile.setup and shutil.which(program) is None:
            messages.append(f"python: {program}: not found in PATH, and 'setup' has no line that would load it")
        messages += [f"python: {word}: no such image" for word in words if _missing(word, (".sif", ".sqsh"))]
    for line in profile.setup:
        sourced = re.match(r"\s*(?:source|\.)\s+(\S+)\s*$", line)
        if sourced and _missing(os.path.expanduser(sourced[1])):
            messages.append(f"setup: '{line.strip()}': no such file; make the environment there, or correct the path")
    return messages


def _missing(text: str, endings: tuple[str, ...] = ("",)) -> bool:
    return text.startswith("/") and "$" not in text and text.endswith(endings) and not Path(text).exists()
