"""Archives, settings and checks that the tests of the build share."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from shards.build import BuildSettings
from shards.execution.output import WORK

ROOT = Path(__file__).resolve().parents[2]
PHANTOM = {"studies": "60", "size": "64"}
SMALL = BuildSettings(workers=1, shard_samples=8)


def notes(folder: Path, studies: int) -> Path:
    """Studies of half as many patients as 16-bit PNGs with dots in their names, beside a data.json."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(studies):
        pixels = np.random.default_rng(n).integers(0, 4096, (40, 30)).astype(np.uint16)
        Image.fromarray(pixels).save(folder / f"images/1.2.840.{n}.png")
        rows.append({"image": f"images/1.2.840.{n}.png", "text": f"Report {n}.", "patient": f"{n // 2}", "view": "PA"})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the folder; a subfolder is an error."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(out: Path) -> list[str]:
    return [path.name for path in (out / WORK).glob("*.tar.json")] if (out / WORK).exists() else []
