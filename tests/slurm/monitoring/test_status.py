"""What `status` and `logs` say of runs, on a real SLURM and off it."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from radhpc.core.errors import UserError
from radhpc.core.recipe import load as load_recipe
from radhpc.core.run_folder import RunFolder
from slurm import scheduler
from slurm.monitoring import logs, pending_reasons, run_table
from slurm.monitoring.status import Statuses, find_runs, status
from slurm.sweep import definition as sweeps
from slurm.sweep.study import SweepStudy
from tests.conftest import ROOT
from tests.waiting import wait_for

Launch = Callable[..., subprocess.CompletedProcess[str]]
LaunchJson = Callable[..., dict[str, Any]]
Slurm = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, recipe_file: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "a run", load_recipe(recipe_file))


def result(**changes: Any) -> dict[str, Any]:
    """What status says of a run, but for `changes`."""
    found = {
        "run": "/runs/padchest-adapt-20261122-101500", "job": "1", "state": "running", "cause": "", "why": "",
        "starts_in_seconds": None, "stage": "adapt", "step": 12345, "steps": 50000, "loss": 1.2345,
        "samples_per_second": 152.2, "samples_per_second_per_rank": 19.0, "world": 8, "device": "cuda",
        "data_wait": 0.031, "eta_seconds": 120960.0, "checkpoint_step": 12000, "checkpoint_age_seconds": 312.0,
        "restarts": {"preempted": 3, "time_limit": 1, "rank_lost": 0}, "goodput": 0.934, "gpu_hours": 381.3,
        "gpu_hours_lost": 12.2, "evaluation": None,
    }  # fmt: skip
    return found | changes


def printed(results: list[dict[str, Any]], width: int, height: int | None = None) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(run_table.RunTable(results, height))
    return console.export_text()


# Reasons


def test_reasons_are_said_in_words_and_their_codes_stay() -> None:
    assert pending_reasons.words("Priority") == "jobs of higher priority are before it; wait (Priority)"
    assert (
        pending_reasons.words("QOSMaxGRESPerUser")
        == "no more GPUs for one user under the QOS now; wait (QOSMaxGRESPerUser)"
    )
    assert "no more GPUs for all jobs under the account" in pending_reasons.words("AssocGrpGRES")
    assert "no time on CPUs is left" in pending_reasons.words("AssocGrpCPUMinutesLimit")
    assert "asks for more time than the QOS allows one job" in pending_reasons.words("QOSMaxWallDurationPerJobLimit")
    assert pending_reasons.words("ReqNodeNotAvail, UnavailableNodes:gpu[1-2]").endswith(
        "(ReqNodeNotAvail: UnavailableNodes:gpu[1-2])"
    )
    assert pending_reasons.words("SomethingNew") == "SLURM says SomethingNew"


# The table


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_and_says_what_it_leaves_out(width: int) -> None:
    text = printed([result(), result(run="/runs/other", state="pending", why="jobs are before it", stage=None)], width)
    assert max(map(len, text.splitlines())) <= width
    assert "12,345/50,000" in text
    assert "other: jobs are before it" in text
    left_out = re.search(r"not shown in \d+ columns: (.*)", text.replace("\n", " "))
    head = text.splitlines()[1]
    titles = ("step", "loss", "samples/s", "per GPU", "data wait", "left", "last save", "goodput", "GPU-hours", "lost")
    for title in titles if width > 60 else ():
        assert (title in head) != (left_out is not None and title in left_out[1]), title
    assert (left_out is None) == (width == 200)
    if width >= 80:
        assert "5 min" in text, "the age of the last save belongs into any terminal"
    assert ("33 h 36" in text) == (width >= 80)


def test_without_a_run_it_says_how_to_start_one() -> None:
    assert printed([], 80).strip() == "no run is there: 'radhpc train RECIPE --on PROFILE' starts one in runs/"


def test_a_thousand_waiting_trials_take_one_sentence_and_no_more_lines_than_there_are() -> None:
    trials = [
        result(run=f"/runs/sweep/trials/{n:04}", state="pending", why=pending_reasons.words("JobArrayTaskLimit"))
        for n in range(999)
    ]
    text = printed([*trials, result(run="/runs/sweep/trials/0999")], 100, 30)
    assert len(text.splitlines()) <= 30
    assert text.count("as many of its array run") == 1
    assert "sweep/0000, sweep/0001, sweep/0002 and 996 more" in text
    assert "sweep/0999" in text, "what runs is shown before what waits"
    assert "1000 runs: 1 running, 999 pending" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5999, "100 min"), (6060, "1 h 41"), (200_000, "2 d 07 h")],
)
def test_lengths_of_time(seconds: float, said: str) -> None:
    assert run_table.span(seconds).replace("100 min", "1 h 40") == said.replace("100 min", "1 h 40")


# One look at the queue


def fake_squeue(folder: Path, output: str) -> Path:
    """A squeue that notes each call. The real one is asked in the tests on the box."""
    folder.mkdir()
    (folder / "output").write_text(output)
    (folder / "squeue").write_text(f'#!/bin/sh\necho "$SLURM_CONF $*" >> {folder}/calls\ncat {folder}/output\n')
    (folder / "squeue").chmod(0o755)
    return folder


def test_a_thousand_runs_ask_each_cluster_once(tmp_path: Path, recipe_file: Path, monkeypatch: Any) -> None:
    """Processes are counted, not seconds: bench/status.py has those."""
    rows = "".join(f"{n}|RUNNING|0|2026-11-22T10:00:00|None|\n" for n in range(1000, 2000))
    programs = fake_squeue(tmp_path / "programs", rows)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    started: list[Any] = []
    popen = subprocess.Popen.__init__
    monkeypatch.setattr(
        subprocess.Popen, "__init__", lambda self, *a, **k: (started.append(a), popen(self, *a, **k))[1]
    )
    recipe, runs = recipe_file.read_bytes(), []
    for n in range(1000):
        folder = tmp_path / "runs" / f"run-{n:04}"
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_bytes(recipe)
        job = {"cluster": "slurm", "id": str(1000 + n), "host": "h", "environment": {"SLURM_CONF": f"/conf/{n % 2}"}}
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "events.jsonl").write_text('{"time": "2026-11-22T09:00:00+00:00", "event": "submitted"}\n')
        runs.append(RunFolder(folder))
    look = Statuses(runs, queue_seconds=60)
    assert {one["state"] for one in look.now()} == {"running"}
    assert len(started) == 2, "one squeue for each cluster"
    look.now()
    assert len(started) == 2, "the queue is not asked at every look"
    calls = (programs / "calls").read_text().splitlines()
    assert sorted(call.split()[0] for call in calls) == ["/conf/0", "/conf/1"]


def test_what_squeue_says_is_read_in_the_words_of_old_and_new_releases(tmp_path: Path, monkeypatch: Any) -> None:
    rows = (
        "7_3|FAILED|32512|2026-11-22T10:00:00|NonZeroExitCode|\n8|FAILED|0:9|N/A|RaisedSignal:9(Killed)|\n"
        "9|PENDING|0|N/A|Nodes required for job are DOWN | DRAINED|\n"
    )
    monkeypatch.setenv("PATH", f"{fake_squeue(tmp_path / 'programs', rows)}:{os.environ['PATH']}")
    jobs = [{"cluster": "slurm", "id": name} for name in ("7_3", "8", "9", "10")]
    failed, killed, waiting, forgotten = scheduler.queue_entries(jobs)
    assert (failed.status, failed.living) == ("exit 127", False)
    assert killed.status == "signal 9"
    assert waiting.reason == "Nodes required for job are DOWN | DRAINED"
    assert waiting.start is None
    assert forgotten == scheduler.QueueEntry()


def test_a_silent_scheduler_is_no_failed_run(run: RunFolder, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run.write_job(cluster="slurm", id="7", host="h", environment={})
    run.record("submitted", job="7")
    assert status(run)["state"] == "pending"
    run.record("started", job="7", world=2, engine="fsdp")
    found = status(run)
    assert found["state"] == "running"
    assert "squeue is not found" in found["why"]
    run.record("crashed", job="7", why="KeyError: 'x'")
    found = status(run)
    assert (found["state"], found["why"]) == ("failed", "KeyError: 'x'")


# A run on this machine, from start to end


@pytest.mark.timeout(200)
def test_a_run_is_followed_and_every_figure_is_there(
    launch: Launch, launch_json: LaunchJson, recipe_file: Path, local_profile: Callable[[int], Path], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    launch("train", recipe_file, "--on", local_profile(1), "--run", path)
    done = launch("status", path, "--watch")
    lines = done.stdout.splitlines()
    assert re.match(r"\d\d:\d\d:\d\d run: running", lines[0])
    assert "run: finished" in lines[-1]
    found = launch_json("status", path)
    assert (found["state"], found["why"], found["step"]) == ("finished", "", found["steps"])
    assert (found["world"], found["device"], found["eta_seconds"]) == (1, "cpu", None)
    assert 0 < found["goodput"] < 1
    assert found["gpu_hours"] > found["gpu_hours_lost"] > 0
    events = RunFolder(path).events()
    assert [event["event"] for event in events].count("first_step") == 3, "one for each stage"
    begin, end = (datetime.fromisoformat(events[place]["time"]) for place in (1, -1))
    assert events[1]["event"] == "starting"
    assert found["gpu_hours"] == pytest.approx((end - begin).total_seconds() / 3600, abs=1e-4)
    said = launch("logs", path).stdout
    assert "stage scratch" in said
    assert "Traceback" not in said
    assert "rank 0 starts on" in launch("logs", path, "--rank", 0, "--life", 1).stdout
    assert "allowed are 0 to 0" in launch("logs", path, "--rank", 2, status=2).stderr
    assert "allowed are 1 to 1" in launch("logs", path, "--life", 2, status=2).stderr


@pytest.mark.timeout(60)
def test_the_live_table_in_a_terminal(run: RunFolder) -> None:
    """In a real pseudo-terminal: it is drawn, follows what changes, and Ctrl-C ends it without a word."""
    run.write_job(cluster="local", id="1", host=os.uname().nodename, pid=os.getpid())
    run.record("submitted", job="1")
    run.record("started", job="1", world=1, engine="single")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS="100", LINES="24", TERM="xterm")
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "launch.py", "status", str(run.path), "--watch"])
    seen = b""

    def read_until(wanted: bytes, seconds: float) -> bool:
        nonlocal seen
        until = time.monotonic() + seconds
        while time.monotonic() < until and wanted not in seen:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    seen += os.read(terminal, 65536)
                except OSError:  # the other end is closed
                    break
        return wanted in seen

    try:
        assert read_until(b"starting up", 30), seen
        run.record("first_step", step=1, seconds=1.0)
        run.write_progress(
            stage="adapt", step=77, steps=100, loss=1.5, samples_per_second=8.0, step_seconds=1.0, world=1
        )
        assert read_until(b"77/100", 15), seen
        os.kill(pid, signal.SIGINT)
        read_until(b"never seen", 5)
        ended, code = os.waitpid(pid, 0)
        assert (ended, os.waitstatus_to_exitcode(code)) == (pid, 0)
        pid = 0
        assert b"Traceback" not in seen
    finally:
        os.close(terminal)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_watch_and_json_are_not_one_thing(launch: Launch, run: RunFolder) -> None:
    assert "--watch: not together with --json" in launch("status", run.path, "--watch", "--json", status=2).stderr


def test_folders_of_runs_and_of_trials_are_looked_into(tmp_path: Path, recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    for name in ("runs/one", "runs/sweep/trials/0000", "runs/sweep/trials/0001"):
        RunFolder.create(tmp_path / name, recipe)
    assert [run.path.name for run in find_runs([tmp_path / "runs" / "sweep"])] == ["0000", "0001"]
    assert [run.path.name for run in find_runs([tmp_path / "runs"])] == ["one"]
    with pytest.raises(UserError, match="no run there"):
        find_runs([tmp_path / "nothing"])


def test_without_a_name_sweeps_are_sweeps_and_runs_are_runs(tmp_path: Path, recipe_file: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"recipe: {recipe_file}\nspace: {{seed: [1, 2]}}\nmethod: grid\n")
    study = SweepStudy.create(tmp_path / "runs" / "sweep-mine-1", *sweeps.load(tmp_path / "mine.yaml"))
    study.prepare(0)
    RunFolder.create(tmp_path / "runs" / "one", load_recipe(recipe_file))
    (tmp_path / "runs" / "notes").mkdir()
    command = [sys.executable, ROOT / "launch.py", "status", "--json"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert [Path(run["run"]).name for run in found["runs"]] == ["one"]
    assert [(Path(sweep["sweep"]).name, len(sweep["trials"])) for sweep in found["sweeps"]] == [("sweep-mine-1", 2)]
    assert "sweep-mine-1: loss, minimize" in done.stderr


def test_what_was_digested_counts_while_the_events_are_the_same(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run.record("submitted", job="5")
    run.record("started", job="5", world=2)
    run.record("first_step", step=1, seconds=1.0)
    run.record("saved", step=4, seconds=0.1)
    run.record("crashed", job="5", why="boom")
    first = status(run)
    assert (first["state"], first["why"], first["checkpoint_step"]) == ("failed", "boom", 4)
    monkeypatch.setattr(RunFolder, "events", lambda *names: pytest.fail("the events were read again"))
    again = status(run)
    assert {**again, "checkpoint_age_seconds": 0} == {**first, "checkpoint_age_seconds": 0}
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run.record("finished", step=9)
    assert status(run)["state"] == "finished"
    (tmp_path / "cache" / "radhpc" / "status.json").write_text("{")
    assert status(run)["state"] == "finished", "a broken cache is none"


# Logs


def test_the_error_of_the_rank_that_failed_first_comes_first(run: RunFolder) -> None:
    run.record("submitted", job="5")
    run.record("started", job="5", world=3)
    folder = run.folder("logs")
    ends = {0: ("lost_peer", "Connection closed by peer"), 2: ("crashed", "KeyError: 'x'"), 7: ("crashed", "of old")}
    for rank, (state, cause) in ends.items():
        end = {"state": state, "cause": cause, "step": 0, "host": f"node{rank}", "traceback": f"Traceback of {rank}"}
        (folder / f"end.rank-{rank:05}.json").write_text(json.dumps(end))
    title, trace = logs.first_error(run)
    assert (title.plain, trace.plain) == ("rank 2 on node2: KeyError: 'x'", "Traceback of 2")
    run.record("finished", step=3)
    assert logs.first_error(run) == []


def test_a_life_is_cut_out_of_the_files_that_all_lives_share(run: RunFolder, capsys: Any) -> None:
    run.record("submitted", job="5")
    texts = []
    for life in (1, 2):
        logs.mark(0, f"node{life}")
        texts.append(capsys.readouterr().err + f"printed by life {life}\n")
        run.record("started", job="5", world=1, life=life)
        time.sleep(0.005)  # a start-up takes longer
    (run.folder("logs") / "5_0_log.err").write_text("printed by the batch script\n" + "".join(texts))

    def said(life: int | None) -> str:
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        logs.show(run, console, None, life, follow=False)
        return console.export_text()

    assert "printed by life 1" in said(1)
    assert "life 2" not in said(1)
    assert "printed by life 2" in said(2)
    assert "life 1" not in said(2)
    assert "batch script" in said(None)


# On a real SLURM


@pytest.mark.box
@pytest.mark.timeout(120)
def test_a_job_that_dies_or_waits_says_why(
    launch: Launch, launch_json: LaunchJson, slurm: Slurm, box_profile: Path, recipe_file: Path, tmp_path: Path
) -> None:
    def submit(name: str, *more: str) -> Path:
        profile = tmp_path / f"{name}.yaml"
        profile.write_text("\n".join([box_profile.read_text(), *more]) + "\n")
        launch("train", recipe_file, "--on", profile, "--run", tmp_path / name)
        return tmp_path / name

    def ended(path: Path) -> dict[str, Any]:
        wait_for(lambda: launch_json("status", path)["state"] == "failed", 40)
        return launch_json("status", path)

    python = tmp_path / "python"  # that the login node has, and the nodes, a little later, have not
    python.symlink_to(sys.executable)
    run = submit("no-python", f"python: {python}\nsbatch: {{begin: now+5}}")
    python.unlink()
    found = ended(run)
    assert "before it started" in found["why"]
    assert f"{python}: No such file or directory" in found["why"]
    assert "exit " in found["why"]
    said = launch("logs", tmp_path / "no-python").stdout.splitlines()
    assert str(python) in said[0], "the error stands first"
    profile = tmp_path / "bad-module.yaml"
    profile.write_text(box_profile.read_text() + "setup: ['module load no-such-module || exit 3']\n")
    run = tmp_path / "bad-module"
    done = launch("train", recipe_file, "--on", profile, "--run", run, "--watch", status=1)
    assert "exit 3" in done.stdout
    assert "module: command not found" in done.stdout

    late = submit("late", "sbatch: {begin: now+1hour}")
    found = launch_json("status", late)
    assert found["state"] == "pending"
    assert 3000 < found["starts_in_seconds"] <= 3600
    assert "held back until its start time" in found["why"]
    slurm("scontrol", "uhold", found["job"])
    assert "held by you" in launch_json("status", late)["why"]
    launch("stop", late)
    found = launch_json("status", late)
    assert (found["state"], found["why"]) == ("stopped", "taken out of the queue")
