"""Turn recipes into jobs and control them: quickstart, train, resume, sweep, stop."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radhpc.cli.common import TRAINING, Json, On, Overrides, RecipePath, RunPath, emit, new_run, say, verb
from radhpc.cli.data import build_shards
from radhpc.cli.submission import announce, check_data, check_engine, submit_job
from radhpc.core.errors import UserError
from radhpc.core.protocol import Cause, Event, RunState
from slurm.monitoring import tables

if TYPE_CHECKING:
    from radhpc.core.run_folder import RunFolder
    from slurm.profile import Profile


@verb(TRAINING, "radhpc quickstart")
def quickstart(
    run: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/quickstart-DATE.")] = None,
    studies: Annotated[int, typer.Option(help="How many phantom studies to draw.", min=200)] = 3000,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Draw phantom radiographs, build shards, train all stages, evaluate and write reports: on a CPU, in minutes."""
    from radhpc.core.files import read_json
    from radhpc.core.run_folder import by_step
    from shards.build import BuildSettings

    started = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on two threads so small a model takes a fifth longer
    path = run or new_run("quickstart")
    shards = path.with_name(path.name + "-shards")
    options = {"studies": str(studies), "two_views": "0.15", "size": "128"}
    build_shards("phantom", None, str(shards), options, BuildSettings(longest_side=112))
    run_folder = start_run(Path("quickstart"), [f"shards=[{shards}]", *(overrides or [])], "inline", path)
    folder = max((run_folder.path / "evaluation").glob("step-*"), key=by_step)
    scores = read_json(folder / "scores.json")
    name = "findings_macro_f1"
    result = {
        "run": str(run_folder.path),
        "seconds": round(time.perf_counter() - started, 1),
        "macro_f1": scores["scores"][name]["value"],
        # What knows nothing of the image. The report of the training radiograph that is most alike stands apart: drawn
        # phantoms are so much alike that it is hard to beat.
        "baselines": {kind: scores["baselines"][kind][name]["value"] for kind in ("constant", "random")},
        "nearest": scores["baselines"].get("nearest", {}).get(name, {}).get("value"),
    }
    say(f"\nUnseen phantom patients: {scores['samples']} studies of split '{scores['split']}'", as_json)
    say(tables.scores(scores), as_json)
    for line in (folder / "reports.jsonl").read_text().splitlines()[:3]:
        report = json.loads(line)
        say(f"\n[bold]reference[/] {report['reference']}\n[bold]generated[/] {report['generated']}", as_json)
    say(f"\nDone in {result['seconds']:.0f} s. The run: {run_folder.path}", as_json)
    say(f"See it: {folder / 'report.html'} in a browser, or radhpc board {run_folder.path}", as_json)
    say(f"Try it: radhpc index {run_folder.path} && radhpc demo {run_folder.path} --retrieve 3", as_json)
    emit(result, as_json)


@verb(
    TRAINING,
    "radhpc train quickstart --on local --watch",
    "radhpc train recipes/image_text.yaml stages.adapt.epochs=1 --on box --watch",
)
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    on: On = "inline",
    run: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/NAME-DATE.")] = None,
    engine: Annotated[str | None, typer.Option(help="fsdp, deepspeed or single; the same as engine=.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="Train only these stages, by number or name: 2,3; default: all.")
    ] = None,
    origin: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="The run that has trained the stages before these.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Validate and freeze a recipe, check its data, and submit it. Prints the run's folder and the job's id."""
    changes = [*(overrides or []), *([f"engine={engine}"] if engine else [])]
    run_folder = start_run(
        recipe, changes, on, run, watch, lambda run, job: announce(run, job, as_json), stages=stages, origin=origin
    )
    emit({"run": str(run_folder.path), "job": (run_folder.job() or {}).get("id")}, as_json)


@verb(TRAINING, "radhpc resume runs/quickstart-20261122-101500 --on local")
def resume(
    run: RunPath,
    on: Annotated[
        str | None, typer.Option("--on", metavar="PROFILE", help="Where to run; default: the profile it ran on.")
    ] = None,
    current_code: Annotated[
        bool,
        typer.Option("--current-code", help="Replace the code that the run was submitted with by the installed one."),
    ] = False,
    engine: Annotated[str | None, typer.Option(help="Continue with another engine: fsdp, deepspeed or single.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Continue from the newest intact checkpoint, on the same or another number of ranks, with the run's own code."""
    from radhpc.core.run_folder import RunFolder
    from slurm import profile as profiles

    run_folder = RunFolder.open(run)
    if run_folder.events() and run_folder.events()[-1]["event"] == Event.FINISHED:
        raise UserError(f"{run}: the run is finished; evaluate or generate with it, or train a new one")
    if run_folder.events(Event.PRUNED):
        raise UserError(f"{run}: its sweep has ended the run early; train {run}/recipe.yaml as a run of its own")
    frozen = run_folder.path / "profile.yaml"
    profile = profiles.load(on or (str(frozen) if frozen.exists() else "inline"))
    recipe = run_folder.recipe() if engine is None else run_folder.recipe().under(engine, run_folder.recipe_path)
    check_engine(recipe, profile)
    chosen = _choose_checkpoint(run_folder, profile, as_json)
    submit_job(
        run_folder,
        profile,
        watch,
        lambda run, job: announce(run, job, as_json),
        current_code,
        prepare=lambda: run_folder.change_engine(recipe.engine),
    )
    emit({"run": str(run_folder.path), "job": (run_folder.job() or {}).get("id"), **chosen}, as_json)


@verb(TRAINING, "radhpc sweep recipes/sweeps/quickstart.yaml --on local")
def sweep(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="A YAML file, or a sweep that 'radhpc recipes' lists.")
    ],
    on: On = "inline",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--sweep",
            metavar="DIR",
            help="The sweep's folder; default: the newest of this sweep in runs/, or a new one.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a recipe with many values of its keys: a job array in which each trial is a run that may be preempted.

    Called again, it submits only the trials that are missing, failed or were cancelled.
    """
    from slurm import profile as profiles, trial_array
    from slurm.sweep import definition as sweeps
    from slurm.sweep.standing import summary
    from slurm.sweep.study import SweepStudy

    profile, (definition, base) = profiles.load(on), sweeps.load(sweep)
    for recipe in sweeps.distinct_data(definition, base, sweep):
        check_data(recipe, recipe.evaluation.split)
    newest = trial_array.newest(Path("runs"), sweep.stem, definition, base)
    study = SweepStudy.create(folder or newest or new_run(f"sweep-{sweep.stem}"), definition, base)
    say(f"sweep {study.path}", as_json)
    completed = True
    if profile.cluster == "slurm":
        job = trial_array.submit(study, profile)
        say(f"job {job}" if job else "nothing to submit: every trial runs, waits or is done", as_json)
    else:
        completed = trial_array.run_here(study, profile, lambda line: say(line, as_json))
    standing = summary(study)
    say(tables.sweep(standing), as_json)
    emit(standing, as_json)
    failed = profile.cluster != "slurm" and any(trial["state"] == RunState.FAILED for trial in standing["trials"])
    raise typer.Exit(0 if completed and not failed else 1)


@verb(TRAINING, "radhpc stop runs/quickstart-20261122-101500")
def stop(run: RunPath, as_json: Json = False) -> None:
    """Save at the next step and end for good; a job that is still queued is cancelled."""
    from radhpc.core.run_folder import RunFolder
    from slurm import scheduler, trial_array
    from slurm.sweep.study import SweepStudy, is_sweep

    if is_sweep(run):
        jobs = trial_array.stop(SweepStudy.open(run))
        say(f"{run}: {len(jobs)} job(s) were asked to stop; 'radhpc sweep' goes on", as_json)
        emit({"sweep": str(run.absolute()), "jobs": jobs}, as_json)
        return
    run_folder = RunFolder.open(run)
    with run_folder.lock("radhpc stop"):
        job = run_folder.job()
        try:
            state = scheduler.state(job)
            if not state or job is None:
                raise UserError(f"{run}: no living job to stop")
            run_folder.request_stop()
            if state in scheduler.WAITING:
                scheduler.cancel(job)
                run_folder.record(Event.STOPPED, cause=Cause.TAKEN_OUT)
        except scheduler.NoAnswer as error:
            run_folder.request_stop()
            asked = "the request to stop is noted, and a job that lives will see it"
            raise scheduler.NoAnswer(f"{run}: {error}; {asked}; say it again to be sure") from error
    say(f"{run}: job {job['id']} ({state.lower()}) was asked to stop", as_json)
    emit({"run": str(run_folder.path), "job": job["id"]}, as_json)


def start_run(
    recipe_path: Path,
    overrides: list[str],
    on: str,
    path: Path | None,
    watch: bool = False,
    announce: Callable[["RunFolder", str], None] = lambda run, job: None,
    stages: str | None = None,
    origin: Path | None = None,
) -> "RunFolder":
    from radhpc.core import recipe as recipes
    from radhpc.core.run_folder import RunFolder
    from radhpc.engine import lineage
    from slurm import profile as profiles

    recipe, profile = recipes.load(recipe_path, overrides), profiles.load(on)
    before, first = RunFolder.open(origin) if origin else None, 0
    if stages or before:
        recipe, first = lineage.select(recipe, stages, before)
    check_engine(recipe, profile)
    check_data(recipe)
    run = RunFolder.create(path or new_run(recipe.name), recipe)
    try:
        if before is not None:
            lineage.take_over(run, first, before)
        submit_job(run, profile, watch, announce)
    except UserError:
        if run.job() is None and not run.events(
            Event.SUBMITTED
        ):  # refused before anything was submitted: the name is free again
            shutil.rmtree(run.path)
        raise
    return run


def _choose_checkpoint(run: "RunFolder", profile: "Profile", as_json: bool) -> dict[str, Any]:
    """Print, before anything is submitted, from which checkpoint the run continues, and which are skipped and why."""
    from radhpc.engine.checkpoint import Checkpoints
    from slurm import scheduler, submit

    scheduler.refuse_if_alive(run)
    with submit.profile_environment(profile):  # it may hold the keys of an object store
        checkpoints = Checkpoints.of(run.path, run.recipe())
        name, skipped = checkpoints.newest()
    for torn, fault in skipped:
        say(f"checkpoint {torn} is skipped: {fault}", as_json)
    say(f"goes on from {checkpoints.storage.where(name)}" if name else "no checkpoint: begins anew", as_json)
    return {"checkpoint": name, "skipped": [{"checkpoint": torn, "fault": fault} for torn, fault in skipped]}
