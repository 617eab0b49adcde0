"""radhpc's command line: raw archives to shards, a recipe to a job, and everything that follows.

`python launch.py --help`, also installed as `radhpc`. Each verb is a few calls into the packages `shards` (data
preparation), `slurm` (where jobs run) and `radhpc` (what runs inside them). PyTorch is imported only where a model is.
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from radhpc.errors import UserError
from radhpc.log import Bar, console, start as start_log
from slurm import tables

if TYPE_CHECKING:
    from radhpc.recipe import Evaluation, Recipe
    from radhpc.run_dir import RunDir
    from shards.pixels import Target
    from shards.pool import Run
    from shards.settings import Result, Settings
    from slurm.profile import Profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train radiology vision-language models on SLURM clusters: from raw archives to reports, through every "
    "preemption. First steps: [bold]quickstart[/] does it all on this machine in minutes; then [bold]build[/] your "
    "data and [bold]train[/] a recipe. Research use only, not for clinical use.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, for programs.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
On = Annotated[
    str, typer.Option("--on", metavar="PROFILE", help="inline, local, box, a name in slurm/profiles/, or a file.")
]
HERE = Path(__file__).resolve().parent
DATASETS = sorted(path.stem for path in (HERE / "shards" / "datasets").glob("[a-z]*.py"))


@app.command(epilog="Example: python launch.py quickstart")
def quickstart(
    run: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/quickstart-DATE.")] = None,
    studies: Annotated[int, typer.Option(help="Phantom studies to draw.", min=200)] = 3000,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw phantom radiographs, build shards, train all stages, evaluate and write reports: on a CPU, in minutes."""
    from radhpc.files import read_json
    from shards.build import Settings

    started = time.perf_counter()
    path = run or _new_run("quickstart")
    shards = path.with_name(path.name + "-shards")
    options = {"studies": str(studies), "two_views": "0.15", "size": "128"}
    _build("phantom", None, str(shards), options, Settings(longest_side=112))
    run_dir = _train(HERE / "recipes" / "quickstart.yaml", [f"shards=[{shards}]", *(overrides or [])], "inline", path)
    folder = max((run_dir.path / "evaluation").glob("step-*"))
    scores = read_json(folder / "scores.json")
    name = "findings_macro_f1"
    result = {
        "run": str(run_dir.path),
        "seconds": round(time.perf_counter() - started, 1),
        "macro_f1": scores["scores"][name]["value"],
        # What knows nothing of the image. The report of the training radiograph that is most alike stands apart: drawn
        # phantoms are so much alike that it is hard to beat.
        "baselines": {kind: scores["baselines"][kind][name]["value"] for kind in ("constant", "random")},
        "nearest": scores["baselines"].get("nearest", {}).get(name, {}).get("value"),
    }
    _say(f"\nUnseen phantom patients: {scores['samples']} studies of split '{scores['split']}'", as_json)
    _say(tables.scores(scores), as_json)
    for line in (folder / "reports.jsonl").read_text().splitlines()[:3]:
        report = json.loads(line)
        _say(f"\n[bold]reference[/] {report['reference']}\n[bold]generated[/] {report['generated']}", as_json)
    _say(f"\nDone in {result['seconds']:.0f} s. The run: {run_dir.path}", as_json)
    _say(f"See it: {folder / 'report.html'} in a browser; python launch.py board {run_dir.path}", as_json)
    _say(f"Meet it: python launch.py index {run_dir.path}, then demo {run_dir.path} --retrieve 3", as_json)
    _emit(result, as_json)


@app.command(
    epilog="Examples: python launch.py build image_text --raw /data/cxr_notes --out runs/cxr-shards   "
    "python launch.py build padchest --raw /data/padchest --out s3://bucket/padchest --on a100_preemptible --balance"
)
def build(
    dataset: Annotated[
        str, typer.Argument(help=f"One of {', '.join(DATASETS)}. Without --out: what it reads, and its options.")
    ],
    out: Annotated[str | None, typer.Option(help="Folder or URL (s3://...) for shards, manifest and card.")] = None,
    raw: Annotated[Path | None, typer.Option(help="The archive as it was distributed: a folder or its table.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the dataset.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.", min=1)] = None,
    on: Annotated[
        str, typer.Option("--on", metavar="PROFILE", help="Where: this machine, or a SLURM array by a profile.")
    ] = "local",
    jobs: Annotated[int, typer.Option(help="Elements of the SLURM array.", min=1)] = 8,
    longest_side: Annotated[int, typer.Option(help="Larger images are shrunk to this many pixels.", min=16)] = 1120,
    quality: Annotated[int, typer.Option(help="JPEG quality.", min=50, max=100)] = 95,
    image_format: Annotated[
        str, typer.Option("--format", help="jpeg (8 bits), or 16 bits without loss: png16, jxl16.")
    ] = "jpeg",
    split: Annotated[
        str, typer.Option(help="Ratios of train, validate, test where the archive has no split.")
    ] = "0.8,0.1,0.1",
    duplicates: Annotated[
        str, typer.Option(help="Images that another split has, too: drop their studies, or only report them.")
    ] = "drop",
    apart_from: Annotated[
        list[str] | None, typer.Option(help="Shards whose other splits must not be repeated here, either.")
    ] = None,
    shard_samples: Annotated[int, typer.Option(help="Studies per shard.", min=1)] = 1000,
    max_skipped: Annotated[str, typer.Option(help="Broken studies above which the build fails: 12, or 1%.")] = "1%",
    work: Annotated[
        Path | None, typer.Option(help="Private folder for the time of the build; all nodes see it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace shards that were built otherwise.")] = False,
    balance: Annotated[bool, typer.Option("--balance", help="Also make the subset URL#balanced: see above.")] = False,
    cap: Annotated[str, typer.Option(help="Balance: studies of a cluster that stay; a count or a quantile.")] = "50%",
    rare: Annotated[float, typer.Option(help="Balance: labels rarer than this share are all kept.")] = 0.01,
    vocabulary: Annotated[
        str | None, typer.Option(help="Balance: labels that count; default: chexpert, or the largest.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Balance: .npz of your own vectors, key and vector, instead of TF-IDF.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a raw archive into tar shards with a manifest and a card. A build that was interrupted goes on where it was.

    Whatever is left out is named. Identifiers become salted hashes, texts are scrubbed of dates, names and numbers.
    --balance clusters the reports and keeps a few of each cluster, all that are like no other, and all rare labels.
    """
    from shards.build import Settings
    from shards.tables import built

    if out is None:
        from shards.tables import options as options_of

        console.print(options_of(dataset), soft_wrap=True)
        raise typer.Exit(2)
    given: dict[str, Any] = {"workers": workers} if workers else {}
    settings = Settings(
        longest_side=longest_side,
        quality=quality,
        image_format=_one_of("--format", image_format, ("jpeg", "png16", "jxl16")),
        ratios=_ratios(split),
        duplicates=_one_of("--duplicates", duplicates, ("drop", "report")),
        apart_from=tuple(apart_from or ()),
        shard_samples=shard_samples,
        max_skipped=max_skipped,
        force=force,
        work=work,
        **given,
    )
    result = _build(dataset, raw, out, _pairs(options), settings, _array(on, jobs, out, settings))
    _say(built(result), as_json)
    made = {key: getattr(result, key) for key in ("url", "samples", "shards", "skipped", "seconds")}
    if balance:
        made["balanced"] = _balance(
            result.url, as_json, cap=cap, rare=rare, vocabulary=vocabulary, embeddings=embeddings
        )
    _emit(made, as_json)


@app.command(
    epilog="Examples: python launch.py verify runs/cxr-shards   "
    "python launch.py verify runs/cxr-shards --repair --raw /data/cxr_notes"
)
def verify(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", help="Shards; several are also held against each other.")
    ],
    repair: Annotated[bool, typer.Option("--repair", help="Build broken shards again, to the same bytes.")] = False,
    raw: Annotated[Path | None, typer.Option(help="The raw archive, for --repair.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes of --repair; default: one per core.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Reread every shard against the manifest: sizes, checksums, members, keys, identifiers; no patient and no picture
    in two splits.
    """
    from shards.tables import verified
    from shards.verify import verify_all

    if repair and len(urls) > 1:
        raise UserError("--repair: one URL at a time")
    with Bar("verify", 1, unit="samples") as bar:
        report = verify_all(urls, lambda done, total: bar.update(done, total=total))
    if repair and not report.ok:
        from shards.repair import repair as repair_shards

        with Bar("repair", 1, unit="studies") as bar:
            mended = repair_shards(urls[0], raw, report, workers, lambda done, total: bar.update(done, total=total))
        _say(f"built again: {', '.join(mended)}", as_json)
        report = verify_all(urls)
    _say(verified(report), as_json)
    faults = [vars(fault) for fault in report.faults]
    _emit({"ok": report.ok, "shards": report.shards, "samples": report.samples, "faults": faults}, as_json)
    raise typer.Exit(0 if report.ok else 1)


@app.command(epilog="Example: python launch.py train recipes/image_text.yaml stages.adapt.steps=100 --on box --watch")
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as seed=1.")
    ] = None,
    on: On = "inline",
    run: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME-DATE.")] = None,
    engine: Annotated[str | None, typer.Option(help="fsdp, deepspeed or single; as engine=.")] = None,
    stages: Annotated[str | None, typer.Option(help="Of the recipe, by number or name: 2,3; default: all.")] = None,
    origin: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="The run that has trained the stages before those.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Validate and freeze a recipe, check its data, and submit it. Prints the run's folder and the job's id."""
    changes = [*(overrides or []), *([f"engine={engine}"] if engine else [])]
    run_dir = _train(
        recipe, changes, on, run, watch, lambda run, job: _announce(run, job, as_json), stages=stages, origin=origin
    )
    _emit({"run": str(run_dir.path), "job": (run_dir.job() or {}).get("id")}, as_json)


@app.command(epilog="Example: python launch.py resume runs/quickstart-20261122-101500 --on local")
def resume(
    run: RunPath,
    on: Annotated[str | None, typer.Option("--on", metavar="PROFILE", help="Default: the profile it ran on.")] = None,
    current_code: Annotated[
        bool, typer.Option("--current-code", help="Replace the code that the run was submitted with by today's.")
    ] = False,
    engine: Annotated[str | None, typer.Option(help="Go on under fsdp, deepspeed or single.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Go on from the newest checkpoint that verifies, on the same or another number of ranks, with the same code."""
    from radhpc.run_dir import RunDir
    from slurm import profile as profiles

    run_dir = RunDir.open(run)
    if run_dir.events() and run_dir.events()[-1]["event"] == "finished":
        raise UserError(f"{run}: the run is finished; evaluate or generate with it, or train a new one")
    if run_dir.events("pruned"):
        raise UserError(f"{run}: its sweep has ended the run early; train {run}/recipe.yaml as a run of its own")
    frozen = run_dir.path / "profile.yaml"
    profile = profiles.load(on or (str(frozen) if frozen.exists() else "inline"))
    recipe = run_dir.recipe() if engine is None else run_dir.recipe().under(engine, run_dir.recipe_path)
    _check_engine(recipe, profile)
    chosen = _choose_checkpoint(run_dir, profile, as_json)
    run_dir.change_engine(recipe.engine)
    _submit(run_dir, profile, watch, lambda run, job: _announce(run, job, as_json), current_code)
    _emit({"run": str(run_dir.path), "job": (run_dir.job() or {}).get("id"), **chosen}, as_json)


@app.command(epilog="Example: python launch.py sweep recipes/sweeps/quickstart.yaml --on local")
def sweep(
    sweep: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/sweeps/.")],
    on: On = "inline",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--sweep", metavar="DIR", help="Its folder; default: the newest of this sweep in runs/, or a new one."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a recipe many times with other values of its keys: one job array, each trial a run that may be preempted.

    Said again, it submits what is missing, failed or was cancelled, and nothing else.
    """
    from slurm import profile as profiles, sweep as sweeps, trials
    from slurm.study import Study

    profile, (wanted, base) = profiles.load(on), sweeps.load(sweep)
    for recipe in sweeps.distinct_data(wanted, base, sweep):
        _check_data(recipe, recipe.evaluation.split)
    study = Study.create(
        folder or trials.newest(Path("runs"), sweep.stem, wanted, base) or _new_sweep(sweep), wanted, base
    )
    _say(f"sweep {study.path}", as_json)
    whole = True
    if profile.cluster == "slurm":
        job = trials.submit(study, profile)
        _say(f"job {job}" if job else "nothing to submit: every trial runs, waits or is done", as_json)
    else:
        whole = trials.run_here(study, profile, lambda line: _say(line, as_json))
    standing = study.standing()
    _say(tables.sweep(standing), as_json)
    _emit(standing, as_json)
    failed = profile.cluster != "slurm" and any(trial["state"] == "failed" for trial in standing["trials"])
    raise typer.Exit(0 if whole and not failed else 1)


@app.command()
def stop(run: RunPath, as_json: Json = False) -> None:
    """Save at the next step and end for good; a job that still waits in the queue is taken out of it."""
    from radhpc.run_dir import RunDir
    from slurm import scheduler, trials
    from slurm.study import Study, is_sweep

    if is_sweep(run):
        jobs = trials.stop(Study.open(run))
        _say(f"{run}: {len(jobs)} job(s) were asked to stop; 'launch.py sweep' goes on", as_json)
        _emit({"sweep": str(run.absolute()), "jobs": jobs}, as_json)
        return
    run_dir = RunDir.open(run)
    job = run_dir.job()
    state = scheduler.state(job)
    if not state or job is None:
        raise UserError(f"{run}: no living job to stop")
    run_dir.request_stop()
    if state == "PENDING":
        scheduler.cancel(job)
        run_dir.record("stopped", cause="taken out of the queue")
    _say(f"{run}: job {job['id']} ({state.lower()}) was asked to stop", as_json)
    _emit({"run": str(run_dir.path), "job": job["id"]}, as_json)


@app.command(epilog="Examples: python launch.py status   python launch.py status runs/* --watch")
def status(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Default: all in runs/.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Prove which samples were trained on, epoch by epoch.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep the table up to date, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """State and why, stage, step, loss, speed, time left, age of the last checkpoint, restarts, goodput, GPU-hours.

    Goodput is the share of the ranks' time in which steps were made that still count; lost hours went into start-up and
    into steps that were made again.
    """
    from slurm.status import Statuses, find_runs
    from slurm.study import Study, is_sweep

    if watch and (audit or as_json):
        raise UserError(f"--watch: not together with {'--audit' if audit else '--json'}")
    if watch:
        from slurm.watch import watch as watch_runs

        watch_runs(lambda: find_runs(runs), Console(highlight=False))
        return
    sweeps = [path for path in runs or sorted(Path("runs").glob("*/")) if is_sweep(path)]
    if sweeps and not audit:
        standings = [Study.open(path).standing() for path in sweeps]
        rest = [path for path in runs or sorted(Path("runs").glob("*/")) if path not in sweeps]
        alone = Statuses(find_runs(rest, strict=bool(runs))).now() if rest else []
        if alone:
            _say(tables.Runs(alone), as_json)
        for standing in standings:
            _say(tables.sweep(standing), as_json)
        _emit(standings[0] if runs and len(runs) == 1 else {"runs": alone, "sweeps": standings}, as_json)
        return
    chosen = find_runs(runs)
    if audit:
        from radhpc.audit import audit as run_audit

        results = [{"run": str(run.path), **run_audit(run)} for run in chosen]
        _say(tables.audit(results), as_json)
        console.print(*tables.verdicts(results), sep="\n", highlight=False, soft_wrap=True)
    else:
        results = Statuses(chosen).now()
        _say(tables.Runs(results), as_json)
    _emit(results[0] if len(results) == 1 else {"runs": results}, as_json)


@app.command(epilog="Examples: python launch.py logs RUN   python launch.py logs RUN --rank 3 --follow")
def logs(
    run: RunPath,
    rank: Annotated[int | None, typer.Option(help="Only this one; default: rank 0, and errors of all.", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is printed, until the job ends.")] = False,
    life: Annotated[int | None, typer.Option(help="Only this start of the job, from 1; default: all.", min=1)] = None,
) -> None:
    """What the job printed; of a failed run first the traceback that matters."""
    from radhpc.run_dir import RunDir
    from slurm.logs import show

    show(RunDir.open(run), Console(highlight=False), rank, life, follow)


@app.command(
    epilog="Examples: python launch.py evaluate runs/quickstart-20261122-101500 --split test   "
    "python launch.py evaluate RUN beams=3 scorers.chexbert=/weights/chexbert --against OTHER --on a100_preemptible"
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
    from radhpc.files import read_json
    from radhpc.run_dir import RunDir
    from slurm import evaluation, profile as profiles, submit

    run_dir, profile = RunDir.open(run), profiles.load(on)
    settings = evaluation.settings_of(run_dir, overrides or [], samples)
    with submit.environment(profile):  # it may hold the keys of an object store
        checkpoint, weights = _check_evaluation(run_dir, split, shards or [], settings, against)
    chosen = any("conventions=" in change for change in overrides or [])
    job = evaluation.prepare(
        run_dir, checkpoint, weights, split, shards or [], settings, against, every_convention=not chosen
    )
    _submit(job, profile, True, lambda job_dir, number: None, as_json=as_json)
    folder = job.path.parent
    scores = read_json(folder / "scores.json")
    _say(tables.scores(scores), as_json)
    _say(f"written to {folder}; to look at: {folder / 'report.html'}", as_json)
    keys = ("step", "split", "samples", "scores", "baselines", "missing", "comparison")
    _emit({"run": str(run_dir.path), **{key: scores[key] for key in keys if key in scores}}, as_json)


@app.command(
    epilog="Examples: python launch.py generate RUN --image frontal.dcm --image lateral.png --stream   "
    "python launch.py generate RUN --folder cases/ --out reports.jsonl"
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
        int, typer.Option(help="Show so many training studies that look alike; needs `launch.py index`.", min=0)
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

    run_dir, target = _image_settings(run)
    studies = views.studies(folder) if folder else {" ".join(map(str, image or [])): image or []}
    told = views.answered(out, studies) if out else {}
    if not folder:  # one broken image of one study: before the model is loaded
        views.read_study("", next(iter(studies.values())), target)
    parts = _parts(run_dir.path)
    from radhpc.answer import Decoding
    from radhpc.reader import Reader, Study

    changes = {"max_new_tokens": max_new_tokens, "beams": beams, "temperature": temperature, "top_p": top_p}
    reader = Reader(parts, Decoding.of(parts.recipe.evaluation, **changes, seed=seed), retrieve)
    if stream:
        ((name, paths),) = studies.items()
        study = Study(name, *views.read_study(name, paths, target))
        ((neighbours, far),) = reader.near([study])
        for warning in [*reader.warnings(study), *far]:
            console.print(f"[yellow]warning[/] {warning}", soft_wrap=True)
        for piece in reader.stream(study, question):
            print(piece, end="", flush=True)
        print()
        _say(tables.neighbours([vars(neighbour) for neighbour in neighbours]), as_json)
        return
    results: list[dict[str, Any]] = []
    broken = 0
    waiting = [name for name in studies if name not in told]
    with Bar("generate", len(waiting), unit="studies", hidden=not folder) as bar:
        for start in range(0, len(waiting), batch):
            some = []
            for name in waiting[start : start + batch]:
                try:
                    some.append(Study(name, *views.read_study(name, studies[name], target)))
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
    _emit({"run": str(run_dir.path), **one, **shown}, as_json)
    raise typer.Exit(1 if broken else 0)


@app.command(epilog="Example: python launch.py demo runs/quickstart-20261122-101500 --retrieve 3")
def demo(
    run: RunPath,
    port: Annotated[int, typer.Option(help="On this machine alone; 0: any that is free.", min=0, max=65535)] = 0,
    retrieve: Annotated[
        int, typer.Option(help="Show so many training studies that look alike; needs `launch.py index`.", min=0)
    ] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the recipe's.", min=1)] = None,
    beams: Annotated[int | None, typer.Option(help="Several come as a whole, not word by word.", min=1)] = None,
) -> None:
    """A web page on this machine alone: drop a radiograph, read the report, ask. Research use only."""
    from shards import views

    run_dir, target = _image_settings(run)
    parts = _parts(run_dir.path)
    from radhpc.answer import Decoding
    from radhpc.demo import Demo
    from radhpc.reader import Reader

    decoding = Decoding.of(parts.recipe.evaluation, max_new_tokens=max_new_tokens, beams=beams)
    with Demo(Reader(parts, decoding, retrieve), lambda data, name: views.read_bytes(data, name, target), port) as page:
        _say(
            f"{page.url}\n{_from_elsewhere(page.port)}\nCtrl-C ends it. Research use only, not for clinical use.", False
        )
        try:
            page.serve()
        except KeyboardInterrupt:
            _say("ended", False)


@app.command(epilog="Example: python launch.py index runs/quickstart-20261122-101500")
def index(
    run: RunPath,
    samples: Annotated[int | None, typer.Option(help="Studies; default: all of split train.", min=2)] = None,
    as_json: Json = False,
) -> None:
    """Index the training studies by the model's vision features, for `generate --retrieve` and `demo`."""
    parts, engine, cursor = _load(run)
    from radhpc.index import build as build_index

    with Bar("index", 1, unit="studies") as bar:
        made = build_index(parts, engine, cursor, samples, lambda done, total: bar.update(done, total=total))
    _say(f"{parts.run.path / 'index'}: {made.about['studies']} training studies at step {cursor.step}", as_json)
    _emit({"run": str(parts.run.path), **{key: made.about[key] for key in ("step", "studies", "left_out")}}, as_json)


@app.command(epilog="Example: python launch.py export runs/quickstart-20261122-101500 --out my-model --merge --check")
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
        _one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    parts = _parts(run)
    from radhpc import export as exports

    with contextlib.redirect_stdout(sys.stderr):  # libraries that saving imports, such as deepspeed, say something
        written, probe = exports.export(parts, out.absolute(), merge, dtype)
    what = {"model": "whole weights", "adapter": f"an adapter for PEFT on {written.base}"}[written.kind]
    _say(f"{written.out}: {what}, {written.parameters:,} parameters of step {written.step}; see README.md", as_json)
    difference = exports.check(written, probe) if check else None
    if difference is not None:
        _say(f"plain transformers gives the same logits (they differ by {difference:.1g} of the largest)", as_json)
    result = {"run": str(parts.run.path), **vars(written), "out": str(written.out), "difference": difference}
    _emit(result, as_json)


@app.command(
    epilog="Example: python launch.py plan recipes/image_text.yaml stages.adapt.micro_batch=2 --on a100_preemptible"
)
def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as seed=1.")
    ] = None,
    on: On = "inline",
    like: Annotated[Path | None, typer.Option(help="An earlier run, whose samples/s tell the hours.")] = None,
    samples_per_second: Annotated[
        float | None, typer.Option(help="Over all ranks, where you know it: tells the hours.", min=1e-6)
    ] = None,
    run: Annotated[Path, typer.Option(help="Where the run will lie: how fast is a save there?")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Before queueing: memory per GPU, steps and hours, size and time of a checkpoint against the grace.

    The model's real step is traced without values, so that a large one takes a minute and no memory; of model.weights
    the config.json is enough. Exit status 1 where it cannot fit.
    """
    from radhpc import recipe as recipes
    from radhpc.run_dir import RunDir
    from slurm import plan as plans, profile as profiles

    chosen, profile = recipes.load(recipe, overrides or []), profiles.load(on)
    earlier = RunDir.open(like) if like else None
    from radhpc.plan import foretell

    # With a range of nodes a GPU holds most on the fewest of them.
    stages = foretell(chosen, profile.least_nodes * profile.tasks_per_node, bool(profile.gpus_per_node))
    result = plans.costs(stages, profile, run, earlier, samples_per_second)
    result["stages"] = [vars(stage) for stage in stages]
    _say(tables.plan(result), as_json)
    _emit(result, as_json)
    raise typer.Exit(0 if result["fits"] else 1)


@app.command(epilog="Example: python launch.py weights recipes/gla.yaml --online")
def weights(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as model.weights=DIR.")
    ] = None,
    online: Annotated[bool, typer.Option("--online", help="Download what is missing; else nothing ever is.")] = False,
    convert: Annotated[bool, typer.Option("--convert", help="Write pytorch_model*.bin as safetensors.")] = False,
    hashes: Annotated[bool, typer.Option(help="Read every byte and compare its sha256, where it is known.")] = True,
    as_json: Json = False,
) -> None:
    """The files of a recipe's model: where they lie, whether they are whole, and what to put where if they are not.

    A hash is known from FILE.sha256 or SHA256SUMS beside the files, or from the hub's own cache. Exit status 1 where
    something is missing or damaged.
    """
    from radhpc import recipe as recipes, weights as weights_of

    chosen = recipes.load(recipe, overrides or [])
    if online:
        for part, hub_id, folder in weights_of.missing(chosen.model):
            _say(f"{part}: downloads {hub_id}", as_json)
            weights_of.fetch(hub_id, folder)
        chosen = recipes.load(recipe, overrides or [])
    if convert:
        for part in chosen.model.folders.values():
            for path in weights_of.convert(Path(part)):
                _say(f"written: {path}", as_json)
    result = weights_of.report(chosen, hashes)
    _say(tables.weights(result), as_json)
    _emit(result, as_json)
    raise typer.Exit(0 if result["ok"] else 1)


@app.command(epilog="Example: python launch.py doctor --on a100_preemptible --probe --recipe recipes/image_text.yaml")
def doctor(
    on: On = "inline",
    probe: Annotated[bool, typer.Option("--probe", help="Submit a job of two minutes that measures on nodes.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="With --probe: read from the shards of this recipe.")] = None,
    preempt_with: Annotated[
        str | None,
        typer.Option(metavar="PARTITION", help="With --probe: preempt it by a second job in this partition."),
    ] = None,
    run: Annotated[Path, typer.Option(help="Where runs will lie.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Will a signal arrive before a job is killed, do ranks see each other, and what to ask the administrators for.

    Reads what SLURM says of itself. With --probe it also submits a two-minute job of all the profile's ranks: their
    all-reduce, clocks, scontrol, free space, the store's speed, and which signals come after how long.
    """
    from radhpc import recipe as recipes
    from slurm import doctor as doctors, profile as profiles
    from slurm.probe import probe as run_probe

    if (recipe or preempt_with) and not probe:
        raise UserError("--recipe and --preempt-with go with --probe")
    profile = profiles.load(on)
    chosen = recipes.load(recipe) if recipe else None
    urls = sorted({url for stage in chosen.stages for url in chosen.shards_of(stage)}) if chosen else []
    checks = doctors.examine(profile, run)
    _say(tables.checks(checks), as_json)
    if probe and checks[0]["ok"]:
        with Bar("probe", 1, unit="job") as bar:
            more = run_probe(profile, run, urls, preempt_with, progress=lambda what: bar.update(0, what))
            bar.update(1)
        _say(tables.checks(more), as_json)
        checks += more
    ok = all(check["ok"] for check in checks)
    _emit({"ok": ok, "checks": checks}, as_json)
    raise typer.Exit(0 if ok else 1)


@app.command(epilog="Example: python launch.py profile runs/padchest-20261122-101500")
def profile(
    run: RunPath,
    steps: Annotated[int, typer.Option(help="So many of the next ones.", min=1, max=1000)] = 10,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the trace.", min=0)] = 600,
    as_json: Json = False,
) -> None:
    """A profiler's trace of the next steps of the living job, and the operators that take longest."""
    from radhpc.run_dir import RunDir
    from slurm import tracing

    traced = tracing.trace(RunDir.open(run), steps, wait)
    _say(tables.traced(traced), as_json)
    _emit({"run": str(run.absolute()), **traced}, as_json)


@app.command(epilog="Example: python launch.py board runs/quickstart-20261122-101500")
def board(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Default: all in runs/.")] = None,
    port: Annotated[int, typer.Option(help="On this machine alone.", min=1, max=65535)] = 6006,
) -> None:
    """Open TensorBoard over these runs, on loopback."""
    import socket
    import subprocess
    import tempfile

    from radhpc.run_dir import RunDir
    from slurm.study import is_sweep

    inside = [
        sorted(p.parent for p in path.glob("trials/*/recipe.yaml")) if is_sweep(path) else [path] for path in runs or []
    ]
    named = [path for paths in inside for path in paths]
    chosen = [RunDir.open(path).path for path in named or sorted(p.parent for p in Path("runs").glob("*/recipe.yaml"))]
    if not chosen:
        raise UserError("no run in runs/: name one")
    # Two runs of one name, of two sweeps for example, are told apart by their folders.
    alone = [path.name for path in chosen]
    titles = [path.name if alone.count(path.name) == 1 else " ".join(path.parts[-3:]) for path in chosen]
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"--port {port}: something listens there already; name another one")
    _say(f"http://localhost:{port}/\n{_from_elsewhere(port)}", False)
    with tempfile.TemporaryDirectory(prefix="radhpc-board-") as folder:
        for title, path in zip(titles, chosen, strict=True):
            (Path(folder) / title).symlink_to(path / "tensorboard")
        command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", str(port)]
        try:
            ended = subprocess.run([*command, "--logdir", folder], check=False)
        except KeyboardInterrupt:
            _say("ended", False)
            return
    raise typer.Exit(ended.returncode)


# What several verbs share


def _from_elsewhere(port: int) -> str:
    """How a browser on another machine reaches a port on this one's loopback."""
    import getpass
    import socket

    return f"from elsewhere: ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}"


def _new_run(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _new_sweep(sweep: Path) -> Path:
    return _new_run(f"sweep-{sweep.stem}")


def _build(
    dataset: str, raw: Path | None, out: str, options: dict[str, str], settings: "Settings", run: "Run | None" = None
) -> "Result":
    from shards.build import build as build_shards

    with Bar("build", 1, unit="studies") as bar:
        progress = lambda done, total: bar.update(done, total=total)  # noqa: E731
        return build_shards(dataset, raw, out, options, settings, progress, run)


def _array(on: str, jobs: int, out: str, settings: "Settings") -> "Run | None":
    """How a SLURM array works off the shards; None where this machine does."""
    from slurm import profile as profiles

    profile = profiles.load(on)
    if profile.cluster != "slurm":
        return None
    from functools import partial

    from shards.output import Output
    from shards.pool import run_jobs
    from slurm import array

    start = partial(array.submit, profile, Output(out, settings.work).work, "build")
    return partial(run_jobs, start, jobs)


def _balance(url: str, as_json: bool, **settings: Any) -> dict[str, Any]:
    from shards.balance import Settings, balance
    from shards.tables import balanced

    with Bar("balance", 1, unit="samples") as bar:
        result = balance(url, Settings(**settings), lambda done, total, what: bar.update(done, what, total))
    _say(balanced(result), as_json)
    return {"url": result.url, "kept": result.kept, "dropped": result.dropped, "clusters": result.clusters}


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise UserError(f"{option} {value}: allowed are {', '.join(allowed)}")
    return value


def _train(
    recipe_path: Path,
    overrides: list[str],
    on: str,
    path: Path | None,
    watch: bool = False,
    announce: Callable[["RunDir", str], None] = lambda run, job: None,
    stages: str | None = None,
    origin: Path | None = None,
) -> "RunDir":
    from radhpc import lineage, recipe as recipes
    from radhpc.run_dir import RunDir
    from slurm import profile as profiles

    recipe, profile = recipes.load(recipe_path, overrides), profiles.load(on)
    before, first = RunDir.open(origin) if origin else None, 0
    if stages or before:
        recipe, first = lineage.select(recipe, stages, before)
    _check_engine(recipe, profile)
    _check_data(recipe)
    run = RunDir.create(path or _new_run(recipe.name), recipe)
    try:
        if before is not None:
            lineage.take_over(run, first, before)
        _submit(run, profile, watch, announce)
    except UserError:
        if not run.events("submitted"):  # refused before anything was submitted: the name is free again
            shutil.rmtree(run.path)
        raise
    return run


def _check_engine(recipe: "Recipe", profile: "Profile") -> None:
    """Say here what the ranks would say: too many of them, or a library that is missing in the Python they share."""
    if recipe.engine == "single" and profile.world > 1:
        raise UserError(
            f"engine 'single' on {profile.world} ranks: allowed are fsdp and deepspeed, or a profile with one task"
        )
    if profile.python is None and profile.container is None:
        recipe.refuse_missing()


def _check_data(recipe: "Recipe", *also: str) -> None:
    """Say here, in seconds, what would otherwise fail in the queue; `also` names further splits that are needed."""
    from radhpc import tasks, weights as weights_of
    from radhpc.manifest import Manifest
    from radhpc.source import Source
    from radhpc.store import Store

    for url in {url for stage in recipe.stages for url in recipe.shards_of(stage)}:
        store = Store(url)
        manifest = Manifest.load(store)
        manifest.check_sizes(store)
        for split in ("train", *also):
            if not manifest.splits.get(split):
                raise UserError(f"{url}: no sample of split '{split}'; it has {manifest.splits}")
    weights_of.check(recipe)
    for stage in recipe.stages:
        tasks.check(recipe, stage, Source(recipe.shards_of(stage), "train"))


def _check_evaluation(
    run: "RunDir", split: str, shards: list[str], settings: "Evaluation", against: Path | None
) -> tuple[str, str]:
    """Say here what would otherwise fail in the job. The name and the identity of the newest checkpoint."""
    from radhpc.checkpoint import Checkpoints
    from radhpc.manifest import Manifest
    from radhpc.metrics.scorers import Judges
    from radhpc.sample import SPLITS
    from radhpc.scoring import newest_evaluation
    from radhpc.store import Store

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
        from radhpc.run_dir import RunDir

        newest_evaluation(RunDir.open(against).path, split)
    return name, checkpoints.identity(name)


def _submit(
    run: "RunDir",
    profile: "Profile",
    watch: bool,
    announce: Callable[["RunDir", str], None],
    current_code: bool = False,
    as_json: bool = False,
) -> None:
    """Submit; an inline job runs now, and its error is this command's."""
    from slurm.submit import environment, submit

    job = submit(run, profile, current_code)
    announce(run, str(job.job_id))
    if profile.cluster == "inline":
        with environment(profile):
            error = job.exception()
        if error is not None:
            raise error
        outcome = job.result()
        if outcome.state == "interrupted":
            again = "say the same again" if run.evaluates else f"python launch.py resume {run.path}"
            _say(f"interrupted by {outcome.cause} at step {outcome.step}; go on: {again}", as_json)
            raise typer.Exit(1)
    elif watch:
        _watch(run, as_json)


def _choose_checkpoint(run: "RunDir", profile: "Profile", as_json: bool) -> dict[str, Any]:
    """Say before anything is submitted from which checkpoint the run will go on, and which are skipped and why."""
    from radhpc.checkpoint import Checkpoints
    from slurm import scheduler, submit

    scheduler.refuse_if_alive(run)
    with submit.environment(profile):  # it may hold the keys of an object store
        checkpoints = Checkpoints.of(run.path, run.recipe())
        name, skipped = checkpoints.newest()
    for torn, fault in skipped:
        _say(f"checkpoint {torn} is skipped: {fault}", as_json)
    _say(f"goes on from {checkpoints.storage.where(name)}" if name else "no checkpoint: begins anew", as_json)
    return {"checkpoint": name, "skipped": [{"checkpoint": torn, "fault": fault} for torn, fault in skipped]}


def _watch(run: "RunDir", as_json: bool = False) -> None:
    """Follow a job until it ends. Ctrl-C leaves a SLURM job alone; a local one saves and ends with it."""
    from slurm.logs import first_error
    from slurm.status import LIVING, Statuses

    look = Statuses([run], queue_seconds=2)
    with Bar(run.path.name, 1, unit="steps") as bar:
        while (now := look.now()[0])["state"] in LIVING:
            bar.update(now["step"], tables.line(now), now["steps"] or 1)
            time.sleep(1)
        bar.update(now["step"], now["state"], now["steps"] or 1)
    _say(f"{run.path}: {tables.line(now)}", as_json)
    if now["state"] == "failed":
        for text in first_error(run):
            console.print(text, soft_wrap=True)
        raise typer.Exit(1)


def _load(path: Path) -> tuple[Any, Any, Any]:
    """The parts of a run and the model of its newest checkpoint, in this process."""
    parts = _parts(path)
    engine, cursor = parts.restored_engine()
    return parts, engine, cursor


def _parts(path: Path) -> Any:
    from radhpc.run_dir import RunDir

    run = RunDir.open(path)
    from radhpc.dist import Ranks
    from radhpc.parts import Parts

    start_log()
    return Parts(run, run.recipe(), Ranks())


def _image_settings(path: Path) -> tuple["RunDir", "Target"]:
    """What the images were made into that a run was trained on."""
    from radhpc.manifest import Manifest
    from radhpc.run_dir import RunDir
    from radhpc.store import Store
    from shards.pixels import Target

    run = RunDir.open(path)
    settings = Manifest.load(Store(next(iter(run.recipe().shards)))).build
    return run, Target(settings["longest_side"], settings["quality"], settings.get("image_format", "jpeg"))


def _pairs(options: Iterable[str] | None) -> dict[str, str]:
    pairs = {}
    for option in options or []:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"option '{option}': allowed is key=value")
        pairs[key] = value
    return pairs


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, validate, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--split {text}: three numbers are wanted, such as 0.8,0.1,0.1") from error
    return train, validate, test


# What people and programs see


def _say(what: RenderableType | Iterator[Any], as_json: bool) -> None:
    """Text for people: on standard output, or on standard error where that belongs to the JSON."""
    out = console if as_json else Console(highlight=False)
    for part in what if isinstance(what, Iterator) else (what,):
        out.print(part, soft_wrap=isinstance(part, str))


def _emit(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result), flush=True)


def _announce(run: "RunDir", job: str, as_json: bool) -> None:
    _say(f"run {run.path}\njob {job}", as_json)


def main() -> None:
    """Exit status 0 done, 1 failed, 2 the user's mistake: one line and no traceback."""
    start_log()
    try:
        app()
    except UserError as error:
        console.print(f"[red]error[/] {error}", soft_wrap=True, highlight=False, markup=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
