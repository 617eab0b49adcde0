"""The files around the code: they can be read, name what exists, and agree with one another."""

import configparser
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from radhpc.core import formats
from tests.conftest import ROOT

GITHUB = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = [path for path in GITHUB if path.parent.name == "workflows"]
TEMPLATES = [path for path in GITHUB if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config"]
OTHERS = [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def setup(section: str, key: str) -> str:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser[section][key]


def requirements() -> list[Requirement]:
    """What setup.cfg asks for, also for its extras."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    return [Requirement(line) for text in lists for line in text.split("\n") if line and not line.startswith("#")]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    named = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in named}


@pytest.mark.parametrize("path", [*GITHUB, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_it_is_yaml(path: Path) -> None:
    assert isinstance(read(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for line in targets for name in line.split()}
    jobs = read(path)["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) - {"python"} <= targets, command
        for file in re.findall(r"\b(?:tests/\S+|\.ci/\S+)", command):
            assert (ROOT / file).exists(), command
    for job in jobs.values():
        assert job["timeout-minutes"] <= 180
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_ask_for_the_doctor_and_never_for_data(path: Path) -> None:
    text = path.read_text()
    assert "radhpc doctor --json" in text
    assert "Never post patients' data" in text
    assert read(path)["body"]


def test_every_pin_lies_in_its_range() -> None:
    """constraints.txt has one version of each library that setup.cfg allows: the one that the tests run with."""
    versions = pins()
    for requirement in requirements():
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name == "flash-attn":  # compiled against CUDA: no test runs it
            continue
        assert name in versions, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(versions[name]), f"{requirement}: constraints.txt has {versions[name]}"


def test_what_people_install_has_a_floor_and_a_ceiling() -> None:
    for line in setup("options", "install_requires").split("\n"):
        if line and not line.startswith("#"):
            operators = {specifier.operator for specifier in Requirement(line).specifier}
            assert operators == {">=", "<"}, line


def test_the_changelog_names_the_formats_versions() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for name, version in formats.VERSIONS.items():
        assert re.search(rf"^\| {name} \| {version} \|", text, re.M), name


def test_version_and_licence_are_one() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == setup("metadata", "version")
    assert citation["license"] == setup("metadata", "license") == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_make_test_says_what_it_installs_before_it_does() -> None:
    """The announcement is the first thing that it does, and it names how to decline."""
    makefile = (ROOT / "Makefile").read_text()
    (needs,) = re.findall(r"^test: (.*)$", makefile, re.M)
    assert needs.split()[0] == "announce"
    assert "SYSTEM=no" in (ROOT / ".ci" / "system").read_text()


def test_without_the_environment_launch_says_in_one_line_what_to_do(tmp_path: Path) -> None:
    """The system's Python, with nothing of the caller's environment. Its own site-packages are left out (-S)."""
    for folder in (ROOT, tmp_path):
        command = ["/usr/bin/env", "-i", "/usr/bin/python3", "-S", str(ROOT / "launch.py"), "--help"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "run 'make install' and 'source .venv/bin/activate', then 'radhpc VERB'" in line
