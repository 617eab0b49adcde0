"""Random trouble over one run on a real SLURM, and what is left of it: the same samples, the same losses, how fast.

    python -m bench.chaos [--json] [--quick] [--store] [--rounds N] [--seed N]

Brings up a SLURM of two nodes (slurm/box.py), trains a small Mllama there over shards behind a moto server, and does
something to it again and again, each time while it trains; the run goes on by itself, or, where the trouble ended it
for good, when a person says `launch.py resume`. At the end the audit, the losses and the adapter are held against a run
that nobody disturbed. --quick does each trouble but the slowest once; with --store the checkpoints are objects, too.

| trouble | what is done |
|---|---|
| urgent | an urgent job wants both nodes |
| warning | an urgent job again, and SLURM warns by SIGUSR2 instead of SIGTERM (preempt_send_user_signal) |
| kill | SIGKILL to a random rank |
| node | every process of the second node stands still until SLURM has given it up, then it starts anew |
| cancel | scancel, then resume |
| torn | the newest checkpoint loses its end while the job waits to start again |
| flipped | a bit of the newest checkpoint's tensors is turned while the job waits to start again |
| full | the disk of the run folder fills up, until the run ends; then it is freed, and the run resumed |
| store | the object store answers 503 to a third of all requests, for the time of a life |
| clock | the clock of the ranks jumps ahead or back by hours |
| decision | slurm.requeue is killed while it decides whether the run comes back |
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bench import report
from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically
from radhpc.core.protocol import Event
from radhpc.core.run_folder import RunFolder
from radhpc.engine.checkpoint import Checkpoints
from radhpc.storage.store import Store
from slurm import box, scheduler
from slurm.monitoring.goodput import seconds as moment
from slurm.profile import FOLDER as PROFILES

ROOT = Path(__file__).resolve().parent.parent
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
GRACE = 20  # seconds
GONE: tuple[Event, ...] = (Event.STARTED, Event.REQUEUED)
SAID: tuple[Event, ...] = (Event.FINISHED, Event.FAILED, Event.GAVE_UP, Event.CANCELLED, Event.STOPPED)
TROUBLES = ("urgent", "warning", "kill", "cancel", "torn", "flipped", "full", "store", "clock", "decision", "node")
STAGES = """
stages:
  - {{name: scratch, steps: {steps}, batch: 4, micro_batch: 2, train: ['.*'], optimizer: {{learning_rate: 1.0e-3}}}}
  - name: adapt
    epochs: {epochs}
    batch: 4
    lora: {{rank: 2, alpha: 4, dropout: 0.1, targets: '.*language_model.*(q|v)_proj'}}
    optimizer: {{learning_rate: 1.0e-3, schedule: linear}}
checkpoint: {{every: 6, keep: 3, url: {checkpoints}}}
evaluation: {{samples: 2, batch: 2, max_new_tokens: 4, images: 1}}
"""
NOTES = """\
steps repeated: trained again because a hard kill, a lost node or a broken checkpoint had undone them.
goodput: the time of the steps that count, at the pace of the undisturbed run, over the time from the first submission
to the end. SLURM would hold a requeued job back for some ten seconds here, most clusters for two minutes; the bench
ends that wait at once, and a person who resumes is quick.
seconds from requeue to resume: from the decision in the batch script until the next life has found its checkpoint."""


@dataclass
class Cluster:
    """What a run is disturbed on."""

    conf: str
    profile: Path
    clock: Path  # the file that libfaketime reads
    disk: Path  # a small file system of its own
    faults: Any  # tests.faults.Faults, before the store
    chance: random.Random

    def launch(self, *arguments: object) -> str:
        command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


def call(conf: str, *command: str) -> str:
    """What one of SLURM's commands prints."""
    environment = {**os.environ, "SLURM_CONF": conf}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def job_id(run: RunFolder) -> str:
    job = run.job()
    assert job is not None
    return str(job["id"])


def step(run: RunFolder) -> int:
    """The step that the run last told of."""
    return int(run.progress().get("step", 0))


def disturb(kind: str, run: RunFolder, cluster: Cluster) -> None:
    """Do one kind of trouble to a run that trains, and see that its next life begins."""
    lives = run.lives
    if kind == "urgent":
        urgent(cluster.conf)
    elif kind == "warning":
        with setting(cluster.conf, "SlurmctldParameters=preempt_send_user_signal"):
            urgent(cluster.conf)
            wait(lambda: run.events(*GONE)[-1]["event"] == Event.REQUEUED, 90, "the warned run was not requeued")
        end = run.events(Event.INTERRUPTED)[-1]
        assert end["cause"] == "SIGUSR2", end
        assert end["margin_seconds"] < GRACE, end
    elif kind == "kill":
        os.kill(rank_pid(job_id(run), cluster.chance.randrange(2)), signal.SIGKILL)
    elif kind == "node":
        with frozen("box2", job_id(run), cluster.conf):
            wait(lambda: scheduler.state(run.job()) == "PENDING", 150, "the lost node was not noticed")
    elif kind == "cancel":
        call(cluster.conf, "scancel", job_id(run))
        wait(lambda: not scheduler.state(run.job()), 90, "the cancelled job goes on")
        cluster.launch("resume", run.path)
    elif kind in ("torn", "flipped"):
        before = len(run.events(Event.REQUEUED))
        urgent(cluster.conf)
        wait(lambda: len(run.events(Event.REQUEUED)) > before, 90, "the preempted run was not requeued")
        spoil(run, kind, cluster.chance)
    elif kind == "full":
        filler = cluster.disk / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        wait(
            lambda: run.events()[-1]["event"] in SAID or not scheduler.state(run.job()),
            120,
            "a full disk is not noticed",
        )
        wait(lambda: not scheduler.state(run.job()), 60, "the job of the full disk goes on")
        filler.unlink()
        end = run.events(*SAID)[-1]
        assert end["event"] == Event.FAILED, end
        assert "No space left on device; free some space" in end["why"], end
        cluster.launch("resume", run.path)
    elif kind == "store":
        cluster.faults.inject("503", chance=0.3)
        urgent(cluster.conf)
    elif kind == "clock":
        hours = int(cluster.clock.read_text().rstrip("h")) + cluster.chance.choice((-5, -3, 2, 4))
        write_atomically(cluster.clock, f"{hours:+d}h".encode())  # a rank that reads an empty file ends
        urgent(cluster.conf)
    elif kind == "decision":
        urgent(cluster.conf)
        wait(lambda: bool(decisions(run)), 90, "the preempted run does not decide")
        time.sleep(cluster.chance.random() / 2)
        for pid in decisions(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    else:
        raise AssertionError(kind)

    def begun() -> bool:
        hasten(cluster.conf, job_id(run))
        return run.lives > lives

    try:
        wait(begun, 300, f"no life after '{kind}'", every=1)
    except AssertionError:
        queue = call(cluster.conf, "scontrol", "show", "job", job_id(run))
        print(*run.events()[-12:], queue, sep="\n", file=sys.stderr)
        raise


@contextlib.contextmanager
def setting(conf: str, line: str) -> Iterator[None]:
    """Another line in slurm.conf."""
    path = Path(conf)
    before = path.read_text()
    key = line.partition("=")[0]
    try:
        path.write_text("\n".join([*(old for old in before.splitlines() if not old.startswith(f"{key}=")), line, ""]))
        call(conf, "scontrol", "reconfigure")
        yield
    finally:
        path.write_text(before)
        call(conf, "scontrol", "reconfigure")


def hasten(conf: str, job: str) -> None:
    """End the time for which SLURM holds a requeued job back."""
    found = scheduler.show_job(job, {"SLURM_CONF": conf})
    if found.get("JobState") == "PENDING" and found.get("Reason") == "BeginTime":
        with contextlib.suppress(subprocess.CalledProcessError):  # it has just ended by itself
            call(conf, "scontrol", "update", f"JobId={job}", "StartTime=now")


def decisions(run: RunFolder) -> list[int]:
    """The processes that decide on a run at this moment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"slurm.requeue" in words and str(run.path).encode() in words:
                found.append(int(path.name))
    return found


def urgent(conf: str) -> None:
    """A job that preempts whatever there is, for two seconds."""
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    call(conf, "sbatch", *options, "--wrap", "sleep 2")


def spoil(run: RunFolder, kind: str, chance: random.Random) -> None:
    """Damage the newest checkpoint, as a failing disk does."""
    checkpoints = Checkpoints.of(run.path, run.recipe())
    newest, file = Store(checkpoints.storage.where(checkpoints.names()[0])), "state.safetensors"
    data = bytearray(newest.read(file))
    if kind == "torn":
        del data[len(data) // 2 :]
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    newest.write(file, bytes(data))


def rank_pid(job: str, rank: int) -> int:
    """The process of a rank: the one whose environment says so."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = wanted <= set((path / "environ").read_bytes().split(b"\0"))
            if mine and b"submitit.core._submit" in (path / "cmdline").read_bytes():
                return int(path.name)
    raise AssertionError(f"rank {rank} of job {job} is not running")


@contextlib.contextmanager
def frozen(node: str, job: str, conf: str) -> Iterator[None]:
    """A node whose every process stands still, as when its power is gone; afterwards it starts anew."""
    rank = rank_pid(job, 1)
    assert f"SLURMD_NODENAME={node}".encode() in Path(f"/proc/{rank}/environ").read_bytes()
    step_daemon = int(Path(f"/proc/{rank}/stat").read_text().rsplit(")", 1)[1].split()[1])
    daemon = int((Path(conf).parent / f"{node}.pid").read_text())
    for pid in (daemon, step_daemon, rank):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in (daemon, step_daemon, rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["slurmd", "-N", node, "-f", conf], check=True, env={**os.environ, **box.ENVIRONMENT})


def wait(condition: Callable[[], bool], seconds: float, what: str, every: float = 0.2) -> None:
    """Looking takes at most a fifth of the time: what is waited for wants the processor, too."""
    end = time.monotonic() + seconds
    while True:
        started = time.monotonic()
        if condition():
            return
        looked = time.monotonic()
        assert looked < end, what
        time.sleep(max(every, 4 * (looked - started)))


def lacking() -> str:
    """What of the system is missing to move a clock, or ""."""
    if not FAKETIME.exists():
        return f"{FAKETIME} is missing: install the system's package libfaketime"
    return "" if shutil.which("cc") else "no C compiler (cc): install the system's packages gcc and libc6-dev"


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own. Raises UserError where this user may not make one."""
    folder.mkdir()
    options = f"size={megabytes}m,mode=700"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        raise UserError("bench.chaos: needs root, to mount the small disk that is to fill up")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def cluster(folder: Path, seed: int) -> Iterator[tuple[Cluster, str]]:
    """A SLURM, a store behind a proxy that does harm, a clock, a disk; and the URL of shards in that store."""
    from shards.build import BuildSettings, build
    from tests.conftest import moto_server
    from tests.faults import Faults

    if missing := lacking():
        raise UserError(f"bench.chaos: {missing}")
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        moto = stack.enter_context(moto_server())
        faults = stack.enter_context(Faults("127.0.0.1", moto.port))
        stack.enter_context(mock.patch.dict(os.environ, {**moto.environment, "AWS_ENDPOINT_URL": faults.url}))
        url = f"{moto.bucket('chaos')}/shards"
        settings = BuildSettings(workers=1, longest_side=56, shard_samples=16, work=folder / "work")
        build("phantom", None, url, {"studies": "60", "size": "96"}, settings, lambda done, total: None)
        disk = stack.enter_context(small_disk(folder / "disk", 400))
        stack.callback(box.down, folder / "box")
        conf = box.up(folder / "box", nodes=2, grace=GRACE)["conf"]
        clock = folder / "clock"
        write_atomically(clock, b"+0")
        sleep = folder / "steady_sleep.so"
        source = Path(__file__).with_name("steady_sleep.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", sleep, source], check=True)
        profile = folder / "profile.yaml"
        text = (PROFILES / "box.yaml").read_text().replace("/tmp/radhpc-box/slurm.conf", conf)
        preload = f"export LD_PRELOAD={sleep}:{FAKETIME} FAKETIME_TIMESTAMP_FILE={clock} FAKETIME_CACHE_DURATION=1"
        only = "FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_DONT_RESET=1"
        profile.write_text(text + f'setup: ["{preload} {only}"]\n')
        yield Cluster(conf, profile, clock, disk, faults, random.Random(seed)), url


def losses(run: Path) -> dict[int, float]:
    """The loss of every step, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    points = accumulator.Scalars("train/loss")
    assert len({point.step for point in points}) == len(points), "a step appears twice"
    return {point.step: point.value for point in points}


def chaos(
    folder: Path, troubles: list[str], seed: int, steps: int, in_store: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and figures; raises AssertionError where anything was lost. `in_store`: checkpoints are objects."""
    from tests.conftest import TINY_MODEL

    with cluster(folder, seed) as (here, shards), _kept(here.disk, folder / "left"):
        recipe = folder / "recipe.yaml"
        checkpoints = f"'{shards.removesuffix('shards')}checkpoints'" if in_store else "null"
        # An epoch has some 12 steps.
        stages = STAGES.format(steps=steps // 2, epochs=-(-steps // 25), checkpoints=checkpoints)
        recipe.write_text(f"name: chaos\nshards: ['{shards}']\nmodel:\n{TINY_MODEL}{stages}")
        calm, wild = RunFolder(here.disk / "calm"), RunFolder(here.disk / "wild")
        here.launch("train", recipe, "--on", here.profile, "--run", calm.path, "--watch")
        started = time.time()
        here.launch("train", recipe, "--on", here.profile, "--run", wild.path)
        for number, kind in enumerate(troubles):
            goal = step(wild) + here.chance.randrange(1, 6)
            wait(lambda goal=goal: step(wild) >= goal or bool(wild.events(Event.FINISHED)), 300, "the run stands still")  # type: ignore[misc]
            if wild.events(Event.FINISHED):
                raise UserError(f"bench.chaos: the run finished before trouble {number + 1}; give it more steps")
            print(
                f"{time.time() - started:6.0f} s  step {step(wild):4d}  {number + 1:2d} {kind}",
                file=sys.stderr,
                flush=True,
            )
            disturb(kind, wild, here)
            if here.chance.random() < 0.5:
                here.faults.clear()
        wait(lambda: bool(wild.events(Event.FINISHED)), 1800, "the run does not finish")
        seconds = time.time() - started
        audit = json.loads(here.launch("status", wild.path, "--audit", "--json").splitlines()[-1])
        wrong = [epoch for epoch in audit["epochs"] if not epoch["exactly_once"]]
        assert not wrong, wrong
        assert losses(wild.path) == losses(calm.path), "the losses differ from those of the undisturbed run"
        name = "adapter/adapter_model.safetensors"
        assert (wild.path / name).read_bytes() == (calm.path / name).read_bytes(), "the adapters differ"
        result = _figures(wild, calm, audit, seconds)
    assert box.status(folder / "box")["state"] == "down", "daemons are left"
    return result


@contextlib.contextmanager
def _kept(disk: Path, folder: Path) -> Iterator[None]:
    """Where something goes wrong, the runs stay, to be looked at."""
    try:
        yield
    except BaseException:
        shutil.copytree(disk, folder, ignore=shutil.ignore_patterns("filler"))
        print(f"bench.chaos: the runs are left in {folder}", file=sys.stderr, flush=True)
        raise


def _figures(
    wild: RunFolder, calm: RunFolder, audit: dict[str, Any], seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    def moments(run: RunFolder, name: Event) -> list[float]:
        return [moment(event) for event in run.events(name)]

    pace = moments(calm, "finished")[0] - moments(calm, "started")[0]
    waits, last = [], None
    for event in wild.events(Event.REQUEUED, Event.RESUMED):  # in this order, whatever the clocks say
        if event["event"] == Event.RESUMED and last is not None:
            waits.append(moment(event) - last)
        last = moment(event) if event["event"] == Event.REQUEUED else None
    causes = [event["cause"] for event in wild.events(Event.REQUEUED)]
    return {"goodput": pace / seconds}, {
        "lives": wild.lives,
        "steps": max(losses(wild.path)),
        "steps repeated": audit["replayed_steps"],
        "checkpoints skipped": len(wild.events(Event.SKIPPED_CHECKPOINT)),
        "seconds of the undisturbed run": pace,
        "seconds": seconds,
        "median seconds from requeue to resume": statistics.median(waits),
        **{f"requeued, {cause}": causes.count(cause) for cause in sorted(set(causes))},
    }


def main() -> None:
    parser = report.parser("chaos", __doc__, "each trouble but the slowest once, on a short run")
    parser.add_argument("--store", action="store_true", help="checkpoints are objects, not files")
    parser.add_argument("--rounds", type=int, default=20, help="troubles (20)")
    parser.add_argument("--seed", type=int, default=0, help="of their order, and of their moments (0)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    troubles = list(TROUBLES[:-1]) if arguments.quick else list(TROUBLES)
    while not arguments.quick and len(troubles) < arguments.rounds:
        troubles.append(chance.choice(TROUBLES))
    chance.shuffle(troubles)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="radhpc-chaos-"))
    ratios, figures = chaos(folder, troubles, arguments.seed, 14 * len(troubles), arguments.store)
    shutil.rmtree(folder)
    report.show(f"{len(troubles)} troubles, seed {arguments.seed}", ratios, figures, NOTES, arguments.json)


if __name__ == "__main__":
    report.run(main)
