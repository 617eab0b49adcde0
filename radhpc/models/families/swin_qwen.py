"""LightMedVLM (Vu et al., 2025): a Swin transformer, a connector, and a small Qwen3 that reads a study as 64 tokens.

The features of a study's views are averaged, so that two views take as many positions as one. Shapes, for a batch of B
studies with at most V views of S x S pixels, T tokens each:

    pixel_values (B, V, 3, S, S)   image_sizes (B,): views of each study   input_ids (B, L)

The classes are LLaVA's with another vision model and connector (swin_llava.py, connector.py). The components come from
folders of their own, the connector is new:

    model: {family: swin_qwen, weights: {vision: models/swin-base-patch4-window7-224, text: models/Qwen3-0.6B}}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import LlavaConfig, SwinModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.swin.modeling_swin import SwinLayer
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from radhpc.core.recipe import ConnectorSettings, ModelSettings
from radhpc.models import processor_files
from radhpc.models.families.base import ImageTokenFamily, all_values, language_model, vision_model
from radhpc.models.family import Arrays, Load
from radhpc.models.image_processors import SwinImages
from radhpc.models.portable.connector import SpatialSemanticAbstractor
from radhpc.models.portable.study_processor import StudyProcessor
from radhpc.models.portable.swin_llava import SwinQwen, build_connector, features_of


class SwinQwenFamily(ImageTokenFamily):
    """LightMedVLM as radhpc.models.family.ModelFamily describes a family."""

    blocks = (SwinLayer, Qwen3DecoderLayer, LlamaDecoderLayer)
    modules = ("radhpc.models.portable.connector", "radhpc.models.portable.swin_llava")  # exported with the weights

    IMAGE_TOKENS = ("<|image_pad|>", "<|image|>", "<image>")
    VISION, TEXT = "swin", "qwen3"
    # The instruction is the system's message, the picture is the user's; no thinking.
    CHAT_TEMPLATE = (
        "{% for message in messages %}<|im_start|>system\n{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "<|im_start|>user\nThe chest X-ray image shows: {{ image_token }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )

    def __init__(self, model: ModelSettings, tokenizer_folder: str) -> None:
        self.connector = model.connector or ConnectorSettings()  # type: ignore[call-arg]
        super().__init__(model, tokenizer_folder)
        folder = model.folders.get("vision")
        path = processor_files.description_file(Path(folder)) if folder is not None else None
        size = self.config.vision_config.image_size
        self.image_processor = SwinImages(size) if path is None else SwinImages.from_file(path)
        linear = self.connector.kind == "linear"
        self.study_tokens = features_of(self.config) if linear else self.connector.latents

    def configuration(self) -> LlavaConfig:
        vision: Any = self.vision_config()
        if "drop_path_rate" not in (self.recipe.config or {}).get("vision", {}):
            vision.drop_path_rate = 0.0  # for training Swin alone: here it would blur what the connector learns from
        connector: dict[str, Any] = {"connector": self.connector.model_dump(exclude={"concepts"})}
        return LlavaConfig(
            vision_config=vision, text_config=self.text_config(), image_token_index=self.image_token_id, **connector
        )

    def build(self, seed: int, load: Load | None = None) -> Any:
        """Build the model from its folders; what none of them holds is random, a pure function of the seed."""
        folders, config = self.recipe.folders, self.config
        torch.manual_seed(seed)
        model: Any = self.build_empty()
        language = language_model(folders.get("text"), config.text_config, self.attention_name, load)
        vision = vision_model(folders.get("vision"), config.vision_config, SwinModel, self.attention_name, load)
        vision.pooler = None
        if folders:
            torch.manual_seed(seed)  # whichever way the components were read
        connector = build_connector(config)
        if isinstance(connector, SpatialSemanticAbstractor):
            connector.set_concepts(self._concepts(all_values(language.get_input_embeddings().weight)))
        model.model.vision_tower, model.model.language_model = vision, language.model
        model.model.multi_modal_projector, model.lm_head = connector, language.lm_head
        return self.finish(model)

    def build_empty(self) -> Any:
        """Build only the architecture, in float32 as build() does."""
        return self.build_on_meta(lambda: SwinQwen(self.config))

    def processor(self) -> Any:
        """Return a processor that works without radhpc: it repeats a study's one image token for each vector."""
        images = ViTImageProcessorPil(**self.image_processor.transformers_arguments())
        return StudyProcessor(
            images,
            self.tokenizer,
            chat_template=self.plain_template(),
            image_token=self.image_token,
            study_tokens=self.study_tokens,
        )

    def _concepts(self, table: torch.Tensor) -> torch.Tensor:
        """Return the mean embedding of the tokens of each concept's name, (concepts, D)."""
        ids = [self.tokenizer(name, add_special_tokens=False)["input_ids"] for name in self.connector.concepts]
        return torch.stack([table[one].mean(dim=0) for one in ids])

    def prompt(self, text: str, images: int) -> str:
        return super().prompt(text, min(images, 1))  # a study is one picture

    def chat_template(self) -> str:
        """Return this family's template: Qwen3's own has no images."""
        return self.CHAT_TEMPLATE

    def tokens(self, images: Arrays) -> list[int]:
        return [self.study_tokens]

    def encode_images(self, images: Sequence[Image.Image]) -> Arrays:
        """Return pixel_values (V, 3, S, S) of V views."""
        return self.image_processor(images)

    def show_images(self, images: Arrays) -> list[Image.Image]:
        """Return the views of one study as the model sees them."""
        return self.image_processor.show(images)

    def collate_images(self, studies: Sequence[Arrays], input_ids: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        counts = [len(study["pixel_values"]) for study in studies]
        values = np.zeros((len(studies), max(counts), *studies[0]["pixel_values"].shape[1:]), np.float32)
        for row, study in zip(values, studies, strict=True):
            row[: len(study["pixel_values"])] = study["pixel_values"]
        return {"pixel_values": torch.from_numpy(values), "image_sizes": torch.tensor(counts)}
