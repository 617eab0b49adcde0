"""List every key of a recipe with its type, default and meaning, read from the sections' own definitions.

keys()[0]   # {"key": "name", "type": "text", "default": "required", "meaning": "the name of the run; ..."}
"""

import inspect
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from radhpc.core.recipe import Recipe


def keys(section: type[BaseModel] = Recipe) -> list[dict[str, Any]]:
    """Return all keys in the order of the definitions; those of a section or of a list's items follow its own key."""
    return list(_walk(section, ""))


def _walk(section: type[BaseModel], prefix: str) -> list[dict[str, Any]]:
    rows = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        sections = _sections(field.annotation)
        rows.append(
            {
                "key": key,
                "type": type_name(field.annotation),
                "default": _default(field),
                "meaning": field.description or "; ".join(map(_summary, sections)),
            }
        )
        for inner in sections:
            rows += _walk(inner, f"{key}.")
    return rows


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a type is made of: its own, those of its items and of its alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _summary(section: type[BaseModel]) -> str:
    """Return the first paragraph of a section's docstring as a meaning: one line without its full stop."""
    return " ".join(inspect.getdoc(section).split("\n\n")[0].split()).removesuffix(".")  # type: ignore[union-attr]


def type_name(annotation: Any) -> str:
    """Return the words for a type: "whole number or null", "list of section"."""
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(argument) for argument in arguments))
    if origin is not None and hasattr(annotation, "__metadata__"):
        return type_name(arguments[0])
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is dict or getattr(origin, "__name__", "") == "Mapping":
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    name = getattr(annotation, "__name__", str(annotation))
    return {"str": "text", "bool": "true or false", "float": "number", "int": "whole number", "Any": "any value"}.get(
        name, name
    )


def _default(field: FieldInfo) -> str:
    """Return the default as YAML would write it; "required", or of a section "as below"."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "as below"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(list(value)) if isinstance(value, tuple | list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
