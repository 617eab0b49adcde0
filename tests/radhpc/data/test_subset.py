"""A URL with a fragment: some of the samples of the same shards, for the stream and for a recipe."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from radhpc.core.errors import UserError
from radhpc.core.manifest import MANIFEST, FileEntry, Manifest, SampleIndex, sha256
from radhpc.core.recipe import load
from radhpc.data.source import Source
from radhpc.storage.store import Store
from tests.conftest import TINY_RECIPE

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def shards(phantom_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phantom_shards, tmp_path / "shards"))


def write_subset(folder: Path) -> tuple[SampleIndex, list[str]]:
    """Every third training sample, and all that is held out. Returns the whole index and the training keys."""
    store = Store(folder)
    whole = Manifest.load(store)
    index = whole.load_index(store)
    train = index.of_split("train")[::3]
    rows = np.sort(np.concatenate([train, np.flatnonzero(index.split != 0)]))
    data = index.take(rows).to_bytes()
    file = FileEntry(name="thirds.npz", size=len(data), sha256=sha256(data))
    changes = {"samples": len(rows), "index": file, "subset_of": whole.hash}
    (folder / "thirds.npz").write_bytes(data)
    (folder / "thirds.json").write_bytes(whole.model_copy(update=changes).to_bytes())
    return index, [key.decode() for key in index.key[train]]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_stream_reads_a_subset_and_the_whole_stays(shards: Path, scheme: str) -> None:
    before = Source((str(shards),), "train")
    index, keys = write_subset(shards)
    url = f"{scheme}{shards}#thirds"
    source = Source((url,), "train")
    assert [source.key(n) for n in range(len(source))] == keys
    assert [sample.key for sample in source.samples()] == keys
    source.check_sizes()
    for number, key in enumerate(keys):
        read, sample, views = source.read(number)
        assert (read, sample.key, len(views)) == (key, key, len(sample.images))
    after = Source((str(shards),), "train")
    assert after.hashes == before.hashes != source.hashes
    assert len(after) == len(index.of_split("train")) > len(keys)
    assert len(Source((url,), "test")) == len(index.of_split("test"))


def test_the_manifests_of_earlier_builds_keep_their_hash(shards: Path) -> None:
    assert Manifest.load(Store(shards)).hash == sha256((shards / MANIFEST).read_bytes())


def test_a_subset_of_shards_that_were_built_anew_is_refused(shards: Path) -> None:
    write_subset(shards)
    whole = Manifest.load(Store(shards))
    (shards / MANIFEST).write_bytes(whole.model_copy(update={"build_hash": "other"}).to_bytes())
    with pytest.raises(UserError, match=r"thirds\.json: subset_of: the shards were built anew since") as told:
        Source((f"{shards}#thirds",), "train")
    assert "\n" not in str(told.value)


def test_a_subset_that_is_not_there_or_not_whole(shards: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{shards}: no subset 'thirds' there (thirds.json)")):
        Source((f"{shards}#thirds",), "train")
    write_subset(shards)
    (shards / "thirds.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"thirds\.npz: does not match thirds\.json"):
        Source((f"{shards}#thirds",), "train")
    (shards / MANIFEST).write_bytes((shards / "thirds.json").read_bytes())
    with pytest.raises(UserError, match="subset of none"):
        Source((str(shards),), "train")


def test_a_subset_beside_its_whole_is_refused(shards: Path) -> None:
    """Samples would come twice in an epoch."""
    write_subset(shards)
    with pytest.raises(UserError, match="hold the same samples"):
        Source((str(shards), f"{shards}/#thirds"), "train")


@pytest.mark.parametrize(
    ("url", "folder", "subset"),
    [
        ("/data/x#balanced", "/data/x", "balanced"),
        ("/data/x/#balanced", "/data/x", "balanced"),
        ("s3://bucket/x#balanced", "s3://bucket/x", "balanced"),
        ("/data/a#b/x", "/data/a#b/x", None),
        ("/data/x#2", "/data/x#2", None),
        (Path("/data/x#balanced"), "/data/x#balanced", None),
    ],
)
def test_where_the_fragment_begins(url: str | Path, folder: str, subset: str | None) -> None:
    store = Store(url)
    assert (store.url, store.subset) == (folder, subset)


def test_a_recipe_keeps_the_fragment(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(shards=f"{os.path.relpath(shards)}#thirds"))
    recipe = load(path)
    assert recipe.shards == (f"{shards}#thirds",)
    _, keys = write_subset(shards)
    assert len(Source(recipe.shards, "train")) == len(keys)
    given = load(path, [f"stages.adapt.shards=[{shards}#thirds]", "shards=['s3://bucket/x#balanced']"])
    assert given.stages[1].shards == (f"{shards}#thirds",)
    assert given.shards == ("s3://bucket/x#balanced",)


def test_taking_rows_takes_their_members(phantom_shards: Path) -> None:
    store = Store(phantom_shards)
    index = Manifest.load(store).load_index(store)
    index = replace(index, person=index.patient[::-1])
    rows = np.array([5, 2, 2, 40])
    taken = index.take(rows)
    assert [list(taken.members(n)) for n in range(4)] == [list(index.members(int(row))) for row in rows]
    assert [column.dtype for column in vars(taken).values()] == [column.dtype for column in vars(index).values()]
    assert len(index.take(rows[:0])) == 0
