"""What `doctor` says of a real SLURM, and what `train` refuses before sbatch is called."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.files import file_system
from radhpc.core.run_folder import RunFolder
from slurm import box as slurm_box, precheck, profile as profiles
from slurm.cluster import Cluster, known_gpu, minutes
from slurm.preflight.plan import own_gpu
from slurm.profile import Profile

pytestmark = [pytest.mark.timeout(200)]

Launch = Callable[..., Any]


@pytest.fixture(scope="module")
def gpu_box(tmp_path_factory: pytest.TempPathFactory, box: str) -> Iterator[str]:
    """Another box, whose nodes have two GPUs and a short grace; `box` skips where SLURM is not installed."""
    folder = tmp_path_factory.mktemp("gpus") / "box"
    try:
        yield slurm_box.up(folder, nodes=2, gpus=2, grace=5)["conf"]
    finally:
        slurm_box.down(folder)


@pytest.fixture
def gpu_profile(gpu_box: str, tmp_path: Path) -> Callable[..., Path]:
    """The shipped profile for this box, with some of its keys changed."""

    def write(**changes: object) -> Path:
        text = (profiles.FOLDER / "box.yaml").read_text().replace("/tmp/radhpc-box/slurm.conf", gpu_box)
        lines = [line for line in text.splitlines() if line.partition(":")[0] not in changes]
        path = tmp_path / "profile.yaml"
        path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in changes.items() if value != "")]))
        return path

    return write


def scontrol(conf: str, *words: str) -> str:
    environment = {**os.environ, "SLURM_CONF": conf}
    return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, env=environment).stdout


def refused(profile: Path, run: Path) -> str:
    """What submitting with this profile is answered, by the check that `train` runs; "" where it would go ahead."""
    from radhpc.core.errors import UserError
    from slurm.submit import host_python, slurm_parameters

    loaded = profiles.load(str(profile))
    try:
        precheck.refuse(RunFolder(run), loaded, slurm_parameters(RunFolder(run), loaded, host_python(loaded)))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.box
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, []),
        ({"gpus_per_node": 2}, []),
        ({"gpus_per_node": 2, "gpu_request": "gres"}, []),
        ({"partition": "preemptable"}, ["partition 'preemptable'", "did you mean 'preemptible'", "urgent"]),
        ({"nodes": 3}, ["nodes 3", "'preemptible' has 2"]),
        ({"nodes": "1-4"}, []),
        ({"gpus_per_node": 4}, ["gpus_per_node 4", "at most 2"]),
        ({"gpus_per_node": 1, "sbatch": '{gres: "gpu:h100:1"}'}, ["'h100'", "GPUs without a type"]),
        ({"constraint": "a100_80bg"}, ["constraint 'a100_80bg'", "did you mean 'a100_80gb'"]),
        ({"constraint": "a100_80gb"}, []),
        ({"cpus_per_task": 8}, ["cpus_per_task 8", "8 CPUs", "has 1"]),
        ({"memory_gb": 9000}, ["memory_gb 9000", "largest node"]),
        ({"minutes": 4000}, ["minutes 4000", "allows 2880"]),
        ({"minutes": 1}, ["minutes 1", "signal_seconds 60", "2 minutes or more"]),
        ({"partition": "urgent", "account": "cardiolgy"}, ["account 'cardiolgy'", "cardiology"]),
        ({"python": "/no/such/python"}, ["python: /no/such/python: no such program"]),
        ({"python": "apptainer exec /no/such.sif python"}, ["/no/such.sif: no such image"]),
        (
            {"setup": "[source /no/such/venv/bin/activate]"},
            ["setup: 'source /no/such/venv/bin/activate': no such file"],
        ),
        ({"setup": '["source $VENV/bin/activate"]'}, []),
        ({"sbatch": "{begin: never}"}, ["sbatch would refuse the job", "never"]),
    ],
)
def test_what_train_refuses_before_the_queue(
    gpu_box: str, gpu_profile: Callable[..., Path], tmp_path: Path, changes: dict[str, object], wanted: list[str]
) -> None:
    scontrol(gpu_box, "update", "PartitionName=preemptible", "MaxTime=2-00:00:00")
    scontrol(gpu_box, "update", "PartitionName=urgent", "AllowAccounts=cardiology")
    scontrol(gpu_box, "update", "NodeName=box1,box2", "AvailableFeatures=a100_80gb", "ActiveFeatures=a100_80gb")
    said = refused(gpu_profile(**changes), tmp_path / "run")
    assert bool(said) == bool(wanted), said
    assert len(said.splitlines()) <= 1
    for part in wanted:
        assert part in said


@pytest.mark.box
def test_train_says_it_in_one_line_and_leaves_nothing(
    launch: Launch, gpu_box: str, gpu_profile: Callable[..., Path], recipe_file: Path, tmp_path: Path
) -> None:
    done = launch("train", recipe_file, "--on", gpu_profile(partition="gpu"), "--run", tmp_path / "run", status=2)
    assert "partition 'gpu': no such partition" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert "JobId" not in scontrol(gpu_box, "--oneliner", "show", "job")


@pytest.mark.box
def test_a_folder_that_the_nodes_do_not_see(box_profile: Path, tmp_path: Path) -> None:
    profile = profiles.load(str(box_profile))
    here = Cluster.ask(profile.environment)
    assert here.is_here(profile.partition), "all nodes of the test's SLURM are this machine"
    assert not precheck.folder_problems(profile, here, tmp_path)
    elsewhere = replace(here, nodes=tuple(replace(node, host="gpu-node-7") for node in here.nodes))
    (said,) = precheck.folder_problems(profile, elsewhere, tmp_path / "not" / "made")
    assert str(tmp_path) in said
    assert "shared: true" in said
    assert not precheck.folder_problems(profile.model_copy(update={"shared": True}), elsewhere, tmp_path)


def test_a_warning_shorter_than_a_save_of_this_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record("saved", step=10, seconds=75.5)
    profile = Profile(cluster="slurm", signal_seconds=60)
    (said,) = precheck.time_problems(run, profile)
    assert "signal_seconds 60" in said
    assert "took 76 s" in said
    assert not precheck.time_problems(run, profile.model_copy(update={"signal_seconds": 90}))


@pytest.mark.box
def test_doctor_reads_the_cluster(launch: Launch, launch_json: Launch, gpu_profile: Callable[..., Path]) -> None:
    found = launch_json("doctor", "--on", gpu_profile(gpus_per_node=2), "--run", gpu_profile().parent, status=1)
    checks = {check["name"]: check for check in found["checks"]}
    assert not found["ok"]
    bad = [name for name, check in checks.items() if not check["ok"]]
    assert bad == ["grace", "grace that the profile states"], "five seconds are too short, and the profile says twenty"
    assert "GraceTime=5 s" in checks["grace"]["found"]
    assert "ask for GraceTime" in checks["grace"]["wanted"]
    assert "REQUEUE" in checks["preempt mode"]["found"]
    assert "10 s" in checks["KillWait"]["found"]
    assert checks["GPUs"]["found"] == "2 GPU per node"
    urgent = launch_json("doctor", "--on", gpu_profile(partition="urgent", account="cardiology"))
    assert urgent["ok"]
    assert "never preempted" in {check["name"]: check for check in urgent["checks"]}["preemption"]["found"]
    wrong = launch("doctor", "--on", gpu_profile(partition="gpu"), status=1).stdout
    assert "NO  job is accepted: partition 'gpu'" in wrong


@pytest.mark.box
@pytest.mark.timeout(280)
def test_the_probe_is_preempted_and_says_how_long_it_had(
    launch_json: Launch, gpu_box: str, gpu_profile: Callable[..., Path], recipe_file: Path, tmp_path: Path
) -> None:
    scontrol(gpu_box, "update", "PartitionName=urgent", "AllowAccounts=ALL")
    found = launch_json(
        "doctor", "--on", gpu_profile(), "--probe", "--recipe", recipe_file, "--preempt-with", "urgent",
        "--run", tmp_path, status=1,
    )  # fmt: skip
    assert "JobState=PENDING" not in scontrol(gpu_box, "show", "job"), "the urgent job is left behind"
    checks = {check["name"].removeprefix("probe: "): check for check in found["checks"]}
    assert checks["ranks started"]["found"].startswith("2 on ")
    assert "all-reduce over 2 rank(s)" in checks["ranks see each other"]["found"]
    good = ("ranks started", "ranks see each other", "clocks", "scontrol inside the job", "warning", "room in /tmp")
    assert all(checks[name]["ok"] for name in good), found
    assert "SIGTERM" in checks["warning"]["found"]
    seconds = float(checks["seconds to save"]["found"].split()[0])
    assert 5 <= seconds < 60, "the grace, and until SLURM looks again"
    assert [name for name in checks if "phantom" in name], "the recipe's shards were read"


def test_an_inline_profile_has_its_own_checks(launch_json: Launch, tmp_path: Path) -> None:
    found = launch_json("doctor", "--on", "inline", "--probe", "--run", tmp_path)
    assert found["ok"]
    names = [check["name"] for check in found["checks"]]
    assert "run folder has room" in names
    assert "probe: ranks see each other" in names
    assert "grace" not in names


def test_units_and_names(tmp_path: Path) -> None:
    assert minutes("2-01:30:00") == 2 * 1440 + 90
    assert minutes("30:00") == 30
    assert minutes("UNLIMITED") is None
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(tmp_path / "not" / "there") == file_system(tmp_path)
    for name, wanted in (("nvidia_a100-sxm4-80gb", "A100 80GB"), ("a100", "A100 40GB"), ("tesla_t4", "T4")):
        assert (known_gpu(name) or ("",))[0] == wanted
    assert known_gpu("mi300x") is None
    assert own_gpu(Profile(cluster="slurm", gpus_per_node=4, constraint="h100"), None) is not None
    assert own_gpu(Profile(cluster="slurm", constraint="h100"), None) is None
