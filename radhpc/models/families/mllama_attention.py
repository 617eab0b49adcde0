"""Build Mllama's masks as segments (see radhpc.models.attention), exactly as the pretrained model attends.

Transformers builds two masks by functions of its module, and has no way to pass others; here these functions are
replaced by ones that build segments while a model runs that attach() was called on, and otherwise do what they did.

- Vision: an image is T tiles of P patches, each tile padded to L. Patches of real tiles see all T L positions, the
  padding included; padding sees only the real patches. Two segments per image.
- Cross-attention: a text position sees the patches of some tiles. Positions of a row that see the same tiles form a
  segment. Those that see none see all, as upstream does; padded text has no segment.
"""

from typing import Any

import numpy as np
import torch

from radhpc.models import attention, compat_transformers
from radhpc.models.attention import NAME, Segment, Segments

_MASKS = ("attention_mask", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
_upstream = compat_transformers.mllama_masks()


def attach(model: Any) -> None:
    """Let an MllamaForConditionalGeneration whose implementation is "segments" find the values of its masks."""
    if compat_transformers.attention_of(model.config) == NAME:
        attention.record_masks(model.model, *_MASKS)


def _vision_mask(
    aspect_ratio_mask: torch.Tensor, num_patches: int, target_length: int, dtype: torch.dtype
) -> torch.Tensor | Segments:
    """`aspect_ratio_mask`: (images, T), 1 for a real tile."""
    if not attention.is_recording():
        usual: torch.Tensor = _upstream.vision(aspect_ratio_mask, num_patches, target_length, dtype)
        return usual
    values = attention.mask_values("aspect_ratio_mask", aspect_ratio_mask)
    assert values is not None
    tiles = values.reshape(aspect_ratio_mask.shape).astype(bool)
    images, count = tiles.shape
    length = count * target_length
    real = np.zeros((images, count, target_length), bool)
    real[:, :, :num_patches] = tiles[:, :, None]
    segments = []
    for image, seen in enumerate(real.reshape(images, length)):
        positions = np.arange(image * length, (image + 1) * length)
        if seen.all():
            segments.append(Segment(positions, positions))
            continue
        if seen.any():
            segments.append(Segment(positions[seen], positions))
        segments.append(Segment(positions[~seen], positions[seen] if seen.any() else positions))
    return Segments(segments, (images, length, length), aspect_ratio_mask.device)


def _cross_mask(
    cross_attention_mask: torch.Tensor, num_vision_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor | Segments, torch.Tensor]:
    """`cross_attention_mask`: (rows, text, images, T), 1 where a text position sees a tile."""
    rows, length, images, tiles = cross_attention_mask.shape
    if not attention.is_recording() or length == 1:  # one more token over a cache
        return _upstream.cross(cross_attention_mask, num_vision_tokens, dtype)
    values = attention.mask_values("cross_attention_mask", cross_attention_mask)
    assert values is not None
    sees = values.reshape(rows, length, images * tiles).astype(bool)
    text = attention.mask_values_of_shape("attention_mask", (rows, length))
    keys = images * tiles * num_vision_tokens
    segments = []
    for row in range(rows):
        visible = sees[row] | ~sees[row].any(-1, keepdims=True)
        bits = np.packbits(visible, axis=-1)  # as bytes: numpy compares whole rows slowly
        _, firsts, groups = np.unique(bits.view(f"V{bits.shape[1]}"), return_index=True, return_inverse=True)
        valid = np.ones(length, bool) if text is None else text[row].astype(bool)
        for group, first in enumerate(firsts):
            queries = np.flatnonzero((groups.reshape(-1) == group) & valid)
            if len(queries):
                seen = np.flatnonzero(visible[first].repeat(num_vision_tokens))
                segments.append(Segment(queries + row * length, seen + row * keys))
    mask = Segments(segments, (rows, length, keys), cross_attention_mask.device)
    sees_an_image = (cross_attention_mask != 0).flatten(2).any(-1)
    return mask, sees_an_image[:, None, :, None].to(dtype)


compat_transformers.replace_mllama_masks(compat_transformers.MllamaMasks(_vision_mask, _cross_mask))
