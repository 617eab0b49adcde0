"""Every key of a recipe as a flat list, read from the sections' own definitions.

keys()[0]   # {"key": "name", "type": "str", "default": "required", "meaning": "of the run ..."}
"""

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from radhpc.core.recipe import Recipe


def keys() -> list[dict[str, Any]]:
    """All keys in the order of the definitions; those of a list's items stand below the list's own key."""
    return list(_walk(Recipe, ""))


def _walk(section: type[BaseModel], prefix: str) -> list[dict[str, Any]]:
    rows = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        rows.append(
            {
                "key": key,
                "type": type_name(field.annotation),
                "default": _default(field),
                "meaning": field.description or "",
            }
        )
        for inner in _sections(field.annotation):
            rows += _walk(inner, f"{key}.")
    return rows


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type is made of: its own, those of its items and of its alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def type_name(annotation: Any) -> str:
    """A type as the reference prints it."""
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
    return {"str": "text", "bool": "true or false", "float": "number", "int": "whole number"}.get(
        getattr(annotation, "__name__", str(annotation)), getattr(annotation, "__name__", str(annotation))
    )


def _default(field: FieldInfo) -> str:
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
