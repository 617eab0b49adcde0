"""Cache blocks of remote shards in a folder of the node, for all its ranks and for other jobs.

Sits between the stream and a remote store. Enters: the bytes of a file that are requested, and a function that fetches
missing ones. Leaves: the bytes. Example, with a member of 55 kB at byte 9,000,000 of a shard of 1 GB:

    cache = NodeCache(Path("/local/me/radhpc"), 200 << 30)
    cache.read("s3://bucket/padchest/train-000000.tar 3f9a…", 10**9, 9_000_000, 9_055_000, fetch)
        # calls fetch(8388608, 12582912), keeps it as block 2 of that file, returns 55,000 bytes of it
    cache.read(…)   # from here on, in any process of the node: one pread

It is a set-associative cache of plain files, with neither a daemon nor a database:

    folder/lock                        no content; its byte ranges are the locks (byte n: the block or set with hash n)
    folder/v1/00017/<file>-000002      a block, in the set that its hash names: at most WAYS files in a set
    folder/v1/00017/new-<random>       a block that is being written; counts as one of the set

The number of files, and with it of bytes, is bounded by the layout itself, and kills do not change that. Whoever
writes into a set holds its lock, which the kernel frees when a process dies: a `new-` file that the next writer finds
there has lost its own, and goes. Whoever fetches a block holds the block's lock, and others wait for it. A block's set
is found by a hash that stays for most blocks when the number of sets changes, so jobs with different limits share a
folder: each uses the first sets, as many as its limit allows, and all together never take more than the largest of
their limits. Who opens it with a smaller limit removes what lies beyond; a job that uses those sets fetches it again.
Sets fill unevenly: data of just the limit's size leave about 5 % of their blocks outside, data of 80 % of it 0.2 %.

What goes when a set is full: the block used longest ago among those used neither since this cache was opened nor part
of the files that expect() named. Where there is none, the newcomer stays out, and only the wanted bytes of it are
fetched, not a whole block. A shuffled epoch over twice the limit so finds half of its blocks, where "least recently
used goes" would find few. One newcomer of RENEWAL, another one every hour, displaces a block all the same, so that
nothing stays for ever (bimodal insertion: Qureshi et al., "Adaptive insertion policies for high performance caching",
ISCA 2007).

Sizes are checked here, contents by the caller, who knows the members' checksums and calls drop() where they differ.
Safe in many threads of many processes; open it after forking.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from radhpc.core.errors import UserError, first_line

log = logging.getLogger("radhpc")

BLOCK = 4 << 20  # bytes of a block; the last one of a file is shorter
RUN = 4  # neighbouring missing blocks that are fetched at once
WAYS = 64  # blocks in a set
MINIMUM = 100_000_000  # bytes: the smallest limit
RENEWAL = 32  # one newcomer of so many is taken by a set although all its blocks are in use
HOUR = 3600.0  # seconds until it is other newcomers' turn: the same for all members of a block, and for all ranks
TOUCH = 600.0  # seconds: a block in use gets a new modification time this often
DESCRIPTORS = 128  # blocks that a process keeps open
FETCH_WAIT = 30.0  # seconds to wait for another rank's fetch of the same block before fetching it too
WRITE_WAIT = 10.0  # seconds to wait for another writer in the same set before leaving the block out
PAUSE = 60.0  # seconds without new blocks after one could not be written
FULL = 10.0  # seconds that a set which turned a newcomer away is not looked at again

Fetch = Callable[[int, int], bytes | memoryview]  # bytes [start, stop) of the file


@dataclass
class CacheCounts:
    """Counters of one cache in this process since it was opened. A requested block is either a hit or a miss."""

    hits: int = 0  # blocks found in the folder
    misses: int = 0  # blocks fetched, whole or in part
    bytes_cached: int = 0  # returned from the folder
    bytes_fetched: int = 0  # got by fetch()
    not_kept: int = 0  # missed blocks for which there was no room, or that could not be written
    dropped: int = 0  # blocks removed by drop(), or because their size was wrong


@dataclass(frozen=True, slots=True)
class _Block:
    folder: str  # of its set
    name: str
    start: int  # in the file
    stop: int

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}"


class _Open:
    """The descriptor of a block, closed when nobody refers to it any more: never under a reader in another thread."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self.descriptor)
        self.size, self.used = status.st_size, status.st_mtime

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class NodeCache:
    """A cache of at most `limit` bytes of blocks in `folder`, in complete sets of 256 MiB, or one smaller set."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Open the cache. Raises UserError for too small a limit, or a folder that cannot be created or is not ours."""
        if limit < MINIMUM:
            raise UserError(f"stream.cache.gigabytes: {limit / 1e9:g}; allowed are {MINIMUM / 1e9:g} or more")
        self.counts = CacheCounts()
        self._sets, self._ways = max(1, limit // (WAYS * BLOCK)), min(WAYS, limit // BLOCK)
        self._folder, self._root = folder, folder / "v1"
        self._since = time.time()  # blocks used later are in use
        self._expected: frozenset[str] = frozenset()
        self._full: dict[str, float] = {}  # by set: until when it is taken to be full
        self._paused_until, self._warned = 0.0, False
        self._mutex = threading.Lock()  # over the counts and the open blocks
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._held: set[int] = set()  # locks that threads of this process hold
        self._freed = threading.Condition()
        self._lock: int | None = None
        try:
            for path in (folder, self._root):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                if path.stat().st_uid != os.geteuid():
                    raise UserError(f"stream.cache.folder: {path} belongs to another user; allowed is one of your own")
        except OSError as error:
            raise UserError(
                f"stream.cache.folder: {folder}: {error.strerror}; allowed is a folder that you can write"
            ) from error
        try:
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self._without_locks(error)
        self._trim()

    def read(self, file: str, size: int, start: int, stop: int, fetch: Fetch) -> memoryview:
        """Read the bytes [start, stop) of a file of `size` bytes. `file` names the content, say by URL and checksum.

        What is not in the cache comes from `fetch(start, stop)`, called with at most 16 MiB in this thread; its errors
        pass through. Raises OSError where it returns another number of bytes than it was asked for.
        """
        assert 0 <= start <= stop <= size, (file, size, start, stop)
        whole = memoryview(bytearray(stop - start))
        if start == stop:
            return whole.toreadonly()
        digest = _digest(file)

        def fetched(first: int, last: int) -> memoryview:
            data = memoryview(fetch(first, last))
            if len(data) != last - first:
                raise OSError(errno.EIO, f"{file}: {len(data)} bytes came for bytes {first} to {last}")
            self._count(bytes_fetched=len(data))
            return data

        def not_cached(blocks: list[_Block]) -> list[_Block]:
            """Read the blocks in the folder; return those that are not there."""
            return [block for block in blocks if not self._cached(block, *_overlap(block, start, whole))]

        missing = not_cached([self._block(digest, number, size) for number in range(start // BLOCK, -(-stop // BLOCK))])
        admitted = {block.start for block in missing if self._admits(block)}
        for run in _runs(missing, lambda block: block.start in admitted):
            if run[0].start not in admitted:
                first, last = max(start, run[0].start), min(stop, run[-1].stop)
                whole[first - start : last - start] = fetched(first, last)
                self._count(misses=len(run), not_kept=len(run))
                continue
            with self._locked([block.name for block in run], FETCH_WAIT):  # got or not: waiting was all it is for
                for rest in _runs(not_cached(run)):  # another rank may have fetched some of them meanwhile
                    data = fetched(rest[0].start, rest[-1].stop)
                    self._count(misses=len(rest))
                    for block in rest:
                        content = data[block.start - rest[0].start : block.stop - rest[0].start]
                        at, part = _overlap(block, start, whole)
                        part[:] = content[at : at + len(part)]
                        self._keep(block, content)
        return whole.toreadonly()

    def expect(self, files: Iterable[str]) -> None:
        """Name the files that will be read from now on, as in read(): the shards of a stage. Their blocks are in use
        even if they were last read by an earlier life of the run; those of other files, unless read from now on, go.
        """
        self._expected = frozenset(map(_digest, files))
        self._since = time.time()
        self._full.clear()

    def drop(self, file: str, start: int, stop: int) -> None:
        """Forget the blocks with these bytes of a file: its content was found to be wrong."""
        digest = _digest(file)
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            self._discard(self._block(digest, number, stop))

    def close(self) -> None:
        """Close the open files; a later read opens them again, though without locks."""
        with self._mutex:
            self._open.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # One block

    def _block(self, digest: str, number: int, size: int) -> _Block:
        name = f"{digest}-{number:06d}"
        place = jump_hash(_hash(name), self._sets)
        return _Block(f"{self._root}/{place:05d}", name, number * BLOCK, min((number + 1) * BLOCK, size))

    def _cached(self, block: _Block, at: int, part: memoryview) -> bool:
        """Read a part of a block, from its byte `at` on, and mark it as used. Returns False if it is not cached."""
        try:
            with self._mutex:
                entry = self._open.pop(block.path, None)
            if entry is None:
                entry = _Open(block.path)
                if entry.size != block.stop - block.start:
                    self._discard(block)
                    return False
            if os.preadv(entry.descriptor, [part], at) != len(part):  # emptied since it was opened
                return False
        except OSError:
            return False
        with self._mutex:
            self._open[block.path] = entry  # as the last used one
            while len(self._open) > DESCRIPTORS:
                self._open.popitem(last=False)
        now = time.time()
        if entry.used < max(self._since, now - TOUCH):
            entry.used = now
            with contextlib.suppress(OSError):
                os.utime(entry.descriptor, (now, now))
        self._count(hits=1, bytes_cached=len(part))
        return True

    def _discard(self, block: _Block) -> None:
        with self._mutex:
            self._open.pop(block.path, None)
        with contextlib.suppress(OSError):
            _remove(block.path)
            self._count(dropped=1)

    def _keep(self, block: _Block, content: memoryview) -> None:
        """Write a block. The cache is an aid: where that fails, the run goes on without it."""
        try:
            with self._locked([os.path.basename(block.folder)], WRITE_WAIT) as held:
                if not held:
                    raise TimeoutError(errno.ETIMEDOUT, "another process holds a set of blocks and does not go on")
                if not os.path.exists(block.path):  # as it does where a slow fetch was not waited for
                    if self._make_room(block):
                        self._write(block, content)
                    else:
                        self._count(not_kept=1)
        except OSError as error:
            self._count(not_kept=1)
            self._paused_until = time.monotonic() + PAUSE
            if not self._warned:
                self._warned = True
                log.warning("%s: %s; the run goes on and keeps fewer blocks there", self._folder, first_line(error))

    def _write(self, block: _Block, content: memoryview) -> None:
        temporary = f"{block.folder}/new-{os.urandom(8).hex()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                while content:
                    content = content[os.write(descriptor, content) :]
                now = time.time()  # by the clock that it is compared with, which need not be the file server's
                os.utime(descriptor, (now, now))
            finally:
                os.close(descriptor)
            os.rename(temporary, block.path)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(temporary)
            raise

    # One set

    def _names(self, folder: str) -> list[str]:
        try:  # NFS shows a removed file that is still open as .nfs...; it is empty by then
            return [name for name in os.listdir(folder) if not name.startswith(".")]
        except FileNotFoundError:
            return []

    def _ages(self, folder: str) -> list[tuple[bool, float, str]]:
        """Return the files of a set in the order of their eviction: (in use, time of last use, name)."""
        files = []
        for name in self._names(folder):
            with contextlib.suppress(FileNotFoundError):
                used = os.stat(f"{folder}/{name}").st_mtime
                files.append((used >= self._since or name.split("-")[0] in self._expected, used, name))
        return sorted(files)

    def _admits(self, block: _Block) -> bool:
        """Return whether its set would admit this new block."""
        now = time.monotonic()
        if now < self._paused_until:
            return False
        if _has_turn(block):
            return True
        if now < self._full.get(block.folder, 0.0):
            return False
        if len(self._names(block.folder)) < self._ways or any(not in_use for in_use, *_ in self._ages(block.folder)):
            return True
        self._full[block.folder] = now + FULL
        return False

    def _make_room(self, block: _Block) -> bool:
        """Make room for a new block in its set, whose lock is held; return whether there is any. Raises OSError."""
        os.makedirs(block.folder, 0o700, exist_ok=True)
        self._shrink(block.folder, self._ways)
        if len(self._names(block.folder)) >= self._ways:
            if all(in_use for in_use, *_ in self._ages(block.folder)) and not _has_turn(block):
                return False
            self._shrink(block.folder, self._ways - 1)
        return True

    def _shrink(self, folder: str, ways: int) -> None:
        """Remove what dead writers left in a set whose lock is held, and blocks beyond this number."""
        for name in self._names(folder):
            if name.startswith("new-"):
                path = f"{folder}/{name}"
                with contextlib.suppress(FileNotFoundError):
                    # Without locks its writer may live: only an old one is known to be left behind.
                    if self._lock is not None or os.stat(path).st_mtime < time.time() - PAUSE:
                        _remove(path)
        if len(self._names(folder)) > ways:
            ages = self._ages(folder)
            for _, _, name in ages[: max(0, len(ages) - ways)]:
                with contextlib.suppress(FileNotFoundError):
                    _remove(f"{folder}/{name}")

    def _trim(self) -> None:
        """Remove what an earlier, larger limit allowed."""
        for name in self._names(str(self._root)):
            beyond = name.isdigit() and int(name) >= self._sets
            if beyond or self._ways < WAYS:
                with contextlib.suppress(OSError), self._locked([name], WRITE_WAIT) as held:
                    if held:
                        self._shrink(f"{self._root}/{name}", 0 if beyond else self._ways)
                        if beyond:
                            os.rmdir(self._root / name)

    # Locks

    @contextlib.contextmanager
    def _locked(self, names: list[str], seconds: float) -> Iterator[bool]:
        """Hold the locks of these names; False where another holder did not give one back in time."""
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as held:
            yield all(self._acquire(number, deadline, held) for number in sorted({_hash(name) for name in names}))

    def _acquire(self, number: int, deadline: float, held: contextlib.ExitStack) -> bool:
        with self._freed:  # first among the threads of this process, then among processes
            if not self._freed.wait_for(lambda: number not in self._held, deadline - time.monotonic()):
                return False
            self._held.add(number)
        held.callback(self._release, number)
        pause = 0.001
        while not self._file_lock(fcntl.F_WRLCK, number):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        held.callback(self._file_lock, fcntl.F_UNLCK, number)
        return True

    def _release(self, number: int) -> None:
        with self._freed:
            self._held.discard(number)
            self._freed.notify_all()

    def _file_lock(self, kind: int, number: int) -> bool:
        """Take or free one byte of the lock file for this cache, not for the process; False where it is taken."""
        if self._lock is None:
            return True
        try:
            fcntl.fcntl(self._lock, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, number, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            self._without_locks(error)
        return True

    def _without_locks(self, error: OSError) -> None:
        """Go on without locks, which some network file systems lack: ranks may then fetch and write a block twice."""
        self._lock = None
        log.warning("%s: no file locks (%s); ranks may fetch the same block twice", self._folder, error.strerror)

    def _count(self, **more: int) -> None:
        with self._mutex:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)


def jump_hash(key: int, buckets: int) -> int:
    """Return the bucket of a 64-bit key; with n + 1 instead of n buckets, one key in n + 1 moves, into the new one.

    Source: Lamping and Veach, "A fast, minimal memory, consistent hash algorithm", 2014.
    """
    bucket, following = -1, 0
    while following < buckets:
        bucket = following
        key = (key * 2862933555777941757 + 1) & (2**64 - 1)
        following = int((bucket + 1) * (2**31 / ((key >> 33) + 1)))
    return bucket


@lru_cache(maxsize=4096)
def _digest(file: str) -> str:
    return blake2b(file.encode(), digest_size=16).hexdigest()


def _hash(name: str) -> int:
    """Return a hash of 62 bits of a name, which is also an offset in the lock file."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") >> 2


def _overlap(block: _Block, start: int, whole: memoryview) -> tuple[int, memoryview]:
    """Return the offset in a block of the part that is requested from byte `start` on, and the target of that part."""
    first = max(start, block.start)
    return first - block.start, whole[first - start : block.stop - start]


def _has_turn(block: _Block) -> bool:
    return _hash(f"{block.name} {time.time() // HOUR}") % RENEWAL == 0


def _remove(path: str) -> None:
    """Empty a file, then unlink it: a descriptor that another process has on it holds no space any more."""
    os.truncate(path, 0)
    os.unlink(path)


def _runs(blocks: list[_Block], alike: Callable[[_Block], object] = lambda block: None) -> Iterator[list[_Block]]:
    """Yield runs of neighbouring blocks that are alike, at most RUN blocks each."""
    run: list[_Block] = []
    for block in blocks:
        if run and (run[-1].stop != block.start or len(run) == RUN or alike(run[-1]) != alike(block)):
            yield run
            run = []
        run.append(block)
    if run:
        yield run
