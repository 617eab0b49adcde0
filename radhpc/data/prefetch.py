"""Read ahead the bytes of a rank's coming samples, in few and large requests, bounded in memory.

Between the source and the stream. Enters: the numbers of this rank's samples, in the order in which it will train on
them. Leaves: each one's bytes, checked, when its turn comes. Example, for shards of 1,000 samples of 55 kB each in an
object store and a window of 20 shards, one rank:

    turns       0 1 2 3 ...                 samples of 20 shards in turn
    group       the next 128 MB of turns    the same samples, by shard and offset
    spans       20 runs of about 6 MB       one ranged request each; gaps below REQUEST are read, too, not split
    take(0, 16) waits for their spans, cuts the samples out, checks them; a span is freed once its last is taken

A request costs about as much as REQUEST bytes would have, so a gap is skipped only if it is larger. A whole shard is
thus read where all its gaps are cheap, and single members where a job of many nodes wants little of each shard. Files
on a local disk are mapped and need none of this.
"""

import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from radhpc.core.manifest import Shard
from radhpc.core.recipe import StreamSettings
from radhpc.data.sampler import Positions
from radhpc.data.source import BadSample, Dataset, RawSample, SampleLocation, Source
from radhpc.storage.node_cache import NodeCache

REQUEST = 256 << 10  # bytes that a request costs: 10 ms at 800 MB/s, shared by 32 that wait at the same time
SPAN = 8 << 20  # bytes of the longest request: long enough for full speed, short enough to be repeated
FIRST_GROUP = 8 << 20  # bytes; the first steps shall not wait for what the later ones need. Doubles from group to group
NEIGHBOUR_GAP = 4 << 10  # bytes between two samples that stand side by side: headers and padding
LOOKAHEAD = 4096  # samples that are looked up ahead at most
FETCHES = 8  # of a sample whose bytes are wrong in another way each time
LOOKAHEAD_STEPS = 64  # steps that are looked up at a time: with thousands of ranks a step has few samples of each


@dataclass(eq=False)
class Span:
    """Bytes start to stop of a shard, for `left` more samples."""

    dataset: int
    shard: int
    start: int
    stop: int
    left: int = 0
    data: "Future[memoryview] | None" = None


def plan_spans(locations: Sequence[SampleLocation], gap: int = REQUEST) -> tuple[list[Span], list[Span]]:
    """Return the cheapest requests for these samples, in the order in which they are first needed; and each sample's.

    Samples of a shard with at most `gap` bytes between them share a span of at most SPAN bytes (a single sample may be
    longer).
    """
    planned: list[Span] = []
    of: dict[int, Span] = {}
    for n in sorted(
        range(len(locations)), key=lambda n: (locations[n].dataset, locations[n].shard, locations[n].start)
    ):
        location, span = locations[n], planned[-1] if planned else None
        if (
            span is None
            or (span.dataset, span.shard) != (location.dataset, location.shard)
            or location.start - span.stop > gap
            or max(span.stop, location.stop) - span.start > SPAN
        ):
            span = Span(location.dataset, location.shard, location.start, location.stop)
            planned.append(span)
        span.stop = max(span.stop, location.stop)
        span.left += 1
        of[n] = span
    each = [of[n] for n in range(len(locations))]
    first = {id(span): turn for turn, span in reversed(list(enumerate(each)))}
    return sorted(planned, key=lambda span: first[id(span)]), each


class Prefetcher:
    """Reads the samples of `turns` ahead. Many threads may call take(), for turns in about their order."""

    def __init__(
        self, source: Source, turns: Iterator[Positions], recipe: StreamSettings, world: int = 1, passes: float = 1.0
    ) -> None:
        """`world`: ranks that share the samples; `passes`: over the data, by all of them together."""
        self._source, self._turns = source, turns
        self._limit = recipe.prefetch_megabytes << 20
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._pool = ThreadPoolExecutor(max(1, recipe.requests // local_ranks), thread_name_prefix="fetch")
        self._local = [dataset.store.on_local_disk for dataset in source.datasets]
        self._cached = _through_cache(source, recipe, min(1.0, local_ranks / world), passes)
        self.cache = _open_cache(recipe) if any(self._cached) else None
        if self.cache is not None:
            self.cache.expect(
                _content(dataset, shard)
                for dataset, cached in zip(source.datasets, self._cached, strict=True)
                if cached
                for shard in dataset.manifest.shards
            )
        self._planned: dict[int, tuple[SampleLocation, Span | None]] = {}
        self._looked_up: deque[SampleLocation] = deque()
        self._next, self._taken = 0, 0
        self._live: dict[tuple[int, int], list[Span]] = defaultdict(list)  # by dataset and shard: those not yet freed
        self._held, self._group = 0, min(FIRST_GROUP, self._limit // 2)
        self._ended = False
        self._closed = threading.Event()
        self._change = threading.Condition()

    def take(self, first: int, end: int) -> list[RawSample | BadSample]:
        """Wait for the samples of turns first to end, each turn once; a BadSample stands for a bad one."""
        taken: list[RawSample | BadSample] = []
        while (turn := first + len(taken)) < end:
            with self._change:
                self._extend()
                while turn not in self._planned:
                    if not self._extend():
                        assert not self._ended, turn
                        self._change.wait()
                planned = []
                while turn < end and turn in self._planned:  # the others come when these have made room
                    planned.append(self._planned.pop(turn))
                    turn += 1
                self._taken += len(planned)
            for location, span in planned:
                try:
                    taken.append(self._local_sample(location) if span is None else self._remote_sample(location, span))
                except BadSample as error:
                    taken.append(error)
        return taken

    def _local_sample(self, location: SampleLocation) -> RawSample:
        view = self._source.mapped(location)
        assert view is not None
        return self._source.check(location, view)

    def _remote_sample(self, location: SampleLocation, span: Span) -> RawSample:
        assert span.data is not None
        try:
            whole = span.data.result()
            return self._checked(location, whole[location.start - span.start : location.stop - span.start])
        finally:
            with self._change:
                span.left -= 1
                if span.left == 0:
                    self._held -= span.stop - span.start
                    self._live[span.dataset, span.shard].remove(span)
                    span.data = None
                    self._extend()
                    self._change.notify_all()

    def close(self) -> None:
        """Drop what was read ahead; whoever waits in take() gets a CancelledError."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._change:
            self._change.notify_all()
        self._pool.shutdown(wait=True)
        if self.cache is not None:
            self.cache.close()

    def _extend(self) -> bool:
        """Plan one more group if less than half of the limit is held; return whether it did. With the lock held."""
        if self._closed.is_set():
            raise CancelledError
        if self._ended or self._next - self._taken >= LOOKAHEAD // 2 or self._held > self._limit // 2:
            return False
        group = self._gather()
        assigned = [None if self._local[location.dataset] else self._covering(location) for location in group]
        absent = [n for n, location in enumerate(group) if not self._local[location.dataset] and assigned[n] is None]
        for gap in (REQUEST, REQUEST // 4, NEIGHBOUR_GAP):
            requested, each = plan_spans([group[n] for n in absent], gap)
            size = sum(span.stop - span.start for span in requested)
            if self._held + size <= self._limit:
                break
        self._held += size
        for span in requested:
            self._live[span.dataset, span.shard].append(span)
            span.data = self._pool.submit(self._fetch, span)
        for n, span in zip(absent, each, strict=True):
            assigned[n] = span
        for location, one in zip(group, assigned, strict=True):
            self._planned[self._next] = (location, one)
            self._next += 1
        self._group = min(self._group * 2, self._limit * 3 // 8)
        self._change.notify_all()
        return bool(group)

    def _covering(self, location: SampleLocation) -> Span | None:
        """Return the span, requested already, in whose bytes this sample lies: in a gap that is read, too."""
        for span in self._live[location.dataset, location.shard]:
            if span.start <= location.start and location.stop <= span.stop:
                span.left += 1
                return span
        return None

    def _gather(self) -> list[SampleLocation]:
        """Return the locations of the next turns, up to a group's bytes, and at least one."""
        group: list[SampleLocation] = []
        size, looked_up = 0, 0
        while (not group or size < self._group) and len(group) < LOOKAHEAD // 2:
            if not self._looked_up:
                if group and looked_up >= LOOKAHEAD_STEPS:
                    break
                numbers = next(self._turns, None)
                if numbers is None:
                    self._ended = True
                    break
                looked_up += 1
                self._looked_up.extend(self._source.locate(numbers))
                continue
            location = self._looked_up.popleft()
            group.append(location)
            size += 0 if self._local[location.dataset] else location.stop - location.start
        return group

    def _fetch(self, span: Span) -> memoryview:
        dataset = self._source.datasets[span.dataset]
        shard = dataset.manifest.shards[span.shard]

        def fetch(start: int, stop: int) -> memoryview:
            return dataset.read(span.shard, start, stop, self._closed)

        if self.cache is None or not self._cached[span.dataset]:
            return fetch(span.start, span.stop)
        return memoryview(self.cache.read(_content(dataset, shard), shard.size, span.start, span.stop, fetch))

    def _checked(self, location: SampleLocation, data: memoryview) -> RawSample:
        """Check a sample. Wrong bytes are fetched again, past the cache, until they are right or come twice alike."""
        for _ in range(FETCHES - 1):
            try:
                return self._source.check(location, data)
            except BadSample:
                if self.cache is not None and self._cached[location.dataset]:
                    dataset = self._source.datasets[location.dataset]
                    self.cache.drop(
                        _content(dataset, dataset.manifest.shards[location.shard]), location.start, location.stop
                    )
                self._source.traffic.add(retry="checksum")
                previous, data = data, self._source.fetch(location)
                if data == previous:
                    break  # the store itself holds these bytes
        return self._source.check(location, data)


def _content(dataset: Dataset, shard: Shard) -> str:
    """Return the name of a shard in the cache: its address and its checksum."""
    return f"{dataset.store.url}/{shard.name} {shard.sha256}"


def _open_cache(recipe: StreamSettings) -> NodeCache:
    assert recipe.cache is not None
    folder = Path(os.path.expanduser(os.path.expandvars(recipe.cache.folder)))
    return NodeCache(folder, int(recipe.cache.gigabytes * 1e9))


def _through_cache(source: Source, recipe: StreamSettings, share: float, passes: float) -> list[bool]:
    """Decide for each dataset whether its blocks go through the node's cache: where that makes the node fetch less.

    Through the cache every block is fetched whole, once, and again in each pass where it was not kept. Without it, the
    node fetches `share` of the samples, those of its ranks, in every pass, each at the cost of its bytes and a request.
    """
    if recipe.cache is None:
        return [False] * len(source.datasets)
    far = [
        dataset.store.folder is None or (recipe.cache.folders and not dataset.store.on_local_disk)
        for dataset in source.datasets
    ]
    sizes = [sum(shard.size for shard in dataset.manifest.shards) for dataset in source.datasets]
    total = sum(size for size, is_far in zip(sizes, far, strict=True) if is_far)
    room = recipe.cache.gigabytes * 1e9
    lost = 1 - min(1.0, room / max(1, total))
    largest = max(shard.size for dataset in source.datasets for shard in dataset.manifest.shards)
    if lost and (recipe.window is None or recipe.window * largest > room):
        return [False] * len(source.datasets)  # a block would be evicted before the turns of its other samples
    decisions = []
    for dataset, size, is_far in zip(source.datasets, sizes, far, strict=True):
        direct = share * (1 + REQUEST * dataset.manifest.samples / size)  # in each pass, as a share of its bytes
        decisions.append(is_far and 1 + (passes - 1) * lost * direct <= passes * direct)
    return decisions
