"""The README says what is true: its commands, its paths and its links exist. tests/test_layers.py holds the layers."""

import re
import subprocess
import sys

from tests.conftest import ROOT


def test_the_readmes_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"launch\.py ([a-z]+)", text))
    assert {"quickstart", "build", "train", "generate"} <= verbs
    help_text = subprocess.run(
        [sys.executable, "launch.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for verb in verbs:
        assert re.search(rf"\b{verb}\b", help_text), verb
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)", text)) <= targets
    for path in re.findall(r"\b(?:recipes|slurm/profiles)/[a-z0-9_/]+\.yaml", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:slurm|radhpc|shards)\.[a-z_.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_the_readme_shows_the_tree_as_it_is() -> None:
    text = (ROOT / "README.md").read_text()
    for folder in ("recipes", "shards", "slurm", "radhpc", "tests"):
        assert f"{folder}/" in text
        assert (ROOT / folder).is_dir()
