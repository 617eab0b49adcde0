"""Builds a dataset: list the studies, build the shards in worker processes, prove the whole, write the manifest.

    result = build("phantom", None, "runs/phantom", {"studies": "200"}, Settings(), lambda done, total: None)

The same input gives the same bytes, whatever the number of workers and whatever was interrupted. The manifest
is written last: a folder without one is an unfinished build, and the same command goes on with it.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from radhpc.core.files import write_atomically
from radhpc.core.manifest import INDEX, MANIFEST, Manifest, SampleIndex
from radhpc.core.sample import Split
from shards import duplicates
from shards.execution.assembly import assemble
from shards.execution.output import ATTRIBUTION, BuildOutput
from shards.execution.pool import TaskRunner
from shards.execution.scheduler import BuildProgress, build_shards
from shards.execution.worker import LISTING, BuildContext, ShardRecord, ShardTask, read_record
from shards.images.encoding import ImageSettings
from shards.listing import Listing, SkippedStudy
from shards.reports.card import CARD, render_card
from shards.reports.contact_sheet import SHEET, contact_sheet, load_pictures
from shards.settings import BuildResult, BuildSettings
from shards.source import open_source, recipe_hash
from shards.summary import Summary

__all__ = ["BuildResult", "BuildSettings", "build"]

DEFAULTS = BuildSettings()


def build(
    dataset: str,
    raw: Path | None,
    out: str,
    options: Mapping[str, str] | None = None,
    settings: BuildSettings = DEFAULTS,
    progress: BuildProgress = lambda done, total: None,
    run: TaskRunner | None = None,
) -> BuildResult:
    """Build the shards of a raw archive. Raises UserError, and nothing half-written has a final name.

    `dataset` names the reader, `raw` the archive, `options` the reader's key=value options, `out` a folder or a URL;
    `run` works the shards off somewhere else than in processes on this machine.
    """
    started = time.monotonic()
    scrubbed: dict[str, int] = {}
    source = open_source(dataset, options or {})
    drop = source.duplicates(settings) == "drop"
    output = BuildOutput(out, settings.work)
    with output.hold():
        fresh = output.work / f"{LISTING}.new"
        told = source.list(raw, fresh, settings)
        with Listing(fresh) as listing:
            recipe = source.recipe(settings, listing.digest)
            build_hash = recipe_hash(recipe)
            manifest = output.earlier(recipe, build_hash, settings.force)
            reused, skipped = manifest is not None, list[SkippedStudy]()
            if manifest is None:
                _place_listing(output.work, listing.digest)
                target = ImageSettings(settings.longest_side, settings.quality, settings.image_format)
                job = BuildContext(output.url, output.work, build_hash, target)
                tasks = [ShardTask(plan, job) for plan in listing.plans]
                apart = [duplicates.load(url) for url in settings.apart_from] if drop else None
                skipped = build_shards(tasks, listing, settings, progress, run, apart)
                manifest, scrubbed = _finish(output, tasks, listing.dataset, recipe, skipped, told)
            else:
                told += [f"{n} studies were left out when it was built: {why}" for why, n in manifest.skipped.items()]
    if not drop:
        told += _overlaps(out, settings)
    return BuildResult(
        url=out,
        samples=manifest.samples,
        shards=len(manifest.shards),
        manifest_hash=manifest.hash,
        seconds=time.monotonic() - started,
        splits=manifest.splits,
        patients=manifest.patients,
        skipped=[skip.shown() for skip in skipped],
        skipped_file=_write_skipped(manifest, skipped) if skipped else None,
        scrubbed=scrubbed,
        warnings=told,
        reused=reused,
    )


def _write_skipped(manifest: Manifest, skipped: list[SkippedStudy]) -> Path:
    """Keep what was left out under its raw names where only the user reads it: the shards shall not hold them."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "radhpc" / "skipped"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state / f"{manifest.dataset}-{manifest.build_hash[:12]}.jsonl"
    lines = [json.dumps({"id": skip.id, **skip.shown()}) + "\n" for skip in skipped]
    write_atomically(path, "".join(lines).encode(), 0o600)
    return path


def _finish(
    output: BuildOutput,
    tasks: list[ShardTask],
    name: str,
    recipe: dict[str, Any],
    skipped: list[SkippedStudy],
    told: list[str],
) -> tuple[Manifest, dict[str, int]]:
    """Write what lies beside the shards, the manifest last. Returns it, and what was scrubbed from texts, by rule."""
    summary, named = Summary(), list[tuple[str, str]]()

    def records() -> Iterator[tuple[Split, ShardRecord]]:
        for task in tasks:
            done = read_record(task)
            assert done is not None, "a shard without a record"
            summary.add(done.summary)
            named.extend(done.attributions)
            yield task.plan.split, done

    reasons = Counter(skip.reason for skip in skipped)
    manifest, files = assemble(name, records(), recipe, recipe_hash(recipe), reasons)
    files[CARD] = render_card(manifest, summary, [skip.told() for skip in skipped], told).encode()
    files[SHEET] = contact_sheet(load_pictures(output.store, manifest, SampleIndex.from_bytes(files[INDEX])))
    if named:
        lines = [json.dumps({"key": key, "attribution": text}) + "\n" for key, text in named]
        files[ATTRIBUTION] = "".join(lines).encode()
    for file, data in files.items():
        output.store.write(file, data)
    output.store.write(MANIFEST, manifest.to_bytes())
    output.clean(manifest)
    return manifest, summary.scrubbed


def _place_listing(work: Path, digest: str) -> None:
    """Give the new listing its name; one of the same studies stays, as jobs of an earlier command may be reading it."""
    fresh, path = work / f"{LISTING}.new", work / LISTING
    if path.exists():
        with Listing(path) as earlier:
            if earlier.digest == digest:
                return
    fresh.replace(path)


def _overlaps(url: str, settings: BuildSettings) -> list[str]:
    """What to tell of images that stand in several splits, here and in the datasets to be apart from."""
    ours = duplicates.load(url)
    told = list(duplicates.leaks(ours))
    for theirs in settings.apart_from:
        for split, other, images, of in duplicates.overlaps(ours, duplicates.load(theirs)):
            told.append(f"{images} of {of} images in {split} are near-duplicates of images in {other} of {theirs}")
    return told
