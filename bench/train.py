"""What a training step costs here and elsewhere, on a CPU: the same tiny Mllama, batches and math, side by side.

    python -m bench.train [--json] [--quick]

Five programs train the recipe quickstart's model on the same ready batches: radhpc's loop with its ledger and
agreement, a bare PyTorch loop over the same layers, and three over transformers' own layers and loss: a bare loop,
accelerate and the Trainer. They run in turn, some steps each; the least of each step counts, in seconds of the
processor, and their losses must agree. Beside them: two ranks under FSDP and, where it is installed, DeepSpeed; the
padding that length-aware batches save; how long a step waits for a save; and the memory of the loss.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from bench import report
from radhpc.core.ledger import Ledger
from radhpc.core.protocol import Event
from radhpc.core.recipe import Recipe, load
from radhpc.core.run_folder import RunFolder
from radhpc.data.collate import IGNORE, TARGET_KEYS, Batch
from radhpc.data.stream import Step, Stream, StreamSpec
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import Stop
from radhpc.engine.fsdp import Engine
from radhpc.models import adapters, family, token_loss
from radhpc.planning.memory_trace import MemoryTrace
from radhpc.training.context import open_context
from radhpc.training.encoder_builder import build_encoder, build_family
from radhpc.training.engine_builder import build_engine
from radhpc.training.loop import Hook, Position, Quarantine, StageLoop, train
from radhpc.training.sources import open_source
from slurm.box_files import free_ports

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
BATCH, MICRO_BATCH = 16, 4
LOOPS = 180  # seconds for the five programs; the whole takes five minutes on two cores
NOTES = """\
step: 16 studies in micro-batches of 4, ready batches, forward to optimizer step, least of each step over the rounds.
bare loop: forward, cross-entropy, backward, clip_grad_norm_, AdamW; 'our layers' has segments and the chunked loss.
AdamW is what each has by itself: in one kernel with the Trainer and here ('our layers', too), else PyTorch's default.
save: all parameters and moments, asynchronous; 'waits' is what the step is held up, the rest runs beside it.
loss memory: 512 positions, all supervised, a frozen head of 128,256 rows, forward and backward, live tensors."""

Times = list[float]


class Ready:
    """Steps that are there already, in the place of a Stream; notes when each was asked for."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps, self.times = steps, Times()

    def traffic(self) -> dict[str, float]:
        return {}

    def __iter__(self) -> Iterator[Step]:
        for step in self._steps:
            self.times.append(time.process_time())
            yield step
        self.times.append(time.process_time())


class Bench:
    """The model, the batches, and one method for each program; each gives seconds per step and the losses."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self.recipe = recipe(folder, steps)
        context = open_context(run_folder(folder / "run", self.recipe), self.recipe, Ranks())
        stage = self.recipe.stages[0]
        self.family = build_family(context)
        self.tokenizer = str(self.family.tokenizer.name_or_path)
        training, encoder = open_source(context, 0, "train"), build_encoder(context, 0)
        stream = Stream(training, encoder, StreamSpec(stage, 0, self.recipe.stream, self.recipe.seed))
        self.steps = list(stream)
        stream.close()

    def model(self, attention: str = "segments") -> nn.Module:
        """The same random weights each time, ready to train."""
        given = self.recipe.model.model_copy(update={"attention": attention})
        model = family.family(given, self.tokenizer).build(self.recipe.seed)
        adapters.choose_trained(model, self.recipe.stages[0])
        return model.train()

    def ours(self) -> tuple[Times, Times]:
        stage, ranks = self.recipe.stages[0], Ranks()
        engine = Engine(self.model(), self.recipe, stage.optimizer, self.family.blocks, ranks)
        shutil.rmtree(self.folder / "ledger", ignore_errors=True)
        (self.folder / "ledger").mkdir()
        ready, losses = Ready(self.steps), Times()
        with Stop() as stop:
            loop = StageLoop(
                stream=ready,  # type: ignore[arg-type]
                engine=engine,
                stage=stage,
                hooks=[Hook(1, lambda position, metrics: losses.append(metrics.engine.loss))],
                ledger=Ledger(self.folder / "ledger", 1, 0),
                quarantine=Quarantine(0, (), None),
                stop=stop,
                ranks=ranks,
                seed=self.recipe.seed,
            )
            train(loop, Position(0, 0, 0, len(self.steps), 0, len(self.steps) * BATCH))
        return differences(ready.times), losses

    def bare(
        self, model: nn.Module, loss_sum: Callable[[nn.Module, Batch], torch.Tensor], fused: bool | None = None
    ) -> tuple[Times, Times]:
        optimizer, ready, losses = self.adamw(model, fused), Ready(self.steps), Times()
        for step in ready:
            total = 0.0
            for batch in step.micro_batches:
                loss = loss_sum(model, batch) / step.supervised
                loss.backward()
                total += float(loss.detach())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        return differences(ready.times), losses

    def accelerate(self) -> tuple[Times, Times]:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = self.model("sdpa")
        model, optimizer = accelerator.prepare(model, self.adamw(model))
        ready, losses = Ready(self.steps), Times()
        for step in ready:
            total = 0.0
            for batch in step.micro_batches:
                loss = plain(model, batch) / step.supervised
                accelerator.backward(loss)
                total += float(loss.detach())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        return differences(ready.times), losses

    def trainer(self) -> tuple[Times, Times]:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        steps, times, losses = self.steps, Times(), Times()
        rounds = len(steps[0].micro_batches)

        class Batches(torch.utils.data.Dataset[Batch]):
            def __len__(self) -> int:
                return len(steps) * rounds

            def __getitem__(self, number: int) -> Batch:
                return steps[number // rounds].micro_batches[number % rounds]  # type: ignore[no-any-return]

        class Watch(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                times.append(time.process_time())

        class Ours(Trainer):
            def get_train_dataloader(self) -> Any:
                return torch.utils.data.DataLoader(Batches(), batch_size=None)

            def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
                loss = super().training_step(*arguments, **options)
                losses.append(float(loss))
                return loss

        model = self.model("sdpa")
        optimizer = self.adamw(model, fused=True)
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"), use_cpu=True, max_steps=len(steps), report_to=[],
            gradient_accumulation_steps=rounds, max_grad_norm=1.0, lr_scheduler_type="constant", logging_strategy="no",
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=self.recipe.seed,
        )  # fmt: skip
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        with contextlib.redirect_stdout(sys.stderr):
            Ours(
                model, arguments, train_dataset=Batches(), callbacks=[Watch()], optimizers=(optimizer, constant)
            ).train()
        times.append(time.process_time())
        summed = np.asarray(losses).reshape(len(steps), rounds).sum(1)
        return differences(times), [float(value) for value in summed]

    def adamw(self, model: nn.Module, fused: bool | None = None) -> torch.optim.Optimizer:
        recipe = self.recipe.stages[0].optimizer
        return torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon, weight_decay=0.0,
            fused=fused,
        )  # fmt: skip


def plain(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The summed loss as transformers' users compute it: over all logits."""
    inputs = {name: value for name, value in batch.items() if name not in TARGET_KEYS}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def ours(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name not in TARGET_KEYS}
    return token_loss.summed_loss(model, inputs, batch["labels"])


def differences(times: Times) -> Times:
    return [float(value) for value in np.diff(times)]


def recipe(folder: Path, steps: int, *more: str) -> Recipe:
    """The quickstart's model, trained whole, at a constant rate."""
    return load(
        RECIPE,
        [
            f"shards=[{folder / 'phantom'}]",
            f"stages=[{{name: scratch, steps: {steps}, batch: {BATCH}, micro_batch: {MICRO_BATCH}, train: ['.*'], "
            "optimizer: {learning_rate: 1.0e-3, schedule: constant}}]",
            *more,
        ],
    )


def run_folder(path: Path, recipe: Recipe) -> RunFolder:
    return RunFolder.create(path, recipe)


def phantoms(folder: Path) -> None:
    from shards.build import BuildSettings, build

    settings = BuildSettings(workers=1, longest_side=112, shard_samples=64)
    build(
        "phantom", None, str(folder / "phantom"), {"studies": "160", "size": "112"}, settings, lambda done, all_: None
    )


def loops(bench: Bench, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per step of each program, in as many rounds as fit into so many seconds, at least two."""
    programs: Mapping[str, Callable[[], tuple[Times, Times]]] = {
        "radhpc": bench.ours,
        "bare loop, our layers": lambda: bench.bare(bench.model(), ours, fused=True),
        "bare loop, transformers' layers": lambda: bench.bare(bench.model("sdpa"), plain),
        "accelerate": bench.accelerate,
        "Trainer": bench.trainer,
    }
    least: dict[str, np.ndarray[Any, Any]] = {}
    losses: dict[str, Times] = {}
    began, rounds = time.perf_counter(), 0
    while rounds < 2 or (time.perf_counter() - began) * (rounds + 1) / rounds < seconds:
        for name, program in programs.items():
            times, losses[name] = program()
            here = np.asarray(times[1:])  # the first step makes the moments
            least[name] = np.minimum(least.get(name, here), here)
        rounds += 1
    apart = max(abs(a - b) for each in losses.values() for a, b in zip(each, losses["radhpc"], strict=True))
    assert apart < 1e-3, f"these programs do not compute the same: losses are {apart} apart"
    mean = {name: float(values.mean()) for name, values in least.items()}
    ratios = {f"step, radhpc / {name}": mean["radhpc"] / value for name, value in mean.items() if name != "radhpc"}
    figures = {f"milliseconds per step, {name}": 1e3 * value for name, value in mean.items()}
    return ratios, figures | {"rounds": float(rounds), "largest difference of a loss": apart}


def padding(steps: Sequence[Step]) -> tuple[dict[str, float], dict[str, float]]:
    """The part of the tokens that is padding, as our steps are cut and as chance would cut them."""
    rng = np.random.default_rng(0)
    tokens = ordered = chance = 0
    for step in steps:
        lengths = np.concatenate([batch["attention_mask"].sum(1).numpy() for batch in step.micro_batches])
        shuffled = rng.permutation(lengths).reshape(-1, MICRO_BATCH)
        tokens += int(lengths.sum())
        ordered += sum(batch["attention_mask"].numel() for batch in step.micro_batches)
        chance += int(shuffled.max(1).sum()) * MICRO_BATCH
    by_length, by_chance = 1 - tokens / ordered, 1 - tokens / chance
    return (
        {"tokens computed, length-aware / random batches": ordered / chance},
        {"padding, length-aware batches": by_length, "padding, random batches": by_chance},
    )


def save(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """How long a run's steps wait for a save, and until it is committed."""
    from radhpc import worker

    run = run_folder(folder / "saving", recipe(folder, 6, "checkpoint={every: 2, keep: 1}", "evaluation.samples=1"))
    with contextlib.redirect_stdout(sys.stderr):
        worker.run(str(run.path))
    events = run.events(Event.SAVED)
    waits = min(float(event["blocked_seconds"]) for event in events)
    whole = min(float(event["seconds"]) for event in events)
    megabytes = max(int(event["bytes"]) for event in events) / 1e6
    return (
        {"save, seconds that a step waits / until committed": waits / whole},
        {
            "milliseconds that a step waits for a save": 1e3 * waits,
            "milliseconds until a save is committed": 1e3 * whole,
            "megabytes of a checkpoint": megabytes,
        },
    )


def loss_memory() -> tuple[dict[str, float], dict[str, float]]:
    """The peak of live tensors, with the chunked loss and with all logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=128256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    model.lm_head.requires_grad_(False)
    batch = {"input_ids": torch.randint(0, 128256, (1, 512))}
    batch["labels"] = batch["input_ids"]
    peaks = {}
    for name, way in (("chunked", ours), ("plain", plain)):
        model.zero_grad()
        with MemoryTrace([*model.parameters(), *model.buffers()]) as memory:
            before = memory.current
            way(model, batch).backward()
        peaks[name] = (memory.peak - before) / 1e6
    return (
        {"memory of the loss, chunked / plain": peaks["chunked"] / peaks["plain"]},
        {f"megabytes of the loss, {name}": value for name, value in peaks.items()},
    )


def two_ranks(folder: Path, steps: int) -> dict[str, float]:
    """Milliseconds per step of each engine that is here, on two ranks of this machine."""
    figures = {}
    for engine in get_args(Recipe.model_fields["engine"].annotation):
        if engine == "single":
            continue
        if engine == "deepspeed":
            try:
                import deepspeed  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
            except ImportError:
                continue
        (port,) = free_ports("127.0.0.1", 1)
        command = [sys.executable, "-m", "bench.train", "--rank-of", str(folder), engine, str(steps)]
        environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # fmt: skip
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": str(n), "LOCAL_RANK": str(n)}, stdout=subprocess.PIPE)
            for n in range(2)
        ]
        try:
            answers = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        assert not any(rank.returncode for rank in ranks), f"engine {engine} failed on two ranks"
        figures[f"milliseconds per step, {engine} on two ranks"] = 1e3 * json.loads(answers[0].splitlines()[-1])
    return figures


def one_rank(folder: Path, engine: str, steps: int) -> None:
    """What two_ranks() starts: prints the median seconds of a step."""
    torch.set_num_threads(1)
    ranks = Ranks()
    here = recipe(folder, steps, f"engine={engine}")
    path = folder / f"run-{engine}"
    if ranks.first:
        run_folder(path, here)
    ranks.barrier()
    context = open_context(RunFolder.open(str(path)), here, ranks)
    stage = here.stages[0]
    training, encoder = open_source(context, 0, "train"), build_encoder(context, 0)
    spec = StreamSpec(stage, 0, here.stream, here.seed, ranks.rank, ranks.world)
    stream = Stream(training, encoder, spec)
    ready = list(stream)
    stream.close()
    trained, _ = build_engine(context, 0, ())
    seconds = []
    for step in ready:
        ranks.barrier()
        started = time.perf_counter()
        (supervised,) = ranks.sum([float(step.supervised)])
        trained.step(step.micro_batches, int(supervised), 1.0)
        seconds.append(time.perf_counter() - started)
    ranks.close()
    print(float(np.median(seconds[1:])), flush=True)


def measure(quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="radhpc-bench-") as name:
        folder = Path(name)
        phantoms(folder)
        bench = Bench(folder, 3 if quick else 12)
        found = [loops(bench, 0 if quick else LOOPS), padding(bench.steps), save(folder), loss_memory()]
        ratios = {name: value for ratio, _ in found for name, value in ratio.items()}
        figures = {name: value for _, figure in found for name, value in figure.items()}
        if not quick:
            figures |= two_ranks(folder, 12)
    return ratios, figures


def main() -> None:
    parser = report.parser("train", __doc__, "three steps, two rounds and no second rank: to see that it runs")
    parser.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        folder, engine, steps = arguments.rank_of
        one_rank(Path(folder), engine, int(steps))
        return
    report.show("Training steps", *measure(arguments.quick), NOTES, arguments.json)


if __name__ == "__main__":
    report.run(main)
