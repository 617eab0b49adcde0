"""The same preemptions over the same small training: radhpc, submitit's stock checkpoint(), the Trainer's own resume.

    python -m bench.chaos_peers [--json] [--quick]

One real SLURM of two nodes (slurm/box.py), one model, one data set, one number of steps, a checkpoint every ten of
them, each started as its own manual says:

| radhpc | `launch.py train` |
|---|---|
| submitit | a callable with `checkpoint()`, in it a DDP loop that saves model, optimizer and step |
| Trainer | transformers' Trainer in an sbatch script, `enable_jit_checkpoint`, resumed from the newest checkpoint |

Each trains once in peace and once while urgent jobs preempt it at the same steps. A job that ends without having
finished, and does not come back by itself, is submitted again at once, as a very watchful person would; so often stands
in the table. The time for which SLURM holds a requeued job back is ended at once, for all three.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bench import report
from bench.chaos import hasten, losses, urgent, wait
from radhpc.files import read_lines
from radhpc.ledger import consumed
from radhpc.run_dir import RunDir
from slurm import box, scheduler
from slurm.profile import FOLDER as PROFILES

ROOT = Path(__file__).resolve().parent.parent
LEFT = ("PENDING", "COMPLETED", "FAILED", "CANCELLED", "")  # states of a job whose ranks are gone
EVERY, BATCH, RATE, SEED = 10, 6, 1e-3, 0
RECIPE = """
name: peers
seed: {seed}
shards: ['{shards}']
model:
{model}
stages:
  - {{name: scratch, steps: {steps}, batch: {batch}, train: ['.*'], optimizer: {{learning_rate: {rate}}}}}
checkpoint: {{every: {every}, keep: 3}}
evaluation: {{samples: 2, batch: 2, max_new_tokens: 2, images: 1}}
"""
NOTES = """\
goodput: the steps at the pace of the same system's undisturbed run, over the time from the submission to the last step.
back: from the moment at which the job is in the queue again until the first step that was never made before.
as undisturbed: 1 where the losses (the samples) of all steps are those of the same system's undisturbed run.
SLURM sends SIGTERM to a job that it preempts, unless its administrators have set preempt_send_user_signal: submitit
passes that signal by and is killed when the grace is over; the Trainer saves on it and ends well, so that SLURM takes
its job for completed. Of a Mllama it then loads no weight: they were saved under other names than it looks for; it
warns and goes on."""


@dataclass
class Course:
    """How one run went."""

    started: float = 0.0
    ended: float = 0.0
    back: list[float] = field(default_factory=list)  # seconds from a requeue to the first new step
    by_hand: int = 0


class System:
    """A way to train: how it is submitted, and what it tells of its steps."""

    name = ""

    def __init__(self, folder: Path, conf: str, steps: int) -> None:
        self.folder, self.conf, self.steps = folder, conf, steps

    def submit(self, run: Path) -> str:
        """Start, or go on; the job's id."""
        raise NotImplementedError

    def made(self, run: Path) -> dict[int, tuple[list[str], float | None]]:
        """By step: the samples, and the loss where it is told at once. Of a step made twice, what was last."""
        raise NotImplementedError

    def losses(self, run: Path) -> dict[int, float]:
        return {step: loss for step, (_, loss) in self.made(run).items() if loss is not None}

    def finished(self, run: Path) -> bool:
        return max(self.made(run), default=0) >= self.steps


class Radhpc(System):
    name = "radhpc"

    def submit(self, run: Path) -> str:
        verb = ["resume", run] if run.exists() else ["train", self.folder / "recipe.yaml", "--run", run]
        command = [sys.executable, ROOT / "launch.py", *verb, "--on", self.folder / "box.yaml", "--json"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return str(json.loads(done.stdout.splitlines()[-1])["job"])

    def made(self, run: Path) -> dict[int, tuple[list[str], float | None]]:
        return {step: (keys, None) for step, keys in consumed(run / "ledger").steps.items()}

    def losses(self, run: Path) -> dict[int, float]:
        wait(lambda: bool(RunDir(run).events("finished")), 120, "radhpc does not finish")
        return losses(run)


class Script(System):
    """A peer: its ranks write `steps.rank-N.jsonl`."""

    def made(self, run: Path) -> dict[int, tuple[list[str], float | None]]:
        found: dict[int, tuple[list[str], float | None]] = {}
        for path in sorted(run.glob("steps.rank-*.jsonl")):
            mine = {line["step"]: line for line in read_lines(path)}
            for step, line in mine.items():
                keys, loss = found.get(step, ([], None))
                found[step] = (sorted([*keys, *line["keys"]]), line["loss"] if loss is None else loss)
        return found


class Submitit(Script):
    name = "submitit"

    def submit(self, run: Path) -> str:
        import submitit

        from bench.chaos_peers import Stock  # not __main__'s, which would be pickled with all that it refers to

        executor = submitit.SlurmExecutor(run / "logs")
        executor.update_parameters(
            nodes=2, ntasks_per_node=1, cpus_per_task=1, time=60, signal_delay_s=60, partition="preemptible",
            exclusive=True, additional_parameters={"requeue": True},
        )  # fmt: skip
        with _variables(self.conf):
            return str(executor.submit(Stock(self.folder, run, self.steps)).job_id)


class Trainer(Script):
    name = "Trainer"

    def submit(self, run: Path) -> str:
        run.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "bench.chaos_peers", "--rank", self.folder, run, self.steps]
        script = run / "job.sh"
        script.write_text(f"#!/bin/bash\nsrun {' '.join(map(str, words))}\n")
        options = [
            "--partition=preemptible",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--exclusive",
            "--requeue",
            "--time=60",
        ]
        command = ["sbatch", "--parsable", *options, f"--output={run}/log-%j.txt", "--open-mode=append", str(script)]
        with _variables(self.conf):
            return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


@contextlib.contextmanager
def _variables(conf: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(SLURM_CONF=conf, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# What the ranks of the peers run


class Data:
    """The recipe's model and its samples, all in memory, and a file of the steps made."""

    def __init__(self, folder: Path, run: Path, rank: int) -> None:
        from radhpc import models
        from radhpc.collate import Encoder
        from radhpc.recipe import load
        from radhpc.source import Source

        recipe = load(folder / "recipe.yaml")
        family = models.family(recipe.model, str(folder / "tokenizer"))
        self.encoder = Encoder(family, recipe.text, recipe.images)
        self.model = family.build(recipe.seed)
        source = Source(recipe.shards, "train")
        self.rows = [self.encoder.encode(*source.read(number)) for number in range(len(source))]
        self._file = (run / f"steps.rank-{rank}.jsonl").open("a")

    def batch(self, rows: list[Any]) -> dict[str, Any]:
        """For a DataLoader; the keys stay with the tensors."""
        return {**self.encoder.batch(rows), "keys": [row.key for row in rows]}

    def record(self, step: int, keys: list[str], loss: float) -> None:
        self._file.write(json.dumps({"step": step, "keys": keys, "loss": loss}) + "\n")
        self._file.flush()


class Stock:
    """submitit's own pattern: what is called is pickled, and `checkpoint` says what to submit in its place."""

    def __init__(self, folder: Path, run: Path, steps: int) -> None:
        self.folder, self.run, self.steps = folder, run, steps

    def __call__(self) -> None:
        import torch
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader, DistributedSampler

        rank, world = _join()
        torch.distributed.init_process_group("gloo")
        data = Data(self.folder, self.run, rank)
        model = DistributedDataParallel(data.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        step, path = 0, self.run / "checkpoint.pt"
        if path.exists():
            state = torch.load(path)
            data.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
        sampler: Any = DistributedSampler(data.rows, seed=SEED, drop_last=True)  # type: ignore[arg-type]
        loader: Any = DataLoader(data.rows, BATCH // world, sampler=sampler, collate_fn=data.batch, drop_last=True)  # type: ignore[arg-type]
        while step < self.steps:
            sampler.set_epoch(step // len(loader))
            for batch in islice(loader, step % len(loader), None):
                keys = batch.pop("keys")
                loss = model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                data.record(step, keys, float(loss.detach()))
                if step % EVERY == 0 and rank == 0:
                    state = {"model": data.model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, path.with_suffix(".tmp"))
                    path.with_suffix(".tmp").rename(path)
                if step == self.steps:
                    break

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(Stock(self.folder, self.run, self.steps))


def train_with_trainer(folder: Path, run: Path, steps: int) -> None:
    """One rank under transformers' Trainer."""
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    rank, world = _join()
    data = Data(folder, run, rank)

    class Recording(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *given: Any, **options: Any) -> Any:
            keys = inputs.pop("keys")
            loss = super().compute_loss(model, inputs, *given, **options)
            shown = loss[0] if isinstance(loss, tuple) else loss
            data.record(self.state.global_step + 1, keys, float(shown.detach()))
            return loss

    arguments = transformers.TrainingArguments(
        output_dir=str(run / "checkpoints"), max_steps=steps, per_device_train_batch_size=BATCH // world,
        learning_rate=RATE, lr_scheduler_type="constant", save_steps=EVERY, save_total_limit=3, seed=SEED,
        enable_jit_checkpoint=True, remove_unused_columns=False, report_to=[], disable_tqdm=True, use_cpu=True,
        ddp_backend="gloo", ddp_find_unused_parameters=False, dataloader_drop_last=True,
    )  # fmt: skip
    trainer = Recording(data.model, arguments, data_collator=data.batch, train_dataset=data.rows)  # type: ignore[arg-type]
    newest = get_last_checkpoint(str(run / "checkpoints")) if (run / "checkpoints").exists() else None
    trainer.train(resume_from_checkpoint=newest)


def _join() -> tuple[int, int]:
    """Set PyTorch's variables from SLURM's."""
    rank, world = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
    port = 12000 + (int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ.get("SLURM_RESTART_COUNT", "0"))) % 20000
    os.environ.update(RANK=rank, WORLD_SIZE=world, LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return int(rank), int(world)


# The measurement


def course(system: System, run: Path, preempted_at: list[int]) -> Course:
    """Train from the beginning to the last step, preempted whenever one of these steps is made."""
    found = Course(started=time.time())
    job = system.submit(run)

    def reached(goal: int) -> Callable[[], bool]:
        return lambda: max(system.made(run), default=0) >= goal

    for goal in preempted_at:
        wait(reached(goal), 240, f"{system.name} does not reach step {goal}")
        urgent(system.conf)
        wait(lambda job=job: _state(system, job) in LEFT, 180, f"{system.name} is not preempted")  # type: ignore[misc]
        before, again = max(system.made(run)), time.time()
        if _state(system, job) != "PENDING":
            found.by_hand += 1
            job = system.submit(run)

        def new(job: str = job, before: int = before) -> bool:
            hasten(system.conf, job)
            return max(system.made(run)) > before

        wait(new, 240, f"{system.name} does not go on")
        found.back.append(time.time() - again)
    wait(lambda: system.finished(run), 300, f"{system.name} does not finish")
    found.ended = time.time()
    wait(lambda: not scheduler.state(_job(system, job)), 120, f"{system.name}: its job goes on")
    return found


def _job(system: System, job: str) -> dict[str, Any]:
    return {"cluster": "slurm", "id": job, "environment": {"SLURM_CONF": system.conf}}


def _state(system: System, job: str) -> str:
    return scheduler.show_job(job, {"SLURM_CONF": system.conf}).get("JobState", "")


def measure(folder: Path, steps: int, preempted_at: list[int]) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and figures."""
    from shards.build import Settings, build
    from tests.conftest import TINY_MODEL

    shards = folder / "shards"
    settings = Settings(workers=1, longest_side=56, shard_samples=16, work=folder / "work")
    build("phantom", None, str(shards), {"studies": "60", "size": "96"}, settings, lambda done, total: None)
    text = RECIPE.format(
        seed=SEED, shards=shards, model=TINY_MODEL, steps=steps, batch=BATCH, rate=RATE, every=EVERY
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(text)
    figures: dict[str, float] = {}
    goodput, back = {}, {}
    with contextlib.ExitStack() as stack:
        stack.callback(box.down, folder / "box")
        conf = box.up(folder / "box", nodes=2, grace=20)["conf"]
        profile = (PROFILES / "box.yaml").read_text().replace("/tmp/radhpc-box/slurm.conf", conf)
        (folder / "box.yaml").write_text(profile)
        for system in (Radhpc(folder, conf, steps), Submitit(folder, conf, steps), Trainer(folder, conf, steps)):
            calm, wild = folder / f"{system.name}-calm", folder / f"{system.name}-wild"
            print(f"{system.name}: undisturbed", file=sys.stderr, flush=True)
            moments = _moments(system, calm)
            if system.name == "radhpc":
                (folder / "tokenizer").symlink_to(calm / "tokenizer")
            print(f"{system.name}: preempted at steps {preempted_at}", file=sys.stderr, flush=True)
            found = course(system, wild, preempted_at)
            useful = steps * statistics.median(b - a for a, b in zip(moments, moments[1:], strict=False))
            goodput[system.name] = useful / (found.ended - found.started)
            back[system.name] = statistics.median(found.back)
            made = {step: keys for step, (keys, _) in system.made(wild).items()}
            same = made == {step: keys for step, (keys, _) in system.made(calm).items()}
            figures |= {
                f"{system.name}: goodput": goodput[system.name],
                f"{system.name}: seconds in all": found.ended - found.started,
                f"{system.name}: seconds until back (median)": back[system.name],
                f"{system.name}: submitted again by hand": found.by_hand,
                f"{system.name}: losses as undisturbed": float(system.losses(wild) == system.losses(calm)),
                f"{system.name}: samples as undisturbed": float(same),
            }
    others = [name for name in goodput if name != "radhpc"]
    return {
        **{f"goodput, radhpc / {name}": goodput["radhpc"] / goodput[name] for name in others},
        **{f"seconds until back, radhpc / {name}": back["radhpc"] / back[name] for name in others},
    }, figures


def _moments(system: System, run: Path) -> list[float]:
    """Train in peace; when each step was seen to be made."""
    moments: list[float] = []
    job = system.submit(run)

    def done() -> bool:
        made = max(system.made(run), default=0)
        moments.extend([time.time()] * (made - len(moments)))
        return made >= system.steps

    wait(done, 400, f"{system.name} does not finish", every=0.1)
    wait(lambda: not scheduler.state(_job(system, job)), 120, f"{system.name}: its job goes on")
    return moments


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        folder, run, steps = sys.argv[2:]
        train_with_trainer(Path(folder), Path(run), int(steps))
        return
    parser = report.parser("chaos_peers", __doc__, "one preemption instead of three")
    arguments = parser.parse_args()
    goals = [13] if arguments.quick else [13, 26, 38]
    with tempfile.TemporaryDirectory(prefix="radhpc-peers-") as folder:
        ratios, figures = measure(Path(folder), 12 + goals[-1], goals)
    report.show(f"{len(goals)} preemptions", ratios, figures, NOTES, arguments.json)


if __name__ == "__main__":
    report.run(main)
