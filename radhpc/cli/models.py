"""Use trained models: evaluate, generate, demo, index, export."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from radhpc.cli.common import MODELS, Json, On, RunPath, emit, from_elsewhere, keep_to_this_command, one_of, say, verb
from radhpc.cli.submission import compare_patients, submit_job
from radhpc.core.errors import UserError
from radhpc.core.log import Bar, console, start_logging
from slurm.monitoring import tables

if TYPE_CHECKING:
    from radhpc.core.recipe import EvaluationSettings
    from radhpc.core.run_folder import RunFolder
    from radhpc.training.context import RunContext
    from shards.images.encoding import EncodingSettings


@verb(
    MODELS,
    "radhpc evaluate runs/quickstart-20261122-101500 --split test",
    "radhpc evaluate RUN beams=3 scorers.chexbert=/weights/chexbert \\\n  --against OTHER --on a100_preemptible",
)
def evaluate(
    run: RunPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe's evaluation, such as beams=3."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split to evaluate on: train, validate or test.")] = "test",
    samples: Annotated[int | None, typer.Option(help="How many studies; default: all of the split.", min=1)] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Also test the difference to this run, which was evaluated before."),
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(help="Evaluate on these shards instead of the run's: another hospital's, or questions."),
    ] = None,
    on: On = "inline",
    as_json: Json = False,
) -> None:
    """Generate reports for held-out studies with the newest checkpoint, and score them next to trivial baselines.

    Runs on all ranks of a profile. Called again after a preemption, or for more studies, it generates only what is
    missing.
    Every score carries its convention or the hash of its weights, and an interval over patients.
    """
    from radhpc.core.files import read_json
    from radhpc.core.run_folder import RunFolder
    from slurm import evaluation, profile as profiles, submit

    run_folder, profile = RunFolder.open(run), profiles.load(on)
    settings = evaluation.settings_of(run_folder, overrides or [], samples)
    with submit.profile_environment(profile):  # it may hold the keys of an object store
        checkpoint, weights = _check_evaluation(run_folder, split, shards or [], settings, against)
    chosen = any("conventions=" in change for change in overrides or [])
    job = evaluation.prepare(
        run_folder, checkpoint, weights, split, shards or [], settings, against, every_convention=not chosen
    )
    submit_job(job, profile, True, lambda job_dir, number: None, as_json=as_json)
    folder = job.path.parent
    scores = read_json(folder / "scores.json")
    say(tables.scores(scores), as_json)
    say(f"written to {folder}; to look at: {folder / 'report.html'}", as_json)
    keys = ("step", "split", "samples", "scores", "baselines", "missing", "comparison")
    emit({"run": str(run_folder.path), **{key: scores[key] for key in keys if key in scores}}, as_json)


@verb(
    MODELS,
    "radhpc generate RUN --image frontal.dcm --image lateral.png --stream",
    "radhpc generate RUN --folder cases/ --out reports.jsonl",
)
def generate(
    run: RunPath,
    image: Annotated[
        list[Path] | None, typer.Option(help="A JPEG, PNG or DICOM file; several are views of one study.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="A folder of studies: each image is one, each subfolder is one with several views."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="Answer this question instead of writing a report.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest text, in tokens; default: the recipe's.", min=1)
    ] = None,
    beams: Annotated[int | None, typer.Option(help="Beams of a beam search.", min=1)] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample words at this temperature; below 1, likelier words more often.", min=1e-3),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest words with this share of the probability.", max=1.0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0)] = 0,
    retrieve: Annotated[
        int, typer.Option(help="Show this many similar training studies; needs `radhpc index`.", min=0)
    ] = 0,
    batch: Annotated[int, typer.Option(help="With --folder: studies per batch.", min=1)] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="Append each answer to this file as a JSON line; studies that it already has are skipped."),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print words as they are generated.")] = False,
    as_json: Json = False,
) -> None:
    """Write a report, or an answer, for one study or a folder of them. Research use only, not for clinical use.

    Images that do not look like radiographs get a warning.
    """
    if (image is None) == (folder is None):
        raise UserError("give either --image, once or more, or --folder")
    if stream and (as_json or folder or out):
        raise UserError("--stream: goes with --image alone, without --json and --out")
    from shards import views

    run_folder, target = image_settings(run)
    studies = views.find_studies(folder) if folder else {" ".join(map(str, image or [])): image or []}
    if out:
        keep_to_this_command(out, "generate")
    answered = views.read_answers(out, studies) if out else {}
    if not folder:  # one broken image of one study: before the model is loaded
        views.load_study("", next(iter(studies.values())), target)
    context = context_of(run_folder.path)
    from radhpc.serving.inference import DecodingOptions
    from radhpc.serving.pipeline import Pipeline, StudyInput

    changes = {"max_new_tokens": max_new_tokens, "beams": beams, "temperature": temperature, "top_p": top_p}
    pipeline = Pipeline(context, DecodingOptions.of(context.recipe.evaluation, **changes, seed=seed), retrieve)
    if stream:
        ((name, paths),) = studies.items()
        study = StudyInput(name, *views.load_study(name, paths, target))
        ((neighbours, far),) = pipeline.find_neighbours([study])
        for warning in [*pipeline.warnings(study), *far]:
            console.print(f"[yellow]warning[/] {warning}", soft_wrap=True)
        for piece in pipeline.stream(study, question):
            print(piece, end="", flush=True)
        print()
        say(tables.neighbours([vars(neighbour) for neighbour in neighbours]), as_json)
        return
    results: list[dict[str, Any]] = []
    broken = 0
    waiting = [name for name in studies if name not in answered]
    with Bar("generate", len(waiting), unit="studies", hidden=not folder) as bar:
        for start in range(0, len(waiting), batch):
            some = []
            for name in waiting[start : start + batch]:
                try:
                    some.append(StudyInput(name, *views.load_study(name, studies[name], target)))
                except UserError as error:  # one of many: named, and left out
                    broken += 1
                    results.append({"name": name, "error": str(error)})
            for answer in pipeline.answer(some, question, batch):
                results.append({**answer.to_json(), "images": [str(path) for path in studies[answer.name]]})
            if out:
                views.append_answers(out, [result for result in results[-len(some) :] if "text" in result])
            bar.update(min(start + batch, len(waiting)))
    if not as_json:
        for result in results:
            tables.answer(result, Console(highlight=False), heading=folder is not None)
    one = results[0] if not folder and results else {}
    shown = {"studies": results, "broken": broken, "told_before": len(answered)} if folder or not results else {}
    emit({"run": str(run_folder.path), **one, **shown}, as_json)
    raise typer.Exit(1 if broken else 0)


@verb(MODELS, "radhpc demo runs/quickstart-20261122-101500 --retrieve 3")
def demo(
    run: RunPath,
    port: Annotated[int, typer.Option(help="Port on this machine's loopback; 0: any free port.", min=0, max=65535)] = 0,
    retrieve: Annotated[
        int, typer.Option(help="Show this many similar training studies; needs `radhpc index`.", min=0)
    ] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest text, in tokens; default: the recipe's.", min=1)
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(help="Beams of a beam search; with several, texts appear as a whole, not word by word.", min=1),
    ] = None,
) -> None:
    """Serve a web page on this machine only: drop a radiograph, read its report, ask questions. Research use only."""
    from shards import views

    run_folder, target = image_settings(run)
    context = context_of(run_folder.path)
    from radhpc.serving.demo import Demo
    from radhpc.serving.inference import DecodingOptions
    from radhpc.serving.pipeline import Pipeline

    decoding = DecodingOptions.of(context.recipe.evaluation, max_new_tokens=max_new_tokens, beams=beams)
    with Demo(
        Pipeline(context, decoding, retrieve), lambda data, name: views.load_view_bytes(data, name, target), port
    ) as page:
        say(f"{page.url}\n{from_elsewhere(page.port)}\nCtrl-C ends it. Research use only, not for clinical use.", False)
        try:
            page.serve()
        except KeyboardInterrupt:
            say("ended", False)


@verb(MODELS, "radhpc index runs/quickstart-20261122-101500")
def index(
    run: RunPath,
    samples: Annotated[int | None, typer.Option(help="How many studies; default: all of split train.", min=2)] = None,
    as_json: Json = False,
) -> None:
    """Index the training studies by the model's vision features, for `generate --retrieve` and `demo`."""
    context = context_of(run)
    keep_to_this_command(context.run.path / "index", "index")
    from radhpc.serving.feature_index import build as build_index
    from radhpc.training.engine_builder import restore_engine

    engine, cursor = restore_engine(context)

    with Bar("index", 1, unit="studies") as bar:
        made = build_index(context, engine, cursor, samples, lambda done, total: bar.update(done, total=total))
    say(f"{context.run.path / 'index'}: {made.about['studies']} training studies at step {cursor.step}", as_json)
    emit({"run": str(context.run.path), **{key: made.about[key] for key in ("step", "studies", "left_out")}}, as_json)


@verb(MODELS, "radhpc export RUN --out my-model --merge --check")
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write full weights with the adapters merged; default: an adapter for PEFT.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load the export without radhpc in another process, and compare the logits.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Data type of full weights: float32, bfloat16 or float16; default: the base's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the newest checkpoint as an adapter for PEFT, or as full weights that plain transformers loads.

    Processor, tokenizer, generation settings, a model card and an example are written next to it.
    """
    if dtype is not None:
        one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    keep_to_this_command(out, "export")
    context = context_of(run)
    from radhpc.serving import export as exports

    with contextlib.redirect_stdout(sys.stderr):  # libraries that saving imports, such as deepspeed, say something
        written, probe = exports.export(context, out.absolute(), merge, dtype)
    form = {"model": "full weights", "adapter": f"an adapter for PEFT on {written.base}"}[written.kind]
    say(f"{written.out}: {form}, {written.parameters:,} parameters of step {written.step}; see README.md", as_json)
    difference = exports.check(written, probe) if check else None
    if difference is not None:
        say(f"plain transformers gives the same logits (they differ by {difference:.1g} of the largest)", as_json)
    result = {"run": str(context.run.path), **vars(written), "out": str(written.out), "difference": difference}
    emit(result, as_json)


def _check_evaluation(
    run: "RunFolder", split: str, shards: list[str], settings: "EvaluationSettings", against: Path | None
) -> tuple[str, str]:
    """Check here what would otherwise fail in the job. Return the name and the identity of the newest checkpoint."""
    from radhpc.core.manifest import Manifest
    from radhpc.core.people import DatasetPatients
    from radhpc.core.sample import SPLITS
    from radhpc.engine.checkpoint import Checkpoints
    from radhpc.evaluation.metrics.scorers import ModelScorers
    from radhpc.evaluation.scoring import newest_evaluation
    from radhpc.storage.store import Store

    if split not in SPLITS:
        raise UserError(f"--split {split}: allowed are {', '.join(SPLITS)}")
    checkpoints = Checkpoints.of(run.path, run.recipe())
    name, skipped = checkpoints.newest()
    if name is None:
        why = "".join(f"; {torn}: {fault}" for torn, fault in skipped)
        raise UserError(f"{run.path}: no checkpoint to evaluate{why}")
    stages = run.recipe().stages[: checkpoints.cursor(name).stage + 1]
    counts = [Manifest.load(Store(url)).splits.get(split, 0) for url in shards or run.recipe().shards_of(stages[-1])]
    if not any(counts):
        raise UserError(f"--split {split}: no study there")
    # The model knows what earlier stages were trained on, too; those shards may be gone by now.
    earlier = {url for stage in stages[:-1] for url in run.recipe().shards_of(stage)}
    datasets = []
    for url in dict.fromkeys([*run.recipe().shards_of(stages[-1]), *shards, *sorted(earlier)]):
        try:
            datasets.append(DatasetPatients.load(Store(url)))
        except UserError as error:
            if url not in earlier or url in shards:
                raise
            console.print(f"[yellow]warning[/] patients of an earlier stage: {escape(str(error))}", soft_wrap=True)
    compare_patients(datasets)
    ModelScorers(settings.scorers.folders(), settings.scorers.sha256, "cpu").hashes  # noqa: B018
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


def image_settings(path: Path) -> tuple["RunFolder", "EncodingSettings"]:
    """Return the run and the size and format of the images that it was trained on."""
    from radhpc.core.manifest import Manifest
    from radhpc.core.run_folder import RunFolder
    from radhpc.storage.store import Store
    from shards.images.encoding import EncodingSettings

    run = RunFolder.open(path)
    settings = Manifest.load(Store(next(iter(run.recipe().shards)))).build
    return run, EncodingSettings(settings["longest_side"], settings["quality"], settings.get("image_format", "jpeg"))
