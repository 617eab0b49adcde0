"""What families have in common whose images take positions in the text: tokenizer, chat, parts, and generation.

A picture is one image token in the chat, and as many of them in the ids as the language model gets vectors for it:

    "<s>USER: <image>\\nWrite the report. ASSISTANT:"   ->   1 3148 ... 32000 32000 32000 ... 13566 29901

A model is one folder as transformers saves it, or is put together from parts: the language model and the vision model
from folders of their own or from configurations, what joins them always anew. llava.py is the shortest example.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from radhpc.core.errors import UserError, first_line, nearest
from radhpc.core.recipe import ModelSettings
from radhpc.models import compat_transformers
from radhpc.models.family import Arrays, Load, Taps

Inputs = Mapping[str, torch.Tensor]


class InText:
    """The part of radhpc.models.ModelFamily that such families share. A family says what stands here in capitals."""

    IMAGE_TOKENS: tuple[str, ...]  # names that the token of an image may have, the usual one first
    BESIDE_IMAGES: tuple[str, ...] = ()  # tokens that the chat has beside
    VISION, TEXT = "", ""  # model types of the parts where a configuration does not say one
    CHAT_TEMPLATE: str | None = None  # where neither the recipe nor the tokenizer brings one

    blocks = (GradientCheckpointingLayer,)  # the layers of every vision and language model that transformers has

    def __init__(self, model: ModelSettings, tokenizer_folder: str) -> None:
        self.recipe = model
        self.tokenizer: Any = read_tokenizer(tokenizer_folder)
        self.image_token, self.image_token_id = self._image_token(tokenizer_folder)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.config: Any = self._whole_configuration()
        self.config.image_token_id = self.image_token_id

    # What a family says of itself.

    def tokens(self, images: Arrays) -> list[int]:
        """How many vectors the language model gets for each view of a study."""
        raise NotImplementedError

    def configuration(self) -> PreTrainedConfig:
        """Of the whole model: from its folder, or put together from vision_config() and text_config()."""
        raise NotImplementedError

    # What follows from that.

    def prompt(self, text: str, images: int) -> str:
        """The chat up to where the answer begins, with one image token per view, images first."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": text.replace(self.image_token, "")}]
        template = self.recipe.chat_template or self.chat_template()
        if template is None and self.tokenizer.chat_template is None:
            raise UserError(
                f"model.chat_template: the tokenizer {self.tokenizer.name_or_path} has none, so give one, in which an "
                "image is {{ image_token }}"
            )
        chat = str(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                image_token=self.image_token,
            )
        )
        if (found := chat.count(self.image_token)) != images:
            raise UserError(
                f"model.chat_template: {images} image(s) become {found} times {self.image_token}; one each is wanted"
            )
        return chat

    def chat_template(self) -> str | None:
        """This family's own template; None: the tokenizer's. That of a language model alone knows nothing of images."""
        return self.CHAT_TEMPLATE if "text" in self.recipe.folders or not self.tokenizer.chat_template else None

    def plain_template(self) -> str:
        """The chat template by itself, for a processor that passes no name of the image token."""
        template = self.recipe.chat_template or self.chat_template() or self.tokenizer.chat_template
        return str(template).replace("{{ image_token }}", self.image_token)

    def place_images(self, ids: list[int], images: Arrays) -> list[int]:
        """A prompt's ids with each image token as often as its view has vectors."""
        counts = iter(self.tokens(images))
        return [i for one in ids for i in ([one] * next(counts) if one == self.image_token_id else [one])]

    def _image_token(self, folder: str) -> tuple[str, int]:
        """The image token and its id. A tokenizer that comes with a whole model has it; others are given it."""
        known = self.tokenizer.get_vocab()
        for name in self.IMAGE_TOKENS:
            if name in known:
                return name, known[name]
        name = self.IMAGE_TOKENS[0]
        if "model" in self.recipe.folders:
            family = type(self).__module__.rpartition(".")[2]
            raise UserError(f"{folder}: the tokenizer has no token {name}; it is not that of a {family} model")
        added = [name, *(token for token in self.BESIDE_IMAGES if token not in known)]
        self.tokenizer.add_tokens(added, special_tokens=True)
        return name, self.tokenizer.convert_tokens_to_ids(name)

    # Configurations.

    def _whole_configuration(self) -> Any:
        try:
            config: Any = self.configuration()
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"model.{self._source()}: {first_line(error)}") from error
        except Exception as error:  # transformers raises several kinds for values that do not fit
            raise UserError(f"model.{self._source()}: {first_line(error)}") from error
        return config

    def _source(self) -> str:
        return "weights" if "model" in self.recipe.folders else "config"

    def vision_config(self) -> PreTrainedConfig:
        config = self._part("vision", self.VISION)
        inner = getattr(config, "vision_config", None)  # CLIP's folders hold its text model, too
        return config if inner is None else inner

    def text_config(self) -> PreTrainedConfig:
        """With a row for every token, the image token among them."""
        config: Any = self._part("text", self.TEXT)
        config.vocab_size = max(
            getattr(config, "vocab_size", 0) if "text" in self.recipe.folders else 0, len(self.tokenizer)
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(self.tokenizer, name))
        return config

    def _part(self, part: str, kind: str) -> PreTrainedConfig:
        """A part's configuration: its folder's, or the recipe's keys, each of which its class must know."""
        if (folder := self.recipe.folders.get(part)) is not None:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        keys = keys_of(self.recipe.config, part)
        kind = keys.pop("model_type", kind)
        if kind not in CONFIG_MAPPING:
            raise UserError(
                f"model.config.{part}: no 'model_type' of transformers is '{kind}'{nearest(kind, CONFIG_MAPPING)}"
            )
        check_keys(keys, part, CONFIG_MAPPING[kind])
        return CONFIG_MAPPING[kind](**keys)

    # Models.

    @property
    def kernels(self) -> str:
        """transformers' name of how attention is computed."""
        wanted: str = self.recipe.attention
        if wanted not in ("auto", "sdpa", "eager"):
            raise UserError(f"model.attention '{wanted}': it is Mllama's; allowed are auto, sdpa and eager")
        return "sdpa" if wanted == "auto" else wanted

    def empty(self, make: Callable[[], Any]) -> Any:
        """The whole model that `make` makes, without values."""
        compat_transformers.set_attention(self.config, self.kernels)
        with torch.device("meta"):
            return self.finish(make())

    def finish(self, model: Any) -> Any:
        """Ready for the engine: what the tokenizer decides, and images that are encoded inside of forward()."""
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        encode_inside_forward(model, self.image_parts)
        return model.eval()

    def projector(self, model: Any) -> torch.nn.Module:
        """What gives the vectors of images, (..., width), one study behind the other as their tokens stand."""
        found: torch.nn.Module = model.model.multi_modal_projector
        return found

    def taps(self, model: Any) -> Taps:
        """Images as the language model gets them; of what is said its words alone, as the first layer sees images."""
        text, language = model.get_input_embeddings(), model.model.language_model
        return Taps(self.projector(model), text, language, self.config.text_config.hidden_size, self._pool)

    def _pool(self, vectors: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(..., width) -> the mean over the vectors of each row's views, (B, width)."""
        vectors = vectors.flatten(0, -2)
        counts = (batch["input_ids"] == self.image_token_id).sum(1, keepdim=True)
        ends = counts.cumsum(0)
        number = torch.arange(len(vectors), device=vectors.device)
        own = (number >= ends - counts) & (number < ends)
        return (own / counts.clamp_min(1)).to(vectors.dtype) @ vectors

    def image_parts(self, input_ids: torch.Tensor, inputs: Inputs) -> dict[str, list[int]]:
        """Of the inputs whose first axis is not the batch's: how many entries belong to each of its rows."""
        return {}


def keys_of(config: dict[str, Any] | None, part: str) -> dict[str, Any]:
    """What a recipe's model.config says of a part. Raises UserError for a part that no model has."""
    for key in config or {}:
        if key not in ("text", "vision"):
            raise UserError(f"model.config: unknown key '{key}'; allowed are text and vision")
    return dict((config or {}).get(part, {}))


def check_keys(keys: Mapping[str, Any], part: str, kind: Callable[[], Any]) -> None:
    """Raise UserError for a key that transformers' configuration class `kind` does not have."""
    known = kind()
    for key in keys:
        if not hasattr(known, key):
            raise UserError(f"model.config.{part}: '{key}' is no key of transformers' {type(known).__name__}")


def read_tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.tokenizer: {folder}: no tokenizer there that transformers reads; a local folder is wanted, such "
            "as save_pretrained() writes"
        ) from error


def loaded(kind: Any, folder: str, part: str, attention: str, config: Any = None) -> Any:
    """A model from a local folder in float32. Raises UserError, also where the folder lacks some of its weights."""
    try:
        model, told = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.weights{part}: {folder}: {first_line(error)}") from error
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"model.weights{part}: {folder}: {len(missing)} of its tensors are missing, '{missing[0]}' first; "
            f"these are not the weights of a {type(model).__name__}"
        )
    return model


def language_model(folder: str | None, config: Any, attention: str, load: Load | None = None) -> Any:
    """With its head. A token that was added to its tokenizer starts as the mean of the others."""

    def make() -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)

    if folder is None:
        return make()
    if load is not None and (promised := load(make, folder, ".text")) is not None:
        return promised
    model = loaded(AutoModelForCausalLM, folder, ".text", attention)
    old = model.get_input_embeddings().num_embeddings
    if old < config.vocab_size:
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[old:] = table[:old].mean(dim=0)
    return model


def vision_model(folder: str | None, config: Any, kind: Any, attention: str, load: Load | None = None) -> Any:
    """Of class `kind`, from a folder that may hold more than that, or random."""

    def make() -> Any:
        return compat_transformers.from_config(kind, config, torch.float32, attention)

    if folder is None:
        return make()
    if load is not None and (promised := load(make, folder, ".vision")) is not None:
        return promised
    return loaded(kind, folder, ".vision", attention, config)


def values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return all values of a parameter that may be lazy (lazy_loading.py), in float32."""
    source: Any = getattr(parameter, "lazy_weight", None)
    tensor: torch.Tensor = parameter.detach() if source is None else source.rows(0, len(parameter)).float()
    return tensor


def encode_inside_forward(model: Any, parts: Callable[[torch.Tensor, Inputs], dict[str, list[int]]]) -> None:
    """Let generate() hand the images to forward(), and repeat those of a study together.

    transformers encodes them before, past the model's own call: there FSDP has not gathered what the images need. And
    of inputs whose first axis are views it would repeat each view for itself, so that the beams of a study with two
    views would see (1, 1), (2, 2). `parts` tells how many entries of such inputs belong to each row.
    """

    def wrap(usual: compat_transformers.Expand) -> compat_transformers.Expand:
        def expand(expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **inputs: Any) -> Any:
            counts = parts(input_ids, inputs) if expand_size > 1 else {}
            kept = {name: inputs.pop(name) for name in counts}
            ids, inputs = usual(expand_size, is_encoder_decoder, input_ids, **inputs)
            for name, tensor in kept.items():
                inputs[name] = torch.cat([row for row in tensor.split(counts[name]) for _ in range(expand_size)])
            return ids, inputs

        return expand

    compat_transformers.wrap_generation(model, wrap)
