"""Define the section `model`: its family, weights, numbers and attention."""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from radhpc.core import families
from radhpc.core.errors import nearest
from radhpc.core.recipe.section import Section
from radhpc.core.sample import CHEXPERT


class TokenizerSettings(Section):
    """The source of the tokenizer: a folder, or trained on the reports of the training split."""

    folder: str | None = Field(None, description="local folder with a fast tokenizer; default: the weights' folder")
    train_vocabulary: int | None = Field(
        None, ge=300, description="train a byte-pair tokenizer of this many entries on the training reports"
    )


class ConnectorSettings(Section):
    """The module that turns an image's features into tokens of the language model, with family swin_qwen."""

    kind: Literal["sasa", "abstractor", "linear"] = Field(
        "sasa",
        description="sasa: the Spatially-Aware Semantic Abstractor, convolutions, then latents that query them "
        "(LightMedVLM); abstractor: convolutions around a pooling (Honeybee's C-Abstractor); linear: one token per "
        "feature",
    )
    latents: int = Field(64, ge=1, description="tokens per study; linear has as many as there are features")
    heads: int = Field(8, ge=1, description="of sasa's attention")
    dropout: float = Field(0.1, ge=0, lt=1, description="of sasa's attention")
    concepts: tuple[str, ...] = Field(
        CHEXPERT, description="sasa's first latents start from the language model's embeddings of these"
    )

    @model_validator(mode="after")
    def _fits(self) -> "ConnectorSettings":
        if self.kind == "sasa" and len(self.concepts) > self.latents:
            raise ValueError(f"{len(self.concepts)} 'concepts' do not fit into {self.latents} 'latents'")
        if self.kind == "abstractor" and math.isqrt(self.latents) ** 2 != self.latents:
            raise ValueError(f"latents {self.latents}: an abstractor pools to a square, such as 64")
        return self


class FusionSettings(Section):
    """Hierarchical cross-modal fusion of the vision encoder's levels with the prompt: radhpc/models/portable."""

    width: int = Field(1024, ge=1, description="of each level")
    heads: int = Field(16, ge=1, description="attention heads; they divide `width`")

    @model_validator(mode="after")
    def _divides(self) -> "FusionSettings":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class ModelSettings(Section):
    """The model: local weights, or random ones from a configuration."""

    family: str = Field("mllama", description="the model family, as radhpc/core/families.py or a plugin names it")
    weights: str | dict[str, str] | None = Field(
        None,
        description="local folder as transformers saves it, or hub:OWNER/NAME, which 'radhpc weights --online' has "
        "fetched; of a model that is put together, one for each of its parts: {vision: ..., text: ...}",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="instead of weights, or for the parts that have none: keys of transformers' configuration, text "
        "and vision apart",
    )
    connector: ConnectorSettings | None = Field(
        None, description="with family swin_qwen: what joins its components; default: sasa"
    )
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
    tokenizer: TokenizerSettings = TokenizerSettings()  # type: ignore[call-arg]
    attention: Literal["auto", "segments", "sdpa", "eager"] = Field(
        "auto",
        description="segments: without masks, by the fastest kernel there (models/attention.py); sdpa and eager are "
        "transformers'; auto: segments for Mllama, else sdpa",
    )
    quantise: Literal["nf4"] | None = Field(
        None, description="keep the frozen linear layers of the blocks in four bits, by bitsandbytes"
    )
    skip_empty_tiles: bool = Field(
        False,
        description="of Mllama: compute the tiles that an image fills, not always all four; the result is not the "
        "pretrained model's (docs/engines.md), and an image of one tile costs a quarter",
    )
    checkpoint_activations: bool | tuple[Literal["text", "cross", "vision"], ...] = Field(
        False,
        description="recompute the activations of each layer in the backward pass: of all of them, or of these kinds",
    )
    compile: bool = Field(
        False, description="torch.compile for each layer; what was compiled is kept in the run folder for the next life"
    )
    fusion: FusionSettings | None = Field(
        None, description="added to the model; Mllama's vision encoder alone has the levels"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSettings":
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
        """Look the family up in the registry, which also knows those of plugins."""
        known = families.names()
        if value not in known:
            raise ValueError(f"no such family{nearest(value, known)}; allowed are {', '.join(known)}")
        return value

    @property
    def folders(self) -> dict[str, str]:
        """Return the folders of the weights by part; a model in one folder is the part `model`."""
        if isinstance(self.weights, str):
            return {"model": self.weights}
        return dict(self.weights or {})

    @property
    def tokenizer_folder(self) -> str | None:
        """Return the tokenizer's folder; None: it is trained on the reports."""
        return self.tokenizer.folder or self.folders.get("model") or self.folders.get("text")
