"""The layers hold: .importlinter names them, each contract fails when it is broken, and a login node needs no torch."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.imports import PACKAGES, modules
from tests.conftest import ROOT

CONFIGURATION = ".importlinter"
LARGEST_ROOM = 20
# What a login node imports: all of slurm, shards and the command, and these rooms and modules of radhpc.
TORCH_FREE = (
    "slurm",
    "shards",
    "radhpc.cli",
    "radhpc.core",
    "radhpc.storage",
    "radhpc.data.sampler",
    "radhpc.data.source",
    "radhpc.data.tasks",
    "radhpc.distributed.grace_period",
    "radhpc.distributed.stop",
    "radhpc.distributed.watchdog",
    "radhpc.engine.checkpoint",
    "radhpc.evaluation.metrics",
    "radhpc.evaluation.scoring",
    "radhpc.models.image_processors",
    "radhpc.models.weights",
)
# What these rooms hold may need torch once it is asked for by name.
NEED_TORCH = ("radhpc.evaluation.metrics.",)
# For each contract one import that breaks it: the room whose __init__ gets it, and what that imports.
BROKEN = {
    "packages": ("slurm", "shards"),
    "radhpc": ("radhpc.core", "radhpc.engine"),
    "radhpc-alone": ("radhpc.training", "slurm"),
    "shards-radhpc": ("shards.datasets", "radhpc.models"),
    "slurm-radhpc": ("slurm.monitoring", "radhpc.training"),
    "slurm-narrow": ("slurm.monitoring", "radhpc.distributed.ranks"),
    "portable": ("radhpc.models.portable", "radhpc.core"),
    "metrics": ("radhpc.evaluation.metrics", "radhpc.data"),
    "shards": ("shards.images", "shards.datasets"),
    "slurm": ("slurm.scheduler", "slurm.submit"),
    "siblings": ("radhpc.core.errors", "radhpc.core.log"),
}


def contracts() -> dict[str, configparser.SectionProxy]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / CONFIGURATION)
    return {name.rpartition(":")[2]: parser[name] for name in parser.sections() if ":contract:" in name}


def lint(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [str(program), "--config", CONFIGURATION, "--no-cache", *options],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the three packages, to break."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / CONFIGURATION, folder)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_every_layer_holds() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_contract_has_an_import_that_breaks_it() -> None:
    assert set(BROKEN) == set(contracts())


@pytest.mark.parametrize("contract", sorted(BROKEN))
def test_a_bad_import_is_named(copy: Path, contract: str) -> None:
    importer, imported = BROKEN[contract]
    base = copy / importer.replace(".", "/")
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    text = file.read_text()
    try:
        file.write_text(text + f"\nimport {imported}\n")
        done = lint(copy, "--contract", contract)
    finally:
        file.write_text(text)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
    assert imported in done.stdout.replace("\n", "")


def test_the_contracts_name_every_room() -> None:
    """A new room of radhpc must be placed in each list that names what others may not import."""
    rooms = {
        f"radhpc.{path.stem}"
        for path in (ROOT / "radhpc").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    rooms -= {"radhpc.__init__", "radhpc.__main__"}
    allowed = {
        "radhpc-alone": {"radhpc.cli"},
        "shards-radhpc": {"radhpc.core", "radhpc.storage"},
        "slurm-radhpc": {"radhpc.core", "radhpc.distributed", "radhpc.evaluation"},
    }
    for contract, exceptions in allowed.items():
        section = contracts()[contract]
        key = "source_modules" if contract == "radhpc-alone" else "forbidden_modules"
        named = {name for name in section[key].split() if name.startswith("radhpc.")}
        assert named == rooms - exceptions, contract


def test_rooms_are_small() -> None:
    for package in PACKAGES:
        for folder in [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]:
            files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= LARGEST_ROOM, f"{folder.relative_to(ROOT)}: {len(files)} files"


def importing(*arguments: str) -> str:
    """Run tests/importing.py and return what it printed. Fails with that where a fault was found."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.importing", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_login_node_needs_no_torch() -> None:
    names = [
        name
        for name in modules()
        if any(name == room or name.startswith(f"{room}.") for room in TORCH_FREE) and not name.startswith(NEED_TORCH)
    ]
    assert set(TORCH_FREE) <= set(names)
    importing("without-torch", *names)


def test_the_help_needs_no_torch() -> None:
    assert "quickstart" in importing("help")
