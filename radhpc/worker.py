"""Run one rank of a job: open the run, restore the newest verified checkpoint, train, record how it ended.

outcome = run("runs/padchest-1")        # on each rank, with RANK, WORLD_SIZE, ... in the environment
"""

import contextlib
import json
import logging
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from radhpc import hooks
from radhpc.core import environment, log as logs
from radhpc.core.board import Board, WandbCurves
from radhpc.core.errors import UserError, first_line
from radhpc.core.files import FULL, read_json, write_atomically
from radhpc.core.ledger import Ledger, bytes_by_life
from radhpc.core.log import Bar
from radhpc.core.ownership.lease import Lease, Superseded
from radhpc.core.protocol import Cause, CulpritRecord, Event, Outcome, OutcomeState
from radhpc.core.recipe import Recipe, Stage
from radhpc.core.run_folder import RunFolder, step_of
from radhpc.data import tasks
from radhpc.data.source import Source
from radhpc.data.stream import Stream, StreamSpec, stage_samples, stage_steps
from radhpc.distributed.background import run_in_background, run_on_first
from radhpc.distributed.malloc import keep_freed_memory
from radhpc.distributed.ranks import Ranks, lost_peer
from radhpc.distributed.stop import Interrupted, Stop
from radhpc.distributed.watchdog import Limits, Watchdog
from radhpc.engine.checkpoint import Checkpoints, Cursor, name_of
from radhpc.evaluation import job as evaluation_job
from radhpc.training import compilation, stage_transition
from radhpc.training.async_checkpoint import AsyncCheckpointer, FinalCommit
from radhpc.training.context import RunContext, StageContext, Trial, open_context
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.engine_builder import build_engine, check_cursor
from radhpc.training.loop import Hook, Position, Quarantine, StageLoop, train
from radhpc.training.out_of_memory import explain_out_of_memory
from radhpc.training.profiling import ProfilerHook
from radhpc.training.retrieval_indexes import build_retrieval_indexes
from radhpc.training.sources import open_source
from radhpc.training.straggler import StragglerMonitor

log = logging.getLogger("radhpc")


@dataclass(frozen=True)
class Recorders:
    """The places where a life of a run records what it does."""

    board: Board
    ledger: Ledger | None
    quarantine: Quarantine


def run(path: str, stop: Stop | None = None, trial: Trial | None = None, lease: Lease | None = None) -> Outcome:
    """Work on a run until it is finished or interrupted. Errors are recorded for this rank, then raised.

    `stop`: a flag that listens already, since before this module was imported.
    `trial`: the sweep that the run belongs to, if any, which may end it early.
    `lease`: rank 0's, by which this life may write to the folder. Once it is lost, nothing is written any more.
    """
    folder = RunFolder.open(path)
    folder.lease = lease
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logs.start_logging(rank, world)
    keep_freed_memory()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    ranks: Ranks | None = None

    def end(state: OutcomeState, cause: str, step: int, culprits: list[CulpritRecord]) -> None:
        folder.record_end(rank, Outcome(state, cause, step), culprits=culprits)

    watchdog = Watchdog(folder, rank, world, Limits.from_environment(), end)
    with contextlib.nullcontext(stop) if stop else Stop() as stop:
        stop.run = folder if rank == 0 else None
        try:
            ranks = Ranks(watchdog)
            outcome = _run(folder, ranks, stop, trial)
        except BaseException as error:
            watchdog.give_way()
            if isinstance(error, Superseded):
                log.error("%s; this life leaves without a word", error)
                raise
            if isinstance(error, torch.OutOfMemoryError):
                raise _recorded(folder, rank, explain_out_of_memory(folder, rank, world)) from error
            if isinstance(error, OSError) and error.errno in FULL:
                location = error.filename or folder.path
                full = UserError(f"{location}: {error.strerror}; free some space, then 'radhpc resume {folder.path}'")
                raise _recorded(folder, rank, full) from error
            raise _recorded(folder, rank, error)  # noqa: B904
        finally:
            if ranks is not None:
                ranks.close()
            watchdog.close()
    folder.record_end(rank, outcome)
    return outcome


def _run(run: RunFolder, ranks: Ranks, stop: Stop, trial: Trial | None) -> Outcome:
    recipe = run.recipe()
    life = _record_start(run, recipe, ranks)
    _agree_on_environment(run, recipe, ranks)
    if run.evaluated_run is not None:
        return _evaluate(run, ranks, stop)
    context = open_context(run, recipe, ranks, stop, trial)
    compilation.prepare(context)
    position: Position | None = None
    try:
        lengths = _check_data(context)
        build_retrieval_indexes(context)
        cursor = _restore(context, life)
        recorders = _open_recorders(context, life, cursor)
        total_steps = sum(map(stage_steps, recipe.stages, lengths))
        lineage: tuple[str, ...] = cursor.lineage if cursor else ()
        reached = 0
        if cursor is not None and cursor.origin:  # the end of a stage that another run has trained
            lineage, reached = (*lineage, name_of(cursor.step)), cursor.step
        for number in range(len(lineage), len(recipe.stages)):
            own = cursor if cursor is not None and cursor.stage == number else None
            position = _start_position(recipe.stages[number], number, lengths[number], own, reached)
            name = _run_stage(context, recorders, position, own, lineage, total_steps)
            lineage, reached = (*lineage, name), position.step
        return _record_finish(context, recorders.board, reached)
    except Interrupted as interrupted:
        return _record_interruption(context, interrupted, position)


def _evaluate(job: RunFolder, ranks: Ranks, stop: Stop) -> Outcome:
    """Run a job that evaluates another run; when it is interrupted, what it has generated is on the disk already."""
    try:
        step = evaluation_job.work(job, ranks, stop)
    except Interrupted as interrupted:
        if interrupted.cause == Cause.SUPERSEDED:
            return Outcome(OutcomeState.SUPERSEDED, interrupted.cause)
        if ranks.first:
            job.record(Event.INTERRUPTED, cause=interrupted.cause, waited_seconds=round(stop.waited, 3))
        return Outcome(OutcomeState.INTERRUPTED, interrupted.cause)
    if ranks.first:
        job.record(Event.FINISHED, step=step)
    return Outcome(OutcomeState.FINISHED, step=step)


def _start_position(stage: Stage, number: int, length: int, own: Cursor | None, reached: int) -> Position:
    """Return the position at which a stage of `length` samples goes on: that of its own cursor, or its beginning."""
    return Position(
        stage=number,
        step=own.step if own else reached,
        stage_step=own.stage_step if own else 0,
        stage_steps=stage_steps(stage, length),
        samples=own.samples if own else 0,
        stage_samples=stage_samples(stage, length),
    )


def _run_stage(
    context: RunContext,
    recorders: Recorders,
    position: Position,
    cursor: Cursor | None,
    lineage: tuple[str, ...],
    total_steps: int,
) -> str:
    """Train one stage to its end; return the name of its last checkpoint."""
    ranks, board = context.ranks, recorders.board
    stage = _open_stage(context, position.stage, cursor, lineage, board)
    context.stop.check(ranks.max)
    _log_stage(stage, position)
    checkpointer = AsyncCheckpointer(stage)
    checkpointer.load_estimates()
    if cursor is not None or stage.number:
        # A stage begins where a checkpoint stands: its own, or the last one of the stage before, which must not be
        # overwritten with this stage's untrained state when a signal comes before the first step.
        checkpointer.start_at(position.step)
    evaluate, profiler = hooks.EvaluationHook(stage), ProfilerHook(context.run, ranks, board)
    stream = _open_stream(stage, position)
    try:
        with Bar(stage.settings.name, position.stage_steps, position.stage_step, "steps", not ranks.first) as bar:
            calls = _observers(stage, stream, bar, total_steps, restarted=cursor is not None)
            calls.append(Hook(context.recipe.checkpoint.every, checkpointer))
            if ranks.first:
                calls.append(Hook(1, profiler))
            if (every := context.recipe.evaluation.every) is not None:
                calls.append(Hook(every, evaluate))
                if cursor is not None and position.step % every == 0 and not position.stage_done:
                    evaluate(position)  # that the interruption prevented; does nothing where the scores exist
            train(_stage_loop(stage, stream, calls, recorders), position)
        checkpointer.finish(position)
        hooks.export_adapter(stage)
        _record_stage_end(stage, position)
        last = stage.number == len(context.recipe.stages) - 1
        # A sweep chooses by its trials' scores, so the test split is not its business.
        evaluate(position, split="test" if last and context.trial is None else None)
    except Interrupted as interrupted:
        if interrupted.cause == Cause.SUPERSEDED:
            checkpointer.abandon()
        else:
            interrupted.final_commit = checkpointer.commit_before_exit(position)
            board.event(position.step, Event.INTERRUPTED, interrupted.cause)
        if interrupted.cause == Cause.PRUNED:
            board.end_session()
        board.close()
        raise
    finally:
        stream.close()
        profiler.close()
    return name_of(position.step)


def _open_stage(
    context: RunContext, number: int, cursor: Cursor | None, lineage: tuple[str, ...], board: Board
) -> StageContext:
    """Return a stage ready to train: the engine as its own last checkpoint or the stages before it have left it."""
    ranks, settings = context.ranks, context.recipe.stages[number]
    ranks.watchdog.beat(f"loading stage {settings.name}", slow=True)
    engine, base_hash = build_engine(context, number, lineage)
    if cursor is not None:
        check_cursor(context, cursor, base_hash)
        name = name_of(cursor.step)
        tensors = run_in_background(lambda: context.checkpoints.tensors(name, moments=True), ranks, context.stop)
        assert tensors is not None
        engine.load(tensors, cursor.stage_step)
    elif number:
        stage_transition.check_loss(context, engine, number)
    stage = StageContext(context, number, engine, base_hash, lineage, board)
    datasets = open_source(context, number, "train").datasets
    build_encoder(context, number).set_loss_groups([dataset.manifest.dataset for dataset in datasets])
    compilation.warm_up(stage)
    return stage


def _open_stream(stage: StageContext, position: Position) -> Stream:
    context, number = stage.context, stage.number
    recipe, ranks = context.recipe, context.ranks
    spec = StreamSpec(
        stage.settings, number, recipe.stream, recipe.seed, ranks.rank, ranks.world, position.samples,
        pin=ranks.device.type == "cuda",
    )  # fmt: skip
    source, encoder = open_source(context, number, "train"), build_encoder(context, number)
    return Stream(source, encoder, spec, should_stop=context.stop.poll)


def _observers(stage: StageContext, stream: Stream, bar: Bar, total_steps: int, restarted: bool) -> list[Hook]:
    """Return the hooks that only look on: curves, progress, stragglers. Those of rank 0 come first."""
    context, board = stage.context, stage.board
    stragglers = StragglerMonitor(context.run, context.ranks, board)
    observers: list[Hook] = []
    if context.ranks.first:
        observers.append(Hook(context.recipe.board.every, hooks.board_hook(stage, restarted)))
        observers.append(Hook(1, hooks.ProgressHook(context, bar, total_steps, stragglers)))
    observers += [Hook(1, stragglers), Hook(1, hooks.GradientNorms(stage))]
    observers.append(Hook(1, hooks.NodeMetrics(board, context.ranks, stream.traffic)))
    return observers


def _stage_loop(stage: StageContext, stream: Stream, calls: list[Hook], recorders: Recorders) -> StageLoop:
    context = stage.context
    return StageLoop(
        stream=stream,
        engine=stage.engine,
        stage=stage.settings,
        hooks=calls,
        ledger=recorders.ledger,
        quarantine=recorders.quarantine,
        stop=context.stop,
        ranks=context.ranks,
        seed=context.recipe.seed,
    )


def _record_start(run: RunFolder, recipe: Recipe, ranks: Ranks) -> int:
    """Record that a life begins; return its number, from 1, on all ranks."""
    token = run.lease.token if run.lease is not None else None
    life: int
    life, token = ranks.broadcast([run.lives + 1, token] if ranks.first else None)
    run.lease = Lease(run.path, token) if token is not None else None
    if ranks.first:
        job = os.environ.get("SLURM_JOB_ID", "")
        nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
        written = bytes_by_life(run.path / "ledger")
        run.record(
            Event.STARTED, life=life, job=job, world=ranks.world, engine=recipe.engine, nodes=nodes, ledger=written
        )
        run.reserve_space()
    return life


def _record_finish(context: RunContext, board: Board, step: int) -> Outcome:
    """Record that all stages are done."""
    board.event(step, Event.FINISHED, "all stages are done")
    board.end_session()
    board.close()
    if context.ranks.first:
        context.run.record(Event.FINISHED, step=step)
        context.run.release_space()
    return Outcome(OutcomeState.FINISHED, step=step)


def _record_interruption(context: RunContext, interrupted: Interrupted, position: Position | None) -> Outcome:
    """Record why the life ends and what it has committed; `position`: None before the first stage."""
    if interrupted.cause == Cause.SUPERSEDED:
        log.error("the run belongs to another life now; this one leaves without a word")
        return Outcome(OutcomeState.SUPERSEDED, interrupted.cause, position.step if position else 0)
    commit: FinalCommit = interrupted.final_commit or _committed_before(context)
    step = position.step if position else commit.committed_step or 0
    pruned = interrupted.cause == Cause.PRUNED
    state = OutcomeState.PRUNED if pruned else OutcomeState.INTERRUPTED
    if context.ranks.first:
        event = Event.PRUNED if pruned else Event.INTERRUPTED
        context.run.record(event, cause=interrupted.cause, step=step, **asdict(commit))
    log.info("%s by %s at step %d: %s", state, interrupted.cause, step, commit)
    return Outcome(state, interrupted.cause, step)


def _committed_before(context: RunContext) -> FinalCommit:
    """Return what earlier lives have committed, where the start-up is interrupted: the next life goes on from it."""
    steps = [step_of(name) for name in context.checkpoints.committed()] if context.ranks.first else []
    stop = context.stop
    return FinalCommit(max(steps, default=None), "last checkpoint", stop.margin, round(stop.waited, 3))


def _record_stage_end(stage: StageContext, position: Position) -> None:
    """Record the end of a stage once, with the loss that the next stage has to begin with."""
    context = stage.context
    if not context.ranks.broadcast(_last_finished(context.run) < stage.number):
        return
    loss = stage_transition.measure_loss(context, stage.engine, stage.number)
    if context.ranks.first:
        name = stage.settings.name
        context.run.record(Event.STAGE_FINISHED, stage=name, number=stage.number, step=position.step, loss=loss)


def _open_recorders(context: RunContext, life: int, cursor: Cursor | None) -> Recorders:
    """Open the board, the ledger and the quarantine of a life that goes on from a cursor."""
    run, recipe, ranks, trial = context.run, context.recipe, context.ranks, context.trial
    step = cursor.step if cursor else 0
    wandb = recipe.board.wandb if ranks.first else None
    curves = WandbCurves(wandb, run.path, life) if wandb is not None else None
    board = Board(run.path / "tensorboard" if ranks.first else None, step, curves)
    board.layout([stage.name for stage in recipe.stages])
    board.event(step, Event.RESUMED if cursor else Event.STARTED, _history(run))
    if trial is not None and ranks.first:
        board.hyperparameters(trial.parameters(), f"evaluation/{trial.metric}")
    ledger = Ledger(run.folder("ledger"), life, ranks.rank) if recipe.stream.audit else None
    known = ranks.broadcast([event["key"] for event in run.events(Event.QUARANTINED)] if ranks.first else [])
    record = _quarantine_recorder(run) if ranks.first else None
    return Recorders(board, ledger, Quarantine(recipe.stream.max_bad_samples, known, record))


def _check_data(context: RunContext) -> list[int]:
    """Return the number of training samples of each stage; refuse stages without any, and shards that are cut or that
    the ranks see differently, before the first step.
    """
    recipe, ranks, stop = context.recipe, context.ranks, context.stop
    stages = range(len(recipe.stages))
    sources = run_in_background(lambda: [open_source(context, n, "train") for n in stages], ranks, stop) or []
    for stage, source in zip(recipe.stages, sources, strict=True):
        if not len(source):
            raise UserError(f"stage '{stage.name}': no sample of split 'train' in its shards")
    lengths = [len(source) for source in sources]
    _agree_on_data(context, list(map(stage_steps, recipe.stages, lengths)))

    def check_tasks(stage: Stage, source: Source) -> None:
        run_on_first(lambda: tasks.check(recipe, stage, source), ranks, stop)

    for stage, source in zip(recipe.stages, sources, strict=True):
        check_tasks(stage, source)
    return lengths


def _agree_on_environment(run: RunFolder, recipe: Recipe, ranks: Ranks) -> None:
    """Refuse ranks with another recipe, code or libraries; record what is not as it was at the submission."""
    recipes = ranks.gather((recipe.hash, recipe.engine))
    for rank, (digest, engine) in enumerate(recipes):
        if (digest, engine) != recipes[0]:
            raise UserError(
                f"rank {rank} reads another {run.path}/recipe.yaml than rank 0: {engine} {digest[:12]} there, "
                f"{recipes[0][1]} {recipes[0][0][:12]} on rank 0; all nodes must see the same run folder"
            )
    snapshots = ranks.gather(environment.take())
    for rank, snapshot in enumerate(snapshots):
        if different := environment.differences(snapshots[0], snapshot):
            named = ", ".join(f"{name} {other} there, {first} on rank 0" for name, (first, other) in different.items())
            raise UserError(f"rank {rank} runs something else than rank 0: {named}; all nodes must be set up alike")
    if not ranks.first or (frozen := read_json(run.code / "environment.json")) is None:
        return
    if "python" not in frozen:  # the submission could not look into the container that this runs in
        frozen |= environment.versions()
        write_atomically(run.code / "environment.json", json.dumps(frozen, indent=1).encode(), 0o600)
    if changed := environment.differences(frozen, snapshots[0]):
        named = ", ".join(f"{name} {now}, frozen was {was}" for name, (was, now) in changed.items())
        log.warning("the environment is not the one that this run was submitted with: %s", named)
        run.record(Event.ENVIRONMENT_CHANGED, what=changed)


def _agree_on_data(context: RunContext, steps: list[int]) -> None:
    """Refuse ranks that see other manifests and so count other steps, and shards that were cut."""
    stages, ranks = range(len(steps)), context.ranks
    local = [(open_source(context, n, "train").hashes, steps[n]) for n in stages]
    for rank, theirs in enumerate(ranks.gather(local)):
        for n in stages:
            if theirs[n] != local[n]:
                raise UserError(
                    f"stage '{context.recipe.stages[n].name}': rank {rank} sees other shards than rank {ranks.rank}: "
                    f"{theirs[n][1]} steps there, {steps[n]} here; all nodes must read the same manifests"
                )

    def check_sizes() -> None:
        for n in stages:
            open_source(context, n, "train").check_sizes()

    run_on_first(check_sizes, ranks, context.stop)


def _quarantine_recorder(run: RunFolder) -> Callable[[str, str], None]:
    def record(key: str, fault: str) -> None:
        log.warning("left out: %s: %s", key, fault)
        run.record(Event.QUARANTINED, key=key, fault=fault)

    return record


def _own_checkpoints(context: RunContext, life: int) -> Checkpoints:
    """Return the run's checkpoints; refuse those that a run of the same name has left in an object store."""
    checkpoints = context.checkpoints
    checkpoints.take(context.run.lease)
    if life == 1 and context.recipe.checkpoint.url is not None and (others := checkpoints.names()):
        raise UserError(
            f"{checkpoints.storage.where(others[0])}: a checkpoint of another run lies where this one will write; "
            "name another run folder with --run, or delete it"
        )
    return checkpoints


def _restore(context: RunContext, life: int) -> Cursor | None:
    """Return the cursor of the newest checkpoint that verifies, on all ranks; record those that are skipped."""
    run, ranks = context.run, context.ranks
    name, skipped = run_on_first(lambda: _own_checkpoints(context, life).newest(), ranks, context.stop)
    if ranks.first:
        for damaged, fault in skipped:
            log.warning("checkpoint %s is skipped: %s", damaged, fault)
            run.record(Event.SKIPPED_CHECKPOINT, name=damaged, fault=fault)
        if name is not None:
            run.record(Event.RESUMED, checkpoint=name, step=context.checkpoints.cursor(name).step)
    return None if name is None else context.checkpoints.cursor(name)


def _log_stage(stage: StageContext, position: Position) -> None:
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
    """Return the events so far as Markdown, for the board."""
    return "\n".join(f"- {event['time']} {event['event']} {event.get('cause', '')}" for event in run.events())


def _last_finished(run: RunFolder) -> int:
    """Return the number of the last stage that has finished; -1 where none has."""
    return max((event["number"] for event in run.events(Event.STAGE_FINISHED)), default=-1)


def _outcome_state(error: BaseException) -> OutcomeState:
    if isinstance(error, UserError):
        return OutcomeState.MISTAKE
    return OutcomeState.LOST_PEER if lost_peer(error) else OutcomeState.CRASHED


def _recorded(run: RunFolder, rank: int, error: BaseException) -> BaseException:
    """Record the error by which this rank ends, as far as the disk allows, and return it."""
    with contextlib.suppress(OSError):
        run.record_end(rank, Outcome(_outcome_state(error), first_line(error)), traceback.format_exc())
    return error
