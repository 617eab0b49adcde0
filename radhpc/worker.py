"""What every rank of a job runs: build the parts, restore the newest verified checkpoint, train, say how it ended.

outcome = run("runs/padchest-1")        # on each rank, with RANK, WORLD_SIZE, ... in the environment
"""

import contextlib
import errno
import json
import logging
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from radhpc import hooks, log as logs
from radhpc.board import Board
from radhpc.checkpoint import Cursor, read_cursor, read_tensors
from radhpc.dist import Ranks, lost_peer
from radhpc.engine import Engine
from radhpc.errors import UserError, first_line
from radhpc.files import write_atomically
from radhpc.ledger import Ledger
from radhpc.log import Bar
from radhpc.loop import Hook, Position, Quarantine, train
from radhpc.parts import Parts, Trial
from radhpc.run_dir import RunDir
from radhpc.stop import PRUNED, Interrupted, Stop
from radhpc.stream import Stream, stage_samples, stage_steps

log = logging.getLogger("radhpc")


@dataclass(frozen=True)
class Outcome:
    """How a rank's life ended."""

    state: Literal["finished", "interrupted", "pruned", "mistake", "lost_peer", "crashed"]
    cause: str = ""  # a signal's name or "stop"; the first line of an error
    step: int = 0


def run(path: str, trial: Trial | None = None) -> Outcome:
    """Work on a run until it is finished or interrupted. Errors are recorded for this rank, then raised.

    `trial`: the sweep that the run belongs to, if any, which may end it early.
    """
    run_dir = RunDir.open(path)
    rank = int(os.environ.get("RANK", "0"))
    logs.start(rank, int(os.environ.get("WORLD_SIZE", "1")))
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    ranks: Ranks | None = None
    _end_path(run_dir, rank).unlink(missing_ok=True)  # of the life before
    with Stop(run_dir if rank == 0 else None) as stop:
        try:
            ranks = Ranks()
            outcome = _run(run_dir, ranks, stop, trial)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                where = error.filename or run_dir.path
                full = UserError(f"{where}: {error.strerror}; free some space, then 'launch.py resume {run_dir.path}'")
                raise _recorded(run_dir, rank, full) from error
            raise _recorded(run_dir, rank, error)  # noqa: B904
        finally:
            if ranks is not None:
                ranks.close()
    _record_end(run_dir, rank, outcome)
    return outcome


def _run(run: RunDir, ranks: Ranks, stop: Stop, trial: Trial | None) -> Outcome:
    recipe = run.recipe()
    life = ranks.broadcast(run.lives + 1 if ranks.first else 0)
    if ranks.first:
        job = os.environ.get("SLURM_JOB_ID", "")
        run.record("started", life=life, job=job, world=ranks.world, engine=recipe.engine, host=socket.gethostname())
    parts = Parts(run, recipe, ranks, trial)
    position: Position | None = None
    try:
        lengths = [len(parts.source(n, "train")) for n in range(len(recipe.stages))]
        for n, length in enumerate(lengths):
            if not length:
                raise UserError(f"stage '{recipe.stages[n].name}': no sample of split 'train' in its shards")
        steps = [stage_steps(stage, length) for stage, length in zip(recipe.stages, lengths, strict=True)]
        _agree_on_data(parts, steps)
        stop.check(ranks.max)
        cursor = _restore(parts, run, ranks)
        board = Board(run.path / "tensorboard" if ranks.first else None, cursor.step if cursor else 0)
        board.event(cursor.step if cursor else 0, "resumed" if cursor else "started", _history(run))
        if trial is not None and ranks.first:
            board.hyperparameters(trial.parameters(), f"evaluation/{trial.metric}")
        ledger = Ledger(run.folder("ledger"), life, ranks.rank) if recipe.stream.audit else None
        known = ranks.broadcast([event["key"] for event in run.events("quarantined")] if ranks.first else [])
        quarantine = Quarantine(recipe.stream.max_bad_samples, known, _quarantined(run) if ranks.first else None)
        lineage: tuple[str, ...] = cursor.lineage if cursor else ()
        for number in range(cursor.stage if cursor else 0, len(recipe.stages)):
            here = cursor if cursor is not None and cursor.stage == number else None
            position = Position(
                stage=number,
                step=here.step if here else sum(steps[:number]),
                stage_step=here.stage_step if here else 0,
                stage_steps=steps[number],
                samples=here.samples if here else 0,
                stage_samples=stage_samples(recipe.stages[number], lengths[number]),
            )
            name = _run_stage(parts, position, here, lineage, board, ledger, quarantine, stop, sum(steps))
            lineage = (*lineage, name)
        board.event(sum(steps), "finished", "all stages are done")
        board.close()
        if ranks.first:
            run.record("finished", step=sum(steps))
        return Outcome("finished", step=sum(steps))
    except Interrupted as interrupted:
        step = position.step if position else 0
        state: Literal["interrupted", "pruned"] = "pruned" if interrupted.cause == PRUNED else "interrupted"
        if ranks.first:
            run.record(state, cause=interrupted.cause, step=step)
        log.info("interrupted by %s at step %d", interrupted.cause, step)
        return Outcome(state, interrupted.cause, step)


def _run_stage(
    parts: Parts,
    position: Position,
    cursor: Cursor | None,
    lineage: tuple[str, ...],
    board: Board,
    ledger: Ledger | None,
    quarantine: Quarantine,
    stop: Stop,
    total_steps: int,
) -> str:
    """Train one stage to its end; returns the name of its last checkpoint."""
    recipe, ranks, number = parts.recipe, parts.ranks, position.stage
    stage = recipe.stages[number]
    engine = parts.engine(number, lineage)
    if cursor is not None:
        parts.check(cursor)
        path = parts.checkpoints.folder / f"step-{cursor.step:06d}"
        engine.load(read_tensors(path, moments=True), cursor.stage_step)
    stop.check(ranks.max)
    _describe(engine, position, parts)
    saving = hooks.Saving(parts, engine, board, lineage)
    # A stage begins where a checkpoint stands: its own, or the last one of the stage before, which must not be written
    # over with this stage's untrained state when a signal comes before the first step.
    saving.saved_step = position.step if cursor is not None or number else -1
    evaluating = hooks.Evaluating(parts, engine, board, stop)
    stream = Stream(
        parts.source(number, "train"), parts.encoder, stage, number, recipe.stream, recipe.seed,
        ranks.rank, ranks.world, position.samples, pin=ranks.device.type == "cuda",
    )  # fmt: skip
    every = recipe.evaluation.every
    try:
        with Bar(stage.name, position.stage_steps, position.stage_step, "steps", not ranks.first) as bar:
            calls = [Hook(recipe.checkpoint.every, saving)]
            if ranks.first:
                calls.insert(0, Hook(recipe.board.every, hooks.board_hook(board, parts)))
                calls.insert(1, Hook(1, hooks.Progress(parts, bar, total_steps)))
            if every is not None:
                calls.append(Hook(every, evaluating))
                if cursor is not None and position.step % every == 0 and not position.stage_done:
                    evaluating(position)  # that the interruption prevented, or nothing where the scores are there
            train(stream, engine, stage, position, calls, ledger, quarantine, stop, ranks, recipe.seed)
        saving(position)
        hooks.export_adapter(parts, engine, position)
        if ranks.first and _last_finished(parts.run) < number:
            parts.run.record("stage_finished", stage=stage.name, number=number, step=position.step)
        last = number == len(recipe.stages) - 1
        # A sweep chooses by its trials' scores, so that the test split is none of its business.
        evaluating(position, split="test" if last and parts.trial is None else None)
    except Interrupted as interrupted:
        saving(position)
        board.event(position.step, "interrupted", interrupted.cause)
        board.close()
        raise
    finally:
        stream.close()
    return f"step-{position.step:06d}"


def _agree_on_data(parts: Parts, steps: list[int]) -> None:
    """Before step one: all ranks see the same manifests and so count the same steps, and no shard was cut."""
    stages, ranks = range(len(steps)), parts.ranks
    mine = [(parts.source(n, "train").hashes, steps[n]) for n in stages]
    for rank, theirs in enumerate(ranks.gather(mine)):
        for n in stages:
            if theirs[n] != mine[n]:
                raise UserError(
                    f"stage '{parts.recipe.stages[n].name}': rank {rank} sees other shards than rank {ranks.rank}: "
                    f"{theirs[n][1]} steps there, {steps[n]} here; all nodes must read the same manifests"
                )
    problem = None
    if ranks.first:
        try:
            for n in stages:
                parts.source(n, "train").check_sizes()
        except UserError as error:
            problem = str(error)
    if (problem := ranks.broadcast(problem)) is not None:
        raise UserError(problem)


def _quarantined(run: RunDir) -> Callable[[str, str], None]:
    def record(key: str, fault: str) -> None:
        log.warning("left out: %s: %s", key, fault)
        run.record("quarantined", key=key, fault=fault)

    return record


def _restore(parts: Parts, run: RunDir, ranks: Ranks) -> Cursor | None:
    """The cursor of the newest checkpoint that verifies, on all ranks; names those that were skipped."""
    name = None
    if ranks.first:
        path, skipped = parts.checkpoints.newest()
        for torn, fault in skipped:
            log.warning("checkpoint %s is skipped: %s", torn, fault)
            run.record("skipped_checkpoint", name=torn, fault=fault)
        name = path.name if path else None
        if path is not None:
            run.record("resumed", checkpoint=path.name, step=read_cursor(path).step)
    name = ranks.broadcast(name)
    return None if name is None else read_cursor(parts.checkpoints.folder / name)


def _describe(engine: Engine, position: Position, parts: Parts) -> None:
    trained = sum(parameter.numel() for parameter in engine.trained.values())
    total = sum(parameter.numel() for parameter in engine.model.parameters())
    log.info(
        "stage %s: %s of %s parameters trained, steps %d to %d, %d rank(s)",
        parts.recipe.stages[position.stage].name,
        f"{trained:,}",
        f"{total:,}",
        position.stage_step,
        position.stage_steps,
        parts.ranks.world,
    )


def _history(run: RunDir) -> str:
    """The events so far as Markdown, for the board."""
    return "\n".join(f"- {event['time']} {event['event']} {event.get('cause', '')}" for event in run.events())


def _last_finished(run: RunDir) -> int:
    return max((event["number"] for event in run.events("stage_finished")), default=-1)


def _kind(error: BaseException) -> Literal["mistake", "lost_peer", "crashed"]:
    if isinstance(error, UserError):
        return "mistake"
    return "lost_peer" if lost_peer(error) else "crashed"


def _recorded(run: RunDir, rank: int, error: BaseException) -> BaseException:
    """Record how this rank ends by an error, as far as the disk allows, and give the error back."""
    with contextlib.suppress(OSError):
        _record_end(run, rank, Outcome(_kind(error), first_line(error)), traceback.format_exc())
    return error


def _record_end(run: RunDir, rank: int, outcome: Outcome, trace: str = "") -> None:
    """How this rank's life ended, for slurm.requeue to read once all are gone; a killed rank leaves no such file."""
    data = {**asdict(outcome), "host": socket.gethostname(), "traceback": trace}
    write_atomically(_end_path(run, rank), json.dumps(data).encode(), 0o600)


def _end_path(run: RunDir, rank: int) -> Path:
    return run.folder("logs") / f"end.rank-{rank:05d}.json"
