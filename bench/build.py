"""How fast a raw archive becomes shards, beside the decoder alone and beside what else one would use.

    python -m bench.build [--json] [--quick]

Everything that is compared runs in this one process group, in turns. The images are made for it: 3000 x 2500 PNGs of 12
bits stretched to 16, with so much noise that they have PadChest's 11 to 12 MB. --quick takes smaller images and fewer
rows, to see that the measurements run; its figures say little.
"""

import contextlib
import csv
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import psutil  # type: ignore[import-untyped]
from PIL import Image

from bench import report
from radhpc.core.manifest import INDEX, MANIFEST, FileEntry, Manifest, SampleIndex, Shard, sha256
from radhpc.core.sample import SPLITS
from radhpc.storage.store import Store
from shards.build import build
from shards.datasets import padchest, phantom
from shards.execution.writer import write_shard
from shards.images import jpeg, png
from shards.images.decoding import load
from shards.images.encoding import EncodingSettings, encode
from shards.images.text_in_pixels import find_text
from shards.settings import BuildSettings

NOTES = """\
whole path: read, decode, shrink, window, JPEG, fingerprint, crc32c, sha256, tar.
library decode: imagecodecs.png_decode. own decode: the same on a file that shards/images/png.py has inflated.
img2dataset-style: Pillow, np.percentile, float arithmetic at full size, resize, JPEG, webdataset.ShardWriter.
webdataset loop: Pillow, resize in 16 bits, np.percentile, float arithmetic, JPEG, ShardWriter.
Neither peer makes an index, checksums, fingerprints, salted hashes or reproducible bytes, nor goes on where it ended.
memory: peak resident MB of the process that lists and of the largest worker, PadChest's table with tiny images."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    image: tuple[int, int] = (3000, 2500)  # height, width
    images: int = 2
    rounds: int = 5
    builds: int = 1  # rounds of them
    studies: int = 1200  # of the two builds that are compared: enough that starting two processes does not count
    drawn: int = 768  # pixels on a side of their images
    rows: tuple[int, int] = (1_000, 160_861)
    samples: int = 1_000_000  # in the manifest


QUICK = Size((900, 750), 1, 2, 1, 32, 128, (300, 600), 50_000)


def main() -> None:
    parser = report.parser("build", __doc__, "smaller and fewer, within a minute")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="radhpc-bench-") as folder:
        for measure in (images, workers, memory, manifest):
            print(f"measuring: {measure.__name__}", file=sys.stderr, flush=True)
            place = Path(folder) / measure.__name__
            place.mkdir()
            started = time.perf_counter()
            for into, found in zip((ratios, figures), measure(place, size), strict=True):
                into.update(found)
            figures[f"seconds for measuring {measure.__name__}"] = time.perf_counter() - started
    report.show("From raw archives to shards", ratios, figures, NOTES, arguments.json)


Measured = tuple[dict[str, float], dict[str, float]]  # ratios, figures


def images(folder: Path, size: Size) -> Measured:
    """The path of one image: beside decoding alone, and beside peers."""
    paths = [_radiograph(folder / f"{n}.png", n, size.image) for n in range(size.images)]
    raw = [path.read_bytes() for path in paths]

    def each(task: Callable[[bytes], object]) -> Callable[[], None]:
        def run() -> None:
            for data in raw:
                task(data)

        return run

    for data in raw:
        assert np.array_equal(imagecodecs.png_decode(data), imagecodecs.png_decode(png.unpack(data)))
    stored = [np.asarray(Image.open(io.BytesIO(encode(load(path)).data))) for path in paths]
    jpegs = [path.with_suffix(".jpg") for path in paths]
    for data, path in zip(raw, jpegs, strict=True):
        eight_bits = Image.fromarray((np.asarray(Image.open(io.BytesIO(data))) >> 8).astype(np.uint8))
        eight_bits.save(path, quality=95)
    compressed = [path.read_bytes() for path in jpegs]
    seconds = report.interleaved(
        {
            "strict decode of JPEG": lambda: [jpeg.decode(data) for data in compressed],
            "Pillow decode of JPEG": lambda: [np.asarray(Image.open(io.BytesIO(data))) for data in compressed],
            "whole path, JPEG": lambda: _ours(folder / "ours.tar", jpegs),
            "text in pixels": lambda: [find_text(pixels) for pixels in stored],
            "library decode": each(imagecodecs.png_decode),
            "Pillow decode": each(lambda data: Image.open(io.BytesIO(data)).load()),
            "own decode": each(lambda data: imagecodecs.png_decode(png.unpack(data))),
            "whole path": lambda: _ours(folder / "ours.tar", paths),
            "img2dataset-style": lambda: _peer(folder / "full.tar", paths, at_full_size=True),
            "webdataset loop": lambda: _peer(folder / "loop.tar", paths, at_full_size=False),
        },
        size.rounds,
    )
    whole = seconds["whole path"]
    ratios = {f"CPU time, whole path / {name}": whole / seconds[name] for name in ("library decode", "own decode")}
    ratios["CPU time, search for text in pixels / whole path"] = seconds["text in pixels"] / whole
    strict, plain = seconds["strict decode of JPEG"], seconds["Pillow decode of JPEG"]
    ratios["CPU time, whole path of JPEG / the same with Pillow's decoder"] = seconds["whole path, JPEG"] / (
        seconds["whole path, JPEG"] - strict + plain
    )
    for name in ("img2dataset-style", "webdataset loop"):
        ratios[f"images per CPU second, radhpc / {name}"] = seconds[name] / whole
    figures = {f"CPU ms per image, {name}": 1e3 * one / len(paths) for name, one in seconds.items()}
    figures["MB per raw image"] = sum(map(len, raw)) / len(raw) / 1e6
    return ratios, figures


def _radiograph(path: Path, number: int, shape: tuple[int, int]) -> Path:
    """Write a drawn radiograph as large as PadChest's, filtered as libpng does."""
    rng = np.random.default_rng(number)
    drawn = Image.fromarray(phantom.Picture(0, number, "PA", 1024)().pixels.astype(np.float32))
    large = np.asarray(drawn.resize(shape[::-1], Image.Resampling.BICUBIC))
    noisy = np.clip(large + rng.standard_normal(shape, np.float32) * 85, 0, 4095).astype(np.uint32)
    Image.fromarray((noisy * 65535 // 4095).astype(np.uint16)).save(path)
    return path


def _ours(path: Path, paths: list[Path]) -> None:
    def samples() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
        for n, source in enumerate(paths):
            encoded = encode(load(source), EncodingSettings())
            yield f"bench-{n}", [("json", encoded.view.model_dump_json().encode()), ("0.jpg", encoded.data)]

    write_shard(path, samples())


def _peer(path: Path, paths: list[Path], at_full_size: bool) -> None:
    import webdataset  # it imports torch, which the workers of the builds below shall not

    with webdataset.ShardWriter(str(path.with_suffix("")) + "-%06d.tar", verbose=0) as writer:
        for n, source in enumerate(paths):
            image: Image.Image = Image.open(source)
            image.load()
            factor = 1120 / max(image.size)
            small = round(image.width * factor), round(image.height * factor)
            if not at_full_size:
                image = image.resize(small, Image.Resampling.BOX)
            pixels = np.asarray(image)
            black, white = np.percentile(pixels, (0.5, 99.5))
            shares = np.clip((pixels.astype(np.float32) - black) / (white - black), 0, 1)
            shown = Image.fromarray(np.rint(255 * shares).astype(np.uint8))
            if at_full_size:
                shown = shown.resize(small, Image.Resampling.BOX)
            buffer = io.BytesIO()
            shown.save(buffer, "JPEG", quality=95, subsampling=0)
            writer.write({"__key__": f"bench-{n}", "0.jpg": buffer.getvalue(), "json": {"width": shown.width}})


def workers(folder: Path, size: Size) -> Measured:
    """A whole build by two workers against one; drawn images, so that no disk is measured."""
    options = {"studies": str(size.studies), "size": str(size.drawn)}

    def run(count: int) -> None:
        settings = BuildSettings(workers=count, shard_samples=max(1, size.studies // 48), force=True)
        build("phantom", None, str(folder / f"by-{count}"), options | {"seed": str(next(seeds))}, settings)

    seeds = iter(range(1000))
    seconds = report.interleaved({"1": lambda: run(1), "2": lambda: run(2)}, size.builds, time.perf_counter)
    figures = {f"studies per second, {count} worker(s)": size.studies / one for count, one in seconds.items()}
    return {"studies per second, two workers / one": seconds["1"] / seconds["2"]}, figures


def memory(folder: Path, size: Size) -> Measured:
    """Peak memory of a build whose table is long, against one whose table is short."""
    figures: dict[str, float] = {}
    peaks = []
    for rows in size.rows:
        archive = folder / str(rows)
        _padchest(archive, rows)
        started = time.perf_counter()
        peaks.append(_peaks([sys.executable, "-m", "bench.build_padchest", str(archive), f"{archive}-shards"], folder))
        figures[f"seconds, {rows:,} rows"] = time.perf_counter() - started
        for name, value in zip(("listing", "worker"), peaks[-1], strict=True):
            figures[f"peak MB, {name}, {rows:,} rows"] = value / 1e6
    few, many = size.rows
    return {
        f"peak memory, {name}, {many:,} rows / {few:,}": peaks[1][place] / peaks[0][place]
        for place, name in enumerate(("listing", "worker"))
    }, figures


def _padchest(archive: Path, rows: int) -> None:
    """PadChest's table and its images, links to one tiny image with so little in it that it is no duplicate."""
    (archive / "0").mkdir(parents=True)
    image = archive / "image.png"
    pixels = np.full((32, 32), 4000, np.uint16)
    pixels[10, 10], pixels[20, 24] = 9000, 100  # a picture of one value is no sample
    Image.fromarray(pixels).save(image)
    rng = np.random.default_rng(0)
    with (archive / padchest.TABLE).open("w", newline="") as file:
        table = csv.DictWriter(file, ["", *padchest.COLUMNS])
        table.writeheader()
        for n in range(rows):
            study = str(10**38 + int(rng.integers(1 << 60)))
            name = f"{study}_{n:06d}.png"
            (archive / "0" / name).symlink_to(image)
            table.writerow(
                {
                    "": n,
                    "ImageID": name,
                    "ImageDir": "0",
                    "StudyID": study,
                    "PatientID": str(10**36 + n * 5 // 8),
                    "Projection": "PA",
                    "Pediatric": "No",
                    "Report": f" sin alter radiolog significacion control {n} . cambi pulmonar cronic sever . ",
                    "MethodLabel": "RNN_model",
                    "Labels": "['normal']",
                    "Localizations": "['loc cardiac']",
                }
            )


def _peaks(command: list[str], folder: Path) -> tuple[int, int]:
    """(peak bytes of the command's own process, of the largest of its children). Raises where it fails."""
    salt = folder / "salt"
    salt.write_bytes(os.urandom(32))
    own = children = 0
    with subprocess.Popen(command, env=os.environ | {"RADHPC_SALT_FILE": str(salt)}) as process:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                parent = psutil.Process(process.pid)
                own = max(own, _peak(parent))
                for child in parent.children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess, OSError):
                        children = max(children, _peak(child))
            time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return own, children


def _peak(process: psutil.Process) -> int:
    """The most that has been resident: as the kernel remembers it, or else what is resident now."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(process.memory_info().rss)


def manifest(folder: Path, size: Size) -> Measured:
    """Opening the shards of a large dataset: what a training job does before its first step."""
    count, per_shard = size.samples, 1000
    rng = np.random.default_rng(0)
    digits = np.char.mod("%016x", rng.integers(1 << 62, size=count)).astype("S16")
    lengths = np.where(np.arange(2 * count) % 2, 150_000, 700)
    index = SampleIndex(
        key=np.char.add(b"padchest-", digits),
        patient=digits[rng.integers(count, size=count)],
        split=rng.choice(len(SPLITS), count, p=(0.8, 0.1, 0.1)).astype(np.uint8),
        shard=(np.arange(count) // per_shard).astype(np.int32),
        first=np.arange(count + 1, dtype=np.int64) * 2,
        suffix=np.tile(np.array([b"json", b"0.jpg"]), count),
        offset=np.cumsum(lengths + 512) - lengths,  # behind a header of tar each
        length=lengths,
        crc32c=rng.integers(1 << 32, size=2 * count).astype(np.uint32),
    )
    data = index.to_bytes()
    (folder / INDEX).write_bytes(data)
    shards = [
        Shard(name=f"train-{n:06d}.tar", size=1 << 40, sha256="0" * 64, samples=per_shard)
        for n in range(-(-count // per_shard))
    ]
    described = Manifest(
        dataset="padchest",
        samples=count,
        splits=dict.fromkeys(SPLITS, 1),
        patients=dict.fromkeys(SPLITS, 1),
        shards=tuple(shards),
        index=FileEntry(name=INDEX, size=len(data), sha256=sha256(data)),
        build={},
        build_hash="0" * 64,
    )
    (folder / MANIFEST).write_bytes(described.to_bytes())

    def opened() -> None:
        store = Store(str(folder))
        assert len(Manifest.load(store).load_index(store)) == count

    seconds = report.interleaved({"open": opened}, 5, time.perf_counter)["open"]
    return {}, {f"seconds to open a manifest of {count:,}": seconds, "MB of that index": len(data) / 1e6}


if __name__ == "__main__":
    main()
