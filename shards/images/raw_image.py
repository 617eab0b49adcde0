"""Raw images in memory: the pixels of a decoded file in their full depth, and the error for a file that has none.

    RawImage(pixels, bits=12, window=(900.0, 3100.0), modality="DX")

The lowest module of this room: decoders return a RawImage, `encoding.py` takes one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_PIXELS = 100_000_000  # width x height: far above any radiograph, far below what exhausts the memory
Window = tuple[float, float]  # raw values that become black and white; black above white inverts


class BadImage(ValueError):
    """An image that cannot be used. `reason` is one of a few general phrases; `detail` may name the particulars."""

    def __init__(self, path: Path | str, reason: str, detail: str = "") -> None:
        super().__init__(path, reason, detail)
        self.path, self.reason, self.detail = path, reason, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class RawImage:
    """Pixels in their full depth: (height, width) gray or (height, width, 3) colour; brighter is larger."""

    pixels: npt.NDArray[Any]  # uint8, or any wider integer or float
    bits: int = 8  # per pixel and channel in the raw image
    window: Window | None = None  # of the file itself; where the pixels are uint8 it has been applied already
    modality: str | None = None  # of a DICOM: CR, DX, CT, ...
    done: tuple[str, ...] = ()  # to the picture, as View.done has it


def check_size(path: Path | str, width: int, height: int) -> None:
    """Refuse a decompression bomb, and an image of nothing, before it is decoded: some decoders survive neither."""
    if min(width, height) < 1:
        raise BadImage(path, "broken image", f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(path, "image too large", f"{width} x {height} pixels")


def merge_channels(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Reduce equal channels to one: (height, width, channels) -> (height, width), or unchanged."""
    first = pixels[..., 0]
    return first if all(np.array_equal(first, pixels[..., c]) for c in range(1, pixels.shape[2])) else pixels
