"""Repairs shards whose faults `verify` has found: rebuilds what is broken from the raw archive, to the same bytes.

    report = verify(url)
    mended = repair(url, Path("/data/padchest"), report, workers=4)        # ["train-000003.tar"]

The manifest decides: a rebuilt shard counts only if its sha256 is the one that the manifest names. The index is
restored from intact shards; the fingerprints come from raw images, so losing them costs a complete build.
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from awscrt.checksums import crc32c

from radhpc.core.errors import UserError
from radhpc.core.manifest import FINGERPRINTS, INDEX, MANIFEST, Manifest, SampleIndex, Shard, sha256
from radhpc.core.sample import Sample, Split
from radhpc.storage.store import Store
from shards.execution.assembly import concatenate, fingerprints_of, index_of_shard, npy_bytes
from shards.execution.output import BuildOutput
from shards.execution.pool import local_pool
from shards.execution.worker import LISTING, BuildContext, ShardTask, read_record
from shards.execution.writer import MemberRow, SampleRow
from shards.images.encoding import EncodingSettings
from shards.listing import Listing
from shards.settings import BuildSettings
from shards.source import DatasetSource, open_source
from shards.verify import VerificationReport

NOT_COMPARED = ("duplicates", "apart_from")  # the index knows which studies they left out


def repair(
    url: str,
    raw: Path | None,
    report: VerificationReport,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    remove_names: Path | None = None,
) -> list[str]:
    """Return the names of the files that were repaired. Raises UserError for what cannot be repaired."""
    store = Store(url)
    manifest = Manifest.load(store)
    bad = {fault.shard for fault in report.faults}
    if MANIFEST in bad:
        raise UserError(f"{url}/{MANIFEST}: does not fit the files beside it; build it again with --force")
    broken = [shard for shard in manifest.shards if shard.name in bad]
    mended = []
    if INDEX in bad:
        if broken:
            raise UserError(f"{url}: {INDEX} and {broken[0].name} are both damaged; build it again with --force")
        store.write(INDEX, _rebuild_index(store, manifest))
        mended.append(INDEX)
    if broken or FINGERPRINTS in bad:
        mended += _rebuild(
            store,
            manifest,
            raw,
            broken,
            FINGERPRINTS in bad,
            _settings(manifest.build, workers, remove_names),
            progress,
        )
    return mended


def _rebuild(
    store: Store,
    manifest: Manifest,
    raw: Path | None,
    broken: list[Shard],
    fingerprints: bool,
    settings: BuildSettings,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Build shards in the work folder, and upload those that match the manifest."""
    made = manifest.build
    source = open_source(made["reader"], {name: str(value) for name, value in made["options"].items()})
    index = manifest.load_index(store)
    to_build = list(manifest.shards) if fingerprints else broken
    output = BuildOutput(store.url)
    names = {shard.name: number for number, shard in enumerate(manifest.shards)}
    with output.locked():
        source.list_studies(raw, output.work / LISTING, settings)
        with Listing(output.work / LISTING) as listing:
            _refuse_changed_source(store.url, source, settings, listing, made)
            rebuilt = output.work / "rebuilt"
            rebuilt.mkdir(exist_ok=True)
            images = EncodingSettings(settings.longest_side, settings.quality, settings.image_format)
            context = BuildContext(str(rebuilt), output.work, manifest.build_hash, images, source.archive(raw))
            tasks = []
            for plan in listing.plans:
                if any(shard.name == plan.name for shard in to_build):
                    keys = index.key[index.shard == names[plan.name]].tolist()
                    tasks.append(ShardTask(plan, context, frozenset(key.decode().rsplit("-", 1)[1] for key in keys)))
            assert len(tasks) == len(to_build), "shards that the listing does not plan"
            total = sum(task.plan.samples for task in tasks)
            with local_pool(min(settings.processes, len(tasks))) as run:
                for _ in run(tasks, lambda done: progress(done, total)):
                    pass
        hashes = []
        for task, shard in zip(tasks, to_build, strict=True):
            record = read_record(task)
            assert record is not None
            if record.shard != shard:
                raise UserError(
                    f"{store.url}/{shard.name}: built again, it has other bytes than {MANIFEST} says; "
                    "the raw images have changed since: build all with --force"
                )
            hashes.append(fingerprints_of(record))
        if fingerprints:
            store.write(FINGERPRINTS, npy_bytes(np.concatenate(hashes)))
        for shard in broken:
            store.upload(rebuilt / shard.name, shard.name)
    return [*([FINGERPRINTS] if fingerprints else []), *(shard.name for shard in broken)]


def _settings(made: dict[str, Any], workers: int | None, remove_names: Path | None) -> BuildSettings:
    """Return the settings of a build from its manifest, which does not hold the names that were removed.

    Raises UserError where there were some and they are not given again.
    """
    if "names" in made and remove_names is None:
        raise UserError("--remove-names: the build was given a list of names; --repair needs the same one")
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


def _rebuild_index(store: Store, manifest: Manifest) -> bytes:
    """Rebuild the index from the shards."""
    parts: list[SampleIndex] = []
    for number, shard in enumerate(manifest.shards):
        data = store.read(shard.name)
        assert sha256(data) == shard.sha256, "verify found this shard intact"
        rows: dict[str, list[MemberRow]] = {}
        patients: list[str] = []
        people: list[str] = []
        split: Split = "train"
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                content = data[member.offset_data : member.offset_data + member.size]
                if suffix == "json":
                    sample = Sample.model_validate_json(content)
                    patients.append(sample.patient)
                    people.append(sample.person or sample.patient)
                    split = sample.split
                checksum = crc32c(content)
                rows.setdefault(key, []).append(MemberRow(suffix, member.offset_data, member.size, checksum))
        sample_rows = [SampleRow(key, tuple(members)) for key, members in rows.items()]
        parts.append(index_of_shard(sample_rows, patients, split, number, people))
    data = concatenate(parts).to_bytes()
    assert sha256(data) == manifest.index.sha256, "the index of intact shards is the one that was written"
    return data
