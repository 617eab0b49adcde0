"""Hold the versions of all formats that outlive a process. The changelog names each of them.

    formats.CHECKPOINT     # 1, in every cursor.json

A version is raised when older code can no longer read, or would misread, what newer code writes. A format without a
version of its own on the disk says so: it only grows by keys that older code leaves alone or refuses by name.
"""

from collections.abc import Mapping
from typing import Final

RECIPE: Final = 1  # recipe.yaml; not on the disk: an unknown key is refused by name
RUN_FOLDER: Final = 1  # events.jsonl, job.json, end files, ...; not on the disk: a run is resumed by the code it froze
CHECKPOINT: Final = 1  # cursor.json: format
MANIFEST: Final = 2  # manifest.json: format; 1 is read as well
SHARDS: Final = 3  # manifest.json: build.format; raise it when the same input gives other bytes
STATUS_CACHE: Final = 2  # ~/.cache/radhpc/status.json: version; another one is ignored

VERSIONS: Mapping[str, int] = {
    "recipe": RECIPE,
    "run folder": RUN_FOLDER,
    "checkpoint": CHECKPOINT,
    "manifest": MANIFEST,
    "shards": SHARDS,
    "status cache": STATUS_CACHE,
}
