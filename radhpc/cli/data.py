"""Turn raw archives into shards: build, verify."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radhpc.cli.common import DATA, Json, emit, one_of, pairs, say, verb
from radhpc.core.errors import UserError
from radhpc.core.log import Bar, console
from shards.datasets import registry

if TYPE_CHECKING:
    from shards.execution.pool import TaskRunner
    from shards.settings import BuildResult, BuildSettings


@verb(
    DATA,
    "radhpc build image_text --raw /data/cxr_notes --out runs/cxr-shards",
    "radhpc build padchest --raw /data/padchest --out s3://bucket/padchest \\\n  --on a100_preemptible --balance",
)
def build(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help=f"One of {', '.join(registry.BUILT_IN)}, or a plugin's. Without --out: print what it reads, and its "
            "options.",
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder or URL (s3://...) to write shards, manifest and card to.")
    ] = None,
    raw: Annotated[Path | None, typer.Option(help="The archive as it was distributed: a folder, or its table.")] = None,
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the dataset.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one per core.", min=1)] = None,
    on: Annotated[
        str,
        typer.Option(
            "--on", metavar="PROFILE", help="Where to build: on this machine, or in a SLURM job array by a profile."
        ),
    ] = "local",
    jobs: Annotated[int, typer.Option(help="Jobs of the SLURM array.", min=1)] = 8,
    longest_side: Annotated[int, typer.Option(help="Larger images are shrunk to this many pixels.", min=16)] = 1120,
    quality: Annotated[int, typer.Option(help="JPEG quality.", min=50, max=100)] = 95,
    image_format: Annotated[
        str, typer.Option("--format", help="jpeg (8 bits), or 16 bits without loss: png16, jxl16.")
    ] = "jpeg",
    split: Annotated[
        str, typer.Option(help="Shares of train, validate and test, where the archive has no splits.")
    ] = "0.8,0.1,0.1",
    duplicates: Annotated[
        str, typer.Option(help="Studies whose images are in another split, too: drop them, or only report them.")
    ] = "drop",
    apart_from: Annotated[
        list[str] | None,
        typer.Option(help="Other shards that must not share patients or images across splits with these."),
    ] = None,
    shard_samples: Annotated[int, typer.Option(help="Studies per shard.", min=1)] = 1000,
    max_skipped: Annotated[str, typer.Option(help="How many broken studies the build tolerates: 12, or 1%.")] = "1%",
    work: Annotated[
        Path | None, typer.Option(help="Private folder for temporary files; all nodes must see it.")
    ] = None,
    unscrubbed: Annotated[
        bool,
        typer.Option(
            "--unscrubbed", help="Build texts in languages without privacy rules, too: you answer for what is in them."
        ),
    ] = False,
    remove_names: Annotated[
        Path | None, typer.Option(help="A list of names to take out of texts, one a line; see `verify --names`.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace shards that were built with other settings.")] = False,
    balance: Annotated[bool, typer.Option("--balance", help="Also make the subset URL#balanced (see above).")] = False,
    cap: Annotated[
        str, typer.Option(help="With --balance: most studies to keep of a cluster; a count or a quantile.")
    ] = "50%",
    rare: Annotated[
        float, typer.Option(help="With --balance: keep all studies with a label rarer than this share.")
    ] = 0.01,
    vocabulary: Annotated[
        str | None, typer.Option(help="With --balance: the labels to look at; default: chexpert, or the largest.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="With --balance: an .npz of your own vectors (key, vector) instead of TF-IDF.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a raw archive into tar shards with a manifest and a card. An interrupted build continues where it stopped.

    Every study that is left out is named. Identifiers become salted hashes; dates, names and numbers are removed from
    texts.
    --balance clusters the reports and keeps a few of each cluster, all outliers, and all studies with rare labels.
    """
    from shards.build import BuildSettings
    from shards.reports.tables import build_lines

    if out is None:
        from shards.reports.tables import options_table as options_of

        console.print(options_of(dataset), soft_wrap=True)
        raise typer.Exit(2)
    extra: dict[str, Any] = {"workers": workers} if workers else {}
    settings = BuildSettings(
        longest_side=longest_side,
        quality=quality,
        image_format=one_of("--format", image_format, ("jpeg", "png16", "jxl16")),
        ratios=_ratios(split),
        duplicates=one_of("--duplicates", duplicates, ("drop", "report")),
        apart_from=tuple(apart_from or ()),
        shard_samples=shard_samples,
        max_skipped=max_skipped,
        unscrubbed=unscrubbed,
        remove_names=remove_names,
        force=force,
        work=work,
        **extra,
    )
    result = build_shards(dataset, raw, out, pairs(options), settings, _array(on, jobs, out, settings))
    say(build_lines(result), as_json)
    made = {key: getattr(result, key) for key in ("url", "samples", "shards", "skipped", "seconds")}
    if balance:
        made["balanced"] = _balance(
            result.url, as_json, cap=cap, rare=rare, vocabulary=vocabulary, embeddings=embeddings
        )
    emit(made, as_json)


@verb(
    DATA,
    "radhpc verify runs/cxr-shards",
    "radhpc verify runs/cxr-shards --raw /data/cxr_notes",
    "radhpc verify runs/cxr-shards --repair --raw /data/cxr_notes",
)
def verify(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL", help="Shards; several are also checked against each other.")
    ],
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild broken shards, byte for byte.")] = False,
    raw: Annotated[
        Path | None,
        typer.Option(help="The raw archive: to rebuild from, with --repair; alone to compare pixels and texts with."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes of --repair and --raw; default: one per core.", min=1)
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help="A spaCy model's folder: list names that stand alone, for you to look at; none is a fault."),
    ] = None,
    read_pixels: Annotated[
        bool, typer.Option("--read-pixels", help="List the words that are written into images; none is a fault.")
    ] = False,
    remove_names: Annotated[
        Path | None, typer.Option(help="With --repair and --raw: the list of names that the build was given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every shard against the manifest: sizes, checksums, members, keys, identifiers, and that no patient and no
    image is in two splits.

    With --raw it also builds every shard again, aside, and names each study whose pixels or texts are not those of
    the archive.
    """
    from shards.reports.tables import verification_lines
    from shards.verify import verify_all

    if repair and len(urls) > 1:
        raise UserError("--repair: one URL at a time")
    if raw is not None and len(urls) > 1:
        raise UserError("--raw: one URL at a time")
    proposals = _propose_names(urls, names, as_json) if names else {}
    if read_pixels:
        proposals |= _read_pixels(urls, as_json)
    with Bar("verify", 1, unit="samples") as bar:
        report = verify_all(urls, lambda done, total: bar.update(done, total=total))
    if repair and not report.ok:
        from shards.repair import repair as repair_shards

        with Bar("repair", 1, unit="studies") as bar:
            mended = repair_shards(
                urls[0], raw, report, workers, lambda done, total: bar.update(done, total=total), remove_names
            )
        say(f"built again: {', '.join(mended)}", as_json)
        report = verify_all(urls)
    if raw is not None and report.ok and not repair:
        from shards.rebuild import compare

        with Bar("compare", 1, unit="studies") as bar:
            advance = lambda done, total: bar.update(done, total=total)  # noqa: E731
            different = compare(urls[0], raw, workers, remove_names, advance)
        report = replace(report, faults=different)
    say(verification_lines(report), as_json)
    faults = [vars(fault) for fault in report.faults]
    result = {"ok": report.ok, "shards": report.shards, "samples": report.samples, "faults": faults}
    emit({**result, "warnings": report.warnings, **proposals}, as_json)
    raise typer.Exit(0 if report.ok else 1)


def _propose_names(urls: list[str], folder: Path, as_json: bool) -> dict[str, Any]:
    """List the names that a model finds in the texts, and return how many there are for programs."""
    from shards.proposals import propose_names
    from shards.text.names import load_finder

    find, total = load_finder(folder), 0
    for url in urls:
        with Bar("names", 1, unit="samples") as bar:
            proposals = propose_names(url, find, lambda done, total: bar.update(done, total=total))
        total += len(proposals.counts)
        if proposals.file:
            say(
                f"{url}: {len(proposals.counts)} proposals in {proposals.samples} samples, for you alone in "
                f"{proposals.file}; delete the lines that are no names, then build with --remove-names",
                as_json,
            )
        else:
            say(f"{url}: the model proposes no name", as_json)
    return {"proposed_names": total}


def _read_pixels(urls: list[str], as_json: bool) -> dict[str, Any]:
    """List the words in the images, and return in how many samples there are any for programs."""
    from shards.pixel_words import load_reader, read_pixels

    read, total = load_reader(), 0
    for url in urls:
        with Bar("pixels", 1, unit="samples") as bar:
            words = read_pixels(url, read, lambda done, total: bar.update(done, total=total))
        total += words.samples
        place = f", for you alone in {words.file}" if words.file else ""
        say(
            f"{url}: {words.suspects} images look as if text is written into them; {words.samples} samples have words "
            f"that are no markers{place}",
            as_json,
        )
    return {"samples_with_words_in_pixels": total}


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
    """Return how a SLURM array builds the shards; None where this machine does."""
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
        result = balance(url, BalanceSettings(**settings), lambda done, total, phase: bar.update(done, phase, total))
    say(balance_line(result), as_json)
    return {"url": result.url, "kept": result.kept, "dropped": result.dropped, "clusters": result.clusters}


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, validate, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--split {text}: allowed are three numbers, such as 0.8,0.1,0.1") from error
    return train, validate, test
