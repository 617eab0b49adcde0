"""What a trained model is worth, and how people meet it: evaluate, generate, demo, index, export."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from radhpc.cli.common import Json, On, RunPath, app, emit, from_elsewhere, one_of, say
from radhpc.cli.submission import submit_job
from radhpc.core.errors import UserError
from radhpc.core.log import Bar, console, start_logging
from slurm.monitoring import tables

if TYPE_CHECKING:
    from radhpc.core.recipe import EvaluationSettings
    from radhpc.core.run_folder import RunFolder
    from radhpc.training.context import RunContext
    from shards.images.encoding import ImageSettings


@app.command(
    rich_help_panel="A trained model",
    epilog="Examples: radhpc evaluate runs/quickstart-20261122-101500 --split test   "
    "radhpc evaluate RUN beams=3 scorers.chexbert=/weights/chexbert --against OTHER --on a100_preemptible",
)
def evaluate(
    run: RunPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe's evaluation, such as beams=3."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validate or test.")] = "test",
    samples: Annotated[int | None, typer.Option(help="Studies; default: all of the split.", min=1)] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Also test the difference to this run, evaluated before.")
    ] = None,
    shards: Annotated[
        list[str] | None, typer.Option(help="Other shards than the run's: another hospital's, or questions.")
    ] = None,
    on: On = "inline",
    as_json: Json = False,
) -> None:
    """Generate for held-out studies with the newest checkpoint, and score beside trivial baselines.

    On all ranks of a profile; said again after a preemption, or with more studies, it goes on with what is missing.
    Every score carries its convention or the hash of its weights, and an interval over patients.
    """
    from radhpc.core.files import read_json
    from radhpc.core.run_folder import RunFolder
    from slurm import evaluation, profile as profiles, submit

    run_dir, profile = RunFolder.open(run), profiles.load(on)
    settings = evaluation.settings_of(run_dir, overrides or [], samples)
    with submit.environment(profile):  # it may hold the keys of an object store
        checkpoint, weights = _check_evaluation(run_dir, split, shards or [], settings, against)
    chosen = any("conventions=" in change for change in overrides or [])
    job = evaluation.prepare(
        run_dir, checkpoint, weights, split, shards or [], settings, against, every_convention=not chosen
    )
    submit_job(job, profile, True, lambda job_dir, number: None, as_json=as_json)
    folder = job.path.parent
    scores = read_json(folder / "scores.json")
    say(tables.scores(scores), as_json)
    say(f"written to {folder}; to look at: {folder / 'report.html'}", as_json)
    keys = ("step", "split", "samples", "scores", "baselines", "missing", "comparison")
    emit({"run": str(run_dir.path), **{key: scores[key] for key in keys if key in scores}}, as_json)


@app.command(
    rich_help_panel="A trained model",
    epilog="Examples: radhpc generate RUN --image frontal.dcm --image lateral.png --stream   "
    "radhpc generate RUN --folder cases/ --out reports.jsonl",
)
def generate(
    run: RunPath,
    image: Annotated[
        list[Path] | None, typer.Option(help="JPEG, PNG or DICOM; several are views of one study.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Each image in it is a study, each subfolder a study of several views.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Ask this instead of for a report.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the recipe's.", min=1)] = None,
    beams: Annotated[int | None, typer.Option(help="Search this many texts at a time.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample words; below 1 the likelier.", min=1e-3)] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest of this share.", max=1.0)] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0)] = 0,
    retrieve: Annotated[
        int, typer.Option(help="Show so many training studies that look alike; needs `radhpc index`.", min=0)
    ] = 0,
    batch: Annotated[int, typer.Option(help="Studies of --folder at a time.", min=1)] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Append each answer to this file as a JSON line; what it has is not repeated.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print words as they are written.")] = False,
    as_json: Json = False,
) -> None:
    """Write a report, or an answer, for one study or a folder of them. Research use only, not for clinical use.

    What does not look like a radiograph gets a warning beside its text.
    """
    if (image is None) == (folder is None):
        raise UserError("give either --image, once or more, or --folder")
    if stream and (as_json or folder or out):
        raise UserError("--stream: goes with --image alone, without --json and --out")
    from shards import views

    run_dir, target = image_settings(run)
    studies = views.find_studies(folder) if folder else {" ".join(map(str, image or [])): image or []}
    told = views.read_answers(out, studies) if out else {}
    if not folder:  # one broken image of one study: before the model is loaded
        views.load_study("", next(iter(studies.values())), target)
    context = context_of(run_dir.path)
    from radhpc.serving.inference import Decoding
    from radhpc.serving.pipeline import Reader, Study

    changes = {"max_new_tokens": max_new_tokens, "beams": beams, "temperature": temperature, "top_p": top_p}
    reader = Reader(context, Decoding.of(context.recipe.evaluation, **changes, seed=seed), retrieve)
    if stream:
        ((name, paths),) = studies.items()
        study = Study(name, *views.load_study(name, paths, target))
        ((neighbours, far),) = reader.near([study])
        for warning in [*reader.warnings(study), *far]:
            console.print(f"[yellow]warning[/] {warning}", soft_wrap=True)
        for piece in reader.stream(study, question):
            print(piece, end="", flush=True)
        print()
        say(tables.neighbours([vars(neighbour) for neighbour in neighbours]), as_json)
        return
    results: list[dict[str, Any]] = []
    broken = 0
    waiting = [name for name in studies if name not in told]
    with Bar("generate", len(waiting), unit="studies", hidden=not folder) as bar:
        for start in range(0, len(waiting), batch):
            some = []
            for name in waiting[start : start + batch]:
                try:
                    some.append(Study(name, *views.load_study(name, studies[name], target)))
                except UserError as error:  # one of many: named, and left out
                    broken += 1
                    results.append({"name": name, "error": str(error)})
            for answer in reader.read(some, question, batch):
                results.append({**answer.to_json(), "images": [str(path) for path in studies[answer.name]]})
            if out:
                views.append_answers(out, [result for result in results[-len(some) :] if "text" in result])
            bar.update(min(start + batch, len(waiting)))
    if not as_json:
        for result in results:
            tables.answer(result, Console(highlight=False), heading=folder is not None)
    one = results[0] if not folder and results else {}
    shown = {"studies": results, "broken": broken, "told_before": len(told)} if folder or not results else {}
    emit({"run": str(run_dir.path), **one, **shown}, as_json)
    raise typer.Exit(1 if broken else 0)


@app.command(
    rich_help_panel="A trained model",
    epilog="Example: radhpc demo runs/quickstart-20261122-101500 --retrieve 3",
)
def demo(
    run: RunPath,
    port: Annotated[int, typer.Option(help="On this machine alone; 0: any that is free.", min=0, max=65535)] = 0,
    retrieve: Annotated[
        int, typer.Option(help="Show so many training studies that look alike; needs `radhpc index`.", min=0)
    ] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the recipe's.", min=1)] = None,
    beams: Annotated[int | None, typer.Option(help="Several come as a whole, not word by word.", min=1)] = None,
) -> None:
    """A web page on this machine alone: drop a radiograph, read the report, ask. Research use only."""
    from shards import views

    run_dir, target = image_settings(run)
    context = context_of(run_dir.path)
    from radhpc.serving.demo import Demo
    from radhpc.serving.inference import Decoding
    from radhpc.serving.pipeline import Reader

    decoding = Decoding.of(context.recipe.evaluation, max_new_tokens=max_new_tokens, beams=beams)
    with Demo(
        Reader(context, decoding, retrieve), lambda data, name: views.load_view_bytes(data, name, target), port
    ) as page:
        say(f"{page.url}\n{from_elsewhere(page.port)}\nCtrl-C ends it. Research use only, not for clinical use.", False)
        try:
            page.serve()
        except KeyboardInterrupt:
            say("ended", False)


@app.command(rich_help_panel="A trained model", epilog="Example: radhpc index runs/quickstart-20261122-101500")
def index(
    run: RunPath,
    samples: Annotated[int | None, typer.Option(help="Studies; default: all of split train.", min=2)] = None,
    as_json: Json = False,
) -> None:
    """Index the training studies by the model's vision features, for `generate --retrieve` and `demo`."""
    context = context_of(run)
    from radhpc.serving.feature_index import build as build_index
    from radhpc.training.engine_builder import restore_engine

    engine, cursor = restore_engine(context)

    with Bar("index", 1, unit="studies") as bar:
        made = build_index(context, engine, cursor, samples, lambda done, total: bar.update(done, total=total))
    say(f"{context.run.path / 'index'}: {made.about['studies']} training studies at step {cursor.step}", as_json)
    emit({"run": str(context.run.path), **{key: made.about[key] for key in ("step", "studies", "left_out")}}, as_json)


@app.command(
    rich_help_panel="A trained model",
    epilog="Example: radhpc export runs/quickstart-20261122-101500 --out my-model --merge --check",
)
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="A folder that is not there yet.")],
    merge: Annotated[bool, typer.Option("--merge", help="Whole weights, adapters added in; default: PEFT.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load it without radhpc in another process, and compare the logits.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of whole weights: float32, bfloat16 or float16; default: as the base.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the newest checkpoint as an adapter for PEFT, or as whole weights that plain transformers loads.

    Processor, tokenizer, generation settings, a model card and an example lie beside them.
    """
    if dtype is not None:
        one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    context = context_of(run)
    from radhpc.serving import export as exports

    with contextlib.redirect_stdout(sys.stderr):  # libraries that saving imports, such as deepspeed, say something
        written, probe = exports.export(context, out.absolute(), merge, dtype)
    what = {"model": "whole weights", "adapter": f"an adapter for PEFT on {written.base}"}[written.kind]
    say(f"{written.out}: {what}, {written.parameters:,} parameters of step {written.step}; see README.md", as_json)
    difference = exports.check(written, probe) if check else None
    if difference is not None:
        say(f"plain transformers gives the same logits (they differ by {difference:.1g} of the largest)", as_json)
    result = {"run": str(context.run.path), **vars(written), "out": str(written.out), "difference": difference}
    emit(result, as_json)


def _check_evaluation(
    run: "RunFolder", split: str, shards: list[str], settings: "EvaluationSettings", against: Path | None
) -> tuple[str, str]:
    """Say here what would otherwise fail in the job. The name and the identity of the newest checkpoint."""
    from radhpc.core.manifest import Manifest
    from radhpc.core.sample import SPLITS
    from radhpc.engine.checkpoint import Checkpoints
    from radhpc.evaluation.metrics.scorers import Judges
    from radhpc.evaluation.scoring import newest_evaluation
    from radhpc.storage.store import Store

    if split not in SPLITS:
        raise UserError(f"--split {split}: allowed are {', '.join(SPLITS)}")
    checkpoints = Checkpoints.of(run.path, run.recipe())
    name, skipped = checkpoints.newest()
    if name is None:
        why = "".join(f"; {torn}: {fault}" for torn, fault in skipped)
        raise UserError(f"{run.path}: no checkpoint to evaluate{why}")
    stage = run.recipe().stages[checkpoints.cursor(name).stage]
    counts = [Manifest.load(Store(url)).splits.get(split, 0) for url in shards or run.recipe().shards_of(stage)]
    if not any(counts):
        raise UserError(f"--split {split}: no study there")
    Judges(settings.scorers.folders(), settings.scorers.sha256, "cpu").hashes  # noqa: B018
    if against is not None:
        from radhpc.core.run_folder import RunFolder

        newest_evaluation(RunFolder.open(against).path, split)
    return name, checkpoints.identity(name)


def context_of(path: Path) -> "RunContext":
    """Return the context of a run, for one rank in this process."""
    from radhpc.core.run_folder import RunFolder

    run = RunFolder.open(path)
    from radhpc.distributed.ranks import Ranks
    from radhpc.training.context import open_context

    start_logging()
    return open_context(run, run.recipe(), Ranks())


def image_settings(path: Path) -> tuple["RunFolder", "ImageSettings"]:
    """What the images were made into that a run was trained on."""
    from radhpc.core.manifest import Manifest
    from radhpc.core.run_folder import RunFolder
    from radhpc.storage.store import Store
    from shards.images.encoding import ImageSettings

    run = RunFolder.open(path)
    settings = Manifest.load(Store(next(iter(run.recipe().shards)))).build
    return run, ImageSettings(settings["longest_side"], settings["quality"], settings.get("image_format", "jpeg"))
