"""The radiographs that streams are measured on: gray JPEGs in plain tars, with the manifest that our stream needs.

    make(folder, samples=20_000, per_shard=1000)      # 20 tars of about 57 MB: the sizes of a shrunk chest archive

Each sample is `bench-<study>.0.jpg` and `bench-<study>.json`, a Sample of radhpc/core/sample.py of about 230 bytes.
An image is a piece of one large drawn radiograph with noise, 224 to 512 pixels on a side and about 55 KB in the
mean, and no two are alike. Peers read the same tars, or what they convert them to.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt

from radhpc.core.files import write_atomically
from radhpc.core.manifest import INDEX, MANIFEST, FileEntry, Manifest, Shard, sha256
from radhpc.core.sample import SPLITS, Sample
from shards.execution.assembly import concatenate, index_of_shard
from shards.execution.writer import write_shard

SIDES = 224, 512  # pixels, the shortest and the longest
QUALITY = 95  # of the JPEGs
NOISE = 6.4  # standard deviation in gray values, so that they have the wanted bytes
LARGE = 2048  # pixels on a side of what the images are cut from


def make(
    folder: Path, samples: int, per_shard: int, sides: tuple[int, int] = SIDES, seed: int = 0, name: str = "bench"
) -> Path:
    """Write the shards into `folder` and return it; one that has its manifest already is taken as it is."""
    if (folder / MANIFEST).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    large = _drawn(rng)
    shards: list[Shard] = []
    parts = []
    for first in range(0, samples, per_shard):
        numbers = range(first, min(first + per_shard, samples))
        described = [_sample(name, seed, number, rng, sides) for number in numbers]
        shard, rows = write_shard(folder / f"train-{len(shards):06d}.tar", _members(described, large, rng))
        assert shard is not None
        parts.append(index_of_shard(rows, [sample.patient for sample in described], "train", len(shards)))
        shards.append(shard)
    index = concatenate(parts)
    columns = index.to_bytes()
    write_atomically(folder / INDEX, columns)
    build = {"samples": samples, "per_shard": per_shard, "sides": list(sides), "seed": seed}
    counts = {str(split): samples if split == "train" else 0 for split in SPLITS}
    manifest = Manifest(
        dataset=name,
        samples=samples,
        splits=counts,
        patients=counts,
        shards=tuple(shards),
        index=FileEntry(name=INDEX, size=len(columns), sha256=sha256(columns)),
        build=build,
        build_hash=sha256(repr(build).encode()),
    )
    write_atomically(folder / MANIFEST, manifest.to_bytes())
    return folder


def _drawn(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Something like a chest: two dark ellipses in a bright body, a brighter middle, and the grain of a detector."""
    y, x = np.mgrid[-1 : 1 : LARGE * 1j, -1 : 1 : LARGE * 1j].astype(np.float32)
    image = 190 - 90 * (x**2 + y**2)
    for side in (-1, 1):
        image -= 80 * np.exp(-((((x - 0.42 * side) / 0.3) ** 2 + ((y + 0.05) / 0.55) ** 2) ** 2))
    image += 40 * np.exp(-((x / 0.12) ** 2)) + 8 * np.cos(24 * y + 3 * x**2)
    image += rng.normal(0, NOISE, image.shape).astype(np.float32)
    return np.asarray(np.clip(image, 0, 255), np.uint8)


def _sample(name: str, seed: int, number: int, rng: np.random.Generator, sides: tuple[int, int]) -> Sample:
    identity = hashlib.blake2b(f"{name}/{seed}/{number}".encode(), digest_size=16).hexdigest()
    width, height = (int(side) for side in rng.integers(sides[0], sides[1], 2, endpoint=True))
    return Sample.model_validate(
        {
            "dataset": name,
            "patient": identity[:16],
            "study": identity[16:],
            "split": "train",
            "images": [{"view": "PA", "width": width, "height": height}],
            "report": {"findings": "The lungs are clear. The heart is of normal size. No effusion seen."},
        }
    )


def _members(
    described: list[Sample], large: npt.NDArray[np.uint8], rng: np.random.Generator
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    for sample in described:
        (view,) = sample.images
        top, left = (int(rng.integers(0, LARGE - side, endpoint=True)) for side in (view.height, view.width))
        pixels = np.ascontiguousarray(large[top : top + view.height, left : left + view.width])
        json = sample.model_dump_json(exclude_defaults=True).encode()
        yield sample.key, [("json", json), ("0.jpg", bytes(imagecodecs.jpeg8_encode(pixels, level=QUALITY)))]
