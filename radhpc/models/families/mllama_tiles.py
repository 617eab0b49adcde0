"""Run Mllama's vision tower over real tiles only: an option, because the pretrained model saw empty ones too.

Upstream computes four tiles for every image, of which a radiograph of 560 pixels fills one, pads each to a multiple of
eight patches, and lets real patches attend to all that. Here only real tiles are embedded, all of a batch are
concatenated to one row, and the tiles of an image attend to one another: a quarter of the work for one tile. The
numbers differ from those that the weights were trained with, so weights need some training to adapt. Where a text
position sees no image, upstream lets it see all, and so it sees zeros in the place of empty tiles.

For images (B, I) of T tiles of P patches and the class token, N real tiles in all and D hidden values:

    pixels (N, 3, S, S) -> patches (N, P, D) -> tokens (1, N P, D) -> features (B, I, T, P, D'), zeros where empty
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from radhpc.models import attention
from radhpc.models.attention import Segment
from radhpc.models.class_extension import extend


def attach(model: Any) -> None:
    """Let an MllamaForConditionalGeneration with the implementation "segments" skip empty tiles."""
    extend(model.model.vision_model, RealTiles)


class RealTiles(MllamaVisionModel):  # type: ignore[no-untyped-call]
    """An MllamaVisionModel with the same parameters that computes only the real tiles."""

    def forward(
        self, pixel_values: torch.Tensor, aspect_ratio_ids: torch.Tensor, aspect_ratio_mask: torch.Tensor, **_: Any
    ) -> BaseModelOutput:
        """Encode pixel_values (B, I, T, 3, S, S), with aspect_ratio_ids (B, I) and aspect_ratio_mask (B, I, T)."""
        rows, images, tiles = pixel_values.shape[:3]
        device = self.patch_embedding.weight.device
        numbers = self._real_tiles(aspect_ratio_ids, aspect_ratio_mask)
        chosen = torch.from_numpy(numbers).to(device, non_blocking=True)
        ratios = aspect_ratio_ids.reshape(-1)

        pixels = pixel_values.flatten(0, 2).index_select(0, chosen)
        hidden = self.patch_embedding(pixels.to(device, self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        hidden = hidden + self._tile_embedding(self.pre_tile_positional_embedding, ratios, chosen)
        hidden = self.apply_class_embedding(hidden)
        positions = self.gated_positional_embedding
        gate = positions.gate.tanh()
        per_tile = positions.tile_embedding(ratios).view(-1, *positions.embedding.shape).index_select(0, chosen)
        hidden = self.layernorm_pre(hidden + (1 - gate) * positions.embedding + gate * per_tile)

        count, length, size = hidden.shape
        image_of = np.repeat(numbers // tiles, length)
        positions_of = [np.flatnonzero(image_of == image) for image in np.unique(image_of)]
        tokens = count * length
        mask: Any = attention.Segments([Segment(own, own) for own in positions_of], (1, tokens, tokens), device)
        local = self.transformer(hidden.reshape(1, tokens, size), attention_mask=mask)
        hidden = self.layernorm_post(local.last_hidden_state).view(count, length, size)
        hidden = hidden + self._tile_embedding(self.post_tile_positional_embedding, ratios, chosen)
        hidden = self.global_transformer(hidden.reshape(1, tokens, size), attention_mask=mask).last_hidden_state

        layers = list(self.intermediate_layers_indices or ())
        intermediate = torch.stack([local.hidden_states[n] for n in layers], dim=-1)
        features = torch.cat([hidden, intermediate.flatten(2)], dim=-1).view(count, length, -1)
        all_tiles = features.new_zeros(rows * images * tiles, *features.shape[1:]).index_copy(0, chosen, features)
        return BaseModelOutput(last_hidden_state=all_tiles.view(rows, images, tiles, length, -1))

    def _real_tiles(self, aspect_ratio_ids: torch.Tensor, aspect_ratio_mask: torch.Tensor) -> np.ndarray[Any, Any]:
        """Return the numbers of the real tiles, (N,); in a batch without images that of the first one, so that the
        graph is never empty.
        """
        ratios = attention.mask_values("aspect_ratio_ids", aspect_ratio_ids)
        mask = attention.mask_values("aspect_ratio_mask", aspect_ratio_mask)
        assert ratios is not None
        assert mask is not None
        # A missing image has the ratio 0; its first tile counts as real in the mask all the same.
        real = mask.astype(bool) & (ratios != 0)[..., None]
        numbers = np.flatnonzero(real)
        return numbers if len(numbers) else np.zeros(1, np.int64)

    def _tile_embedding(self, embedding: nn.Module, ratios: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return what an aspect ratio adds to each of its tiles: (N, 1, D)."""
        table: Any = embedding
        added: torch.Tensor = table.embedding(ratios).view(-1, 1, table.hidden_size).index_select(0, chosen)
        return added * table.gate.tanh() if table.is_gated else added
