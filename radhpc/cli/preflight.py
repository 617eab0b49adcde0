"""Check before submitting: plan, weights, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from radhpc.cli.common import PREFLIGHT, Json, On, Overrides, RecipePath, emit, say, verb
from radhpc.core.errors import UserError
from radhpc.core.log import Bar
from slurm.monitoring import tables


@verb(PREFLIGHT, "radhpc plan image_text stages.adapt.micro_batch=2 --on a100_preemptible")
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    on: On = "inline",
    like: Annotated[
        Path | None, typer.Option(help="An earlier run whose samples/s are used to estimate the hours.")
    ] = None,
    samples_per_second: Annotated[
        float | None, typer.Option(help="Known samples/s over all ranks, used to estimate the hours.", min=1e-6)
    ] = None,
    run: Annotated[Path, typer.Option(help="Where the run will be: its write speed is measured.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Estimate memory per GPU, steps and hours, and whether a checkpoint can be saved within the grace period.

    The model's real training step is traced without values: a large model takes a minute and no memory. Weights and
    shards may be missing; the output says what was assumed instead. Exit status 1 if it cannot fit.
    """
    from radhpc.core import recipe as recipes
    from radhpc.core.run_folder import RunFolder
    from slurm import profile as profiles
    from slurm.preflight import plan as plans

    chosen, profile = recipes.load(recipe, overrides or []), profiles.load(on)
    earlier = RunFolder.open(like) if like else None
    from radhpc.planning.forecast import forecast
    from radhpc.planning.placeholders import notes

    # With a range of nodes a GPU holds most on the fewest of them.
    stages = forecast(chosen, profile.least_nodes * profile.tasks_per_node)
    result = plans.costs(stages, profile, run, earlier, samples_per_second)
    result["stages"] = [vars(stage) for stage in stages]
    result["assumed"] = notes(chosen)
    say(tables.plan(result), as_json)
    emit(result, as_json)
    raise typer.Exit(0 if result["fits"] else 1)


@verb(PREFLIGHT, "radhpc weights gla --online")
def weights(
    recipe: RecipePath,
    overrides: Overrides = None,
    online: Annotated[
        bool, typer.Option("--online", help="Download what is missing; without this, nothing ever is.")
    ] = False,
    convert: Annotated[bool, typer.Option("--convert", help="Write pytorch_model*.bin as safetensors.")] = False,
    hashes: Annotated[bool, typer.Option(help="Read every file and compare its sha256 where it is known.")] = True,
    as_json: Json = False,
) -> None:
    """Check the weights of a recipe's model: where the files are, whether they are intact, and what is missing.

    Hashes are read from FILE.sha256 or SHA256SUMS next to the files, or from the hub's own cache. Exit status 1 if
    something is missing or damaged.
    """
    from radhpc.core import recipe as recipes
    from radhpc.models import weights as weights_of

    chosen = recipes.load(recipe, overrides or [])
    if online:
        for part, hub_id, folder in weights_of.missing(chosen.model):
            say(f"{part}: downloads {hub_id}", as_json)
            weights_of.fetch(hub_id, folder)
        chosen = recipes.load(recipe, overrides or [])
    if convert:
        for part in chosen.model.folders.values():
            for path in weights_of.convert(Path(part)):
                say(f"written: {path}", as_json)
    result = weights_of.report(chosen, hashes)
    say(tables.weights(result), as_json)
    emit(result, as_json)
    raise typer.Exit(0 if result["ok"] else 1)


@verb(
    PREFLIGHT, "radhpc doctor --on a100_preemptible", "radhpc doctor --on a100_preemptible --probe --recipe image_text"
)
def doctor(
    on: On = "inline",
    probe: Annotated[
        bool, typer.Option("--probe", help="Submit a job of two minutes that measures on the nodes.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="With --probe: also measure reading the shards of this recipe.")
    ] = None,
    preempt_with: Annotated[
        str | None,
        typer.Option(metavar="PARTITION", help="With --probe: preempt the probe by a second job in this partition."),
    ] = None,
    run: Annotated[Path, typer.Option(help="Where runs will be.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Check the cluster: do signals arrive before a kill, do ranks see each other, what to ask the administrators for.

    Reads SLURM's configuration. With --probe it also submits a two-minute job of all the profile's ranks, which
    measures their all-reduce, clocks, scontrol, free space, the store's speed, and which signals arrive when.
    """
    from radhpc.core import recipe as recipes
    from slurm import profile as profiles
    from slurm.preflight import doctor as doctors
    from slurm.preflight.probe import run_probe

    if (recipe or preempt_with) and not probe:
        raise UserError("--recipe and --preempt-with go with --probe")
    profile = profiles.load(on)
    chosen = recipes.load(recipe) if recipe else None
    urls = sorted({url for stage in chosen.stages for url in chosen.shards_of(stage)}) if chosen else []
    checks = doctors.examine(profile, run)
    say(tables.checks(checks), as_json)
    if probe and checks[0]["ok"]:
        with Bar("probe", 1, unit="job") as bar:
            more = run_probe(profile, run, urls, preempt_with, progress=lambda phase: bar.update(0, phase))
            bar.update(1)
        say(tables.checks(more), as_json)
        checks += more
    ok = all(check["ok"] for check in checks)
    emit({"ok": ok, "checks": checks}, as_json)
    raise typer.Exit(0 if ok else 1)
