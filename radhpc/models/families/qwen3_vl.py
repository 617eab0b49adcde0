"""Qwen3-VL: a vision transformer that takes views in their own proportions, and a Qwen3 that reads them as tokens.

A view of R x C patches takes R * C / 4 positions of the text, as M x M = 2 x 2 patches make a token. Shapes, for a
batch of B studies with V views of N patches of P x P pixels in all:

    pixel_values (N, 3 * 2 * P * P)   image_grid_thw (V, 3)   input_ids, mm_token_type_ids (B, L)

A view of 1024 x 1024 pixels takes 1,024 positions; `model.max_pixels` bounds that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from radhpc.core.errors import UserError
from radhpc.core.recipe import ModelSettings
from radhpc.models import compat_transformers, processor_files
from radhpc.models.families.base import ImageTokenFamily, Inputs, load_pretrained
from radhpc.models.family import Arrays, Load
from radhpc.models.image_processors import QwenImages
from radhpc.models.portable.study_processor import StudyProcessor


class Qwen3VLFamily(ImageTokenFamily):
    """Qwen3-VL as radhpc.models.family.ModelFamily describes a family."""

    IMAGE_TOKENS = ("<|image_pad|>",)
    CHAT_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
    VISION, TEXT = "qwen3_vl_vision", "qwen3_vl_text"
    # Without a token between them, adjacent views would be one to the position embedding.
    CHAT_TEMPLATE = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|>{{ image_token }}<|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )

    def __init__(self, model: ModelSettings, tokenizer_folder: str) -> None:
        super().__init__(model, tokenizer_folder)
        vision = self.config.vision_config
        folder = model.folders.get("model")
        path = processor_files.description_file(Path(folder)) if folder is not None else None
        if path is None:
            side, most = vision.patch_size * vision.spatial_merge_size, model.max_pixels or 1 << 20
            self.image_processor = QwenImages(vision.patch_size, vision.spatial_merge_size, side * side, most)
        else:
            self.image_processor = QwenImages.from_file(path, model.max_pixels)
        sizes = (self.image_processor.patch, self.image_processor.merge)
        if sizes != (expected := (vision.patch_size, vision.spatial_merge_size)):
            raise UserError(f"{path}: patches and merges of {sizes}; its model has {expected}")

    def configuration(self) -> Qwen3VLConfig:
        if folder := self.recipe.folders.get("model"):
            return Qwen3VLConfig.from_pretrained(folder, local_files_only=True)
        known = self.tokenizer.get_vocab()
        return Qwen3VLConfig(
            vision_config=self.vision_config(),
            text_config=self.text_config(),
            image_token_id=self.image_token_id,
            video_token_id=known.get("<|video_pad|>", -1),
            vision_start_token_id=known.get("<|vision_start|>", -1),
            vision_end_token_id=known.get("<|vision_end|>", -1),
        )

    def build(self, seed: int, load: Load | None = None) -> Any:
        """Build the model from its folder, or with random values, a pure function of the seed."""
        if folder := self.recipe.folders.get("model"):
            return self.finish(load_pretrained(Qwen3VLForConditionalGeneration, folder, "", self.attention_name))
        torch.manual_seed(seed)
        compat_transformers.set_attention(self.config, self.attention_name)
        return self.finish(Qwen3VLForConditionalGeneration(self.config))

    def build_empty(self) -> Any:
        """Build only the architecture, in float32 as build() does."""
        return self.build_on_meta(lambda: Qwen3VLForConditionalGeneration(self.config))

    def chat_template(self) -> str | None:
        """Return None for the tokenizer's template, if it is Qwen3-VL's own, else this family's."""
        return None if "model" in self.recipe.folders else self.CHAT_TEMPLATE

    def projector(self, model: Any) -> torch.nn.Module:
        """Return the module that merges patches to the vectors that the language model gets."""
        merger: torch.nn.Module = model.model.visual.merger
        return merger

    def processor(self) -> Any:
        """Return a processor that works without radhpc. transformers' own needs torchvision, for videos."""
        images = Qwen2VLImageProcessorPil(**self.image_processor.transformers_arguments())
        return StudyProcessor(images, self.tokenizer, chat_template=self.plain_template(), image_token=self.image_token)

    def tokens(self, images: Arrays) -> list[int]:
        return self._tokens(images["image_grid_thw"])

    def _tokens(self, grids: Any) -> list[int]:
        return [int(count) for count in grids.prod(-1) // self.image_processor.merge**2]

    def encode_images(self, images: Sequence[Image.Image]) -> Arrays:
        """Return pixel_values (N, 3 * 2 * P * P) of N patches in all, image_grid_thw (V, 3) of V views."""
        return self.image_processor(images)

    def show_images(self, images: Arrays) -> list[Image.Image]:
        """Return the views of one study as the model sees them."""
        return self.image_processor.show(images)

    def collate_images(self, studies: Sequence[Arrays], input_ids: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        batch = {
            name: np.concatenate([study[name] for study in studies]) for name in ("pixel_values", "image_grid_thw")
        }
        batch["mm_token_type_ids"] = (input_ids == self.image_token_id).astype(np.int32)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def image_counts(self, input_ids: torch.Tensor, inputs: Inputs) -> dict[str, list[int]]:
        """Return the number of views and of patches of each row: as many views as fill its image tokens."""
        if "pixel_values" not in inputs:
            return {}
        grids = iter(inputs["image_grid_thw"])
        views, patches = [], []
        for tokens in (input_ids == self.image_token_id).sum(dim=1).tolist():
            views.append(0)
            patches.append(0)
            while tokens > 0:
                count = int(next(grids).prod())
                views[-1] += 1
                patches[-1] += count
                tokens -= count // self.image_processor.merge**2
        return {"image_grid_thw": views, "pixel_values": patches}
