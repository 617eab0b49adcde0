"""LLaVA: a CLIP vision transformer, two linear layers, and a Llama that reads its patches as tokens.

A view takes (S / P)^2 positions of the text: 576 at S = 336 pixels and patches of P = 14. Shapes, for a batch of B
studies with V views in all:

    pixel_values (V, 3, S, S)   input_ids (B, L), which contains the image token 576 times per view

Views are padded to squares, as in LLaVA-1.5's training, and not cropped to their centres: several views that are
stitched side by side lose nothing. A model is one folder (transformers' LLaVA), or a Llama and a CLIP from folders of
their own with a new projector between them:

    model: {family: llava, weights: {text: models/vicuna-7b-v1.5, vision: models/clip-vit-large-patch14-336}}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from radhpc.core.recipe import ModelSettings
from radhpc.models import processor_files
from radhpc.models.families.base import ImageTokenFamily, Inputs, language_model, load_pretrained, vision_model
from radhpc.models.family import Arrays, Load
from radhpc.models.image_processors import ClipImages


class LlavaFamily(ImageTokenFamily):
    """LLaVA as radhpc.models.family.ModelFamily describes a family."""

    IMAGE_TOKENS = ("<image>", "<|image|>")
    VISION, TEXT = "clip_vision_model", "llama"
    # LLaVA-1.5's conversation: haotian-liu/LLaVA, llava/conversation.py, conv_vicuna_v1.
    CHAT_TEMPLATE = (
        "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ image_token }}\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endfor %} ASSISTANT:"
    )

    def __init__(self, model: ModelSettings, tokenizer_folder: str) -> None:
        super().__init__(model, tokenizer_folder)
        vision = self.config.vision_config
        self.view_tokens = (vision.image_size // vision.patch_size) ** 2
        if self.config.vision_feature_select_strategy == "full":
            self.view_tokens += 1  # the class token, too
        folder = model.folders.get("model") or model.folders.get("vision")
        path = processor_files.description_file(Path(folder)) if folder is not None else None
        self.image_processor = (
            ClipImages(vision.image_size, fit="pad") if path is None else ClipImages.from_file(path, fit="pad")
        )

    def configuration(self) -> LlavaConfig:
        if folder := self.recipe.folders.get("model"):
            return LlavaConfig.from_pretrained(folder, local_files_only=True)
        vision, text = self.vision_config(), self.text_config()
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.image_token_id,
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        )

    def build(self, seed: int, load: Load | None = None) -> Any:
        """Build the model from its folder, or from components; what no folder holds is random, a pure function of the
        seed.
        """
        folders = self.recipe.folders
        if "model" in folders:
            saved = load_pretrained(LlavaForConditionalGeneration, folders["model"], "", self.attention_name)
            return self.finish(saved)
        torch.manual_seed(seed)
        model: Any = self.build_empty()
        config = self.config
        language = language_model(folders.get("text"), config.text_config, self.attention_name, load)
        vision = vision_model(folders.get("vision"), config.vision_config, CLIPVisionModel, self.attention_name, load)
        if folders:
            torch.manual_seed(seed)  # whichever way the components were read
        model.model.vision_tower, model.model.language_model = vision, language.model
        model.model.multi_modal_projector, model.lm_head = LlavaMultiModalProjector(self.config), language.lm_head
        return self.finish(model)

    def build_empty(self) -> Any:
        """Build only the architecture, in float32 as build() does."""
        return self.build_on_meta(lambda: LlavaForConditionalGeneration(self.config))

    def processor(self) -> Any:
        """Return transformers' own processor, for squares: without radhpc, views are padded before (example.py)."""
        images = CLIPImageProcessorPil(
            size={"shortest_edge": self.image_processor.size},
            crop_size={"height": self.image_processor.size, "width": self.image_processor.size},
        )
        folder = self.recipe.folders.get("model") or self.recipe.folders.get("vision")
        if folder is not None and processor_files.description_file(Path(folder)):
            images = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        strategy = self.config.vision_feature_select_strategy
        return LlavaProcessor(  # type: ignore[no-untyped-call]
            images,
            self.tokenizer,
            patch_size=self.config.vision_config.patch_size,
            vision_feature_select_strategy=strategy,
            chat_template=self.plain_template(),
            image_token=self.image_token,
            num_additional_image_tokens=1,  # the class token, which "default" leaves out again
        )

    def tokens(self, images: Arrays) -> list[int]:
        return [self.view_tokens] * len(images["pixel_values"])

    def encode_images(self, images: Sequence[Image.Image]) -> Arrays:
        """Return pixel_values (V, 3, S, S) of V views."""
        return self.image_processor(images)

    def show_images(self, images: Arrays) -> list[Image.Image]:
        """Return the views of one study as the model sees them."""
        return self.image_processor.show(images)

    def collate_images(self, studies: Sequence[Arrays], input_ids: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(np.concatenate([study["pixel_values"] for study in studies]))}

    def image_counts(self, input_ids: torch.Tensor, inputs: Inputs) -> dict[str, list[int]]:
        counts = (input_ids == self.image_token_id).sum(dim=1) // self.view_tokens
        return {"pixel_values": counts.tolist()} if "pixel_values" in inputs else {}
