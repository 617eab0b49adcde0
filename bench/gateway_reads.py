"""How fast samples come out of an object store: our stream beside obstore's own fastest GET, on a real gateway.

    python -m bench.gateway_reads [--json] [--quick]

Starts Ceph's S3 gateway (bench/gateway.py), puts ten tars of 57 MB there (bench/corpus.py), and reads all of them: by
obstore in every way that it offers for large reads, and by our stream, shuffled, checked and cut into samples. They
take turns, each reading all of it EPOCHS times; ratios are medians over the rounds of our default against the fastest
of obstore's in the same round. The gateway and the readers share this machine's cores.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import corpus, report
from bench.gateway import Gateway
from bench.stream import SEED, STAGE, Pixels, Row
from radhpc.core.recipe import StreamSettings
from radhpc.data.source import RawSample, Source
from radhpc.data.stream import Stream, StreamSpec
from radhpc.storage.object_store import connect
from radhpc.storage.store import Store

NOTES = """\
obstore: the fastest of get().stream(), get().bytes() and 8 MiB get_range(), each whole shard, 2 and 8 at a time.
radhpc: the stream in its order, every byte checked, samples not decoded. All of it is read four times by each."""
RANGE = 8 << 20
EPOCHS = 4  # so that our first groups, which are small, weigh as little as in training


class Unread(Pixels):
    """Samples as they are."""

    def read(self, raw: RawSample) -> Row:
        return Row(raw.key, None, b"")


def ways(url: str, names: list[str], sizes: dict[str, int]) -> dict[str, Callable[[], None]]:
    """Every way to read all shards with obstore alone."""
    store = connect(url, retried=True)

    def streamed(name: str) -> None:
        for piece in store.get(name).stream():
            len(piece)

    def whole(name: str) -> None:
        len(store.get(name).bytes())

    def ranged(name: str, start: int) -> None:
        len(store.get_range(name, start=start, end=min(start + RANGE, sizes[name])))

    def by(threads: int, task: Callable[..., None], *arguments: list[object]) -> Callable[[], None]:
        def run() -> None:
            with ThreadPoolExecutor(threads) as pool:
                for _ in range(EPOCHS):
                    list(pool.map(task, *arguments))

        return run

    starts = [(name, start) for name in names for start in range(0, sizes[name], RANGE)]
    found: dict[str, Callable[[], None]] = {}
    for threads in (2, 8):
        found[f"obstore stream, {threads} at a time"] = by(threads, streamed, list(names))
        found[f"obstore bytes, {threads} at a time"] = by(threads, whole, list(names))
        found[f"obstore ranges, {threads} at a time"] = by(
            threads, ranged, [name for name, _ in starts], [start for _, start in starts]
        )
    return found


def measure(quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and figures."""
    with tempfile.TemporaryDirectory(prefix="radhpc-bench-") as folder, Gateway(Path(folder) / "gateway") as gateway:
        tars = corpus.make(Path(folder) / "tars", 1000 if quick else 10_000, 250 if quick else 1000)
        os.environ.update(gateway.environment)
        url = f"{gateway.bucket('bench')}/tars"
        store = Store(url)
        for path in sorted(tars.iterdir()):
            store.upload(path, path.name)
        sizes = {path.name: path.stat().st_size for path in sorted(tars.glob("*.tar"))}
        tasks = ways(url, list(sizes), sizes)
        sources: list[Source] = []
        stage = STAGE.model_copy(update={"epochs": EPOCHS})
        for requests in (8, 64):
            recipe = StreamSettings.model_validate({"threads": 1, "requests": requests})

            def ours(recipe: StreamSettings = recipe) -> None:
                sources.append(Source((url,), "train"))
                stream = Stream(sources[-1], Unread(), StreamSpec(stage, 0, recipe, SEED))
                assert sum(len(step.keys) for step in stream) == EPOCHS * len(sources[-1])
                stream.close()

            tasks[f"radhpc, {requests} requests at a time"] = ours
        rounds = [report.interleaved(tasks, 1, time.perf_counter) for _ in range(1 if quick else 3)]
    size = sum(sizes.values())
    rates = {name: [EPOCHS * size / one[name] / 1e6 for one in rounds] for name in tasks}
    best = [max(rates[name][n] for name in rates if name.startswith("obstore")) for n in range(len(rounds))]
    ratios = {
        "megabytes per second, radhpc by default / obstore's fastest": statistics.median(
            mine / theirs for mine, theirs in zip(rates["radhpc, 64 requests at a time"], best, strict=True)
        )
    }
    traffic = sources[-1].traffic
    figures = {f"megabytes per second, {name}": statistics.median(some) for name, some in rates.items()}
    return ratios, figures | {
        "requests of an epoch": traffic.requests / EPOCHS,
        "bytes read / bytes of the samples": traffic.bytes / size / EPOCHS,
    }


def main() -> None:
    parser = report.parser("gateway_reads", __doc__, "57 MB, once: to see that it runs; its figures say little")
    arguments = parser.parse_args()
    report.show("Samples out of a real S3 gateway", *measure(arguments.quick), NOTES, arguments.json)


if __name__ == "__main__":
    main()
