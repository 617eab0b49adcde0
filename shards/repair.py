"""Repairs shards whose faults `verify` has found: rebuilds what is broken from the raw archive, to the same bytes.

    report = verify(url)
    mended = repair(url, Path("/data/padchest"), report, workers=4)        # ["train-000003.tar"]

The manifest decides: a rebuilt shard counts only if its sha256 is the one that the manifest names. The index is
restored from intact shards; the fingerprints come from raw images, so losing them costs a complete build.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from awscrt.checksums import crc32c

from radhpc.core.errors import UserError
from radhpc.core.manifest import FINGERPRINTS, INDEX, MANIFEST, Manifest, SampleIndex, Shard, sha256
from radhpc.core.sample import Sample, Split
from radhpc.storage.store import Store
from shards.execution.assembly import concatenate, fingerprints_of, index_of_shard, npy_bytes
from shards.execution.output import BuildOutput
from shards.execution.writer import MemberRow, SampleRow
from shards.rebuild import build_again, settings_of
from shards.settings import BuildSettings
from shards.verify import VerificationReport


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
            settings_of(manifest.build, workers, remove_names),
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
    output = BuildOutput(store.url)
    with output.locked():
        to_build = list(manifest.shards) if fingerprints else broken
        again = build_again(store, manifest, raw, to_build, output.work, settings, progress)
        rebuilt = {part.shard.name: part for part in again}
        hashes = []
        for shard in to_build:
            if rebuilt[shard.name].record.shard != shard:
                raise UserError(
                    f"{store.url}/{shard.name}: built again, it has other bytes than {MANIFEST} says; "
                    "the raw images have changed since: build all with --force"
                )
            hashes.append(fingerprints_of(rebuilt[shard.name].record))
        if fingerprints:
            store.write(FINGERPRINTS, npy_bytes(np.concatenate(hashes)))
        for shard in broken:
            store.upload(rebuilt[shard.name].path, shard.name)
    return [*([FINGERPRINTS] if fingerprints else []), *(shard.name for shard in broken)]


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
