"""Which code runs, on which Python and with which libraries: kept with a run, and compared whenever a job starts.

    take() -> {"python": "3.12.4", "libraries": {"torch": "2.13.0", "peft": "0.21.2", ...}, "code": "8f3c51..."}
    differences(frozen, take()) -> {"torch": ["2.13.0", "2.14.0"]}

Versions are read from the libraries' metadata, so that nothing is imported for them.
"""

import hashlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("radhpc", "shards", "slurm")
# What a result may depend on; one that is not installed is left out.
LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "flash-attn", "triton", "numpy",
    "safetensors", "tokenizers", "pillow", "simplejpeg", "imagecodecs", "obstore", "scikit-learn", "submitit",
)  # fmt: skip


def root() -> Path:
    """The folder from which this process has its radhpc: a checkout, site-packages or a run's code/."""
    return Path(__file__).resolve().parents[2]


def sources(folder: Path) -> Iterator[Path]:
    """The files of the packages in a folder, and launch.py: all that a job may import, and no caches."""
    found = [path for name in PACKAGES for path in (folder / name).rglob("*") if path.is_file()]
    for path in sorted([*found, folder / "launch.py"]):
        if path.exists() and "__pycache__" not in path.parts and path.suffix in (".py", ".yaml", ".html"):
            yield path


def code_hash(folder: Path) -> str:
    """A hash of the names and bytes of a folder's sources."""
    digest = hashlib.sha256()
    for path in sources(folder):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def versions() -> dict[str, Any]:
    """This process's Python and libraries."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "libraries": found}


def take() -> dict[str, Any]:
    """The fingerprint of this process."""
    return {**versions(), "code": code_hash(root())}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[str | None]]:
    """What differs, by name, with both values; a fingerprint without versions says nothing of them."""
    left, right = _flat(one), _flat(other)
    names = [name for name in left | right if "python" in left and "python" in right or name == "code"]
    return {name: [left.get(name), right.get(name)] for name in names if left.get(name) != right.get(name)}


def _flat(fingerprint: dict[str, Any]) -> dict[str, str]:
    kept = {name: fingerprint[name] for name in ("python", "code") if name in fingerprint}
    return {**kept, **fingerprint.get("libraries", {})}
