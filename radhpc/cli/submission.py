"""Check, submit and follow a job: what train, resume, sweep and evaluate share."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from radhpc.cli.common import say
from radhpc.core.errors import UserError
from radhpc.core.log import Bar, console
from radhpc.core.protocol import OutcomeState, RunState
from slurm.monitoring import run_table

if TYPE_CHECKING:
    from radhpc.core.people import DatasetPatients
    from radhpc.core.recipe import Recipe
    from radhpc.core.run_folder import RunFolder
    from slurm.profile import Profile


def check_engine(recipe: "Recipe", profile: "Profile") -> None:
    """Raise UserError here for what would fail on the ranks: too many of them, or a library that is not installed."""
    if recipe.engine == "single" and profile.world > 1:
        raise UserError(
            f"engine 'single' on {profile.world} ranks: allowed are fsdp and deepspeed, or a profile with one task"
        )
    if profile.python is None and profile.container is None:
        recipe.refuse_missing()


def check_data(recipe: "Recipe", *also: str) -> None:
    """Raise UserError here, in seconds, for data that would fail in the queue; `also`: further splits needed."""
    from radhpc.core.manifest import Manifest
    from radhpc.core.people import DatasetPatients
    from radhpc.data import tasks
    from radhpc.data.source import Source
    from radhpc.models import weights as weights_of
    from radhpc.storage.store import Store

    for url in {url for stage in recipe.stages for url in recipe.shards_of(stage)}:
        store = Store(url)
        manifest = Manifest.load(store)
        manifest.check_sizes(store)
        for split in ("train", *also):
            if not manifest.splits.get(split):
                raise UserError(f"{url}: no sample of split '{split}'; it has {manifest.splits}")
    weights_of.check(recipe)
    datasets: dict[str, DatasetPatients] = {}
    for stage in recipe.stages:
        source = Source(recipe.shards_of(stage), "train")
        datasets |= {dataset.url: dataset for dataset in source.patients()}
        tasks.check(recipe, stage, source)
    compare_patients(list(datasets.values()))


def compare_patients(datasets: Sequence["DatasetPatients"]) -> None:
    """Refuse a patient in two splits, across all stages and what they are evaluated on; warn of what is not comparable.

    Raises UserError.
    """
    from radhpc.core.people import describe_incomparable, refuse_shared_patients

    refuse_shared_patients(datasets)
    if warning := describe_incomparable(itertools.combinations(datasets, 2)):
        console.print(f"[yellow]warning[/] {escape(warning)}", soft_wrap=True)


def submit_job(
    run: "RunFolder",
    profile: "Profile",
    watch: bool,
    announce: Callable[["RunFolder", str], None],
    current_code: bool = False,
    as_json: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Submit a job; an inline job runs now, and its error is raised here.

    `prepare`: called once the run is known to be free, before it is submitted.
    """
    from slurm.submit import profile_environment, submit

    job = submit(run, profile, current_code, prepare)
    announce(run, str(job.job_id))
    if profile.cluster == "inline":
        with profile_environment(profile):
            error = job.exception()
        if error is not None:
            raise error
        outcome = job.result()
        if outcome.state == OutcomeState.INTERRUPTED:
            again = "call 'radhpc evaluate' again" if run.evaluated_run else f"radhpc resume {run.path}"
            say(f"interrupted by {outcome.cause} at step {outcome.step}; to continue: {again}", as_json)
            raise typer.Exit(1)
    elif watch:
        watch_job(run, as_json)


def announce(run: "RunFolder", job: str, as_json: bool) -> None:
    """Print the run's folder and the job's id."""
    say(f"run {run.path}\njob {job}", as_json)


def watch_job(run: "RunFolder", as_json: bool = False) -> None:
    """Follow a job until it ends. Ctrl-C leaves a SLURM job alone; a local one saves and ends with it."""
    from slurm.monitoring.logs import first_error
    from slurm.monitoring.status import LIVING, Statuses

    look = Statuses([run], queue_seconds=2)
    with Bar(run.path.name, 1, unit="steps") as bar:
        while (now := look.now()[0])["state"] in LIVING:
            bar.update(now["step"], run_table.line(now), now["steps"] or 1)
            time.sleep(1)
        bar.update(now["step"], now["state"], now["steps"] or 1)
    say(f"{run.path}: {run_table.line(now)}", as_json)
    if now["state"] == RunState.FAILED:
        for text in first_error(run):
            console.print(text, soft_wrap=True)
        raise typer.Exit(1)
