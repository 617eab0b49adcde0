"""Turn YAML and `key=value` into a validated section, or into one line that says what is wrong."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from radhpc.core.errors import UserError, first_line, nearest

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping. Raises UserError if there is none, or if a key is given twice."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) or (f"; beside it are {', '.join(sorted(siblings))}" if siblings else "")
        raise UserError(f"{path}: no such file{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a mapping of keys to values is wanted, not {type(data).__name__}")
    return data


class _UniqueKeyLoader(yaml.SafeLoader):
    """A loader that refuses a key given twice, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def validate(model: type[AnyModel], data: Any, path: Path) -> AnyModel:
    """Turn pydantic's errors into one line: file, key, value, what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        value = problem["input"]
        input_value = "" if isinstance(value, dict | list) or problem["type"] == "missing" else f" (given: {value!r})"
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise UserError(f"{path}: {where + ': ' if where else ''}{message}{input_value}{more}") from error


def override(section: AnyModel, overrides: Sequence[str], name: str) -> AnyModel:
    """Return a section with changes such as `beams=3` or `evaluation.beams=3`. Raises UserError."""
    data = section.model_dump(mode="json")
    for change in overrides:
        apply(data, change.removeprefix(f"{name}."))
    return validate(type(section), data, Path(name))


def apply(data: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in place; a stage is named by its name or its position, the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override '{override}': allowed is key=value, such as stages.0.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML") from error
    *parents, last = path.split(".")
    container: Any = data
    for part in parents:
        if isinstance(container, list):
            container = container[_position(container, part, override)]
        elif isinstance(container, dict):
            if container.get(part) is None:
                container[part] = {}
            container = container[part]
    if isinstance(container, list):
        container[_position(container, last, override)] = value
    elif isinstance(container, dict):
        container[last] = value
    else:
        raise UserError(f"override '{override}': '{'.'.join(parents)}' is a plain value, it has no '{last}'")


def _position(items: list[Any], part: str, override: str) -> int:
    names = [str(item.get("name")) if isinstance(item, dict) else "" for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise UserError(
        f"override '{override}': no '{part}' there; allowed are 0 to {len(items) - 1} and {', '.join(names)}"
    )
