"""Read a cluster's configuration, partitions and nodes by scontrol. Changes nothing.

cluster = Cluster.ask(profile.environment)
cluster.partition(None).fields["GraceTime"]         # of the default partition
"""

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from radhpc.core.errors import UserError, first_line
from slurm.scheduler import clean_environment, fields

# Memory that PyTorch finds on a GPU, in bytes, by what sites call it in gres types and node features. The first match
# counts; an A100 is taken for the smaller one unless its name says 80.
_GIB = 1 << 30
GPUS: tuple[tuple[str, str, float], ...] = (
    (r"h200", "H200", 139.8),
    (r"h100", "H100 80GB", 79.1),
    (r"b200", "B200", 178.3),
    (r"a100.*80", "A100 80GB", 79.1),
    (r"a100", "A100 40GB", 39.4),
    (r"l40s?\b", "L40S", 44.4),
    (r"a40\b", "A40", 44.4),
    (r"a6000", "RTX A6000", 47.4),
    (r"v100.*32", "V100 32GB", 31.7),
    (r"v100", "V100 16GB", 15.8),
    (r"4090", "RTX 4090", 23.6),
    (r"3090", "RTX 3090", 23.6),
    (r"(^|[^a-z0-9])a10\b", "A10", 22.1),
    (r"(^|[^a-z0-9])l4\b", "L4", 22.0),
    (r"(^|[^a-z0-9])t4\b", "T4", 14.7),
)


@dataclass(frozen=True)
class Node:
    """One node, as scontrol shows it."""

    name: str
    host: str
    partitions: frozenset[str]
    cpus: int
    megabytes: int
    gres: str  # such as gpu:a100:4(S:0-1)
    features: frozenset[str]
    state: str

    @property
    def gpus(self) -> dict[str, int]:
        """Return the number of GPUs of each type; "" is the type of those without a name."""
        counts: dict[str, int] = {}
        for kind, count in re.findall(r"gpu:(?:([^:,()]+):)?(\d+)", self.gres):
            counts[kind] = counts.get(kind, 0) + int(count)
        return counts


@dataclass(frozen=True)
class Cluster:
    """The answers of one moment."""

    config: dict[str, str]
    partitions: dict[str, dict[str, str]]
    nodes: tuple[Node, ...]

    @classmethod
    def ask(cls, environment: Mapping[str, str]) -> "Cluster":
        """Ask scontrol. Raises UserError where there is no SLURM, or where it does not answer."""
        lines = call(["scontrol", "show", "config"], environment).splitlines()
        config = {
            key.strip(): value.strip() for key, equals, value in (line.partition("=") for line in lines) if equals
        }
        rows = call(["scontrol", "--oneliner", "show", "partition"], environment).splitlines()
        partitions = [fields(row) for row in rows]
        rows = call(["scontrol", "--oneliner", "show", "node"], environment).splitlines()
        nodes = tuple(_node(fields(row)) for row in rows if "NodeName=" in row)
        return cls(config, {row["PartitionName"]: row for row in partitions if "PartitionName" in row}, nodes)

    def is_here(self, partition: str | None) -> bool:
        """Return whether all nodes are this machine, as on a workstation with its own SLURM: every folder is shared."""
        here = socket.gethostname().partition(".")[0]
        return all(node.host.partition(".")[0] in (here, "localhost") for node in self.nodes_of(partition))

    @cached_property
    def default(self) -> str | None:
        return next((name for name, row in self.partitions.items() if row.get("Default") == "YES"), None)

    def nodes_of(self, partition: str | None) -> list[Node]:
        """Return the nodes that a job for this partition (None: the default one) may get."""
        names = (partition or self.default or "").split(",")
        return [node for node in self.nodes if node.partitions.intersection(names)]

    def seconds(self, key: str) -> int | None:
        """Return a number at the start of a value of the configuration, such as `10 sec`."""
        match = re.match(r"\d+", self.config.get(key, ""))
        return int(match[0]) if match else None

    def grace_seconds(self, partition: str | None) -> int | None:
        """Return the least seconds from the first signal of a preemption to SIGKILL; None if nothing is preempted.

        A partition's GraceTime; without one SLURM kills at once, and KillWait is what lies between TERM and KILL.
        """
        row = self.partitions.get(partition or self.default or "", {})
        if not preempts(self.config, row):
            return None
        return int(row.get("GraceTime", "0")) or self.seconds("KillWait")


def preempts(config: Mapping[str, str], partition: Mapping[str, str]) -> bool:
    """Return whether jobs of this partition may be preempted."""
    mode = partition.get("PreemptMode", config.get("PreemptMode", "OFF")).upper()
    return config.get("PreemptType", "preempt/none") != "preempt/none" and mode not in ("OFF", "")


def call(command: list[str], environment: Mapping[str, str]) -> str:
    """Return the output of one of SLURM's commands. Raises UserError where it is missing or refuses."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=clean_environment(dict(environment))
        )
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not found: this is no login node of a SLURM cluster") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{' '.join(command)}: no answer in 60 s; does slurmctld run?") from error
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {first_line(RuntimeError(done.stderr))}")
    return done.stdout


def minutes(text: str) -> float | None:
    """Return the minutes of a time limit of SLURM, [days-]hours:minutes:seconds; None where there is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, mins, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + mins + seconds / 60


def known_gpu(names: str) -> tuple[str, float] | None:
    """Return a GPU and its bytes by a gres type or node features; None for what is not in the list."""
    return next(((name, size * _GIB) for match, name, size in GPUS if re.search(match, names.lower())), None)


def _node(row: Mapping[str, str]) -> Node:
    return Node(
        name=row["NodeName"],
        host=row.get("NodeHostName", row["NodeName"]),
        partitions=_names(row.get("Partitions", "")),
        cpus=int(row.get("CPUTot", "0")),
        megabytes=int(row.get("RealMemory", "0")),
        gres=row.get("Gres", ""),
        features=_names(row.get("AvailableFeatures", "")),
        state=row.get("State", "").lower(),
    )


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split(",")) - {"", "(null)"}
