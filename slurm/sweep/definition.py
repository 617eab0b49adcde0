"""Define a sweep: a YAML file over a recipe, validated before anything is submitted.

    recipe: ../quickstart.yaml                # relative to this file, or a name: quickstart
    overrides: [evaluation.every=50]          # the same for every trial, as on the command line
    space:
      stages.adapt.optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-3, log: true}
      stages.adapt.lora.rank: [2, 4, 8]       # any values of YAML, whole sections too
    method: tpe
    trials: 20
    pruner: {method: asha, min_steps: 50, reduction: 3}
    metric: loss

A sweep and the recipe it starts from enter; what every trial may look like leaves: overrides, and the points of a grid.
study.py draws from it, trials.py runs it.
"""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from radhpc.core import recipe as recipes, resources
from radhpc.core.errors import UserError, nearest
from radhpc.core.recipe import Recipe, Section, read_yaml, validate
from radhpc.evaluation.metrics import score_names

CORNERS = 1000  # of the space that are validated at most; a larger space is validated axis by axis

Scalar = bool | int | float | str | None


class Axis(Section):
    """One key of the recipe and its values: a list to choose from, or a range."""

    values: tuple[Any, ...] | None = Field(None, description="a list stands for this")
    low: int | float | None = None
    high: int | float | None = Field(None, description="included; whole numbers where both ends are")
    log: bool = Field(False, description="draw the logarithm evenly")
    step: int | float | None = Field(None, gt=0, description="between two neighbours, counted from low")

    @model_validator(mode="after")
    def _list_or_range(self) -> "Axis":
        if self.values is not None:
            if not self.values:
                raise ValueError("an empty list; allowed are values to choose from, or 'low' and 'high'")
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("'values' is a list to choose from; 'low', 'high', 'step' and 'log' are a range's")
            for n, value in enumerate(self.values):
                if value in self.values[:n]:
                    raise ValueError(f"{value!r} is given twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give a list of values, or both 'low' and 'high'")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"'low' {self.low} must be below 'high' {self.high}, both finite")
        if self.log and self.low <= 0:
            raise ValueError(f"'log' needs a 'low' above zero, not {self.low}")
        if self.log and self.step is not None:
            raise ValueError("'log' and 'step' exclude each other")
        if self.whole and self.step is not None and not isinstance(self.step, int):
            raise ValueError(f"'step' {self.step}: a range of whole numbers has whole steps")
        steps = (self.high - self.low) / (self.step or 1)
        if self.step is not None and abs(steps - round(steps)) > 1e-9:
            raise ValueError(f"'step' {self.step} does not lead from {self.low} to {self.high}")
        return self

    @property
    def whole(self) -> bool:
        """Return whether a range has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def points(self) -> list[Scalar] | None:
        """Return all values, as a study keeps them; None where they are too many to be counted."""
        if self.values is not None:
            return [_kept(value) for value in self.values]
        assert self.low is not None
        assert self.high is not None
        if self.log or (self.step is None and not self.whole):
            return None
        step = self.step or 1
        return [self.low + n * step for n in range(round((self.high - self.low) / step) + 1)]

    def corners(self) -> list[Scalar]:
        """Return the values of a list, or the ends of a range."""
        return [_kept(value) for value in self.values] if self.values is not None else [self.low, self.high]

    def original_value(self, kept: Scalar) -> Any:
        """Return the value as the sweep file gives it, from how a study keeps it."""
        if self.values is None:
            return kept
        return next(value for value in self.values if _kept(value) == kept and type(_kept(value)) is type(kept))

    def label(self, kept: Scalar) -> Scalar:
        """Return a short name of the value for tables: of a section, what tells it from the list's other sections."""
        value = self.original_value(kept)
        if isinstance(value, list):
            return ", ".join(map(str, value)) or kept
        if not isinstance(value, dict):
            return kept
        others = [other for other in self.values or () if isinstance(other, dict)]
        parts = [key for key in value if any(key not in other for other in others) and not _plain(value[key])]
        for key, leaf in _leaves(value).items():
            if any(
                _leaves(other).get(key, leaf) != leaf or (_plain(value.get(key)) and key not in other)
                for other in others
            ):
                parts.append(f"{key.split('.')[-1]} {leaf}")
        return ", ".join(parts) or kept


class Pruner(Section):
    """A rule that ends trials early. ASHA: Li et al., 2018, asynchronous successive halving."""

    method: Literal["asha"] = "asha"
    min_steps: int = Field(ge=1, description="optimizer steps that every trial gets")
    reduction: int = Field(3, ge=2, description="of this many trials one goes on, for this many times as many steps")


class Sweep(Section):
    """A sweep."""

    recipe: str = Field(
        description="the recipe that all trials start from: a file, relative to the sweep's, or a name that "
        "'radhpc recipes' lists"
    )
    overrides: tuple[str, ...] = Field((), description="key=value, the same for every trial")
    space: dict[str, Axis] = Field(min_length=1, description="keys of the recipe, dotted as on the command line")
    method: Literal["grid", "random", "tpe"] = Field(
        "tpe", description="every point; at random; by the tree-structured Parzen estimator (Bergstra et al., 2011)"
    )
    trials: int | None = Field(None, ge=1, description="how many; a grid has as many as points")
    seed: int = Field(0, ge=0)
    metric: str = Field("loss", description="a score of the evaluation on the recipe's evaluation.split")
    direction: Literal["minimize", "maximize"] | None = Field(None, description="default: minimize for loss alone")
    pruner: Pruner | None = None
    concurrent: int = Field(4, ge=1, description="trials at a time")

    @field_validator("space", mode="before")
    @classmethod
    def _lists_are_values(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {str(key): {"values": axis} if isinstance(axis, list) else axis for key, axis in data.items()}

    @field_validator("metric")
    @classmethod
    def _known_score(cls, value: str) -> str:
        names = score_names()
        if value not in names:
            raise ValueError(f"no such score{nearest(value, names)}; allowed are {', '.join(names)}")
        return value

    @model_validator(mode="after")
    def _as_many_as_points(self) -> "Sweep":
        fixed = [override.partition("=")[0] for override in self.overrides]
        for key in self.space:
            if key in fixed:
                raise ValueError(f"'{key}' stands in 'space' and in 'overrides'")
        if self.method != "grid":
            if self.trials is None:
                raise ValueError(f"'trials' is missing: how many of method '{self.method}'")
            return self
        for key, axis in self.space.items():
            if axis.points() is None:
                raise ValueError(f"space.{key}: a grid needs a list, whole numbers or a 'step'")
        if self.trials not in (None, count := len(self.grid())):
            raise ValueError(f"'trials' {self.trials}: this grid has {count} points; leave 'trials' out")
        return self

    @property
    def count(self) -> int:
        """Return the number of trials."""
        return len(self.grid()) if self.method == "grid" else self.trials or 0

    @property
    def maximizes(self) -> bool:
        return self.metric != "loss" if self.direction is None else self.direction == "maximize"

    def grid(self) -> list[dict[str, Scalar]]:
        """Return every point, the last key changing first."""
        points = [axis.points() or [] for axis in self.space.values()]
        return [dict(zip(self.space, point, strict=True)) for point in itertools.product(*points)]

    def trial_overrides(self, parameters: dict[str, Scalar]) -> list[str]:
        """Return what a trial changes in the base recipe, as on the command line."""
        return [f"{key}={_yaml(axis.original_value(parameters[key]))}" for key, axis in self.space.items()]

    def to_yaml(self) -> str:
        """Return the file that `load` reads back."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        data["recipe"] = self.recipe
        data["space"] = {key: axis.get("values", axis) for key, axis in data["space"].items()}
        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110))


def load(path: Path) -> tuple[Sweep, Recipe]:
    """Read a sweep and the recipe that its trials start from, and validate every corner of its space.

    Raises UserError with the key, its value and what is allowed.
    """
    path = resources.find_recipe(path, "sweeps")
    sweep = validate(Sweep, read_yaml(path), path)
    base = recipes.load(base_path(path, sweep.recipe), sweep.overrides)
    check(sweep, base, path)
    return sweep, base


def base_path(path: Path, recipe: str) -> Path:
    """Return the recipe of the sweep in the file `path`: a file relative to it wins over a name of radhpc's recipes."""
    if not (path.parent / recipe).exists() and recipe in resources.recipe_names():
        return resources.recipes() / f"{recipe}.yaml"
    return path.parent / recipe


def check(sweep: Sweep, base: Recipe, path: Path) -> list[Recipe]:
    """Return the recipes at the corners of the space; of a space of more than 1000 corners, those along each axis.

    Raises UserError for a key that no recipe has and for values that do not fit together.
    """
    data = base.model_dump(mode="json")
    for key in sweep.space:
        _refuse_new_free_key(data, key, path)
    recipes_at_corners = []
    for parameters in corners(sweep):
        overrides = [f"{key}={_yaml(sweep.space[key].original_value(value))}" for key, value in parameters.items()]
        where = f"{path}: space: {', '.join(overrides)}"
        try:
            recipe = recipes.build(copy.deepcopy(data), overrides, Path(where))
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(where) else f"{path}: space: {error}") from error
        if recipe.evaluation.split == "test":
            raise UserError(f"{path}: evaluation.split: a sweep chooses by studies that are not the test's: validate")
        if sweep.pruner is not None and recipe.evaluation.every is None:
            raise UserError(
                f"{path}: pruner: trials are compared where they are evaluated; "
                f"add 'evaluation.every={sweep.pruner.min_steps}' to overrides"
            )
        recipes_at_corners.append(recipe)
    return recipes_at_corners


def distinct_data(sweep: Sweep, base: Recipe, path: Path) -> list[Recipe]:
    """Return one recipe of the corners for each set of data, weights and split that a trial may need."""
    by_data = {
        repr(
            [recipe.evaluation.split, recipe.model.weights, *(recipe.shards_of(stage) for stage in recipe.stages)]
        ): recipe
        for recipe in check(sweep, base, path)
    }
    return list(by_data.values())


def corners(sweep: Sweep) -> list[dict[str, Scalar]]:
    axes = {key: axis.corners() for key, axis in sweep.space.items()}
    if math.prod(map(len, axes.values())) <= CORNERS:
        return [dict(zip(axes, corner, strict=True)) for corner in itertools.product(*axes.values())]
    return [{key: value} for key, values in axes.items() for value in values]


def _refuse_new_free_key(data: dict[str, Any], key: str, path: Path) -> None:
    """Raise UserError for a misspelt key in model.config, whose keys are transformers': it would pass as a new one."""
    parts = key.split(".")
    if parts[:2] != ["model", "config"]:
        return
    here: Any = data
    for part in parts:
        if not isinstance(here, dict) or part not in here:
            known = list(here) if isinstance(here, dict) else []
            raise UserError(f"{path}: space: {key}: the recipe has no '{part}' there{nearest(part, known)}")
        here = here[part]


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _leaves(section: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return a section's values by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in section.items():
        leaves |= _leaves(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return leaves


def _kept(value: Any) -> Scalar:
    """Return a value as a study keeps it: plain ones as they are, lists and mappings as JSON."""
    return value if _plain(value) or value is None else json.dumps(value)


def _yaml(value: Any) -> str:
    """Return one line of YAML that reads as this value: JSON's 1e-05 would be read as a text."""
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]
