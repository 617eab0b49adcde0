"""Write what the daemons of slurm.box read: the key, slurm.conf and the folders of the nodes; and their commands.

write_files(folder, {"nodes": 2, "cpus": 1, "gpus": 0, "grace": 20}, loopback_address())
daemon_commands(folder, nodes=2)     # {"munged": ["munged", ...], "slurmctld": [...], "box1": [...], ...}
"""

import contextlib
import json
import os
import secrets
import socket
from pathlib import Path

from radhpc.core.errors import UserError


def loopback_address() -> str:
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


def write_files(folder: Path, settings: dict[str, int], address: str) -> None:
    """Write the key, the folders and the configuration of a box into its folder."""
    (folder / "box.json").write_text(json.dumps(settings))
    names = node_names(settings["nodes"])
    for name in ("munge", "state", "logs", "gpus", *names):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").touch(mode=0o600)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    # No control groups are used, and of the plugins only version 1's leaves them alone until it is asked.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    with (folder / "gres.conf").open("w") as gres:
        for gpu in [f"{name}-{number}" for name in names for number in range(settings["gpus"])]:
            (folder / "gpus" / gpu).symlink_to("/dev/null")  # it must be some device
            gres.write(f"NodeName={gpu.partition('-')[0]} Name=gpu File={folder}/gpus/{gpu}\n")

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
    (folder / "slurm.conf").write_text(f"""\
ClusterName=box
SlurmctldHost={host}({address})
SlurmctldPort={control_port}
SlurmUser={os.getuid()}
SlurmdUser={os.getuid()}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# Signed by a munged of the box's own. cred_expire is also how long a requeued job waits.
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/%n.log
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


def node_names(count: int) -> list[str]:
    """Return box1, box2, ..."""
    return [f"box{number}" for number in range(1, count + 1)]


def free_ports(address: str, count: int) -> list[int]:
    """Return ports of an address on which nobody listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind((address, 0))
        return [int(listener.getsockname()[1]) for listener in sockets]


def daemon_commands(folder: Path, nodes: int) -> dict[str, list[str]]:
    """Return the daemons with their commands, in the order in which they start. Each detaches itself."""
    files = {"socket": "munge/socket", "key-file": "munge/key", "pid-file": "munge/pid"}
    files |= {"seed-file": "munge/seed", "log-file": "logs/munged.log"}
    # Unless forced, munged wants the folders above its socket open to all users; the box is for one.
    commands = {"munged": ["munged", "--force", *(f"--{key}={folder}/{name}" for key, name in files.items())]}
    commands["slurmctld"] = ["slurmctld", "-f", f"{folder}/slurm.conf"]
    for name in node_names(nodes):
        commands[name] = ["slurmd", "-N", name, "-f", f"{folder}/slurm.conf"]
    return commands
