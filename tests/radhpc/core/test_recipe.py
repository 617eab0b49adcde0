"""Recipes: every one in recipes/ loads; a mistake gets one line with the key, its value and what is allowed."""

from pathlib import Path

import pytest

from radhpc.core.errors import UserError
from radhpc.core.recipe import load
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_freezing(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    frozen = tmp_path / "recipe.yaml"
    frozen.write_text(recipe.to_yaml())
    assert load(frozen) == recipe
    assert load(frozen).hash == recipe.hash


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_the_commands_that_run_it(path: Path) -> None:
    commands = [
        line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#") and "radhpc " in line
    ]
    assert any(f"recipes/{path.name}" in command or "quickstart" in command for command in commands)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sead=1", ["unknown key 'sead'", "did you mean 'seed'", "allowed are"]),
        ("stages.scratch.stepps=3", ["stages.0", "unknown key 'stepps'", "did you mean 'steps'"]),
        ("stages.9.steps=3", ["'9'", "allowed are 0 to 2", "scratch, adapt, refine"]),
        ("stages.scratch.steps=many", ["stages.0.steps", "integer", "'many'"]),
        ("engine=deepspede", ["engine", "'fsdp'", "'deepspede'"]),
        ("stages.adapt.lora.targets='('", ["stages.1.lora.targets", "regular expression"]),
        ("stages.refine.lora.rank=1", ["refine", "lora.rank 1", "only grow"]),
        ("stages.refine.adapters=null", ["refine", "'grow', 'keep', 'merge' or 'new'"]),
        ("stages.scratch.epochs=2", ["scratch", "either 'steps' or 'epochs'"]),
        ("nonsense", ["nonsense", "key=value"]),
        ("name.deeper=1", ["plain value"]),
    ],
)
def test_a_mistake_is_named(recipe_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(recipe_file, [override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_overrides_go_over_the_file(recipe_file: Path) -> None:
    recipe = load(recipe_file, ["seed=7", "stages.adapt.lora.dropout=0.5", "stages.1.batch=3", "evaluation.every=5"])
    assert recipe.seed == 7
    assert recipe.stages[1].lora is not None
    assert recipe.stages[1].lora.dropout == 0.5
    assert (recipe.stages[1].batch, recipe.evaluation.every) == (3, 5)


def test_a_key_given_twice_is_refused(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "\nseed: 1\nseed: 2\n")
    with pytest.raises(UserError, match="'seed' is given twice"):
        load(recipe_file)


def test_a_missing_file_names_its_neighbours(recipe_file: Path) -> None:
    with pytest.raises(UserError, match="tiny.yaml"):
        load(recipe_file.with_name("tinny.yaml"))


def test_every_field_says_its_type() -> None:
    """An attribute without annotation would be no field, and could not be set from a recipe."""
    import ast

    nodes = [node for path in (ROOT / "radhpc" / "recipe").glob("*.py") for node in ast.parse(path.read_text()).body]
    for section in (node for node in nodes if isinstance(node, ast.ClassDef) and node.name != "Section"):
        bare = [node for node in section.body if isinstance(node, ast.Assign)]
        assert not bare, section.name
