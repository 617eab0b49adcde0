"""Describe shards: the manifest lists them, and its index says where each member of each sample lies, to the byte.

Two files beside the shards. `index.npz` holds one row per sample and one per member as plain numpy columns;
`manifest.json` holds the counts, the shards with their sha256, and the sha256 of the index. It is written
last, so a folder with a manifest is a whole dataset. Example:

    manifest = Manifest.load(store)                   # a few kilobytes
    index = manifest.load_index(store)                # the columns, checked against the manifest
    for member in index.members(7): ...               # the eighth sample: shard, offset, length, crc32c

A subset, such as <url>#balanced, is a second pair beside them: `balanced.json` and `balanced.npz` hold some of the
samples of the same shards, and `subset_of` names the manifest that they were taken from. See shards/balance/.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radhpc.core import formats
from radhpc.core.errors import UserError, first_line
from radhpc.core.sample import SPLITS

MANIFEST = "manifest.json"
INDEX = "index.npz"
FINGERPRINTS = "fingerprints.npy"
_QUESTIONS = 16  # to a store at a time


class ManifestStore(Protocol):
    """The part of storage.store.Store that the manifest uses."""

    url: str
    subset: str | None

    def read(self, name: str) -> bytes: ...

    def size(self, name: str) -> int: ...


class FileEntry(BaseModel):
    """A file beside the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Shard(FileEntry):
    """One tar of samples."""

    samples: int = Field(gt=0)


@dataclass(frozen=True)
class Member:
    """One file inside a tar: `length` bytes from `offset`, with the checksum crc32c (Castagnoli)."""

    shard: int
    name: str
    offset: int
    length: int
    crc32c: int


@dataclass(frozen=True)
class SampleIndex:
    """Columns over samples (n) and over members (m); the members of a sample stand together."""

    key: npt.NDArray[np.bytes_]  # (n,)
    patient: npt.NDArray[np.bytes_]  # (n,) salted hash
    split: npt.NDArray[np.uint8]  # (n,) position in radhpc.core.sample.SPLITS
    shard: npt.NDArray[np.int32]  # (n,)
    first: npt.NDArray[np.int64]  # (n + 1,) members first[i] to first[i + 1] belong to sample i
    suffix: npt.NDArray[np.bytes_]  # (m,) "json", "0.jpg", "1.jpg", ...: a member's name is <key>.<suffix>
    offset: npt.NDArray[np.int64]  # (m,) of the data, behind the tar header
    length: npt.NDArray[np.int64]  # (m,)
    crc32c: npt.NDArray[np.uint32]  # (m,)

    def __len__(self) -> int:
        return len(self.key)

    def members(self, sample: int) -> Iterator[Member]:
        """Yield the members of one sample, in the order of the tar."""
        key, shard = self.key[sample].decode(), int(self.shard[sample])
        for m in range(int(self.first[sample]), int(self.first[sample + 1])):
            yield Member(
                shard,
                f"{key}.{self.suffix[m].decode()}",
                int(self.offset[m]),
                int(self.length[m]),
                int(self.crc32c[m]),
            )

    def of_split(self, split: str) -> npt.NDArray[np.int64]:
        """Return the positions of a split's samples, ascending."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def take(self, rows: npt.NDArray[np.int64]) -> "SampleIndex":
        """Return the index of some of the samples, in the order of `rows`."""
        counts = np.diff(self.first)[rows]
        ends = np.cumsum(counts)
        members = np.repeat(self.first[rows] - (ends - counts), counts) + np.arange(counts.sum())
        return SampleIndex(
            key=self.key[rows],
            patient=self.patient[rows],
            split=self.split[rows],
            shard=self.shard[rows],
            first=np.concatenate([np.zeros(1, np.int64), ends]),
            suffix=self.suffix[members],
            offset=self.offset[members],
            length=self.length[members],
            crc32c=self.crc32c[members],
        )

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **self.__dict__)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SampleIndex":
        with np.load(io.BytesIO(data), allow_pickle=False) as columns:
            return cls(**{name: columns[name] for name in cls.__dataclass_fields__})


class Manifest(BaseModel):
    """The content of `manifest.json`, or of a subset's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = formats.MANIFEST
    dataset: str
    samples: int = Field(gt=0)
    splits: dict[str, int] = Field(description="samples per split")
    patients: dict[str, int] = Field(description="patients per split")
    shards: tuple[Shard, ...] = Field(min_length=1)
    index: FileEntry
    build: dict[str, Any] = Field(description="how it was built: reader, image and split settings, versions")
    build_hash: str = Field(description="sha256 of `build`, to tell one build from another")
    skipped: dict[str, int] = Field(default_factory=dict, description="samples left out, by reason")
    fingerprints: FileEntry | None = Field(
        default=None, description="perceptual hashes, a row of 32 bytes for each image"
    )
    subset_of: str | None = Field(default=None, description="of a subset: the hash of the manifest it was taken from")

    def to_bytes(self) -> bytes:
        whole = {"subset_of"} if self.subset_of is None else set()
        return (json.dumps(self.model_dump(exclude=whole), indent=1, sort_keys=True) + "\n").encode()

    @property
    def hash(self) -> str:
        """Return the identity of the data: equal hashes mean equal bytes of every shard."""
        return sha256(self.to_bytes())

    @classmethod
    def load(cls, store: ManifestStore) -> "Manifest":
        """Read and validate the manifest of all samples, or of the store's subset.

        Raises UserError where there is none, where it is not one of ours, and where the shards that a subset was
        taken from were built anew since.
        """
        whole = cls._read(
            store, MANIFEST, f"no {MANIFEST} there; shards are made by 'radhpc build', which writes it last"
        )
        if store.subset is None:
            if whole.subset_of is not None:
                raise UserError(f"{store.url}/{MANIFEST}: subset_of: the manifest of all samples is a subset of none")
            return whole
        name = _file(store)
        subset = cls._read(store, name, f"no subset '{store.subset}' there ({name}); allowed is the URL without it")
        if subset.subset_of != whole.hash:
            raise UserError(
                f"{store.url}/{name}: subset_of: the shards were built anew since; make '{store.subset}' again"
            )
        return subset

    @classmethod
    def _read(cls, store: ManifestStore, name: str, missing: str) -> "Manifest":
        try:
            return cls.model_validate_json(store.read(name))
        except FileNotFoundError as error:
            raise UserError(f"{store.url}: {missing}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the file"
            raise UserError(f"{store.url}/{name}: {where}: {problem['msg']}") from error

    def load_index(self, store: ManifestStore) -> SampleIndex:
        """Read the columns and check them against the manifest."""
        data = self._read_file(store, self.index)
        try:
            return SampleIndex.from_bytes(data)
        except (ValueError, KeyError) as error:
            raise UserError(f"{store.url}/{self.index.name}: {first_line(error)}") from error

    def load_fingerprints(self, store: ManifestStore) -> npt.NDArray[np.uint8]:
        """Read the perceptual hashes of all images, (images, 32), in the order of the index; check their sha256."""
        assert self.fingerprints is not None, "shards without fingerprints"
        return np.asarray(np.load(io.BytesIO(self._read_file(store, self.fingerprints)), allow_pickle=False))

    def _read_file(self, store: ManifestStore, file: FileEntry) -> bytes:
        try:
            data = store.read(file.name)
        except FileNotFoundError as error:
            raise UserError(f"{store.url}/{file.name}: missing, but {_file(store)} names it") from error
        if sha256(data) != file.sha256:
            raise UserError(f"{store.url}/{file.name}: does not match {_file(store)} (sha256 differs)")
        return data

    def check_sizes(self, store: ManifestStore) -> None:
        """Compare each shard's size with the manifest: seconds for thousands of shards, before any is read."""

        def check(shard: Shard) -> None:
            try:
                size = store.size(shard.name)
            except FileNotFoundError as error:
                raise UserError(f"{store.url}/{shard.name}: missing, but {MANIFEST} names it") from error
            if size != shard.size:
                raise UserError(
                    f"{store.url}/{shard.name}: {size} bytes, but {MANIFEST} says {shard.size}; "
                    "the shard was cut or replaced: build it again"
                )

        with ThreadPoolExecutor(_QUESTIONS) as pool:
            for _ in pool.map(check, self.shards):
                pass


def _file(store: ManifestStore) -> str:
    return MANIFEST if store.subset is None else f"{store.subset}.json"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
