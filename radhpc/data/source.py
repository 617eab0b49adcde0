"""Read the samples of one split from the shards of several datasets, by number; each byte is checked when read.

    source = Source(("/data/padchest", "s3://bucket/mimic"), "train")
    for raw in source.read_raw(np.asarray([7, 1_000_000])):    # key, and a view of each member
        key, sample, views = decode_study(raw)                    # parsed and decoded

Enters: manifests and numbers of samples. Leaves: RawSample, whose members have the length and the crc32c of the
manifest. Files on a local disk are mapped, not copied; what lies behind a network is read ahead by prefetch.py.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from awscrt.checksums import crc32c
from PIL import Image
from pydantic import ValidationError

from radhpc.core.errors import UserError, first_line
from radhpc.core.image_decoding import decode
from radhpc.core.manifest import Manifest, SampleIndex
from radhpc.core.people import DatasetPatients, refuse_shared_patients
from radhpc.core.sample import Sample
from radhpc.data.sampler import Positions
from radhpc.storage.store import Store, Traffic

_BULK = 256  # samples that are looked up at a time
_REQUESTS = 32  # at a time, for descriptions alone


class BadSample(Exception):
    """A sample whose bytes are not those of the manifest, or cannot be decoded."""

    def __init__(self, key: str, fault: str) -> None:
        super().__init__(f"{key}: {fault}")
        self.key, self.fault = key, fault


class SampleLocation(NamedTuple):
    """The place of one sample: bytes start to stop of a shard, and its members inside them."""

    number: int
    key: str
    dataset: int  # its number in the source
    shard: int
    start: int
    stop: int
    members: tuple[tuple[str, int, int, int], ...]  # suffix, first byte, end (exclusive), crc32c


class RawSample(NamedTuple):
    """One sample as it lies in the shard."""

    key: str
    members: list[tuple[str, memoryview]]  # by suffix: json, 0.jpg, 1.jpg, ...
    epoch: int = 0  # of its dataset, in which it is drawn


@dataclass(frozen=True)
class Dataset:
    """One dataset: a folder of shards, and which of its samples belong to the split."""

    url: str
    store: Store
    manifest: Manifest
    index: SampleIndex
    rows: Positions

    def shard_samples(self) -> Positions:
        """Return how many samples of the split each shard holds, in their order; shards without any are left out."""
        shards = self.index.shard[self.rows]
        edges = np.flatnonzero(np.diff(shards)) + 1
        return np.diff(np.concatenate([[0], edges, [len(shards)]])) if len(shards) else np.zeros(0, np.int64)

    def read(self, shard: int, start: int, stop: int, given_up: threading.Event | None = None) -> memoryview:
        """Return bytes of a shard. Raises UserError where they are gone; CancelledError as Store.view_range does."""
        name = self.manifest.shards[shard].name
        try:
            data = self.store.view_range(name, start, stop - start, given_up)
        except FileNotFoundError as error:
            raise UserError(f"{self.store.url}/{name}: gone while it is being read") from error
        if len(data) < stop - start:
            raise UserError(f"{self.store.url}/{name}: ends before byte {stop}: cut while this run reads it")
        return data


class Source:
    """The samples of one split, numbered over all its datasets. With a mapping, the values are their weights."""

    def __init__(self, shards: Sequence[str] | Mapping[str, float], split: str) -> None:
        self.split = split
        self.weights = tuple(shards.values()) if isinstance(shards, Mapping) else None
        self.traffic = Traffic()
        self.datasets: list[Dataset] = []
        folders: dict[str, str] = {}
        for url in shards:
            store = Store(url, self.traffic)
            if store.url in folders:
                raise UserError(f"shards: {folders[store.url]} and {url} hold the same samples; allowed is one of them")
            folders[store.url] = url
            manifest = Manifest.load(store)
            index = manifest.load_index(store)
            if repeated := index.repeated_key():
                raise UserError(f"{url}: {repeated} is the key of several samples; 'radhpc verify' names every fault")
            self.datasets.append(Dataset(url, store, manifest, index, index.of_split(split)))
        refuse_shared_patients(self.patients())
        self._ends = np.cumsum([len(dataset.rows) for dataset in self.datasets])
        self.hashes = tuple(dataset.manifest.hash for dataset in self.datasets)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def patients(self) -> list[DatasetPatients]:
        """Return the patients of each dataset, of all its splits, for comparisons."""
        return [DatasetPatients(dataset.url, dataset.manifest, dataset.index) for dataset in self.datasets]

    def check_sizes(self) -> None:
        """Compare every shard's size with its manifest. Raises UserError."""
        for dataset in self.datasets:
            dataset.manifest.check_sizes(dataset.store)

    def key(self, number: int) -> str:
        return self.keys(np.asarray([number]))[0]

    def keys(self, numbers: Positions) -> list[str]:
        """Return the names of samples, in this order."""
        keys = np.empty(len(numbers), object)
        owners = np.searchsorted(self._ends, numbers, "right")
        for n, dataset in enumerate(self.datasets):
            positions = np.flatnonzero(owners == n)
            keys[positions] = [key.decode() for key in dataset.index.key[self._rows(n, numbers[positions])].tolist()]
        return list(keys)

    def sizes(self, numbers: Positions) -> npt.NDArray[np.int64]:
        """Return (numbers, 2): images of each sample, and bytes of its description, which grow with its text."""
        sizes = np.empty((len(numbers), 2), np.int64)
        owners = np.searchsorted(self._ends, numbers, "right")
        for n, dataset in enumerate(self.datasets):
            positions = np.flatnonzero(owners == n)
            rows = self._rows(n, numbers[positions])
            first = dataset.index.first[rows]
            sizes[positions, 0] = dataset.index.first[rows + 1] - first - 1  # all but the description
            sizes[positions, 1] = dataset.index.length[first]
        return sizes

    def locate(self, numbers: Positions) -> list[SampleLocation]:
        """Return the locations of samples, in this order; in bulk, as one at a time would be slower than reading."""
        result: list[SampleLocation | None] = [None] * len(numbers)
        owners = np.searchsorted(self._ends, numbers, "right")
        for n, dataset in enumerate(self.datasets):
            positions = np.flatnonzero(owners == n)
            index, rows = dataset.index, self._rows(n, numbers[positions])
            first, last = index.first[rows], index.first[rows + 1]
            counts = last - first
            ends = np.cumsum(counts)
            members = np.repeat(first - (ends - counts), counts) + np.arange(int(counts.sum()))
            offsets, lengths = index.offset[members], index.length[members]
            start = index.offset[first]
            inside = offsets - np.repeat(start, counts)
            described = list(
                zip(
                    [suffix.decode() for suffix in index.suffix[members].tolist()],
                    inside.tolist(),
                    (inside + lengths).tolist(),
                    index.crc32c[members].tolist(),
                    strict=True,
                )
            )
            stop = index.offset[last - 1] + index.length[last - 1]
            begin = 0
            for at, number, key, shard, low, high, end in zip(
                positions.tolist(), numbers[positions].tolist(), index.key[rows].tolist(), index.shard[rows].tolist(),
                start.tolist(), stop.tolist(), ends.tolist(), strict=True,
            ):  # fmt: skip
                result[at] = SampleLocation(number, key.decode(), n, shard, low, high, tuple(described[begin:end]))
                begin = end
        return result  # type: ignore[return-value]

    def mapped(self, location: SampleLocation) -> memoryview | None:
        """Return the bytes of a sample, if its shard is a file on a local disk."""
        dataset = self.datasets[location.dataset]
        shard = dataset.manifest.shards[location.shard]
        whole = dataset.store.mapped(shard.name, shard.size)
        return None if whole is None else whole[location.start : location.stop]

    def fetch(self, location: SampleLocation) -> memoryview:
        """Return the bytes of a sample, from wherever its shard lies."""
        view = self.mapped(location)
        if view is not None:
            return view
        return self.datasets[location.dataset].read(location.shard, location.start, location.stop)

    def check(self, location: SampleLocation, data: memoryview) -> RawSample:
        """Return the members of a sample, if they are those of the manifest. Raises BadSample."""
        assert len(data) == location.stop - location.start, location
        members = []
        for suffix, start, stop, checksum in location.members:
            member = data[start:stop]
            if crc32c(member) != checksum:
                raise BadSample(location.key, f"{self._name(location)}: {suffix}: checksum differs from the manifest's")
            members.append((suffix, member))
        return RawSample(location.key, members)

    def read_raw(self, numbers: Positions) -> Iterator[RawSample]:
        """Read and check samples, one after the other. Raises BadSample."""
        for begin in range(0, len(numbers), _BULK):
            for location in self.locate(numbers[begin : begin + _BULK]):
                yield self.check(location, self.fetch(location))

    def read(self, number: int) -> "DecodedStudy":
        """Read, check and decode one sample. Raises BadSample."""
        return decode_study(next(self.read_raw(np.asarray([number]))))

    def samples(self, numbers: Positions | None = None) -> Iterator[Sample]:
        """Yield the descriptions of all samples, in the order of the shards, or of some: for tokenizers and baselines.
        Damaged ones are left out; the stream names them when their turn comes.
        """
        numbers = np.arange(len(self)) if numbers is None else numbers

        def described(location: SampleLocation) -> Sample | None:
            _, start, stop, _ = location.members[0]
            first, members = location.start, location.members[:1]
            description = location._replace(start=first + start, stop=first + stop, members=members)
            with contextlib.suppress(BadSample, ValidationError):
                return Sample.model_validate_json(bytes(self.check(description, self.fetch(description)).members[0][1]))
            return None

        with ThreadPoolExecutor(_REQUESTS, "descriptions") as pool:
            for begin in range(0, len(numbers), _BULK):
                locations = self.locate(numbers[begin : begin + _BULK])
                local = all(self.mapped(location) is not None for location in locations)
                yield from filter(None, map(described, locations) if local else pool.map(described, locations))

    def _rows(self, dataset: int, numbers: Positions) -> Positions:
        before = int(self._ends[dataset - 1]) if dataset else 0
        return self.datasets[dataset].rows[numbers - before]

    def _name(self, location: SampleLocation) -> str:
        return self.datasets[location.dataset].manifest.shards[location.shard].name


DecodedStudy = tuple[str, Sample, list[Image.Image]]


def decode_study(raw: RawSample) -> DecodedStudy:
    """Parse and decode one sample. Raises BadSample."""
    sample: Sample | None = None
    views: list[Image.Image] = []
    for suffix, data in raw.members:
        try:
            if suffix == "json":
                sample = Sample.model_validate_json(bytes(data))
            else:
                described = sample.images if sample else ()
                views.append(decode(data, described[len(views)] if len(views) < len(described) else None))
        except (OSError, ValidationError) as error:
            raise BadSample(raw.key, f"{suffix}: {first_line(error)}") from error
    if sample is None or not views:
        raise BadSample(raw.key, "no description or no image in the shard")
    return raw.key, sample, views
