"""Reading ahead from object stores: the same samples whatever happens, in few requests and bounded memory."""

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from bench.corpus import make
from radhpc.core.errors import UserError
from radhpc.core.recipe import CacheSettings, OptimizerSettings, Stage, StreamSettings
from radhpc.data import prefetch
from radhpc.data.source import RawSample, SampleLocation, Source
from radhpc.data.stream import Stream, StreamSpec
from radhpc.storage import object_store, store as stores
from radhpc.storage.store import Store
from tests.conftest import Server, reach
from tests.faults import Faults
from tests.waiting import wait_for

SAMPLES, PER_SHARD, BATCH = 240, 40, 16


@dataclass(frozen=True)
class Row:
    key: str
    digest: str
    supervised: int = 1
    length: int = 1


class Digests:
    """A reader that keeps of each sample its name and the digest of its bytes."""

    def read(self, raw: RawSample) -> Row:
        return Row(raw.key, hashlib.sha256(b"".join(bytes(data) for _, data in raw.members)).hexdigest())

    def empty(self) -> Row:
        return Row("", "", 0)

    def batch(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of about 2 MB."""
    return make(tmp_path_factory.mktemp("corpus") / "shards", samples=SAMPLES, per_shard=PER_SHARD)


def upload(folder: Path, url: str) -> str:
    store = Store(url)
    for path in sorted(folder.iterdir()):
        store.upload(path, path.name)
    return url


def stream(url: str, recipe: StreamSettings, epochs: int = 1, cursor: int = 0, source: Source | None = None) -> Stream:
    stage = Stage(name="s", epochs=epochs, batch=BATCH, train=(".*",), optimizer=OptimizerSettings(learning_rate=1.0))
    return Stream(source or Source((url,), "train"), Digests(), StreamSpec(stage, 0, recipe, seed=0, cursor=cursor))


def read(url: str, recipe: StreamSettings, **options: Any) -> tuple[list[list[Row]], Stream]:
    """The rows of every step, and the stream that gave them."""
    rows = stream(url, recipe, **options)
    try:
        steps = [[row for batch in step.micro_batches for row in batch] for step in rows]
    finally:
        rows.close()
    return steps, rows


RECIPE = StreamSettings(window=3, threads=2, prefetch=2, prefetch_megabytes=16, requests=8)


@pytest.fixture
def faults(any_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy before each server in turn; the environment leads to it."""
    with Faults("127.0.0.1", any_server.port) as proxy:
        reach(monkeypatch, {**any_server.environment, "AWS_ENDPOINT_URL": proxy.url})
        monkeypatch.setattr(object_store, "STALL", timedelta(seconds=1))
        yield proxy


@pytest.fixture
def url(any_server: Server, faults: Faults, corpus: Path, tmp_path: Path) -> str:
    return upload(corpus, f"{any_server.bucket('corpus')}/{tmp_path.name}")


@pytest.mark.parametrize("window", [1, 3, None])
def test_a_store_gives_the_same_samples_as_a_folder(url: str, corpus: Path, window: int | None) -> None:
    recipe = RECIPE.model_copy(update={"window": window})
    assert read(url, recipe)[0] == read(str(corpus), recipe)[0]


def is_range(method: str, path: str) -> bool:
    return method == "GET" and path.split("?")[0].endswith(".tar")


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("429", "throttled"),
        ("500", "refused"),
        ("503", "throttled"),
        ("reset", "reset"),
        ("break", "reset"),
        ("stall", "stalled"),
        ("truncate", "reset"),
        ("shorten", "short"),
        ("flip", "checksum"),
    ],
)
def test_faults_change_nothing(url: str, faults: Faults, corpus: Path, kind: str, cause: str) -> None:
    expected = read(str(corpus), RECIPE)[0]
    source = Source((url,), "train")
    faults.inject(kind, times=5, when=is_range, seconds=8)
    steps, _ = read(url, RECIPE, source=source)
    assert steps == expected
    assert faults.done[kind] == 5
    assert source.traffic.retries[cause] >= 1, source.traffic


def test_a_storm_of_faults_changes_nothing(url: str, faults: Faults, corpus: Path) -> None:
    source = Source((url,), "train")
    for kind in ("429", "503", "reset", "truncate", "shorten", "flip"):
        faults.inject(kind, chance=0.1, when=is_range)
    assert read(url, RECIPE, source=source, epochs=3)[0] == read(str(corpus), RECIPE, epochs=3)[0]
    assert sum(source.traffic.retries.values()) >= 3


def test_bytes_that_are_wrong_in_the_store_are_told_from_a_bad_line(
    url: str, faults: Faults, corpus: Path, tmp_path: Path
) -> None:
    """However often the line spoils a sample, it is read; one that comes twice alike is named after two requests."""
    faults.inject("flip", times=prefetch.FETCHES - 2, when=is_range)
    source = Source((url,), "train")
    assert read(url, RECIPE, source=source)[0] == read(str(corpus), RECIPE)[0]
    assert source.traffic.retries == {"checksum": prefetch.FETCHES - 2}

    place = source.locate(np.asarray([0]))[0]
    shard = source.datasets[0].manifest.shards[place.shard].name
    spoilt = tmp_path / shard
    data = bytearray((corpus / shard).read_bytes())
    data[place.start + place.members[1][1] + 99] ^= 1
    spoilt.write_bytes(data)
    Store(url).upload(spoilt, shard)
    source = Source((url,), "train")
    steps, _ = read(url, RECIPE, source=source)
    assert sum(row.key == "" for step in steps for row in step) == 1
    assert source.traffic.retries == {"checksum": 1}


def test_requests_are_few_and_no_more_at_a_time_than_allowed(url: str, faults: Faults, corpus: Path) -> None:
    """Runs of neighbours in few requests, hardly a byte twice; members alone where a job wants little of each shard."""
    size = sum(path.stat().st_size for path in corpus.glob("*.tar"))
    source = Source((url,), "train")
    before, faults.most_open = len(faults.requests), 0
    read(url, RECIPE.model_copy(update={"requests": 4}), source=source)
    assert len(faults.requests) - before == source.traffic.requests
    assert source.traffic.requests < SAMPLES / 4
    assert source.traffic.bytes < 1.2 * size
    assert faults.most_open <= 4


def test_what_is_held_is_bounded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody takes anything for a while, and when a sample is larger than all that may be held."""
    rows = stream(url, RECIPE, epochs=4)
    held = []
    before = prefetch.Prefetcher._extend

    def extend(ahead: prefetch.Prefetcher) -> None:
        before(ahead)
        held.append(ahead._held)

    monkeypatch.setattr(prefetch.Prefetcher, "_extend", extend)
    try:
        for number, _ in enumerate(rows):
            if number == 3:
                time.sleep(0.5)
    finally:
        rows.close()
    assert 0 < max(held) <= 16 << 20
    assert held[-1] == 0
    small = stream(url, RECIPE, epochs=1)
    small.prefetcher._limit = 1
    try:
        assert sum(len(step.keys) for step in small) == SAMPLES
    finally:
        small.close()


def test_expired_keys_are_read_again(
    any_server: Server, faults: Faults, url: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever renews ~/.aws/credentials renews the run's."""
    key, secret = (any_server.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    file = tmp_path / "credentials"

    def write(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")

    write(key)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    source = Source((url,), "train")
    rows = stream(url, RECIPE, source=source, epochs=3)
    seen = []
    try:
        for number, step in enumerate(rows):
            seen.append([row for batch in step.micro_batches for row in batch])
            if number == 0:
                faults.expire()
                threading.Timer(1.5, faults.renew).start()
    finally:
        rows.close()
    assert seen == read(str(corpus), RECIPE, epochs=3)[0]
    assert source.traffic.retries["expired"] >= 1
    for wrong, words in (("[default]\n", "no whole key"), ("[other]\n", "no whole key")):
        file.write_text(wrong)
        with pytest.raises(UserError, match=words):
            object_store.read_keys(file)


def test_a_store_that_stays_away_ends_the_run_in_one_line(
    url: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source((url,), "train")
    monkeypatch.setattr(object_store, "PATIENCE", 2.0)
    faults.inject("503", times=None, when=is_range)
    with pytest.raises(UserError, match=r"corpus/.*\.tar: the store does not answer as it should"):
        read(url, RECIPE, source=source)


def test_a_stream_can_be_left_while_the_store_stalls(url: str, faults: Faults) -> None:
    """A preempted job has little time: nothing waits for a request that may never be answered."""
    source = Source((url,), "train")
    faults.inject("503", times=None, when=is_range)
    rows = stream(url, RECIPE, source=source)
    reader = threading.Thread(target=lambda: list(rows), daemon=True)
    reader.start()
    wait_for(lambda: any(is_range(one.method, one.path) for one in faults.requests))
    started = time.monotonic()
    rows.close()
    assert time.monotonic() - started < 3


def test_a_shard_replaced_under_way_is_noticed(url: str, corpus: Path) -> None:
    """Other bytes of the same length: each of its samples is named. A shorter one: the run ends."""
    name = "train-000002.tar"
    data = (corpus / name).read_bytes()
    source = Source((url,), "train")
    Store(url).write(name, data[:1024] + bytes(byte ^ 1 for byte in data[1024:]))
    rows = stream(url, RECIPE, source=source)
    try:
        bad = {key: fault for step in rows for key, fault in step.bad}
    finally:
        rows.close()
    index = source.datasets[0].index
    assert set(bad) == {key.decode() for key in index.key[index.shard == 2]}
    assert all(name in fault and "checksum" in fault for fault in bad.values())
    Store(url).write(name, data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{name}: ends before byte"):
        read(url, RECIPE, source=source)
    Store(url).delete(name)
    with pytest.raises(UserError, match=f"{name}: gone while it is being read"):
        read(url, RECIPE, source=source)
    with pytest.raises(UserError, match=f"{name}: gone while it is being read"):  # as an evaluation reads
        source.read(int(np.flatnonzero(index.shard == 2)[0]))


def test_the_nodes_cache_saves_requests_and_is_checked(url: str, faults: Faults, corpus: Path, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"cache": CacheSettings(folder=str(tmp_path / "cache"), gigabytes=0.1)})
    expected = read(str(corpus), recipe)[0]
    assert read(url, recipe)[0] == expected
    source = Source((url,), "train")
    before = len(faults.requests)
    assert read(url, recipe, source=source)[0] == expected
    assert len(faults.requests) == before
    blocks = [path for path in (tmp_path / "cache").rglob("*-*") if path.stat().st_size > 1000]
    for block in blocks[:2]:
        data = bytearray(block.read_bytes())
        data[len(data) // 2] ^= 1
        block.write_bytes(data)
    assert read(url, recipe, source=source)[0] == expected
    assert source.traffic.retries["checksum"] >= 1
    assert len(faults.requests) > before
    assert stream(str(corpus), recipe).prefetcher.cache is None  # off for local data


def test_a_network_file_system_is_read_ahead(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(str(corpus), RECIPE)[0]
    monkeypatch.setattr(stores, "NODE_LOCAL", frozenset())
    monkeypatch.setattr(Source, "mapped", lambda *_: None)
    assert read(str(corpus), RECIPE)[0] == expected


PLACES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=60)


@given(found=PLACES, gap=st.integers(0, 400_000))
@settings(deadline=None)
def test_every_sample_lies_in_its_span(found: list[tuple[int, int, int]], gap: int) -> None:
    unit = 100_000
    places = [
        SampleLocation(n, str(n), 0, shard, at * unit, (at + size) * unit, ())
        for n, (shard, at, size) in enumerate(found)
    ]
    wanted, each = prefetch.plan_spans(places, gap)
    assert sum(span.left for span in wanted) == len(places)
    for place, span in zip(places, each, strict=True):
        assert any(span is one for one in wanted)
        assert (span.dataset, span.shard) == (place.dataset, place.shard)
        assert span.start <= place.start
        assert place.stop <= span.stop
    for span in wanted:
        inside = [place for place, one in zip(places, each, strict=True) if one is span]
        assert span.stop - span.start <= max(prefetch.SPAN, *(place.stop - place.start for place in inside))
        covered = np.zeros((span.stop - span.start) // unit, bool)
        for place in inside:
            covered[(place.start - span.start) // unit : (place.stop - span.start) // unit] = True
        gaps = [len(run) for run in "".join("x" if c else " " for c in covered).split("x") if run]
        assert all(run * unit <= gap for run in gaps)
    first = [min(n for n, one in enumerate(each) if one is span) for span in wanted]
    assert first == sorted(first)
