"""Define the sections around the training: checkpoints, the board, the engine's own settings."""

import re
from typing import Literal

from pydantic import Field, field_validator

from radhpc.core.recipe.section import Section


class CheckpointSettings(Section):
    """Checkpoints: their interval and how many are kept; the last one of each stage is always kept."""

    every: int = Field(100, ge=1, description="steps between two checkpoints")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")
    asynchronous: bool = Field(True, description="written in the background: steps wait for the copy alone")
    url: str | None = Field(
        None, description="an object store's prefix, such as s3://bucket/checkpoints; default: the run folder"
    )

    @field_validator("url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"[a-z0-9]+://.", value):
            raise ValueError(f"checkpoint.url '{value}': allowed are URLs such as s3://bucket/prefix, or null")
        return value


class WandbSettings(Section):
    """Weights & Biases beside TensorBoard: curves alone, no texts, images, code or names of machines."""

    project: str = Field("radhpc", min_length=1, description="the project in Weights & Biases")
    mode: Literal["offline", "online"] = Field(
        "offline", description="offline: files in RUN/wandb, which 'wandb sync' sends; online: sent as they come"
    )


class BoardSettings(Section):
    """TensorBoard."""

    every: int = Field(1, ge=1, description="steps between two points of a curve")
    wandb: WandbSettings | None = Field(None, description="these curves for Weights & Biases, too; needs radhpc[wandb]")


class ZeroSettings(Section):
    """Engine deepspeed (Rajbhandari et al., 2020, ZeRO): what is cut into parts, and where they are kept."""

    stage: Literal[2, 3] = Field(
        3, description="2: gradients and moments, each rank holding the model; 3: the model too"
    )
    offload: bool = Field(False, description="moments and float32 parameters on the host, and the step there, too")
