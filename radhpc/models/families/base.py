"""Share what families have in common whose images take positions in the text: tokenizer, chat, components, generation.

An image is one image token in the chat, and as many of them in the ids as the language model gets vectors for it:

    "<s>USER: <image>\\nWrite the report. ASSISTANT:"   ->   1 3148 ... 32000 32000 32000 ... 13566 29901

A model is one folder as transformers saves it, or is assembled from components: the language model and the vision model
from folders of their own or from configurations, the projector between them always new. llava.py is the shortest
example.
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
from radhpc.models.family import Arrays, FeaturePoints, Load

Inputs = Mapping[str, torch.Tensor]


class ImageTokenFamily:
    """Implement the part of radhpc.models.family.ModelFamily that such families share; subclasses set the constants."""

    IMAGE_TOKENS: tuple[str, ...]  # names that the token of an image may have, the usual one first
    CHAT_TOKENS: tuple[str, ...] = ()  # further tokens that the chat needs
    VISION, TEXT = "", ""  # model types of the components where a configuration does not name one
    CHAT_TEMPLATE: str | None = None  # where neither the recipe nor the tokenizer brings one

    # The layers of every vision and language model that transformers has.
    blocks: tuple[type[torch.nn.Module], ...] = (GradientCheckpointingLayer,)

    def __init__(self, model: ModelSettings, tokenizer_folder: str) -> None:
        self.recipe = model
        self.tokenizer: Any = read_tokenizer(tokenizer_folder)
        self.image_token, self.image_token_id = self._image_token(tokenizer_folder)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.config: Any = self._checked_configuration()
        self.config.image_token_id = self.image_token_id

    # Defined by each family.

    def tokens(self, images: Arrays) -> list[int]:
        """Return how many vectors the language model gets for each view of a study."""
        raise NotImplementedError

    def configuration(self) -> PreTrainedConfig:
        """Return the whole model's configuration: its folder's, or one made of vision_config() and text_config()."""
        raise NotImplementedError

    # Derived from that.

    def prompt(self, text: str, images: int) -> str:
        """Return the chat up to where the answer begins, with one image token per view, images first."""
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
        if (count := chat.count(self.image_token)) != images:
            raise UserError(
                f"model.chat_template: {images} image(s) become {count} times {self.image_token}; expected is one each"
            )
        return chat

    def chat_template(self) -> str | None:
        """Return this family's template; None: the tokenizer's, which for a mere language model has no images."""
        return self.CHAT_TEMPLATE if "text" in self.recipe.folders or not self.tokenizer.chat_template else None

    def plain_template(self) -> str:
        """Return the chat template with the image token filled in, for a processor that does not pass its name."""
        template = self.recipe.chat_template or self.chat_template() or self.tokenizer.chat_template
        return str(template).replace("{{ image_token }}", self.image_token)

    def expand_image_tokens(self, ids: list[int], images: Arrays) -> list[int]:
        """Return a prompt's ids with each image token repeated once for each vector of its view."""
        counts = iter(self.tokens(images))
        return [i for token in ids for i in ([token] * next(counts) if token == self.image_token_id else [token])]

    def _image_token(self, folder: str) -> tuple[str, int]:
        """Return the image token and its id. The tokenizer of a whole model has it; to others it is added."""
        known = self.tokenizer.get_vocab()
        for name in self.IMAGE_TOKENS:
            if name in known:
                return name, known[name]
        name = self.IMAGE_TOKENS[0]
        if "model" in self.recipe.folders:
            family = type(self).__module__.rpartition(".")[2]
            raise UserError(f"{folder}: the tokenizer has no token {name}; it is not that of a {family} model")
        added = [name, *(token for token in self.CHAT_TOKENS if token not in known)]
        self.tokenizer.add_tokens(added, special_tokens=True)
        return name, self.tokenizer.convert_tokens_to_ids(name)

    # Configurations.

    def _checked_configuration(self) -> Any:
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
        """Return the vision model's configuration."""
        config = self._component_config("vision", self.VISION)
        # CLIP's folders contain its text model, too.
        inner: PreTrainedConfig | None = getattr(config, "vision_config", None)
        return config if inner is None else inner

    def text_config(self) -> PreTrainedConfig:
        """Return the language model's configuration, with a row for every token, the image token included."""
        config: Any = self._component_config("text", self.TEXT)
        config.vocab_size = max(
            getattr(config, "vocab_size", 0) if "text" in self.recipe.folders else 0, len(self.tokenizer)
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(self.tokenizer, name))
        result: PreTrainedConfig = config
        return result

    def _component_config(self, component: str, model_type: str) -> PreTrainedConfig:
        """Return a component's configuration: its folder's, or the recipe's keys, each of which its class must have."""
        config: PreTrainedConfig
        if (folder := self.recipe.folders.get(component)) is not None:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            return config
        keys = component_keys(self.recipe.config, component)
        model_type = keys.pop("model_type", model_type)
        if model_type not in CONFIG_MAPPING:
            raise UserError(
                f"model.config.{component}: no 'model_type' of transformers is '{model_type}'"
                f"{nearest(model_type, CONFIG_MAPPING)}"
            )
        check_keys(keys, component, CONFIG_MAPPING[model_type])
        config = CONFIG_MAPPING[model_type](**keys)
        return config

    # Models.

    @property
    def attention_name(self) -> str:
        """The name of an attention implementation of transformers. Raises UserError for one that is Mllama's."""
        name: str = self.recipe.attention
        if name not in ("auto", "sdpa", "eager"):
            raise UserError(f"model.attention '{name}': it is Mllama's; allowed are auto, sdpa and eager")
        return "sdpa" if name == "auto" else name

    def build_on_meta(self, make: Callable[[], Any]) -> Any:
        """Return the whole model that `make` makes, without values."""
        compat_transformers.set_attention(self.config, self.attention_name)
        with torch.device("meta"):
            return self.finish(make())

    def finish(self, model: Any) -> Any:
        """Make a model ready for the engine: set what the tokenizer decides, and encode images inside of forward()."""
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        encode_inside_forward(model, self.image_counts)
        return model.eval()

    def projector(self, model: Any) -> torch.nn.Module:
        """Return the module that gives the vectors of images, (..., width), in the order of their tokens."""
        module: torch.nn.Module = model.model.multi_modal_projector
        return module

    def feature_points(self, model: Any) -> FeaturePoints:
        """Images: as the language model gets them. Text: its embeddings, as already the first layer sees images."""
        text, language = model.get_input_embeddings(), model.model.language_model
        return FeaturePoints(self.projector(model), text, language, self.config.text_config.hidden_size, self._pool)

    def _pool(self, vectors: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean over the vectors of each row's views, (B, width), of (..., width)."""
        vectors = vectors.flatten(0, -2)
        counts = (batch["input_ids"] == self.image_token_id).sum(1, keepdim=True)
        ends = counts.cumsum(0)
        number = torch.arange(len(vectors), device=vectors.device)
        own = (number >= ends - counts) & (number < ends)
        return (own / counts.clamp_min(1)).to(vectors.dtype) @ vectors

    def image_counts(self, input_ids: torch.Tensor, inputs: Inputs) -> dict[str, list[int]]:
        """Return, for each input whose first axis is not the batch's, how many of its entries belong to each row."""
        return {}


def component_keys(config: dict[str, Any] | None, component: str) -> dict[str, Any]:
    """Return the keys of a component in a recipe's model.config. Raises UserError for a component that no model has."""
    for key in config or {}:
        if key not in ("text", "vision"):
            raise UserError(f"model.config: unknown key '{key}'; allowed are text and vision")
    return dict((config or {}).get(component, {}))


def check_keys(keys: Mapping[str, Any], component: str, config_class: Callable[[], Any]) -> None:
    """Raise UserError for a key that a configuration class of transformers does not have."""
    default = config_class()
    for key in keys:
        if not hasattr(default, key):
            raise UserError(f"model.config.{component}: '{key}' is no key of transformers' {type(default).__name__}")


def read_tokenizer(folder: str) -> Any:
    """Load the tokenizer of a local folder. Raises UserError where transformers cannot."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.tokenizer: {folder}: no tokenizer there that transformers reads; allowed is a local folder as "
            "save_pretrained() writes it"
        ) from error


def load_pretrained(model_class: Any, folder: str, key: str, attention: str, config: Any = None) -> Any:
    """Load a model from a local folder in float32. Raises UserError, also where the folder lacks some of its weights.

    `key`: what follows model.weights in the recipe, such as ".text".
    """
    try:
        model, information = model_class.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.weights{key}: {folder}: {first_line(error)}") from error
    if missing := sorted(information["missing_keys"]):
        raise UserError(
            f"model.weights{key}: {folder}: {len(missing)} of its tensors are missing, '{missing[0]}' first; "
            f"these are not the weights of a {type(model).__name__}"
        )
    return model


def language_model(folder: str | None, config: Any, attention: str, load: Load | None = None) -> Any:
    """Load or make a language model with its head. A token that was added to its tokenizer starts as the mean of the
    others.
    """

    def make() -> Any:
        model_class: Any = AutoModelForCausalLM
        return model_class.from_config(config, dtype=torch.float32, attn_implementation=attention)

    if folder is None:
        return make()
    if load is not None and (lazy := load(make, folder, ".text")) is not None:
        return lazy
    model = load_pretrained(AutoModelForCausalLM, folder, ".text", attention)
    old = model.get_input_embeddings().num_embeddings
    if old < config.vocab_size:
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[old:] = table[:old].mean(dim=0)
    return model


def vision_model(folder: str | None, config: Any, model_class: Any, attention: str, load: Load | None = None) -> Any:
    """Load a vision model from a folder that may hold more than that, or make one with random values."""

    def make() -> Any:
        return compat_transformers.from_config(model_class, config, torch.float32, attention)

    if folder is None:
        return make()
    if load is not None and (lazy := load(make, folder, ".vision")) is not None:
        return lazy
    return load_pretrained(model_class, folder, ".vision", attention, config)


def all_values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return all values of a parameter that may be lazy (lazy_loading.py), in float32."""
    source: Any = getattr(parameter, "lazy_weight", None)
    tensor: torch.Tensor = parameter.detach() if source is None else source.rows(0, len(parameter)).float()
    return tensor


def encode_inside_forward(model: Any, image_counts: Callable[[torch.Tensor, Inputs], dict[str, list[int]]]) -> None:
    """Let generate() pass the images to forward(), and repeat those of a study together.

    transformers encodes them earlier, outside the model's own call: there FSDP has not gathered what the images need.
    And in inputs whose first axis is views it would repeat each view by itself: the beams of a study with two views
    would see (1, 1), (2, 2). `image_counts` returns how many entries of such inputs belong to each row.
    """

    def wrap(usual: compat_transformers.Expand) -> compat_transformers.Expand:
        def expand(expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **inputs: Any) -> Any:
            counts = image_counts(input_ids, inputs) if expand_size > 1 else {}
            kept = {name: inputs.pop(name) for name in counts}
            ids, inputs = usual(expand_size, is_encoder_decoder, input_ids, **inputs)
            for name, tensor in kept.items():
                inputs[name] = torch.cat([row for row in tensor.split(counts[name]) for _ in range(expand_size)])
            return ids, inputs

        return expand

    compat_transformers.wrap_generation(model, wrap)
