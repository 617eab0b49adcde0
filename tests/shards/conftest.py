"""What the tests of the build share: a salt and folders of their own, and an object store on this machine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards import salt


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds of tests use a known salt, and leave nothing in the user's own folders."""
    home = tmp_path_factory.mktemp("home")
    (home / "salt").write_bytes(b"a salt for tests, of enough bytes")
    folders = {salt.VARIABLE: home / "salt", "XDG_CACHE_HOME": home / "cache", "XDG_STATE_HOME": home / "state"}
    with pytest.MonkeyPatch.context() as patch:
        for name, path in folders.items():
            patch.setenv(name, str(path))
        yield


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """A server that speaks S3 (moto), with a bucket called 'hospital'."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            assert time.monotonic() < deadline, "the object store did not start"
            time.sleep(0.1)
        import boto3

        boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        ).create_bucket(Bucket="hospital")
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL in the bucket, which nobody else uses; the environment says how to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    reach(monkeypatch, s3_port)
    return f"s3://hospital/{tmp_path.name}"


def reach(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
