"""The gateway: a real Ceph, started, used and ended as a user does it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from bench import gateway
from bench.gateway import DAEMONS, Gateway
from radhpc.core.errors import UserError
from radhpc.storage.store import Store
from tests.conftest import ROOT, reach
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(120)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gateway", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def report(*arguments: str) -> dict[str, Any]:
    """Run a verb with --json, check that it says nothing else, and return what it says."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return dict(json.loads(done.stdout))


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids), 10)


def listening(pid: int) -> list[str]:
    return [one.laddr.ip for one in psutil.Process(pid).net_connections() if one.status == psutil.CONN_LISTEN]


def names(folder: Path) -> list[str]:
    """The programs that have something of this folder in their command."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            found.append(process.info["name"])
    return found


@pytest.mark.ceph
def test_a_life_with_a_lost_machine_and_a_lost_daemon(ceph_installed: None, tmp_path: Path) -> None:
    folder = tmp_path / "gateway"
    place = ["--folder", str(folder)]
    try:
        first = report("up", *place)
        assert (first["state"], first["started"]) == ("up", True)
        assert sorted(first["daemons"]) == sorted(DAEMONS)
        assert {address for pid in first["daemons"].values() for address in listening(pid)} == {"127.0.0.1"}
        assert (folder.stat().st_mode & 0o777, (folder / "gateway.json").stat().st_mode & 0o777) == (0o700, 0o600)
        kill(list(first["daemons"].values()))  # as when the machine goes down
        assert report("status", *place)["state"] == "down"
        second = report("up", *place)
        assert (second["state"], second["started"]) == ("up", True)
        assert second["secret_key"] != first["secret_key"]

        third = run("up", *place)
        assert third.returncode == 0
        assert third.stdout.startswith("the gateway is already up\n")
        assert f"export AWS_ENDPOINT_URL={second['endpoint']}\n" in third.stdout
        other = run("up", *place, "--port", "1")
        assert other.returncode == 2
        assert other.stderr == f"error: --port 1: {folder} is already up at {second['endpoint']}\n"

        kill([second["daemons"]["ceph-osd"]])
        found = report("status", *place)
        assert (found["state"], found["problem"]) == ("broken", "ceph-osd not running")
        refused = run("up", *place)
        assert refused.returncode == 2
        assert refused.stderr.endswith(f"first: python -m bench.gateway down --folder {folder}\n")
        assert sorted(names(folder)) == ["ceph-mgr", "ceph-mon", "radosgw"]
    finally:
        last = report("down", *place)
    assert last["state"] == "down"
    assert not names(folder)
    assert not folder.exists()
    assert report("down", *place)["state"] == "down"


@pytest.mark.ceph
def test_a_program_uses_one_that_is_up_and_leaves_it_up(ceph: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with Gateway(ceph.folder) as again:
        assert again.environment == ceph.environment
        reach(monkeypatch, again.environment)
        assert again.bucket("left-up") == again.bucket("left-up") == "s3://left-up"
        store = Store("s3://left-up/padchest")
        data = os.urandom((16 << 20) + 12345)  # in two parts
        store.write("train-000000.tar", data)
        store.write("manifest.json", b"{}")
    assert gateway.status(ceph.folder)["state"] == "up"
    assert store.names() == ["manifest.json", "train-000000.tar"]
    assert store.size("train-000000.tar") == len(data)
    assert store.read("train-000000.tar") == data
    assert store.read_range("train-000000.tar", 16 << 20, 100) == data[16 << 20 :][:100]
    store.delete("manifest.json")
    with pytest.raises(FileNotFoundError):
        store.read("manifest.json")
    with pytest.raises(UserError, match="s3://nobody-made-it.*no such bucket"):
        Store("s3://nobody-made-it/x").read("manifest.json")


@pytest.mark.ceph
def test_wrong_and_temporary_keys(ceph: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    url = ceph.bucket("temporary") + "/x"
    reach(monkeypatch, ceph.environment)
    Store(url).write("one", b"1")
    reach(monkeypatch, {**ceph.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(UserError, match="check the credentials"):
        Store(url).read("one")
    reach(monkeypatch, ceph.session(1000))
    assert Store(url).read("one") == b"1"
    reach(monkeypatch, ceph.session(5))
    store = Store(url)
    assert store.read("one") == b"1"

    def refusal() -> str:
        try:
            store.read("one")
        except UserError as error:
            return str(error)
        return ""

    assert "AccessDenied" in wait_for(refusal, 20)


def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    monkeypatch.setattr(gateway, "missing_daemons", list)
    with pytest.raises(UserError, match="mine: holds other files"):
        gateway.up(tmp_path / "mine")
    assert gateway.down(tmp_path / "mine")["state"] == "down"
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(UserError, match="a b: allowed are up to 200 letters"):
        gateway.up(tmp_path / "a b")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="link: exists and is not a folder of yours"):
        gateway.up(tmp_path / "link")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*in use; allowed is a free port"):
            gateway.up(tmp_path / "new", port)
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    monkeypatch.setattr(gateway, "ENVIRONMENT", {"PATH": str(tmp_path)})
    with pytest.raises(
        UserError, match="Ceph is not installed .*: apt-get install .* ceph-mon ceph-mgr ceph-osd radosgw"
    ):
        gateway.up(tmp_path / "new")
