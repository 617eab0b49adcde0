"""The order of samples: what a position costs at a billion samples, what the window costs in shuffle quality, and what
a job of 1,000 nodes would ask of an object store.

    python -m bench.order [--json] [--quick]

Nothing is read here: the costs are measured in fresh processes on the real Sampler; the quality is counted on its
positions, beside webdataset's shuffle in plain code; the traffic is simulated with the real Sampler, BatchPlan and
fetch.spans. --quick takes a hundredth of the samples, and requests of one window, to see that it runs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from bench import report
from radhpc.core.recipe import StreamSettings
from radhpc.data import prefetch
from radhpc.data.sampler import Positions, Sampler
from radhpc.data.source import RawSample, SampleLocation
from radhpc.data.stream import BatchPlan
from radhpc.storage.node_cache import BLOCK, RENEWAL, RUN

ROOT = Path(__file__).parent.parent
LIMIT = 100  # seconds of one measurement
SEED = 7
WINDOWS: tuple[int | None, ...] = (64, 256, None)

# Cost
SAMPLES, SHARDS = 10**9, 10**6
MIXTURE = (0.6, 0.5), (0.3, 0.3), (0.1, 0.2)  # of three datasets: part of the samples, weight
CHUNKS = 256, 4096
PLACES, ROUNDS = 8, 7  # chunks in a round; of the rounds the fastest counts

# Quality
HOSPITALS, HELD = 400, 1000  # shards, samples of each
STUDIES = 4  # of a patient, one behind the other
BATCH = 256
QUALITY_WINDOWS: tuple[int | None, ...] = (4, 16, 64, 256, None)
BUFFER, WORKERS = 5000, 8  # of webdataset

# Traffic
RANKS = 8  # of a node
SAMPLE, HEADERS = 150_000, 2048  # bytes of a sample in the mean, and of its headers in the tar
ARCHIVE, PER_SHARD = 100_000_000, 1700  # 1,700 samples of 150 kB are a shard of about 256 MB
STEP = 5.0  # seconds
GRANTED = 5500  # GET requests per second and prefix: Amazon S3 user guide, "Optimizing Amazon S3 performance"
KEPT = 100  # GB of the node cache, where it is smaller than the archive
MICRO_BATCH = 8
TURNS = 4096  # of each rank that are counted, and on to a whole step
GROUP = 3 / 8  # of prefetch_megabytes: what Prefetcher plans at a time once it is under way
TAKE = 8  # turns that are decoded at a time
ZEROS = bytes(64 << 20)  # what samples consist of
TOPOLOGIES = (
    (1000, RANKS, (8000, 64_000)),
    (1, RANKS, (256, 8000, 64_000)),
    (1, 1, (256, 8000)),
)  # nodes, ranks, batches

NOTES = f"""\
cost: process time, least of {ROUNDS} rounds over {PLACES} random places within an opened epoch. Memory is the growth
of the resident set's peak (VmHWM) in a fresh process, from before the Sampler is made to after all calls: its shard
counts and one open epoch, or of the mixture all that two epochs' worth of draws opens.

quality: an archive of {HOSPITALS} shards of {HELD:,} samples in the order of its hospitals, {STUDIES} studies of a
patient one behind the other, batches of {BATCH}. spread: standard deviation of the batch means of a label that rises
linearly over the archive, divided by a full shuffle's, sqrt((N - b) / (N - 1) / 12 b). estimate, of clusters:
sqrt(1 + {BATCH} / window - {BATCH} / {HELD}). together: chance that two studies of a patient are in one batch, and the
same divided by a full shuffle's, (b - 1) / (N - 1). neighbours: mean distance of archive neighbours, as a part of the
epoch (a full shuffle's is 1/3).
"built by launch.py": rows in the order of salted hashes, as shards/listing.py writes them.
webdataset: shards permuted and read one behind the other through a buffer of {BUFFER:,} samples that is full before the
first leaves; {WORKERS} workers have every {WORKERS}th shard and a buffer each, and take turns sample by sample.

traffic: shards of {PER_SHARD:,} samples of {SAMPLE / 1e3:.0f} kB in the mean (log-normal, sigma 0.5); the real
Prefetcher of each rank (of two, where there are thousands), from the start of a run, over whole steps. Estimates:
bytes = samples x size; requests = samples x (1 / m + (1 - 1 / m) x (1 - d) ** (1 + gap / size)), where m is how many
samples of a group are neighbours in a shard, d the part of such a stretch that the group wants, {prefetch.REQUEST:,}
bytes the gap.
With a node cache, requests = bytes / {BLOCK >> 20} MiB. "cache, all fits": the first pass, under way (what the window
had before is there; without a window the first steps, from an empty cache). "cache of {KEPT} GB": that much of the
archive is there, and the rest is turned away, but for 1 / {RENEWAL} (radhpc/storage/node_cache.py). prefetch.py uses
the cache only where its own rule says so. requests/s: of all nodes, at a step time of {STEP:g} s; S3 grants
{GRANTED:,} a prefix."""


# Cost


def _mixed(mixture: bool, samples: int, shards: int, window: int | None) -> Sampler:
    """One dataset or three, whose shards hold between 0.9 and 1.1 of the mean."""
    parts = MIXTURE if mixture else ((1.0, 1.0),)
    counts = []
    for part, _ in parts:
        number = round(shards * part)
        mean = samples // shards
        held = np.random.default_rng(number).integers(mean - mean // 10, mean + mean // 10, number, endpoint=True)
        off = round(samples * part) - int(held.sum())
        held += off // number
        held[: off % number] += 1
        counts.append(held)
    return Sampler(counts, f"seed {SEED}", window, [weight for _, weight in parts] if mixture else None)


def measure(mixture: bool, window: int | None, samples: int, shards: int) -> dict[str, float]:
    """Cost of one order, in this process."""
    rng = np.random.default_rng(SEED)
    before = _peak()
    order = _mixed(mixture, samples, shards, window)
    starts = rng.integers(0, len(order) - max(CHUNKS), PLACES)
    if mixture:
        order.at(np.arange(1000))  # the schedule is computed once in a process, whatever the size
        order = _mixed(mixture, samples, shards, window)
    started = time.process_time()
    order.at(np.arange(1000))  # draws of each dataset
    opening = time.process_time() - started
    for start in (0, len(order) - max(CHUNKS)):
        order.at(np.arange(start, start + max(CHUNKS)))  # an epoch of a dataset more, in a mixture

    def chunks(length: int) -> None:
        for start in starts:
            order.at(np.arange(start, start + length))

    least = report.interleaved({str(length): lambda length=length: chunks(length) for length in CHUNKS}, ROUNDS)  # type: ignore[misc]
    found = {f"us, chunks of {length}": least[str(length)] / PLACES / length * 1e6 for length in CHUNKS}
    return found | {"seconds to open an epoch": opening, "MB": (_peak() - before) / 1e6}


def _peak() -> int:
    """Bytes: the most that this process has had resident. Unlike getrusage's, it does not begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def cost(quick: bool) -> dict[str, dict[str, float]]:
    """By order: what measure() found in a process of its own."""
    scale = 100 if quick else 1
    found = {}
    for mixture in (False, True):
        for window in (64, None):
            arguments = [str(int(mixture)), str(window), str(SAMPLES // scale), str(SHARDS // scale)]
            command = [sys.executable, "-m", "bench.order", "--measure", *arguments]
            answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
            name = f"{'three datasets' if mixture else 'one dataset'}, {_window(window)}"
            found[name] = cast(dict[str, float], json.loads(answer.stdout))
    return found


# Quality


class Quality(NamedTuple):
    """Of one way to shuffle; explained in NOTES."""

    shards: float
    spread: float
    together: float
    neighbours: float


def ours(window: int | None, seed: int, hospitals: int) -> Positions:
    """One epoch of the real order."""
    order = Sampler([[HELD] * hospitals], f"seed {seed}", window, None)
    return order.at(np.arange(len(order))).sample


def webdataset(workers: int, seed: int, hospitals: int) -> Positions:
    """One epoch through webdataset's shuffle of samples, behind one of shards."""
    rng = np.random.default_rng(seed)
    shards = rng.permutation(hospitals)
    rows = []
    for worker in range(workers):
        mine = shards[worker::workers]
        rows.append(_buffered((mine[:, None] * HELD + np.arange(HELD)).ravel(), BUFFER, rng))
    length = max(map(len, rows))
    table = np.full((length, workers), -1)
    for worker, row in enumerate(rows):
        table[: len(row), worker] = row
    return np.asarray(table.ravel()[table.ravel() >= 0])


def _buffered(row: Positions, size: int, rng: np.random.Generator) -> Positions:
    """A buffer of `size` samples, one of which leaves for each that comes; at the end all of them."""
    size = min(size, len(row))
    buffer, rest = row[:size].tolist(), row[size:].tolist()
    left = []
    for place, sample in zip(rng.integers(0, size, len(rest)).tolist(), rest, strict=True):
        left.append(buffer[place])
        buffer[place] = sample
    return np.asarray(left + [buffer[place] for place in rng.permutation(size)], np.int64)


def quality(epoch: Positions, batch: int = BATCH) -> Quality:
    """Judge one epoch: a permutation of an archive in shards of HELD samples. A last, smaller batch is left out."""
    n = len(epoch)
    place = np.empty(n, np.int64)
    place[epoch] = np.arange(n)
    batches = epoch[: n // batch * batch].reshape(-1, batch)
    shards = np.sort(batches // HELD, axis=1)
    full = np.sqrt((n - batch) / (n - 1) / 12 / batch)
    of = (place // batch)[: n // STUDIES * STUDIES].reshape(-1, STUDIES)
    pairs = [of[:, i] == of[:, j] for i in range(STUDIES) for j in range(i)]
    return Quality(
        float((np.diff(shards, axis=1) > 0).sum(axis=1).mean() + 1),
        float(np.sqrt((((batches.mean(axis=1) + 0.5) / n - 0.5) ** 2).mean()) / full),
        float(np.mean(pairs)),
        float(np.abs(np.diff(place)).mean() / n),
    )


def qualities(quick: bool) -> dict[str, Quality]:
    """By way to shuffle, the mean over seeds."""
    hospitals, seeds = (40, 1) if quick else (HOSPITALS, 2)
    built = np.random.default_rng(SEED).permutation(hospitals * HELD)  # what a salted hash makes of an archive's order
    ways = {_window(window): [ours(window, seed, hospitals) for seed in range(seeds)] for window in QUALITY_WINDOWS}
    ways["window 64, built by launch.py"] = [built[epoch] for epoch in ways["window 64"]]
    for workers in (1, WORKERS):
        name = f"webdataset, {workers} worker{'s' * (workers > 1)}"
        ways[name] = [webdataset(workers, seed, hospitals) for seed in range(seeds)]
    return {name: Quality(*np.mean([quality(epoch) for epoch in ways[name]], axis=0)) for name in ways}


# Traffic


class Archive:
    """One dataset of samples in shards, without their bytes: all shards have the same layout."""

    def __init__(self, samples: int) -> None:
        self.shards = samples // PER_SHARD
        self.samples = self.shards * PER_SHARD
        rng = np.random.default_rng(SEED)
        self._text = rng.integers(200, 2000, (PER_SHARD, 97))  # bytes, of shards in turn
        lengths = rng.lognormal(0.0, 0.5, PER_SHARD)
        self._lengths = np.maximum(1, lengths / lengths.mean() * (SAMPLE - HEADERS)).astype(np.int64)
        self._stops = np.cumsum(self._lengths + HEADERS)
        self.shard_bytes = int(self._stops[-1])

    def sizes(self, numbers: Positions) -> npt.NDArray[np.int64]:
        """As Source.sizes: one image each, and text of some length that has nothing to do with its place."""
        text = self._text[numbers % PER_SHARD, numbers // PER_SHARD % len(self._text[0])]
        return np.stack([np.ones(len(numbers), np.int64), text], axis=1)

    def bytes(self, numbers: Positions) -> tuple[Positions, Positions, Positions]:
        """(shard, start, stop) of each sample."""
        rows = numbers % PER_SHARD
        return numbers // PER_SHARD, self._stops[rows] - self._lengths[rows], self._stops[rows]

    def locate(self, numbers: Positions) -> list[SampleLocation]:
        """As Source.locate, without members."""
        columns = (column.tolist() for column in (numbers, *self.bytes(numbers)))
        return [
            SampleLocation(number, "", 0, shard, start, stop, ())
            for number, shard, start, stop in zip(*columns, strict=True)
        ]

    def blocks(self, numbers: Positions) -> set[tuple[int, int]]:
        """Blocks of the node cache that hold bytes of these samples: shard and place in it."""
        shard, start, stop = self.bytes(numbers)
        longest = int((stop - start).max()) // BLOCK + 2
        every = start[:, None] // BLOCK + np.arange(longest)
        wanted = every * BLOCK < stop[:, None]
        flat = np.unique((shard[:, None] << 32 | every)[wanted])
        return set(zip((flat >> 32).tolist(), (flat & 0xFFFFFFFF).tolist(), strict=True))


def pieces(order: Sampler, archive: Archive, start: int, length: int) -> Iterator[tuple[Positions, Any]]:
    """Numbers and sizes from `start` on, `length` at a time."""
    while True:
        numbers = order.at(np.arange(start, start + length)).sample
        yield numbers, archive.sizes(numbers)
        start += length


def turns(piece: tuple[Positions, Any], plan: BatchPlan, rank: int) -> Positions:
    """One rank's samples in a piece, in the order of its turns."""
    numbers, sizes = piece
    cuts = [slice(at, at + plan.batch) for at in range(0, len(numbers), plan.batch)]
    return np.concatenate([plan.rank_samples(numbers[cut], sizes[cut], rank) for cut in cuts])


class Request(NamedTuple):
    """One ranged read of a shard."""

    shard: int
    start: int
    stop: int


class Simulated:
    """The source and the store that a Prefetcher reads from: samples without content, and a note of each request."""

    def __init__(self, archive: Archive, requests: list[Request]) -> None:
        self._requests = requests
        self.locate = archive.locate
        store = SimpleNamespace(on_local_disk=False, url="")
        self.datasets = [SimpleNamespace(store=store, manifest=SimpleNamespace(shards=_Shards()), read=self._read)]

    def check(self, place: SampleLocation, data: memoryview) -> RawSample:
        assert len(data) == place.stop - place.start
        return RawSample(place.key, [])

    def _read(self, shard: int, start: int, stop: int, given_up: object) -> memoryview:
        self._requests.append(Request(shard, start, stop))
        return memoryview(ZEROS)[: stop - start]


class _Shards:
    """A manifest's shards, which are alike."""

    def __getitem__(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(name=str(number))


def requested(archive: Archive, ranks: Sequence[Positions], recipe: StreamSettings) -> list[Request]:
    """What the real Prefetcher of each rank asks for these turns, the ranks side by side."""
    requests: list[Request] = []
    source = cast(Any, Simulated(archive, requests))
    ahead = [
        prefetch.Prefetcher(source, iter(np.split(numbers, range(256, len(numbers), 256))), recipe) for numbers in ranks
    ]
    for first in range(0, len(ranks[0]), TAKE):
        for numbers, one in zip(ranks, ahead, strict=True):
            one.take(first, min(first + TAKE, len(numbers)))
    for one in ahead:
        one.close()
    return requests


class Kept:
    """The node cache's blocks, by name: of all that come, or of a part that is held while the rest is turned away."""

    def __init__(self, archive: Archive, seen: set[tuple[int, int]], part: float) -> None:
        self._archive, self._part = archive, part
        self._there = {block for block in seen if self._admits(block)}

    def _admits(self, block: tuple[int, int]) -> bool:
        return self._part >= 1 or self._held(block) or hash((*block, 1)) % RENEWAL == 0

    def _held(self, block: tuple[int, int]) -> bool:
        return self._part < 1 and hash(block) % 10**6 < self._part * 10**6

    def ask(self, wanted: Request) -> Iterator[Request]:
        """As NodeCache.read: runs of missing blocks that are alike, whole if they are kept, else what is wanted."""
        run: list[int] = []
        kept = False
        for at in range(wanted.start // BLOCK, -(-wanted.stop // BLOCK) + 1):
            block = wanted.shard, at
            missing = at * BLOCK < wanted.stop and block not in self._there and not self._held(block)
            if run and (not missing or len(run) == RUN or self._admits(block) != kept):
                first, last = run[0] * BLOCK, min((run[-1] + 1) * BLOCK, self._archive.shard_bytes)
                yield Request(
                    wanted.shard, *((first, last) if kept else (max(first, wanted.start), min(last, wanted.stop)))
                )
                run = []
            if missing:
                kept = self._admits(block)
                run.append(at)
                if kept:
                    self._there.add(block)


def through(kept: Kept, requests: Sequence[Request]) -> list[Request]:
    """What the node cache asks of the store for these reads."""
    return [asked for request in requests for asked in kept.ask(request)]


class Row(NamedTuple):
    """One line of the table of traffic; per node and global batch unless it says otherwise."""

    name: str
    requests: float
    estimate: float
    gigabytes: float
    wanted: float
    overread: float
    per_second: float  # of the whole job
    shards: float  # of one global batch, over all nodes


def traffic(quick: bool) -> list[Row]:
    """Simulate what nodes ask of a store."""
    archive = Archive(ARCHIVE // (100 if quick else 1))
    rows = []
    for window in (64,) if quick else WINDOWS:
        order = Sampler([[PER_SHARD] * archive.shards], f"seed {SEED}", window, None)
        for nodes, ranks, batches in TOPOLOGIES:
            rows += _asked(
                order,
                archive,
                window,
                nodes,
                ranks,
                batches,
                TURNS // 16 if quick else TURNS // 4 if nodes > 1 else TURNS,
            )
    return rows


def _asked(
    order: Sampler, archive: Archive, window: int | None, nodes: int, ranks: int, batches: Sequence[int], least: int
) -> list[Row]:
    """One topology: a row for each batch, and for each state of a node cache. `least`: turns of each rank."""
    recipe, world = StreamSettings.model_validate({"window": window}), nodes * ranks
    plans = [BatchPlan(archive.samples, batch, min(MICRO_BATCH, -(-batch // world)), world) for batch in batches]
    some = [0, world // 2 + 3] if nodes > 1 else list(range(ranks))  # without a cache, ranks are alike
    start = archive.samples // 2 // max(batches) * max(batches)
    wanted = {plan.batch: _turns(least, plan) for plan in plans}
    dealt: dict[tuple[int, int], Positions] = {
        (batch, rank): np.zeros(0, np.int64) for batch in batches for rank in some
    }
    shards: dict[int, int] = {}
    for piece in pieces(order, archive, start, max(batches)):
        waiting = [plan for plan in plans if len(dealt[plan.batch, some[0]]) < wanted[plan.batch]]
        if not waiting:
            break
        for plan in waiting:
            shards.setdefault(plan.batch, len(np.unique(piece[0][: plan.batch] // PER_SHARD)))
            for case in ((plan.batch, rank) for rank in some):
                dealt[case] = np.concatenate([dealt[case], turns(piece, plan, case[1])])[: wanted[plan.batch]]
    group = (recipe.prefetch_megabytes << 20) * GROUP / SAMPLE
    # Under way: what came in the window's earlier blocks has been asked for.
    earlier = np.arange(start - (window or 0) * PER_SHARD, start)
    seen = archive.blocks(order.at(earlier).sample) if nodes == 1 and ranks > 1 and window else set()
    rows = []
    for plan in plans:
        each = [dealt[plan.batch, rank] for rank in some]
        requests = requested(archive, each, recipe)
        numbers = np.concatenate(each)
        _, starts, stops = archive.bytes(numbers)
        estimate = expected(window, group, plan)
        caches: list[tuple[str, float | None]] = [("", None)]
        if nodes == 1 and ranks > 1:
            part = KEPT * 1e9 / (archive.shards * archive.shard_bytes)
            caches += [(", cache, all fits", 1.0), (f", cache of {KEPT} GB", part)]
        for name, part_kept in caches:
            asked = requests if part_kept is None else through(Kept(archive, seen, part_kept), requests)
            share = plan.batch / nodes / len(numbers)
            fetched = sum(request.stop - request.start for request in asked)
            rows.append(
                Row(
                    f"{world:,} rank{'s' * (world > 1)}, batch {plan.batch:,}, {_window(window)}{name}",
                    len(asked) * share,
                    plan.batch / nodes * (estimate if part_kept is None else SAMPLE / BLOCK),
                    fetched * share / 1e9,
                    plan.batch / nodes * SAMPLE / 1e9,
                    fetched / int((stops - starts).sum()),
                    len(asked) * share * nodes / STEP,
                    shards[plan.batch],
                )
            )
    return rows


def _turns(least: int, plan: BatchPlan) -> int:
    """A rank's turns in whole steps: `least` or more."""
    share = -(-plan.batch // plan.world)
    return -(-least // share) * share


def expected(window: int | None, group: float, plan: BatchPlan) -> float:
    """Requests for each sample, where a rank plans `group` samples at a time; the formula of NOTES.

    They lie among as many positions as all ranks take meanwhile, or as a step has, whose samples are sorted by length.
    Of p positions, a shard's stretch is p / window, and at least a run, of which a block has all.
    """
    among = max(group * plan.world, plan.batch)
    if window is None:
        stretch, density = float(PER_SHARD), group / plan.samples
    else:
        stretch = min(PER_SHARD, max(PER_SHARD, among) / window)
        density = group / among * min(1.0, among / PER_SHARD)
    together = max(1.0, stretch * density)
    apart = (1 - density) ** (1 + prefetch.REQUEST / SAMPLE)
    return float(1 / together + (1 - 1 / together) * apart)


def decisions(archive: Archive) -> dict[str, float]:
    """Whether a node cache of KEPT gigabytes is used: prefetch.py's own rule, 1 for yes."""
    shards = [SimpleNamespace(size=archive.shard_bytes)] * archive.shards
    store = SimpleNamespace(folder=None, on_local_disk=False)
    manifest = SimpleNamespace(shards=shards, samples=archive.samples)
    source = cast(Any, SimpleNamespace(datasets=[SimpleNamespace(store=store, manifest=manifest)]))
    recipe = StreamSettings.model_validate({"cache": {"folder": "unused", "gigabytes": KEPT}})
    return {
        f"node cache used, {nodes:,} nodes, {passes} passes": float(
            prefetch._through_cache(source, recipe, 1 / nodes, passes)[0]
        )
        for nodes in (1, 8, 1000)
        for passes in (1, 3)
    }


def startup(quick: bool) -> dict[str, float]:
    """Seconds of one core until a rank of 8,000 has planned its first look-ahead, all of which precedes its first
    sample: positions times the measured cost of order, sizes and batch plan.
    """
    archive, recipe = Archive(ARCHIVE), StreamSettings.model_validate({})
    order = Sampler([[PER_SHARD] * archive.shards], f"seed {SEED}", recipe.window, None)
    plan = BatchPlan(archive.samples, 8000, 1, 1000 * RANKS)
    order.at(np.arange(1))
    steps = 8 if quick else 40

    def some() -> None:
        for step in range(steps):
            numbers = order.at(np.arange(step * plan.batch, (step + 1) * plan.batch)).sample
            plan.rank_samples(numbers, archive.sizes(numbers), 0)

    seconds = report.interleaved({"": some}, 3)[""] / steps / plan.batch
    limit, held, group = recipe.prefetch_megabytes << 20, 0.0, float(prefetch.FIRST_GROUP)
    while held <= limit / 2:
        held, group = held + group, min(2 * group, limit * GROUP)
    return {
        "us per position, order and deal": seconds * 1e6,
        "seconds of computing before the first sample, 8,000 ranks": held / SAMPLE * plan.world * seconds,
        "seconds of computing in each step of 8,000": seconds * plan.batch,
    }


# What is printed


def _window(window: int | None) -> str:
    return "no window" if window is None else f"window {window}"


def _table(console: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right")
    for row in rows:
        table.add_row(*[cell if isinstance(cell, str) else _shown(cell) for cell in row])
    console.print(table)


def _shown(value: float) -> str:
    if value == 0 or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def main() -> None:
    parser = report.parser("order", __doc__, "a hundredth of the samples, to see that it runs")
    parser.add_argument("--measure", nargs=4, metavar="N", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        mixture, window, samples, shards = arguments.measure
        found = measure(mixture == "1", None if window == "None" else int(window), int(samples), int(shards))
        print(json.dumps(found))
        return
    console = Console(stderr=arguments.json, width=150)
    ratios, figures = _costs(console, arguments.quick)
    for some in (_qualities, _traffics):
        more, cells = some(console, arguments.quick)
        ratios |= more
        figures |= cells
    console.print(NOTES, highlight=False)
    if arguments.json:
        print(json.dumps({"ratios": ratios, "figures": figures, "machine": report.machine()}), flush=True)


Answer = tuple[dict[str, float], dict[str, float]]  # ratios and figures, by name


def _costs(console: Console, quick: bool) -> Answer:
    costs = cost(quick)
    names = list(next(iter(costs.values())))
    samples = SAMPLES // (100 if quick else 1)
    title = f"Cost at {samples:,} samples ({report.machine()})"
    _table(console, title, ["order", *names], [[name, *found.values()] for name, found in costs.items()])
    return {}, {f"{what}, {name}": value for name, found in costs.items() for what, value in found.items()}


def _qualities(console: Console, quick: bool) -> Answer:
    found = qualities(quick)
    full = (BATCH - 1) / ((40 if quick else HOSPITALS) * HELD - 1)
    rows: list[list[str | float]] = []
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    for name, one in found.items():
        width = int(name.split()[1]) if name.startswith("window") and "built" not in name else None
        estimate: str | float = "" if width is None else float(np.sqrt(1 + BATCH / width - BATCH / HELD))
        rows.append([name, one.shards, one.spread, estimate, one.together, one.together / full, one.neighbours])
        ratios[f"spread of batch means, {name} / full shuffle"] = one.spread
        ratios[f"two studies of a patient in one batch, {name} / full shuffle"] = one.together / full
        figures |= {f"shards in a batch of {BATCH}, {name}": one.shards}
        figures |= {f"distance of neighbours, part of the epoch, {name}": one.neighbours}
    columns = ["order", f"shards in {BATCH}", "spread", "estimate", "together", "/ full shuffle", "neighbours"]
    _table(console, "Shuffle quality on a sorted archive", columns, rows)
    return ratios, figures


def _traffics(console: Console, quick: bool) -> Answer:
    found = traffic(quick)
    columns = ["per node and batch", "requests", "estimate", "GB", "estimate", "over-read", "requests/s", "shards"]
    _table(console, "Simulated traffic", columns, [list(row) for row in found])
    cells = decisions(Archive(ARCHIVE)) | startup(quick)
    _table(console, "Beside it", ["figure", "value"], list(cells.items()))
    ratios = {f"bytes fetched / wanted, {row.name}": row.overread for row in found}
    ratios |= {f"requests per second / granted, {row.name}": row.per_second / GRANTED for row in found}
    cells |= {f"requests, {row.name}": row.requests for row in found}
    cells |= {f"requests by estimate, {row.name}": row.estimate for row in found}
    cells |= {f"GB, {row.name}": row.gigabytes for row in found}
    return ratios, cells | {f"shards in a global batch, {row.name}": row.shards for row in found}


if __name__ == "__main__":
    main()
