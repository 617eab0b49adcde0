"""Builds a dataset: lists the studies, builds the shards in worker processes, checks them, writes the manifest.

    result = build("phantom", None, "runs/phantom", {"studies": "200"}, BuildSettings(), lambda done, total: None)

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
from radhpc.core.people import describe_incomparable
from radhpc.core.sample import Split
from shards import duplicates, people
from shards.execution.assembly import assemble
from shards.execution.output import ATTRIBUTION, BuildOutput
from shards.execution.pool import TaskRunner
from shards.execution.scheduler import ApartDatasets, BuildProgress, build_shards
from shards.execution.worker import LISTING, BuildContext, ShardRecord, ShardTask, read_record
from shards.images.encoding import EncodingSettings
from shards.listing import FORMAT, Listing, SkippedStudy
from shards.people import Pseudonyms
from shards.reports.card import CARD, render_card
from shards.reports.contact_sheet import (
    SHEET,
    SHOWN,
    SUSPECTS_SHEET,
    Suspect,
    contact_sheet,
    load_pictures,
    load_suspects,
)
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
    `run` builds the shards elsewhere than in processes on this machine, such as in a SLURM array.
    """
    started = time.monotonic()
    scrubbed: dict[str, int] = {}
    source = open_source(dataset, options or {})
    drop = source.duplicates(settings) == "drop"
    output = BuildOutput(out, settings.work)
    with output.locked():
        fresh = output.work / f"{LISTING}.new"
        messages = source.list_studies(raw, fresh, settings)
        with Listing(fresh) as listing:
            recipe = source.recipe(settings, listing)
            build_hash = recipe_hash(recipe)
            manifest = output.find_finished(recipe, build_hash, settings.force)
            reused, skipped = manifest is not None, list[SkippedStudy]()
            if manifest is None:
                _place_listing(output.work, listing.digest)
                images = EncodingSettings(settings.longest_side, settings.quality, settings.image_format)
                shard_hash = recipe_hash({key: value for key, value in recipe.items() if key != "files"})
                context = BuildContext(output.url, output.work, shard_hash, images, source.archive(raw))
                tasks = [ShardTask(plan, context) for plan in listing.plans]
                apart = ApartDatasets.load(settings.apart_from) if drop else None
                skipped = build_shards(tasks, listing, settings, progress, run, apart)
                table = listing.checksums.name if listing.checksums else None
                manifest, scrubbed = _finish(output, tasks, source.pseudonyms, recipe, skipped, messages, table)
                if output.changed_files:  # for the user; the card says what was built, not how
                    messages.append(
                        f"changed since the build began: {output.changed_files}; what it changes was built again"
                    )
            else:
                messages += [
                    f"{n} studies were left out when it was built: {why}" for why, n in manifest.skipped.items()
                ]
    if not drop:
        messages += _overlaps(out, settings)
    if settings.apart_from:
        messages += _compare_patients(out, settings, drop)
    return BuildResult(
        url=out,
        samples=manifest.samples,
        shards=len(manifest.shards),
        manifest_hash=manifest.hash,
        seconds=time.monotonic() - started,
        splits=manifest.splits,
        patients=manifest.patients,
        skipped=[skip.for_user() for skip in skipped],
        skipped_file=_write_skipped(manifest, skipped) if skipped else None,
        scrubbed=scrubbed,
        warnings=messages,
        reused=reused,
    )


def _write_skipped(manifest: Manifest, skipped: list[SkippedStudy]) -> Path:
    """List the studies left out, by their raw names, where only the user reads it: the shards must not hold them."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "radhpc" / "skipped"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state / f"{manifest.dataset}-{manifest.build_hash[:12]}.jsonl"
    lines = [json.dumps({"id": skip.id, **skip.for_user()}) + "\n" for skip in skipped]
    write_atomically(path, "".join(lines).encode(), 0o600)
    return path


def _finish(
    output: BuildOutput,
    tasks: list[ShardTask],
    pseudonyms: Pseudonyms,
    recipe: dict[str, Any],
    skipped: list[SkippedStudy],
    messages: list[str],
    checksums: str | None,
) -> tuple[Manifest, dict[str, int]]:
    """Write the files beside the shards, the manifest last. Returns it, and the words scrubbed from texts, by rule."""
    summary, attributions, suspects = Summary(), list[tuple[str, str]](), list[Suspect]()

    def records() -> Iterator[tuple[Split, ShardRecord]]:
        for task in tasks:
            record = read_record(task)
            assert record is not None, "a shard without a record"
            summary.add(record.summary)
            attributions.extend(record.attributions)
            suspects.extend(record.suspects)
            yield task.plan.split, record

    reasons = Counter(skip.reason for skip in skipped)
    manifest, files = assemble(pseudonyms, records(), recipe, recipe_hash(recipe), reasons, checksums)
    images, index = summary.total.images, SampleIndex.from_bytes(files[INDEX])
    if suspects:
        messages.append(
            f"{len(suspects)} of {images} images look as if text is written into them near an edge; nothing was "
            f"removed: look at {SUSPECTS_SHEET}, with {min(SHOWN, len(suspects))} of them, before you share the shards"
        )
        files[SUSPECTS_SHEET] = contact_sheet(load_suspects(output.store, manifest, index, suspects))
    files[CARD] = render_card(manifest, summary, [skip.public() for skip in skipped], messages).encode()
    files[SHEET] = contact_sheet(load_pictures(output.store, manifest, index))
    if attributions:
        lines = [json.dumps({"key": key, "attribution": text}) + "\n" for key, text in attributions]
        files[ATTRIBUTION] = "".join(lines).encode()
    for file, data in files.items():
        output.store.write(file, data)
    output.store.write(MANIFEST, manifest.to_bytes())
    output.clean(manifest)
    return manifest, summary.scrubbed


def _place_listing(work: Path, digest: str) -> None:
    """Name the new listing, unless one of the same studies is there: jobs of an earlier command may be reading it."""
    fresh, path = work / f"{LISTING}.new", work / LISTING
    if path.exists():
        with Listing(path) as earlier:
            if (earlier.digest, earlier.format) == (digest, FORMAT):
                return
    fresh.replace(path)


def _compare_patients(url: str, settings: BuildSettings, dropped: bool) -> list[str]:
    """Return messages on patients who are in other splits of the datasets to be apart from, or cannot be compared."""
    ours, others = people.load(url), [people.load(other) for other in settings.apart_from]
    messages = [message for theirs in others for message in people.overlaps(ours, theirs)]
    assert not (dropped and messages), "patients of other splits were left out"
    return [*messages, *filter(None, (describe_incomparable((ours, theirs) for theirs in others),))]


def _overlaps(url: str, settings: BuildSettings) -> list[str]:
    """Return messages on images that are in several splits, here and in the datasets to be apart from."""
    ours = duplicates.load(url)
    messages = list(duplicates.leaks(ours))
    for other_url in settings.apart_from:
        for split, other, images, total in duplicates.overlaps(ours, duplicates.load(other_url)):
            messages.append(
                f"{images} of {total} images in {split} are near-duplicates of images in {other} of {other_url}"
            )
    return messages
