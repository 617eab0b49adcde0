"""Define a stage: its trained parameters and adapters, its data, objective and optimizer."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from radhpc.core.recipe.section import Section, Shards, check_regex
from radhpc.core.recipe.text import ImageSettings, TextSettings


class LoraSettings(Section):
    """Low-rank adapters (Hu et al., 2021): W + alpha / rank * B A."""

    rank: int = Field(ge=1, description="columns of B and rows of A")
    alpha: float = Field(gt=0, description="the adapter is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the adapter's input")
    targets: str = Field(description="regular expression that matches the whole name of the linear layers to adapt")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="other ranks for some layers, by a regular expression that matches the end of a layer's name",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski, 2023) instead of alpha / rank")
    dora: bool = Field(False, description="learn each output's magnitude apart from its direction (Liu et al., 2024)")

    @field_validator("targets")
    @classmethod
    def _regex(cls, value: str) -> str:
        return check_regex(value)

    @field_validator("rank_pattern")
    @classmethod
    def _regexes(cls, value: dict[str, int]) -> dict[str, int]:
        return {check_regex(pattern): rank for pattern, rank in value.items()}

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer by its name, chosen as PEFT does: by the first pattern that the name ends with."""
        matches = (rank for pattern, rank in self.rank_pattern.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        return next(matches, self.rank)

    def scale(self, rank: int) -> float:
        """Return the factor of B A in a layer of this rank."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


class ParameterGroupSettings(Section):
    """Parameters with a learning rate of their own."""

    match: str = Field(description="regular expression found in the parameter's name")
    scale: float = Field(ge=0, description="times the stage's learning rate")

    @field_validator("match")
    @classmethod
    def _regex(cls, value: str) -> str:
        return check_regex(value)


class OptimizerSettings(Section):
    """AdamW (Loshchilov and Hutter, 2019) and its schedule."""

    kind: Literal["adamw", "adamw_8bit", "adamw_paged", "adamw_8bit_paged"] = Field(
        "adamw",
        description="adamw: PyTorch's, in one kernel; 8bit: moments in a quarter of the memory; paged: moments that go "
        "to the host where the GPU is full. The last three are bitsandbytes'; they go with engines fsdp and single",
    )
    learning_rate: float = Field(gt=0, description="the peak learning rate, after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="for matrices; biases, norms and gates have none")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay rates of the first and the second moment")
    epsilon: float = Field(1e-8, gt=0, description="added to the denominator of the update")
    warmup_steps: int = Field(0, ge=0, description="linear from zero")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="constant after the warm-up, or falling from the peak to `final`"
    )
    final: float = Field(0.0, ge=0, le=1, description="of the learning rate that is left at the stage's end")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm over all trained parameters")
    sharpness: float | None = Field(
        None,
        gt=0,
        description="sharpness-aware minimisation (Foret et al., 2021) with this rho: steps take twice as long",
    )
    groups: tuple[ParameterGroupSettings, ...] = Field(
        (), description="parameters with learning rates of their own; the first match counts"
    )


class ObjectiveSettings(Section):
    """The sum of terms that is minimised, each with its weight; objective.py defines them."""

    generation: float = Field(1.0, ge=0, description="cross-entropy of the supervised tokens")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")
    contrastive: float = Field(0.0, ge=0, description="InfoNCE of images and answers over the global batch")
    temperature: float = Field(0.07, gt=0, description="of InfoNCE")
    clinical: float = Field(0.0, ge=0, description="binary cross-entropy of the recipe's 'findings' from the images")
    fusion: float = Field(0.0, ge=0, description="of model.fusion's levels: unlike each other, evenly used, attentive")
    regularisation: float = Field(0.0, ge=0, description="of the adapters, the sum of the three that follow")
    l2: float = Field(1e-5, ge=0, description="times the norms of A and B")
    orthogonal: float = Field(1e-4, ge=0, description="times the norm of A A' - 1")
    l1: float = Field(1e-6, ge=0, description="times the absolute values in A")

    @model_validator(mode="after")
    def _something(self) -> "ObjectiveSettings":
        if not self.generation + self.contrastive + self.clinical:
            raise ValueError("nothing to learn: generation, contrastive and clinical are all 0")
        return self


class Stage(Section):
    """One stage: what is trained, on what, for how long."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_]*$", description="the name of the stage, as overrides and `--stages` use it"
    )
    shards: Shards | None = Field(None, description="other shards than the recipe's")
    text: TextSettings | None = Field(None, description="other prompts and tasks than the recipe's")
    images: ImageSettings | None = Field(None, description="another choice of views than the recipe's")
    steps: int | None = Field(None, ge=1, description="optimizer steps of the stage; give this or `epochs`")
    epochs: int | None = Field(None, ge=1, description="passes over the training split; give this or `steps`")
    batch: int = Field(ge=1, description="samples per optimizer step over all ranks, whatever their number")
    micro_batch: int | None = Field(
        None, ge=1, description="samples per rank and forward pass; default: all of the rank's"
    )
    train: tuple[str, ...] = Field((), description="regular expressions: base parameters that are trained whole")
    lora: LoraSettings | None = None
    adapters: Literal["grow", "keep", "merge", "new"] | None = Field(
        None,
        description="what becomes of the adapters of the stage before: grown to this stage's ranks and layers, kept as "
        "they are, merged into the base, or left behind for new ones",
    )
    objective: ObjectiveSettings = ObjectiveSettings()  # type: ignore[call-arg]
    optimizer: OptimizerSettings

    @field_validator("train")
    @classmethod
    def _regexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_regex, value))

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"stage '{self.name}': give either 'steps' or 'epochs'")
        if not self.train and self.lora is None:
            raise ValueError(f"stage '{self.name}': nothing to train; give 'train', 'lora' or both")
        if self.adapters in ("grow", "keep") and self.lora is None:
            raise ValueError(f"stage '{self.name}': adapters '{self.adapters}' needs 'lora'")
        return self
