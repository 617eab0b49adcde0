"""Run a real SLURM cluster on this machine: several nodes, two partitions, preemption, without a cluster at hand.

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
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from radhpc.core.errors import UserError
from radhpc.core.files import exclusive, private_folder
from slurm.box_files import daemon_commands, loopback_address, write_files

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
    root = _place(folder)
    address = loopback_address()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(root):
        result = status(root)
        if result["state"] == "broken":
            raise UserError(f"{root}: {result['problem']}; first: python -m slurm.box down --folder {root}")
        if result["state"] == "up":
            if result["settings"] != settings:
                others = " ".join(f"--{name} {value}" for name, value in result["settings"].items())
                raise UserError(f"{root}: already up with other settings: {others}")
            return {**result, "started": False}
        _empty(root)
        try:
            write_files(root, settings, address)
            for name, command in daemon_commands(root, nodes).items():
                with (root / "logs" / f"{name}.log").open("a") as log:
                    subprocess.run(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            return {**_wait_until_idle(root, nodes), "started": True}
        except BaseException:
            _stop(root)
            shutil.rmtree(root)
            raise


def down(folder: str | Path | None = None) -> dict[str, Any]:
    """Cancel the jobs, end every process of the box whatever state it is in, and remove its folder."""
    root = _place(folder)
    with exclusive(root) if root.exists() else contextlib.nullcontext():
        _stop(root)
        if (root / "box.json").exists():  # else it is somebody's folder, not a box's
            shutil.rmtree(root)
    return status(root)


def status(folder: str | Path | None = None) -> dict[str, Any]:
    """Say whether the box is up, down or broken; `problem` tells what is wrong with a broken one."""
    root = _place(folder)
    running = _processes(root)
    # A daemon that is just forking is there twice; the lower number is the daemon's own.
    daemons = {name: pid for pid, name in sorted(running.items(), reverse=True) if name != "job"}
    result: dict[str, Any] = {"state": "broken" if running else "down", "conf": f"{root}/slurm.conf"}
    result |= {"nodes": [], "partitions": [], "daemons": daemons, "settings": None, "problem": None}
    if not running:
        return result
    try:
        result["settings"] = json.loads((root / "box.json").read_text())
        if missing := [name for name in daemon_commands(root, result["settings"]["nodes"]) if name not in daemons]:
            return {**result, "problem": f"{', '.join(missing)} not running"}
        for row in _show(root, "node"):
            result["nodes"].append({"name": row["NodeName"], "state": row["State"].lower()})
        for row in _show(root, "partition"):
            partition = {"name": row["PartitionName"], "priority": int(row["PriorityTier"])}
            partition |= {"preempt_mode": row["PreemptMode"].lower(), "grace": int(row["GraceTime"])}
            result["partitions"].append(partition)
    except (OSError, subprocess.SubprocessError) as error:
        return {**result, "problem": f"does not answer: {error}"}
    # A star after the state, as in "idle*", means that slurmctld cannot reach the node.
    ill = [node for node in result["nodes"] if not set(node["state"].split("+")) <= HEALTHY]
    problem = ", ".join(f"{node['name']} is {node['state']}" for node in ill) or None
    return {**result, "state": "broken" if ill else "up", "problem": problem}


def _place(folder: str | Path | None) -> Path:
    # slurm.conf knows no quotes and expands %; the path of a socket in the folder may have 107 characters.
    return private_folder(Path(folder or "/tmp/radhpc-box"), 70)


def _empty(root: Path) -> None:
    """Clear what a box left behind when the machine went down; refuse a folder that was never a box's."""
    if (root / "box.json").exists():
        shutil.rmtree(root)
        root.mkdir()
    if any(root.iterdir()):
        raise UserError(f"--folder {root}: holds other files; name a new or an empty folder")
    root.chmod(0o700)


def _wait_until_idle(root: Path, nodes: int) -> dict[str, Any]:
    start = time.monotonic()
    while True:
        result = status(root)
        waited = time.monotonic() - start
        busy = [node["name"] for node in result["nodes"] if node["state"] != "idle"]
        if result["state"] == "up" and not busy:
            return status(root)  # once more, with the ids of daemons that have detached themselves
        # One that is still detaching itself may be missed.
        dead = [name for name in daemon_commands(root, nodes) if name not in result["daemons"] and waited > 1]
        if dead or waited > START_SECONDS:
            name = [*dead, *busy, "slurmctld"][0]
            fault = "ended while the box was starting" if dead else f"is not ready after {START_SECONDS} s"
            last = (root / "logs" / f"{name}.log").read_text(errors="replace").splitlines()[-8:]
            raise BoxError("\n  ".join([f"{name} {fault}; its log ends with:", *last]))
        time.sleep(0.1)


def _show(root: Path, kind: str) -> list[dict[str, str]]:
    rows = _ask(root, "scontrol", "--oneliner", "show", kind).splitlines()
    return [dict(word.split("=", 1) for word in row.split() if "=" in word) for row in rows]


def _ask(root: Path, *command: str) -> str:
    """Run one of SLURM's commands on this box and return what it prints."""
    environment = {**ENVIRONMENT, "SLURM_CONF": f"{root}/slurm.conf"}
    return subprocess.check_output(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=20
    )


def _stop(root: Path) -> None:
    if {"slurmctld", "job"} <= set(_processes(root).values()):
        # A fair end for the jobs: the signals of a scancel, and a moment to write a last line.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _ask(root, "scancel", "--partition=preemptible")
            _ask(root, "scancel", "--partition=urgent")
        deadline = time.monotonic() + 3
        while "job" in _processes(root).values() and time.monotonic() < deadline:
            time.sleep(0.1)
    for name in ("slurmctld", "box", "job", "munged"):  # first the one that starts and requeues jobs
        _end(root, name)


def _end(root: Path, name: str) -> None:
    """Ask the processes whose names begin with `name` to end, and after a second make them."""
    start = time.monotonic()
    while pids := {pid for pid, one in _processes(root).items() if one.startswith(name)}:
        waited = time.monotonic() - start
        if waited > 10:
            raise BoxError(f"processes {sorted(pids)} do not end, not even by SIGKILL")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if waited > 1 or name == "job" else signal.SIGTERM)
        time.sleep(0.1)


def _processes(root: Path) -> dict[int, str]:
    """Return every live process of the box: its id, and munged, slurmctld, box1, box2, ... or job.

    All processes are looked at, so that no lost or stale pid file hides or invents one.
    """
    result = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            program, *arguments = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
            variables = os.fsdecode((entry / "environ").read_bytes()).split("\0")
        except OSError:  # gone, or another user's
            continue
        name = Path(program).name
        if name == "munged" and f"--socket={root}/munge/socket" in arguments:
            result[int(entry.name)] = name
        elif name in ("slurmctld", "slurmd") and f"{root}/slurm.conf" in arguments:
            result[int(entry.name)] = arguments[arguments.index("-N") + 1] if name == "slurmd" else name
        # A user's own shell may have SLURM_CONF too, but no node's name, which all that runs in a job has.
        elif f"SLURM_CONF={root}/slurm.conf" in variables and (
            program.startswith("slurmstepd:") or any(one.startswith("SLURMD_NODENAME=") for one in variables)
        ):
            result[int(entry.name)] = "job"
    return result


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


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    already = "already " if result.get("started") is False else ""
    problem = f": {result['problem']}" if result["problem"] else ""
    console.print(f"the box is {already}{result['state']}{problem}")
    for rows in filter(None, (result["nodes"], result["partitions"])):
        table = Table(*(key.replace("_", " ") for key in rows[0]))
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)
    if result["state"] == "up":
        console.print(f"to use it: export SLURM_CONF={result['conf']}")


def main() -> None:
    try:
        app()
    except (UserError, BoxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
