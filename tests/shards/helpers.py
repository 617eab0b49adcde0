"""What the tests of the build share."""

from pathlib import Path

from shards.build import Settings
from shards.output import WORK

ROOT = Path(__file__).resolve().parents[2]
PHANTOM = {"studies": "60", "size": "64"}
SMALL = Settings(workers=1, shard_samples=8)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the folder; a subfolder is an error."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(out: Path) -> list[str]:
    return [path.name for path in (out / WORK).glob("*.tar.json")] if (out / WORK).exists() else []
