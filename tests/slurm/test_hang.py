"""A rank that stops on a real SLURM: named within its limit, and the whole life ends, so that the job can come back."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import rank_pid
from tests.slurm.test_preemption import events, start, step
from tests.waiting import wait_for

pytestmark = [pytest.mark.box, pytest.mark.timeout(180)]


def test_a_stopped_rank_ends_the_life_and_the_job_comes_back(
    launch: Callable[..., Any], slurm: Callable[..., str], box_profile: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """And comes back elsewhere: with `node_losses: 1` the node of the culprit is left out at once."""
    run = tmp_path / "run"
    text = box_profile.read_text().replace("nodes: 2", "nodes: 1-2")
    box_profile.write_text(f"{text}hang_seconds: 5\nnode_losses: 1\n")
    job = start(launch, recipe_file, box_profile, run)
    wait_for(lambda: step(run) >= 3)
    pid = rank_pid(job, 1)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_for(lambda: bool(events(run, "requeued")), 60)
    assert time.monotonic() - stopped < 40
    end = json.loads((run / "logs" / "end.rank-00000.json").read_text())
    assert end["state"] == "hung"
    (culprit,) = end["culprits"]
    assert culprit["rank"] == 1
    assert culprit["host"] in slurm("sinfo", "--noheader", "--Node", "--format=%N").split(), "no node of SLURM"
    assert "no sign of life" in end["cause"]
    assert not Path(f"/proc/{pid}").exists(), "the stopped rank is still there"
    (hung,) = events(run, "hung")
    assert hung["nodes"] == [culprit["host"]]
    names = [event["event"] for event in events(run)]
    assert names.index("stuck") < names.index("requeued")
    wait_for(lambda: bool(events(run, "excluded")), 30)
    assert events(run, "excluded")[0]["nodes"] == [culprit["host"]]
    assert f"ExcNodeList={culprit['host']}" in slurm("scontrol", "show", "job", job)
    slurm("scancel", job)
