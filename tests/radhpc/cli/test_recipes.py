"""What can be trained and what a recipe may say: listed, copied and explained, at 80 columns and as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radhpc.cli.main import app
from radhpc.core import resources
from radhpc.core.errors import UserError
from radhpc.core.recipe import load
from radhpc.core.recipe.reference import keys
from slurm.sweep import definition as sweeps
from tests.conftest import ROOT

NAMES = resources.recipe_names()
SWEEPS = [name for name in NAMES if name.startswith("sweeps/")]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a verb on a terminal of 80 columns, in an empty folder; returns its standard output."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def verb(*arguments: object) -> str:
        app([*map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return verb


@pytest.fixture
def call_json(call: Callable[..., str]) -> Callable[..., dict[str, Any]]:
    def verb(*arguments: object) -> dict[str, Any]:
        (line,) = call(*arguments, "--json").splitlines()
        result: dict[str, Any] = json.loads(line)
        return result

    return verb


def test_recipes_and_sweeps_are_listed_apart_and_nothing_is_cut(call: Callable[..., str]) -> None:
    text = call("recipes")
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    first, second = text.split("radhpc sweep NAME")
    for name in NAMES:
        assert f"\n {name} " in (second if name in SWEEPS else first), name


def test_every_recipe_says_what_it_is(call_json: Callable[..., dict[str, Any]]) -> None:
    rows = call_json("recipes")["recipes"]
    assert [row["name"] for row in rows] == NAMES
    assert [row["name"] for row in rows if row["kind"] == "sweep"] == SWEEPS
    for row in rows:
        assert row["what"].endswith((".", "?")), row
        assert len(row["what"]) > 30, row


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SWEEPS])
def test_a_copy_is_the_same_recipe_and_says_how_to_train_it(name: str, call: Callable[..., str]) -> None:
    out = call("recipes", "copy", name, "mine.yaml")
    assert "'radhpc train mine.yaml'" in out
    assert load(Path("mine.yaml")) == load(Path(name))
    opening = Path("mine.yaml").read_text().partition("\nname:")[0]
    assert f"recipes/{name}.yaml" not in opening, "its commands would train another file"


@pytest.mark.parametrize("name", SWEEPS)
def test_a_copied_sweep_finds_its_recipe(name: str, call: Callable[..., str]) -> None:
    out = call("recipes", "copy", name)
    copied = Path(f"{name.removeprefix('sweeps/')}.yaml")
    assert f"'radhpc sweep {copied}'" in out
    (sweep, base), (original, same) = sweeps.load(copied.absolute()), sweeps.load(Path(name))
    assert base == same
    assert sweep.model_copy(update={"recipe": ""}) == original.model_copy(update={"recipe": ""})


def test_a_sweep_prefers_the_file_beside_it(call: Callable[..., str]) -> None:
    call("recipes", "copy", "sweeps/sections")
    call("recipes", "copy", "image_text", "image_text")  # a file of the recipe's very name
    changed = Path("image_text").read_text().replace("name: image-text", "name: changed")
    Path("image_text").write_text(changed)
    assert sweeps.load(Path("sections.yaml"))[1].name == "changed"


def test_a_copy_goes_into_a_folder_and_replaces_nothing(
    call: Callable[..., str], call_json: Callable[..., dict[str, Any]]
) -> None:
    Path("mine").mkdir()
    assert call_json("recipes", "copy", "recipes/tiny/gla.yaml", "mine")["recipe"] == str(
        Path("mine/gla.yaml").resolve()
    )
    Path("mine/gla.yaml").write_text("kept")
    with pytest.raises(UserError, match=r"mine/gla\.yaml: exists; name another file"):
        call("recipes", "copy", "tiny/gla", "mine/gla.yaml")
    assert Path("mine/gla.yaml").read_text() == "kept"
    with pytest.raises(UserError, match=r"nowhere/x\.yaml: No such file"):
        call("recipes", "copy", "gla", "nowhere/x.yaml")


def test_an_unknown_name_has_the_nearest(call: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"quickstrat: no such recipe \(did you mean 'quickstart'\?\)"):
        call("recipes", "copy", "quickstrat")


def test_a_recipe_is_found_from_any_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    for name in ("tiny/gla", "recipes/tiny/gla.yaml", "tiny/gla.yaml"):
        done = subprocess.run(
            [sys.executable, ROOT / "launch.py", "weights", name, "--json"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.startswith("{"), done.stderr


# The reference


def test_every_key_has_a_meaning() -> None:
    rows = keys()
    assert [row["key"] for row in rows if not row["meaning"].strip()] == []
    assert len({row["key"] for row in rows}) == len(rows) > 150
    by_key = {row["key"]: row for row in rows}
    assert by_key["seed"]["type"] == "whole number"
    assert by_key["stages.optimizer.learning_rate"]["default"] == "required"
    assert by_key["stream"]["default"] == "as below"
    assert by_key["stages.lora"] | {"meaning": ""} == {
        "key": "stages.lora", "type": "section or null", "default": "null", "meaning": "",
    }  # fmt: skip


def test_the_reference_wraps(call: Callable[..., str]) -> None:
    text = call("schema")
    assert max(map(len, text.splitlines())) <= 80
    for row in keys():
        assert f"\n{row['key']}  " in f"\n{text}"


def test_one_key_and_those_below_it(call: Callable[..., str], call_json: Callable[..., dict[str, Any]]) -> None:
    chosen = [row["key"] for row in call_json("schema", "stages.optimizer")["keys"]]
    assert chosen[:2] == ["stages.optimizer", "stages.optimizer.kind"]
    assert all(key.startswith("stages.optimizer") for key in chosen)
    assert call("schema", "seed").startswith("seed  whole number, default 0\n")
    with pytest.raises(UserError, match="evaluaton: no key of a recipe.*'evaluation'"):
        call("schema", "evaluaton")
