"""Mllama (Llama 3.2 Vision): a vision encoder over tiles, and cross-attention layers inside a Llama.

Images take no positions in the text: the language model's cross-attention layers look at them. Shapes, for a batch
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
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from radhpc.core.errors import UserError, first_line
from radhpc.core.recipe import ModelSettings
from radhpc.models import compat_transformers, image_processors
from radhpc.models.families import mllama_attention, mllama_tiles
from radhpc.models.families.base import check_keys, keys_of, loaded, read_tokenizer
from radhpc.models.family import Arrays, Load, Taps
from radhpc.models.image_processors import MllamaImages


class Family:
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
        self.config = self._configuration()
        vision = self.config.vision_config
        self.max_tiles: int = vision.max_num_tiles
        self.image_processor = self._image_processor(vision.image_size)

    @property
    def modules(self) -> tuple[str, ...]:
        """What travels with exported weights, because transformers has no class for it."""
        return ("radhpc.models.portable.hierarchical_fusion",) if self._recipe.fusion is not None else ()

    def _image_processor(self, size: int) -> MllamaImages:
        """As the weights' folder says, where it says anything."""
        path = image_processors.described(Path(self._recipe.weights)) if self._recipe.weights is not None else None
        if path is None:
            return MllamaImages(size, self.max_tiles)
        found = MllamaImages.from_file(path)
        if (found.size, found.tiles) != (size, self.max_tiles):
            raise UserError(
                f"{path}: {found.tiles} tiles of {found.size} pixels; its model has {self.max_tiles} of {size}"
            )
        return found

    def processor(self) -> Any:
        """transformers' own processor, equal to what encode_images and prompt do, for those who have no radhpc."""
        from transformers import MllamaProcessor
        from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

        if self._recipe.weights is not None and (path := image_processors.described(Path(self._recipe.weights))):
            images = MllamaImageProcessorPil.from_pretrained(str(path.parent), local_files_only=True)
        else:
            size = {"height": self.image_processor.size, "width": self.image_processor.size}
            images = MllamaImageProcessorPil(size=size, max_image_tiles=self.max_tiles)
        return MllamaProcessor(images, self.tokenizer, chat_template=self.tokenizer.chat_template)

    def _configuration(self) -> MllamaConfig:
        if self._recipe.weights is not None:
            return MllamaConfig.from_pretrained(self._recipe.weights, local_files_only=True)
        text, vision = (keys_of(self._recipe.config, part) for part in ("text", "vision"))
        check_keys(text, "text", upstream.MllamaTextConfig)
        check_keys(vision, "vision", upstream.MllamaVisionConfig)
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
        """Random weights from the configuration (a pure function of the seed), or the local folder's."""
        if self._recipe.weights is not None:
            model = loaded(MllamaForConditionalGeneration, self._recipe.weights, "", self._recipe.attention)
        else:
            compat_transformers.set_attention(self.config, self._recipe.attention)
            torch.manual_seed(seed)
            model = MllamaForConditionalGeneration(self.config)
            self._initialise(model)
        return self.finish(model)

    def finish(self, model: Any) -> torch.nn.Module:
        """What the tokenizer decides, and attention without masks."""
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return self._attached(model)

    def build_empty(self) -> torch.nn.Module:
        """The architecture alone, in float32 as build() gives it."""
        compat_transformers.set_attention(self.config, self._recipe.attention)
        with torch.device("meta"):
            model = MllamaForConditionalGeneration(self.config)
        return self._attached(model)

    def _attached(self, model: Any) -> torch.nn.Module:
        mllama_attention.attach(model)
        if self._recipe.skip_empty_tiles:
            mllama_tiles.attach(model)
        found: torch.nn.Module = model.eval()
        return found

    def _initialise(self, model: torch.nn.Module) -> None:
        """Start the gates and the position embeddings where the recipe says, not where upstream does."""
        gates, positions = self._recipe.gates, self._recipe.positions
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if gates is not None and name.endswith(("attn_gate", "mlp_gate", ".gate", "gate_attn", "gate_ffn")):
                    parameter.fill_(gates)
                if positions is not None and name.endswith("gated_positional_embedding.embedding"):
                    parameter.normal_(std=positions)

    def taps(self, model: Any) -> Taps:
        """Image tokens as the language model gets them; what is said as it is before the first cross-attention."""
        language, first = model.model.language_model, self.config.text_config.cross_attention_layers[0]
        text = language.layers[first - 1] if first else language.embed_tokens
        return Taps(model.model.multi_modal_projector, text, language, self.config.text_config.hidden_size, _pool)

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

    def place_images(self, ids: list[int], images: Arrays) -> list[int]:
        return ids  # an image is one token, at which nothing stands

    def encode_images(self, images: Sequence[Image.Image]) -> Arrays:
        """pixel_values (V, T, 3, S, S), aspect_ratio_ids (V,), aspect_ratio_mask (V, T), num_tiles (V,) of V views."""
        return self.image_processor(images)

    def show_images(self, images: Arrays) -> list[Image.Image]:
        """The views of one study as the model sees them."""
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
    """(B, I, T, patches, width) -> the mean over the patches of all tiles that hold a part of a view, (B, width)."""
    tiles = batch["aspect_ratio_mask"] * (batch["aspect_ratio_ids"] > 0).unsqueeze(-1)
    share = tiles.to(tokens.dtype) / tiles.sum((1, 2), keepdim=True).clamp_min(1)
    return torch.einsum("bitpw,bit->bw", tokens, share) / tokens.shape[3]
