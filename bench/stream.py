"""How fast shuffled samples come from shards: ours beside other projects' readers, and beside the decoder alone.

    python -m bench.stream [--json] [--quick] [--data DIR] [--rounds N]

All of them read the same 20,000 gray JPEGs (bench/corpus.py), from the same tars or from what their own tools make of
these, out of the page cache. Every measurement is one shuffled epoch in a process of its own, after a warm-up, and they
take turns, so that whatever else the machine does slows all of them alike. Ratios are medians over the rounds of the
ratios within a round. --quick takes 2,000 images, one round, and of the peers webdataset alone, which needs no
environment of its own: to see that the measurements run; its figures say little.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import corpus, peers, report
from radhpc.core.errors import UserError
from radhpc.core.image_decoding import decode
from radhpc.core.manifest import Manifest
from radhpc.core.recipe import Stage, StreamSettings
from radhpc.data.source import RawSample, Source
from radhpc.data.stream import Stream, StreamSpec, stage_sampler
from radhpc.distributed.malloc import keep_freed_memory
from radhpc.storage.store import Store

NOTES = """\
raw: one process without workers; the bytes of each JPEG and its JSON, read. radhpc has checked them against the crc32c.
decoded: to 8-bit gray by the same decoder (imagecodecs.jpeg8_decode; radhpc through its own transforms.decode), on the
same cores: radhpc in two threads; peers in two worker processes of their own loaders and in two threads (their own,
where they have any), of which the better counts.
decoder alone: radhpc.core.image_decoding.decode in two threads over the same JPEGs, in memory, in turn with our stream.
webdataset: shuffle(1000) over shuffled shards. litdata: chunks as large as a tar, shuffled, drop_last=False; its
samples are views of a mapped file, copied for raw, as otherwise nobody would have read them ("unread views").
mds: py1e, local shards. energon: prepared tars, buffer of 1000. grain: it has no source for tars, so MapDataset over
a random-access source of tar members in plain Python, shuffled as a whole; indexed before the clock starts.
The clock runs from the first sample of an epoch to its last, so that nobody's start counts."""

THREADS = 2
PIECE, PIECES = 3000, 7  # samples that the decoder alone and the stream take in turn, and how often
LIMIT = 300  # seconds of one measurement
SEED = 7
RECIPE = StreamSettings.model_validate({"threads": THREADS})
STAGE = Stage.model_validate(
    {"name": "bench", "epochs": 1, "batch": 64, "train": (".*",), "optimizer": {"learning_rate": 1.0}}
)


def ours_raw(folder: str) -> Iterator[RawSample]:
    """One shuffled epoch of ours: each sample's members, checked."""
    source = Source((folder,), "train")
    return source.read_raw(stage_sampler(source, 0, RECIPE, SEED).at(np.arange(len(source))).sample)


def ours_decode(folder: str) -> Iterator[tuple[Any, bytes]]:
    """The same with pixels instead of the JPEG: the steps of training, with a reader that does no more than that."""
    source = Source((folder,), "train")
    stream = Stream(source, Pixels(), StreamSpec(STAGE, 0, RECIPE, SEED))
    for step in stream:
        for batch in step.micro_batches:
            for row in batch:
                yield row.image, row.described
    stream.close()


class Row(NamedTuple):
    """A sample of ours, decoded, with what the stream asks of a row."""

    key: str
    image: Any
    described: bytes
    supervised: int = 1
    length: int = 1


class Pixels:
    """Members to pixels, and rows to a list."""

    def read(self, raw: RawSample) -> Row:
        members = dict(raw.members)
        return Row(raw.key, decode(members["0.jpg"]), bytes(members["json"]))

    def empty(self) -> Row:
        return Row("", None, b"", 0, 0)

    def batch(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.key]


def beside(folder: str) -> dict[str, float]:
    """Seconds per sample of the decoder alone, over JPEGs that lie in memory, and of our stream, on as many threads.

    Short pieces in turn, and the least of each: what else the machine does would otherwise decide. A piece of the
    stream counts from its first step to its last, when all threads have work and nothing was decoded for later.
    """
    source = Source((folder,), "train")
    count = min(PIECE, len(source)) // STAGE.batch * STAGE.batch
    stage = STAGE.model_copy(update={"epochs": None, "steps": count // STAGE.batch})
    numbers = stage_sampler(source, 0, RECIPE, SEED).at(np.arange(count)).sample
    jpegs = [bytes(dict(raw.members)["0.jpg"]) for raw in source.read_raw(numbers)]
    pieces = [jpegs[at : at + STAGE.batch] for at in range(0, count, STAGE.batch)]

    def decoded(some: list[bytes]) -> int:
        return sum(_area(decode(jpeg)) for jpeg in some)

    def alone() -> float:
        with ThreadPoolExecutor(THREADS) as pool:
            done = pool.map(decoded, pieces)
            next(done)
            started = time.perf_counter()
            sum(done)
            return (time.perf_counter() - started) / (count - STAGE.batch)

    def ours() -> float:
        stream = Stream(source, Pixels(), StreamSpec(stage, 0, RECIPE, SEED))
        steps = iter(stream)
        next(steps)
        started = time.perf_counter()
        rest = sum(len(step.keys) for step in steps)
        seconds = time.perf_counter() - started
        stream.close()
        assert rest == count - STAGE.batch
        return seconds / rest

    times = [(alone(), ours()) for _ in range(PIECES if len(source) > PIECE else 2)]
    return {"alone": min(time for time, _ in times), "ours": min(time for _, time in times)}


def _area(image: Any) -> int:
    assert image.mode == "L"
    return int(image.width * image.height)


def measure(what: str, folder: str) -> dict[str, float]:
    """One of our own measurements, in this process: samples, seconds, and bytes as bench/readers.py counts them."""
    keep_freed_memory()  # as a job does
    if what == "beside":
        return beside(folder)
    for _ in itertools.islice(ours_raw(folder) if what == "raw" else ours_decode(folder), 200):
        pass
    samples = size = 0
    started = 0.0
    if what == "raw":
        for raw in ours_raw(folder):
            started = started or time.perf_counter()
            samples += 1
            size += sum(len(data) for _, data in raw.members)
    else:
        for image, described in ours_decode(folder):
            started = started or time.perf_counter()
            samples += 1
            size += _area(image) + len(described)
    return {"samples": samples, "seconds": time.perf_counter() - started, "bytes": size}


def main() -> None:
    parser = report.parser("stream", __doc__, "2,000 images, one round, webdataset alone")
    parser.add_argument("--data", type=Path, help="keep the images and their conversions in this folder")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything takes its turn (3)")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    if arguments.rounds < 1:
        parser.error(f"--rounds: {arguments.rounds}: allowed are 1 and more")
    with ExitStack() as stack:
        place = arguments.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="radhpc-bench-")))
        ratios, figures = compare(place, arguments.quick, 1 if arguments.quick else arguments.rounds)
    report.show("Shuffled samples from shards", ratios, figures, NOTES, arguments.json)


def compare(place: Path, quick: bool, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Make the data, let everyone take turns, and return ratios and figures."""
    interpreter = Path(sys.executable) if quick else peers.python()
    names = ("webdataset",) if quick else peers.PEERS
    count = 2_000 if quick else 20_000
    _say(f"making {count:,} images")
    tars = corpus.make(place / f"tars-{count}", count, 1000)
    figures: dict[str, float] = {}
    folders = {}
    for peer in names:
        folders[peer] = place / f"{peer}-{count}"
        if not (done := folders[peer].with_suffix(".converted")).exists():
            _say(f"converting for {peer}")
            answer = _asked(
                peer, {"do": "convert", "tars": str(tars), "where": str(folders[peer]), "per_shard": 1000}, interpreter
            )
            done.write_text(str(answer["seconds"]))
        figures[f"seconds to convert, {peer}"] = float(done.read_text())
    tasks = _tasks(tars, folders, interpreter)
    wanted = _wanted(tars)
    rates: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds):
        for name, task in tasks.items():
            _say(f"round {number + 1} of {rounds}: {name}")
            for folder in (tars, *folders.values()):
                _warm(folder)
            found = task()
            raw = name.startswith(("raw", "unread"))
            assert found["samples"] == count, f"{name}: {found['samples']} of {count} samples came"
            assert found["bytes"] == wanted["raw" if raw else "decoded"], f"{name}: other bytes than were written"
            rates[name].append(found["samples"] / found["seconds"])
    _say("decoder alone")
    apart = _ours("beside", tars)
    ratios = {"decoded samples per second, radhpc / decoder alone": apart["alone"] / apart["ours"]}
    figures |= {"microseconds per sample, decoder alone": apart["alone"] * 1e6}
    return ratios | _ratios(rates, names), figures | {
        f"samples per second, {name}": statistics.median(some) for name, some in rates.items()
    }


def _tasks(tars: Path, folders: dict[str, Path], interpreter: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What takes turns, by name; each runs in a process of its own."""

    def ours(what: str) -> Callable[[], dict[str, Any]]:
        return lambda: _ours(what, tars)

    def theirs(peer: str, do: str) -> Callable[[], dict[str, Any]]:
        return lambda: _asked(peer, {"do": do, "where": str(folders[peer])}, interpreter)

    tasks = {"raw, radhpc": ours("raw")}
    tasks |= {f"raw, {peer}": theirs(peer, "raw") for peer in folders}
    if "litdata" in folders:
        tasks["unread views, litdata"] = theirs("litdata", "views")
    tasks |= {"decoded, radhpc": ours("decoded")}
    for peer in folders:
        tasks |= {f"decoded by two {do}, {peer}": theirs(peer, do) for do in ("workers", "threads")}
    return tasks


def _ratios(rates: dict[str, list[float]], names: tuple[str, ...]) -> dict[str, float]:
    def median(own: list[float], other: list[float]) -> float:
        return statistics.median(mine / theirs for mine, theirs in zip(own, other, strict=True))

    ratios = {f"raw samples per second, radhpc / {peer}": median(rates["raw, radhpc"], rates[f"raw, {peer}"])
              for peer in names}  # fmt: skip
    decoded = rates["decoded, radhpc"]
    for peer in names:
        ways = [rates[f"decoded by two {do}, {peer}"] for do in ("workers", "threads")]
        better = max(ways, key=statistics.median)
        ratios[f"decoded samples per second, radhpc / {peer}"] = median(decoded, better)
    return ratios


def _wanted(tars: Path) -> dict[str, int]:
    """The bytes that an epoch must have: of the members, and of pixels and JSONs."""
    store = Store(tars)
    index = Manifest.load(store).load_index(store)
    described = index.length[index.suffix == b"json"].sum()
    source = Source((str(tars),), "train")
    area = sum(view.width * view.height for sample in source.samples() for view in sample.images)
    return {"raw": int(index.length.sum()), "decoded": int(described) + area}


def _warm(folder: Path) -> None:
    """Have all files in the page cache."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _ours(what: str, tars: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.stream", "--measure", what, str(tars)]
    found = subprocess.run(command, cwd=peers.ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


def _asked(peer: str, request: dict[str, Any], interpreter: Path) -> dict[str, Any]:
    called = peers.call(peer, request, LIMIT, interpreter)
    if called.answer is None:
        raise UserError(
            f"{peer}: {request['do']}: {'hung' if called.hung else 'failed'}: {called.said[-2000:].strip()}"
        )
    return called.answer


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    report.run(main)
