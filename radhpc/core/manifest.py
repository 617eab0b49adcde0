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
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from radhpc.core import formats
from radhpc.core.errors import UserError, first_line
from radhpc.core.sample import SPLITS, optional
from radhpc.core.untrusted import load_array, load_columns, parse_json, printable

MANIFEST = "manifest.json"
INDEX = "index.npz"
FINGERPRINTS = "fingerprints.npy"
_QUESTIONS = 16  # to a store at a time
# Far above what is ever written, far below what a hostile file would take of the memory before it is refused.
MAX_MANIFEST = 1 << 26  # bytes
MAX_SIDE_FILE = 1 << 32  # bytes of the index, and of the perceptual hashes
MAX_MEMBER = 1 << 30  # bytes
MAX_COUNT = 1 << 40  # samples, patients
HEADER = 512  # bytes before each member of a tar
HASH = 32  # bytes of a perceptual hash
_SHA256 = r"^[0-9a-f]{64}$"
_KINDS = {
    "key": "S", "patient": "S", "split": "u1", "shard": "i4", "first": "i8", "suffix": "S", "offset": "i8",
    "length": "i8", "crc32c": "u4", "person": "S",
}  # fmt: skip
_OPTIONAL = ("person",)
_FORMAT_2 = ("people", "gate", "checksums")  # keys of the manifest
_SUFFIX = re.compile(rb"[0-9a-z]+(\.[0-9a-z]+)*")
_REFUSED = np.isin(np.arange(256), [*range(1, 33), ord("."), 127])  # bytes of names
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


class ManifestStore(Protocol):
    """The part of storage.store.Store that the manifest uses."""

    url: str
    subset: str | None

    def read(self, name: str) -> bytes: ...

    def size(self, name: str) -> int: ...


class FileEntry(BaseModel):
    """A file beside the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$", description="in the folder of the manifest")
    size: int = Field(ge=0, le=1 << 50, description="bytes")
    sha256: str = Field(pattern=_SHA256)


class Shard(FileEntry):
    """One tar of samples."""

    samples: int = Field(gt=0, le=MAX_COUNT)


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
    # (n,) salted hash in the namespace `people` of the manifest; None: `patient` is that hash
    person: npt.NDArray[np.bytes_] | None = None

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

    def repeated_key(self) -> str | None:
        """Return a key that several samples have, or None."""
        if (self.key[1:] > self.key[:-1]).all():  # of one split in the order of a build
            return None
        keys = np.sort(self.key)
        repeated = keys[1:][keys[1:] == keys[:-1]]
        return printable(repeated[0].decode()) if len(repeated) else None

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
            person=None if self.person is None else self.person[rows],
        )

    @property
    def people(self) -> npt.NDArray[np.bytes_]:
        """The salted hash of each sample's patient in the namespace `people` of the manifest, (n,)."""
        return self.patient if self.person is None else self.person

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(
            buffer, allow_pickle=False, **{name: column for name, column in vars(self).items() if column is not None}
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SampleIndex":
        """Parse and check the columns by themselves. Raises ValueError."""
        columns = load_columns(data, (name for name in _KINDS if name not in _OPTIONAL), _OPTIONAL)
        for name, column in columns.items():
            kind = _KINDS[name]
            if column.ndim != 1 or kind not in (column.dtype.kind, column.dtype.str[1:]):
                raise ValueError(f"{name}: {column.ndim} dimensions of {column.dtype}; allowed is one of {kind}")
        index = cls(**columns)
        samples, members = len(index.key), len(index.suffix)
        expected = dict.fromkeys(("key", "patient", "split", "shard", "person"), samples) | {"first": samples + 1}
        for name, column in columns.items():
            if len(column) != expected.get(name, members):
                raise ValueError(f"{name}: {len(column)} entries; expected are {expected.get(name, members)}")
        if index.first[0] != 0 or index.first[-1] != members or (samples and (np.diff(index.first) < 1).any()):
            raise ValueError("first: the members of the samples do not follow one another")
        for name in ("key", "patient", "person"):
            if name in columns:
                _check_names(name, columns[name])
        for suffix in np.unique(index.suffix).tolist():
            if not _SUFFIX.fullmatch(suffix):
                raise ValueError(f"suffix: {printable(ascii(suffix))}; allowed are such as json and 0.jpg")
        if samples and int(index.split.max()) >= len(SPLITS):
            raise ValueError(f"split: {index.split.max()}; allowed are 0 to {len(SPLITS) - 1}")
        return index

    def check_places(self, sizes: Sequence[int]) -> None:
        """Check that the members lie inside their shards, of so many bytes, and apart. Raises ValueError."""
        if len(self) and (int(self.shard.min()) < 0 or int(self.shard.max()) >= len(sizes)):
            raise ValueError(f"shard: {self.shard.min()} to {self.shard.max()}; there are {len(sizes)} shards")
        shard = np.repeat(self.shard, np.diff(self.first))
        if len(self.length) and (int(self.length.min()) < 0 or int(self.length.max()) > MAX_MEMBER):
            raise ValueError(f"length: {self.length.min()} to {self.length.max()}; allowed are 0 to {MAX_MEMBER}")
        outside = (self.offset < HEADER) | (self.offset > np.asarray(sizes, np.int64)[shard] - self.length)
        if outside.any():
            member = int(outside.argmax())
            raise ValueError(f"offset: {self.offset[member]}, outside of shard {shard[member]}")
        end = self.offset + self.length
        order = slice(None) if _ascending(shard, self.offset) else np.lexsort((self.offset, shard))
        shard, start, end = shard[order], self.offset[order] - HEADER, end[order]
        if ((shard[1:] == shard[:-1]) & (start[1:] < end[:-1])).any():
            raise ValueError("offset: members of a shard that overlap")


def _ascending(shard: npt.NDArray[np.int32], offset: npt.NDArray[np.int64]) -> bool:
    """Return whether members stand in the order of the shards, and of their places there."""
    return bool(((shard[1:] > shard[:-1]) | ((shard[1:] == shard[:-1]) & (offset[1:] >= offset[:-1]))).all())


def _check_names(column: str, names: npt.NDArray[np.bytes_]) -> None:
    """Check that names are UTF-8, not empty, and without control characters, spaces and dots. Raises ValueError."""
    letters = names.view(np.uint8).reshape(len(names), names.itemsize)
    bad = (letters[:, 0] == 0) | _REFUSED[letters].any(1) | ((letters[:, :-1] == 0) & (letters[:, 1:] > 0)).any(1)
    if bad.any():
        name = printable(ascii(names[bad.argmax()]))
        raise ValueError(f"{column}: {name}; allowed are names without spaces and dots")
    if letters.size and int(letters.max()) >= 0x80:
        try:
            for name in names.tolist():
                name.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{column}: {printable(ascii(error.object))} is not UTF-8") from None


class SourceChecksums(BaseModel):
    """The checksums that came with the raw archive, as counts of its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(min_length=1, max_length=200, description="the archive's table of checksums, such as SHA256SUMS")
    checked: Count = Field(description="files that were read and have the checksum")
    unchecked: Count = Field(description="files that the table does not name")


class Manifest(BaseModel):
    """The content of `manifest.json`, or of a subset's file. Format 1 has none of the optional fields of format 2."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1, 2] = formats.MANIFEST
    dataset: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")
    samples: int = Field(gt=0, le=MAX_COUNT)
    splits: dict[str, Count] = Field(description="samples per split")
    patients: dict[str, Count] = Field(description="patients per split")
    shards: tuple[Shard, ...] = Field(min_length=1)
    index: FileEntry
    build: dict[str, Any] = Field(description="how it was built: reader, image and split settings, versions")
    build_hash: str = Field(
        pattern=r"^[0-9A-Za-z_-]{1,64}$", description="sha256 of `build`, to tell one build from another"
    )
    skipped: dict[str, Count] = Field(default_factory=dict, description="samples left out, by reason")
    fingerprints: FileEntry | None = Field(
        default=None, description="perceptual hashes, a row of 32 bytes for each image"
    )
    subset_of: str | None = Field(
        default=None, pattern=_SHA256, description="of a subset: the hash of the manifest it was taken from"
    )
    people: str | None = optional(
        None,
        "the namespace of its patients: those of two datasets with the same one can be compared; null: the dataset",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$",
    )
    gate: Literal["scrubbed", "unscrubbed", "adopted"] | None = optional(
        None, "whether its texts went through the privacy gate; unscrubbed: not all of them; adopted: nobody knows"
    )
    checksums: SourceChecksums | None = optional(None, "the checksums of the raw archive, where it has any")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.format == 1 and (later := [name for name in _FORMAT_2 if getattr(self, name) is not None]):
            raise ValueError(f"{later[0]}: not in format 1")
        names = [file.name for file in (*self.shards, self.index, *filter(None, (self.fingerprints,)))]
        if len(set(names)) < len(names) or MANIFEST in names:
            repeated = next(name for name in names if names.count(name) > 1 or name == MANIFEST)
            raise ValueError(f"{repeated} is the name of several files")
        for key, counts in (("splits", self.splits), ("patients", self.patients)):
            if unknown := next((name for name in counts if name not in SPLITS), None):
                raise ValueError(f"{key}: {printable(unknown)}; allowed are {', '.join(SPLITS)}")
        return self

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
            if (size := store.size(name)) > MAX_MANIFEST:
                raise UserError(f"{store.url}/{name}: {size} bytes; allowed are {MAX_MANIFEST}")
            data = store.read(name)
            parse_json(data)  # what follows would take the last of two values of one key, and numbers without end
            return cls.model_validate_json(data, strict=True)
        except FileNotFoundError as error:
            raise UserError(f"{store.url}: {missing}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = printable(".".join(map(str, problem["loc"]))) or "the file"
            raise UserError(f"{store.url}/{name}: {where}: {printable(problem['msg'])}") from error
        except ValueError as error:
            raise (
                error
                if isinstance(error, UserError)
                else UserError(f"{store.url}/{name}: the file: {first_line(error)}")
            ) from error

    def load_index(self, store: ManifestStore) -> SampleIndex:
        """Read the columns and check them against the manifest."""
        data = self._read_file(store, self.index)
        try:
            index = SampleIndex.from_bytes(data)
            index.check_places([shard.size for shard in self.shards])
            return index
        except ValueError as error:
            raise UserError(f"{store.url}/{self.index.name}: {first_line(error)}") from error

    def load_fingerprints(self, store: ManifestStore) -> npt.NDArray[np.uint8]:
        """Read the perceptual hashes of all images, (images, 32), in the order of the index; check their sha256."""
        assert self.fingerprints is not None, "shards without fingerprints"
        try:
            hashes = load_array(self._read_file(store, self.fingerprints))
            if hashes.dtype != np.uint8 or hashes.shape[1:] != (HASH,):
                raise ValueError(f"{hashes.shape} of {hashes.dtype}; allowed is a row of {HASH} bytes for each image")
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{store.url}/{self.fingerprints.name}: {first_line(error)}") from error
        return hashes

    def _read_file(self, store: ManifestStore, file: FileEntry) -> bytes:
        try:
            if (size := store.size(file.name)) != file.size or size > MAX_SIDE_FILE:
                raise UserError(
                    f"{store.url}/{file.name}: does not match {_file(store)} ({size} bytes, not {file.size}; at most "
                    f"{MAX_SIDE_FILE})"
                )
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
