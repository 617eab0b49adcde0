"""LLaVA's classes around a Swin transformer and a connector: what plain transformers makes of a SwinQwen export.

Travels with the weights, beside connector.py, and needs nothing of radhpc. The connector stands in the configuration:

    LlavaConfig(vision_config=SwinConfig(...), text_config=Qwen3Config(...), connector={"kind": "sasa", "latents": 64})
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, SwinModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from .connector import Abstractor, Sasa

AUTO_MAP = {"AutoModelForImageTextToText": "SwinQwen"}


class SwinQwenModel(LlavaModel):
    """Without the language model's head."""

    def __init__(self, config: LlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower: Any = SwinModel(config.vision_config, add_pooling_layer=False)
        self.multi_modal_projector: Any = build_connector(config)
        self.language_model: Any = AutoModel.from_config(config.text_config)

    def get_image_features(
        self, pixel_values: torch.Tensor, *_: Any, image_sizes: torch.Tensor | None = None, **__: Any
    ) -> BaseModelOutputWithPooling:
        """pixel_values (B, V, 3, S, S), image_sizes (B,): the tokens (T, D) of each study, from its views' mean."""
        studies, views = pixel_values.shape[:2]
        features = self.vision_tower(pixel_values.flatten(0, 1)).last_hidden_state.unflatten(0, (studies, views))
        if image_sizes is not None:
            there = torch.arange(views, device=image_sizes.device) < image_sizes[:, None]
            weights = (there / image_sizes[:, None]).to(features.dtype)
            features = (features * weights[:, :, None, None]).sum(dim=1)
        else:
            features = features.mean(dim=1)
        tokens = self.multi_modal_projector(features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(tokens))


class SwinQwen(LlavaForConditionalGeneration):
    """With it: forward() and generate() are LLaVA's."""

    def __init__(self, config: LlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = SwinQwenModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


def features_of(config: LlavaConfig) -> int:
    """Vectors that the vision model gives for a view."""
    vision: Any = config.vision_config
    return int(vision.image_size // vision.patch_size // 2 ** (len(vision.depths) - 1)) ** 2


def build_connector(config: Any) -> nn.Module:
    """The one that the configuration tells of: its keys are those of the recipe's model.connector."""
    channels, width, told = config.vision_config.hidden_size, config.text_config.hidden_size, config.connector
    if told["kind"] == "sasa":
        return Sasa(channels, width, told["latents"], told["heads"], told["dropout"])
    if told["kind"] == "abstractor":
        return Abstractor(channels, width, told["latents"], features_of(config))
    return nn.Linear(channels, width)
