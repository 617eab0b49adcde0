"""Where shards lie: a folder, or an object store behind a URL. Reads whole files and byte ranges.

    store = Store("/data/padchest")                 # a folder
    store = Store("s3://bucket/padchest")           # obstore: s3, gs, az, http and file URLs
    store.read_range("train-000000.tar", 512, 100)

A fragment names a subset of the samples that lie there: Store("/data/padchest#balanced").subset is "balanced", and
its manifest is balanced.json (manifest.py). A path that is no string is taken as it stands.

Safe to use from many threads. obstore's own threads do not survive a fork: open stores after forking. Credentials,
the endpoint and the region come from the environment, as for other S3 tools: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_REGION, and AWS_ALLOW_HTTP=true for an endpoint without TLS. Without a key there, those of
AWS_PROFILE in ~/.aws/credentials (or AWS_SHARED_CREDENTIALS_FILE), which is read again when they expire, so that
whatever renews that file renews the job's; else the web identity, container or machine that obstore finds.

A ranged read is repeated after 429 and 5xx, resets, stalls, short bodies and expired credentials, after a random wait
that doubles (full jitter; Brooker, "Exponential Backoff And Jitter", 2015). `Traffic` counts all of it.
"""

import configparser
import contextlib
import logging
import mmap
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from radhpc.errors import UserError, first_line
from radhpc.files import write_atomically

__all__ = ["Store", "Traffic", "write_atomically"]

log = logging.getLogger("radhpc")

_SUBSET = re.compile(r"(?P<url>.*)#(?P<subset>[a-z][a-z0-9_-]*)", re.DOTALL)


MODE = 0o640  # of files in a folder: owner and group may read patients' data, others not
RETRIES = {"max_retries": 10, "retry_timeout": timedelta(minutes=2)}  # of one request that is no ranged read
PART = 16 << 20  # bytes of one part of an upload
MAPS = 160  # shards that are mapped at a time
PATIENCE = 180.0  # seconds after which a ranged read is given up
STALL = timedelta(seconds=15)  # without a byte
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds
CREDENTIALS_HOLD = timedelta(minutes=5)  # then ~/.aws/credentials is read again

# File systems of this machine alone: their files are mapped. A network's may fail in mid-read, which a mapping answers
# with SIGBUS; those are read into memory.
LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "overlay", "tmpfs", "ramfs")
)


@dataclass
class Traffic:
    """What was asked of stores, for the board."""

    requests: int = 0
    bytes: int = 0
    retries: Counter[str] = field(default_factory=Counter)  # by cause
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, requests: int = 0, bytes: int = 0, retry: str | None = None) -> None:
        with self._lock:
            self.requests += requests
            self.bytes += bytes
            if retry is not None:
                self.retries[retry] += 1


class Store:
    """A flat folder of files behind a path or a URL."""

    def __init__(self, url: str | os.PathLike[str], traffic: Traffic | None = None) -> None:
        found = _SUBSET.fullmatch(url) if isinstance(url, str) else None
        self.subset = found["subset"] if found else None
        self.url = (found["url"] if found else os.fspath(url)).rstrip("/")
        self.folder = None if "://" in self.url else Path(self.url)
        self.traffic = traffic or Traffic()
        self._descriptors: dict[str, int] = {}
        self._maps: dict[str, memoryview] = {}
        self._reading: Any = None
        self._lock = threading.Lock()

    @cached_property
    def _remote(self) -> Any:
        return self._open(retry_config=RETRIES)

    def _reader(self) -> Any:
        """The client of ranged reads, whose retries are ours."""
        with self._lock:
            if self._reading is None:
                limits = {"read_timeout": STALL, "timeout": timedelta(seconds=PATIENCE)}
                self._reading = self._open(retry_config={"max_retries": 0}, client_options=limits)
            return self._reading

    def _open(self, **options: Any) -> Any:
        import obstore.store

        scheme = self.url.split("://")[0]
        if scheme in ("s3", "s3a") and (file := _credentials_file()) is not None:
            options["credential_provider"] = lambda: _read_credentials(file)
        if scheme == "http":  # the URL itself says that it shall be without TLS
            options["client_options"] = options.get("client_options", {}) | {"allow_http": True}
        elif "client_options" in options:
            options["client_options"] |= _client_options(scheme)
        try:
            return obstore.store.from_url(self.url, **({"mkdir": True} if scheme == "file" else options))
        except Exception as error:
            raise UserError(
                f"{self.url}: {first_line(error)}; allowed are a folder and s3, gs, az, http, file URLs"
            ) from error

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises FileNotFoundError."""
        if self.folder is not None:
            return (self.folder / name).read_bytes()
        with self._explain(name):
            return bytes(self._remote.get(name).bytes())

    def read_range(self, name: str, offset: int, length: int, given_up: threading.Event | None = None) -> Any:
        """Read `length` bytes from `offset`; fewer where the file ends before: bytes, or what memoryview takes.

        Raises FileNotFoundError, and CancelledError between two attempts once `given_up` is set.
        """
        if self.folder is not None:
            return os.pread(self._descriptor(name), length, offset)
        if length <= 0:
            return b""
        return self._persist(name, offset, length, given_up or threading.Event())

    def _persist(self, name: str, offset: int, length: int, given_up: threading.Event) -> Any:
        """One ranged read, repeated while there is hope."""
        deadline, attempt = time.monotonic() + PATIENCE, 0
        while True:
            with self._explain(name):
                try:
                    data = self._reader().get_range(name, start=offset, length=length)
                    self.traffic.add(requests=1, bytes=len(data))
                    if len(data) == length:
                        return data
                    size = self.size(name)
                    if size < offset + length and len(data) == max(0, size - offset):
                        return data
                    cause, said = "short", f"{len(data)} of {length} bytes came"
                except FileNotFoundError:
                    raise
                except Exception as error:
                    self.traffic.add(requests=1)
                    hope = _hope(error)
                    if hope is None or time.monotonic() > deadline:
                        raise
                    cause, said = hope, _said(error)
                    if cause == "expired":
                        with self._lock:
                            self._reading = None  # the next one asks for credentials anew
            if time.monotonic() > deadline:
                raise UserError(f"{self.url}/{name}: the store does not answer as it should ({said})")
            self.traffic.add(retry=cause)
            if attempt in (3, 6):
                log.warning("%s/%s: %s; trying again", self.url, name, said)
            if given_up.wait(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))):
                raise CancelledError
            attempt += 1

    def mapped(self, name: str, size: int) -> memoryview | None:
        """A whole file of `size` bytes on a local disk, without a copy; None for one that is not on a local disk."""
        view = self._maps.get(name)
        if view is not None:
            return view
        if self.folder is None or not self.on_local_disk:
            return None
        with self._lock:
            try:
                with open(self.folder / name, "rb") as file:
                    found = os.fstat(file.fileno()).st_size
                    if found != size:
                        raise UserError(
                            f"{self.url}/{name}: {found} bytes, {size} when this run began: cut or replaced"
                        )
                    view = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            except FileNotFoundError as error:
                raise UserError(f"{self.url}/{name}: gone while it is being read") from error
            while len(self._maps) >= MAPS:  # a mapping lives on in the samples that were cut out of it
                del self._maps[next(iter(self._maps))]
            self._maps[name] = view
            return view

    @cached_property
    def on_local_disk(self) -> bool:
        """Whether these are files of this machine alone."""
        return self.folder is not None and _file_system(self.folder) in LOCAL

    def size(self, name: str) -> int:
        """The size in bytes. Raises FileNotFoundError."""
        if self.folder is not None:
            return (self.folder / name).stat().st_size
        with self._explain(name):
            return int(self._remote.head(name)["size"])

    def names(self) -> list[str]:
        """The names of all files, without those of folders below it."""
        if self.folder is not None:
            return sorted(path.name for path in self.folder.iterdir() if path.is_file()) if self.folder.exists() else []
        with self._explain(""):
            return sorted(entry["path"] for entry in self._remote.list_with_delimiter()["objects"])

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; it appears under its name complete or not at all."""
        if self.folder is not None:
            write_atomically(self.folder / name, data, MODE)
        else:
            with self._explain(name):
                self._remote.put(name, data, chunk_size=PART)

    def upload(self, path: Path, name: str) -> None:
        """Put a local file there, in parts; it appears under its name complete or not at all."""
        if self.folder is not None:
            write_atomically(self.folder / name, path.read_bytes(), MODE)
            return
        with self._explain(name):
            self._remote.put(name, path, chunk_size=PART)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError), self._explain(name):
                self._remote.delete(name)

    @contextlib.contextmanager
    def _explain(self, name: str) -> Iterator[None]:
        """Turn an object store's refusals into FileNotFoundError, or one line that names the URL."""
        import obstore.exceptions as refusals

        try:
            yield
        except (FileNotFoundError, refusals.NotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise UserError(f"{self.url}: no such bucket") from error
            raise FileNotFoundError(f"{self.url}/{name}") from error
        except (refusals.BaseError, PermissionError) as error:
            denied = isinstance(error, (PermissionError, refusals.PermissionDeniedError, refusals.UnauthenticatedError))
            hint = "check the credentials in the environment" if denied else "the store does not answer as it should"
            raise UserError(f"{self.url}/{name}: {hint} ({_said(error)})") from error

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)  # type: ignore[operator]
            return self._descriptors[name]

    def close(self) -> None:
        """Close the files that ranges were read from."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._maps.clear()


def _said(error: Exception) -> str:
    """The gist of obstore's long messages: what the server said, else the innermost cause."""
    text = first_line(error)
    if said := re.search(r"<Code>(.*?)</Code>(?:<Message>(.*?)</Message>)?", str(error)):
        return ": ".join(part for part in said.groups() if part)
    return text.split(" - ", 1)[-1][:200]


_HOPE = (
    ("expired", r"ExpiredToken|TokenRefreshRequired|InvalidAccessKeyId|RequestTimeTooSkewed|token.{0,20}expired"),
    ("throttled", r"status code: 429|SlowDown|TooManyRequests|Throttl"),
    ("refused", r"status code: 5\d\d|InternalError|ServiceUnavailable"),
    ("stalled", r"timed? ?out|TimedOut"),
    ("reset", r"reset|closed|refused|broken pipe|incomplete|unexpected (eof|end)|decoding response body|sending request"
              r"|body error|connect"),
)  # fmt: skip


def _hope(error: Exception) -> str | None:
    """Why a request may succeed another time, or None."""
    return next((cause for cause, sign in _HOPE if re.search(sign, str(error), re.IGNORECASE)), None)


def _client_options(scheme: str) -> dict[str, str]:
    """What the environment says of the connection: AWS_ALLOW_HTTP, AZURE_PROXY_URL, ...

    obstore reads these too, but forgets all of them once it is given any option of the client.
    """
    prefix = {"s3": "AWS", "s3a": "AWS", "gs": "GOOGLE"}.get(scheme, "AZURE")
    names = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_ca_certificate", "proxy_excludes")
    found = {name: os.environ.get(f"{prefix}_{name.upper()}") for name in names}
    return {name: value for name, value in found.items() if value}


def _credentials_file() -> Path | None:
    """The shared file of credentials, where no key stands in the environment and the profile has one there."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    with contextlib.suppress(UserError):
        _read_credentials(file)
        return file
    return None


def _read_credentials(file: Path) -> dict[str, Any]:
    """The keys of AWS_PROFILE, as obstore wants them of a provider."""
    profile = os.environ.get("AWS_PROFILE", "default")
    try:
        entries = configparser.ConfigParser(interpolation=None)
        entries.read_string(file.read_text())
        section = entries[profile]
        return {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
            "token": section.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + CREDENTIALS_HOLD,
        }
    except (OSError, configparser.Error, KeyError) as error:
        raise UserError(f"{file}: no whole key of profile '{profile}' there") from error


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on: that of the longest mount point above it."""
    path, best = os.path.realpath(folder), ("", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        point = fields[4].encode().decode("unicode_escape")
        if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]
