"""The versions of the formats stand in one place, and are those that stand on the disk."""

import inspect
from typing import get_args

import shards.source
from radhpc.core import formats
from radhpc.core.manifest import Manifest
from radhpc.engine.checkpoint import Cursor


def test_every_version_is_listed() -> None:
    """The changelog names those that are: tests/test_project.py."""
    constants = {value for name, value in vars(formats).items() if name.isupper() and isinstance(value, int)}
    names = {name.lower().replace("_", " ") for name, value in vars(formats).items() if isinstance(value, int)}
    assert names == set(formats.VERSIONS)
    assert constants == set(formats.VERSIONS.values())


def test_what_is_written_has_the_version() -> None:
    assert Cursor.__dataclass_fields__["format"].default == formats.CHECKPOINT == 1
    manifest = Manifest.model_fields["format"]
    assert (manifest.default, get_args(manifest.annotation)) == (formats.MANIFEST, (1, 2))
    assert formats.SHARDS == 3
    assert "formats.SHARDS" in inspect.getsource(shards.source)
