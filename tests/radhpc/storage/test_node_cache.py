"""The node cache: always the right bytes, never more of them on disk than allowed, whatever is killed or damaged."""

import errno
import fcntl
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from radhpc.core.errors import UserError
from radhpc.storage import node_cache as module
from radhpc.storage.node_cache import NodeCache, jump_hash
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(90)

BLOCK = 4096  # instead of 4 MiB, in most tests
LIMIT = 16 * BLOCK


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", BLOCK)
    monkeypatch.setattr(module, "MINIMUM", LIMIT)


class Remote:
    """Files of random bytes behind a fetch that counts."""

    def __init__(self, *sizes: int) -> None:
        self.files = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
        self.calls: list[tuple[int, int, int]] = []

    def read(self, cache: NodeCache, number: int, start: int = 0, stop: int | None = None) -> memoryview:
        data = self.files[number]

        def fetch(first: int, last: int) -> bytes:
            assert 0 <= first < last <= len(data)
            assert last - first <= module.RUN * module.BLOCK
            self.calls.append((number, first, last))
            return data[first:last]

        return cache.read(name(number), len(data), start, len(data) if stop is None else stop, fetch)


def name(number: int) -> str:
    return f"s3://bucket/train-{number:06d}.tar {number:064x}"


def on_disk(folder: Path) -> int:
    """The bytes of all files there. At most WAYS entries in each folder are seen at one time, so a walk beside
    writers sees no more than there may be."""
    total = 0
    for path, _, names in os.walk(folder):
        for entry in names:
            try:
                total += os.stat(f"{path}/{entry}").st_size
            except FileNotFoundError:
                continue
    return total


def blocks(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "v1").rglob("*") if path.is_file())


SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK + 17, 30 * BLOCK)
reading = st.tuples(
    st.just("read"), st.integers(0, 2), st.integers(1, len(SIZES) - 1), st.floats(0, 1), st.floats(0, 1)
)
operation = st.one_of(
    reading,
    reading.map(lambda read: (*read[:2], len(SIZES) - 1, 0.0, 1.0)),  # all of the longest
    st.tuples(st.sampled_from(("drop", "expect")), st.integers(0, 2), st.integers(0, len(SIZES) - 1)),
    st.tuples(st.sampled_from(("truncate", "extend", "flip", "unlink", "leave", "age")), st.integers(0, 99)),
    st.tuples(st.just("reopen"), st.integers(0, 2), st.sampled_from((16, 19, 64 + 63))),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limits=st.lists(st.sampled_from((16, 16, 19, 64, 3 * 64 - 1)), min_size=3, max_size=3),
    operations=st.lists(operation, min_size=20, max_size=60),
)
def test_it_is_the_bytes_themselves(
    limits: list[int], operations: list[tuple], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against plain bytes: three caches with limits of their own on one folder, and somebody who damages its files.
    A reader has checksums: it drops what is wrong and reads again, and then it is right."""
    folder = tmp_path_factory.mktemp("cache")
    remote = Remote(*SIZES)
    caches = [NodeCache(folder, limit * BLOCK) for limit in limits]
    largest, flips = max(limits), 0
    for what, *rest in operations:
        if what == "read":
            which, number, *at = rest
            start, stop = sorted(int(part * SIZES[number]) for part in at)
            data = remote.read(caches[which], number, start, stop)
            if data != remote.files[number][start:stop]:
                assert flips
                caches[which].drop(name(number), start, stop)
                data = remote.read(caches[which], number, start, stop)
            assert data == remote.files[number][start:stop]
        elif what == "drop":
            caches[rest[0]].drop(name(rest[1]), 0, SIZES[rest[1]])
        elif what == "expect":
            caches[rest[0]].expect([name(rest[1])])  # so the others' blocks may go
        elif what == "reopen":
            caches[rest[0]].close()
            caches[rest[0]] = NodeCache(folder, rest[1] * BLOCK)
            largest = max(largest, rest[1])
        elif what == "leave":  # a writer that died: with all of a block, and its place in a full set
            for path in (folder / "v1").iterdir():
                if len(list(path.iterdir())) < 16:
                    (path / f"new-{rest[0]:016x}").write_bytes(bytes(BLOCK))
        elif files := blocks(folder):
            path = files[rest[0] % len(files)]
            if what == "unlink":
                path.unlink()
            elif what == "age":
                for path in files:
                    os.utime(path, (rest[0], rest[0]))
            elif what == "truncate":
                os.truncate(path, path.stat().st_size // 2)
            elif what == "flip":
                flips += 1
                path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
            elif path.stat().st_size < BLOCK:  # what is longer than a block would be beyond the limit by itself
                with path.open("ab") as file:
                    file.write(b"more")
        assert on_disk(folder) <= largest * BLOCK
    for cache in caches:
        cache.close()


def test_a_block_is_fetched_once_and_then_found_by_all(tmp_path: Path) -> None:
    remote = Remote(9 * BLOCK + 17)
    first, second = NodeCache(tmp_path / "c", 64 * BLOCK), NodeCache(tmp_path / "c", 64 * BLOCK)
    assert remote.read(first, 0, 2 * BLOCK + 5, 2 * BLOCK + 9) == remote.files[0][2 * BLOCK + 5 : 2 * BLOCK + 9]
    assert remote.calls == [(0, 2 * BLOCK, 3 * BLOCK)]
    assert remote.read(second, 0) == remote.files[0]
    # neighbours together, at most RUN of them, and the last one short
    assert remote.calls[1:] == [
        (0, 0, 2 * BLOCK), (0, 3 * BLOCK, 7 * BLOCK), (0, 7 * BLOCK, 9 * BLOCK + 17)
    ]  # fmt: skip
    for cache in (first, second):
        assert remote.read(cache, 0, 5, 9 * BLOCK) == remote.files[0][5 : 9 * BLOCK]
    assert len(remote.calls) == 4
    assert vars(first.counts) == {
        "hits": 9, "misses": 1, "bytes_cached": 9 * BLOCK - 5, "bytes_fetched": BLOCK, "not_kept": 0, "dropped": 0
    }  # fmt: skip
    assert (second.counts.hits, second.counts.misses) == (1 + 9, 9)
    assert on_disk(tmp_path) == 9 * BLOCK + 17


def test_two_contents_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """The file's checksum is part of the key: a shard that was replaced is another file."""
    cache = NodeCache(tmp_path, LIMIT)
    for content in (b"a" * 10, b"b" * 10):
        key = f"s3://bucket/x.tar {content.hex()}"
        assert [cache.read(key, 10, 0, 10, lambda a, b, c=content: c[a:b]) for _ in range(2)] == [content] * 2  # type: ignore[misc]


READER = """
import os, random, sys, time
from pathlib import Path
from radhpc.storage import node_cache as module
folder, log, seed, block, limit, pause, rounds = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
module.BLOCK, module.MINIMUM = int(block), min(module.MINIMUM, int(limit))
cache = module.NodeCache(Path(folder), int(limit))
chance = random.Random(seed)
log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
files = {f"file {n}": random.Random(n).randbytes(module.BLOCK * 10 - n) for n in range(4)}
print("ready", flush=True)
for _ in range(int(rounds)):
    name, data = chance.choice(list(files.items()))
    def fetch(start, stop):
        if pause >= 1:
            print("fetching", flush=True)
        time.sleep(pause)
        for at in range(start, stop, module.BLOCK):
            os.write(log, f"{name} {at}\\n".encode())
        return data[start:stop]
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.randrange(3 * module.BLOCK))
    assert cache.read(name, len(data), start, stop, fetch) == data[start:stop]
"""


def reader(folder: Path, log: Path, *numbers: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, folder, log, *numbers]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_four_processes_fetch_each_block_once(tmp_path: Path) -> None:
    """All of it fits, so the rule is exact: one fetch of each block by all processes together."""
    processes = [reader(tmp_path / "c", tmp_path / "log", seed, BLOCK, 64 * BLOCK, 0.01, 300) for seed in range(4)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    fetched = Counter((tmp_path / "log").read_text().splitlines())
    assert len(fetched) == 40
    assert set(fetched.values()) == {1}
    assert len(blocks(tmp_path / "c")) == 40


def test_killed_writers_leave_right_bytes_within_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, written all the time into too small a cache, by processes that are killed at any time; the walk
    beside them never sees more than the limit."""
    monkeypatch.setattr(module, "BLOCK", block := 512 << 10)
    monkeypatch.setitem(globals(), "name", lambda number: f"file {number}")  # as the readers call them
    limit, folder, chance = 16 * block, tmp_path / "c", random.Random(0)
    most = left = 0  # bytes on disk; halves of blocks that were left
    for round_ in range(6):
        processes = [reader(folder, tmp_path / "log", 2 * round_ + n, block, limit, 0, 10**6) for n in range(2)]
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        until = time.monotonic() + chance.uniform(0.05, 0.4)
        while time.monotonic() < until:
            most = max(most, on_disk(folder))
            for path in blocks(folder):  # so that they are not in use, and newcomers displace them
                try:
                    os.utime(path, (0, 0))
                except FileNotFoundError:
                    continue
        for process in processes:
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL, "wrong bytes"
        left += sum(path.name.startswith("new-") for path in blocks(folder))
        assert (most := max(most, on_disk(folder))) <= limit
    assert most > limit // 2
    cache = NodeCache(folder, limit)
    cache.expect(map(name, range(4)))
    remote = Remote(*(10 * block - n for n in range(4)))
    for number in range(4):
        assert remote.read(cache, number) == remote.files[number]
        assert on_disk(folder) <= limit
    assert cache.counts.hits >= 10, "little of what the killed ones wrote was found again"
    assert not [path for path in blocks(folder) if path.name.startswith("new-")], left
    cache.close()


def test_half_a_block_of_a_killed_writer_goes(tmp_path: Path) -> None:
    """Killed for certain in the middle of a block, with the locks of the block and of its set held."""
    code = (
        READER.replace("import os,", "import signal, os,")
        .replace(
            'print("ready"',
            "whole = os.write\n"
            "def half(descriptor, data):\n"
            "    whole(descriptor, data[: len(data) // 2])\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "module.os.write = half\n"
            'log = os.open("/dev/null", os.O_RDONLY)\n'
            'print("ready"',
        )
        .replace("os.write(log", "whole(1")
    )
    command = [sys.executable, "-c", code, tmp_path, tmp_path / "log", 1, BLOCK, LIMIT, 0, 10]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = blocks(tmp_path)
    assert left.name.startswith("new-")
    assert left.stat().st_size in (BLOCK // 2, (BLOCK - 1) // 2)
    cache, remote = NodeCache(tmp_path, LIMIT), Remote(3 * BLOCK)
    begun = time.monotonic()
    assert remote.read(cache, 0) == remote.files[0]
    assert time.monotonic() - begun < 5, "the dead one's locks were waited for"
    assert not left.exists()
    assert len(blocks(tmp_path)) == 3


def test_a_holder_that_stalls_is_waited_for_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_WAIT", 0.3)
    process = reader(tmp_path / "c", tmp_path / "log", 1, BLOCK, 64 * BLOCK, 60, 1)  # a fetch of a minute
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "fetching\n"
        process.send_signal(signal.SIGSTOP)
        cache = NodeCache(tmp_path / "c", 64 * BLOCK)
        begun = time.monotonic()
        for number in range(4):
            data = random.Random(number).randbytes(10 * BLOCK - number)
            for _ in range(2):
                assert cache.read(f"file {number}", len(data), 0, len(data), lambda a, b: data[a:b]) == data  # noqa: B023
        assert 0.25 < time.monotonic() - begun < 10
        assert cache.counts.hits == cache.counts.misses == 40
    finally:
        process.kill()
        process.communicate()


def test_threads_fetch_each_block_once(tmp_path: Path) -> None:
    remote, cache = Remote(40 * BLOCK), NodeCache(tmp_path, 64 * BLOCK)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            start, stop = sorted(chance.randrange(40 * BLOCK) for _ in range(2))
            assert remote.read(cache, 0, start, stop) == remote.files[0][start:stop]

    run_threads(work, 8)
    fetched = [at for _, first, last in remote.calls for at in range(first, last, BLOCK)]
    assert len(fetched) == len(set(fetched)) == cache.counts.misses


def run_threads(work, count: int) -> None:  # type: ignore[no-untyped-def]
    faults: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_file_locks_it_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    remote, cache = Remote(10 * BLOCK), NodeCache(tmp_path, 64 * BLOCK)
    with caplog.at_level(logging.WARNING, "radhpc"):
        for _ in range(2):
            assert remote.read(cache, 0) == remote.files[0]
    assert len([r for r in caplog.records if "no file locks" in r.message]) == 1
    run_threads(lambda number: remote.read(cache, 0), 4)
    assert len(remote.calls) == 3
    # A temporary file may have a living writer here, until it is old.
    (tmp_path / "v1" / "00000" / "new-1").write_bytes(b"x")
    (tmp_path / "v1" / "00000" / "new-2").write_bytes(b"x")
    os.utime(tmp_path / "v1" / "00000" / "new-2", (0, 0))
    other = Remote(0, 1)
    other.read(cache, 1)
    assert {path.name for path in blocks(tmp_path) if path.name.startswith("new-")} == {"new-1"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 blocks."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={40 * BLOCK}", "tmpfs", path], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)  # lazy: a failed test holds blocks open


def test_a_full_disk_costs_no_more_than_the_cache(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote, cache = Remote(100 * BLOCK), NodeCache(disk / "c", 64 * 3 * BLOCK)
    with caplog.at_level(logging.WARNING, "radhpc"):
        for _ in range(2):
            assert remote.read(cache, 0) == remote.files[0]
    assert len([r for r in caplog.records if "No space left" in r.message]) == 1
    assert cache.counts.not_kept >= 2 * 60
    assert 30 <= cache.counts.hits <= 40
    assert not [path for path in blocks(disk / "c") if path.name.startswith("new-")]
    before = len(remote.calls)
    remote.read(cache, 0, 99 * BLOCK + 7, 99 * BLOCK + 9)
    assert remote.calls[before:] == [(0, 99 * BLOCK + 7, 99 * BLOCK + 9)], "a block that cannot be kept, fetched whole"
    cache.close()


def test_a_disk_that_became_read_only_is_still_read(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote, cache = Remote(20 * BLOCK), NodeCache(disk / "c", LIMIT * 4)
    remote.read(cache, 0, 0, 5 * BLOCK)
    cache.close()
    del cache
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with caplog.at_level(logging.WARNING, "radhpc"):
        cache = NodeCache(disk / "c", LIMIT * 4)
        for _ in range(2):
            assert remote.read(cache, 0) == remote.files[0]
    assert (cache.counts.hits, cache.counts.misses, cache.counts.not_kept) == (10, 30, 30)
    assert len([r for r in caplog.records if "keeps fewer blocks" in r.message]) == 1
    cache.close()


def test_a_quota_is_met_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    remote, cache = Remote(3 * BLOCK), NodeCache(tmp_path, LIMIT)
    monkeypatch.setattr(os, "write", refuse)
    assert remote.read(cache, 0) == remote.files[0]
    assert cache.counts.not_kept == 3
    assert not blocks(tmp_path)


def epoch(cache: NodeCache, remote: Remote, seed: int) -> float:
    """The share of blocks found, reading all files of a block once in a random order."""
    order = list(range(len(remote.files)))
    random.Random(seed).shuffle(order)
    hits = cache.counts.hits
    for number in order:
        assert remote.read(cache, number, 10, 20) == remote.files[number][10:20]
    return (cache.counts.hits - hits) / len(order)


def test_random_epochs_over_twice_the_limit_find_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where "least recently used goes" finds about 0.15 (1 - log 2, halved) of the data."""
    remote, limit = Remote(*[BLOCK] * 1024), 512 * BLOCK
    cache = NodeCache(tmp_path, limit)
    rates = [epoch(cache, remote, seed) for seed in range(4)]
    assert rates[0] == 0
    assert min(rates[1:]) >= 0.4, rates
    assert on_disk(tmp_path) <= limit
    # The next life of the run knows its files, and so keeps what the last one left.
    second = NodeCache(tmp_path, limit)
    second.expect(name(number) for number in range(1024))
    assert epoch(second, remote, 5) >= 0.4
    # A stage on other data, as much as fits well: what the stage before left makes room in one epoch.
    shift = 2000
    other = Remote(*[BLOCK] * 300)
    monkeypatch.setitem(globals(), "name", lambda number: f"file {number + shift}")
    second.expect(name(number) for number in range(300))
    assert epoch(second, other, 6) == 0
    assert epoch(second, other, 7) > 0.95


def test_what_is_not_kept_is_not_fetched_whole(tmp_path: Path) -> None:
    remote, cache = Remote(16 * BLOCK, 16 * BLOCK), NodeCache(tmp_path, LIMIT)
    remote.read(cache, 0)
    assert len(blocks(tmp_path)) == 16
    remote.calls.clear()
    kept = 0
    for number in range(16):
        at = number * BLOCK + 100
        assert remote.read(cache, 1, at, at + 50) == remote.files[1][at : at + 50]
        kept += remote.calls[-1] != (1, at, at + 50)
    assert kept == 16 - cache.counts.not_kept
    assert kept <= 4  # two seats in a hundred thousand for more: one in RENEWAL, chosen by the hour


def test_a_block_in_use_is_marked_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, remote = time.time(), Remote(BLOCK)
    remote.read(NodeCache(tmp_path, LIMIT), 0)
    (path,) = blocks(tmp_path)
    cache = NodeCache(tmp_path, LIMIT)
    os.utime(path, (1, 1))
    marks = []
    for second in range(0, 1500, 10):
        monkeypatch.setattr(time, "time", lambda second=second: now + 10 + second)
        remote.read(cache, 0)
        marks.append(path.stat().st_mtime)
        if second == 500:
            cache.close()  # and so opens the block anew
    assert sorted(set(marks)) == pytest.approx([now + 10, now + 10 + 610, now + 10 + 1220], abs=0.01)


def test_newcomers_get_in_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in use do not stay for ever: another process's may be, though nobody will read them again."""
    now = time.time()
    remote, cache = Remote(16 * BLOCK, 4 * BLOCK), NodeCache(tmp_path, LIMIT)
    remote.read(cache, 0)
    for hour in range(500):
        monkeypatch.setattr(time, "time", lambda hour=hour: now + hour * module.HOUR)
        remote.read(cache, 1)
        hits = cache.counts.hits
        remote.read(cache, 1)
        if cache.counts.hits == hits + 4:
            return
    raise AssertionError("not in 500 hours")


@pytest.mark.parametrize("damage", ["short", "long", "empty"])
def test_a_block_of_the_wrong_size_is_missing(tmp_path: Path, damage: str) -> None:
    remote, cache = Remote(BLOCK), NodeCache(tmp_path, LIMIT)
    remote.read(cache, 0)
    (path,) = blocks(tmp_path)
    path.write_bytes({"short": remote.files[0][:-1], "long": remote.files[0] + b"x", "empty": b""}[damage])
    second = NodeCache(tmp_path, LIMIT)
    assert remote.read(second, 0) == remote.files[0]
    assert (second.counts.hits, second.counts.dropped) == (0, 1)
    assert path.stat().st_size == BLOCK


def test_a_block_that_is_cut_while_it_is_open_is_missing(tmp_path: Path) -> None:
    remote, cache = Remote(BLOCK), NodeCache(tmp_path, LIMIT)
    remote.read(cache, 0)
    remote.read(cache, 0)
    os.truncate(*blocks(tmp_path), 1000)
    assert remote.read(cache, 0, 500, 1000) == remote.files[0][500:1000]
    assert len(remote.calls) == 1
    assert remote.read(cache, 0, 500, 1001) == remote.files[0][500:1001]
    assert len(remote.calls) == 2


def test_what_is_dropped_is_fetched_again_by_all(tmp_path: Path) -> None:
    remote = Remote(3 * BLOCK)
    first, second = NodeCache(tmp_path, LIMIT), NodeCache(tmp_path, LIMIT)
    for cache in (first, second):
        remote.read(cache, 0)
    for path in blocks(tmp_path):
        path.write_bytes(bytes(BLOCK))
    assert remote.read(first, 0) == remote.read(second, 0) == bytes(3 * BLOCK)
    first.drop(name(0), BLOCK + 1, 2 * BLOCK)
    assert first.counts.dropped == 1
    for cache in (second, first):
        data = remote.read(cache, 0)  # the second one has it open
        assert (data[:BLOCK], data[BLOCK : 2 * BLOCK]) == (bytes(BLOCK), remote.files[0][BLOCK : 2 * BLOCK])
    assert len(remote.calls) == 2


def test_hidden_files_of_network_file_systems_are_no_blocks(tmp_path: Path) -> None:
    (tmp_path / "v1" / "00000").mkdir(parents=True)
    for number in range(20):
        (tmp_path / "v1" / "00000" / f".nfs{number}").touch()
    (tmp_path / "v1" / ".nfs").touch()
    remote, cache = Remote(20 * BLOCK), NodeCache(tmp_path, LIMIT)
    for _ in range(2):
        assert remote.read(cache, 0) == remote.files[0]
    assert cache.counts.hits == 16
    assert len(list((tmp_path / "v1" / "00000").glob(".nfs*"))) == 20


def test_descriptors_are_few_and_hold_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DESCRIPTORS", 20)
    before = len(os.listdir("/proc/self/fd"))
    remote, cache = Remote(60 * BLOCK, 60 * BLOCK), NodeCache(tmp_path, 64 * BLOCK)
    for _ in range(2):
        remote.read(cache, 0)
    assert len(os.listdir("/proc/self/fd")) == before + 1 + 20
    other = NodeCache(tmp_path, 64 * BLOCK)
    other.expect([name(1)])  # so all of the first file may go
    remote.read(other, 1)
    held = [os.fstat(entry.descriptor) for entry in cache._open.values()]
    assert any(status.st_nlink == 0 for status in held)
    assert all(status.st_size == 0 for status in held if status.st_nlink == 0)
    assert remote.read(cache, 0) == remote.files[0]
    cache.close()
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_jobs_with_different_limits_share_a_folder(tmp_path: Path) -> None:
    remote = Remote(*[BLOCK] * 1000)
    large, small = NodeCache(tmp_path, 512 * BLOCK), NodeCache(tmp_path, 256 * BLOCK)
    for number in range(160):
        remote.read(large, number)
        assert remote.read(small, number) == remote.files[number]
    assert 60 < small.counts.hits < 100, "half of the blocks lie where the smaller limit looks for them"
    for number in range(1000):
        for cache in (large, small):
            assert remote.read(cache, number) == remote.files[number]
    assert 480 * BLOCK < on_disk(tmp_path) <= 512 * BLOCK
    smaller = NodeCache(tmp_path, 256 * BLOCK)
    assert on_disk(tmp_path) <= 256 * BLOCK
    smallest = NodeCache(tmp_path, 20 * BLOCK)
    assert len(blocks(tmp_path)) == 20
    for number in range(300):
        for cache in (large, small, smaller, smallest):
            assert remote.read(cache, number) == remote.files[number]
    assert on_disk(tmp_path) <= 512 * BLOCK


def test_one_folder_under_two_names_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks go by what they protect, not by the path that leads there: while one cache writes into a set, the other
    does not. It gives up soon, and reads all the same."""
    monkeypatch.setattr(module, "WRITE_WAIT", 0.2)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    remote = Remote(BLOCK, BLOCK)
    caches = [NodeCache(tmp_path / "c", LIMIT), NodeCache(tmp_path / "link", LIMIT)]
    writing, go_on, write = threading.Event(), threading.Event(), os.write

    def slow(descriptor: int, data: bytes) -> int:
        writing.set()
        go_on.wait(30)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    first = threading.Thread(target=remote.read, args=(caches[0], 0))
    first.start()
    assert writing.wait(10)
    assert remote.read(caches[1], 1) == remote.files[1]
    assert (caches[1].counts.misses, caches[1].counts.not_kept) == (1, 1)
    go_on.set()
    first.join()
    assert remote.read(caches[1], 0) == remote.files[0]
    assert caches[1].counts.hits == 1


def test_a_block_that_was_not_waited_for_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_WAIT", 0.1)
    first, second = NodeCache(tmp_path, LIMIT), NodeCache(tmp_path, LIMIT)
    fetching, go_on, data = threading.Event(), threading.Event(), bytes(BLOCK)

    def slow(start: int, stop: int) -> bytes:
        fetching.set()
        go_on.wait(30)
        return data[start:stop]

    thread = threading.Thread(target=first.read, args=("f", BLOCK, 0, BLOCK, slow))
    thread.start()
    assert fetching.wait(10)
    assert second.read("f", BLOCK, 0, BLOCK, lambda start, stop: data[start:stop]) == data
    (path,) = blocks(tmp_path)
    before = path.stat().st_ino
    go_on.set()
    thread.join()
    assert (first.counts.misses, second.counts.misses) == (1, 1)
    assert [path.stat().st_ino for path in blocks(tmp_path)] == [before]


def test_an_error_of_the_store_passes_through_and_nothing_is_kept(tmp_path: Path) -> None:
    cache, data = NodeCache(tmp_path, LIMIT), bytes(range(100))

    def fail(start: int, stop: int) -> bytes:
        raise ConnectionResetError("reset")

    with pytest.raises(ConnectionResetError):
        cache.read("f", 100, 0, 50, fail)
    for wrong in (data[:99], data + b"x"):
        with pytest.raises(OSError, match="bytes came for bytes 0 to 100"):
            cache.read("f", 100, 0, 50, lambda start, stop, wrong=wrong: wrong)  # type: ignore[misc]
    assert not blocks(tmp_path)
    assert cache.read("f", 100, 20, 50, lambda start, stop: memoryview(data)[start:stop]) == data[20:50]
    assert cache.read("f", 100, 7, 7, fail) == b""
    assert cache.read("f", 100, 7, 9, fail) == data[7:9]


def test_users_mistakes_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^stream\.cache\.gigabytes: 1e-06; allowed are 6.5536e-05 or more$"):
        NodeCache(tmp_path, 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^stream\.cache\.folder: .*/file/c: Not a directory; allowed is .*$"):
        NodeCache(tmp_path / "file" / "c", LIMIT)
    with pytest.raises(UserError, match=r"^stream\.cache\.folder: .*/file: File exists; allowed is .*$"):
        NodeCache(tmp_path / "file", LIMIT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    os.chown(tmp_path / "c", 12345, -1)
    with pytest.raises(UserError, match=r"^stream\.cache\.folder: .*/c belongs to another user; allowed is .*$"):
        NodeCache(tmp_path / "c", LIMIT)
    assert not list((tmp_path / "c").iterdir())


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        remote, cache = Remote(BLOCK), NodeCache(tmp_path / "c", LIMIT)
        remote.read(cache, 0)
    finally:
        os.umask(old)
    for path in ((tmp_path / "c"), *(tmp_path / "c").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_few_blocks_move_where_there_are_more_sets() -> None:
    keys = [random.Random(number).getrandbits(62) for number in range(4000)]
    for buckets in (1, 2, 3, 16, 1000):
        before, after = ([jump_hash(key, n) for key in keys] for n in (buckets, buckets + 1))
        moved = [new for old, new in zip(before, after, strict=True) if old != new]
        assert set(moved) <= {buckets}
        assert len(moved) / len(keys) == pytest.approx(1 / (buckets + 1), abs=0.03)
        if buckets < 20:
            counts = Counter(after)
            assert max(counts.values()) < 1.4 * len(keys) / (buckets + 1)
