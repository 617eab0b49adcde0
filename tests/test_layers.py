"""The layers hold: .importlinter names them, each contract fails when it is broken, and a login node needs no torch."""

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

import grimp
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
# Modules of these rooms that a login node does not import: data of PyTorch, and scorers that are loaded by name.
NEED_TORCH = ("radhpc.core.batch", "radhpc.core.compat_torch", "radhpc.evaluation.metrics.")
# For each contract that is no order inside one room: an import that breaks it, from where and of what.
BROKEN = {
    "packages": ("slurm", "shards"),
    "radhpc": ("radhpc.core", "radhpc.engine"),
    "radhpc-alone": ("radhpc.training", "slurm"),
    "shards-radhpc": ("shards.datasets", "radhpc.models"),
    "slurm-radhpc": ("slurm.monitoring", "radhpc.training"),
    "slurm-narrow": ("slurm.monitoring", "radhpc.distributed.ranks"),
    "portable": ("radhpc.models.portable", "radhpc.core"),
    "metrics": ("radhpc.evaluation.metrics", "radhpc.data"),
    "shards": ("shards.text", "shards.datasets"),
    "siblings": ("radhpc.core.errors", "radhpc.core.files"),
}


def contracts() -> dict[str, configparser.SectionProxy]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / CONFIGURATION)
    return {name.rpartition(":")[2]: parser[name] for name in parser.sections() if ":contract:" in name}


def inside() -> dict[str, tuple[str, str]]:
    """For each order inside one room: an import from its lowest floor to its highest."""
    result = {}
    for name, section in contracts().items():
        if section["type"] == "layers" and name not in BROKEN:
            room = section["containers"].strip()
            floors = [floor.replace("|", " ").split() for floor in section["layers"].strip().splitlines()]
            result[name] = f"{room}.{floors[-1][0]}", f"{room}.{floors[0][0]}"
    return result


def lint(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [str(program), "--config", CONFIGURATION, "--no-logo", *options],
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
    done = lint(ROOT, "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_contract_has_an_import_that_breaks_it() -> None:
    assert set(BROKEN) | set(inside()) == set(contracts())


def test_every_module_stands_on_a_floor() -> None:
    """A room of three floors or more has an order, and each order has a place for every file of its room."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    orders = {section["containers"].strip(): section for section in contracts().values() if "containers" in section}
    for room in sorted(module for module in graph.modules if graph.find_children(module)):
        children = graph.find_children(room)
        below = {
            module: {
                other
                for other in children - {module}
                if graph.direct_import_exists(importer=module, imported=other, as_packages=True)
            }
            for module in children
        }
        if floors(below) > 2:
            assert room in orders, f"{room} has {floors(below)} floors and no order in {CONFIGURATION}"
        if room in orders:
            assert orders[room].getboolean("exhaustive"), f"{room}: a file without a place would go unnoticed"
            placed = {f"{room}.{name}" for name in orders[room]["layers"].replace("|", " ").split()}
            assert placed == children, f"{room}: {sorted(placed ^ children)}"


def floors(below: Mapping[str, Set[str]]) -> int:
    """Return the length of the longest chain of imports. `below`: for each module those that it imports, no circles."""

    def height(module: str) -> int:
        return 1 + max(map(height, below[module]), default=0)

    return max(map(height, below))


def broken_by(copy: Path, imports: Iterable[tuple[str, str]], *names: str) -> dict[str, bool]:
    """Add imports to the copy and return which of these contracts are broken."""
    before = {}
    for importer, imported in imports:
        base = copy / importer.replace(".", "/")
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        text = file.read_text()
        before.setdefault(file, text)
        file.write_text(f"{text}\nimport {imported}\n")
    try:
        options = [word for name in names for word in ("--contract", name)]
        output = lint(copy, "--cache-dir", "cache", *options).stdout.replace("\n", " ")
    finally:
        for file, text in before.items():
            file.write_text(text)
    titles = {name: contracts()[name]["name"] for name in names}
    words = " ".join(output.split())
    assert all(re.search(rf"{re.escape(title)} (KEPT|BROKEN)", words) for title in titles.values()), output
    return {name: f"{title} BROKEN" in words for name, title in titles.items()}


@pytest.mark.parametrize("contract", sorted(BROKEN))
def test_a_bad_import_is_named(copy: Path, contract: str) -> None:
    assert broken_by(copy, [BROKEN[contract]], contract) == {contract: True}


def test_a_bad_import_inside_a_room_is_named(copy: Path) -> None:
    """One in each room, all at once: each breaks only the order of its own room."""
    bad = inside()
    assert broken_by(copy, bad.values(), *bad) == dict.fromkeys(bad, True)


def test_the_copy_holds(copy: Path) -> None:
    assert not any(broken_by(copy, [], *contracts()).values())


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
