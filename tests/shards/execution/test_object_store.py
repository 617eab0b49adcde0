"""Shards go to an object store as they go to a folder; an outage is one line, and the same command goes on."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import webdataset

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.storage import object_store
from radhpc.storage.store import Store
from shards.build import BuildSettings, build
from shards.repair import repair
from shards.verify import verify
from tests.conftest import Moto, reach
from tests.faults import Faults
from tests.shards.helpers import PHANTOM, contents, notes

pytestmark = pytest.mark.timeout(120)
SMALL = BuildSettings(workers=1, shard_samples=8)


def stored(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {name: store.read(name) for name in store.names()}


@pytest.fixture
def line(s3: str, moto: Moto, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A line to the store that can be cut."""
    with Faults("127.0.0.1", moto.port) as faults:
        reach(monkeypatch, {**moto.environment, "AWS_ENDPOINT_URL": faults.url})
        yield faults


def test_a_store_holds_what_a_folder_holds(tmp_path: Path, s3: str) -> None:
    result = build("phantom", None, s3, PHANTOM, BuildSettings(workers=2, shard_samples=8))
    build("phantom", None, str(tmp_path / "folder"), PHANTOM, SMALL)
    assert stored(s3) == contents(tmp_path / "folder")
    assert (result.url, result.samples) == (s3, 60)
    assert verify(s3).ok
    assert build("phantom", None, s3, PHANTOM, SMALL).reused
    with pytest.raises(UserError, match=f"{s3}: holds another build"):
        build("phantom", None, s3, {**PHANTOM, "studies": "50"}, SMALL)
    assert build("phantom", None, s3, {**PHANTOM, "studies": "20"}, BuildSettings(workers=1, force=True)).samples == 20
    assert verify(s3).ok
    assert len([name for name in stored(s3) if name.endswith(".tar")]) == result.shards - 6


def test_webdataset_reads_what_lies_in_the_store(tmp_path: Path, s3: str) -> None:
    build("phantom", None, s3, PHANTOM, SMALL)
    manifest = Manifest.load(Store(s3))
    index = manifest.load_index(Store(s3))
    for name, data in stored(s3).items():
        (tmp_path / name).write_bytes(data)
    shards = [str(tmp_path / shard.name) for shard in manifest.shards]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    assert keys == [key.decode() for key in index.key.tolist()]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_outage_in_the_middle_is_one_line_and_the_build_goes_on(
    workers: int, tmp_path: Path, s3: str, line: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=2)})
    seen: list[int] = []

    def watch(done: int, total: int) -> None:
        seen.append(done)
        if done == 30:
            line.cut(after=20_000)  # in the middle of a shard

    with pytest.raises(UserError, match=r"s3://hospital/.*: the store does not answer as it should") as error:
        build("phantom", None, s3, PHANTOM, SMALL, watch)
    assert "\n" not in str(error.value)
    line.mend()
    before = stored(s3)
    assert "manifest.json" not in before
    build("phantom", None, str(tmp_path / "folder"), PHANTOM, SMALL)
    whole = contents(tmp_path / "folder")
    assert before
    assert all(whole[name] == data for name, data in before.items())  # nothing half has a final name
    seen.clear()
    build("phantom", None, s3, PHANTOM, BuildSettings(workers=workers, shard_samples=8), watch_nothing(seen))
    assert seen[0] >= 16  # finished shards are not built again
    assert stored(s3) == whole


def watch_nothing(seen: list[int]) -> Callable[[int, int], None]:
    return lambda done, total: seen.append(done)


def test_a_broken_object_is_found_and_mended(tmp_path: Path, s3: str) -> None:
    archive = notes(tmp_path / "raw", 20)
    build("image_text", archive, s3, {}, SMALL)
    before = stored(s3)
    Store(s3).write("train-000000.tar", before["train-000000.tar"][:5000] + b"?" + before["train-000000.tar"][5001:])
    report = verify(s3)
    assert {fault.shard for fault in report.faults} == {"train-000000.tar"}
    assert repair(s3, archive, report) == ["train-000000.tar"]
    assert stored(s3) == before


def test_refusals_of_a_store_are_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="s3://nobody-made-it.*NoSuchBucket"):
        build("phantom", None, "s3://nobody-made-it/x", PHANTOM, SMALL)
    with pytest.raises(UserError, match=f"{s3}: no manifest.json there"):
        verify(s3)
    monkeypatch.setattr(object_store, "RETRIES", {"max_retries": 0, "retry_timeout": timedelta(seconds=1)})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="the store does not answer as it should"):
        build("phantom", None, s3, PHANTOM, SMALL)
