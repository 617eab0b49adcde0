"""Define the base of all sections of a recipe: immutable, and without unknown keys."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from radhpc.core.errors import nearest

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Shards = tuple[str, ...] | dict[str, Weight]


class Section(BaseModel):
    """A part of the recipe: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    allowed = ", ".join(cls.model_fields)
                    raise ValueError(f"unknown key '{key}'{nearest(str(key), cls.model_fields)}; allowed are {allowed}")
        return data


def check_regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return value
