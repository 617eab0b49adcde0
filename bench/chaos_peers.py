"""The same preemptions over the same small training: radhpc, submitit's stock checkpoint(), the Trainer's own resume.

    python -m bench.chaos_peers [--json] [--quick]

One real SLURM of two nodes (slurm/box.py), one small Mllama under LoRA, one data set, one number of steps, a checkpoint
every thirty of them, each system started as its own manual says:

| radhpc | `launch.py train` |
|---|---|
| submitit | a callable with `checkpoint()`, in it a DDP loop that saves adapter, optimizer and step |
| Trainer | transformers' Trainer in an sbatch script, `enable_jit_checkpoint`, resumed from the newest checkpoint |

Each trains once in peace, and once while an urgent job preempts each of its first lives when it has made twenty new
steps. A job that ends without having finished, and does not come back by itself, is submitted again at once, as a very
watchful person would; how often stands in the table. The time for which SLURM holds a requeued job back is ended at
once, for all three.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bench import report
from bench.chaos import hasten, losses, urgent, wait
from radhpc.core.files import read_lines
from radhpc.core.ledger import read_ledger
from radhpc.core.protocol import Event
from radhpc.core.run_folder import RunFolder
from slurm import box, scheduler
from slurm.job import master_port
from slurm.profile import FOLDER as PROFILES

ROOT = Path(__file__).resolve().parent.parent
LEFT = ("PENDING", "COMPLETED", "FAILED", "CANCELLED", "")  # states of a job whose ranks are gone
EVERY, BATCH, RATE, SEED = 30, 48, 1e-3, 0
LIFE = 20  # new steps of a life until it is preempted
GRACE = 10  # seconds
# submitit is killed up to 30 s after its grace, and must have something to train until then.
STEPS, QUICK_STEPS = 900, 500
LORA = {"rank": 2, "alpha": 4, "targets": ".*language_model.*(q|v)_proj"}
RECIPE = """
name: peers
seed: {seed}
replicate: true
shards: ['{shards}']
model:
{model}
stages:
  - {{name: adapt, steps: {steps}, batch: {batch}, micro_batch: {micro}, lora: {lora},
      optimizer: {{learning_rate: {rate}}}}}
checkpoint: {{every: {every}, keep: 3}}
evaluation: {{samples: 2, batch: 2, max_new_tokens: 2, images: 1}}
"""
NOTES = """\
goodput: the steps at the pace of the same run's last life, over the time from the submission to the last step.
until back: from the moment at which the job is in the queue again until the first step that was never made before.
as undisturbed: 1 where it is that of the same system's undisturbed run, to the last bit.
SLURM sends SIGTERM to a job that it preempts, unless its administrators have set preempt_send_user_signal. submitit
passes that signal by: its ranks train on until they are killed, and what came after the last checkpoint is made again.
The Trainer saves on it and ends with status 0, so that SLURM takes its job for completed.
Adapters are trained because the Trainer resumes them; of a Mllama that is trained whole it would load no weight: they
are saved under other names than it looks for, and it goes on after a warning (huggingface/transformers#43701)."""


@dataclass
class Course:
    """How one run went."""

    submitted: float
    ended: float = 0.0
    pace: float = 0.0  # seconds of a step in the last life
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

    def made(self, run: Path) -> dict[int, list[str]]:
        """The samples of each step that was made; of a step made twice, the last ones."""
        raise NotImplementedError

    def again(self, run: Path) -> int:
        """How many steps were made again."""
        raise NotImplementedError

    def losses(self, run: Path) -> dict[int, float]:
        """By step."""
        raise NotImplementedError


class Radhpc(System):
    name = "radhpc"

    def submit(self, run: Path) -> str:
        verb = ["resume", run] if run.exists() else ["train", self.folder / "recipe.yaml", "--run", run]
        command = [sys.executable, ROOT / "launch.py", *verb, "--on", self.folder / "box.yaml", "--json"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return str(json.loads(done.stdout.splitlines()[-1])["job"])

    def made(self, run: Path) -> dict[int, list[str]]:
        return read_ledger(run / "ledger").steps

    def again(self, run: Path) -> int:
        return sum(read_ledger(run / "ledger").replayed.values())

    def losses(self, run: Path) -> dict[int, float]:
        wait(lambda: bool(RunFolder(run).events(Event.FINISHED)), 120, "radhpc does not finish")
        return losses(run)


class Script(System):
    """A peer: each of its ranks writes `steps.rank-N.jsonl`."""

    def made(self, run: Path) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for path in run.glob("steps.rank-*.jsonl"):
            for step, line in {line["step"]: line for line in read_lines(path)}.items():
                found[step] = sorted([*found.get(step, []), *line["keys"]])
        return found

    def again(self, run: Path) -> int:
        times = Counter(line["step"] for line in read_lines(run / "steps.rank-0.jsonl"))
        return sum(times.values()) - len(times)

    def losses(self, run: Path) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in read_lines(run / "steps.rank-0.jsonl")}


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
        options = ("--partition=preemptible", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--requeue")
        command = ["sbatch", "--parsable", *options, "--time=60", f"--output={run}/log-%j.txt", str(script)]
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
    """The recipe's model with adapters, its samples in memory, and a file of the steps made."""

    def __init__(self, folder: Path, run: Path, rank: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from radhpc.core.recipe import load
        from radhpc.data.collate import StudyEncoder
        from radhpc.data.source import Source
        from radhpc.models import family as models

        recipe = load(folder / "recipe.yaml")
        family = models.family(recipe.model, str(folder / "tokenizer"))
        self._encoder = StudyEncoder(family, recipe.text, recipe.images)
        torch.manual_seed(SEED)
        lora = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=LORA["targets"])
        self.model = get_peft_model(family.build(recipe.seed), lora)
        source = Source(recipe.shards, "train")
        self.rows = [self._encoder.encode(*source.read(number)) for number in range(len(source))]
        self._file = (run / f"steps.rank-{rank}.jsonl").open("a")

    def batch(self, rows: list[Any]) -> dict[str, Any]:
        """For a DataLoader; the keys stay with the tensors."""
        return {**self._encoder.batch(rows), "keys": [row.key for row in rows]}

    def record(self, step: int, keys: list[str], loss: float) -> None:
        self._file.write(json.dumps({"step": step, "keys": keys, "loss": loss}) + "\n")
        self._file.flush()


class Stock:
    """submitit's own pattern: what is called is pickled, and `checkpoint` says what to submit in its place."""

    def __init__(self, folder: Path, run: Path, steps: int) -> None:
        self.folder, self.run, self.steps = folder, run, steps

    def __call__(self) -> None:
        import torch
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader, DistributedSampler

        rank, world = _join()
        torch.distributed.init_process_group("gloo")
        data = Data(self.folder, self.run, rank)
        model = DistributedDataParallel(data.model)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=RATE)
        step, path = 0, self.run / "checkpoint.pt"
        if path.exists():
            state = torch.load(path)
            set_peft_model_state_dict(data.model, state["adapter"])
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
                    adapter = get_peft_model_state_dict(data.model)
                    state = {"adapter": adapter, "optimizer": optimizer.state_dict(), "step": step}
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
    port = str(master_port(os.environ["SLURM_JOB_ID"]))
    os.environ.update(RANK=rank, WORLD_SIZE=world, LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return int(rank), int(world)


# The measurement


def course(system: System, run: Path, preemptions: int) -> Course:
    """Train from the beginning to the last step; so many lives are preempted when they have made some new steps."""
    found = Course(submitted=time.time())
    job = system.submit(run)

    def state() -> str:
        return scheduler.show_job(job, {"SLURM_CONF": system.conf}).get("JobState", "")

    def reach(goal: int, seconds: float) -> None:
        def reached() -> bool:
            hasten(system.conf, job)
            return max(system.made(run), default=0) >= goal

        wait(reached, seconds, f"{system.name} does not reach step {goal}")

    first = 1
    reach(first, 240)
    began = time.time()
    for _ in range(preemptions):
        reach(first + LIFE - 1, 240)
        urgent(system.conf)
        wait(lambda: state() in LEFT, 180, f"{system.name} is not preempted")
        again, first = time.time(), max(system.made(run)) + 1
        assert first < system.steps, f"{system.name} has finished before the grace was over: more steps are needed"
        if state() != "PENDING":
            found.by_hand += 1
            job = system.submit(run)
        reach(first, 240)
        began = time.time()
        found.back.append(began - again)
    reach(system.steps, 900)
    found.ended = time.time()
    found.pace = (found.ended - began) / (system.steps - first)
    wait(lambda: state() not in ("RUNNING", "COMPLETING"), 120, f"{system.name}: its job goes on")
    return found


def measure(folder: Path, steps: int, preemptions: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and figures."""
    from shards.build import BuildSettings, build
    from tests.conftest import TINY_MODEL

    shards = folder / "shards"
    settings = BuildSettings(workers=1, longest_side=56, shard_samples=16, work=folder / "work")
    build("phantom", None, str(shards), {"studies": "200", "size": "96"}, settings, lambda done, total: None)
    text = RECIPE.format(
        seed=SEED, shards=shards, model=TINY_MODEL, steps=steps, batch=BATCH, micro=BATCH // 2, lora=json.dumps(LORA),
        rate=RATE, every=EVERY,
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(text)
    figures: dict[str, float] = {}
    goodput, back = {}, {}
    with contextlib.ExitStack() as stack:
        stack.callback(box.down, folder / "box")
        conf = box.up(folder / "box", nodes=2, grace=GRACE)["conf"]
        profile = (PROFILES / "box.yaml").read_text().replace("/tmp/radhpc-box/slurm.conf", conf)
        (folder / "box.yaml").write_text(profile)
        for system in (Radhpc(folder, conf, steps), Submitit(folder, conf, steps), Trainer(folder, conf, steps)):
            name, calm, wild = system.name, folder / f"{system.name}-calm", folder / f"{system.name}-wild"
            print(f"{name}: undisturbed", file=sys.stderr, flush=True)
            course(system, calm, 0)
            if name == "radhpc":
                (folder / "tokenizer").symlink_to(calm / "tokenizer")
            print(f"{name}: preempted", file=sys.stderr, flush=True)
            found = course(system, wild, preemptions)
            goodput[name] = steps * found.pace / (found.ended - found.submitted)
            back[name] = statistics.median(found.back)
            wanted, mine = system.losses(calm), system.losses(wild)
            made, undisturbed = system.made(wild), system.made(calm)
            keys, others = Counter(sum(made.values(), [])), Counter(sum(undisturbed.values(), []))
            figures |= {
                f"{name}: goodput": goodput[name],
                f"{name}: seconds until back (median)": back[name],
                f"{name}: submitted again by hand": found.by_hand,
                f"{name}: steps made again": system.again(wild),
                f"{name}: samples too few": (others - keys).total(),
                f"{name}: samples too many": (keys - others).total(),
                f"{name}: last loss as undisturbed": float(mine[steps] == wanted[steps]),
                f"{name}: all losses as undisturbed": float(mine == wanted),
                f"{name}: all steps' samples as undisturbed": float(made == undisturbed),
                f"{name}: seconds in all": found.ended - found.submitted,
                f"{name}: seconds of a step": found.pace,
            }
            print(json.dumps(figures), file=sys.stderr, flush=True)
    peers = [name for name in goodput if name != "radhpc"]
    return {
        **{f"goodput, radhpc / {name}": goodput["radhpc"] / goodput[name] for name in peers},
        **{f"seconds until back, radhpc / {name}": back["radhpc"] / back[name] for name in peers},
    }, figures


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        folder, run, steps = sys.argv[2:]
        train_with_trainer(Path(folder), Path(run), int(steps))
        return
    parser = report.parser("chaos_peers", __doc__, "one preemption instead of two")
    arguments = parser.parse_args()
    steps, preemptions = (QUICK_STEPS, 1) if arguments.quick else (STEPS, 2)
    with tempfile.TemporaryDirectory(prefix="radhpc-peers-") as folder:
        ratios, figures = measure(Path(folder), steps, preemptions)
    report.show(f"{preemptions} preemptions, {steps} steps", ratios, figures, NOTES, arguments.json)


if __name__ == "__main__":
    report.run(main)
