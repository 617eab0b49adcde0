"""Verifies shards against their manifest, and names every fault with shard, member and offset.

    report = verify("/data/padchest", lambda done, total: None)
    report.ok, report.faults        # False, [ShardFault(shard="train-000003.tar", member="...", offset=..., fault=...)]

The index is checked against the manifest, each tar against the index, each description against both and the privacy
gate, and the patients and images of all splits against each other. Of a subset, such as <url>#balanced, its rows are
compared with those of the full index, after the full dataset was verified.
"""

import hashlib
import itertools
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from awscrt.checksums import crc32c
from pydantic import ValidationError

from radhpc.core.errors import UserError, first_line
from radhpc.core.manifest import FINGERPRINTS, MANIFEST, Manifest, Member, SampleIndex, Shard
from radhpc.core.people import describe_incomparable
from radhpc.core.sample import SPLITS, Sample
from radhpc.storage.store import NoRegularFile, Store
from shards import duplicates, people
from shards.text import deidentification

Progress = Callable[[int, int], None]  # (samples done, samples in all)
BEGINNINGS = {"jpg": (b"\xff\xd8\xff",), "png": (b"\x89PNG\r\n\x1a\n",), "jxl": (b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")}
BLOCK = tarfile.BLOCKSIZE  # bytes: headers and data start at multiples of it
CHUNK = 16 << 20  # bytes read at a time for the checksum of a shard


@dataclass(frozen=True)
class ShardFault:
    """A fault and its place: `shard` is a file beside the manifest, `offset` a byte in it."""

    shard: str
    member: str | None
    offset: int | None
    fault: str


@dataclass(frozen=True)
class VerificationReport:
    """The outcome of verifying one dataset or several."""

    url: str
    shards: int
    samples: int
    faults: list[ShardFault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(url: str, progress: Progress = lambda done, total: None) -> VerificationReport:
    """Reread every shard. Raises UserError where there is no manifest, or it cannot be read at all."""
    store = Store(url)
    if store.subset is not None:
        subset = Manifest.load(store)
        report = verify(store.url, progress)
        faults = [*report.faults, *_check_subset(store, subset)]
        return VerificationReport(url, report.shards, subset.samples, faults)
    manifest = Manifest.load(store)
    try:
        index = manifest.load_index(store)
    except UserError as error:
        faults = [ShardFault(manifest.index.name, None, None, first_line(error))]
        for shard in manifest.shards:
            faults += _check_file(store, shard)
        return VerificationReport(url, len(manifest.shards), manifest.samples, faults)
    faults = [*_check_counts(manifest, index), *_check_fingerprints(store, manifest, index)]
    of_shard = [np.flatnonzero(index.shard == number) for number in range(len(manifest.shards))]
    done = 0
    for number, samples in enumerate(of_shard):
        faults += _check_shard(store, manifest, index, number, samples.tolist())
        done += len(samples)
        progress(done, len(index))
    store.close()
    return VerificationReport(url, len(manifest.shards), len(index), faults)


def verify_all(urls: Sequence[str], progress: Progress = lambda done, total: None) -> VerificationReport:
    """Verify several datasets, each by itself and against the others. The faults then name URL/shard."""
    reports = [verify(url, progress) for url in urls]
    if len(reports) == 1:
        return reports[0]
    faults = [replace(fault, shard=f"{report.url}/{fault.shard}") for report in reports for fault in report.faults]
    for url, other in itertools.combinations(urls, 2):
        faults += [replace(fault, shard=f"{url}/{fault.shard}") for fault in verify_apart(url, other)]
    loaded = [people.load(url) for url in urls]
    for ours, theirs in itertools.combinations(loaded, 2):
        name = f"{ours.url}/{ours.manifest.index.name}"
        faults += [ShardFault(name, None, None, text) for text in people.overlaps(ours, theirs)]
    warning = describe_incomparable(itertools.combinations(loaded, 2))
    samples, shards = sum(report.samples for report in reports), sum(report.shards for report in reports)
    return VerificationReport(", ".join(urls), shards, samples, faults, [warning] if warning else [])


def verify_apart(url: str, other: str) -> list[ShardFault]:
    """Find near-duplicate images in different splits of two datasets: training on both would leak."""
    overlaps = duplicates.overlaps(duplicates.load(url), duplicates.load(other), duplicates.DIFFERENT_SPLITS)
    texts = [
        f"{n} of {total} images in {split} nearly repeat images in {theirs} of {other}"
        for split, theirs, n, total in overlaps
    ]
    return [ShardFault(FINGERPRINTS, None, None, text) for text in texts]


def _check_fingerprints(store: Store, manifest: Manifest, index: SampleIndex) -> Iterator[ShardFault]:
    """Check that no image is in two splits, unless the build was asked to keep such images."""
    if manifest.fingerprints is None:
        return
    try:
        images = duplicates.hashes_of(store, manifest, index)
    except UserError as error:
        yield ShardFault(FINGERPRINTS, None, None, first_line(error))
        return
    if manifest.build.get("duplicates") == "drop":
        yield from (ShardFault(FINGERPRINTS, None, None, text) for text in duplicates.leaks(images))


def _check_counts(manifest: Manifest, index: SampleIndex) -> Iterator[ShardFault]:
    """Check the manifest's counts, and what the index alone proves."""

    def fault(text: str) -> ShardFault:
        return ShardFault(MANIFEST, None, None, text)

    keys = index.key.tolist()
    if len(keys) != manifest.samples:
        yield fault(f"{manifest.samples} samples, but the index has {len(keys)}")
    for key, count in Counter(keys).items():
        if count > 1:
            yield fault(f"key {key.decode()} occurs {count} times")
    split_of = _splits_by(index.patient, index.split)
    people_of = {} if index.person is None else _splits_by(index.person, index.split)
    for patient, places in itertools.chain(split_of.items(), people_of.items()):
        if len(places) > 1:
            yield fault(f"patient {patient.decode()} is in {' and '.join(SPLITS[n] for n in sorted(places))}")
    samples = {split: int((index.split == n).sum()) for n, split in enumerate(SPLITS)}
    if {split: manifest.splits.get(split, 0) for split in SPLITS} != samples:
        yield fault(f"splits of {manifest.splits} samples, but the index has {samples}")
    patients = {split: sum(n in places for places in split_of.values()) for n, split in enumerate(SPLITS)}
    if {split: manifest.patients.get(split, 0) for split in SPLITS} != patients:
        yield fault(f"splits of {manifest.patients} patients, but the index has {patients}")
    for number, shard in enumerate(manifest.shards):
        held = int((index.shard == number).sum())
        if held != shard.samples and manifest.subset_of is None:
            yield fault(f"{shard.name}: {shard.samples} samples, but the index has {held}")


def _splits_by(patients: npt.NDArray[np.bytes_], split: npt.NDArray[np.uint8]) -> dict[bytes, set[int]]:
    """Return the splits of each patient."""
    split_of: dict[bytes, set[int]] = {}
    for patient, place in zip(patients.tolist(), split.tolist(), strict=True):
        split_of.setdefault(patient, set()).add(place)
    return split_of


def _check_subset(store: Store, manifest: Manifest) -> Iterator[ShardFault]:
    """Check a subset's counts, and its rows against the full index: the same samples, offsets and order."""
    name = f"{store.subset}.json"
    all_samples = Store(store.url)
    try:
        index = manifest.load_index(store)
        full = Manifest.load(all_samples)
        full_index = full.load_index(all_samples)
    except UserError as error:
        yield ShardFault(manifest.index.name, None, None, first_line(error))
        return
    if manifest.shards != full.shards:
        yield ShardFault(name, None, None, f"names other shards than {MANIFEST}")
    for fault in _check_counts(manifest, index):
        yield ShardFault(name, fault.member, fault.offset, fault.fault)
    row_of = {key: row for row, key in enumerate(full_index.key.tolist())}
    before = -1
    for row, key in enumerate(index.key.tolist()):
        full_row = row_of.get(key)
        if full_row is None:
            yield ShardFault(manifest.index.name, None, None, f"{key.decode()}: not in {full.index.name}")
            continue
        same = all(
            getattr(index, column)[row] == getattr(full_index, column)[full_row]
            for column in ("patient", "people", "split")
        )
        if not same or list(index.members(row)) != list(full_index.members(full_row)):
            yield ShardFault(manifest.index.name, None, None, f"{key.decode()}: another row than in {full.index.name}")
        if full_row < before:
            yield ShardFault(manifest.index.name, None, None, f"{key.decode()}: not in the order of {full.index.name}")
        before = full_row
    for split in SPLITS:
        missing = len(full_index.of_split(split)) - len(index.of_split(split))
        if split != "train" and missing:
            yield ShardFault(manifest.index.name, None, None, f"{missing} samples of split '{split}' are missing")


def _check_shard(
    store: Store, manifest: Manifest, index: SampleIndex, number: int, samples: list[int]
) -> Iterator[ShardFault]:
    """Check one tar: its size and checksum, then each member, then the bytes between and after them."""
    shard = manifest.shards[number]
    yield from _check_file(store, shard)
    size, end = _size(store, shard), 0
    if isinstance(size, ShardFault):
        return
    for sample in samples:
        for member in index.members(sample):
            yield from _check_member(store, manifest, index, sample, member, end)
            end = member.offset + member.length + -member.length % BLOCK
    if size - end < 2 * BLOCK or any(chunk.strip(b"\0") for chunk in _chunks(store, shard, end, size)):
        yield ShardFault(shard.name, None, end, "the tar does not end where the index says")


def _check_file(store: Store, shard: Shard) -> Iterator[ShardFault]:
    """Check the size and the checksum of one tar."""
    size = _size(store, shard)
    if isinstance(size, ShardFault):
        yield size
        return
    if size != shard.size:
        yield ShardFault(shard.name, None, min(size, shard.size), f"{size} bytes, but the manifest says {shard.size}")
    if size > shard.size or _digest(store, shard, size) != shard.sha256:  # of a larger one it says nothing more
        yield ShardFault(shard.name, None, None, "sha256 differs from the manifest's")


def _check_member(
    store: Store, manifest: Manifest, index: SampleIndex, sample: int, member: Member, end: int
) -> Iterator[ShardFault]:
    """Check one file in a tar; `end` is the end of the one before it, where its header must start."""
    name = manifest.shards[member.shard].name

    def fault(text: str, offset: int = member.offset) -> ShardFault:
        return ShardFault(name, member.name, offset, text)

    if member.offset - BLOCK != end:
        yield fault(f"lies at {member.offset}, but the member before it ends at {end}", end)
    data = store.read_range(name, member.offset - BLOCK, BLOCK + member.length)
    header, data = data[:BLOCK], data[BLOCK:]
    try:
        entry = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        if (entry.name, entry.size) != (member.name, member.length):
            yield fault(f"the tar has {entry.name} of {entry.size} bytes here", member.offset - BLOCK)
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        yield fault(f"no tar header ({first_line(error)})", member.offset - BLOCK)
    if len(data) < member.length:
        yield fault(f"cut after {len(data)} of {member.length} bytes")
        return
    if crc32c(data) != member.crc32c:
        yield fault("crc32c differs from the index's")
    if member.name.endswith(".json"):
        yield from (fault(text) for text in _check_description(data, index, sample))
    elif (suffix := member.name.rsplit(".", 1)[1]) not in BEGINNINGS:
        yield fault(f"neither a description nor {', '.join(BEGINNINGS)}")
    elif not data.startswith(BEGINNINGS[suffix]):
        yield fault(f"no {suffix.upper()}")


def _check_description(data: bytes, index: SampleIndex, sample: int) -> Iterator[str]:
    """Check that the JSON of a sample is valid and agrees with the index."""
    try:
        described = Sample.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        yield f"description: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        return
    yield from (f"description: {finding}" for finding in deidentification.remaining_identifiers(described))
    images = int(index.first[sample + 1] - index.first[sample]) - 1
    pairs = {
        "key": (described.key, index.key[sample].decode()),
        "patient": (described.patient, index.patient[sample].decode()),
        "person": (described.person or described.patient, index.people[sample].decode()),
        "split": (described.split, SPLITS[index.split[sample]]),
        "number of images": (len(described.images), images),
    }
    for name, (described_value, indexed_value) in pairs.items():
        if described_value != indexed_value:
            yield f"description: {name} is {described_value}, but the index says {indexed_value}"


def _size(store: Store, shard: Shard) -> int | ShardFault:
    """Return the size of a tar, or why there is none."""
    try:
        return store.size(shard.name)
    except FileNotFoundError:
        return ShardFault(shard.name, None, None, "missing")
    except NoRegularFile:
        return ShardFault(shard.name, None, None, "no regular file")


def _digest(store: Store, shard: Shard, size: int) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(store, shard, 0, size):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(store: Store, shard: Shard, start: int, size: int) -> Iterator[bytes]:
    """Yield the bytes from `start`, but none behind the size in the manifest: a sparse file may be endless."""
    stop = min(size, shard.size)
    for offset in range(start, stop, CHUNK):
        yield store.read_range(shard.name, offset, min(CHUNK, stop - offset))
