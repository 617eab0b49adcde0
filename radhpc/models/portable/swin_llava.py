"""Define LLaVA's classes around a Swin transformer and a connector, for plain transformers to load a SwinQwen export.

Exported with the weights and connector.py, and independent of radhpc. The connector stands in the configuration:

    LlavaConfig(vision_config=SwinConfig(...), text_config=Qwen3Config(...), connector={"kind": "sasa", "latents": 64})
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, SwinModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from .connector import Abstractor, SpatialSemanticAbstractor

AUTO_MAP = {"AutoModelForImageTextToText": "SwinQwen"}


class SwinQwenModel(LlavaModel):  # type: ignore[no-untyped-call]
    """The model without the language model's head."""

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        make_language_model: Any = AutoModel.from_config
        self.vision_tower: Any = SwinModel(config.vision_config, add_pooling_layer=False)
        self.multi_modal_projector: Any = build_connector(config)
        self.language_model: Any = make_language_model(config.text_config)

    def get_image_features(
        self, pixel_values: torch.Tensor, *_: Any, image_sizes: torch.Tensor | None = None, **__: Any
    ) -> BaseModelOutputWithPooling:
        """Return the tokens (T, D) of each study, from the mean of its views, given pixel_values (B, V, 3, S, S) and
        image_sizes (B,), the number of views of each.
        """
        studies, views = pixel_values.shape[:2]
        features = self.vision_tower(pixel_values.flatten(0, 1)).last_hidden_state.unflatten(0, (studies, views))
        if image_sizes is not None:
            present = torch.arange(views, device=image_sizes.device) < image_sizes[:, None]
            weights = (present / image_sizes[:, None]).to(features.dtype)
            features = (features * weights[:, :, None, None]).sum(dim=1)
        else:
            features = features.mean(dim=1)
        tokens: Any = list(self.multi_modal_projector(features))  # LLaVA's code takes a list, whatever the annotation
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens)


class SwinQwen(LlavaForConditionalGeneration):  # type: ignore[no-untyped-call]
    """The model with the language model's head: forward() and generate() are LLaVA's."""

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = SwinQwenModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


def features_of(config: LlavaConfig) -> int:
    """Return how many vectors the vision model gives for a view."""
    vision: Any = config.vision_config
    return int(vision.image_size // vision.patch_size // 2 ** (len(vision.depths) - 1)) ** 2


def build_connector(config: Any) -> nn.Module:
    """Make the connector of a configuration; its keys are those of the recipe's model.connector."""
    channels, width, connector = config.vision_config.hidden_size, config.text_config.hidden_size, config.connector
    if connector["kind"] == "sasa":
        latents, heads, dropout = connector["latents"], connector["heads"], connector["dropout"]
        return SpatialSemanticAbstractor(channels, width, latents, heads, dropout)
    if connector["kind"] == "abstractor":
        return Abstractor(channels, width, connector["latents"], features_of(config))
    return nn.Linear(channels, width)
