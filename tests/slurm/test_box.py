"""The box: a real slurmctld and real slurmds, started and ended through the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from radhpc.core.errors import UserError
from slurm import box
from slurm.box_files import loopback_address

ROOT = Path(box.__file__).parents[1]


@pytest.fixture(scope="module")
def slurm() -> None:
    """Skip what needs SLURM where there is none, but never in CI."""
    if not all(shutil.which(name, path=box.ENVIRONMENT["PATH"]) for name in box.PACKAGES):
        reason = "SLURM is not installed, so the box is NOT tested: apt-get install slurm-wlm munge"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture
def folder(slurm: None) -> Iterator[Path]:
    """A folder for one box, which is taken down whatever happens."""
    with tempfile.TemporaryDirectory(prefix="box-", dir="/tmp", ignore_cleanup_errors=True) as parent:
        yield Path(parent) / "box"
        box.down(Path(parent) / "box")


@pytest.fixture(scope="module")
def running(slurm: None) -> Iterator[dict[str, Any]]:
    """The status of a box of two nodes with a short grace, for the tests that leave it as it was."""
    with tempfile.TemporaryDirectory(prefix="box-", dir="/tmp", ignore_cleanup_errors=True) as parent:
        try:
            yield report("up", "--nodes", "2", "--grace", "2", "--folder", f"{parent}/box")
        finally:
            box.down(f"{parent}/box")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slurm.box", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def report(*arguments: str) -> dict[str, Any]:
    """Run a verb with --json, check that it says nothing else, and return what it says."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return dict(json.loads(done.stdout))


def ask(conf: str, *command: str) -> str:
    environment = {**os.environ, "SLURM_CONF": conf}
    return subprocess.check_output(command, env=environment, text=True, timeout=60, cwd="/tmp").strip()


def submit(conf: str, script: str, *options: str) -> str:
    both_nodes = ["--nodes=2", "--ntasks-per-node=1", "--exclusive", "--output=/dev/null"]
    return ask(conf, "sbatch", "--parsable", *both_nodes, *options, f"--wrap={script}")


def job(conf: str, number: str) -> dict[str, str]:
    words = ask(conf, "scontrol", "--oneliner", "show", "job", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_until(what: Callable[[], bool], seconds: float = 20) -> float:
    """Wait for something to become true, and return how long that took."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.1)
    return time.monotonic() - start


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.box
@pytest.mark.timeout(60)
def test_status_has_what_programs_rely_on(running: dict[str, Any]) -> None:
    folder = str(Path(running["conf"]).parent)
    found = report("status", "--folder", folder)
    assert found["state"] == "up"
    assert Path(found["conf"]).is_absolute()
    assert [node["name"] for node in found["nodes"]] == ["box1", "box2"]
    assert found["partitions"] == [
        {"name": "preemptible", "priority": 1, "preempt_mode": "requeue", "grace": 2},
        {"name": "urgent", "priority": 10, "preempt_mode": "off", "grace": 0},
    ]
    assert "box1" in run("status", "--folder", folder).stdout
    again = report("up", "--grace", "2", "--folder", folder)
    assert not again["started"]
    assert again["daemons"] == running["daemons"]


@pytest.mark.box
@pytest.mark.timeout(60)
def test_only_its_owner_can_read_the_key(running: dict[str, Any]) -> None:
    folder = Path(running["conf"]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "munge" / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.box
@pytest.mark.timeout(60)
def test_a_step_has_one_task_on_each_node(running: dict[str, Any]) -> None:
    script = 'echo "$SLURM_PROCID $SLURMD_NODENAME $SLURM_JOB_NODELIST $SLURM_LAUNCH_NODE_IPADDR"'
    printed = ask(running["conf"], "srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", script)
    tasks = sorted(line.split() for line in printed.splitlines())
    assert [task[:3] for task in tasks] == [["0", "box1", "box[1-2]"], ["1", "box2", "box[1-2]"]]
    assert all(task[3].startswith("127.") for task in tasks)


@pytest.mark.box
@pytest.mark.timeout(60)
def test_nothing_listens_outside_loopback(running: dict[str, Any]) -> None:
    folder = Path(running["conf"]).parent
    number = submit(running["conf"], "srun sleep 60")
    wait_until(lambda: list(box._processes(folder).values()).count("job") >= 6)  # srun, steps, tasks: all there
    listening = [
        connection.laddr.ip
        for pid in box._processes(folder)
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    ask(running["conf"], "scancel", number)
    assert len(listening) > 3, "slurmctld, two slurmds and srun must have been seen"
    assert all(address.startswith("127.") for address in listening), listening


@pytest.mark.box
@pytest.mark.timeout(60)
def test_an_urgent_job_preempts_a_preemptible_one_which_comes_back(running: dict[str, Any]) -> None:
    conf = running["conf"]
    # Left alone it would be requeued too, but SLURM looks at graces that are over only twice a minute.
    script = 'srun sleep 60; test "$SLURM_RESTART_COUNT" || scontrol requeue $SLURM_JOB_ID'
    first = submit(conf, script, "--partition=preemptible")
    wait_until(lambda: job(conf, first)["JobState"] == "RUNNING")
    urgent = submit(conf, "sleep 1", "--partition=urgent")
    assert wait_until(lambda: job(conf, first).get("PreemptTime") != "None") < 10
    wait_until(lambda: job(conf, urgent)["JobState"] == "COMPLETED")
    assert job(conf, first)["Restarts"] == "1"
    wait_until(lambda: job(conf, first)["JobState"] == "RUNNING")
    ask(conf, "scancel", first)
    wait_until(lambda: job(conf, first)["JobState"] == "CANCELLED")


@pytest.mark.box
@pytest.mark.timeout(60)
def test_job_ids_are_not_given_out_by_two_boxes(running: dict[str, Any], folder: Path) -> None:
    earlier = submit(running["conf"], "true")
    later = submit(report("up", "--folder", str(folder))["conf"], "true")
    assert earlier != later
    assert max(int(earlier), int(later)) < 67_043_328


@pytest.mark.box
@pytest.mark.timeout(60)
def test_down_leaves_no_process_and_no_folder(folder: Path) -> None:
    found = report("up", "--folder", str(folder))
    escapes = "trap '' TERM; setsid bash -c \"trap '' TERM; sleep 300; sleep 300\" & srun sleep 300"
    submit(found["conf"], escapes)
    wait_until(lambda: list(box._processes(folder).values()).count("job") >= 8)
    pids = list(box._processes(folder))
    assert set(found["daemons"].values()) < set(pids)
    assert report("down", "--folder", str(folder))["state"] == "down"
    assert not any(alive(pid) for pid in pids)
    assert not folder.exists()
    assert report("down", "--folder", str(folder))["state"] == "down"


@pytest.mark.box
@pytest.mark.timeout(60)
def test_a_box_without_its_controller_is_broken_and_can_be_taken_down(folder: Path) -> None:
    found = report("up", "--nodes", "1", "--folder", str(folder))
    ask(found["conf"], "sbatch", "--output=/dev/null", "--wrap=sleep 300")
    wait_until(lambda: "job" in box._processes(folder).values())
    pids = list(box._processes(folder))
    os.kill(found["daemons"]["slurmctld"], signal.SIGKILL)
    wait_until(lambda: not alive(found["daemons"]["slurmctld"]))

    broken = report("status", "--folder", str(folder))
    assert (broken["state"], broken["problem"]) == ("broken", "slurmctld not running")
    done = run("up", "--nodes", "1", "--folder", str(folder))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "slurm.box down" in done.stderr

    assert report("down", "--folder", str(folder))["state"] == "down"
    assert not any(alive(pid) for pid in pids)
    assert not folder.exists()


@pytest.mark.box
@pytest.mark.timeout(60)
def test_up_works_after_the_machine_went_down(folder: Path) -> None:
    for pid in report("up", "--folder", str(folder))["daemons"].values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not box._processes(folder))
    assert report("status", "--folder", str(folder))["state"] == "down"
    assert (folder / "slurmctld.pid").exists()
    assert report("up", "--folder", str(folder))["started"]


@pytest.mark.box
@pytest.mark.timeout(60)
def test_a_daemon_that_does_not_start_is_named_with_the_end_of_its_log(folder: Path) -> None:
    programs = folder.parent / "programs"
    programs.mkdir()
    (programs / "slurmd").write_text("#!/bin/sh\necho the disk is on fire\nexit 1\n")
    (programs / "slurmd").chmod(0o755)
    done = run("up", "--folder", str(folder), PATH=f"{programs}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].startswith("error: box1 ended while the box was starting")
    assert done.stderr.splitlines()[-1].strip() == "the disk is on fire"
    assert not folder.exists()
    assert not box._processes(folder)


@pytest.mark.box
@pytest.mark.timeout(60)
def test_mistakes_end_in_one_line_and_touch_nothing(running: dict[str, Any]) -> None:
    folder = tempfile.mkdtemp()  # short, as a box's folder must be
    thesis = Path(folder) / "thesis.txt"
    thesis.write_text("important")
    mistakes = {
        ("--nodes", "3", "--folder", str(Path(running["conf"]).parent)): "already up with other settings",
        ("--folder", folder): "holds other files",
        ("--folder", "/tmp/with space"): "allowed are",
        ("--folder", "/tmp/" + "long" * 20): "allowed are",
    }
    for arguments, reason in mistakes.items():
        done = run("up", *arguments, "--json")
        assert (done.returncode, done.stdout) == (2, "")
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert report("down", "--folder", folder)["state"] == "down"
    assert thesis.read_text() == "important"
    shutil.rmtree(folder)


def test_without_slurm_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "ENVIRONMENT", {"PATH": "/nowhere"})
    with pytest.raises(UserError, match="apt-get install munge slurm-wlm"):
        box.up()


@pytest.mark.parametrize("address", ["192.0.2.7", "127.0.1.1"])
def test_a_machine_whose_name_is_not_loopback_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(2, 1, 6, "", (address, 0))])
    with pytest.raises(UserError, match=f"must stand for 127.0.0.1, not for {address}; .* >> /etc/hosts"):
        loopback_address()
