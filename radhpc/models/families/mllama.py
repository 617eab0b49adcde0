"""Mllama (Llama 3.2 Vision): a vision encoder over tiles, and cross-attention layers inside a Llama.

Images take no positions in the text: the language model's cross-attention layers attend to them. Shapes, for a batch
of B studies with at most I views of at most T tiles of S x S pixels, and L text tokens:

    pixel_values (B, I, T, 3, S, S)   aspect_ratio_ids (B, I)   aspect_ratio_mask (B, I, T)
    input_ids (B, L)                  cross_attention_mask (B, L, I, T)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama import modeling_mllama as upstream
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from radhpc.core.errors import UserError, first_line
from radhpc.core.recipe import ModelSettings
from radhpc.models import compat_transformers, processor_files
from radhpc.models.families import mllama_attention, mllama_tiles
from radhpc.models.families.base import check_keys, component_keys, load_pretrained, read_tokenizer
from radhpc.models.family import Arrays, FeaturePoints, Load
from radhpc.models.image_processors import MllamaImages


class MllamaFamily:
    """Mllama as radhpc.models.family.ModelFamily describes a family."""

    attention = "segments"
    blocks = (
        upstream.MllamaVisionEncoderLayer,
        upstream.MllamaSelfAttentionDecoderLayer,
        upstream.MllamaCrossAttentionDecoderLayer,
    )

    def __init__(self, model: ModelSettings, tokenizer_folder: str) -> None:
        self._recipe = model
        self.tokenizer: Any = read_tokenizer(tokenizer_folder)
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids("<|image|>")
        if self.image_token_id in (None, self.tokenizer.unk_token_id):
            raise UserError(
                f"{tokenizer_folder}: the tokenizer has no token <|image|>; it is not a Llama 3.2 Vision one"
            )
        self.config: Any = self._configuration()
        vision: Any = self.config.vision_config
        self.max_tiles: int = vision.max_num_tiles
        self.image_processor = self._image_processor(vision.image_size)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are exported with the weights, because transformers has no class for them."""
        return ("radhpc.models.portable.hierarchical_fusion",) if self._recipe.fusion is not None else ()

    @property
    def _folder(self) -> str | None:
        """The folder of the whole model, the only component that this family has."""
        return self._recipe.folders.get("model")

    def _image_processor(self, size: int) -> MllamaImages:
        """Return the image processor that the weights' folder describes, or the usual one."""
        path = processor_files.description_file(Path(self._folder)) if self._folder is not None else None
        if path is None:
            return MllamaImages(size, self.max_tiles)
        result = MllamaImages.from_file(path)
        if (result.size, result.tiles) != (size, self.max_tiles):
            raise UserError(
                f"{path}: {result.tiles} tiles of {result.size} pixels; its model has {self.max_tiles} of {size}"
            )
        return result

    def processor(self) -> Any:
        """Return transformers' own processor, which does what encode_images and prompt do, for use without radhpc."""
        from transformers import MllamaProcessor
        from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

        if self._folder is not None and (path := processor_files.description_file(Path(self._folder))):
            images = MllamaImageProcessorPil.from_pretrained(str(path.parent), local_files_only=True)
        else:
            size = {"height": self.image_processor.size, "width": self.image_processor.size}
            images = MllamaImageProcessorPil(size=size, max_image_tiles=self.max_tiles)
        template = self.tokenizer.chat_template
        return MllamaProcessor(images, self.tokenizer, chat_template=template)  # type: ignore[no-untyped-call]

    def _configuration(self) -> MllamaConfig:
        if self._folder is not None:
            return MllamaConfig.from_pretrained(self._folder, local_files_only=True)
        text, vision = (component_keys(self._recipe.config, part) for part in ("text", "vision"))
        check_keys(text, "text", MllamaTextConfig)
        check_keys(vision, "vision", MllamaVisionConfig)
        # Upstream's output head has no row for the image token, which is therefore the last one.
        text |= {
            "vocab_size": self.image_token_id,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        try:
            return MllamaConfig(text_config=text, vision_config=vision, image_token_index=self.image_token_id)
        except Exception as error:  # transformers raises several kinds for values that do not fit
            raise UserError(f"model.config: {first_line(error)}") from error

    def build(self, seed: int, load: Load | None = None) -> torch.nn.Module:
        """Build the model from its folder, or with random values, a pure function of the seed."""
        if self._folder is not None:
            model = load_pretrained(MllamaForConditionalGeneration, self._folder, "", self._recipe.attention)
        else:
            compat_transformers.set_attention(self.config, self._recipe.attention)
            torch.manual_seed(seed)
            model = MllamaForConditionalGeneration(self.config)
            self._initialise(model)
        return self.finish(model)

    def finish(self, model: Any) -> torch.nn.Module:
        """Set what the tokenizer decides, and attach attention without masks."""
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return self._attach(model)

    def build_empty(self) -> torch.nn.Module:
        """Build only the architecture, in float32 as build() does."""
        compat_transformers.set_attention(self.config, self._recipe.attention)
        with torch.device("meta"):
            model = MllamaForConditionalGeneration(self.config)
        return self._attach(model)

    def _attach(self, model: Any) -> torch.nn.Module:
        mllama_attention.attach(model)
        if self._recipe.skip_empty_tiles:
            mllama_tiles.attach(model)
        result: torch.nn.Module = model.eval()
        return result

    def _initialise(self, model: torch.nn.Module) -> None:
        """Start the gates and the position embeddings where the recipe says, not where upstream does."""
        gates, positions = self._recipe.gates, self._recipe.positions
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if gates is not None and name.endswith(("attn_gate", "mlp_gate", ".gate", "gate_attn", "gate_ffn")):
                    parameter.fill_(gates)
                if positions is not None and name.endswith("gated_positional_embedding.embedding"):
                    parameter.normal_(std=positions)

    def feature_points(self, model: Any) -> FeaturePoints:
        """Images: as the language model gets them. Text: its states before the first cross-attention."""
        language, first = model.model.language_model, self.config.text_config.cross_attention_layers[0]
        text = language.layers[first - 1] if first else language.embed_tokens
        return FeaturePoints(
            model.model.multi_modal_projector, text, language, self.config.text_config.hidden_size, _pool
        )

    def prompt(self, text: str, images: int) -> str:
        # Text before an image cannot see it, so the images come first.
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        return str(
            self.tokenizer.apply_chat_template(
                chat,
                chat_template=self._recipe.chat_template,
                tokenize=False,
                add_generation_prompt=True,
                image_token="<|image|>",
            )
        )

    def expand_image_tokens(self, ids: list[int], images: Arrays) -> list[int]:
        """Return the ids as they are."""
        return ids  # an image is one token, which is not replaced by its features

    def encode_images(self, images: Sequence[Image.Image]) -> Arrays:
        """Return pixel_values (V, T, 3, S, S), aspect_ratio_ids (V,), aspect_ratio_mask (V, T), num_tiles (V,)."""
        return self.image_processor(images)

    def show_images(self, images: Arrays) -> list[Image.Image]:
        """Return the views of one study as the model sees them."""
        return self.image_processor.show(images)

    def collate_images(self, studies: Sequence[Arrays], input_ids: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        views = max(len(study["num_tiles"]) for study in studies)
        batch = {}
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            padded = np.zeros((len(studies), views, *studies[0][name].shape[1:]), studies[0][name].dtype)
            for row, study in enumerate(studies):
                padded[row, : len(study[name])] = study[name]
            batch[name] = torch.from_numpy(padded)
        # A missing view has no aspect ratio (id 0); its first tile counts as valid, as in upstream's processor,
        # because a tile that may attend to nothing would give NaN. The cross-attention mask below hides it.
        batch["aspect_ratio_mask"][:, :, 0] = 1
        ranges = [get_cross_attention_token_mask(row.tolist(), self.image_token_id) for row in input_ids]
        mask = convert_sparse_cross_attention_mask_to_dense(
            ranges, [study["num_tiles"].tolist() for study in studies], self.max_tiles, input_ids.shape[1]
        )
        batch["cross_attention_mask"] = torch.from_numpy(mask)
        return batch


def _pool(tokens: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean of (B, I, T, patches, width) over the patches of all tiles that show a view: (B, width)."""
    tiles = batch["aspect_ratio_mask"] * (batch["aspect_ratio_ids"] > 0).unsqueeze(-1)
    share = tiles.to(tokens.dtype) / tiles.sum((1, 2), keepdim=True).clamp_min(1)
    return torch.einsum("bitpw,bit->bw", tokens, share) / tokens.shape[3]
