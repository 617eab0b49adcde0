"""Raw archives to shards: build, verify."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radhpc.cli.common import Json, app, emit, one_of, pairs, say
from radhpc.core.errors import UserError
from radhpc.core.log import Bar, console
from shards.datasets import registry

if TYPE_CHECKING:
    from shards.execution.pool import TaskRunner
    from shards.settings import BuildResult, BuildSettings


@app.command(
    rich_help_panel="Data",
    epilog="Examples: radhpc build image_text --raw /data/cxr_notes --out runs/cxr-shards   "
    "radhpc build padchest --raw /data/padchest --out s3://bucket/padchest --on a100_preemptible --balance",
)
def build(
    dataset: Annotated[
        str,
        typer.Argument(help=f"One of {', '.join(registry.names())}. Without --out: what it reads, and its options."),
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
    from shards.build import BuildSettings
    from shards.reports.tables import build_lines

    if out is None:
        from shards.reports.tables import options_table as options_of

        console.print(options_of(dataset), soft_wrap=True)
        raise typer.Exit(2)
    given: dict[str, Any] = {"workers": workers} if workers else {}
    settings = BuildSettings(
        longest_side=longest_side,
        quality=quality,
        image_format=one_of("--format", image_format, ("jpeg", "png16", "jxl16")),
        ratios=_ratios(split),
        duplicates=one_of("--duplicates", duplicates, ("drop", "report")),
        apart_from=tuple(apart_from or ()),
        shard_samples=shard_samples,
        max_skipped=max_skipped,
        force=force,
        work=work,
        **given,
    )
    result = build_shards(dataset, raw, out, pairs(options), settings, _array(on, jobs, out, settings))
    say(build_lines(result), as_json)
    made = {key: getattr(result, key) for key in ("url", "samples", "shards", "skipped", "seconds")}
    if balance:
        made["balanced"] = _balance(
            result.url, as_json, cap=cap, rare=rare, vocabulary=vocabulary, embeddings=embeddings
        )
    emit(made, as_json)


@app.command(
    rich_help_panel="Data",
    epilog="Examples: radhpc verify runs/cxr-shards   radhpc verify runs/cxr-shards --repair --raw /data/cxr_notes",
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
    from shards.reports.tables import verification_lines
    from shards.verify import verify_all

    if repair and len(urls) > 1:
        raise UserError("--repair: one URL at a time")
    with Bar("verify", 1, unit="samples") as bar:
        report = verify_all(urls, lambda done, total: bar.update(done, total=total))
    if repair and not report.ok:
        from shards.repair import repair as repair_shards

        with Bar("repair", 1, unit="studies") as bar:
            mended = repair_shards(urls[0], raw, report, workers, lambda done, total: bar.update(done, total=total))
        say(f"built again: {', '.join(mended)}", as_json)
        report = verify_all(urls)
    say(verification_lines(report), as_json)
    faults = [vars(fault) for fault in report.faults]
    emit({"ok": report.ok, "shards": report.shards, "samples": report.samples, "faults": faults}, as_json)
    raise typer.Exit(0 if report.ok else 1)


def build_shards(
    dataset: str,
    raw: Path | None,
    out: str,
    options: dict[str, str],
    settings: "BuildSettings",
    run: "TaskRunner | None" = None,
) -> "BuildResult":
    from shards.build import build as run_build

    with Bar("build", 1, unit="studies") as bar:
        progress = lambda done, total: bar.update(done, total=total)  # noqa: E731
        return run_build(dataset, raw, out, options, settings, progress, run)


def _array(on: str, jobs: int, out: str, settings: "BuildSettings") -> "TaskRunner | None":
    """How a SLURM array works off the shards; None where this machine does."""
    from slurm import profile as profiles

    profile = profiles.load(on)
    if profile.cluster != "slurm":
        return None
    from functools import partial

    from shards.execution.output import BuildOutput
    from shards.execution.pool import run_on_array
    from slurm import job_array

    start = partial(job_array.submit, profile, BuildOutput(out, settings.work).work, "build")
    return partial(run_on_array, start, jobs)


def _balance(url: str, as_json: bool, **settings: Any) -> dict[str, Any]:
    from shards.balance import BalanceSettings, balance
    from shards.reports.tables import balance_line

    with Bar("balance", 1, unit="samples") as bar:
        result = balance(url, BalanceSettings(**settings), lambda done, total, what: bar.update(done, what, total))
    say(balance_line(result), as_json)
    return {"url": result.url, "kept": result.kept, "dropped": result.dropped, "clusters": result.clusters}


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, validate, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--split {text}: three numbers are wanted, such as 0.8,0.1,0.1") from error
    return train, validate, test
