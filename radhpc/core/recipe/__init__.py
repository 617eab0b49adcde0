"""Read the recipe of a run: a YAML file, validated before anything is submitted.

defaults < the file < `key=value` overrides. Unknown keys are refused with the nearest known one, and the merged
recipe is frozen into the run folder, so that a run never depends on a file that may change. Example:

    recipe = load(Path("recipes/quickstart.yaml"), ["stages.scratch.steps=20", "seed=1"])
    recipe.stages[0].optimizer.learning_rate
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from radhpc.core import resources
from radhpc.core.errors import UserError
from radhpc.core.recipe.evaluation import EvaluationSettings
from radhpc.core.recipe.job import BoardSettings, CheckpointSettings, WandbSettings, ZeroSettings
from radhpc.core.recipe.model import ConnectorSettings, ModelSettings
from radhpc.core.recipe.paths import HUB, absolute, absolute_shards, absolute_weights
from radhpc.core.recipe.reading import apply, override, read_yaml, validate
from radhpc.core.recipe.section import Section, Shards
from radhpc.core.recipe.stage import LoraSettings, ObjectiveSettings, OptimizerSettings, Stage
from radhpc.core.recipe.stream import CacheSettings, StreamSettings
from radhpc.core.recipe.text import FindingsSettings, ImageSettings, TaskSettings, TextSettings

__all__ = [
    "CacheSettings",
    "ConnectorSettings",
    "EvaluationSettings",
    "FindingsSettings",
    "HUB",
    "ImageSettings",
    "LoraSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "Recipe",
    "Section",
    "Shards",
    "Stage",
    "StreamSettings",
    "TaskSettings",
    "TextSettings",
    "WandbSettings",
    "build",
    "load",
    "override",
    "read_yaml",
    "validate",
]


class Recipe(Section):
    """The complete recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="the name of the run; its folder is runs/NAME-DATE")
    seed: int = Field(
        0, ge=0, description="the order of samples, the initial weights, dropout and the choice of tasks follow from it"
    )
    engine: Literal["fsdp", "deepspeed", "single"] = Field(
        "fsdp", description="fsdp: FSDP2 over all ranks; deepspeed: ZeRO over all ranks; single: one process"
    )
    replicate: bool = Field(
        False, description="of engine fsdp: the whole model on each rank; good where it fits and little is trained"
    )
    zero: ZeroSettings = ZeroSettings()  # type: ignore[call-arg]
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the computation and the frozen parameters; trained ones stay fp32. fp16 is for a T4"
    )
    model: ModelSettings
    shards: Shards = Field(
        min_length=1,
        description="folders or URLs with a manifest.json; DIR#balanced: the subset of them that balanced.json names. "
        "A list is one dataset; a mapping gives each a weight: how often it is drawn, with epochs of its own",
    )
    stream: StreamSettings = StreamSettings()  # type: ignore[call-arg]
    text: TextSettings = TextSettings()  # type: ignore[call-arg]
    findings: FindingsSettings = FindingsSettings()  # type: ignore[call-arg]
    images: ImageSettings = ImageSettings()  # type: ignore[call-arg]
    stages: tuple[Stage, ...] = Field(
        min_length=1, description="the stages of the training, in order; each starts where the one before it has ended"
    )
    checkpoint: CheckpointSettings = CheckpointSettings()  # type: ignore[call-arg]
    evaluation: EvaluationSettings = EvaluationSettings()  # type: ignore[call-arg]
    board: BoardSettings = BoardSettings()  # type: ignore[call-arg]

    def shards_of(self, stage: Stage) -> Shards:
        """Return the shards that a stage is trained on."""
        return stage.shards or self.shards

    def text_of(self, stage: Stage) -> TextSettings:
        """Return the prompts and tasks of a stage."""
        return stage.text or self.text

    def images_of(self, stage: Stage) -> ImageSettings:
        """Return the choice of views of a stage."""
        return stage.images or self.images

    @property
    def heads(self) -> bool:
        """Return whether any stage needs the heads of extra_modules.py, which then belong to the model everywhere."""
        return any(stage.objective.contrastive or stage.objective.clinical for stage in self.stages)

    @model_validator(mode="after")
    def _terms_have_what_they_need(self) -> "Recipe":
        for stage in self.stages:
            where, terms = f"stage '{stage.name}'", stage.objective
            if terms.fusion and self.model.fusion is None:
                raise ValueError(f"{where}: objective.fusion {terms.fusion} needs model.fusion")
            if terms.regularisation and stage.lora is None:
                raise ValueError(
                    f"{where}: objective.regularisation {terms.regularisation} is of adapters; give 'lora'"
                )
            for name, task in self.text_of(stage).tasks.items():
                for finding in task.findings or ():
                    if finding not in self.findings.names:
                        allowed = ", ".join(self.findings.names)
                        raise ValueError(f"{where}: text.tasks.{name}: finding '{finding}': allowed are {allowed}")
        if self.model.fusion is not None and self.model.family != "mllama":
            raise ValueError(f"model.fusion: family '{self.model.family}' has no levels; allowed is mllama")
        return self

    @model_validator(mode="after")
    def _mixtures(self) -> "Recipe":
        for stage in self.stages:
            shards, where = self.shards_of(stage), f"stage '{stage.name}'"
            if isinstance(shards, dict) and self.stream.temperature is not None:
                raise ValueError(f"{where}: its shards have weights; stream.temperature goes with a list")
            if stage.epochs is not None and (isinstance(shards, dict) or self.stream.temperature is not None):
                raise ValueError(
                    f"{where}: weighted datasets have epochs of their own; say 'steps' instead of 'epochs'"
                )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> "Recipe":
        for stage in self.stages:
            where = f"stage '{stage.name}'"
            if self.engine == "deepspeed" and stage.optimizer.kind != "adamw":
                raise ValueError(f"{where}: optimizer.kind '{stage.optimizer.kind}' goes with engines fsdp and single")
            if self.engine == "deepspeed" and (stage.optimizer.sharpness is not None or stage.objective.regularisation):
                key = "objective.regularisation" if stage.objective.regularisation else "optimizer.sharpness"
                raise ValueError(f"{where}: {key} goes with engines fsdp and single: ZeRO keeps gradients to itself")
            if self.model.quantise is not None and stage.lora is not None and stage.lora.dora:
                raise ValueError(
                    f"{where}: lora.dora with model.quantise '{self.model.quantise}': allowed is plain LoRA"
                )
            if self.model.quantise is not None and stage.adapters == "merge":
                raise ValueError(
                    f"{where}: adapters 'merge' with model.quantise '{self.model.quantise}': four bits cannot hold a "
                    "merged weight, the rounding is larger than what was learnt; allowed are 'grow' and 'keep'"
                )
        return self

    @model_validator(mode="after")
    def _stages_join(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ: {', '.join(names)}")
        before: LoraSettings | None = None
        for stage in self.stages:
            where = f"stage '{stage.name}'"
            if before is None and stage.adapters is not None:
                raise ValueError(f"{where}: adapters '{stage.adapters}', but no stage before it has any")
            if before is not None and stage.adapters is None:
                raise ValueError(f"{where}: a stage before it has adapters; say 'grow', 'keep', 'merge' or 'new'")
            if before is not None and stage.lora is not None and stage.adapters in ("grow", "keep"):
                if stage.adapters == "keep":
                    for key in ("rank", "alpha", "targets", "rank_pattern", "rslora", "dora"):
                        if getattr(stage.lora, key) != getattr(before, key):
                            raise ValueError(f"{where}: 'keep' needs lora.{key} {getattr(before, key)}; or say 'grow'")
                if before.dora and not stage.lora.dora:
                    raise ValueError(
                        f"{where}: magnitudes of DoRA cannot grow into plain LoRA; say 'merge', or dora: true"
                    )
                if not before.rank_pattern and not stage.lora.rank_pattern and stage.lora.rank < before.rank:
                    raise ValueError(
                        f"{where}: lora.rank {stage.lora.rank} is below {before.rank}; ranks can only grow"
                    )
            before = stage.lora
        return self

    def refuse_missing(self) -> None:
        """Raise UserError if a library that this recipe needs is not installed here."""
        kinds = [stage.optimizer.kind for stage in self.stages]
        eight = next((kind for kind in kinds if kind != "adamw"), None)
        for library, extra, needed, key in (
            ("deepspeed", "engines", self.engine == "deepspeed", "engine: deepspeed"),
            ("bitsandbytes", "engines", self.model.quantise is not None, f"model.quantise: {self.model.quantise}"),
            ("bitsandbytes", "engines", eight is not None, f"optimizer.kind: {eight}"),
            ("wandb", "wandb", self.board.wandb is not None, "board.wandb"),
        ):
            if needed and importlib.util.find_spec(library) is None:
                raise UserError(f"{key}: {library} is not installed; {resources.install_hint(extra)}")

    @property
    def hash(self) -> str:
        """Return the identity of the recipe, for checkpoints and to see that all ranks run the same. Not of its engine:
        a run may go on under another.
        """
        return hashlib.sha256(json.dumps(self.model_dump(exclude={"engine"}), sort_keys=True).encode()).hexdigest()

    def under(self, engine: str, path: Path) -> "Recipe":
        """Return the recipe under another engine. Raises UserError if that is unknown or cannot run the recipe."""
        return validate(Recipe, {**self.model_dump(), "engine": engine}, path)

    def to_yaml(self) -> str:
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110))


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe, given by its path or by the name of one that comes with radhpc.

    Raises UserError with the key, its value and what is allowed.
    """
    path = resources.find_recipe(path)
    return build(read_yaml(path), overrides, path)


def build(data: dict[str, Any], overrides: Sequence[str], path: Path) -> Recipe:
    """Override, in place, and validate what was read from `path`."""
    for change in overrides:
        apply(data, change)
    recipe = validate(Recipe, data, path)
    return recipe.model_copy(
        update={
            "shards": absolute_shards(recipe.shards),
            "stages": tuple(
                stage.model_copy(update={"shards": stage.shards and absolute_shards(stage.shards)})
                for stage in recipe.stages
            ),
            "model": recipe.model.model_copy(
                update={
                    "weights": absolute_weights(recipe.model.weights),
                    "tokenizer": recipe.model.tokenizer.model_copy(
                        update={"folder": recipe.model.tokenizer.folder and absolute(recipe.model.tokenizer.folder)}
                    ),
                }
            ),
        }
    )
