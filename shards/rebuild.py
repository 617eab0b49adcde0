"""Builds shards again from the raw archive, as they were built, for `verify --repair` and `verify --raw`.

    for rebuilt in build_again(store, manifest, raw, manifest.shards, work, settings, progress):
        rebuilt.shard, rebuilt.record, rebuilt.path        # of the manifest; of the second build; where it lies
    faults = compare(url, raw, workers)                    # what in the shards is not what the archive gives

The studies that are in a shard decide which are built; near-duplicates and other datasets need not be looked at again.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest, SampleIndex, Shard
from radhpc.storage.store import Store
from shards.execution.pool import local_pool
from shards.execution.worker import LISTING, BuildContext, ShardRecord, ShardTask, read_record
from shards.images.encoding import EncodingSettings
from shards.listing import Listing
from shards.settings import BuildSettings
from shards.source import DatasetSource, open_source
from shards.verify import ShardFault

# The index knows which studies the first two left out, and the bytes tell whether files of another time are the same.
NOT_COMPARED = ("duplicates", "apart_from", "files")
Progress = Callable[[int, int], None]  # (studies done, studies in all)


class RebuiltShard(NamedTuple):
    """A shard that was built again."""

    shard: Shard  # as the manifest has it
    record: ShardRecord  # of the second build
    path: Path
    listing: Listing


def build_again(
    store: Store,
    manifest: Manifest,
    raw: Path | None,
    shards: Sequence[Shard],
    work: Path,
    settings: BuildSettings,
    progress: Progress,
) -> Iterator[RebuiltShard]:
    """Build shards into the private folder `work`, and yield each when it is done.

    Raises UserError where the archive's texts and tables, or anything else but its images, are not those of the build.
    """
    made = manifest.build
    source = open_source(made["reader"], {name: str(value) for name, value in made["options"].items()})
    index = manifest.load_index(store)
    names = {shard.name: number for number, shard in enumerate(manifest.shards)}
    by_name = {shard.name: shard for shard in shards}
    folder = work / "rebuilt"
    folder.mkdir(exist_ok=True)
    source.list_studies(raw, work / LISTING, settings)
    with Listing(work / LISTING) as listing:
        _refuse_changed_source(store.url, source, settings, listing, made)
        images = EncodingSettings(settings.longest_side, settings.quality, settings.image_format)
        context = BuildContext(str(folder), work, manifest.build_hash, images, source.archive(raw))
        tasks = []
        for plan in listing.plans:
            if plan.name in by_name:
                keys = index.key[index.shard == names[plan.name]].tolist()
                tasks.append(ShardTask(plan, context, frozenset(key.decode().rsplit("-", 1)[1] for key in keys)))
        assert len(tasks) == len(shards), "shards that the listing does not plan"
        total = sum(task.plan.samples for task in tasks)
        with local_pool(min(settings.processes, len(tasks))) as run:
            for task in run(tasks, lambda done: progress(done, total)):
                record = read_record(task)
                assert record is not None
                yield RebuiltShard(by_name[task.plan.name], record, folder / task.plan.name, listing)


def compare(
    url: str,
    raw: Path | None,
    workers: int | None = None,
    remove_names: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> list[ShardFault]:
    """Build every shard again, aside, and name each study that differs, by its own name in the archive.

    Equal bytes are equal pixels, as a build is reproducible. Raises UserError as build_again does.
    """
    store = Store(url)
    manifest = Manifest.load(store)
    index = manifest.load_index(store)
    settings = settings_of(manifest.build, workers, remove_names)
    faults: list[ShardFault] = []
    with tempfile.TemporaryDirectory(prefix="radhpc-verify-") as work:  # private: the listing has raw identifiers
        for rebuilt in build_again(store, manifest, raw, manifest.shards, Path(work), settings, progress):
            if rebuilt.record.shard != rebuilt.shard:
                faults += _differences(manifest, index, rebuilt)
            rebuilt.path.unlink(missing_ok=True)
    store.close()
    return sorted(faults, key=lambda fault: (fault.shard, fault.offset or 0))


def _differences(manifest: Manifest, index: SampleIndex, rebuilt: RebuiltShard) -> Iterator[ShardFault]:
    """Yield the studies of one shard that the archive gives otherwise, or not at all."""
    number = manifest.shards.index(rebuilt.shard)
    now = {
        f"{row.key}.{member.suffix}": (member.length, member.crc32c)
        for row in rebuilt.record.rows
        for member in row.members
    }
    reasons = {rebuilt.listing.key(study): reason for study, reason, _ in rebuilt.record.skipped}
    for row in (index.shard == number).nonzero()[0].tolist():
        key = index.key[row].decode()
        name = rebuilt.listing.name(key.rsplit("-", 1)[1])
        members = list(index.members(row))
        differing = [member for member in members if now.get(member.name) != (member.length, member.crc32c)]
        if not differing:
            continue
        if key in reasons:
            text = f"cannot be built from the archive any more ({reasons[key]})"
        elif any(not member.name.endswith(".json") for member in differing):
            text = "other pixels than in the archive"
        else:
            text = "another description than the archive gives"
        member = differing[-1]  # images come after the description, which holds their size and window
        yield ShardFault(rebuilt.shard.name, member.name, member.offset, f"{text}: {name}")


def settings_of(made: dict[str, Any], workers: int | None, remove_names: Path | None) -> BuildSettings:
    """Return the settings of a build from its manifest, which does not hold the names that were removed.

    Raises UserError where there were some and they are not given again.
    """
    if "names" in made and remove_names is None:
        raise UserError("--remove-names: the build was given a list of names; to build again needs the same one")
    return BuildSettings(
        workers=workers,
        longest_side=made["longest_side"],
        quality=made["quality"],
        image_format=made["image_format"],
        ratios=tuple(made["ratios"]),
        shard_samples=made["shard_samples"],
        unscrubbed="unscrubbed" in made,
        remove_names=remove_names,
        max_skipped="100%",  # which studies are in is known
    )


def _refuse_changed_source(
    url: str, source: DatasetSource, settings: BuildSettings, listing: Listing, made: dict[str, Any]
) -> None:
    """Raise UserError where the raw archive, or anything else that decides the bytes, has changed since the build."""
    recipe = json.loads(json.dumps(source.recipe(settings, listing)))
    differing = [key for key in made if key not in NOT_COMPARED and recipe.get(key) != made[key]]
    if differing:
        raise UserError(
            f"{url}: cannot be built again as it was (other {', '.join(differing)}); "
            "give the archive, the salt and the versions that it was built with, or build it again with --force"
        )
