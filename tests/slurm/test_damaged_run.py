"""Files of a run that a crash, a hand or another node has damaged: the rest counts, and no other run suffers."""

import json
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from radhpc.core.files import append_line, open_append, read_lines
from radhpc.core.ledger import Ledger, read_ledger
from radhpc.core.ownership.lease import SUBMISSION
from radhpc.core.protocol import Event, Outcome, OutcomeState
from radhpc.core.run_folder import RunFolder
from slurm import requeue
from slurm.monitoring.logs import first_error
from slurm.monitoring.status import Statuses, status
from slurm.profile import load

pytestmark = pytest.mark.timeout(60)

WORLD = 2
# Lines that are no events, as they were seen, and as they may come.
LINES = [
    b"garbage{{", bytes(512), b"[]", b"[1]", b"null", b"1", b'"text"', b"{}", b'{"event": "saved"}', b"\xff\xfe\xe4",
    b'{"time": "2026-11-30T19:49:33.602+00:00"}', b'{"time": "soon", "event": "started", "world": 2}',
    b'{"time": 5, "event": "saved", "step": 4}', b'{"time": "2026-11-30T19:49:33.602+00:00", "event": ["saved"]}',
    b'{"time": "2026-11-30T19:49:33.602+00:00", "event": "saved", "step": "four"}',
    b'{"time": "2026-11-30T19:49:33.602+00:00", "event": "started"}', b'{"time": "2026-11-30T19:49:33.602+0',
    b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b'{"step": ' + b"9" * 5000 + b"}", 
    b'{"event": "saved"}, {"event": 1}',
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run on SLURM whose two ranks have just been preempted."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "recipe.yaml").write_text("name: x\n")
    (run.path / "profile.yaml").write_bytes(load("box").to_yaml())
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", SUBMISSION: "ours"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run.write_job(cluster="slurm", id="7", submission="ours", environment={})
    run.folder("logs")
    run.record(Event.SUBMITTED, job="7", cluster="slurm")
    run.record(Event.STARTED, job="7", world=WORLD, life=1)
    run.record(Event.SAVED, step=4, stage=0, seconds=0.1)
    run.write_progress(step=4, steps=9, world=WORLD)
    for rank in range(WORLD):
        run.record_end(rank, Outcome(OutcomeState.INTERRUPTED, "SIGTERM", 4))
    return run


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Stand-ins for SLURM's commands: the job runs and was preempted; returns what they were told."""
    folder, told = tmp_path / "bin", tmp_path / "told"
    folder.mkdir()
    told.touch()
    shown = "JobId=7 JobState=RUNNING PreemptTime=2026-11-30T19:49:33 Restarts=0 Partition=x ExcNodeList=(null)"
    for name in ("scontrol", "squeue", "sinfo"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} $@ >> {told}\n[ $1 = show ] && echo '{shown}'\nexit 0\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: told.read_text().splitlines()


def insert(path: Path, line: bytes, chance: random.Random, cut: bool) -> None:
    """Put a damaged line between the others; `cut`: without its line feed, as a writer that died leaves the end."""
    lines = path.read_bytes().splitlines(keepends=True)
    at = len(lines) if cut else chance.randrange(len(lines) + 1)
    lines.insert(at, line if cut else line + b"\n")
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("cut", [False, True], ids=["between", "cut at the end"])
@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_that_cannot_be_read_takes_no_other_with_it(
    run: RunFolder, line: bytes, cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before = run.events()
    insert(run.path / "events.jsonl", line, random.Random(len(line)), cut)
    assert run.events() == before
    run.record(Event.STOPPED, job="7")
    assert run.events()[:-1] == before
    assert run.events()[-1]["event"] == "stopped", "the new line was glued to the damaged one"
    assert sum("cannot be read" in message for message in caplog.messages) == 1
    assert first_error(run) == []
    ledger = Ledger(run.folder("ledger"), 1, 0)
    ledger.append(0, 1, ["a"], [])
    (path,) = (run.path / "ledger").iterdir()
    insert(path, line, random.Random(len(line)), cut)
    ledger.append(0, 2, ["b"], [])
    assert read_ledger(run.path / "ledger").steps == {1: ["a"], 2: ["b"]}


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_preempted_run_with_damaged_files_comes_back(
    run: RunFolder, line: bytes, controller: Callable[[], list[str]]
) -> None:
    insert(run.path / "events.jsonl", line, random.Random(1), cut=False)
    for name in ("progress.json", "hang.json", "logs/heartbeat.rank-00001.json"):
        (run.path / name).write_bytes(line)
    requeue.main(str(run.path), 0)
    assert [event["event"] for event in run.events()][-2:] == ["preempted", "requeued"]
    assert "scontrol requeue 7" in controller()


@pytest.mark.parametrize(
    "name", ["events.jsonl", "job.json", "progress.json", "lease.json", "evaluation/step-000004/scores.json"]
)
def test_status_of_many_runs_never_fails_for_one(
    run: RunFolder, tmp_path: Path, controller: Callable[[], list[str]], name: str
) -> None:
    whole = RunFolder(tmp_path / "whole")
    whole.path.mkdir()
    whole.record(Event.SUBMITTED, job="8", cluster="slurm")
    whole.record(Event.FINISHED, step=3)
    for line in [*LINES, b"", b'{"cluster": 5, "id": []}', b'{"time": "x", "step": {}, "world": [], "stage": 7}']:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(line)
        states = Statuses([run, whole]).now()
        assert states[1]["state"] == "finished"
        assert json.loads(json.dumps(states[0]))


def test_a_job_file_that_cannot_be_read_is_no_free_run(run: RunFolder, controller: Callable[[], list[str]]) -> None:
    from radhpc.core.errors import UserError
    from slurm import scheduler

    for content in (b"", b"{", b"[]", b"{}"):
        (run.path / "job.json").write_bytes(content)
        with pytest.raises(UserError, match="in use by slurm job 7"):
            scheduler.refuse_if_alive(run)


def test_ends_that_come_late_are_waited_for(
    run: RunFolder, controller: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of another node, some seconds after srun has said that all is well."""
    hidden = run.path / "hidden"
    run.end_path(1).rename(hidden)
    threading.Timer(1.0, lambda: hidden.rename(run.end_path(1))).start()
    requeue.main(str(run.path), 0)
    assert [event["event"] for event in run.events()][-2:] == ["preempted", "requeued"]


@pytest.mark.parametrize(("said", "follows"), [("finished", []), ("interrupted", ["preempted", "requeued"])])
def test_where_ends_never_come_what_srun_and_the_events_say_decides(
    run: RunFolder, controller: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, said: str, follows: list[str]
) -> None:
    monkeypatch.setattr(requeue, "_LATE", 0.3)
    run.record(Event(said), step=9, cause="SIGTERM")
    run.end_path(0).unlink()
    run.end_path(1).write_bytes(b"")
    requeue.main(str(run.path), 0)
    events = [event["event"] for event in run.events()]
    assert events[events.index(said) + 1 :] == follows


def test_a_stranger_decides_nothing(
    run: RunFolder, controller: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch script of a ghost, and that of an earlier life on a node that came back."""
    before = run.events()
    monkeypatch.setenv(SUBMISSION, "another")
    requeue.main(str(run.path), 1)
    monkeypatch.setenv(SUBMISSION, "ours")
    (run.path / "lease.json").write_text(json.dumps({"submission": "ours", "job": "7", "restart": 1, "token": "t"}))
    requeue.main(str(run.path), 1)
    assert run.events() == before
    assert controller() == []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    requeue.main(str(run.path), 1)
    assert run.events() != before


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    path, pids = tmp_path / "lines", []
    for writer in range(4):
        if not (pid := os.fork()):
            for number in range(50):
                descriptor = open_append(path)
                append_line(descriptor, json.dumps({"writer": writer, "number": number}).encode() + b"\n")
                os.close(descriptor)
                if number % 10 == 0:
                    time.sleep(0.001)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert len(read_lines(path)) == 200
    assert status(RunFolder(tmp_path))["state"] == "failed"
