"""Reach object stores with obstore: clients, credentials, the meaning of errors, and how long a request is repeated.

Below store.py. A request is repeated after 429 and 5xx, resets, stalls, short bodies and expired keys, each time after
a random wait whose bound doubles ("full jitter": Brooker, "Exponential Backoff And Jitter", 2015). `Traffic` counts it.
"""

import configparser
import contextlib
import os
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError, first_line

RETRIES = {"max_retries": 10, "retry_timeout": timedelta(minutes=2)}  # of one request that is no ranged read
PATIENCE = 180.0  # seconds after which a ranged read is given up
STALL = timedelta(seconds=15)  # without a byte
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds
KEYS_HOLD = timedelta(minutes=5)  # then a file of keys is read again
S3 = ("s3", "s3a")


@dataclass
class Traffic:
    """The requests to stores so far, for the board."""

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


class Backoff:
    """The waits between the attempts of one request."""

    def __init__(self, given_up: threading.Event) -> None:
        self.attempts = 0
        self._given_up, self._deadline = given_up, time.monotonic() + PATIENCE

    @property
    def over(self) -> bool:
        return time.monotonic() > self._deadline

    def wait(self) -> None:
        """Wait before the next attempt. Raises CancelledError once nobody waits for the answer any more."""
        if self._given_up.wait(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**self.attempts))):
            raise CancelledError
        self.attempts += 1


def connect(url: str, retried: bool) -> Any:
    """Return obstore's client for a URL. `retried`: obstore repeats requests itself; else it reports every failure."""
    import obstore.store

    scheme = url.split("://")[0]
    options: dict[str, Any] = {"retry_config": RETRIES}
    if not retried:
        limits = {"read_timeout": STALL, "timeout": timedelta(seconds=PATIENCE)}
        options = {"retry_config": {"max_retries": 0}, "client_options": limits | _connection(scheme)}
    if scheme == "http":  # the URL itself says that it shall be without TLS
        options["client_options"] = options.get("client_options", {}) | {"allow_http": True}
    if scheme in S3 and (file := _keys_file()) is not None:
        options["credential_provider"] = lambda: read_keys(file)
    try:
        return obstore.store.from_url(url, **({"mkdir": True} if scheme == "file" else options))
    except Exception as error:
        raise UserError(f"{url}: {first_line(error)}; allowed are a folder and s3, gs, az, http, file URLs") from error


def _connection(scheme: str) -> dict[str, str]:
    """Return the connection's options from the environment: AWS_ALLOW_HTTP, AZURE_PROXY_URL, ...

    obstore reads these too, but forgets all of them once it is given any option of the client.
    """
    prefix = {"s3": "AWS", "s3a": "AWS", "gs": "GOOGLE"}.get(scheme, "AZURE")
    names = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_ca_certificate", "proxy_excludes")
    match = {name: os.environ.get(f"{prefix}_{name.upper()}") for name in names}
    return {name: value for name, value in match.items() if value}


_HOPE = (
    ("expired", r"ExpiredToken|TokenRefreshRequired|RequestTimeTooSkewed|token .{0,20}expired"),
    ("throttled", r"status code: 429|SlowDown|TooManyRequests|Throttl"),
    ("refused", r"status code: 5\d\d|InternalError|ServiceUnavailable"),
    ("stalled", r"timed out|kind: Timeout"),
    ("reset", r"reset|closed|refused|broken pipe|incomplete|unexpected e|response body|sending request|connect"),
)  # fmt: skip


def retry_cause(error: Exception, answered: bool) -> str | None:
    """Return why a request may succeed if repeated, or None. `answered`: the store has granted one before."""
    import obstore.exceptions as refusals

    # What it was stands in the first kind of the debugging text, whose other words (retry_timeout) would mislead.
    text, _, debug = str(error).partition("\n\nDebug source")
    if match := re.search(r"kind: Timeout", debug):
        text += match[0]
    if "builder error" in text:  # it could not even be sent
        return None
    cause = next((cause for cause, sign in _HOPE if re.search(sign, text, re.IGNORECASE)), None)
    denied = isinstance(error, (PermissionError, refusals.PermissionDeniedError, refusals.UnauthenticatedError))
    if denied or cause == "expired":
        # Ceph says AccessDenied of a key that has expired. A key in the environment stays what it is for good.
        return "expired" if answered and not os.environ.get("AWS_ACCESS_KEY_ID") else None
    return cause


def error_summary(error: Exception) -> str:
    """Return the gist of obstore's long messages: the server's answer, else the innermost cause."""
    text = first_line(error)
    if match := re.search(r"<Code>(.*?)</Code>(?:<Message>(.*?)</Message>)?", str(error)):
        return ": ".join(part for part in match.groups() if part)
    return text.split(" - ", 1)[-1][:200]


def _keys_file() -> Path | None:
    """Return the shared credentials file if the environment has no key and the file has one for the profile."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    with contextlib.suppress(UserError):
        read_keys(file)
        return file
    return None


def read_keys(file: Path) -> dict[str, Any]:
    """Read the keys of AWS_PROFILE, as obstore expects them from a provider. Raises UserError."""
    profile = os.environ.get("AWS_PROFILE", "default")
    try:
        entries = configparser.ConfigParser(interpolation=None)
        entries.read_string(file.read_text())
        section = entries[profile]
        return {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
            "token": section.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + KEYS_HOLD,
        }
    except (OSError, configparser.Error, KeyError) as error:
        raise UserError(f"{file}: no whole key of profile '{profile}' there") from error
