"""The proxy does what the names of its faults say, before moto and before Ceph."""

import http.client
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import obstore
import pytest

from radhpc.storage.store import Store
from tests.conftest import Moto, Server, reach
from tests.faults import Faults, Request

pytestmark = pytest.mark.timeout(60)
DATA = bytes(range(256)) * 1000
HALF = len(DATA) // 2
PATH = "/faults/shard.tar"
SIGNED = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


@pytest.fixture
def proxy(any_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy before each server, which the environment names as the endpoint; the bucket is called 'faults'."""
    any_server.bucket("faults")
    with Faults("127.0.0.1", any_server.port) as faults:
        reach(monkeypatch, {**any_server.environment, "AWS_ENDPOINT_URL": faults.url})
        yield faults


@pytest.fixture
def bare(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy before moto, which checks no signature, with one object at PATH."""
    moto.bucket("faults")
    with Faults("127.0.0.1", moto.port) as faults:
        reach(monkeypatch, {**moto.environment, "AWS_ENDPOINT_URL": faults.url})
        assert ask(faults, "PUT", PATH, DATA)[0] == 200
        faults.requests.clear()
        yield faults


def ask(
    faults: Faults, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own: status, header (names in lower case) and body."""
    connection = http.client.HTTPConnection("127.0.0.1", faults.port, timeout=10)
    try:
        connection.request(method, path, body, {"Authorization": SIGNED, **headers})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def once(url: str) -> Any:
    """A client that repeats nothing."""
    return obstore.store.from_url(url, retry_config={"max_retries": 0})


def gets(method: str, path: str) -> bool:
    return method == "GET"


def test_without_faults_all_passes_signed(proxy: Faults) -> None:
    store = Store("s3://faults/plain")
    large = os.urandom((32 << 20) + 7)  # in three parts
    store.write("large.tar", large)
    store.write("a name with + and é", b"small")
    assert sorted(store.names()) == ["a name with + and é", "large.tar"]
    assert store.read("large.tar") == large
    assert store.size("large.tar") == len(large)
    remote = once("s3://faults/plain")
    assert bytes(remote.get_range("large.tar", start=1000, length=10)) == large[1000:1010]
    store.delete("large.tar")
    assert store.names() == ["a name with + and é"]
    assert store.read("a name with + and é") == b"small"
    with pytest.raises(FileNotFoundError):
        store.read("large.tar")
    assert Request("GET", "/faults/plain/large.tar", "bytes=1000-1009") in proxy.requests
    assert proxy.bytes_in > len(large)
    assert 2 * len(large) > proxy.bytes_out > len(large)
    assert not proxy.done


def test_boto3_passes_too(proxy: Faults) -> None:
    import boto3  # type: ignore[import-untyped]

    client = boto3.client(
        "s3",
        endpoint_url=proxy.url,
        aws_access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    client.put_object(Bucket="faults", Key="boto/one", Body=DATA)  # announced by Expect: 100-continue
    assert client.get_object(Bucket="faults", Key="boto/one")["Body"].read() == DATA
    assert [one["Key"] for one in client.list_objects_v2(Bucket="faults", Prefix="boto/")["Contents"]] == ["boto/one"]


@pytest.mark.parametrize(("kind", "code"), [("429", "SlowDown"), ("500", "InternalError"), ("503", "SlowDown")])
def test_a_status_for_the_next_requests(bare: Faults, kind: str, code: str) -> None:
    bare.inject(kind, times=2, when=gets, retry_after=3)
    assert ask(bare, "HEAD", PATH)[0] == 200
    for _ in range(2):
        status, header, body = ask(bare, "GET", PATH)
        assert (status, header["retry-after"]) == (int(kind), "3")
        assert f"<Error><Code>{code}</Code>".encode() in body
    assert ask(bare, "GET", PATH)[::2] == (200, DATA)
    bare.inject(kind, times=1)
    status, header, body = ask(bare, "HEAD", PATH)
    assert (status, body, "retry-after" in header) == (int(kind), b"", False)
    assert bare.done == {kind: 3}


def test_a_client_that_repeats_gets_through(proxy: Faults) -> None:
    store = Store("s3://faults/patient")
    proxy.inject("503", times=2, when=lambda method, path: method == "PUT")
    store.write("one", DATA)
    proxy.inject("500", times=2, when=gets)
    assert store.read("one") == DATA
    assert proxy.done == {"503": 2, "500": 2}
    proxy.inject("503", times=1)
    with pytest.raises(Exception, match="SlowDown"):
        once("s3://faults/patient").get("one")


def test_reset_is_before_the_store_and_lost_is_after(bare: Faults) -> None:
    bare.inject("reset", times=1)
    with pytest.raises(ConnectionResetError):
        ask(bare, "PUT", "/faults/never", DATA)
    assert ask(bare, "GET", "/faults/never")[0] == 404
    bare.inject("lost", times=1)
    with pytest.raises(ConnectionResetError):
        ask(bare, "PUT", "/faults/done", DATA)
    assert ask(bare, "GET", "/faults/done")[::2] == (200, DATA)
    assert bare.done == {"reset": 1, "lost": 1}


def received(faults: Faults, path: str = PATH) -> tuple[bytes, bytes, list[float], type[OSError] | None]:
    """A GET by hand: header, body, the seconds until the header and until the end, and what ended the connection."""
    start, ended = time.monotonic(), None
    with socket.create_connection(("127.0.0.1", faults.port), timeout=10) as here:
        here.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {SIGNED}\r\n\r\n".encode())
        data = here.recv(1)
        times = [time.monotonic() - start]
        length = None
        while length is None or len(data) < length:
            try:
                piece = here.recv(1 << 16)
            except OSError as error:
                ended = type(error)
                break
            if not piece:
                ended = EOFError  # type: ignore[assignment]
                break
            data += piece
            if length is None and (end := data.find(b"\r\n\r\n")) >= 0:
                promised = re.search(rb"(?i)content-length: *(\d+)", data[:end])
                assert promised
                length = end + 4 + int(promised[1])
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body, [*times, time.monotonic() - start], ended


FLIPPED = DATA[:HALF] + bytes([DATA[HALF] ^ random.Random(0).randint(1, 255)]) + DATA[HALF + 1 :]  # of the seed 0


@pytest.mark.parametrize(
    ("kind", "body", "promised", "end"),
    [
        ("break", DATA[:HALF], len(DATA), ConnectionResetError),
        ("truncate", DATA[:HALF], len(DATA), EOFError),
        ("shorten", DATA[:HALF], HALF, None),
        ("flip", FLIPPED, len(DATA), None),
    ],
)
def test_a_body_gone_wrong(bare: Faults, kind: str, body: bytes, promised: int, end: type[OSError] | None) -> None:
    bare.inject(kind, times=1)
    assert ask(bare, "HEAD", PATH)[0] == 200  # has no body, so it is not its turn
    head, got, _, ended = received(bare)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert re.findall(rb"(?i)content-length: *(\d+)", head) == [str(promised).encode()]
    assert ended is end
    assert got == body
    assert received(bare)[1] == DATA
    assert bare.done == {kind: 1}


@pytest.mark.parametrize(("kind", "header_waits"), [("stall", False), ("delay", True)])
def test_a_wait(bare: Faults, kind: str, header_waits: bool) -> None:
    bare.inject(kind, times=1, seconds=1)
    _, body, (first, last), ended = received(bare)
    assert (first > 1) == header_waits
    assert 1 < last < 5
    assert (body, ended) == (DATA, None)
    assert received(bare)[2][1] < 1


def test_each_fault_reaches_obstore(proxy: Faults) -> None:
    Store("s3://faults/each").write("one", DATA)
    remote = obstore.store.from_url(
        "s3://faults/each",
        retry_config={"max_retries": 0},
        client_options={"allow_http": True, "read_timeout": "500ms"},
    )

    def read() -> bytes:
        return bytes(remote.get_range("one", start=0, length=len(DATA)))

    assert read() == DATA
    for kind in ("reset", "lost", "stall", "break", "truncate"):
        proxy.inject(kind, times=1, seconds=2)
        with pytest.raises(obstore.exceptions.BaseError):
            read()
    proxy.inject("flip", times=1)
    assert read() == FLIPPED
    assert read() == DATA
    assert proxy.done == dict.fromkeys(("reset", "lost", "stall", "break", "truncate", "flip"), 1)


def test_expired_keys(proxy: Faults, any_server: Server) -> None:
    Store("s3://faults/keys").write("one", DATA)
    remote = once("s3://faults/keys")
    proxy.expire()
    with pytest.raises(obstore.exceptions.PermissionDeniedError, match="ExpiredToken"):
        remote.get("one")
    proxy.renew()
    assert bytes(remote.get("one").bytes()) == DATA
    proxy.expire("somebody else's")
    assert bytes(remote.get("one").bytes()) == DATA
    proxy.expire(any_server.environment["AWS_ACCESS_KEY_ID"], status=400)
    with pytest.raises(obstore.exceptions.BaseError, match="400 Bad Request.*ExpiredToken"):
        remote.get("one")
    proxy.clear()
    assert bytes(remote.get("one").bytes()) == DATA
    assert proxy.done == {"expired": 2}


def test_a_chance_follows_the_seed(moto: Moto) -> None:
    def statuses(seed: int) -> list[int]:
        with Faults("127.0.0.1", moto.port, seed) as faults:
            faults.inject("503", chance=0.3)
            faults.inject("429", chance=0.3)
            found = [ask(faults, "GET", "/")[0] for _ in range(60)]
            assert faults.done == {"503": found.count(503), "429": found.count(429)}
            return found

    first = statuses(1)
    assert first == statuses(1) != statuses(2)
    assert 8 <= first.count(503) <= 28
    assert set(first) == {200, 429, 503}


def test_thirty_two_at_once_on_connections_that_are_kept(proxy: Faults) -> None:
    Store("s3://faults/many").write("one", DATA)
    proxy.inject("stall", times=64, seconds=0.1, when=gets)
    remote = once("s3://faults/many")

    def read(n: int) -> bool:
        return bytes(remote.get_range("one", start=n, length=100_000)) == DATA[n:][:100_000]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(read, range(640)))
    assert 24 <= proxy.most_open <= 32
    assert len([one for one in proxy.requests if one.method == "GET"]) == 640
    assert proxy.connections < 64  # hyper now and then opens one more than it needs
    assert proxy.done == {"stall": 64}


def test_a_kept_connection_and_one_that_is_not(bare: Faults) -> None:
    before, signed = bare.connections, {"Authorization": SIGNED}
    connection = http.client.HTTPConnection("127.0.0.1", bare.port, timeout=10)
    for kind in ("503", "shorten", None):
        if kind:
            bare.inject(kind, times=1)
        connection.request("GET", PATH, headers=signed)
        assert len(connection.getresponse().read()) == {"shorten": HALF, None: len(DATA)}.get(kind, 101)
    connection.request("GET", PATH, headers={**signed, "Connection": "close"})
    assert connection.getresponse().read() == DATA
    connection.close()
    assert bare.connections == before + 1
    with socket.create_connection(("127.0.0.1", bare.port), timeout=10) as here:
        here.sendall(
            f"HEAD {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: {SIGNED}\r\nConnection: close\r\n\r\n".encode()
        )
        assert here.makefile("rb").read().startswith(b"HTTP/1.1 200 ")  # to the end of the connection


def test_a_line_that_is_cut(bare: Faults) -> None:
    bare.cut(after=len(DATA) + 2000)
    assert ask(bare, "PUT", "/faults/before", DATA)[0] == 200
    for method, path in (("PUT", "/faults/never"), ("GET", PATH)):
        with pytest.raises(ConnectionError):
            ask(bare, method, path, DATA if method == "PUT" else None)
    bare.mend()
    assert ask(bare, "GET", "/faults/never")[0] == 404
    assert ask(bare, "GET", "/faults/before")[::2] == (200, DATA)


def test_what_is_no_fault_is_refused(bare: Faults) -> None:
    with pytest.raises(AssertionError, match="404: allowed are 429, 500, 503, break"):
        bare.inject("404")
    with pytest.raises(AssertionError, match="stall: needs seconds"):
        bare.inject("stall")
