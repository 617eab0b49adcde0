"""Reading ahead: the bytes of a rank's coming samples, in few and large requests, bounded in memory.

Between the source and the stream. Enters: the numbers of this rank's samples, in the order in which it will train on
them. Leaves: each one's bytes, checked, when its turn comes. Example, for shards of 1,000 samples of 55 kB each in an
object store and a window of 20 shards, one rank:

    turns       0 1 2 3 ...                 samples of 20 shards in turn
    group       the next 128 MB of turns    the same samples, by shard and offset
    spans       20 runs of about 6 MB       one ranged request each; gaps below REQUEST are read along, not split
    take(0, 16) waits for their spans, cuts the samples out, checks them; a span is let go once its last is taken

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
NEXT = 4 << 10  # bytes between two samples that stand side by side: headers and padding
LOOK = 4096  # samples that are looked up ahead at most
FETCHES = 8  # of a sample whose bytes are wrong in another way each time
LOOK_STEPS = 64  # steps that are looked up at a time: with thousands of ranks a step has few samples of each


@dataclass(eq=False)
class Span:
    """Bytes start to stop of a shard, for `left` more samples."""

    part: int
    shard: int
    start: int
    stop: int
    left: int = 0
    data: "Future[memoryview] | None" = None


def spans(places: Sequence[SampleLocation], gap: int = REQUEST) -> tuple[list[Span], list[Span]]:
    """The requests that cost least for these samples, in the order in which they are first needed; and each sample's.

    Samples of a shard with at most `gap` bytes between them share a span of at most SPAN bytes (a single sample may be
    longer).
    """
    found: list[Span] = []
    of: dict[int, Span] = {}
    for n in sorted(range(len(places)), key=lambda n: (places[n].part, places[n].shard, places[n].start)):
        place, span = places[n], found[-1] if found else None
        if (
            span is None
            or (span.part, span.shard) != (place.part, place.shard)
            or place.start - span.stop > gap
            or max(span.stop, place.stop) - span.start > SPAN
        ):
            span = Span(place.part, place.shard, place.start, place.stop)
            found.append(span)
        span.stop = max(span.stop, place.stop)
        span.left += 1
        of[n] = span
    each = [of[n] for n in range(len(places))]
    first = {id(span): turn for turn, span in reversed(list(enumerate(each)))}
    return sorted(found, key=lambda span: first[id(span)]), each


class Prefetcher:
    """Reads the samples of `turns` ahead. take() may be called from many threads, for turns about in their order."""

    def __init__(
        self, source: Source, turns: Iterator[Positions], recipe: StreamSettings, world: int = 1, passes: float = 1.0
    ) -> None:
        """`world`: ranks that share the samples; `passes`: over the data, by all of them together."""
        self._source, self._turns = source, turns
        self._limit = recipe.prefetch_megabytes << 20
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._pool = ThreadPoolExecutor(max(1, recipe.requests // here), thread_name_prefix="fetch")
        self._local = [part.store.on_local_disk for part in source.datasets]
        self._cached = _through_cache(source, recipe, min(1.0, here / world), passes)
        self.cache = _open_cache(recipe) if any(self._cached) else None
        if self.cache is not None:
            self.cache.expect(
                _content(part, shard)
                for part, cached in zip(source.datasets, self._cached, strict=True)
                if cached
                for shard in part.manifest.shards
            )
        self._planned: dict[int, tuple[SampleLocation, Span | None]] = {}
        self._looked_up: deque[SampleLocation] = deque()
        self._next, self._taken = 0, 0
        self._live: dict[tuple[int, int], list[Span]] = defaultdict(list)  # by part and shard: those not yet let go
        self._held, self._group = 0, min(FIRST_GROUP, self._limit // 2)
        self._ended = False
        self._closed = threading.Event()
        self._change = threading.Condition()

    def take(self, first: int, end: int) -> list[RawSample | BadSample]:
        """The samples of turns first to end, each turn once. Waits for their bytes. A bad one stands for itself."""
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
            for place, span in planned:
                try:
                    taken.append(self._local_sample(place) if span is None else self._remote_sample(place, span))
                except BadSample as error:
                    taken.append(error)
        return taken

    def _local_sample(self, place: SampleLocation) -> RawSample:
        view = self._source.mapped(place)
        assert view is not None
        return self._source.check(place, view)

    def _remote_sample(self, place: SampleLocation, span: Span) -> RawSample:
        assert span.data is not None
        try:
            whole = span.data.result()
            return self._checked(place, whole[place.start - span.start : place.stop - span.start])
        finally:
            with self._change:
                span.left -= 1
                if span.left == 0:
                    self._held -= span.stop - span.start
                    self._live[span.part, span.shard].remove(span)
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
        """Plan one more group if less than half of what may be held is; whether it did. With the lock held."""
        if self._closed.is_set():
            raise CancelledError
        if self._ended or self._next - self._taken >= LOOK // 2 or self._held > self._limit // 2:
            return False
        group = self._gather()
        found = [None if self._local[place.part] else self._passing(place) for place in group]
        absent = [n for n, place in enumerate(group) if not self._local[place.part] and found[n] is None]
        for gap in (REQUEST, REQUEST // 4, NEXT):
            wanted, each = spans([group[n] for n in absent], gap)
            size = sum(span.stop - span.start for span in wanted)
            if self._held + size <= self._limit:
                break
        self._held += size
        for span in wanted:
            self._live[span.part, span.shard].append(span)
            span.data = self._pool.submit(self._fetch, span)
        for n, span in zip(absent, each, strict=True):
            found[n] = span
        for place, one in zip(group, found, strict=True):
            self._planned[self._next] = (place, one)
            self._next += 1
        self._group = min(self._group * 2, self._limit * 3 // 8)
        self._change.notify_all()
        return bool(group)

    def _passing(self, place: SampleLocation) -> Span | None:
        """The span, asked for already, in whose bytes this sample lies: in a gap that was read along."""
        for span in self._live[place.part, place.shard]:
            if span.start <= place.start and place.stop <= span.stop:
                span.left += 1
                return span
        return None

    def _gather(self) -> list[SampleLocation]:
        """The next turns, up to a group's bytes, and one at least."""
        group: list[SampleLocation] = []
        size, looked_up = 0, 0
        while (not group or size < self._group) and len(group) < LOOK // 2:
            if not self._looked_up:
                if group and looked_up >= LOOK_STEPS:
                    break
                numbers = next(self._turns, None)
                if numbers is None:
                    self._ended = True
                    break
                looked_up += 1
                self._looked_up.extend(self._source.locate(numbers))
                continue
            place = self._looked_up.popleft()
            group.append(place)
            size += 0 if self._local[place.part] else place.stop - place.start
        return group

    def _fetch(self, span: Span) -> memoryview:
        part = self._source.datasets[span.part]
        shard = part.manifest.shards[span.shard]

        def fetch(start: int, stop: int) -> memoryview:
            return part.read(span.shard, start, stop, self._closed)

        if self.cache is None or not self._cached[span.part]:
            return fetch(span.start, span.stop)
        return memoryview(self.cache.read(_content(part, shard), shard.size, span.start, span.stop, fetch))

    def _checked(self, place: SampleLocation, data: memoryview) -> RawSample:
        """Check a sample. Wrong bytes are fetched again, past the cache, until they are right or come twice alike."""
        for _ in range(FETCHES - 1):
            try:
                return self._source.check(place, data)
            except BadSample:
                if self.cache is not None and self._cached[place.part]:
                    part = self._source.datasets[place.part]
                    self.cache.drop(_content(part, part.manifest.shards[place.shard]), place.start, place.stop)
                self._source.traffic.add(retry="checksum")
                before, data = data, self._source.fetch(place)
                if data == before:
                    break  # so they lie in the store
        return self._source.check(place, data)


def _content(part: Dataset, shard: Shard) -> str:
    """What names a shard in the cache: where it lies, and its checksum."""
    return f"{part.store.url}/{shard.name} {shard.sha256}"


def _open_cache(recipe: StreamSettings) -> NodeCache:
    assert recipe.cache is not None
    folder = Path(os.path.expanduser(os.path.expandvars(recipe.cache.folder)))
    return NodeCache(folder, int(recipe.cache.gigabytes * 1e9))


def _through_cache(source: Source, recipe: StreamSettings, share: float, passes: float) -> list[bool]:
    """For each dataset, whether its blocks go through the node's cache: where that makes the node fetch less.

    Through the cache every block is fetched whole, once, and what was not kept again in each pass. Without it, the
    node fetches `share` of the samples, those of its ranks, in every pass, each at the cost of its bytes and a request.
    """
    if recipe.cache is None:
        return [False] * len(source.datasets)
    far = [
        part.store.folder is None or (recipe.cache.folders and not part.store.on_local_disk) for part in source.datasets
    ]
    sizes = [sum(shard.size for shard in part.manifest.shards) for part in source.datasets]
    total = sum(size for size, is_far in zip(sizes, far, strict=True) if is_far)
    room = recipe.cache.gigabytes * 1e9
    lost = 1 - min(1.0, room / max(1, total))
    largest = max(shard.size for part in source.datasets for shard in part.manifest.shards)
    if lost and (recipe.window is None or recipe.window * largest > room):
        return [False] * len(source.datasets)  # a block would be gone before the turn of its other samples comes
    decisions = []
    for part, size, is_far in zip(source.datasets, sizes, far, strict=True):
        apart = share * (1 + REQUEST * part.manifest.samples / size)  # in each pass, as a part of the dataset's bytes
        decisions.append(is_far and 1 + (passes - 1) * lost * apart <= passes * apart)
    return decisions
