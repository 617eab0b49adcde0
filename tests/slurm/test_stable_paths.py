"""Paths that submitted jobs, their pickles and frozen code name: they never move, and take what they took.

The calls of batch scripts are those that the code of commit a0139ea writes, and today's modules answer them.
"""

import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import slurm.job
import slurm.profile
import slurm.requeue
import slurm.trials
from radhpc.core.files import read_lines
from radhpc.core.recipe import load as load_recipe
from radhpc.core.run_folder import RunFolder
from slurm.sweep import definition as sweeps
from slurm.sweep.study import SweepStudy
from tests.conftest import ROOT

SCRIPT = """
import json, sys
from pathlib import Path
from radhpc.run_dir import RunDir
from slurm import submit, trials
from slurm.profile import Profile
from slurm.study import Study

profile, python, run, sweep = Profile(cluster="slurm"), *sys.argv[1:]
print(json.dumps({
    "requeue": submit.slurm_parameters(RunDir(run), profile, python)["teardown"],
    "trials": trials._array_parameters(Study(Path(sweep)), profile, python, [0, 1], Path("000.yaml"))["setup"][-2:],
}))
"""


@pytest.mark.parametrize(
    ("function", "old"),
    [
        (slurm.job.main, "slurm/job.py"),
        (slurm.job.probe, "slurm/job.py"),
        (slurm.requeue.main, "slurm/requeue.py"),
        (slurm.trials.main, "slurm/trials.py"),
        (slurm.profile.load, "slurm/profile.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_pickles_and_frozen_code_call_takes_the_same_arguments(
    function: object, old: str, old_checkout: Path
) -> None:
    assert inspect.isfunction(function)
    tree = ast.parse((old_checkout / old).read_text())
    (before,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function.__name__)
    assert f"{function.__module__.replace('.', '/')}.py" == old
    assert list(inspect.signature(function).parameters) == [argument.arg for argument in before.args.args]


def test_the_box_is_started_by_its_name() -> None:
    with tempfile.TemporaryDirectory(prefix="box-", dir="/tmp") as parent:  # sockets allow short paths only
        done = module("slurm.box", "status", "--folder", f"{parent}/box", "--json")
    assert json.loads(done.stdout)["state"] == "down"


@pytest.fixture
def sweep(tmp_path: Path, recipe_file: Path) -> SweepStudy:
    """A sweep of two trials, submitted once."""
    path = tmp_path / "sweep.yaml"
    path.write_text(f"recipe: {recipe_file}\nspace: {{seed: [1, 2]}}\nmethod: grid\n")
    study = SweepStudy.create(tmp_path / "a sweep", *sweeps.load(path))
    (study.path / "profiles").mkdir()
    (study.path / "profiles" / "000.yaml").write_bytes(slurm.profile.Profile(cluster="slurm").to_yaml())
    return study


def test_the_batch_scripts_of_an_older_release_reach_todays_modules(
    old_checkout: Path, sweep: SweepStudy, recipe_file: Path, tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path / "a run", load_recipe(recipe_file))
    (run.path / "profile.yaml").write_bytes(slurm.profile.Profile(cluster="slurm").to_yaml())
    (run.folder("logs") / "end.rank-0.json").write_text(
        json.dumps({"state": "mistake", "cause": "the disk is full", "step": 3})
    )
    scripts = json.loads(
        subprocess.run(
            [sys.executable, "-c", SCRIPT, sys.executable, run.path, sweep.path],
            cwd=old_checkout,
            check=True,
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        ).stdout
    )
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, answer in (("scontrol", "JobId=7 JobState=RUNNING Restarts=0"), ("sinfo", "")):
        (programs / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
    }

    def batch(*lines: str) -> int:
        command = ["bash", "-c", "\n".join(lines)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    assert batch("(exit 1)", *scripts["requeue"]) == 0
    (failed,) = [event for event in read_lines(run.path / "events.jsonl") if event["event"] == "failed"]
    assert failed["why"] == "the disk is full"
    assert batch("number=0001", *scripts["trials"]) == 0
    trial = RunFolder.open(sweep.run_path(1))
    assert (trial.job() or {})["id"] == "7"
    assert trial.recipe().seed == 2


def module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m` on today's code."""
    return subprocess.run(
        [sys.executable, "-m", name, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
