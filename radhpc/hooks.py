"""What happens beside the steps: saving, evaluating, the board and the progress bar. Each is a hook of the loop."""

import logging
import time
from collections.abc import Callable

import torch

from radhpc import adapters, evaluate
from radhpc.board import Board
from radhpc.checkpoint import Cursor
from radhpc.engine import Engine
from radhpc.export import write_adapter
from radhpc.log import Bar
from radhpc.loop import Position, Report
from radhpc.parts import Parts
from radhpc.recipe import Split
from radhpc.stop import PRUNED, Interrupted, Stop

log = logging.getLogger("radhpc")


class Saving:
    """Writes checkpoints, says so, and deletes old ones."""

    def __init__(self, parts: Parts, engine: Engine, board: Board, lineage: tuple[str, ...]) -> None:
        self.parts, self.engine, self.board, self.lineage = parts, engine, board, lineage
        self.saved_step = -1

    def __call__(self, position: Position, report: Report | None = None) -> None:
        if position.step == self.saved_step or (report is not None and position.stage_done):
            return  # the end of a stage saves by itself
        parts, started = self.parts, time.perf_counter()
        cursor = Cursor(
            stage=position.stage,
            step=position.step,
            stage_step=position.stage_step,
            samples=position.samples,
            stage_done=position.stage_done,
            lineage=self.lineage,
            recipe=parts.recipe.hash,
            base=parts.base_hash,
            data=parts.source(position.stage, "train").hashes,
            world=parts.ranks.world,
            engine=parts.recipe.engine,
        )
        path = parts.checkpoints.save(self.engine.state(), cursor, parts.ranks)
        self.saved_step = position.step
        seconds = time.perf_counter() - started
        if parts.ranks.first:
            size = sum(file.stat().st_size for file in path.iterdir())
            parts.run.record("saved", step=position.step, seconds=round(seconds, 3), bytes=size)
            self.board.scalars(position.step, {"checkpoint/seconds": seconds, "checkpoint/megabytes": size / 1e6})
            parts.checkpoints.prune(parts.recipe.checkpoint.keep)


class Evaluating:
    """Evaluates a step once: a step whose scores are there is not evaluated again after a resume."""

    def __init__(self, parts: Parts, engine: Engine, board: Board, stop: Stop) -> None:
        self.parts, self.engine, self.board, self.stop = parts, engine, board, stop

    def __call__(self, position: Position, report: Report | None = None, split: Split | None = None) -> None:
        parts = self.parts
        split = split or parts.recipe.evaluation.split
        folder = parts.run.path / "evaluation" / f"step-{position.step:06d}"
        if parts.ranks.broadcast((folder / "scores.json").exists()):
            self._prune(position)
            return
        held_out = parts.source(position.stage, split)
        if not len(held_out):
            log.info("no study in split '%s': nothing to evaluate", split)
            return
        started = time.perf_counter()
        share = -(-len(evaluate.chosen(held_out, parts.recipe.evaluation.samples)) // parts.ranks.world)
        with Bar(f"evaluate step {position.step}", share, unit="studies", hidden=not parts.ranks.first) as bar:

            def check(done: int) -> None:
                self.stop.check(parts.ranks.max)
                bar.update(min(done, share))

            training = parts.source(position.stage, "train")
            result = evaluate.evaluate(
                self.engine, parts.encoder, held_out, training, parts.recipe.evaluation, parts.ranks, check
            )
            bar.update(share)
        if parts.ranks.first:
            evaluate.write(folder, result, position.step, split)
            values = {f"evaluation/{name}": score["value"] for name, score in result.scores.items()}
            self.board.scalars(position.step, values)
            for n, picture in enumerate(result.pictures):
                self.board.picture(position.step, f"reports/{n}", picture)
            self.board.text(position.step, "evaluation/table", "\n".join(evaluate.table(result)))
            self.board.flush()
            seconds = round(time.perf_counter() - started, 1)
            parts.run.record("evaluated", step=position.step, split=split, samples=len(result.rows), seconds=seconds)
        self._prune(position)

    def _prune(self, position: Position) -> None:
        """End here, on all ranks, if the sweep says so; the last step of all is no place to end early."""
        parts = self.parts
        if parts.trial is None:
            return
        last = position.stage_done and position.stage == len(parts.recipe.stages) - 1
        prune = parts.trial.should_prune(position.step) and not last if parts.ranks.first else False
        if parts.ranks.broadcast(prune):
            raise Interrupted(PRUNED)


def board_hook(board: Board, parts: Parts) -> Callable[[Position, Report], None]:
    """Curves of every step."""

    def write(position: Position, report: Report) -> None:
        device = parts.ranks.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes()
        board.scalars(
            position.step,
            {
                "train/loss": report.engine.loss,
                "train/gradient_norm": report.engine.gradient_norm,
                "train/stage": position.stage,
                "speed/samples_per_second": report.samples / report.seconds,
                "speed/tokens_per_second": report.tokens / report.seconds,
                "speed/step_seconds": report.seconds,
                "speed/data_wait_seconds": report.wait_seconds,
                "data/padding": report.padding,
                **{f"data/{name}": value for name, value in report.traffic.items()},
                "memory/gigabytes": memory / 1e9,
                **{f"learning_rate/{name}": rate for name, rate in report.engine.learning_rates.items()},
            },
        )

    return write


class Progress:
    """progress.json once a second, for `status`, and the bar on the terminal."""

    def __init__(self, parts: Parts, bar: Bar, total_steps: int) -> None:
        self.parts, self.bar, self.total_steps = parts, bar, total_steps
        self._written, self._samples, self._since = 0.0, 0, time.monotonic()

    def __call__(self, position: Position, report: Report) -> None:
        self._samples += report.samples
        now = time.monotonic()
        if now - self._written < 1 and not position.stage_done:
            return
        rate = self._samples / (now - self._since) if now > self._since else 0.0
        self._written, self._samples, self._since = now, 0, now
        loss = report.engine.loss
        self.bar.update(position.stage_step, f"loss {loss:.3f}  {rate:.0f} samples/s")
        stage = self.parts.recipe.stages[position.stage].name
        self.parts.run.write_progress(
            stage=stage, step=position.step, steps=self.total_steps, loss=loss, samples_per_second=round(rate, 2)
        )


def export_adapter(parts: Parts, engine: Engine, position: Position) -> None:
    """Leave the stage's adapter where PEFT finds it."""
    lora = parts.recipe.stages[position.stage].lora
    if lora is None:
        return
    weights = engine.weights()
    if parts.ranks.first:
        write_adapter(parts.run.path / "adapter", adapters.peft_config(lora), weights)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
