"""A wheel is all that people need: it works from any folder, brings its data files, and takes no foreign names.

The wheel is built from a copy of the tree and installed into an environment of its own, which also sees the libraries
of the one that runs the tests, but not its editable radhpc.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bench.imports import PACKAGES
from tests.conftest import ROOT

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

FILES = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "launch.py")
# What makes a run of the quickstart one of seconds.
SHORT = (
    "stages.scratch.steps=2", "stages.adapt.steps=1", "stages.refine.steps=1", "evaluation.samples=4",
    "evaluation.max_new_tokens=8", "evaluation.batch=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree: a build writes into the folder that it reads."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
        "--wheel-dir", out, source, cwd=source)  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and the libraries of this one. A path file does not bring this one's path files,
    and so not its editable radhpc."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = site_packages(folder)
    run(sys.executable, "-m", "pip", f"--python={folder / 'bin' / 'python'}", "install", "--quiet", "--no-deps",
        "--no-index", wheel, cwd=folder.parent)  # fmt: skip
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def site_packages(environment: Path) -> Path:
    (site,) = environment.glob("lib/python3*/site-packages")
    return site


def run(*arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd, env=clean, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done


class Command:
    """The command `radhpc` of an environment, from a folder of its own."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.program, self.folder = environment / "bin" / "radhpc", folder

    def __call__(self, *arguments: object) -> str:
        return run(self.program, *arguments, cwd=self.folder).stdout

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json").splitlines()[-1])


@pytest.fixture(scope="module")
def radhpc(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(environment, tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def quickstart(radhpc: Command) -> Path:
    """The run folder of a short quickstart."""
    result = radhpc.json("quickstart", "--studies", 200, "--run", "first", *SHORT)
    return radhpc.folder / result["run"]


def test_it_carries_every_file_of_the_packages(wheel: Path) -> None:
    """All but byte code: code, profiles, templates, configurations, type markers; and the recipes inside radhpc."""
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"radhpc/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")}
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        licence = [name for name in file.namelist() if ".dist-info/" in name and name.endswith("/LICENSE")]
    assert names == expected
    assert len(licence) == 1


def test_it_installs_three_packages_and_nothing_else(environment: Path) -> None:
    site = site_packages(environment)
    names = {path.name for path in site.iterdir() if not path.name.endswith((".dist-info", ".pth"))}
    assert names == set(PACKAGES)
    assert not {"launch.py", "verbs", "tests", "bench", "recipes"} & names
    (information,) = site.glob("radhpc-*.dist-info")
    assert set((information / "top_level.txt").read_text().split()) == set(PACKAGES)


def test_modules_come_from_the_wheel(environment: Path, radhpc: Command) -> None:
    program = ROOT / "tests" / "importing.py"
    output = run(environment / "bin" / "python", "-I", program, "origins", *PACKAGES, cwd=radhpc.folder).stdout
    site = site_packages(environment)
    assert output.split() == [str(site / package / "__init__.py") for package in PACKAGES]


def test_the_editable_installation_is_the_checkout(tmp_path: Path) -> None:
    """What `make install` leaves: this environment's radhpc reads code and recipes of a checkout."""
    output = run(sys.executable, "-I", ROOT / "tests" / "importing.py", "origins", *PACKAGES, cwd=tmp_path).stdout
    folders = {Path(line).parent.parent for line in output.split()}
    assert len(folders) == 1
    assert (folders.pop() / "setup.cfg").exists()
    recipes = run(Path(sys.executable).with_name("radhpc"), "recipes", "--json", cwd=tmp_path).stdout
    assert "quickstart" in {row["name"] for row in json.loads(recipes.splitlines()[-1])["recipes"]}


def test_help_and_recipes(radhpc: Command) -> None:
    assert "quickstart" in radhpc("--help")
    names = {row["name"] for row in radhpc.json("recipes")["recipes"]}
    assert names == {
        str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in (ROOT / "recipes").rglob("*.yaml")
    }
    radhpc("recipes", "copy", "quickstart")
    original = (ROOT / "recipes" / "quickstart.yaml").read_text()
    copied = (radhpc.folder / "quickstart.yaml").read_text()
    assert copied == original.replace("recipes/quickstart.yaml", "quickstart.yaml"), "its commands name the copy"


def test_a_short_quickstart_with_its_evaluation_page(quickstart: Path) -> None:
    (page,) = (quickstart / "evaluation").glob("step-*4/report.html")
    assert "<html" in page.read_text()
    assert (quickstart / "adapter" / "adapter_config.json").exists()


def test_a_plan(radhpc: Command, quickstart: Path) -> None:
    shards = quickstart.with_name(quickstart.name + "-shards")
    assert radhpc.json("plan", "tiny/radixpert", f"shards=[{shards}]", "--on", "local")["fits"]


@pytest.mark.parametrize("profile", ["inline", "local"])
def test_a_run(radhpc: Command, quickstart: Path, profile: str) -> None:
    """By the name of a recipe, in this process and on two ranks, which start from the run's frozen code."""
    shards = quickstart.with_name(quickstart.name + "-shards")
    out = radhpc.folder / f"run-{profile}"
    radhpc("train", "quickstart", f"shards=[{shards}]", *SHORT, "--on", profile, "--run", out, "--watch")
    assert radhpc.json("status", out)["state"] == "finished"


def test_nothing_says_that_an_index_has_it() -> None:
    """No file of the product tells people to install it from a package index, where the name may be anybody's."""
    files = [path for package in (*PACKAGES, "recipes", "docs", "containers") for path in (ROOT / package).rglob("*")]
    for path in (*files, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "launch.py"):
        if path.is_file() and path.suffix in ("", ".py", ".md", ".yaml", ".html", ".def"):
            text = path.read_text(encoding="utf-8", errors="replace").replace("'", "").replace('"', "")
            assert "pip install radhpc" not in text, path
