"""A real SLURM cluster on this machine: several nodes, two partitions, preemption, without a cluster at hand.

    python -m slurm.box up                            # a second; needs Debian's packages slurm-wlm and munge
    export SLURM_CONF=/tmp/radhpc-box/slurm.conf
    sbatch --partition=preemptible --nodes=2 --wrap "srun sleep 60"
    sbatch --partition=urgent --nodes=2 --exclusive --wrap "sleep 5"      # preempts the one above
    python -m slurm.box down

Everything lives in one folder and listens on loopback only. Nobody else can submit jobs, because the key that
signs every request lies in that folder. A requeued job waits 11 seconds here; on most clusters, two minutes.
As anywhere, SLURM looks only every 30 seconds for preempted jobs whose grace is over, and then sends SIGTERM
once more, so one that does not end by itself may live 40 seconds longer than its grace.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from radhpc.core.errors import UserError
from radhpc.core.files import exclusive, private_folder

START_SECONDS = 30
PACKAGES = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "scontrol": "slurm-wlm"}
# Debian keeps the daemons where an ordinary user's PATH does not reach. The caller's other variables are not
# passed on: there may be secrets among them, and SLURM's own would change what the commands do.
ENVIRONMENT = {"PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])}
HEALTHY = {"idle", "mixed", "allocated", "completing"}


class BoxError(RuntimeError):
    """The box failed, not its user: exit status 1."""


def up(
    folder: str | Path | None = None, nodes: int = 2, cpus: int = 1, gpus: int = 0, grace: int = 20
) -> dict[str, Any]:
    """Start a box, wait until its nodes are idle and return its status. One that is up is left alone."""
    settings = {"nodes": nodes, "cpus": cpus, "gpus": gpus, "grace": grace}
    if missing := [name for name in PACKAGES if not shutil.which(name, path=ENVIRONMENT["PATH"])]:
        packages = " ".join(sorted({PACKAGES[name] for name in missing}))
        raise UserError(f"SLURM is not installed (no {', '.join(missing)}): apt-get install {packages}")
    place = _place(folder)
    address = _loopback_address()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(place):
        found = status(place)
        if found["state"] == "broken":
            raise UserError(f"{place}: {found['problem']}; first: python -m slurm.box down --folder {place}")
        if found["state"] == "up":
            if found["settings"] != settings:
                others = " ".join(f"--{name} {value}" for name, value in found["settings"].items())
                raise UserError(f"{place}: already up with other settings: {others}")
            return {**found, "started": False}
        _empty(place)
        try:
            _write_files(place, settings, address)
            for name, command in _daemons(place, nodes).items():
                with (place / "logs" / f"{name}.log").open("a") as log:
                    subprocess.run(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            return {**_wait_until_idle(place, nodes), "started": True}
        except BaseException:
            _stop(place)
            shutil.rmtree(place)
            raise


def down(folder: str | Path | None = None) -> dict[str, Any]:
    """Cancel the jobs, end every process of the box whatever state it is in, and remove its folder."""
    place = _place(folder)
    with exclusive(place) if place.exists() else contextlib.nullcontext():
        _stop(place)
        if (place / "box.json").exists():  # else it is somebody's folder, not a box's
            shutil.rmtree(place)
    return status(place)


def status(folder: str | Path | None = None) -> dict[str, Any]:
    """Say whether the box is up, down or broken; `problem` tells what is wrong with a broken one."""
    place = _place(folder)
    running = _processes(place)
    # A daemon that is just forking is there twice; the lower number is the daemon's own.
    daemons = {name: pid for pid, name in sorted(running.items(), reverse=True) if name != "job"}
    found: dict[str, Any] = {"state": "broken" if running else "down", "conf": f"{place}/slurm.conf"}
    found |= {"nodes": [], "partitions": [], "daemons": daemons, "settings": None, "problem": None}
    if not running:
        return found
    try:
        found["settings"] = json.loads((place / "box.json").read_text())
        if missing := [name for name in _daemons(place, found["settings"]["nodes"]) if name not in daemons]:
            return {**found, "problem": f"{', '.join(missing)} not running"}
        for row in _show(place, "node"):
            found["nodes"].append({"name": row["NodeName"], "state": row["State"].lower()})
        for row in _show(place, "partition"):
            partition = {"name": row["PartitionName"], "priority": int(row["PriorityTier"])}
            partition |= {"preempt_mode": row["PreemptMode"].lower(), "grace": int(row["GraceTime"])}
            found["partitions"].append(partition)
    except (OSError, subprocess.SubprocessError) as error:
        return {**found, "problem": f"does not answer: {error}"}
    # A star after the state, as in "idle*", means that slurmctld cannot reach the node.
    ill = [node for node in found["nodes"] if not set(node["state"].split("+")) <= HEALTHY]
    problem = ", ".join(f"{node['name']} is {node['state']}" for node in ill) or None
    return {**found, "state": "broken" if ill else "up", "problem": problem}


def _place(folder: str | Path | None) -> Path:
    # slurm.conf knows no quotes and expands %; the path of a socket in the folder may have 107 characters.
    return private_folder(Path(folder or "/tmp/radhpc-box"), 70)


def _loopback_address() -> str:
    """Return the address on which SLURM will listen: the one that this machine's name stands for."""
    host = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror:
        address = "nothing"
    if address != "127.0.0.1":
        # The daemons and srun can listen on this one address or on all of them; there is no third choice. Nor
        # does Debian's 127.0.1.1 work: srun would listen there, and tasks look for it where it calls from.
        fix = f"as root: echo 127.0.0.1 {host} >> /etc/hosts"
        raise UserError(f"this machine's name {host} must stand for 127.0.0.1, not for {address}; {fix}")
    return address


def _empty(place: Path) -> None:
    """Clear what a box left behind when the machine went down; refuse a folder that was never a box's."""
    if (place / "box.json").exists():
        shutil.rmtree(place)
        place.mkdir()
    if any(place.iterdir()):
        raise UserError(f"--folder {place}: holds other files; name a new or an empty folder")
    place.chmod(0o700)


def _write_files(place: Path, settings: dict[str, int], address: str) -> None:
    (place / "box.json").write_text(json.dumps(settings))
    names = _node_names(settings["nodes"])
    for name in ("munge", "state", "logs", "gpus", *names):
        (place / name).mkdir(mode=0o700)
    (place / "munge" / "key").touch(mode=0o600)
    (place / "munge" / "key").write_bytes(secrets.token_bytes(128))
    # No control groups are used, and of the plugins only version 1's leaves them alone until it is asked.
    (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    with (place / "gres.conf").open("w") as gres:
        for gpu in [f"{name}-{number}" for name in names for number in range(settings["gpus"])]:
            (place / "gpus" / gpu).symlink_to("/dev/null")  # it must be some device
            gres.write(f"NodeName={gpu.partition('-')[0]} Name=gpu File={place}/gpus/{gpu}\n")

    host = socket.gethostname().partition(".")[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    size = f"CPUs={settings['cpus']} RealMemory={memory}"
    if settings["gpus"]:
        size += f" Gres=gpu:{settings['gpus']}"
    control_port, *ports = free_ports(address, len(names) + 1)
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} {size}"
        for name, port in zip(names, ports, strict=True)
    )
    # Run folders remember job ids, so another box should not give out the same ones. SLURM's largest is 67,043,328.
    first_job = secrets.randbelow(60_000_000) + 1
    (place / "slurm.conf").write_text(f"""\
ClusterName=box
SlurmctldHost={host}({address})
SlurmctldPort={control_port}
SlurmUser={os.getuid()}
SlurmdUser={os.getuid()}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# Signed by a munged of the box's own. cred_expire is also how long a requeued job waits.
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={place}/munge/socket,cred_expire=10
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/logs/slurmctld.log
SlurmdLogFile={place}/logs/%n.log
# Nothing that needs control groups or mail.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
# Decisions within a second or two.
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
FirstJobId={first_job}
# Nodes have what is written here, not what this machine has; one that was lost may come back.
SlurmdParameters=config_overrides
SlurmdTimeout=30
ReturnToService=2
GresTypes=gpu
{nodes}
PartitionName=DEFAULT Nodes=ALL
PartitionName=preemptible Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings["grace"]}
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
""")


def _node_names(count: int) -> list[str]:
    return [f"box{number}" for number in range(1, count + 1)]


def free_ports(address: str, count: int) -> list[int]:
    """Ports of an address on which nobody listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((address, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _daemons(place: Path, nodes: int) -> dict[str, list[str]]:
    """The daemons with their commands, in the order in which they start. Each detaches itself."""
    files = {"socket": "munge/socket", "key-file": "munge/key", "pid-file": "munge/pid"}
    files |= {"seed-file": "munge/seed", "log-file": "logs/munged.log"}
    # Unless forced, munged wants the folders above its socket open to all users; the box is for one.
    commands = {"munged": ["munged", "--force", *(f"--{key}={place}/{name}" for key, name in files.items())]}
    commands["slurmctld"] = ["slurmctld", "-f", f"{place}/slurm.conf"]
    for name in _node_names(nodes):
        commands[name] = ["slurmd", "-N", name, "-f", f"{place}/slurm.conf"]
    return commands


def _wait_until_idle(place: Path, nodes: int) -> dict[str, Any]:
    start = time.monotonic()
    while True:
        found = status(place)
        waited = time.monotonic() - start
        busy = [node["name"] for node in found["nodes"] if node["state"] != "idle"]
        if found["state"] == "up" and not busy:
            return status(place)  # once more, with the ids of daemons that have detached themselves
        # One that is still detaching itself may be missed.
        dead = [name for name in _daemons(place, nodes) if name not in found["daemons"] and waited > 1]
        if dead or waited > START_SECONDS:
            name = [*dead, *busy, "slurmctld"][0]
            fault = "ended while the box was starting" if dead else f"is not ready after {START_SECONDS} s"
            last = (place / "logs" / f"{name}.log").read_text(errors="replace").splitlines()[-8:]
            raise BoxError("\n  ".join([f"{name} {fault}; its log ends with:", *last]))
        time.sleep(0.1)


def _show(place: Path, kind: str) -> list[dict[str, str]]:
    rows = _ask(place, "scontrol", "--oneliner", "show", kind).splitlines()
    return [dict(word.split("=", 1) for word in row.split() if "=" in word) for row in rows]


def _ask(place: Path, *command: str) -> str:
    """Run one of SLURM's commands on this box and return what it prints."""
    environment = {**ENVIRONMENT, "SLURM_CONF": f"{place}/slurm.conf"}
    return subprocess.check_output(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=20
    )


def _stop(place: Path) -> None:
    if {"slurmctld", "job"} <= set(_processes(place).values()):
        # A fair end for the jobs: the signals of a scancel, and a moment to write a last line.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _ask(place, "scancel", "--partition=preemptible")
            _ask(place, "scancel", "--partition=urgent")
        deadline = time.monotonic() + 3
        while "job" in _processes(place).values() and time.monotonic() < deadline:
            time.sleep(0.1)
    for name in ("slurmctld", "box", "job", "munged"):  # first the one that starts and requeues jobs
        _end(place, name)


def _end(place: Path, name: str) -> None:
    """Ask the processes whose names begin with `name` to end, and after a second make them."""
    start = time.monotonic()
    while pids := {pid for pid, one in _processes(place).items() if one.startswith(name)}:
        waited = time.monotonic() - start
        if waited > 10:
            raise BoxError(f"processes {sorted(pids)} do not end, not even by SIGKILL")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if waited > 1 or name == "job" else signal.SIGTERM)
        time.sleep(0.1)


def _processes(place: Path) -> dict[int, str]:
    """Every live process of the box: its id, and munged, slurmctld, box1, box2, ... or job.

    All processes are looked at, so that no lost or stale pid file hides or invents one.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            program, *arguments = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
            variables = os.fsdecode((entry / "environ").read_bytes()).split("\0")
        except OSError:  # gone, or another user's
            continue
        name = Path(program).name
        if name == "munged" and f"--socket={place}/munge/socket" in arguments:
            found[int(entry.name)] = name
        elif name in ("slurmctld", "slurmd") and f"{place}/slurm.conf" in arguments:
            found[int(entry.name)] = arguments[arguments.index("-N") + 1] if name == "slurmd" else name
        # A user's own shell may have SLURM_CONF too, but no node's name, which all that runs in a job has.
        elif f"SLURM_CONF={place}/slurm.conf" in variables and (
            program.startswith("slurmstepd:") or any(one.startswith("SLURMD_NODENAME=") for one in variables)
        ):
            found[int(entry.name)] = "job"
    return found


app = typer.Typer(
    help=__doc__.replace("\n\n    ", "\n\n\b\n    "),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Folder = Annotated[Path | None, typer.Option(help="Default: /tmp/radhpc-box.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("up")
def _up(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Nodes, named box1, box2, ...")] = 2,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each node, whatever this machine has.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="Pretended GPUs of each node.")] = 0,
    grace: Annotated[int, typer.Option(min=0, help="GraceTime of the preemptible partition.")] = 20,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Start a box and wait until its nodes are idle."""
    _print(up(folder, nodes, cpus, gpus, grace), as_json)


@app.command("down")
def _down(folder: Folder = None, as_json: Json = False) -> None:
    """Cancel the jobs, end every process of the box and remove its folder."""
    _print(down(folder), as_json)


@app.command("status")
def _status(folder: Folder = None, as_json: Json = False) -> None:
    """Say whether the box is up, down or broken, with its nodes and partitions."""
    _print(status(folder), as_json)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    already = "already " if found.get("started") is False else ""
    problem = f": {found['problem']}" if found["problem"] else ""
    console.print(f"the box is {already}{found['state']}{problem}")
    for rows in filter(None, (found["nodes"], found["partitions"])):
        table = Table(*(key.replace("_", " ") for key in rows[0]))
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)
    if found["state"] == "up":
        console.print(f"to use it: export SLURM_CONF={found['conf']}")


def main() -> None:
    try:
        app()
    except (UserError, BoxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
