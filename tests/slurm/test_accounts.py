"""Accounts as most clusters keep them, in slurmdbd: whose account a job may use is said before it is submitted."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm import box
from tests.conftest import free_port
from tests.waiting import wait_for

pytestmark = [pytest.mark.box, pytest.mark.timeout(200)]


def installed() -> bool:
    return all(
        shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("slurmctld", "slurmdbd", "mariadbd")
    )


@contextlib.contextmanager
def database(folder: Path, port: int) -> Iterator[None]:
    """MariaDB for slurmdbd alone."""
    where = ["--no-defaults", f"--datadir={folder}/data", "--user=root"]
    subprocess.run(["mariadb-install-db", *where], check=True, capture_output=True)
    command = ["mariadbd", *where, f"--socket={folder}/socket", f"--port={port}", "--bind-address=127.0.0.1"]
    with (folder / "mariadb.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        client = ["mariadb", "--no-defaults", f"--socket={folder}/socket", "-e"]
        wait_for(lambda: subprocess.run([*client, "select 1"], capture_output=True, check=False).returncode == 0, 60)
        for host in ("127.0.0.1", "localhost"):
            named = f"'slurm'@'{host}'"
            subprocess.run([*client, f"create user {named} identified by 'x'; grant all on *.* to {named}"], check=True)
        yield
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def accounting(folder: Path, conf: Path, port: int) -> Iterator[None]:
    """slurmdbd in front of the database, for the box of this slurm.conf, whose slurmctld starts again with it."""
    munge, mine = conf.parent / "munge" / "socket", free_port()
    (folder / "slurmdbd.conf").write_text(
        f"DbdHost={socket.gethostname()}\nDbdAddr=127.0.0.1\nDbdPort={mine}\nAuthType=auth/munge\n"
        f"AuthInfo=socket={munge}\nSlurmUser=root\nStorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
        f"StoragePort={port}\nStorageUser=slurm\nStoragePass=x\nPidFile={folder}/slurmdbd.pid\n"
        f"LogFile={folder}/slurmdbd.log\n"
    )
    (folder / "slurmdbd.conf").chmod(0o600)
    with conf.open("a") as file:
        file.write(
            f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={mine}\nAccountingStoragePass={munge}\nAccountingStorageEnforce=associations\n"
        )
    daemon = subprocess.Popen(["slurmdbd", "-D"], env={**os.environ, "SLURM_CONF": f"{folder}/slurmdbd.conf"})
    try:
        name = next(line.partition("=")[2] for line in conf.read_text().splitlines() if line.startswith("ClusterName="))
        manager = ["sacctmgr", "--immediate", "--quiet", "add"]
        environment = {**os.environ, "SLURM_CONF": str(conf)}
        wait_for(lambda: subprocess.run([*manager, "cluster", name], env=environment, check=False).returncode == 0, 60)
        for words in (["account", "radiology"], ["account", "cardiology"], ["user", "root", "account=radiology"]):
            subprocess.run([*manager, *words], env=environment, check=True)
        old = int((conf.parent / "slurmctld.pid").read_text())
        os.kill(old, signal.SIGTERM)
        wait_for(lambda: not Path(f"/proc/{old}").exists(), 30)
        subprocess.run(["slurmctld", "-f", conf], env={**os.environ, **box.ENVIRONMENT}, check=True)
        wait_for(lambda: [node["state"] for node in box.status(conf.parent)["nodes"]] == ["idle"], 60)
        yield
    finally:
        daemon.kill()
        daemon.wait()


@pytest.fixture
def profile(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A profile of a cluster that knows accounts, of which radiology is ours."""
    if not installed() or os.getuid():
        assert os.environ.get("CI") != "true", "slurmdbd is missing under CI"
        pytest.skip("SLURMDBD OR MARIADB IS NOT INSTALLED: no accounts are tested; see `make slurm`")
    from slurm.profile import FOLDER

    short = Path(tempfile.mkdtemp(prefix="radhpc-"))  # as the path of a socket must be
    port = free_port()
    conf = Path(box.up(short / "box", nodes=1)["conf"])
    try:
        with database(short, port), accounting(short, conf, port):
            text = (FOLDER / "box.yaml").read_text().replace("/tmp/radhpc-box/slurm.conf", str(conf))

            def of(account: str) -> Path:
                path = tmp_path / f"{account}.yaml"
                path.write_text(f"{text.replace('nodes: 2', 'nodes: 1')}account: {account}\n")
                return path

            yield of
    finally:
        box.down(short / "box")
        shutil.rmtree(short)


def test_an_account_that_is_not_ours_is_named_before_the_submission(
    launch: Callable[..., subprocess.CompletedProcess[str]], profile: Callable[[str], Path], recipe_file: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("USER", raising=False)  # as under cron
    run = tmp_path / "run"
    said = launch("train", recipe_file, "--on", profile("cardiology"), "--run", run, status=2).stderr.splitlines()
    assert "error account 'cardiology': not yours" in said[-1]
    assert said[-1].endswith("you have radiology, root")
    assert (
        "did you mean 'radiology'"
        in launch("train", recipe_file, "--on", profile("radiolgy"), "--run", run, status=2).stderr
    )
    assert not run.exists()
    ours = profile("radiology")
    launch("train", recipe_file, "--on", ours, "--run", run)
    environment = {**os.environ, "SLURM_CONF": ours.read_text().split("SLURM_CONF: ")[1].split()[0]}
    command = ["squeue", "-h", "-o", "%a"]
    wait_for(lambda: "radiology" in subprocess.check_output(command, env=environment, text=True), 60)
