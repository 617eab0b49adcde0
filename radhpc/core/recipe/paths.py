"""Make the paths of a recipe absolute, for a job that may run in any folder."""

import os
from pathlib import Path

from radhpc.core.recipe.section import Shards

HUB = "hub:"  # before the id of a model on a hub


def absolute(path: str) -> str:
    """Return a path as an absolute one; URLs stay as they are."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def absolute_weights(weights: str | dict[str, str] | None) -> str | dict[str, str] | None:
    if isinstance(weights, dict):
        return {part: absolute_or_hub(path) for part, path in weights.items()}
    return weights and absolute_or_hub(weights)


def absolute_or_hub(path: str) -> str:
    """A folder's absolute path; of hub:OWNER/NAME the folder of the hub's cache, if it is there, so that a run keeps to
    this release of the weights.
    """
    if not path.startswith(HUB):
        return absolute(path)
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    name = path.removeprefix(HUB).replace("/", "--")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")) / f"models--{name}"
    main = cache / "refs" / "main"
    folder = cache / "snapshots" / (main.read_text().strip() if main.exists() else "none")
    return str(folder) if folder.is_dir() else path


def absolute_shards(shards: Shards) -> Shards:
    if isinstance(shards, dict):
        return {absolute(url): weight for url, weight in shards.items()}
    return tuple(map(absolute, shards))
