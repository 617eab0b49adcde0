"""What brings a run back, by cause, on a real SLURM: a crash while it is a new one, a lost node on another day."""

from pathlib import Path

import pytest

from bench.chaos import frozen
from tests.slurm.test_preemption import Launch, Slurm, assert_equal, events, finish, job_state, start, step
from tests.waiting import wait_for

pytestmark = [pytest.mark.box, pytest.mark.timeout(400)]

# Loaded by every Python of the job before anything else: the lives of a rank end at the lines that it is told.
CRASHES = """
import os, sys
if "SLURM_PROCID" in os.environ and "submitit.core._submit" in " ".join(sys.orig_argv):
    import importlib.abc, importlib.util
    class After(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "radhpc.engine.fsdp":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            before = spec.loader.exec_module
            def exec_module(module):
                before(module)
                step, life = module.Engine.step, int(os.environ.get("SLURM_RESTART_COUNT", "0"))
                count = [0]
                def crash_here(): raise RuntimeError(f"device {os.getpid()} is ill")
                def crash_there(): raise RuntimeError(f"device {os.getpid()} is ill")
                def crashing(*given):
                    count[0] += 1
                    if count[0] == 4 and life < 3:
                        (crash_here if life == 0 else crash_there)()
                    return step(*given)
                module.Engine.step = crashing
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, After())
"""


def test_a_crash_comes_back_until_it_repeats_itself(
    launch: Launch, launch_json: Launch, slurm: Slurm, box_profile: Path, recipe_file: Path, tmp_path: Path,
    undisturbed: Path,
) -> None:  # fmt: skip
    """Here, there, and there again, each with another number in its words; then a person resumes."""
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(CRASHES)
    with box_profile.open("a") as file:
        file.write(f'setup: ["export PYTHONPATH={tmp_path}/faults:$PYTHONPATH"]\n')
    run = tmp_path / "run"
    start(launch, recipe_file, box_profile, run)
    wait_for(lambda: bool(events(run, "gave_up", "finished")), 240)
    assert len(events(run, "crashed")) == 3
    assert len(events(run, "requeued")) == 2
    first, second, third = (event["fingerprint"] for event in events(run, "crashed"))
    assert first != second == third
    wait_for(lambda: launch_json("status", run)["state"] == "failed", 30)
    assert "same place" in launch_json("status", run)["cause"]
    box_profile.write_text(box_profile.read_text().replace("setup:", "# setup:"))
    launch("resume", run, "--on", box_profile)
    wait_for(lambda: bool(events(run, "finished")), 120)
    assert_equal(run, undisturbed)


def test_a_lost_node_is_named_and_the_run_comes_back(
    launch: Launch, launch_json: Launch, slurm: Slurm, box: str, box_profile: Path, recipe_file: Path, tmp_path: Path,
    undisturbed: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    job = start(launch, recipe_file, box_profile, run)
    wait_for(lambda: step(run) >= 14)
    with frozen("box2", job, box):
        wait_for(lambda: job_state(slurm, job) == "PENDING", 150)
    finish(slurm, run, job)
    assert [event["nodes"] for event in events(run, "node_lost", "preempted", "rank_lost")] == [["box2"]]
    assert not events(run, "excluded"), "after one loss"
    assert launch_json("status", run)["restarts"]["node_lost"] == 1
    assert_equal(run, undisturbed)
