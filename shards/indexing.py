"""The records of all shards -> the index and the manifest, with the proofs that the whole dataset holds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from radhpc.errors import UserError
from radhpc.manifest import INDEX, File, Index, Manifest, sha256
from radhpc.sample import SPLITS
from shards.listing import Plan
from shards.worker import Done


def assemble(
    name: str,
    plans: Sequence[Plan],
    records: Sequence[Done],
    recipe: dict[str, Any],
    build_hash: str,
    skipped: Mapping[str, int],
) -> tuple[Manifest, bytes]:
    """Return the manifest and the index's bytes. Raises UserError where there is no sample."""
    planned = {row.key: row for plan in plans for row in plan.rows}
    built = [record for record in records if record.shard]
    samples = [(number, row) for number, record in enumerate(built) for row in record.rows]
    if not samples:
        raise UserError(f"{name}: no study could be used")
    rows = [planned[sample.key] for _, sample in samples]
    parts = [member for _, sample in samples for member in sample.members]
    index = Index(
        key=np.array([sample.key for _, sample in samples], "S"),
        patient=np.array([row.patient for row in rows], "S"),
        split=np.array([SPLITS.index(row.split) for row in rows], np.uint8),
        shard=np.array([number for number, _ in samples], np.int32),
        first=np.cumsum([0, *(len(sample.members) for _, sample in samples)], dtype=np.int64),
        suffix=np.array([member.suffix for member in parts], "S"),
        offset=np.array([member.offset for member in parts], np.int64),
        length=np.array([member.length for member in parts], np.int64),
        crc32c=np.array([member.crc32c for member in parts], np.uint32),
    )
    split_of: dict[str, str] = {}
    for row in rows:
        assert split_of.setdefault(row.patient, row.split) == row.split, "a patient in two splits"
    assert len(set(planned)) == sum(len(plan.rows) for plan in plans), "a key twice"
    data = index.to_bytes()
    of_samples, of_patients = Counter(row.split for row in rows), Counter(split_of.values())
    manifest = Manifest(
        dataset=name,
        samples=len(samples),
        splits={split: of_samples[split] for split in SPLITS},
        patients={split: of_patients[split] for split in SPLITS},
        shards=tuple(record.shard for record in built if record.shard),
        index=File(name=INDEX, size=len(data), sha256=sha256(data)),
        build=recipe,
        build_hash=build_hash,
        skipped=dict(sorted(skipped.items())),
    )
    return manifest, data
