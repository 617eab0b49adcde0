"""What a resume costs, and whether memory stays flat: a million samples, real bytes, any position.

    python -m bench.resume [--json] [--quick]

A thousand shards of a thousand samples, made of twenty real tars (bench/corpus.py) under many names, with a manifest of
their own. Measured in turn, the least of each: the seconds from making a Stream at a position to its first batch, at
the start and at five positions up to the end of the third epoch; and the memory of the process, without mapped files,
over one epoch.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from bench import corpus, report
from bench.gateway_reads import Unread
from bench.stream import SEED, Pixels
from radhpc.core.files import write_atomically
from radhpc.core.manifest import INDEX, MANIFEST, FileEntry, Manifest, SampleIndex, sha256
from radhpc.core.recipe import OptimizerSettings, Stage, StreamSettings
from radhpc.data.source import Source
from radhpc.data.stream import Stream, StreamSpec
from radhpc.storage.store import Store

BATCH, EPOCHS = 64, 3
RECIPE = StreamSettings.model_validate({"threads": 2})
NOTES = """\
first batch: 64 samples of up to 512 px, decoded, out of the page cache; manifest and index are loaded before.
memory: RssAnon of the process at the 1st and the 99th percentile of an epoch, samples read and checked, not decoded."""


def large(folder: Path, tars: Path, copies: int) -> Path:
    """Shards under `copies` names each, by hard links, with a manifest of all of them."""
    store = Store(tars)
    manifest = Manifest.load(store)
    index = manifest.load_index(store)
    folder.mkdir()
    shards, parts = [], []
    for copy in range(copies):
        for number, shard in enumerate(manifest.shards):
            name = f"train-{copy * len(manifest.shards) + number:06d}.tar"
            os.link(tars / shard.name, folder / name)
            shards.append(shard.model_copy(update={"name": name}))
        parts.append(
            {
                "key": np.char.add(index.key, f"-{copy}".encode()),
                "patient": np.char.add(index.patient, f"-{copy}".encode()),
                "shard": index.shard + np.int32(copy * len(manifest.shards)),
                "first": index.first[:-1] + copy * len(index.suffix),
            }
        )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    joined["first"] = np.append(joined["first"], copies * len(index.suffix))
    same = {name: np.tile(getattr(index, name), copies) for name in ("split", "suffix", "offset", "length", "crc32c")}
    columns = SampleIndex(**joined, **same).to_bytes()
    write_atomically(folder / INDEX, columns)
    changed = {
        "samples": manifest.samples * copies,
        "splits": {name: count * copies for name, count in manifest.splits.items()},
        "shards": tuple(shards),
        "index": FileEntry(name=INDEX, size=len(columns), sha256=sha256(columns)),
    }
    write_atomically(folder / MANIFEST, manifest.model_copy(update=changed).to_bytes())
    return folder


def measure(quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and figures."""
    stage = Stage(
        name="bench", epochs=EPOCHS, batch=BATCH, train=(".*",), optimizer=OptimizerSettings(learning_rate=1.0)
    )
    with tempfile.TemporaryDirectory(prefix="radhpc-bench-") as folder:
        tars = corpus.make(Path(folder) / "tars", 1000 if quick else 20_000, 250 if quick else 1000)
        started = time.perf_counter()
        source = Source((str(large(Path(folder) / "large", tars, 4 if quick else 50)),), "train")
        opened = time.perf_counter() - started
        total = EPOCHS * len(source)
        places = [0, *(int(total * part) // BATCH * BATCH for part in (0.1, 1 / 3, 0.5, 0.77, 0.999))]

        def first(cursor: int) -> None:
            source.datasets[0].store.close()
            stream = Stream(source, Pixels(), StreamSpec(stage, 0, RECIPE, SEED, cursor=cursor))
            next(iter(stream))
            stream.close()

        least = report.interleaved(
            {str(cursor): lambda cursor=cursor: first(cursor) for cursor in places},  # type: ignore[misc]
            3 if quick else 10,
            time.perf_counter,
        )
        memory = _memory(source, stage)
    later = max(seconds for cursor, seconds in least.items() if cursor != "0")
    ratios = {
        "first batch, latest position / position 0": later / least["0"],
        "memory, end of an epoch / its beginning": memory[1] / memory[0],
    }
    figures = {f"milliseconds to the first batch, position {name}": 1e3 * value for name, value in least.items()}
    return ratios, figures | {
        "samples": len(source),
        "seconds to open manifest and index (made and read)": opened,
        "megabytes, beginning": memory[0],
        "megabytes, end": memory[1],
    }


def _memory(source: Source, stage: Stage) -> tuple[float, float]:
    stream = Stream(source, Unread(), StreamSpec(stage.model_copy(update={"epochs": 1}), 0, RECIPE, SEED))
    steps = stream.plan.steps
    seen = [_megabytes() for step in stream if step.number in (steps // 100, steps * 99 // 100)]
    stream.close()
    return seen[0], seen[1]


def _megabytes() -> float:
    """Memory that is this process's own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def main() -> None:
    parser = report.parser("resume", __doc__, "4,000 samples: to see that it runs")
    arguments = parser.parse_args()
    report.show("A resume at any position", *measure(arguments.quick), NOTES, arguments.json)


if __name__ == "__main__":
    main()
