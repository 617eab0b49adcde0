"""What every rank of a job runs: build the parts, restore the newest verified checkpoint, train, say how it ended.

outcome = run("runs/padchest-1")        # on each rank, with RANK, WORLD_SIZE, ... in the environment
"""

import contextlib
import json
import logging
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import asdict

import torch

from radhpc import hooks
from radhpc.core import environment, log as logs
from radhpc.core.board import Board, WandbCurves
from radhpc.core.errors import UserError, first_line
from radhpc.core.files import FULL, read_json, write_atomically
from radhpc.core.ledger import Ledger
from radhpc.core.log import Bar
from radhpc.core.protocol import Cause, CulpritRecord, Event, Outcome, OutcomeState
from radhpc.core.recipe import Recipe
from radhpc.core.run_folder import RunFolder, step_of
from radhpc.data import tasks
from radhpc.data.stream import Stream, StreamSpec, stage_samples, stage_steps
from radhpc.distributed.background import run_in_background, run_on_first
from radhpc.distributed.malloc import keep_freed_memory
from radhpc.distributed.ranks import Ranks, lost_peer
from radhpc.distributed.stop import Interrupted, Stop
from radhpc.distributed.watchdog import Limits, Watchdog
from radhpc.engine.checkpoint import Checkpoints, Cursor, name_of
from radhpc.engine.fsdp import Engine
from radhpc.evaluation import job as evaluation_job
from radhpc.training import compilation, stage_transition
from radhpc.training.async_checkpoint import Ending, Saving
from radhpc.training.context import RunContext, StageContext, Trial, open_context
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.engine_builder import build_engine, check_cursor
from radhpc.training.loop import Hook, Position, Quarantine, train
from radhpc.training.out_of_memory import out_of_memory
from radhpc.training.profiling import Profiling
from radhpc.training.retrieval_libraries import build_libraries
from radhpc.training.sources import open_source
from radhpc.training.straggler import Stragglers

log = logging.getLogger("radhpc")


def run(path: str, stop: Stop | None = None, trial: Trial | None = None) -> Outcome:
    """Work on a run until it is finished or interrupted. Errors are recorded for this rank, then raised.

    `stop`: a flag that listens already, since before this module was imported.
    `trial`: the sweep that the run belongs to, if any, which may end it early.
    """
    run_dir = RunFolder.open(path)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logs.start_logging(rank, world)
    keep_freed_memory()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    ranks: Ranks | None = None
    run_dir.end_path(rank).unlink(missing_ok=True)  # of the life before

    def end(state: OutcomeState, cause: str, step: int, culprits: list[CulpritRecord]) -> None:
        run_dir.record_end(rank, Outcome(state, cause, step), culprits=culprits)

    watchdog = Watchdog(run_dir, rank, world, Limits.from_environment(), end)
    with contextlib.nullcontext(stop) if stop else Stop() as stop:
        stop.run = run_dir if rank == 0 else None
        try:
            ranks = Ranks(watchdog)
            outcome = _run(run_dir, ranks, stop, trial)
        except BaseException as error:
            watchdog.give_way()
            if isinstance(error, torch.OutOfMemoryError):
                raise _recorded(run_dir, rank, out_of_memory(run_dir, rank, world)) from error
            if isinstance(error, OSError) and error.errno in FULL:
                where = error.filename or run_dir.path
                full = UserError(f"{where}: {error.strerror}; free some space, then 'radhpc resume {run_dir.path}'")
                raise _recorded(run_dir, rank, full) from error
            raise _recorded(run_dir, rank, error)  # noqa: B904
        finally:
            if ranks is not None:
                ranks.close()
            watchdog.close()
    run_dir.record_end(rank, outcome)
    return outcome


def _run(run: RunFolder, ranks: Ranks, stop: Stop, trial: Trial | None) -> Outcome:
    recipe = run.recipe()
    life = ranks.broadcast(run.lives + 1 if ranks.first else 0)
    if ranks.first:
        job = os.environ.get("SLURM_JOB_ID", "")
        nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
        run.record(Event.STARTED, life=life, job=job, world=ranks.world, engine=recipe.engine, nodes=nodes)
        run.reserve_space()
    _agree_on_environment(run, recipe, ranks)
    if run.evaluated_run is not None:
        return _evaluate(run, ranks, stop)
    context = open_context(run, recipe, ranks, stop, trial)
    compilation.prepare(context)
    position: Position | None = None
    try:
        lengths = (
            run_in_background(
                lambda: [len(open_source(context, n, "train")) for n in range(len(recipe.stages))], ranks, stop
            )
            or []
        )
        for n, length in enumerate(lengths):
            if not length:
                raise UserError(f"stage '{recipe.stages[n].name}': no sample of split 'train' in its shards")
        steps = [stage_steps(stage, length) for stage, length in zip(recipe.stages, lengths, strict=True)]
        _agree_on_data(context, steps)
        for stage, number in zip(recipe.stages, range(len(steps)), strict=True):
            run_on_first(
                lambda s=stage, n=number: tasks.check(recipe, s, open_source(context, n, "train")), ranks, stop
            )
        build_libraries(context)
        cursor = _restore(context, run, life, ranks)
        wandb = recipe.board.wandb if ranks.first else None
        curves = WandbCurves(wandb, run.path, life) if wandb is not None else None
        board = Board(run.path / "tensorboard" if ranks.first else None, cursor.step if cursor else 0, curves)
        board.layout([stage.name for stage in recipe.stages])
        board.event(cursor.step if cursor else 0, Event.RESUMED if cursor else Event.STARTED, _history(run))
        if trial is not None and ranks.first:
            board.hyperparameters(trial.parameters(), f"evaluation/{trial.metric}")
        ledger = Ledger(run.folder("ledger"), life, ranks.rank) if recipe.stream.audit else None
        known = ranks.broadcast([event["key"] for event in run.events(Event.QUARANTINED)] if ranks.first else [])
        quarantine = Quarantine(recipe.stream.max_bad_samples, known, _quarantined(run) if ranks.first else None)
        lineage: tuple[str, ...] = cursor.lineage if cursor else ()
        reached = 0
        if cursor is not None and cursor.origin:  # the end of a stage that another run has trained
            lineage, reached = (*lineage, name_of(cursor.step)), cursor.step
        for number in range(len(lineage), len(recipe.stages)):
            here = cursor if cursor is not None and cursor.stage == number else None
            position = Position(
                stage=number,
                step=here.step if here else reached,
                stage_step=here.stage_step if here else 0,
                stage_steps=steps[number],
                samples=here.samples if here else 0,
                stage_samples=stage_samples(recipe.stages[number], lengths[number]),
            )
            name = _run_stage(context, position, here, lineage, board, ledger, quarantine, stop, sum(steps))
            lineage, reached = (*lineage, name), position.step
        board.event(reached, Event.FINISHED, "all stages are done")
        board.end_session()
        board.close()
        if ranks.first:
            run.record(Event.FINISHED, step=reached)
            run.release_space()
        return Outcome(OutcomeState.FINISHED, step=reached)
    except Interrupted as interrupted:
        ending: Ending = interrupted.ending or _before_training(context, stop)
        step = position.step if position else ending.committed_step or 0
        pruned = interrupted.cause == Cause.PRUNED
        state = OutcomeState.PRUNED if pruned else OutcomeState.INTERRUPTED
        if ranks.first:
            event = Event.PRUNED if pruned else Event.INTERRUPTED
            run.record(event, cause=interrupted.cause, step=step, **asdict(ending))
        log.info("%s by %s at step %d: %s", state, interrupted.cause, step, ending)
        return Outcome(state, interrupted.cause, step)


def _evaluate(job: RunFolder, ranks: Ranks, stop: Stop) -> Outcome:
    """Of a job that evaluates another run; what it has generated is on the disk already when it is interrupted."""
    try:
        step = evaluation_job.work(job, ranks, stop)
    except Interrupted as interrupted:
        if ranks.first:
            job.record(Event.INTERRUPTED, cause=interrupted.cause, waited_seconds=round(stop.waited, 3))
        return Outcome(OutcomeState.INTERRUPTED, interrupted.cause)
    if ranks.first:
        job.record(Event.FINISHED, step=step)
    return Outcome(OutcomeState.FINISHED, step=step)


def _before_training(context: RunContext, stop: Stop) -> Ending:
    """Nothing is lost by an interruption of the start-up: the next life goes on from what is committed."""
    steps = [step_of(name) for name in context.checkpoints.committed()] if context.ranks.first else []
    return Ending(max(steps, default=None), "last checkpoint", stop.margin, round(stop.waited, 3))


def _run_stage(
    context: RunContext,
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
    recipe, ranks, number = context.recipe, context.ranks, position.stage
    engine, base_hash = _load_engine(context, number, cursor, lineage)
    stage = StageContext(context, number, engine, base_hash, lineage, board)
    training, encoder = open_source(context, number, "train"), build_encoder(context, number)
    encoder.set_loss_groups([part.manifest.dataset for part in training.datasets])
    compilation.warm_up(stage)
    stop.check(ranks.max)
    _describe(stage, position)
    saving = Saving(stage)
    saving.expect()
    if cursor is not None or number:
        # A stage begins where a checkpoint stands: its own, or the last one of the stage before, which must not be
        # written over with this stage's untrained state when a signal comes before the first step.
        saving.start_at(position.step)
    evaluating, profiling = hooks.Evaluating(stage), Profiling(context.run, ranks, board)
    spec = StreamSpec(
        stage.settings, number, recipe.stream, recipe.seed, ranks.rank, ranks.world, position.samples,
        pin=ranks.device.type == "cuda",
    )  # fmt: skip
    stream = Stream(training, encoder, spec, should_stop=stop.poll)
    try:
        with Bar(stage.settings.name, position.stage_steps, position.stage_step, "steps", not ranks.first) as bar:
            stragglers = Stragglers(context.run, ranks, board)
            calls = [Hook(1, stragglers), Hook(1, hooks.GroupNorms(stage))]
            calls.append(Hook(1, hooks.Nodes(board, ranks, stream.traffic)))
            calls.append(Hook(recipe.checkpoint.every, saving))
            if ranks.first:
                calls.insert(0, Hook(recipe.board.every, hooks.board_hook(stage, cursor is not None)))
                calls.insert(1, Hook(1, hooks.Progress(context, bar, total_steps, stragglers)))
                calls.append(Hook(1, profiling))
            if (every := recipe.evaluation.every) is not None:
                calls.append(Hook(every, evaluating))
                if cursor is not None and position.step % every == 0 and not position.stage_done:
                    evaluating(position)  # that the interruption prevented, or nothing where the scores are there
            train(stream, engine, stage.settings, position, calls, ledger, quarantine, stop, ranks, recipe.seed)
        saving.finish(position)
        hooks.export_adapter(stage)
        if ranks.broadcast(_last_finished(context.run) < number):
            loss = stage_transition.probe(context, engine, number)
            if ranks.first:
                context.run.record(
                    Event.STAGE_FINISHED, stage=stage.settings.name, number=number, step=position.step, loss=loss
                )
        last = number == len(recipe.stages) - 1
        # A sweep chooses by its trials' scores, so that the test split is none of its business.
        evaluating(position, split="test" if last and context.trial is None else None)
    except Interrupted as interrupted:
        interrupted.ending = saving.interrupted(position)
        board.event(position.step, Event.INTERRUPTED, interrupted.cause)
        if interrupted.cause == Cause.PRUNED:
            board.end_session()
        board.close()
        raise
    finally:
        stream.close()
        profiling.close()
    return name_of(position.step)


def _load_engine(
    context: RunContext, number: int, cursor: Cursor | None, lineage: tuple[str, ...]
) -> tuple[Engine, str]:
    """Return the engine of a stage, as its own last checkpoint or the stages before it have left the model, and the
    hash of its base model.
    """
    ranks = context.ranks
    ranks.watchdog.beat(f"loading stage {context.recipe.stages[number].name}", slow=True)
    engine, base_hash = build_engine(context, number, lineage)
    if cursor is not None:
        check_cursor(context, cursor, base_hash)
        name = name_of(cursor.step)
        tensors = run_in_background(lambda: context.checkpoints.tensors(name, moments=True), ranks, context.stop)
        assert tensors is not None
        engine.load(tensors, cursor.stage_step)
    elif number:
        stage_transition.check(context, engine, number)
    return engine, base_hash


def _agree_on_environment(run: RunFolder, recipe: Recipe, ranks: Ranks) -> None:
    """All ranks run the same recipe and code with the same libraries; what is not as it was at the submission is
    recorded.
    """
    read = ranks.gather((recipe.hash, recipe.engine))
    for rank, theirs in enumerate(read):
        if theirs != read[0]:
            raise UserError(
                f"rank {rank} reads another {run.path}/recipe.yaml than rank 0: {theirs[1]} {theirs[0][:12]} there, "
                f"{read[0][1]} {read[0][0][:12]} on rank 0; all nodes must see the same run folder"
            )
    prints = ranks.gather(environment.take())
    for rank, theirs in enumerate(prints):
        if what := environment.differences(prints[0], theirs):
            named = ", ".join(f"{name} {there} there, {here} on rank 0" for name, (here, there) in what.items())
            raise UserError(f"rank {rank} runs something else than rank 0: {named}; all nodes must be set up alike")
    if not ranks.first or (frozen := read_json(run.code / "environment.json")) is None:
        return
    if "python" not in frozen:  # the submission could not look into the container that this runs in
        frozen |= environment.versions()
        write_atomically(run.code / "environment.json", json.dumps(frozen, indent=1).encode(), 0o600)
    if what := environment.differences(frozen, prints[0]):
        named = ", ".join(f"{name} {now}, frozen was {was}" for name, (was, now) in what.items())
        log.warning("the environment is not the one that this run was submitted with: %s", named)
        run.record(Event.ENVIRONMENT_CHANGED, what=what)


def _agree_on_data(context: RunContext, steps: list[int]) -> None:
    """Before step one: all ranks see the same manifests and so count the same steps, and no shard was cut."""
    stages, ranks = range(len(steps)), context.ranks
    mine = [(open_source(context, n, "train").hashes, steps[n]) for n in stages]
    for rank, theirs in enumerate(ranks.gather(mine)):
        for n in stages:
            if theirs[n] != mine[n]:
                raise UserError(
                    f"stage '{context.recipe.stages[n].name}': rank {rank} sees other shards than rank {ranks.rank}: "
                    f"{theirs[n][1]} steps there, {steps[n]} here; all nodes must read the same manifests"
                )

    def check_sizes() -> None:
        for n in stages:
            open_source(context, n, "train").check_sizes()

    run_on_first(check_sizes, ranks, context.stop)


def _quarantined(run: RunFolder) -> Callable[[str, str], None]:
    def record(key: str, fault: str) -> None:
        log.warning("left out: %s: %s", key, fault)
        run.record(Event.QUARANTINED, key=key, fault=fault)

    return record


def _own(context: RunContext, life: int) -> Checkpoints:
    """The run's checkpoints. An object store may still hold those of a run of the same name whose folder is gone."""
    checkpoints = context.checkpoints
    if life == 1 and context.recipe.checkpoint.url is not None and (others := checkpoints.names()):
        raise UserError(
            f"{checkpoints.storage.where(others[0])}: a checkpoint of another run lies where this one will write; "
            "name another run folder with --run, or delete it"
        )
    return checkpoints


def _restore(context: RunContext, run: RunFolder, life: int, ranks: Ranks) -> Cursor | None:
    """The cursor of the newest checkpoint that verifies, on all ranks; names those that were skipped."""
    name, skipped = run_on_first(lambda: _own(context, life).newest(), ranks, context.stop)
    if ranks.first:
        for torn, fault in skipped:
            log.warning("checkpoint %s is skipped: %s", torn, fault)
            run.record(Event.SKIPPED_CHECKPOINT, name=torn, fault=fault)
        if name is not None:
            run.record(Event.RESUMED, checkpoint=name, step=context.checkpoints.cursor(name).step)
    return None if name is None else context.checkpoints.cursor(name)


def _describe(stage: StageContext, position: Position) -> None:
    engine = stage.engine
    log.info(
        "stage %s: %s of %s parameters trained, steps %d to %d, %d rank(s)",
        stage.settings.name,
        f"{engine.trainable:,}",
        f"{engine.parameters:,}",
        position.stage_step,
        position.stage_steps,
        stage.context.ranks.world,
    )


def _history(run: RunFolder) -> str:
    """The events so far as Markdown, for the board."""
    return "\n".join(f"- {event['time']} {event['event']} {event.get('cause', '')}" for event in run.events())


def _last_finished(run: RunFolder) -> int:
    return max((event["number"] for event in run.events(Event.STAGE_FINISHED)), default=-1)


def _kind(error: BaseException) -> OutcomeState:
    if isinstance(error, UserError):
        return OutcomeState.MISTAKE
    return OutcomeState.LOST_PEER if lost_peer(error) else OutcomeState.CRASHED


def _recorded(run: RunFolder, rank: int, error: BaseException) -> BaseException:
    """Record how this rank ends by an error, as far as the disk allows, and give the error back."""
    with contextlib.suppress(OSError):
        run.record_end(rank, Outcome(_kind(error), first_line(error)), traceback.format_exc())
    return error
