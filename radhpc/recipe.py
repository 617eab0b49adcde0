"""What to train: a YAML file, validated before anything is submitted.

defaults < the file < `key=value` overrides. Unknown keys are refused with the nearest known one, and the merged
recipe is frozen into the run folder, so that a run never depends on a file that may change. Example:

    recipe = load(Path("recipes/quickstart.yaml"), ["stages.scratch.steps=20", "seed=1"])
    recipe.stages[0].optimizer.learning_rate
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import string
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from radhpc.errors import UserError, first_line, nearest
from radhpc.sample import CHEXPERT, Split

AnyModel = TypeVar("AnyModel", bound=BaseModel)
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Shards = tuple[str, ...] | dict[str, Weight]

HUB = "hub:"  # before the id of a model on a hub


def families() -> list[str]:
    """The model families that there are: the files of radhpc/models that have a class Family."""
    folder = Path(__file__).parent / "models"
    return sorted(path.stem for path in folder.glob("*.py") if "\nclass Family" in path.read_text(encoding="utf-8"))


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


class Connector(Section):
    """What turns a picture's features into tokens of the language model, with family swin_qwen: models/connector.py."""

    kind: Literal["sasa", "abstractor", "linear"] = Field(
        "sasa",
        description="sasa: convolutions, then latents that query them (LightMedVLM); abstractor: convolutions around a "
        "pooling (Honeybee's C-Abstractor); linear: one token per feature",
    )
    latents: int = Field(64, ge=1, description="tokens per study; linear has as many as there are features")
    heads: int = Field(8, ge=1, description="of sasa's attention")
    dropout: float = Field(0.1, ge=0, lt=1, description="of sasa's attention")
    concepts: tuple[str, ...] = Field(
        CHEXPERT, description="sasa's first latents start from the language model's embeddings of these"
    )

    @model_validator(mode="after")
    def _fits(self) -> "Connector":
        if self.kind == "sasa" and len(self.concepts) > self.latents:
            raise ValueError(f"{len(self.concepts)} 'concepts' do not fit into {self.latents} 'latents'")
        if self.kind == "abstractor" and math.isqrt(self.latents) ** 2 != self.latents:
            raise ValueError(f"latents {self.latents}: an abstractor pools to a square, such as 64")
        return self


class Fusion(Section):
    """Hierarchical cross-modal fusion of the vision encoder's levels with the prompt: models/hcf.py."""

    width: int = Field(1024, ge=1, description="of each level")
    heads: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> "Fusion":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class Model(Section):
    """The model: local weights, or random ones from a configuration."""

    family: str = Field("mllama", description="which file of radhpc/models builds it")
    weights: str | dict[str, str] | None = Field(
        None,
        description="local folder as transformers saves it, or hub:OWNER/NAME, which 'launch.py weights --online' has "
        "fetched; of a model that is put together, one for each of its parts: {vision: ..., text: ...}",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="instead of weights, or for the parts that have none: keys of transformers' configuration, text "
        "and vision apart",
    )
    connector: Connector | None = Field(None, description="with family swin_qwen: what joins its parts; default: sasa")
    max_pixels: int | None = Field(
        None,
        ge=4096,
        description="with family qwen3_vl: of a view; a larger one is shrunk; default: as the weights' folder says",
    )
    chat_template: str | None = Field(
        None,
        description="in Jinja, as transformers' tokenizers have one; an image is '{{ image_token }}'; default: the "
        "model's own",
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
    quantise: Literal["nf4"] | None = Field(
        None, description="keep the frozen linear layers of the blocks in four bits, by bitsandbytes"
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
    fusion: Fusion | None = Field(None, description="added to the model; Mllama's vision encoder alone has the levels")

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        if both := sorted(self.folders.keys() & (self.config or {}).keys()):
            raise ValueError(f"'{both[0]}' has both 'weights' and 'config': give one of them")
        if (self.weights is None) == (self.config is None) and not isinstance(self.weights, dict):
            raise ValueError("give either 'weights' (a local folder) or 'config' (random weights)")
        trained_text = self.weights is not None and (isinstance(self.weights, str) or "text" in self.weights)
        if trained_text and self.tokenizer.train_vocabulary is not None:
            raise ValueError("'tokenizer.train_vocabulary' goes with 'config': trained weights have their tokenizer")
        if not trained_text and (self.tokenizer.folder is None) == (self.tokenizer.train_vocabulary is None):
            raise ValueError("with 'config' give either 'tokenizer.folder' or 'tokenizer.train_vocabulary'")
        if self.skip_empty_tiles and (self.family != "mllama" or self.attention not in ("auto", "segments")):
            raise ValueError("'skip_empty_tiles' goes with family mllama and attention auto or segments")
        if self.weights is not None and (self.gates is not None or self.positions is not None):
            raise ValueError("'gates' and 'positions' go with 'config': trained weights have theirs")
        return self

    @field_validator("family")
    @classmethod
    def _is_there(cls, value: str) -> str:
        """A new family is one file, and no list has to name it."""
        known = families()
        if value not in known:
            raise ValueError(f"no such family{nearest(value, known)}; allowed are {', '.join(known)}")
        return value

    @property
    def folders(self) -> dict[str, str]:
        """The weights by part; a model that lies in one folder is the part `model`."""
        if isinstance(self.weights, str):
            return {"model": self.weights}
        return dict(self.weights or {})

    @property
    def tokenizer_folder(self) -> str | None:
        """Where the tokenizer lies; None: it is trained on the reports."""
        return self.tokenizer.folder or self.folders.get("model") or self.folders.get("text")


PLACEHOLDERS = {
    "report": ("language", "sections"),
    "caption": ("language",),
    "question": ("language", "question", "answers"),
    "findings": ("language", "findings"),
    "finding": ("language", "finding", "answers"),
}


class Task(Section):
    """One thing that a study can teach, with its prompt; tasks.py says which studies can serve which."""

    kind: Literal["report", "caption", "question", "findings", "finding"] = Field(
        description="report: sections of the report; caption: text that belongs to no section; question: the data's "
        "own question and answer; findings: the names of all that is present; finding: yes or no to one of them"
    )
    prompt: str = Field(
        min_length=1,
        description="with {language} anywhere; {sections} of a report; {question}, {answers} of a question; "
        "{findings}; {finding}, {answers} of one finding",
    )
    weight: float = Field(1.0, gt=0, description="how often it is chosen among those that a study can serve")
    sections: tuple[Literal["findings", "impression", "other"], ...] | None = Field(
        None, min_length=1, description="report: those that are learnt, in order; default: findings, impression"
    )
    answers: tuple[str, ...] | None = Field(
        None, min_length=2, description="question: the closed set; finding: present, absent; default there: yes, no"
    )
    findings: tuple[str, ...] | None = Field(
        None, min_length=1, description="finding: asked about these alone, such as rare ones; default: all"
    )
    positive: float = Field(
        0.5, ge=0, le=1, description="finding: how often one that is present is asked about, if there is any"
    )
    nothing: str = Field("none", min_length=1, description="findings: the answer where nothing is present")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "Task":
        for key, kinds in _OF_KIND.items():
            if getattr(self, key) != Task.model_fields[key].default and self.kind not in kinds:
                raise ValueError(f"'{key}' goes with kind {' or '.join(kinds)}, not with '{self.kind}'")
        if self.kind == "finding" and self.answers is not None and len(self.answers) != 2:
            raise ValueError(f"answers {list(self.answers)}: two are wanted, for present and for absent")
        allowed = PLACEHOLDERS[self.kind]
        try:
            found = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]
        except ValueError as error:
            raise ValueError(
                f"prompt '{self.prompt}': {error}; a brace that is meant as one is written twice"
            ) from error
        for name in found:
            if name not in allowed:
                raise ValueError(f"prompt: unknown placeholder {{{name}}}; allowed are {', '.join(allowed)}")
        if self.kind in ("question", "finding") and self.kind not in found:
            raise ValueError(f"prompt '{self.prompt}': {{{self.kind}}} is missing, so that nothing would be asked")
        return self


_OF_KIND = {
    "sections": ("report",),
    "answers": ("question", "finding"),
    "findings": ("finding",),
    "positive": ("finding",),
    "nothing": ("findings",),
}


class Text(Section):
    """What the model is asked and what it shall answer."""

    prompt: str = Field("Write the report of this chest radiograph.", description="for studies without a question")
    sections: tuple[Literal["findings", "impression", "other"], ...] = Field(
        ("findings", "impression"),
        min_length=1,
        description="sections of the report that are learnt, in order; 'other' is what belongs to neither: captions, "
        "reports without headings, but also indications and comparisons",
    )
    tasks: dict[str, Task] = Field(
        default_factory=dict,
        description="instead of 'prompt' and 'sections': a mixture by name; the first that a study can serve is the "
        "one that it is evaluated by",
    )
    neighbours: int = Field(
        0,
        ge=0,
        le=8,
        description="reports of so many training studies that look alike stand before the prompt of a report: in "
        "training never one of the same patient",
    )
    max_tokens: int = Field(
        512, ge=8, description="longest prompt and answer together; longer answers are cut, and counted"
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Text":
        for key in ("prompt", "sections"):
            if self.tasks and getattr(self, key) != Text.model_fields[key].default:
                raise ValueError(f"'{key}' goes without 'tasks': each task has its own")
        if self.neighbours and not any(task.kind == "report" for task in self.mixture().values()):
            raise ValueError(f"'neighbours' {self.neighbours} stand before the prompt of a report: no task is a report")
        return self

    def mixture(self) -> dict[str, Task]:
        """The tasks, those that `prompt` and `sections` stand for where none are named."""
        if self.tasks:
            return self.tasks
        prompt = self.prompt.replace("{", "{{").replace("}", "}}").replace("{{language}}", "{language}")
        return {
            "question": Task(kind="question", prompt="{question}"),  # type: ignore[call-arg]
            "report": Task(kind="report", prompt=prompt, sections=self.sections),  # type: ignore[call-arg]
        }


class Findings(Section):
    """The findings that classification and questions about findings are made of."""

    vocabulary: str = Field("chexpert", description="which of a sample's labels count")
    names: tuple[str, ...] = Field(CHEXPERT, min_length=1, description="in the order of the multi-label head")
    uncertain: Literal["ignore", "present", "absent"] = Field("ignore", description="what the label -1 counts as")

    @model_validator(mode="after")
    def _names_of_the_vocabulary(self) -> "Findings":
        if self.vocabulary != "chexpert" and "names" not in self.model_fields_set:
            raise ValueError(f"vocabulary '{self.vocabulary}' needs 'names'; only chexpert's are known")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names must differ")
        return self


class Images(Section):
    """Which views of a study the model sees, in training, evaluation and generation alike."""

    views: int | None = Field(
        None,
        ge=1,
        description="of a study at most, the first ones in the archive's order; default: all, and four if stitched",
    )
    stitch: bool = Field(False, description="put them side by side, as one picture")
    gap: int = Field(10, ge=0, description="black pixels between stitched views")
    order: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="of projections as the archive names them, such as [PA, AP, LATERAL, LL, L]: these first, the rest "
        "behind; default: the archive's order, which builders make PA, AP, lateral ones, the rest",
    )

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
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="other ranks for some layers, by a regular expression that matches the end of a layer's name",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski, 2023) instead of alpha / rank")
    dora: bool = Field(False, description="learn each output's magnitude apart from its direction (Liu et al., 2024)")

    @field_validator("targets")
    @classmethod
    def _regex(cls, value: str) -> str:
        return _check_regex(value)

    @field_validator("rank_pattern")
    @classmethod
    def _regexes(cls, value: dict[str, int]) -> dict[str, int]:
        return {_check_regex(pattern): rank for pattern, rank in value.items()}

    def rank_of(self, layer: str) -> int:
        """The rank of a layer by its name: as PEFT chooses it, by the first pattern that the name ends with."""
        found = (rank for pattern, rank in self.rank_pattern.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        return next(found, self.rank)

    def scale(self, rank: int) -> float:
        """What B A is multiplied by in a layer of this rank."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


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

    kind: Literal["adamw", "adamw_fused", "adamw_8bit", "adamw_paged", "adamw_8bit_paged"] = Field(
        "adamw",
        description="fused: one kernel per step; 8bit: moments in a quarter of the memory; paged: moments that go to "
        "the host where the GPU is full. The last three are bitsandbytes'; they go with engines fsdp and single",
    )
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0, description="for matrices; biases, norms and gates have none")
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0, description="linear from zero")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    final: float = Field(0.0, ge=0, le=1, description="of the learning rate that is left at the stage's end")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm over all trained parameters")
    sharpness: float | None = Field(
        None,
        gt=0,
        description="sharpness-aware minimisation (Foret et al., 2021) with this rho: steps take twice as long",
    )
    groups: tuple[Group, ...] = ()


class Objective(Section):
    """What is minimised: a sum of terms, each with its weight; objective.py defines them."""

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
    def _something(self) -> "Objective":
        if not self.generation + self.contrastive + self.clinical:
            raise ValueError("nothing to learn: generation, contrastive and clinical are all 0")
        return self


class Stage(Section):
    """One stage: what is trained, on what, for how long."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    shards: Shards | None = Field(None, description="other shards than the recipe's")
    text: Text | None = Field(None, description="other prompts and tasks than the recipe's")
    images: Images | None = Field(None, description="another choice of views than the recipe's")
    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch: int = Field(ge=1, description="samples per optimizer step over all ranks, whatever their number")
    micro_batch: int | None = Field(
        None, ge=1, description="samples per rank and forward pass; default: all of the rank's"
    )
    train: tuple[str, ...] = Field((), description="regular expressions: base parameters that are trained whole")
    lora: Lora | None = None
    adapters: Literal["grow", "keep", "merge", "new"] | None = Field(
        None,
        description="what becomes of the adapters of the stage before: grown to this stage's ranks and layers, kept as "
        "they are, merged into the base, or left behind for new ones",
    )
    objective: Objective = Objective()  # type: ignore[call-arg]
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


class Scorers(Section):
    """Models that judge reports, from folders on this machine; a score without its weights is left out, and says so.

    {sha256: ...} holds what the weights must be: the sum over the folder's weight files, as scores.json gives it.
    """

    chexbert: str | None = Field(None, description="chexbert.pth, and vocab.txt of bert-base-uncased")
    bertscore: str | None = Field(
        None, description="distilbert-base-uncased as transformers saves it, baseline.tsv too"
    )
    clinicalbert: str | None = Field(None, description="Bio_ClinicalBERT as transformers saves it")
    radgraph: str | None = Field(None, description="radgraph-xl/ and hub/, for the package radeval")
    radcliq: str | None = Field(None, description="hub/ with its three models, for the package radeval")
    ratescore: str | None = Field(None, description="hub/ with its two models, for the package radeval")
    green: str | None = Field(None, description="GREEN-radllama2-7b, for the package radeval")
    sha256: dict[str, str] = Field(default_factory=dict, description="by name: what the weights must be")

    @model_validator(mode="after")
    def _hashes_of_folders(self) -> "Scorers":
        for name in self.sha256:
            if name not in self.folders():
                raise ValueError(f"sha256.{name}: allowed are those that have a folder: {', '.join(self.folders())}")
        return self

    def folders(self) -> dict[str, str]:
        """By name, as absolute paths."""
        names = [name for name in type(self).model_fields if name != "sha256"]
        return {name: _absolute(folder) for name in names if (folder := getattr(self, name)) is not None}


Conventions = Literal[
    "r2gen_iu", "r2gen_mimic", "r2gengpt", "coco_ptb", "radeval_raw", "sacrebleu_13a", "sacrebleu_13a_lower"
]


class Evaluation(Section):
    """Generation on held-out studies, at the end of each stage and every so many steps."""

    every: int | None = Field(None, ge=1, description="steps; default: at the end of a stage alone")
    split: Split = "validate"
    samples: int | None = Field(64, ge=1, description="of the split, always the same ones; null: all")
    batch: int = Field(16, ge=1, description="studies per rank and generation")
    max_new_tokens: int = Field(128, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    beams: int = Field(1, ge=1, description="texts that are searched at a time; 1: the likeliest next word")
    temperature: float | None = Field(None, gt=0, description="sample instead, from the distribution at this one")
    top_p: float | None = Field(None, gt=0, le=1, description="sample among the likeliest words of this share")
    repetition_penalty: float | None = Field(None, gt=0, description="above 1: words that are there already, less")
    length_penalty: float | None = Field(None, description="of beams; above 0: longer texts, more")
    cache: Literal["dynamic", "static"] = Field(
        "dynamic", description="keys and values of generation; static: one shape throughout, for compiled models"
    )
    conventions: tuple[Conventions, ...] = Field(
        ("r2gen_mimic", "radeval_raw"), description="how texts are compared while training; 'evaluate' uses all"
    )
    findings_question: str | None = Field(
        None, description="such as 'Is there {finding}? Answer yes or no.': AUROC from the likelihoods of yes and no"
    )
    findings_vocabulary: str = Field("chexpert", description="which of a sample's labels findings_question asks for")
    neighbours: int = Field(
        1024, ge=0, description="training studies among which the nearest one by its image is a baseline; 0: none"
    )
    scorers: Scorers = Scorers()  # type: ignore[call-arg]
    images: int = Field(4, ge=0, description="studies shown in TensorBoard with reference and generated report")

    @model_validator(mode="after")
    def _decoding(self) -> "Evaluation":
        if self.temperature is not None and self.beams > 1:
            raise ValueError(f"'temperature' {self.temperature:g} samples one text; it does not go with 'beams'")
        if self.top_p is not None and self.temperature is None:
            raise ValueError(f"'top_p' {self.top_p:g} goes with 'temperature', which samples")
        if self.length_penalty is not None and self.beams == 1:
            raise ValueError(f"'length_penalty' {self.length_penalty:g} goes with 'beams' above 1")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"'min_new_tokens' {self.min_new_tokens} is above 'max_new_tokens' {self.max_new_tokens}")
        if self.cache == "static" and self.beams > 1:
            raise ValueError("'cache: static' does not go with 'beams'")
        if self.findings_question is not None and "{finding}" not in self.findings_question:
            raise ValueError("'findings_question' must name {finding}")
        return self

    def decoding(self) -> dict[str, Any]:
        """The arguments of transformers' generate() that say how words are chosen."""
        names = ("temperature", "top_p", "repetition_penalty", "length_penalty")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        given |= {"num_beams": self.beams, "do_sample": self.temperature is not None}
        given |= {"min_new_tokens": self.min_new_tokens} if self.min_new_tokens else {}
        return given | ({"cache_implementation": "static"} if self.cache == "static" else {})


class Wandb(Section):
    """Weights & Biases beside TensorBoard: curves alone, no texts, images, code or names of machines."""

    project: str = Field("radhpc", min_length=1)
    mode: Literal["offline", "online"] = Field(
        "offline", description="offline: files in RUN/wandb, which 'wandb sync' sends; online: sent as they come"
    )


class Board(Section):
    """TensorBoard."""

    every: int = Field(1, ge=1, description="steps between two points of a curve")
    wandb: Wandb | None = Field(None, description="these curves for Weights & Biases, too; needs radhpc[wandb]")


class Zero(Section):
    """Engine deepspeed (Rajbhandari et al., 2020, ZeRO): what is cut into parts, and where they are kept."""

    stage: Literal[2, 3] = Field(
        3, description="2: gradients and moments, each rank holding the model; 3: the model too"
    )
    offload: bool = Field(False, description="moments and float32 parameters on the host, and the step there, too")


class Recipe(Section):
    """The whole recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    seed: int = Field(0, ge=0)
    engine: Literal["fsdp", "deepspeed", "single"] = Field(
        "fsdp", description="fsdp: FSDP2 over all ranks; deepspeed: ZeRO over all ranks; single: one process"
    )
    replicate: bool = Field(
        False, description="of engine fsdp: the whole model on each rank; good where it fits and little is trained"
    )
    zero: Zero = Zero()  # type: ignore[call-arg]
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the computation and the frozen parameters; trained ones stay fp32. fp16 is for a T4"
    )
    model: Model
    shards: Shards = Field(
        min_length=1,
        description="folders or URLs with a manifest.json; DIR#balanced: the subset of them that balanced.json names. "
        "A list is one dataset; a mapping gives each a weight: how often it is drawn, with epochs of its own",
    )
    stream: Stream = Stream()  # type: ignore[call-arg]
    text: Text = Text()  # type: ignore[call-arg]
    findings: Findings = Findings()  # type: ignore[call-arg]
    images: Images = Images()  # type: ignore[call-arg]
    stages: tuple[Stage, ...] = Field(min_length=1)
    checkpoint: Checkpoint = Checkpoint()  # type: ignore[call-arg]
    evaluation: Evaluation = Evaluation()  # type: ignore[call-arg]
    board: Board = Board()  # type: ignore[call-arg]

    def shards_of(self, stage: Stage) -> Shards:
        """What a stage is trained on."""
        return stage.shards or self.shards

    def text_of(self, stage: Stage) -> Text:
        """What is asked and answered in a stage."""
        return stage.text or self.text

    def images_of(self, stage: Stage) -> Images:
        """What is seen in a stage."""
        return stage.images or self.images

    @property
    def heads(self) -> bool:
        """Whether any stage needs the heads of additions.py, which then belong to the model in all of them."""
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
            if self.engine == "deepspeed" and stage.optimizer.kind not in ("adamw", "adamw_fused"):
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
        before: Lora | None = None
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
        """Raise UserError where a library that only some recipes need is not installed here."""
        kinds = [stage.optimizer.kind for stage in self.stages]
        eight = next((kind for kind in kinds if kind not in ("adamw", "adamw_fused")), None)
        for library, extra, wanted, key in (
            ("deepspeed", "engines", self.engine == "deepspeed", "engine: deepspeed"),
            ("bitsandbytes", "engines", self.model.quantise is not None, f"model.quantise: {self.model.quantise}"),
            ("bitsandbytes", "engines", eight is not None, f"optimizer.kind: {eight}"),
            ("wandb", "wandb", self.board.wandb is not None, "board.wandb"),
        ):
            if wanted and importlib.util.find_spec(library) is None:
                raise UserError(f"{key}: {library} is not installed; 'pip install radhpc[{extra}]' brings it")

    @property
    def hash(self) -> str:
        """Identity of the recipe, for checkpoints and to see that all ranks run the same. The engine is no part of it:
        a run may go on under another.
        """
        return hashlib.sha256(json.dumps(self.model_dump(exclude={"engine"}), sort_keys=True).encode()).hexdigest()

    def under(self, engine: str, path: Path) -> "Recipe":
        """The same under another engine. Raises UserError where there is none of this name or it cannot do this."""
        return validate(Recipe, {**self.model_dump(), "engine": engine}, path)

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
                    "weights": _absolute_weights(recipe.model.weights),
                    "tokenizer": recipe.model.tokenizer.model_copy(
                        update={"folder": recipe.model.tokenizer.folder and _absolute(recipe.model.tokenizer.folder)}
                    ),
                }
            ),
        }
    )


def override(section: AnyModel, overrides: Sequence[str], name: str) -> AnyModel:
    """A section with changes such as `beams=3` or `evaluation.beams=3`. Raises UserError."""
    data = section.model_dump(mode="json")
    for change in overrides:
        _apply(data, change.removeprefix(f"{name}."))
    return validate(type(section), data, Path(name))


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


def _absolute_weights(weights: str | dict[str, str] | None) -> str | dict[str, str] | None:
    if isinstance(weights, dict):
        return {part: absolute_or_hub(path) for part, path in weights.items()}
    return weights and absolute_or_hub(weights)


def absolute_or_hub(path: str) -> str:
    """A folder's absolute path; of hub:OWNER/NAME the folder of the hub's cache, if it is there, so that a run keeps to
    this release of the weights.
    """
    if not path.startswith(HUB):
        return _absolute(path)
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    name = path.removeprefix(HUB).replace("/", "--")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")) / f"models--{name}"
    main = cache / "refs" / "main"
    folder = cache / "snapshots" / (main.read_text().strip() if main.exists() else "none")
    return str(folder) if folder.is_dir() else path


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
