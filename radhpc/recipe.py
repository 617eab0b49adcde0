"""What to train: a YAML file, validated before anything is submitted.

defaults < the file < `key=value` overrides. Unknown keys are refused with the nearest known one, and the merged
recipe is frozen into the run folder, so that a run never depends on a file that may change. Example:

    recipe = load(Path("recipes/quickstart.yaml"), ["stages.scratch.steps=20", "seed=1"])
    recipe.stages[0].optimizer.learning_rate
"""

import hashlib
import json
import os
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from radhpc.errors import UserError, first_line, nearest
from radhpc.sample import Split

AnyModel = TypeVar("AnyModel", bound=BaseModel)
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


class Tokenizer(Section):
    """Where the tokenizer comes from: a folder, or trained on the reports of the training split."""

    folder: str | None = Field(None, description="local folder with a fast tokenizer; default: the weights' folder")
    train_vocabulary: int | None = Field(
        None, ge=300, description="train a byte-pair tokenizer of this many entries on the training reports"
    )


class Model(Section):
    """The model: local weights, or random ones from a configuration."""

    family: Literal["mllama"] = Field("mllama", description="which of radhpc.models builds it")
    weights: str | None = Field(None, description="local folder as transformers saves it; nothing is downloaded")
    config: dict[str, Any] | None = Field(
        None, description="instead of weights: keys of transformers' configuration, text and vision apart"
    )
    gates: float | None = Field(
        None,
        description="with config: initial value of Mllama's cross-attention and vision gates; the class starts "
        "them at zero, so that a random model would never see the image",
    )
    positions: float | None = Field(
        None,
        gt=0,
        description="with config: standard deviation of the initial vision position embeddings; the class starts them "
        "at 0.02 beside patches of about 0.5, so that a random model hardly knows where in the image it looks",
    )
    tokenizer: Tokenizer = Tokenizer()  # type: ignore[call-arg]
    attention: Literal["auto", "segments", "sdpa", "eager"] = Field(
        "auto",
        description="segments: without masks, by the fastest kernel there (radhpc/attention.py); sdpa and eager are "
        "transformers'; auto: segments for Mllama, else sdpa",
    )
    skip_empty_tiles: bool = Field(
        False,
        description="of Mllama: compute the tiles that an image fills, not always all four; the result is not the "
        "pretrained model's (README), and an image of one tile costs a quarter",
    )
    checkpoint_activations: bool | tuple[Literal["text", "cross", "vision"], ...] = Field(
        False,
        description="recompute the activations of each layer in the backward pass: of all of them, or of these kinds",
    )
    compile: bool = Field(
        False, description="torch.compile for each layer; what was compiled is kept in the run folder for the next life"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        if (self.weights is None) == (self.config is None):
            raise ValueError("give either 'weights' (a local folder) or 'config' (random weights)")
        if self.weights is not None and self.tokenizer.train_vocabulary is not None:
            raise ValueError("'tokenizer.train_vocabulary' goes with 'config': trained weights have their tokenizer")
        if self.config is not None and (self.tokenizer.folder is None) == (self.tokenizer.train_vocabulary is None):
            raise ValueError("with 'config' give either 'tokenizer.folder' or 'tokenizer.train_vocabulary'")
        if self.skip_empty_tiles and (self.family != "mllama" or self.attention not in ("auto", "segments")):
            raise ValueError("'skip_empty_tiles' goes with family mllama and attention auto or segments")
        if self.weights is not None and (self.gates is not None or self.positions is not None):
            raise ValueError("'gates' and 'positions' go with 'config': trained weights have theirs")
        return self


class Text(Section):
    """What the model is asked and what it shall answer."""

    prompt: str = Field("Write the report of this chest radiograph.", description="for studies without a question")
    sections: tuple[Literal["findings", "impression", "other"], ...] = Field(
        ("findings", "impression", "other"),
        min_length=1,
        description="sections of the report that are learnt, in order",
    )
    max_tokens: int = Field(
        512, ge=8, description="longest prompt and answer together; longer answers are cut, and counted"
    )


class Images(Section):
    """Which views of a study the model sees, in training, evaluation and generation alike."""

    views: int | None = Field(
        None,
        ge=1,
        description="of a study at most, the first ones in the archive's order; default: all, and four if stitched",
    )
    stitch: bool = Field(False, description="put them side by side, as one picture")
    gap: int = Field(10, ge=0, description="black pixels between stitched views")

    @model_validator(mode="after")
    def _gap_goes_with_stitch(self) -> "Images":
        if not self.stitch and self.gap != Images.model_fields["gap"].default:
            raise ValueError(f"'gap' {self.gap} goes with 'stitch: true'")
        return self

    @property
    def limit(self) -> int | None:
        """Views of a study at most; None: all."""
        return self.views or (4 if self.stitch else None)


class Cache(Section):
    """A folder of the node that keeps what came over the network, for all its ranks and for later runs."""

    folder: str = Field(description="on the node's own disk; $NAME and ~ are expanded on the node")
    gigabytes: float = Field(gt=0, description="that the folder may hold, shared with other jobs that use it")
    folders: bool = Field(False, description="also for shards in a folder behind a network file system")


class Stream(Section):
    """How samples are ordered and read."""

    window: int | None = Field(
        64,
        ge=1,
        description="shards that are mixed at a time, so that a store is read in long runs; null: the whole dataset",
    )
    temperature: float | None = Field(
        None, gt=0, description="draw each dataset of `shards` as often as its number of samples ** (1 / temperature)"
    )
    threads: int = Field(2, ge=1, description="decoding threads per rank")
    prefetch: int = Field(4, ge=1, description="steps that are decoded ahead")
    prefetch_megabytes: int = Field(
        256, ge=16, description="per rank, that are read ahead and held before decoding, if the shards are not local"
    )
    requests: int = Field(64, ge=1, description="to a store at a time, from all ranks of a node together")
    cache: Cache | None = None
    max_bad_samples: int = Field(0, ge=0, description="unreadable samples in the whole run, above which it stops")
    audit: bool = Field(True, description="append the key of every sample trained on to the run's ledger")


class Lora(Section):
    """Low-rank adapters (Hu et al., 2021): W + alpha / rank * B A."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str = Field(description="regular expression that matches the whole name of the linear layers to adapt")

    @field_validator("targets")
    @classmethod
    def _regex(cls, value: str) -> str:
        return _check_regex(value)


class Group(Section):
    """Parameters with a learning rate of their own."""

    match: str = Field(description="regular expression found in the parameter's name")
    scale: float = Field(ge=0, description="times the stage's learning rate")

    @field_validator("match")
    @classmethod
    def _regex(cls, value: str) -> str:
        return _check_regex(value)


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter, 2019) and its schedule."""

    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0, description="for matrices; biases, norms and gates have none")
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0, description="linear from zero")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    final: float = Field(0.0, ge=0, le=1, description="of the learning rate that is left at the stage's end")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm over all trained parameters")
    groups: tuple[Group, ...] = ()


class Stage(Section):
    """One stage: what is trained, on what, for how long."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    shards: Shards | None = Field(None, description="other shards than the recipe's")
    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch: int = Field(ge=1, description="samples per optimizer step over all ranks, whatever their number")
    micro_batch: int | None = Field(
        None, ge=1, description="samples per rank and forward pass; default: all of the rank's"
    )
    train: tuple[str, ...] = Field((), description="regular expressions: base parameters that are trained whole")
    lora: Lora | None = None
    adapters: Literal["grow", "keep", "merge"] | None = Field(
        None,
        description="what becomes of the adapters of the stage before: grown to this stage's rank, kept at their "
        "rank, or merged into the base",
    )
    optimizer: Optimizer

    @field_validator("train")
    @classmethod
    def _regexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_check_regex, value))

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"stage '{self.name}': give either 'steps' or 'epochs'")
        if not self.train and self.lora is None:
            raise ValueError(f"stage '{self.name}': nothing to train; give 'train', 'lora' or both")
        if self.adapters in ("grow", "keep") and self.lora is None:
            raise ValueError(f"stage '{self.name}': adapters '{self.adapters}' needs 'lora'")
        return self


class Checkpoint(Section):
    """When checkpoints are written and how many are kept; the last one of each stage is always kept."""

    every: int = Field(100, ge=1, description="steps")
    keep: int = Field(2, ge=1)
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


class Evaluation(Section):
    """Generation on held-out studies, at the end of each stage and every so many steps."""

    every: int | None = Field(None, ge=1, description="steps; default: at the end of a stage alone")
    split: Split = "validate"
    samples: int | None = Field(64, ge=1, description="of the split, always the same ones; null: all")
    batch: int = Field(16, ge=1, description="studies per rank and generation")
    max_new_tokens: int = Field(128, ge=1)
    images: int = Field(4, ge=0, description="studies shown in TensorBoard with reference and generated report")


class Board(Section):
    """TensorBoard."""

    every: int = Field(1, ge=1, description="steps between two points of a curve")


class Recipe(Section):
    """The whole recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    seed: int = Field(0, ge=0)
    engine: Literal["fsdp", "single"] = Field("fsdp", description="fsdp: FSDP2 over all ranks; single: one process")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the computation; trained parameters stay fp32")
    model: Model
    shards: Shards = Field(
        min_length=1,
        description="folders or URLs with a manifest.json; DIR#balanced: the subset of them that balanced.json names. "
        "A list is one dataset; a mapping gives each a weight: how often it is drawn, with epochs of its own",
    )
    stream: Stream = Stream()  # type: ignore[call-arg]
    text: Text = Text()  # type: ignore[call-arg]
    images: Images = Images()  # type: ignore[call-arg]
    stages: tuple[Stage, ...] = Field(min_length=1)
    checkpoint: Checkpoint = Checkpoint()  # type: ignore[call-arg]
    evaluation: Evaluation = Evaluation()  # type: ignore[call-arg]
    board: Board = Board()  # type: ignore[call-arg]

    def shards_of(self, stage: Stage) -> Shards:
        """What a stage is trained on."""
        return stage.shards or self.shards

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
    def _stages_join(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ: {', '.join(names)}")
        before: Lora | None = None
        for stage in self.stages:
            where = f"stage '{stage.name}'"
            if before is None and stage.adapters is not None:
                raise ValueError(f"{where}: adapters '{stage.adapters}', but no stage before it has any")
            if before is not None and stage.adapters is None:
                raise ValueError(f"{where}: a stage before it has adapters; say 'grow', 'keep' or 'merge'")
            if before is not None and stage.lora is not None and stage.adapters in ("grow", "keep"):
                if stage.lora.targets != before.targets:
                    raise ValueError(f"{where}: '{stage.adapters}' needs the same lora.targets as the stage before")
                if stage.adapters == "keep" and (stage.lora.rank, stage.lora.alpha) != (before.rank, before.alpha):
                    raise ValueError(
                        f"{where}: 'keep' needs rank {before.rank} and alpha {before.alpha}; or say 'grow'"
                    )
                if stage.lora.rank < before.rank:
                    raise ValueError(
                        f"{where}: lora.rank {stage.lora.rank} is below {before.rank}; ranks can only grow"
                    )
            before = stage.lora
        return self

    @property
    def hash(self) -> str:
        """Identity of the recipe, for checkpoints and to see that all ranks run the same."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110))


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe. Raises UserError with the key, its value and what is allowed."""
    return build(read_yaml(path), overrides, path)


def build(data: dict[str, Any], overrides: Sequence[str], path: Path) -> Recipe:
    """Override, in place, and validate what was read from `path`."""
    for override in overrides:
        _apply(data, override)
    recipe = validate(Recipe, data, path)
    return recipe.model_copy(
        update={
            "shards": _absolute_shards(recipe.shards),
            "stages": tuple(
                stage.model_copy(update={"shards": stage.shards and _absolute_shards(stage.shards)})
                for stage in recipe.stages
            ),
            "model": recipe.model.model_copy(
                update={
                    "weights": recipe.model.weights and _absolute(recipe.model.weights),
                    "tokenizer": recipe.model.tokenizer.model_copy(
                        update={"folder": recipe.model.tokenizer.folder and _absolute(recipe.model.tokenizer.folder)}
                    ),
                }
            ),
        }
    )


def validate(model: type[AnyModel], data: Any, path: Path) -> AnyModel:
    """Turn pydantic's errors into one line: file, key, value, what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        what = error.errors()[0]
        where = ".".join(map(str, what["loc"]))
        message = what["msg"].removeprefix("Value error, ")
        value = what["input"]
        given = "" if isinstance(value, dict | list) or what["type"] == "missing" else f" (given: {value!r})"
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise UserError(f"{path}: {where + ': ' if where else ''}{message}{given}{more}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping. Raises UserError where there is none; a key given twice is refused."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) or (f"; beside it are {', '.join(sorted(beside))}" if beside else "")
        raise UserError(f"{path}: no such file{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a mapping of keys to values is wanted, not {type(data).__name__}")
    return data


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply(data: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in place; a stage is named by its name or its position, the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override '{override}': allowed is key=value, such as stages.0.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML") from error
    *parents, last = path.split(".")
    here: Any = data
    for part in parents:
        if isinstance(here, list):
            here = here[_position(here, part, override)]
        elif isinstance(here, dict):
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
    if isinstance(here, list):
        here[_position(here, last, override)] = value
    elif isinstance(here, dict):
        here[last] = value
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


def _absolute(path: str) -> str:
    """Paths hold from any folder the job may run in; URLs stay."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _absolute_shards(shards: Shards) -> Shards:
    if isinstance(shards, dict):
        return {_absolute(url): weight for url, weight in shards.items()}
    return tuple(map(_absolute, shards))


def _check_regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return value
