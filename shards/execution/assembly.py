"""Assembles the records of all shards into the index and the manifest, and asserts what must hold for all of them."""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from radhpc.core.errors import UserError
from radhpc.core.manifest import FINGERPRINTS, INDEX, FileEntry, Manifest, SampleIndex, Shard, SourceChecksums, sha256
from radhpc.core.sample import SPLITS, Split
from shards.execution.worker import ShardRecord
from shards.execution.writer import SampleRow
from shards.people import Pseudonyms


def assemble(
    pseudonyms: Pseudonyms,
    records: Iterable[tuple[Split, ShardRecord]],
    recipe: dict[str, Any],
    build_hash: str,
    skipped: Mapping[str, int],
    checksums: str | None = None,
) -> tuple[Manifest, dict[str, bytes]]:
    """Return the manifest and the files it names, with one record at a time in memory.

    `checksums` is the name of the archive's own table of checksums.

    Raises UserError where no sample is left.
    """
    shards: list[Shard] = []
    parts: list[SampleIndex] = []
    fingerprints: list[npt.NDArray[np.uint8]] = []
    checked = unchecked = 0
    for split, record in records:
        checked, unchecked = checked + record.checked, unchecked + record.unchecked
        if record.shard:
            parts.append(index_of_shard(record.rows, record.patients, split, len(shards), record.people))
            shards.append(record.shard)
            fingerprints.append(fingerprints_of(record))
    if not parts:
        raise UserError(f"{pseudonyms.name}: no study could be used")
    index = concatenate(parts)
    _assert_invariants(index)
    files = {INDEX: index.to_bytes(), FINGERPRINTS: npy_bytes(np.concatenate(fingerprints))}
    of_split = {split: index.patient[index.split == n] for n, split in enumerate(SPLITS)}
    manifest = Manifest(
        dataset=pseudonyms.name,
        people=pseudonyms.people,
        checksums=None if checksums is None else SourceChecksums(file=checksums, checked=checked, unchecked=unchecked),
        gate="unscrubbed" if recipe.get("unscrubbed") else "scrubbed",
        samples=len(index),
        splits={split: len(patients) for split, patients in of_split.items()},
        patients={split: len(np.unique(patients)) for split, patients in of_split.items()},
        shards=tuple(shards),
        index=_file_entry(INDEX, files[INDEX]),
        fingerprints=_file_entry(FINGERPRINTS, files[FINGERPRINTS]),
        build=recipe,
        build_hash=build_hash,
        skipped=dict(sorted(skipped.items())),
    )
    return manifest, files


def fingerprints_of(record: ShardRecord) -> npt.NDArray[np.uint8]:
    """Return the perceptual hashes of a shard's images: (images, 32)."""
    return np.frombuffer(bytes.fromhex("".join(record.fingerprints)), np.uint8).reshape(-1, 32)


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """Return the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _file_entry(name: str, data: bytes) -> FileEntry:
    return FileEntry(name=name, size=len(data), sha256=sha256(data))


def index_of_shard(
    rows: Sequence[SampleRow], patients: Sequence[str], split: Split, shard: int, people: Sequence[str] | None = None
) -> SampleIndex:
    """Return the index of one shard: its number is `shard`; `people` are the patients' hashes in their namespace."""
    members = [member for row in rows for member in row.members]
    return SampleIndex(
        key=np.array([row.key for row in rows], "S"),
        patient=np.array(patients, "S"),
        split=np.full(len(rows), SPLITS.index(split), np.uint8),
        shard=np.full(len(rows), shard, np.int32),
        first=np.cumsum([0, *(len(row.members) for row in rows)], dtype=np.int64),
        suffix=np.array([member.suffix for member in members], "S"),
        offset=np.array([member.offset for member in members], np.int64),
        length=np.array([member.length for member in members], np.int64),
        crc32c=np.array([member.crc32c for member in members], np.uint32),
        person=None if people is None else np.array(people, "S"),
    )


def concatenate(parts: list[SampleIndex]) -> SampleIndex:
    """Concatenate the indexes of all shards. The hashes in the namespace go where they are the patients' own."""
    ends = np.cumsum([0, *(part.first[-1] for part in parts)])
    first = [part.first[:-1] + end for part, end in zip(parts, ends[:-1], strict=True)]
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in SampleIndex.__dataclass_fields__
        if name not in ("first", "person")
    }
    people = np.concatenate([part.people for part in parts])
    person = None if np.array_equal(people, columns["patient"]) else people
    return SampleIndex(first=np.concatenate([*first, ends[-1:]]), person=person, **columns)


def _assert_invariants(index: SampleIndex) -> None:
    """Assert in the written index what the listing guarantees: unique keys, and one split for each patient."""
    assert len(np.unique(index.key)) == len(index), "a key twice"
    pairs = np.unique(np.rec.fromarrays([index.patient, index.split]))
    twice = [patient for patient, count in Counter(pairs["f0"].tolist()).items() if count > 1]
    assert not twice, "a patient in two splits"
