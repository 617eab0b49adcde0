"""Mllama's vision tower over real tiles alone: an option, because the pretrained model saw empty ones too.

Upstream computes four tiles for every image, of which a radiograph of 560 pixels fills one, pads each to a multiple of
eight patches, and lets real patches attend to all that. Here only real tiles are embedded, all of a batch stand one
behind the other as one row, and the tiles of an image attend to one another: a quarter of the work for one tile. The
numbers differ from those that the weights were trained with, so weights want some training to get used to it. Where a
text position sees no image, upstream lets it see all, and so it meets zeros in the place of empty tiles.

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
    """Let a MllamaForConditionalGeneration with the implementation "segments" pass over empty tiles."""
    extend(model.model.vision_model, RealTiles)


class RealTiles(MllamaVisionModel):
    """MllamaVisionModel, with the same parameters."""

    def forward(  # type: ignore[override]
        self, pixel_values: torch.Tensor, aspect_ratio_ids: torch.Tensor, aspect_ratio_mask: torch.Tensor, **_: Any
    ) -> BaseModelOutput:
        """pixel_values (B, I, T, 3, S, S), aspect_ratio_ids (B, I), aspect_ratio_mask (B, I, T)."""
        rows, images, tiles = pixel_values.shape[:3]
        device = self.patch_embedding.weight.device
        numbers = self._real(aspect_ratio_ids, aspect_ratio_mask)
        chosen = torch.from_numpy(numbers).to(device, non_blocking=True)
        ratios = aspect_ratio_ids.reshape(-1)

        pixels = pixel_values.flatten(0, 2).index_select(0, chosen)
        hidden = self.patch_embedding(pixels.to(device, self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        hidden = hidden + self._of_tiles(self.pre_tile_positional_embedding, ratios, chosen)
        hidden = self.apply_class_embedding(hidden)
        positions = self.gated_positional_embedding
        gate = positions.gate.tanh()
        placed = positions.tile_embedding(ratios).view(-1, *positions.embedding.shape).index_select(0, chosen)
        hidden = self.layernorm_pre(hidden + (1 - gate) * positions.embedding + gate * placed)

        count, length, size = hidden.shape
        of_image = np.repeat(numbers // tiles, length)
        parts = [np.flatnonzero(of_image == image) for image in np.unique(of_image)]
        tokens = count * length
        mask: Any = attention.Segments([Segment(part, part) for part in parts], (1, tokens, tokens), device)
        local = self.transformer(hidden.reshape(1, tokens, size), attention_mask=mask)
        hidden = self.layernorm_post(local.last_hidden_state).view(count, length, size)
        hidden = hidden + self._of_tiles(self.post_tile_positional_embedding, ratios, chosen)
        hidden = self.global_transformer(hidden.reshape(1, tokens, size), attention_mask=mask).last_hidden_state

        between = torch.stack([local.hidden_states[n] for n in self.intermediate_layers_indices], dim=-1)
        features = torch.cat([hidden, between.flatten(2)], dim=-1).view(count, length, -1)
        everywhere = features.new_zeros(rows * images * tiles, *features.shape[1:]).index_copy(0, chosen, features)
        return BaseModelOutput(last_hidden_state=everywhere.view(rows, images, tiles, length, -1))

    def _real(self, aspect_ratio_ids: torch.Tensor, aspect_ratio_mask: torch.Tensor) -> np.ndarray[Any, Any]:
        """The numbers of the real tiles, (N,); of a batch without any image the first one, for the graph's sake."""
        ratios = attention.current("aspect_ratio_ids", aspect_ratio_ids)
        shown = attention.current("aspect_ratio_mask", aspect_ratio_mask)
        assert ratios is not None
        assert shown is not None
        # A missing image has the ratio 0; its first tile counts as real in the mask all the same.
        real = shown.astype(bool) & (ratios != 0)[..., None]
        numbers = np.flatnonzero(real)
        return numbers if len(numbers) else np.zeros(1, np.int64)

    def _of_tiles(self, embedding: nn.Module, ratios: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What an aspect ratio adds to each of its tiles: (N, 1, D)."""
        table: Any = embedding
        whole = table.embedding(ratios).view(-1, 1, table.hidden_size).index_select(0, chosen)
        return whole * table.gate.tanh() if table.is_gated else whole  # type: ignore[no-any-return]
