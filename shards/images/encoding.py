"""Raw images to members of a shard: shrinks, windows and compresses to JPEG, PNG or JPEG XL.

    encoded = encode(raw, EncodingSettings(longest_side=1120), "PA")  # EncodedImage: bytes, View, suffix, fingerprint

An image is shrunk first, by area averages and in its full depth, and what has more than eight bits then gets a
window: the one that a DICOM brings, else from the 0.5th to the 99.5th percentile of the shrunk pixels. (In this order
the window costs a seventh, and noise, which the averages remove, does not widen it.) The View records the window, so
the mapping can be repeated (windowing.py). "jpeg" holds the pixels so mapped; "png16" and "jxl16" hold, without loss,
the shrunk values themselves, to be mapped by the reader. Eight bits stay eight bits, and are only shrunk.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from radhpc.core.sample import View
from shards.images import blank
from shards.images.perceptual_hash import fingerprint
from shards.images.raw_image import BadImage, RawImage
from shards.images.text_in_pixels import Box, find_text
from shards.images.windowing import apply_window, percentile_window

ImageFormat = Literal["jpeg", "png16", "jxl16"]
LEVELS = 1 << 16  # of a 16-bit value
PNG_LEVEL = 1  # zlib's: higher ones take many times as long for a few percent


@dataclass(frozen=True)
class EncodingSettings:
    """The size, format and quality that images are stored in."""

    longest_side: int = 1120  # pixels: larger images are shrunk to it, none is enlarged
    quality: int = 95  # of a JPEG, 1 to 100
    format: ImageFormat = "jpeg"  # or 16 bits without loss: "png16", and "jxl16", which is smaller and faster


class EncodedImage(NamedTuple):
    """An image as a member of a shard."""

    data: bytes
    view: View
    suffix: str  # of its name in the tar: "jpg", "png" or "jxl"
    fingerprint: bytes  # 32 bytes, see shards.images.perceptual_hash
    text: tuple[Box, ...]  # where text may be written into the pixels, see shards.images.text_in_pixels


def encode(
    raw: RawImage,
    settings: EncodingSettings = EncodingSettings(),
    view: str | None = None,
    path: Path | str = "image",
) -> EncodedImage:
    """Shrink, window to eight bits, and compress by the settings; `view` is the projection, which View records.

    Raises BadImage, with `path` in its message, for a picture of nothing.
    """
    if raw.pixels.dtype == np.uint8:
        stored = shown = shrink(raw.pixels, settings.longest_side)
        window = raw.window
    else:
        words, offset, step = _words(raw.pixels)
        stored = shrink(words, settings.longest_side)
        if raw.window is None:
            window = percentile_window(stored)
        else:
            window = (raw.window[0] - offset) / step, (raw.window[1] - offset) / step
        shown, _ = apply_window(stored, window)
        if settings.format == "jpeg":
            window = raw.window or (window[0] * step + offset, window[1] * step + offset)
    if fault := blank.fault(shown):
        raise BadImage(path, blank.REASON, fault)
    data, suffix = _compress(shown if settings.format == "jpeg" else stored, settings)
    height, width = shown.shape[:2]
    described = View(view=view, width=width, height=height, source_bits=raw.bits, window=window, done=raw.done)
    return EncodedImage(data, described, suffix, fingerprint(shown), find_text(shown))


def shrink(pixels: npt.NDArray[Any], longest_side: int) -> npt.NDArray[Any]:
    """Shrink uint8 or uint16 pixels, (h, w) or (h, w, 3), by area averages; small images stay unchanged."""
    height, width = pixels.shape[:2]
    if max(height, width) <= longest_side:
        return pixels
    factor = longest_side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    if pixels.ndim == 3 and pixels.dtype != np.uint8:  # Pillow supports 16 bits for gray only
        return np.stack([shrink(pixels[..., channel], longest_side) for channel in range(pixels.shape[2])], axis=2)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BOX))


def _words(pixels: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint16], float, float]:
    """Convert pixels of any type to 16-bit words: (words, offset, step), where value = offset + step * word.

    Exact for integers of a range below 65,536. A wider range, and fractions (a DICOM that was rescaled by one), are
    rounded to the 65,536 levels between their extremes.
    """
    if pixels.dtype == np.uint16:
        return pixels, 0.0, 1.0
    lowest, highest = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind in "iu" and highest - lowest < LEVELS:
        offset = 0.0 if lowest >= 0 and highest < LEVELS else lowest
        return (pixels.astype(np.int64) - int(offset)).astype(np.uint16), offset, 1.0
    step = (highest - lowest) / (LEVELS - 1) or 1.0
    return np.rint((pixels.astype(np.float64) - lowest) / step).astype(np.uint16), lowest, step


def _compress(pixels: npt.NDArray[Any], settings: EncodingSettings) -> tuple[bytes, str]:
    """Compress pixels. Returns the bytes of an image file and its suffix."""
    pixels = np.ascontiguousarray(pixels)
    if settings.format == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=settings.quality, subsampling=0)
        return buffer.getvalue(), "jpg"
    import imagecodecs

    if settings.format == "png16":
        return bytes(imagecodecs.png_encode(pixels, level=PNG_LEVEL)), "png"
    return bytes(imagecodecs.jpegxl_encode(pixels, lossless=True, effort=1, numthreads=1)), "jxl"
