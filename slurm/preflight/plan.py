"""Estimate what a recipe costs on a profile: whether it fits, how long it takes, whether a save fits into the grace.

The forecast of radhpc.planning.forecast enters; the keys of `radhpc plan --json` leave. The login node knows the
profile's GPUs, the grace of its partition, and how fast the run folder's file system takes a checkpoint. What nobody
has measured is null, not guessed.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.protocol import Event
from radhpc.core.run_folder import RunFolder
from slurm.cluster import GPUS, Cluster, known_gpu
from slurm.profile import Profile

SHOWN_GPUS = ("T4", "RTX 3090", "A100 40GB", "A100 80GB", "H100 80GB")
SPARE = 0.06  # of a GPU's memory that fragmentation and libraries' workspaces take
CONTEXT = 0.7e9  # bytes of a CUDA context, and of NCCL's buffers
PROBE_BYTES = 64 << 20


def costs(
    stages: Sequence[Any],
    profile: Profile,
    folder: Path,
    like: RunFolder | None = None,
    samples_per_second: float | None = None,
) -> dict[str, Any]:
    """Return the keys of `radhpc plan --json`. `stages`: from planning.forecast; `folder`: where the run will be."""
    cluster = Cluster.ask(profile.environment) if profile.cluster == "slurm" else None
    peak = max(stage.gigabytes_per_gpu for stage in stages)
    gpu = own_gpu(profile, cluster)
    limits = {name: size * (1 << 30) for _, name, size in GPUS if name in SHOWN_GPUS}
    rate, source = _rate(profile, like, samples_per_second)
    samples = _sum(stage.samples for stage in stages)
    last = stages[-1].epoch_samples
    hours = samples / rate / 3600 if rate and samples is not None else None
    bytes_per_second = write_rate(folder)
    megabytes = max(stage.checkpoint_megabytes for stage in stages)
    save = megabytes * 1e6 / bytes_per_second
    grace = cluster.grace_seconds(profile.partition) if cluster else None
    problems = []
    if gpu is not None and not fits(peak, gpu[1]):
        problems.append(
            f"{peak:.1f} GB of tensors per GPU do not fit into the {gpu[1] / 1e9:.1f} GB of an {gpu[0]}: more ranks, a "
            "smaller micro_batch, model.checkpoint_activations, or a larger GPU"
        )
    host = max(stage.host_gigabytes for stage in stages) * profile.tasks_per_node
    if profile.memory_gb is not None and host > profile.memory_gb:
        problems.append(
            f"memory_gb {profile.memory_gb}: each of a node's {profile.tasks_per_node} ranks reads the whole model "
            f"before it is sharded, {host:.0f} GB together"
        )
    if grace is not None and save > grace:
        problems.append(
            f"a save of {megabytes:.0f} MB takes {save:.0f} s here, but a preempted job is killed after {grace} s"
        )
    if profile.cluster == "slurm" and save > profile.signal_seconds:
        problems.append(
            f"signal_seconds {profile.signal_seconds}: a save of {megabytes:.0f} MB takes {save:.0f} s; give it more"
        )
    return {
        "fits": not problems,
        "problems": problems,
        "gigabytes_per_gpu": round(peak, 3),
        "gpu": gpu[0] if gpu else None,
        "fits_on": {name: fits(peak, limits[name]) for name in SHOWN_GPUS},
        "host_gigabytes_per_node": round(host, 3),
        "parameters": max(stage.parameters for stage in stages),
        "trainable": max(stage.trainable for stage in stages),
        "steps": _sum(stage.steps for stage in stages),
        "samples_per_second": rate,
        "samples_per_second_from": source,
        "hours": hours,
        "hours_per_epoch": last / rate / 3600 if rate and last is not None else None,
        "gpu_hours": hours * profile.world if hours is not None and profile.gpus_per_node else None,
        "checkpoint_megabytes": round(megabytes, 3),
        "megabytes_per_second": round(bytes_per_second / 1e6, 1),
        "save_seconds": round(save, 3),
        "grace_seconds": grace,
        "signal_seconds": profile.signal_seconds if profile.cluster == "slurm" else None,
    }


def _sum(counts: Iterable[int | None]) -> int | None:
    """Return the sum over all stages; None where a count is not known."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def fits(gigabytes: float, gpu_bytes: float) -> bool:
    """Return whether tensors of so many gigabytes leave room for what is not tensors."""
    return gigabytes * 1e9 <= gpu_bytes * (1 - SPARE) - CONTEXT


def own_gpu(profile: Profile, cluster: Cluster | None) -> tuple[str, float] | None:
    """Return the smallest GPU that a job of this profile may get, with its bytes; None where nothing names it."""
    if not profile.gpus_per_node:
        return None
    asked = f"{profile.constraint or ''} {profile.sbatch.get('gres', '')} {profile.sbatch.get('gpus-per-node', '')}"
    if gpu := known_gpu(asked):
        return gpu
    nodes = cluster.nodes_of(profile.partition) if cluster else []
    offered = [known_gpu(f"{kind} {','.join(sorted(node.features))}") for node in nodes for kind in node.gpus]
    if not offered or None in offered:
        return None
    return min((gpu for gpu in offered if gpu is not None), key=lambda gpu: gpu[1])


def write_rate(folder: Path) -> float:
    """Measure the bytes per second of a save on the file system of `folder`: written, flushed, and read again for its
    checksum, as a checkpoint is. Raises UserError where nothing can be written.
    """
    while not folder.exists():
        folder = folder.absolute().parent
    block = os.urandom(1 << 20)  # a file system may store zeros in no time
    try:
        with tempfile.TemporaryFile(prefix=".radhpc-plan-", dir=folder) as file:
            started = time.perf_counter()
            for _ in range(PROBE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            hashlib.file_digest(file, "sha256")
            return PROBE_BYTES / (time.perf_counter() - started)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; the run's folder must be writable") from error


def _rate(profile: Profile, like: RunFolder | None, stated: float | None) -> tuple[float | None, str | None]:
    """Return samples per second over all ranks, and where the figure comes from."""
    if stated is not None:
        return stated, "stated"
    if like is None:
        return None, None
    rate = like.progress().get("samples_per_second")
    started = like.events(Event.STARTED)
    if not rate or not started:
        raise UserError(f"--like {like.path}: no samples/s there; name a run that has trained for a minute")
    world = int(started[-1]["world"])
    if world == profile.world:
        return float(rate), f"{like.path}"
    return float(rate) * profile.world / world, f"{like.path}, scaled from {world} to {profile.world} ranks"
