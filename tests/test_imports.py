"""Every module of the product can be the first that a process imports.

The short form of `python -m bench.imports`: all modules that need no PyTorch, from a bare interpreter, and two of each
other room, from an interpreter that has imported numpy and torch, and nothing else that could hide a fault.
"""

import subprocess
import sys

import pytest

from bench.imports import import_first, modules
from tests.conftest import ROOT

FREE_ROOMS = ("slurm", "shards", "radhpc.core", "radhpc.storage", "radhpc.cli")
FREE = [name for name in modules() if name.startswith(tuple(f"{room}." for room in FREE_ROOMS)) or name in FREE_ROOMS]


def forked(names: list[str], *options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.importing", "forked", *options, *names],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_packages_are_found() -> None:
    names = modules()
    assert len(names) > 200
    assert {"radhpc.worker", "radhpc.core", "shards.build", "slurm.job"} <= set(names)


def test_modules_that_need_no_torch() -> None:
    forked(FREE)


def test_two_modules_of_each_room_that_need_torch() -> None:
    """The last two by name, to keep this short: `make imports` imports all of them, on every push."""
    rooms: dict[str, list[str]] = {}
    for name in sorted(set(modules()) - set(FREE)):
        rooms.setdefault(name.rpartition(".")[0], []).append(name)
    forked([name for names in rooms.values() for name in names[-2:]], "--loaded", "numpy,torch")


def test_a_module_that_needs_another_one_first_is_named(tmp_path: object) -> None:
    """The check itself fails where an import fails."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.importing", "forked", "radhpc.core.errors", "radhpc.core.no_such_module"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.startswith("radhpc.core.no_such_module: ModuleNotFoundError")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", ["radhpc.worker", "radhpc.serving.pipeline", "radhpc.serving.demo", "radhpc.models.adapters"]
)
def test_entry_points_in_a_bare_interpreter(name: str) -> None:
    """Where transformers comes before torch, as it does for whoever imports one of these first."""
    assert import_first(name) == ""
