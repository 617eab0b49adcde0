"""Profiles and what they make of a batch script."""

from pathlib import Path

import pytest

from radhpc.core.errors import UserError
from radhpc.core.recipe import load as load_recipe
from radhpc.core.run_folder import RunFolder
from slurm import job, profile as profiles
from slurm.compat_submitit import batch_script
from slurm.submit import executor, slurm_parameters

NAMES = sorted(path.stem for path in profiles.FOLDER.glob("*.yaml"))


@pytest.fixture
def run(tmp_path: Path, recipe_file: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "a run's folder", load_recipe(recipe_file))


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_loads_and_describes_its_job(name: str, run: RunFolder) -> None:
    profile = profiles.load(name)
    if profile.cluster != "slurm":
        assert executor(run, profile)
        return
    script = batch_script("python", run.path, slurm_parameters(run, profile, "python"))
    assert f"#SBATCH --nodes={profile.nodes}" in script
    if profile.least_nodes < profile.most_nodes:
        assert f"#SBATCH --ntasks={profile.world}\n" in script
        assert "#SBATCH --overcommit\n" in script
    else:
        assert f"#SBATCH --ntasks-per-node={profile.tasks_per_node}\n" in script
    assert "#SBATCH --requeue" in script
    assert f"--signal=USR2@{profile.signal_seconds}" in script
    assert "--kill-on-bad-exit=1" in script
    if profile.gpus_per_node:
        assert profile.tasks_per_node == profile.gpus_per_node, "one rank per GPU"
        assert "gpus-per-node=" in script or "gres=gpu:" in script
    for secret in ("AWS_", "TOKEN", "phantom"):
        assert secret not in script


def test_nothing_in_the_submission_knows_a_box() -> None:
    for path in profiles.FOLDER.parent.glob("*.py"):
        if path.name not in ("box.py", "box_files.py"):
            text = path.read_text().replace("rich.box", "").replace("box=SIMPLE_HEAD", "")
            assert "box" not in text, path.name


def test_an_unknown_profile_and_key_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'local'"):
        profiles.load("locla")
    path = tmp_path / "mine.yaml"
    path.write_text("cluster: slurm\npartitoin: gpu\n")
    with pytest.raises(UserError, match="unknown key 'partitoin'.*did you mean 'partition'"):
        profiles.load(str(path))


def test_a_name_that_does_not_resolve_falls_back_to_the_address_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.1.2.3")
    assert job.master_address("no-such-host.invalid") == "10.1.2.3"
    assert job.master_address("localhost") == "localhost"


def test_ports_differ_between_jobs_and_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for life in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(life))
        ports |= {job.master_port(str(number)) for number in range(1000, 1100)}
    assert min(ports) >= 12000
    assert max(ports) < 32000
