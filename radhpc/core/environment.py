"""Take the fingerprint of what runs: code, Python, libraries, plugins. A run keeps it, and every job compares it.

    take() -> {"python": "3.12.4", "libraries": {"torch": "2.13.0", "peft": "0.21.2", ...}, "code": "8f3c51..."}
    differences(frozen, take()) -> {"torch": ["2.13.0", "2.14.0"]}

Versions are read from the metadata of the libraries: nothing is imported for them.
"""

import hashlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from radhpc.core import plugins

PACKAGES = ("radhpc", "shards", "slurm")
# A result may depend on these; one that is not installed is left out. Plugins are added (plugins.py).
LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "flash-attn", "triton", "numpy",
    "safetensors", "tokenizers", "pillow", "simplejpeg", "imagecodecs", "obstore", "scikit-learn", "submitit",
)  # fmt: skip


def root() -> Path:
    """Return the folder from which this process imports radhpc: a checkout, site-packages or a run's code/."""
    return Path(__file__).resolve().parents[2]


def sources(folder: Path) -> Iterator[Path]:
    """Yield the files of the packages in a folder, and launch.py: all that a job may import, and no caches."""
    files = [path for name in PACKAGES for path in (folder / name).rglob("*") if path.is_file()]
    for path in sorted([*files, folder / "launch.py"]):
        if path.exists() and "__pycache__" not in path.parts and path.suffix in (".py", ".yaml", ".html"):
            yield path


def code_hash(folder: Path) -> str:
    """Return a hash of the names and bytes of a folder's sources."""
    digest = hashlib.sha256()
    for path in sources(folder):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def versions() -> dict[str, Any]:
    """Return the versions of this process's Python, libraries and plugins."""
    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "libraries": libraries | plugins.versions()}


def take() -> dict[str, Any]:
    """Return the fingerprint of this process."""
    return {**versions(), "code": code_hash(root())}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[str | None]]:
    """Return both values of everything that differs, by name. A fingerprint without versions matches any."""
    left, right = _flat(one), _flat(other)
    names = [name for name in left | right if "python" in left and "python" in right or name == "code"]
    return {name: [left.get(name), right.get(name)] for name in names if left.get(name) != right.get(name)}


def _flat(fingerprint: dict[str, Any]) -> dict[str, str]:
    kept = {name: fingerprint[name] for name in ("python", "code") if name in fingerprint}
    return {**kept, **fingerprint.get("libraries", {})}
