"""Define the hooks of the training loop: evaluation, curves, the progress bar.

Saving (training/async_checkpoint.py), profiling and stragglers are hooks, too.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor

from radhpc.core import compat_torch
from radhpc.core.board import RESTART, Board
from radhpc.core.log import Bar
from radhpc.core.protocol import Cause, Event
from radhpc.core.run_folder import node_name
from radhpc.core.sample import Split
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import Interrupted
from radhpc.engine.flop_counter import peak_flops
from radhpc.evaluation import evaluate, report_page
from radhpc.evaluation.scoring import CLASSIFIERS, classified
from radhpc.models import adapters
from radhpc.serving.export import write_adapter
from radhpc.training.context import RunContext, StageContext
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.loop import Position, StepMetrics, StepTiming
from radhpc.training.sources import open_source
from radhpc.training.straggler import StragglerMonitor

log = logging.getLogger("radhpc")


class EvaluationHook:
    """Evaluates a step once: a step whose scores exist is not evaluated again after a resume."""

    def __init__(self, stage: StageContext) -> None:
        self.stage, self.context, self.board = stage, stage.context, stage.board

    def __call__(self, position: Position, metrics: StepMetrics | None = None, split: Split | None = None) -> None:
        context = self.context
        context.ranks.watchdog.beat("evaluating", slow=True)
        split = split or context.recipe.evaluation.split
        folder = context.run.path / "evaluation" / f"step-{position.step:06d}"
        if context.ranks.broadcast((folder / "scores.json").exists()):
            self._prune(position)
            return
        held_out = open_source(context, position.stage, split)
        if not len(held_out):
            log.info("no study in split '%s': nothing to evaluate", split)
            return
        started = time.perf_counter()
        count = len(evaluate.choose_studies(held_out, context.recipe.evaluation.samples))
        with Bar(f"evaluate step {position.step}", count, unit="studies", hidden=not context.ranks.first) as bar:

            def check(done: int) -> None:
                context.ranks.watchdog.beat("evaluating", slow=True)
                context.stop.check(context.ranks.max)
                bar.update(done)

            training = open_source(context, position.stage, "train")
            result = evaluate.evaluate(
                lambda: self.stage.engine,
                evaluate.EvaluationTask(
                    build_encoder(context, position.stage),
                    held_out,
                    training,
                    context.recipe.evaluation,
                    folder,
                    f"step {position.step} of this run",
                ),
                context.ranks,
                check,
                context.stop,
            )
            bar.update(count)
        if context.ranks.first:
            evaluate.write(folder, result, position.step, split)
            report_page.write(folder, held_out)
            values = {f"evaluation/{name}": score["value"] for name, score in result.scores.items()}
            self.board.scalars(position.step, values)
            for n, picture in enumerate(result.pictures):
                self.board.picture(position.step, f"reports/{n}", picture)
            for kind, (prefix, _) in CLASSIFIERS.items():
                for name, (probabilities, truth) in classified(result.rows, kind).items():
                    self.board.curve(position.step, f"precision_and_recall/{prefix}{name}", probabilities, truth)
            self.board.text(position.step, "evaluation/table", "\n".join(evaluate.table(result)))
            self.board.flush()
            seconds = round(time.perf_counter() - started, 1)
            context.run.record(
                Event.EVALUATED, step=position.step, split=split, samples=len(result.rows), seconds=seconds
            )
        self._prune(position)

    def _prune(self, position: Position) -> None:
        """End the run on all ranks if the sweep asks for it, but not at the very last step."""
        context = self.context
        if context.trial is None:
            return
        last = position.stage_done and position.stage == len(context.recipe.stages) - 1
        prune = context.trial.should_prune(position.step) and not last if context.ranks.first else False
        if context.ranks.broadcast(prune):
            raise Interrupted(Cause.PRUNED)


def board_hook(stage: StageContext, restarted: bool = False) -> Callable[[Position, StepMetrics], None]:
    """Return the hook that writes the curves of a step; it marks the first point after a restart."""
    context, engine, board = stage.context, stage.engine, stage.board
    life, ranks, stage_name = context.run.lives, context.ranks, stage.settings.name
    ceiling, groups = peak_flops(ranks.device, engine.dtype), build_encoder(context, stage.number).loss_groups

    def write(position: Position, metrics: StepMetrics) -> None:
        nonlocal restarted
        marks = {f"by_stage/{RESTART}": metrics.engine.loss} if restarted else {}
        restarted = False
        by_group = zip(groups, metrics.engine.by_group, strict=False)
        speed = engine.meter.speed(metrics.samples / ranks.world, metrics.seconds, ceiling)
        board.scalars(
            position.step,
            {
                "train/loss": metrics.engine.loss,
                "train/gradient_norm": metrics.engine.gradient_norm,
                "train/stage": position.stage,
                "train/life": life,
                f"by_stage/{stage_name}": metrics.engine.loss,
                **marks,
                "speed/samples_per_second": metrics.samples / metrics.seconds,
                "speed/tokens_per_second": metrics.tokens / metrics.seconds,
                "speed/step_seconds": metrics.seconds,
                "speed/data_wait_seconds": metrics.wait_seconds,
                "data/padding": metrics.padding,
                **{f"data/{name}": value for name, value in metrics.traffic.items()},
                "memory/gigabytes": _memory(ranks) / 1e9,
                **{f"speed/{name}": value for name, value in speed.items()},
                **{f"loss_by_{group}/{name}": loss / tokens for (group, name), (loss, tokens) in by_group if tokens},
                **{f"loss/{name}": value for name, value in metrics.engine.terms.items()},
                **{f"learning_rate/{name}": rate for name, rate in metrics.engine.learning_rates.items()},
            },
        )

    return write


class NodeMetrics:
    """Writes curves of each node: memory, own seconds per step, data wait, requests to stores, the node's cache.

    All ranks call it; it writes every WINDOW steps and at the end of a stage. For more than MANY nodes, it writes the
    least, the median and the most of them.
    """

    WINDOW = 50
    MANY = 16

    def __init__(self, board: Board, ranks: Ranks, traffic: Callable[[], dict[str, float]]) -> None:
        """`traffic`: returns the totals of this rank so far, as Stream.traffic() does."""
        self.board, self.ranks, self.traffic = board, ranks, traffic
        self._timings: list[StepTiming] = []
        self._traffic_before = traffic()

    def __call__(self, position: Position, metrics: StepMetrics) -> None:
        if self.ranks.world == 1:  # the curves of the node are those of the run
            return
        self._timings.append(metrics.timing)
        if len(self._timings) < self.WINDOW and not position.stage_done:
            return
        now = self.traffic()
        steps = len(self._timings)
        local = {
            "gigabytes": _memory(self.ranks) / 1e9,
            "own_seconds": sum(timing.seconds - timing.collective_seconds for timing in self._timings) / steps,
            "data_wait_seconds": sum(timing.data_seconds for timing in self._timings) / steps,
            **{name: (value - self._traffic_before[name]) / steps for name, value in now.items()},
        }
        self._traffic_before, self._timings = now, []
        gathered = self.ranks.gather((node_name(), local))
        if self.ranks.first:
            self.board.scalars(position.step, node_curves(gathered, self.MANY))


def node_curves(gathered: Sequence[tuple[str, Mapping[str, float]]], many: int) -> dict[str, float]:
    """Return the curves of nodes from the values of ranks, which come with the names of their nodes: the requests of a
    node's ranks add up, in all else the largest value counts.
    """
    nodes: dict[str, list[Mapping[str, float]]] = {}
    for node, values in gathered:
        nodes.setdefault(node, []).append(values)
    curves: dict[str, float] = {}
    for name in gathered[0][1]:
        combine = max if name in ("gigabytes", "own_seconds", "data_wait_seconds") else sum
        each = {node: combine(values[name] for values in of_ranks) for node, of_ranks in nodes.items()}
        if len(each) > many:
            ordered = sorted(each.values())
            each = {"least": ordered[0], "middle": ordered[len(ordered) // 2], "most": ordered[-1]}
        curves |= {f"nodes_{name}/{node}": value for node, value in each.items()}
    return curves


class GradientNorms:
    """Writes the gradient's norm of each parameter group, before clipping. All ranks call it: it has a collective."""

    def __init__(self, stage: StageContext) -> None:
        engine, context = stage.engine, stage.context
        self.board, self.ranks, self.every = stage.board, context.ranks, context.recipe.board.every
        self._names: list[str] = []
        self._squares: list[torch.Tensor] = []
        self._due = True
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            engine.optimizer.register_step_pre_hook(self._measure)
        else:
            log.info("no gradient norms by group: the engine's optimizer keeps its gradients to itself")

    def _measure(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Measure the gradients before the optimizer makes its step, because they do not outlive it."""
        if not self._due:
            return
        self._names = [group["name"] for group in optimizer.param_groups]
        self._squares = []
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
            norms = compat_torch.norms(local) if local else [torch.zeros(())]
            self._squares.append(torch.stack([norm.float() for norm in norms]).square().sum())

    def __call__(self, position: Position, metrics: StepMetrics) -> None:
        if self._due and self._squares:
            squares = self.ranks.sum([float(square) for square in self._squares])
            # By now they are clipped, and where each rank has all of them they count once per rank; the norm over all
            # groups, which the engine knows, corrects that.
            total = math.sqrt(sum(squares)) or 1.0
            shares = {name: math.sqrt(s) / total for name, s in zip(self._names, squares, strict=True)}
            norms = {f"gradient_norm/{name}": share * metrics.engine.gradient_norm for name, share in shares.items()}
            self.board.scalars(position.step, norms)
        self._squares = []
        self._due = (position.step + 1) % self.every == 0


class ProgressHook:
    """Writes progress.json once a second, for `status`, and moves the bar on the terminal; rates of the last minute.

    Marks a stage's first step in this life by the event "first_step": until then the job was starting up.
    """

    WINDOW = 60.0  # seconds

    def __init__(self, context: RunContext, bar: Bar, total_steps: int, stragglers: StragglerMonitor) -> None:
        self.context, self.bar, self.total_steps, self.stragglers = context, bar, total_steps, stragglers
        self._written = 0.0
        self._recent: deque[tuple[float, int, float]] = deque()  # after each step: time, its samples, its data wait

    def __call__(self, position: Position, metrics: StepMetrics) -> None:
        now = time.monotonic()
        stage = self.context.recipe.stages[position.stage].name
        if not self._recent:
            self.context.run.record(
                Event.FIRST_STEP, stage=stage, step=position.step, seconds=round(metrics.seconds, 3)
            )
            self._recent.append((now - metrics.seconds, 0, 0.0))
        self._recent.append((now, metrics.samples, metrics.wait_seconds))
        while len(self._recent) > 2 and self._recent[1][0] < now - self.WINDOW:
            self._recent.popleft()
        if now - self._written < 1 and not position.stage_done:
            return
        self._written = now
        steps, seconds = len(self._recent) - 1, max(now - self._recent[0][0], 1e-9)
        rate = sum(samples for _, samples, _ in list(self._recent)[1:]) / seconds
        wait = sum(wait for _, _, wait in list(self._recent)[1:]) / seconds
        loss = metrics.engine.loss
        self.bar.update(position.stage_step, f"loss {loss:.3f}  {rate:.0f} samples/s")
        slowest = self.stragglers.slowest
        self.context.run.write_progress(
            stage=stage,
            step=position.step,
            steps=self.total_steps,
            loss=loss,
            samples_per_second=round(rate, 2),
            step_seconds=round(seconds / steps, 4),
            data_wait=round(min(1.0, wait), 4),
            world=self.context.ranks.world,
            device=self.context.ranks.device.type,
            slowest=slowest and {"rank": slowest.rank, "host": slowest.host, "ratio": slowest.ratio},
        )


def export_adapter(stage: StageContext) -> None:
    """Write the stage's adapter where PEFT finds it."""
    lora, context = stage.settings.lora, stage.context
    if lora is None:
        return
    weights = stage.engine.weights()
    if context.ranks.first:
        write_adapter(context.run.path / "adapter", adapters.peft_config(lora), weights)


def _memory(ranks: Ranks) -> float:
    """Return the most bytes that this rank had on its GPU, or those that it has resident now."""
    on_gpu = ranks.device.type == "cuda"
    return torch.cuda.max_memory_allocated(ranks.device) if on_gpu else _resident_bytes()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
