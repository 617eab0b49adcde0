"""The registry of dataset readers: which archives `build` knows, and the module that reads each.

A new reader is one file in shards/datasets/ and its name here; a reader of another package is announced by an entry
point (radhpc/core/plugins.py).
"""

import importlib
from typing import TYPE_CHECKING

from radhpc.core import plugins
from radhpc.core.errors import UserError, nearest

if TYPE_CHECKING:
    from shards.datasets.reader import DatasetReader

BUILT_IN = (
    "chestxray14", "chexpert", "chexpert_plus", "image_text", "mimic_cxr", "mimic_cxr_jpg", "openi", "padchest",
    "pathvqa", "phantom", "roco_v2", "slake", "vqa_rad",
)  # fmt: skip


def names() -> tuple[str, ...]:
    """Return the names of all readers, built in and of plugins."""
    return tuple(sorted({*BUILT_IN, *plugins.installed(plugins.DATASETS, BUILT_IN)}))


def reader(name: str) -> "DatasetReader":
    """Import the reader of that name. Raises UserError for an unknown one."""
    announced = plugins.installed(plugins.DATASETS, BUILT_IN)
    if name in BUILT_IN:
        module: DatasetReader = importlib.import_module(f"shards.datasets.{name}")
        return module
    if name not in announced:
        raise UserError(f"dataset: '{name}' is unknown{nearest(name, names())}; allowed are {', '.join(names())}")
    loaded = plugins.load(announced[name])
    if missing := [part for part in ("OPTIONS", "SYNTHETIC", "read") if not hasattr(loaded, part)]:
        raise UserError(f"plugin '{name}' ({announced[name].value}) has no {missing[0]}, so it is not a dataset reader")
    plugin: DatasetReader = loaded
    return plugin
