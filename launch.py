"""radhpc's command line: raw archives to shards, a recipe to a job, and everything that follows.

`python launch.py --help`, also installed as `radhpc`. Each verb is a few calls into the packages `shards` (data
preparation), `slurm` (where jobs run) and `radhpc` (what runs inside them). PyTorch is imported only where a model is.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from radhpc.errors import UserError
from radhpc.log import Bar, console, start as start_log

if TYPE_CHECKING:
    from radhpc.recipe import Recipe
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
SHOWN = 20  # studies that were left out, or seen too often or never
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
        "baselines": {kind: values[name]["value"] for kind, values in scores["baselines"].items()},
    }
    _say(f"\nUnseen phantom patients: {scores['samples']} studies of split '{scores['split']}'", as_json)
    _print_scores(scores, as_json)
    for line in (folder / "reports.jsonl").read_text().splitlines()[:3]:
        report = json.loads(line)
        _say(f"\n[bold]reference[/] {report['reference']}\n[bold]generated[/] {report['generated']}", as_json)
    _say(f"\nDone in {result['seconds']:.0f} s. The run: {run_dir.path}", as_json)
    _say(f"See it: python launch.py board {run_dir.path}", as_json)
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

    if out is None:
        _describe_dataset(dataset)
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
    _print_build(result, as_json)
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
    from shards.verify import verify as verify_shards, verify_apart

    if repair and len(urls) > 1:
        raise UserError("--repair: one URL at a time")

    def check(url: str) -> Any:
        with Bar("verify", 1, unit="samples") as bar:
            return verify_shards(url, lambda done, total: bar.update(done, total=total))

    reports = [check(url) for url in urls]
    if repair and not reports[0].ok:
        from shards.repair import repair as repair_shards

        with Bar("repair", 1, unit="studies") as bar:
            mended = repair_shards(urls[0], raw, reports[0], workers, lambda done, total: bar.update(done, total=total))
        _say(f"built again: {', '.join(mended)}", as_json)
        reports = [check(urls[0])]
    several = len(urls) > 1
    faults = [
        {**vars(fault), "shard": f"{report.url}/{fault.shard}" if several else fault.shard}
        for report in reports
        for fault in report.faults
    ]
    for place, url in enumerate(urls):
        for other in urls[place + 1 :]:
            faults += [{**vars(fault), "shard": f"{url}/{fault.shard}"} for fault in verify_apart(url, other)]
    for fault in faults:
        where = "" if fault["offset"] is None else f" at {fault['offset']}"
        _say(f"{fault['shard']} {fault['member'] or ''}{where}: {fault['fault']}", as_json)
    samples, shards = sum(report.samples for report in reports), sum(report.shards for report in reports)
    _say(f"{samples} samples in {shards} shards, {len(faults)} fault(s)", as_json)
    _emit({"ok": not faults, "shards": shards, "samples": samples, "faults": faults}, as_json)
    raise typer.Exit(1 if faults else 0)


@app.command(epilog="Example: python launch.py train recipes/image_text.yaml stages.adapt.steps=100 --on box --watch")
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as seed=1.")
    ] = None,
    on: On = "inline",
    run: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME-DATE.")] = None,
    engine: Annotated[str | None, typer.Option(help="fsdp or single; as engine=.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Validate and freeze a recipe, check its data, and submit it. Prints the run's folder and the job's id."""
    changes = [*(overrides or []), *([f"engine={engine}"] if engine else [])]
    run_dir = _train(recipe, changes, on, run, watch, lambda run, job: _announce(run, job, as_json))
    _emit({"run": str(run_dir.path), "job": (run_dir.job() or {}).get("id")}, as_json)


@app.command(epilog="Example: python launch.py resume runs/quickstart-20261122-101500 --on local")
def resume(
    run: RunPath,
    on: Annotated[str | None, typer.Option("--on", metavar="PROFILE", help="Default: the profile it ran on.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Go on from the newest checkpoint that verifies, on the same or another number of ranks."""
    from radhpc.run_dir import RunDir
    from slurm import profile as profiles

    run_dir = RunDir.open(run)
    if run_dir.events() and run_dir.events()[-1]["event"] == "finished":
        raise UserError(f"{run}: the run is finished; evaluate or generate with it, or train a new one")
    if run_dir.events("pruned"):
        raise UserError(f"{run}: its sweep has ended the run early; train {run}/recipe.yaml as a run of its own")
    frozen = run_dir.path / "profile.yaml"
    profile = profiles.load(on or (str(frozen) if frozen.exists() else "inline"))
    _submit(run_dir, profile, watch, lambda run, job: _announce(run, job, as_json))
    _emit({"run": str(run_dir.path), "job": (run_dir.job() or {}).get("id")}, as_json)


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
    _print_sweep(standing, as_json)
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


@app.command(epilog="Example: python launch.py status runs/* --json")
def status(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Default: all in runs/.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Prove which samples were trained on, epoch by epoch.")
    ] = False,
    as_json: Json = False,
) -> None:
    """State, stage, step, loss, speed, age of the last checkpoint, restarts by cause."""
    from radhpc.run_dir import RunDir
    from slurm.status import status as run_status
    from slurm.study import Study, is_sweep

    if runs and any(map(is_sweep, runs)) and not audit:
        standings = [Study.open(path).standing() for path in runs if is_sweep(path)]
        for standing in standings:
            _print_sweep(standing, as_json)
        alone = [run_status(RunDir.open(path)) for path in runs if not is_sweep(path)]
        if alone:
            _print_status(alone, as_json)
        _emit(standings[0] if len(runs) == 1 else {"runs": alone, "sweeps": standings}, as_json)
        return
    chosen = [RunDir.open(path) for path in runs or sorted(p.parent for p in Path("runs").glob("*/recipe.yaml"))]
    if audit:
        from radhpc.audit import audit as run_audit

        results = [{"run": str(run.path), **run_audit(run)} for run in chosen]
        _print_audit(results, as_json)
    else:
        results = [run_status(run) for run in chosen]
        _print_status(results, as_json)
    _emit(results[0] if len(results) == 1 else {"runs": results}, as_json)


@app.command(epilog="Example: python launch.py evaluate runs/quickstart-20261122-101500 --split test")
def evaluate(
    run: RunPath,
    split: Annotated[str, typer.Option(help="train, validate or test.")] = "test",
    samples: Annotated[int | None, typer.Option(help="Studies; default: all of the split.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Generate for held-out studies with the newest checkpoint, and score beside trivial baselines."""
    from radhpc.files import read_json

    parts, engine, cursor = _load(run)
    from radhpc.evaluate import chosen, evaluate as evaluate_engine, write
    from radhpc.sample import SPLITS

    if split not in SPLITS:
        raise UserError(f"--split {split}: allowed are {', '.join(SPLITS)}")
    held_out = parts.source(cursor.stage, split)
    if not len(held_out):
        raise UserError(f"--split {split}: no study there")
    recipe = parts.recipe.evaluation.model_copy(update={"samples": samples})
    count = len(chosen(held_out, samples))
    with Bar("evaluate", count, unit="studies") as bar:
        result = evaluate_engine(
            engine, parts.encoder, held_out, parts.source(cursor.stage, "train"), recipe, parts.ranks,
            lambda done: bar.update(min(done, count)),
        )  # fmt: skip
        bar.update(count)
    folder = parts.run.path / "evaluation" / f"step-{cursor.step:06d}-{split}"
    write(folder, result, cursor.step, split)
    scores = read_json(folder / "scores.json")
    _print_scores(scores, as_json)
    _say(f"written to {folder}", as_json)
    _emit({"run": str(parts.run.path), **{key: scores[key] for key in ("step", "split", "samples", "scores")}}, as_json)


@app.command(epilog="Example: python launch.py generate RUN --image frontal.dcm --image lateral.png")
def generate(
    run: RunPath,
    image: Annotated[list[Path], typer.Option(help="JPEG, PNG or DICOM; several are views of one study.")],
    question: Annotated[str | None, typer.Option(help="Ask this instead of for a report.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the recipe's.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Write a report, or an answer, for one study. Research use only, not for clinical use."""
    from radhpc.transforms import decode
    from shards.pixels import BadImage, encode, load

    run_dir, target = _image_settings(run)
    views = []
    for path in image:
        try:
            encoded = encode(load(path), target)  # what `build` does to an image, so that no view looks different
        except (BadImage, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        views.append(decode(encoded.data, encoded.view))
    parts, engine, _ = _load(run_dir.path)
    from radhpc.generate import generate as generate_texts

    prompt = parts.encoder.encode_prompt("", question, views)
    limit = max_new_tokens or parts.recipe.evaluation.max_new_tokens
    (text,) = generate_texts(engine, parts.encoder, [prompt], 1, limit, parts.ranks)
    if not as_json:
        Console().print(text or "(the model wrote nothing)")
    _emit({"run": str(run_dir.path), "text": text, "images": [str(path) for path in image]}, as_json)


@app.command(epilog="Example: python launch.py board runs/quickstart-20261122-101500")
def board(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Default: all in runs/.")] = None,
    port: Annotated[int, typer.Option(help="On this machine alone.")] = 6006,
) -> None:
    """Open TensorBoard over these runs, on loopback."""
    import subprocess

    from radhpc.run_dir import RunDir
    from slurm.study import is_sweep

    inside = [
        sorted(p.parent for p in path.glob("trials/*/recipe.yaml")) if is_sweep(path) else [path] for path in runs or []
    ]
    named = [path for paths in inside for path in paths]
    chosen = [RunDir.open(path).path for path in named or sorted(p.parent for p in Path("runs").glob("*/recipe.yaml"))]
    if not chosen:
        raise UserError("no run in runs/: name one")
    names = ",".join(f"{path.name}:{path / 'tensorboard'}" for path in chosen)
    _say(f"http://localhost:{port}/  (from elsewhere: ssh -L {port}:localhost:{port} HOST)", False)
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--logdir_spec",
        names,
    ]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


# What several verbs share


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


def _print_build(result: "Result", as_json: bool) -> None:
    for skipped in result.skipped[:SHOWN]:
        _say(f"skipped {skipped['name']}: {skipped['reason']}", as_json)
    if len(result.skipped) > SHOWN:
        _say(f"... and {len(result.skipped) - SHOWN} more: {result.skipped_file}", as_json)
    for warning in result.warnings:
        _say(f"[yellow]warning[/] {warning}", as_json)
    if result.scrubbed:
        counts = ", ".join(f"{count} {rule}" for rule, count in sorted(result.scrubbed.items()))
        _say(f"scrubbed from texts: {counts}", as_json)
    what = "were there already" if result.reused else f"built in {result.seconds:.0f} s"
    _say(
        f"{result.samples} samples in {result.shards} shards {what}, {len(result.skipped)} skipped: {result.url}",
        as_json,
    )


def _balance(url: str, as_json: bool, **settings: Any) -> dict[str, Any]:
    from shards.balance import Settings, balance

    with Bar("balance", 1, unit="samples") as bar:
        result = balance(url, Settings(**settings), lambda done, total, what: bar.update(done, what, total))
    _say(
        f"balanced: {result.kept} of {result.kept + result.dropped} training samples from {result.clusters} clusters "
        f"and {result.noise} that are like no other: {result.url}",
        as_json,
    )
    return {"url": result.url, "kept": result.kept, "dropped": result.dropped, "clusters": result.clusters}


def _describe_dataset(name: str) -> None:
    """What a reader reads, and its options."""
    from shards import datasets

    reader = datasets.reader(name)
    console.print(f"{(reader.__doc__ or '').strip()}\n", highlight=False, markup=False, soft_wrap=True)
    table = Table("option", "default", "what it is", title=f"Options of {name}, as KEY=VALUE")
    for key, field in reader.OPTIONS.model_fields.items():
        table.add_row(key, "" if field.default is None else str(field.default), field.description or "")
    console.print(table)
    console.print(f"--out is missing: python launch.py build {name} --raw DIR --out URL [KEY=VALUE]...")


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
) -> "RunDir":
    from radhpc import recipe as recipes
    from radhpc.run_dir import RunDir
    from slurm import profile as profiles

    recipe, profile = recipes.load(recipe_path, overrides), profiles.load(on)
    _check_data(recipe)
    run = RunDir.create(path or _new_run(recipe.name), recipe)
    _submit(run, profile, watch, announce)
    return run


def _check_data(recipe: "Recipe", *also: str) -> None:
    """Say here, in seconds, what would otherwise fail in the queue; `also` names further splits that are needed."""
    from radhpc.manifest import Manifest
    from radhpc.store import Store

    for url in {url for stage in recipe.stages for url in recipe.shards_of(stage)}:
        store = Store(url)
        manifest = Manifest.load(store)
        manifest.check_sizes(store)
        for split in ("train", *also):
            if not manifest.splits.get(split):
                raise UserError(f"{url}: no sample of split '{split}'; it has {manifest.splits}")
    if recipe.model.weights is not None and not (Path(recipe.model.weights) / "config.json").exists():
        raise UserError(f"model.weights: {recipe.model.weights}: no config.json there; a local folder is wanted")


def _submit(run: "RunDir", profile: "Profile", watch: bool, announce: Callable[["RunDir", str], None]) -> None:
    """Submit; an inline job runs now, and its error is this command's."""
    from slurm.submit import environment, submit

    job = submit(run, profile)
    announce(run, str(job.job_id))
    if profile.cluster == "inline":
        with environment(profile):
            error = job.exception()
        if error is not None:
            raise error
        outcome = job.result()
        if outcome.state == "interrupted":
            _say(
                f"interrupted by {outcome.cause} at step {outcome.step}; go on: python launch.py resume {run.path}",
                False,
            )
            raise typer.Exit(1)
    elif watch:
        _watch(run)


def _watch(run: "RunDir") -> None:
    """Follow a job until it ends. Ctrl-C leaves a SLURM job alone; a local one saves and ends with it."""
    from slurm.status import status as run_status

    with Bar(run.path.name, 1, unit="steps") as bar:
        while True:
            now = run_status(run)
            bar.update(
                now["step"], f"{now['state']} {now['stage'] or ''} loss {now['loss'] or 0:.3f}", now["steps"] or 1
            )
            if now["state"] not in ("pending", "running"):
                break
            time.sleep(1)
    _say(f"{run.path}: {now['state']} {now['cause']}", False)
    if now["state"] == "failed":
        raise typer.Exit(1)


def _load(path: Path) -> tuple[Any, Any, Any]:
    """The parts of a run and the model of its newest checkpoint, in this process."""
    from radhpc.dist import Ranks
    from radhpc.parts import Parts
    from radhpc.run_dir import RunDir

    start_log()
    run = RunDir.open(path)
    parts = Parts(run, run.recipe(), Ranks())
    engine, cursor = parts.restored_engine()
    return parts, engine, cursor


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


def _say(line: str, as_json: bool) -> None:
    """Text for people: on standard output, or on standard error where that belongs to the JSON."""
    (console if as_json else Console(highlight=False)).print(line, soft_wrap=True)


def _emit(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result), flush=True)


def _announce(run: "RunDir", job: str, as_json: bool) -> None:
    _say(f"run {run.path}\njob {job}", as_json)


def _print_scores(scores: dict[str, Any], as_json: bool) -> None:
    table = Table(
        "score", "model", "95% interval", *scores["baselines"], title=f"step {scores['step']}, {scores['split']}"
    )
    for name, score in scores["scores"].items():
        limits = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
        others = [values.get(name, {}).get("value") for values in scores["baselines"].values()]
        table.add_row(name, f"{score['value']:.3f}", limits, *("" if v is None else f"{v:.3f}" for v in others))
    (console if as_json else Console()).print(table)


def _print_status(results: list[dict[str, Any]], as_json: bool) -> None:
    table = Table("run", "state", "stage", "step", "loss", "samples/s", "checkpoint", "restarts", "goodput")
    for result in results:
        age = result["checkpoint_age_seconds"]
        restarts = ", ".join(f"{count} {cause}" for cause, count in result["restarts"].items() if count)
        table.add_row(
            Path(result["run"]).name,
            f"{result['state']} {result['cause'] if result['state'] != result['cause'] else ''}".strip(),
            result["stage"] or "",
            f"{result['step']}/{result['steps'] or '?'}",
            "" if result["loss"] is None else f"{result['loss']:.3f}",
            "" if not result["samples_per_second"] else f"{result['samples_per_second']:.1f}",
            "" if age is None else f"step {result['checkpoint_step']}, {age:.0f} s ago",
            restarts,
            "" if result["goodput"] is None else f"{result['goodput']:.0%}",
        )
    (console if as_json else Console()).print(table)


def _print_sweep(standing: dict[str, Any], as_json: bool) -> None:
    keys = list(dict.fromkeys(key for trial in standing["trials"] for key in trial["parameters"]))
    title = f"{Path(standing['sweep']).name}: {standing['metric']}, {standing['direction']}"
    table = Table("trial", "state", standing["metric"], "step", *map(_tail, keys, [keys] * len(keys)), title=title)
    for trial in standing["trials"]:
        why = f": {trial['why']}" if trial["state"] in ("failed", "missing") and trial["why"] else ""
        values = [_short(trial["labels"].get(key)) for key in keys]
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        table.add_row(
            Path(trial["run"]).name, trial["state"] + why, value, f"{trial['step']}/{trial['steps'] or '?'}", *values
        )
    (console if as_json else Console()).print(table)
    if standing["best"]:
        _say(f"best so far: trial {Path(standing['best']['run']).name}, {standing['best_recipe']}", as_json)


def _tail(key: str, keys: list[str]) -> str:
    """The last words of a key that tell it from the others."""
    parts = key.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next(tail for tail in tails if sum(other == key or other.endswith(f".{tail}") for other in keys) == 1)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _print_audit(results: list[dict[str, Any]], as_json: bool) -> None:
    mixed = any("dataset" in epoch for result in results for epoch in result["epochs"])
    table = Table(
        "run",
        "stage",
        *(["dataset"] if mixed else []),
        "epoch",
        "due",
        "of",
        "seen",
        "missing",
        "repeated",
        "exactly once",
    )
    for result in results:
        for epoch in result["epochs"]:
            numbers = [str(epoch[key]) for key in ("epoch", "expected", "of", "seen")]
            dataset = [Path(epoch.get("dataset", "")).name] if mixed else []
            faults = [str(len(epoch[key])) for key in ("missing", "repeated")]
            once = "yes" if epoch["exactly_once"] else "NO"
            table.add_row(Path(result["run"]).name, epoch["stage"], *dataset, *numbers, *faults, once)
    (console if as_json else Console()).print(table)
    for result in results:
        lives, worlds = len(result["topologies"]), sorted({life["world_size"] for life in result["topologies"]})
        over = f"{lives} lives on {' and '.join(map(str, worlds))} rank(s)"
        wrong = sum(not epoch["exactly_once"] for epoch in result["epochs"])
        verdict = f"NOT exactly once in {wrong} epoch(s)" if wrong else "every sample due so far exactly once"
        bad = f", {len(result['quarantined'])} of them unreadable and left out" if result["quarantined"] else ""
        console.print(f"{Path(result['run']).name}: {verdict}{bad}, over {over}", highlight=False, soft_wrap=True)
        for epoch in result["epochs"]:
            for fault in ("missing", "repeated"):
                for key in epoch[fault][:SHOWN]:
                    console.print(
                        f"  stage {epoch['stage']}, epoch {epoch['epoch']}: {fault}: {key}",
                        highlight=False,
                        soft_wrap=True,
                    )


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
