"""One box for all tests that need a real SLURM: started once, brought down by pid at the end."""

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def old_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of commit a0139ea, the last one with flat packages and `verbs/`.

    git archive a0139ea radhpc slurm shards verbs launch.py recipes | gzip -9 -n > tests/data/a0139ea-code.tar.gz
    """
    from tests.conftest import ROOT

    folder = tmp_path_factory.mktemp("a0139ea") / "checkout"
    with tarfile.open(ROOT / "tests" / "data" / "a0139ea-code.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running box of two nodes; gives the path for SLURM_CONF."""
    from slurm import box as slurm_box

    if shutil.which("slurmctld") is None and not Path("/usr/sbin/slurmctld").exists():
        assert os.environ.get("CI") != "true", "SLURM is missing under CI"
        pytest.skip("SLURM IS NOT INSTALLED: nothing of preemption and requeue is tested here; see `make slurm`")
    folder = tmp_path_factory.mktemp("box") / "box"
    try:
        yield slurm_box.up(folder, nodes=2, grace=20)["conf"]
    finally:
        slurm_box.down(folder)


@pytest.fixture
def box_profile(box: str, tmp_path: Path) -> Path:
    """slurm/profiles/box.yaml, for this box."""
    from slurm.profile import FOLDER

    text = (FOLDER / "box.yaml").read_text()
    assert "SLURM_CONF: /tmp/radhpc-box/slurm.conf" in text
    path = tmp_path / "box.yaml"
    path.write_text(text.replace("/tmp/radhpc-box/slurm.conf", box))
    return path


@pytest.fixture
def slurm(box: str) -> Iterator[Callable[..., str]]:
    """Call one of SLURM's commands; whatever is left in the queue is cancelled at the end."""

    def call(*command: str) -> str:
        environment = {**os.environ, "SLURM_CONF": box}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    yield call
    for job in call("squeue", "--noheader", "--format=%i").split():
        with contextlib.suppress(subprocess.CalledProcessError):  # it has ended meanwhile
            call("scancel", "--signal=KILL", "--full", job)
            call("scancel", job)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path, box: str) -> Path:
    """The recipe of test_preemption.py on the same two nodes, left in peace."""
    from slurm.profile import FOLDER
    from tests.conftest import ROOT, TINY_RECIPE
    from tests.slurm.test_preemption import EVERY, LONGER

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(TINY_RECIPE.format(shards=phantom_shards))
    profile = folder / "box.yaml"
    profile.write_text((FOLDER / "box.yaml").read_text().replace("/tmp/radhpc-box/slurm.conf", box))
    command = [sys.executable, ROOT / "launch.py", "train", folder / "tiny.yaml", *LONGER, f"checkpoint.every={EVERY}"]
    subprocess.run([*command, "--on", profile, "--run", folder / "run", "--watch"], cwd=ROOT, check=True, timeout=300)
    return folder / "run"
