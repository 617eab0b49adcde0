"""The submitted code is what runs, in a container or not, whatever becomes of the checkout; versions are watched."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from radhpc.core import environment
from radhpc.core.errors import UserError
from radhpc.core.recipe import load as load_recipe
from radhpc.core.run_folder import RunFolder
from slurm import frozen_code, profile as profiles, scheduler
from slurm.compat_submitit import batch_script
from slurm.submit import setup_lines, slurm_parameters
from tests.conftest import ROOT
from tests.slurm.test_preemption import events, finish, step
from tests.waiting import wait_for

Launch = Callable[..., Any]
QUICK = ["evaluation.every=null", "evaluation.samples=2", "checkpoint.every=100"]
LONG = ["stages.scratch.steps=60", *QUICK]
LONGER = ["stages.scratch.steps=200", *QUICK]  # one rank is quick


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout, with one commit, that a test may ruin."""
    folder = tmp_path / "checkout"
    for path in environment.sources(ROOT):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "one")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def launch_from(checkout: Path, *arguments: object) -> None:
    command = [sys.executable, checkout / "launch.py", *map(str, arguments)]
    subprocess.run(command, cwd=checkout, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.timeout(240)
def test_a_resume_runs_the_submitted_code_until_it_is_told_otherwise(
    checkout: Path, recipe_file: Path, tmp_path: Path, local_profile: Callable[[int], Path]
) -> None:
    run, profile = tmp_path / "run", local_profile(1)

    def stop_at(number: int) -> None:
        wait_for(lambda: step(run) >= number)
        RunFolder.open(run).request_stop()
        wait_for(lambda: not scheduler.state(RunFolder.open(run).job()))
        assert events(run)[-1]["event"] == "interrupted", "it had ended before it was asked to: nothing is tested"

    launch_from(checkout, "train", recipe_file, *LONGER, "--on", profile, "--run", run)
    stop_at(3)
    about = frozen_code.environment(run / "code")
    assert about["code"] == environment.code_hash(checkout) == environment.code_hash(run / "code")
    assert (about["commit"], about["dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    assert about["libraries"]["torch"] == version("torch")
    assert sum(path.stat().st_size for path in (run / "code").rglob("*") if path.suffix != ".pyc") < 2_500_000

    worker = checkout / "radhpc" / "worker.py"
    good = worker.read_text()
    worker.write_text("raise RuntimeError('nobody has submitted this')\n")
    launch_from(checkout, "resume", run)
    stop_at(step(run) + 3)
    first, second = events(run, "submitted")
    assert first["code"] == second["code"] == about["code"]

    worker.write_text(good + "\n# changed\n")
    launch_from(checkout, "resume", run, "--current-code", "--watch")
    assert events(run)[-1]["event"] == "finished"
    now = frozen_code.environment(run / "code")
    assert now["dirty"] is True
    (replaced,) = events(run, "code_replaced")
    assert (replaced["was"], replaced["now"], replaced["kept"]) == (about["code"], now["code"], "code-1")
    assert events(run, "submitted")[-1]["code"] == now["code"] == environment.code_hash(checkout) != about["code"]
    assert environment.code_hash(run / "code-1") == about["code"]
    assert not events(run, "environment_changed"), "a life did not run the frozen code"


@pytest.mark.box
@pytest.mark.timeout(280)
def test_a_requeued_job_runs_the_submitted_code_in_its_container(
    checkout: Path, slurm: Callable[..., str], box_profile: Path, recipe_file: Path, tmp_path: Path,
    apptainer: Path,
) -> None:  # fmt: skip
    """The requeue is decided outside the container; the ranks in it see what was bound, and no checkout."""
    settings = yaml.safe_load(box_profile.read_text())
    image = tmp_path / "image.sif"
    image.touch()
    settings["container"] = {"apptainer": str(image), "command": str(apptainer), "python": sys.executable}
    box_profile.write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    launch_from(checkout, "train", recipe_file, *LONG, "--on", box_profile, "--run", run)
    job = events(run, "submitted")[0]["job"]
    wait_for(lambda: step(run) >= 4)
    shutil.rmtree(checkout / "radhpc")
    shutil.rmtree(checkout / "slurm")
    slurm("scancel", "--signal=USR2", job)
    finish(slurm, run, job)
    assert [event["world"] for event in events(run, "started")] == [2, 2]
    assert not events(run, "environment_changed")
    started = [line.split() for line in (tmp_path / "apptainer.log").read_text().splitlines()]
    assert len(started) == 4, "two lives of two ranks, and nothing else, were started in the container"
    shards = load_recipe(run / "recipe.yaml").shards[0]
    for words in started:
        assert words[:3] == ["exec", "--pwd", str(run)]
        assert words[3:5] == ["--bind", f"{run}:{run},{shards}:{shards}:ro"]
        assert words[5:9] == [str(image), sys.executable, "-u", "-m"]


@pytest.fixture
def apptainer(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in for Apptainer: notes its arguments and runs the command without any image. As root it does so in a
    mount namespace where of all the tests' files only what --bind names is there.
    """
    path = tmp_path / "apptainer"
    path.write_text(f"""#!/bin/bash
set -e
echo "$*" >> {tmp_path}/apptainer.log
[ "$1" = exec ] && [ "$2" = --pwd ] && [ "$4" = --bind ]
pwd=$3 binds=${{5//,/ }}
shift 6
for name in PYTHONPATH PYTHONSAFEPATH PYTHONNOUSERSITE; do inside=APPTAINERENV_$name; export $name="${{!inside}}"; done
[ "$(id -u)" = 0 ] && unshare --mount true || {{ cd "$pwd"; exec "$@"; }}
exec unshare --mount bash -ec '
    stage=$(mktemp -d -p /dev/shm); mount -t tmpfs none $stage; n=0
    for bind in '"$binds"'; do
        IFS=: read from to flag <<< $bind
        mkdir $stage/$((++n)); mount --bind $from $stage/$n
    done
    mount -t tmpfs none {tmp_path_factory.getbasetemp()}; n=0
    for bind in '"$binds"'; do
        IFS=: read from to flag <<< $bind
        mkdir -p $to; mount --bind $stage/$((++n)) $to
        [ -z "$flag" ] || mount -o remount,bind,$flag $to
    done
    cd '"$pwd"'; exec "$@"' bash "$@"
""")
    path.chmod(0o755)
    return path


@pytest.mark.timeout(120)
def test_ranks_that_differ_are_refused_and_a_changed_library_is_recorded(
    launch: Launch, recipe_file: Path, tmp_path: Path, local_profile: Callable[[int], Path]
) -> None:
    (tmp_path / "other" / "simplejpeg-99.0.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "simplejpeg-99.0.dist-info" / "METADATA").write_text("Name: simplejpeg\nVersion: 99.0\n")

    def python(ranks: str) -> Path:
        """A profile whose Python finds another simplejpeg on these ranks."""
        start = tmp_path / "python"
        start.write_text(
            f"#!/bin/sh\ncase $SUBMITIT_LOCAL_GLOBALID in {ranks}) PYTHONPATH=$PYTHONPATH:{tmp_path}/other;; esac\n"
            f'exec {sys.executable} "$@"\n'
        )
        start.chmod(0o755)
        profile = local_profile(2)
        profile.write_text(profile.read_text() + f"python: {start}\n")
        return profile

    run, quick = tmp_path / "run", ["stages.scratch.steps=2", "stages.refine.steps=2", *QUICK]
    launch("train", recipe_file, *quick, "--on", python("1"), "--run", run)
    ends = run / "logs" / "end.rank-00000.json"
    wait_for(ends.exists)
    said = json.loads(ends.read_text())
    found = version("simplejpeg")
    assert (said["state"], said["cause"]) == (
        "mistake",
        f"rank 1 runs something else than rank 0: simplejpeg 99.0 there, {found} on rank 0; all nodes must be set up "
        "alike",
    )
    wait_for(lambda: not scheduler.state(RunFolder.open(run).job()))
    frozen = frozen_code.environment(run / "code")
    assert "libraries" not in frozen, "nobody can know at the submission what another Python has"
    (run / "code" / "environment.json").write_text(json.dumps({**frozen, **environment.versions()}))
    launch("resume", run, "--on", python("0|1"), "--watch")
    assert events(run)[-1]["event"] == "finished"
    (changed,) = events(run, "environment_changed")
    assert changed["what"] == {"simplejpeg": [found, "99.0"]}


def test_code_is_frozen_once_and_replaced_beside_itself(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    about = frozen_code.freeze(folder)
    assert about["code"] == frozen_code.current()
    assert not [path for path in folder.rglob("*") if path.suffix not in (".py", ".html", ".yaml", ".json", "")]
    (folder / "radhpc" / "__pycache__").mkdir()
    (folder / "radhpc" / "__pycache__" / "loop.pyc").touch()
    assert environment.code_hash(folder) == about["code"]
    (folder / "radhpc" / "loop.py").write_text("# edited\n")
    assert frozen_code.freeze(folder) == about, "frozen code was written over"
    assert frozen_code.replace(folder) == (about["code"], about["code"], "code-1")
    assert (tmp_path / "code-1" / "radhpc" / "loop.py").read_text() == "# edited\n"
    assert frozen_code.replace(folder)[2] == "code-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "code-1", "code-2"]


def test_a_profile_that_frozen_code_cannot_read_is_refused_at_the_submission(tmp_path: Path) -> None:
    frozen_code.freeze(tmp_path / "code")
    written = tmp_path / "profile.yaml"
    written.write_text("cluster: slurm\nfuture: 1\n")
    frozen_code.check_profile(tmp_path / "code", written)  # nothing to ask: it is today's code
    about = {**frozen_code.environment(tmp_path / "code"), "code": "older"}
    (tmp_path / "code" / frozen_code.ENVIRONMENT).write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"unknown key 'future'.*resume --current-code"):
        frozen_code.check_profile(tmp_path / "code", written)
    written.write_text("cluster: slurm\n")
    frozen_code.check_profile(tmp_path / "code", written)


def test_a_rank_imports_the_frozen_code_from_any_working_directory(tmp_path: Path) -> None:
    """`python -m` would look into the working directory first, and that is the checkout for many a submission."""
    frozen_code.freeze(tmp_path / "code")
    where = "import slurm.job, radhpc, sys; print(slurm.job.__file__, radhpc.__file__)"
    script = "\n".join([*setup_lines(profiles.Profile(cluster="slurm"), tmp_path / "code"), f'"$0" -c "{where}"'])
    done = subprocess.run(
        ["bash", "-c", script, sys.executable], cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "code" / name) for name in ("slurm/job.py", "radhpc/__init__.py")]


def script_of(recipe_file: Path, tmp_path: Path, **settings: Any) -> tuple[RunFolder, str]:
    from slurm.container import required_binds
    from slurm.submit import rank_python

    profile = profiles.Profile(cluster="slurm", gpus_per_node=4, tasks_per_node=4, **settings)
    run = RunFolder.create(tmp_path / "run", load_recipe(recipe_file))
    python = rank_python(profile, run.path, required_binds(run))
    return run, batch_script(f"{python} -u -m x", run.path, slurm_parameters(run, profile, sys.executable))


def test_a_decision_that_fails_is_made_once_more(recipe_file: Path, tmp_path: Path) -> None:
    """The end of the real batch script, with a Python that is killed the first time."""
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\necho "$@" >> {called}\n[ $(wc -l < {called}) = 2 ] || kill -9 $$\n')
    python.chmod(0o755)
    run = RunFolder.create(tmp_path / "run", load_recipe(recipe_file))
    parameters = slurm_parameters(run, profiles.Profile(cluster="slurm"), str(python))
    end = "\n".join(["(exit 143)", *parameters["teardown"]])
    assert subprocess.run(["bash", "-c", end], check=False).returncode == 0
    assert called.read_text() == f"-m slurm.requeue {run.path} 143\n" * 2


def test_a_container_by_apptainer(recipe_file: Path, tmp_path: Path) -> None:
    container = {"apptainer": "/images/radhpc.sif", "binds": ["/data", "/scratch:/local:ro"], "options": ["--no-home"]}
    run, script = script_of(recipe_file, tmp_path, container=container)
    shards = load_recipe(recipe_file).shards[0]
    binds = f"{run.path}:{run.path},{shards}:{shards}:ro,/data:/data,/scratch:/local:ro"
    assert f"apptainer exec --nv --pwd {run.path} --bind {binds} --no-home /images/radhpc.sif python3 -u -m x" in script
    assert f"export APPTAINERENV_PYTHONPATH={run.code}\n" in script
    assert f"\n{sys.executable} -m slurm.requeue {run.path} $status ||" in script


def test_a_container_by_pyxis(recipe_file: Path, tmp_path: Path) -> None:
    run, script = script_of(recipe_file, tmp_path, container={"pyxis": "/images/radhpc.sqsh", "binds": ["/data"]})
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    shards = load_recipe(recipe_file).shards[0]
    assert " --container-image=/images/radhpc.sqsh " in srun
    assert f" --container-mounts={run.path}:{run.path},{shards}:{shards}:ro,/data:/data " in srun
    assert f" --export=ALL,PYTHONPATH={run.code},PYTHONSAFEPATH=1,PYTHONNOUSERSITE=1 " in srun
    assert srun.endswith(" python3 -u -m x")
    assert f"\n{sys.executable} -m slurm.requeue {run.path} $status ||" in script


@pytest.mark.parametrize(
    ("container", "says"),
    [
        ("{}", "give either 'apptainer'"),
        ("{apptainer: a.sif, pyxis: a.sqsh}", "give either 'apptainer'"),
        ("{apptainer: a.sif, bind: [/data]}", "unknown key 'bind'.*did you mean 'binds'"),
        ("{apptainer: a.sif, binds: ['/a,/b']}", "allowed are PATH, PATH:INSIDE and PATH:INSIDE:ro"),
    ],
)
def test_mistakes_of_a_container_are_one_line(container: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"cluster: slurm\ncontainer: {container}\n")
    with pytest.raises(UserError, match=says):
        profiles.load(str(path))


def test_an_image_that_is_not_there_is_named_before_anything_is_submitted(
    launch: Launch, recipe_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("cluster: slurm\ncontainer: {apptainer: /nowhere/a.sif}\n")
    said = launch("train", recipe_file, "--on", path, "--run", tmp_path / "run", status=2).stderr.splitlines()[-1]
    assert said.startswith("error container.apptainer: /nowhere/a.sif: no such file")
