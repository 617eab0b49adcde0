"""A run's lease: the job that job.json names, and of its lives the latest."""

import json
import os
import threading
from pathlib import Path

import pytest

from radhpc.core.ownership import lease as leases
from radhpc.core.ownership.folder_lock import hold
from radhpc.core.ownership.lease import Lease, Life, Superseded, take
from radhpc.core.protocol import Event, Outcome, OutcomeState
from radhpc.core.run_folder import RunFolder

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.write_job(cluster="slurm", id="7", submission="ours")
    return run


def test_who_job_json_does_not_name_leaves(run: RunFolder) -> None:
    with pytest.raises(Superseded, match="belongs to job 7, not to 8"):
        take(run.path, Life("theirs", "8"))
    assert not (run.path / leases.LEASE).exists()
    take(run.path, Life("ours", "7")).check()


def test_a_job_of_an_older_release_is_known_by_its_id(run: RunFolder) -> None:
    run.write_job(cluster="slurm", id="7")
    take(run.path, Life("", "7")).check()
    with pytest.raises(Superseded):
        take(run.path, Life("", "8"))


def test_a_later_life_takes_over_and_an_earlier_one_never_gets_it_back(run: RunFolder) -> None:
    first = take(run.path, Life("ours", "7", 0))
    second = take(run.path, Life("ours", "7", 1))
    second.check()
    assert not first.held
    with pytest.raises(Superseded, match="job 7, life 1, has taken over"):
        first.check()
    with pytest.raises(Superseded, match="a later life"):
        take(run.path, Life("ours", "7", 0))
    second.check()


def test_without_the_lease_nothing_is_recorded(run: RunFolder) -> None:
    run.lease = take(run.path, Life("ours", "7", 0))
    run.record(Event.STARTED, world=1)
    take(run.path, Life("ours", "7", 1))
    for write in (lambda: run.record(Event.SAVED, step=1), lambda: run.write_progress(step=1)):
        with pytest.raises(Superseded):
            write()
    run.record_end(0, Outcome(OutcomeState.FINISHED))
    assert [event["event"] for event in run.events()] == ["started"]
    assert not (run.path / "progress.json").exists()
    assert run.end_paths() == {}


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"restart": "x"}'])
def test_a_lease_that_cannot_be_read_names_nobody_else(run: RunFolder, content: bytes | None) -> None:
    lease = take(run.path, Life("ours", "7", 0))
    (run.path / leases.LEASE).unlink()
    if content is not None:
        (run.path / leases.LEASE).write_bytes(content)
    lease.check()
    take(run.path, Life("ours", "7", 1)).check()
    assert not lease.held


def test_a_job_whose_submitter_was_killed_writes_down_its_id(run: RunFolder) -> None:
    run.write_job(cluster="slurm", id="", submission="ours")
    take(run.path, Life("ours", "7"))
    assert run.job() == {"cluster": "slurm", "id": "7", "submission": "ours"}


def test_a_start_waits_for_the_command_that_submits(run: RunFolder) -> None:
    taken = threading.Event()

    def start() -> None:
        take(run.path, Life("new", "8"))
        taken.set()

    with hold(run.path / leases.LOCK, "submit"):
        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        assert not taken.wait(0.5)
        run.write_job(cluster="slurm", id="8", submission="new")
    assert taken.wait(10)


def test_the_life_of_an_element_and_of_an_inline_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(leases.SUBMISSION, "token")
    assert Life.here(None, "11") == Life("token", "9_3", 2)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", leases.SUBMISSION):
        monkeypatch.delenv(name)
    assert Life.here({"pid": os.getpid(), "id": "12", "submission": "inline"}) == Life("inline", "12")
    assert Life.here({"pid": 1, "id": "12", "submission": "another"}) == Life("", "")


def test_two_views_of_one_folder_that_lag(run: RunFolder, tmp_path: Path) -> None:
    """An old life's node sees the new lease late: it writes until then, and the new life knows it by the ledger."""
    from radhpc.core.ledger import Ledger, bytes_by_life
    from radhpc.data.audit import overlaps

    stale = tmp_path / "stale"
    stale.mkdir()
    take(run.path, Life("ours", "7", 0))
    (stale / leases.LEASE).write_bytes((run.path / leases.LEASE).read_bytes())
    old = RunFolder(run.path)
    old.lease = Lease(stale, json.loads((stale / leases.LEASE).read_text())["token"])
    ledger = Ledger(run.folder("ledger"), 1, 0)
    old.record(Event.STARTED, life=1, world=1, ledger={})
    ledger.append(0, 1, ["a"], [])
    take(run.path, Life("ours", "7", 1))
    run.record(Event.STARTED, life=2, world=1, ledger=bytes_by_life(run.path / "ledger"))
    assert overlaps(run) == []
    old.check_lease()
    ledger.append(0, 2, ["b"], [])
    assert overlaps(run) == [{"life": 1, "beside": 2}]
    (stale / leases.LEASE).write_bytes((run.path / leases.LEASE).read_bytes())
    with pytest.raises(Superseded):
        old.record(Event.SAVED, step=2)


def test_a_step_that_was_saved_twice_in_one_life_was_saved_by_two(run: RunFolder) -> None:
    from radhpc.data.audit import overlaps

    for name, details in [
        (Event.STARTED, {"world": 1}), (Event.SAVED, {"step": 4}), (Event.STARTED, {"world": 1}),
        (Event.SAVED, {"step": 4}), (Event.SAVED, {"step": 8}),
    ]:  # fmt: skip
        run.record(name, **details)
    assert overlaps(run) == []  # trained again after the checkpoint was damaged
    run.record(Event.SAVED, step=8)
    assert overlaps(run) == [{"life": 1, "beside": 2}]
