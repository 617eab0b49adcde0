"""Shards to steps: which samples a step trains on, read, checked, decoded and batched ahead of time.

    Source    the samples of one split over several shard folders or subsets of them, any of them by number
    Stream    the steps of one stage from a cursor on, this rank's share of each

Enters: manifests, and the cursor (samples of this stage that were trained on). Leaves: Step after Step, each with the
same number of micro-batches on all ranks. The samples of step k are positions k * batch to (k + 1) * batch of the
order (order.py), whatever the number of ranks; rank r of w takes every w-th of them, starting at the r-th. Example:
with batch 6 and 4 ranks, rank 0 takes 2 samples, rank 3 takes 1 and one empty slot, which has no loss.

    python -m radhpc.stream recipes/quickstart.yaml shards='[runs/phantom]'    # shows three samples
"""

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
from PIL import Image
from pydantic import ValidationError

from radhpc import order
from radhpc.collate import Batch, Encoded, Encoder
from radhpc.errors import UserError, first_line
from radhpc.manifest import Manifest, Member
from radhpc.recipe import Stage, Stream as StreamRecipe, load
from radhpc.sample import Sample
from radhpc.store import Store
from radhpc.transforms import decode

log = logging.getLogger("radhpc")


class BadSample(Exception):
    """A sample whose bytes are not those of the manifest, or cannot be decoded."""

    def __init__(self, key: str, fault: str) -> None:
        super().__init__(f"{key}: {fault}")
        self.key = key


class Source:
    """The samples of one split, numbered over all shard folders of a stage."""

    def __init__(self, urls: tuple[str, ...], split: str) -> None:
        self.urls, self.split = urls, split
        self._parts = []
        hashes = []
        folders: dict[str, str] = {}
        patients: dict[str, tuple[str, str]] = {}
        for url in urls:
            store = Store(url)
            if store.url in folders:
                raise UserError(f"shards: {folders[store.url]} and {url} hold the same samples; allowed is one of them")
            folders[store.url] = url
            manifest = Manifest.load(store)
            index = manifest.load_index(store)
            hashes.append(manifest.hash)
            self._parts.append((store, manifest, index, index.of_split(split)))
            _refuse_leak(url, index, patients)
        self._ends = np.cumsum([len(rows) for *_, rows in self._parts])
        self.hashes = tuple(hashes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def check_sizes(self) -> None:
        """Compare every shard's size with its manifest. Raises UserError."""
        for store, manifest, *_ in self._parts:
            manifest.check_sizes(store)

    def key(self, number: int) -> str:
        _, _, index, row = self._at(number)
        return str(index.key[row].decode())

    def read(self, number: int) -> tuple[str, Sample, list[Image.Image]]:
        """Read, check and decode one sample. Raises BadSample."""
        store, manifest, index, row = self._at(number)
        key = index.key[row].decode()
        sample, views = None, []
        for member in index.members(row):
            data = _checked(store, manifest.shards[member.shard].name, key, member)
            try:
                if member.name.endswith(".json"):
                    sample = Sample.model_validate_json(data)
                else:
                    described = sample.images if sample else ()
                    views.append(decode(data, described[len(views)] if len(views) < len(described) else None))
            except (OSError, ValidationError) as error:
                raise BadSample(key, f"{member.name}: {first_line(error)}") from error
        if sample is None or not views:
            raise BadSample(key, "no description or no image in the shard")
        return key, sample, views

    def samples(self) -> Iterator[Sample]:
        """The descriptions alone, in the order of the shards: for a tokenizer, and for baselines. Damaged ones are
        left out; the stream names them when their turn comes.
        """
        for number in range(len(self)):
            store, manifest, index, row = self._at(number)
            for member in index.members(row):
                if member.name.endswith(".json"):
                    shard = manifest.shards[member.shard].name
                    with contextlib.suppress(BadSample, ValidationError):
                        yield Sample.model_validate_json(_checked(store, shard, self.key(number), member))

    def _at(self, number: int):  # type: ignore[no-untyped-def]
        part = int(np.searchsorted(self._ends, number, side="right"))
        store, manifest, index, rows = self._parts[part]
        before = int(self._ends[part - 1]) if part else 0
        return store, manifest, index, int(rows[number - before])


def _checked(store: Store, shard: str, key: str, member: Member) -> bytes:
    """The bytes of one member, if they are those of the manifest. Raises BadSample."""
    try:
        data = store.read_range(shard, member.offset, member.length)
    except FileNotFoundError as error:
        raise UserError(f"{store.url}/{shard}: gone while it is being read") from error
    if len(data) != member.length:
        raise BadSample(key, f"{shard}: {member.name}: {len(data)} of {member.length} bytes")
    if google_crc32c.value(data) != member.crc32c:
        raise BadSample(key, f"{shard}: {member.name}: checksum differs from the manifest's")
    return data


def _refuse_leak(url: str, index, patients: dict[str, tuple[str, str]]) -> None:  # type: ignore[no-untyped-def]
    """Promise 7: no patient in two splits, across all the folders of a recipe."""
    for patient, split in set(zip(index.patient.tolist(), index.split.tolist(), strict=True)):
        where = patients.setdefault(patient, (url, split))
        if where[1] != split:
            raise UserError(f"{url}: patient {patient.decode()} is in another split there than in {where[0]}")


@dataclass
class Step:
    """One rank's share of one optimizer step."""

    number: int  # in the stage, from 0
    micro_batches: list[Batch]
    keys: list[str]  # samples with a loss, those without text included
    bad: list[str] = field(default_factory=list)
    supervised: int = 0  # tokens with a loss
    tokens: int = 0  # tokens that are no padding
    wait_seconds: float = 0.0  # that the loop stood still for it


def stage_samples(stage: Stage, length: int) -> int:
    """How many samples a stage trains on."""
    return stage.steps * stage.batch if stage.steps is not None else (stage.epochs or 0) * length


def stage_steps(stage: Stage, length: int) -> int:
    """How many optimizer steps a stage has. With `epochs` the last one may be smaller than the batch."""
    return -(-stage_samples(stage, length) // stage.batch)


class Stream:
    """The steps of one stage. Iterate it; leave it with close()."""

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        stage: Stage,
        stage_number: int,
        recipe: StreamRecipe,
        seed: int,
        rank: int = 0,
        world: int = 1,
        cursor: int = 0,
    ) -> None:
        assert cursor % stage.batch == 0 or cursor == stage_samples(stage, len(source)), cursor
        self._source, self._encoder, self._stage, self._recipe = source, encoder, stage, recipe
        self._stage_number, self._seed, self._rank, self._world = stage_number, seed, rank, world
        self._next = -(-cursor // stage.batch)
        self._steps = stage_steps(stage, len(source))
        self._pool = ThreadPoolExecutor(recipe.threads, thread_name_prefix="stream")
        self._pending: deque[tuple[int, list[Future[Encoded]]]] = deque()
        self._bad = 0
        share = -(-stage.batch // world)
        self._micro_batch = min(stage.micro_batch or share, share)
        self._slots = -(-share // self._micro_batch) * self._micro_batch

    def __iter__(self) -> Iterator[Step]:
        while True:
            while self._next < self._steps and len(self._pending) <= self._recipe.prefetch:
                self._pending.append((self._next, [self._pool.submit(self._load, n) for n in self._share(self._next)]))
                self._next += 1
            if not self._pending:
                return
            yield self._assemble(*self._pending.popleft())

    def close(self) -> None:
        """Drop what was read ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _share(self, step: int) -> list[int]:
        """The samples of this rank in a step."""
        start = step * self._stage.batch
        count = min(self._stage.batch, stage_samples(self._stage, len(self._source)) - start)
        samples = order.samples_at(start, count, len(self._source), self._seed, self._stage_number)
        return [int(sample) for sample in samples[self._rank :: self._world]]

    def _load(self, number: int) -> Encoded:
        return self._encoder.encode(*self._source.read(number))

    def _assemble(self, number: int, futures: list[Future[Encoded]]) -> Step:
        started = time.perf_counter()
        rows, bad = [], []
        for future in futures:
            try:
                rows.append(future.result())
            except BadSample as error:
                log.warning("left out: %s", error)
                bad.append(error.key)
        self._bad += len(bad)
        if self._bad > self._recipe.max_bad_samples:
            raise UserError(
                f"{self._bad} bad sample(s), stream.max_bad_samples allows {self._recipe.max_bad_samples}; "
                f"the last: {bad[-1]}; 'launch.py verify' names every fault"
            )
        # Rows of like shape share a micro-batch, so that little is padded; a stable sort, so that it is repeatable.
        rows.sort(key=lambda row: (len(row.images["num_tiles"]), len(row.input_ids)))
        keys = [row.key for row in rows]
        supervised, tokens = sum(row.supervised for row in rows), sum(len(row.input_ids) for row in rows)
        rows += [self._encoder.empty()] * (self._slots - len(rows))
        size = self._micro_batch
        batches = [self._encoder.batch(rows[n : n + size]) for n in range(0, len(rows), size)]
        return Step(number, batches, keys, bad, supervised, tokens, time.perf_counter() - started)


def main(arguments: list[str]) -> None:
    """Print what the first three positions of a recipe's first stage hold."""
    recipe = load(Path(arguments[0]), arguments[1:])
    stage = recipe.stages[0]
    source = Source(stage.shards or recipe.shards, "train")
    for number in order.samples_at(0, min(3, len(source)), len(source), recipe.seed, 0):
        key, sample, views = source.read(int(number))
        print(f"{key}: {', '.join(f'{view.width}x{view.height} {view.mode}' for view in views)}")
        print(f"  asked: {sample.question or recipe.text.prompt}")
        print(f"  answer: {sample.answer or sample.report.text(recipe.text.sections)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
