"""Encoded bytes to pictures. Shards hold images that were shrunk when they were built, in 8 bits or in 16."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from radhpc.sample import View

_PNG, _JPEG_XL = b"\x89PNG\r\n\x1a\n", (b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")


def decode(data: bytes, view: View | None = None) -> Image.Image:
    """Decode one member of a shard to 8 bits. Raises OSError where the bytes are no whole image.

    What has 16 bits goes through the view's window; without one, the whole range of 16 bits is shown.
    """
    is_png = data.startswith(_PNG)
    if not data.startswith(_JPEG_XL) and not (is_png and data[24:25] == b"\x10"):
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    import imagecodecs  # Pillow has 16 bits for gray PNG alone

    try:
        pixels = imagecodecs.png_decode(data) if is_png else imagecodecs.jpegxl_decode(data, numthreads=1)
    except (RuntimeError, ValueError) as error:  # all of imagecodecs' own are RuntimeErrors
        raise OSError(f"broken image: {error}") from error
    if pixels.dtype == np.uint16:
        pixels = show(pixels, view.window if view and view.window else (0.0, 65535.0))
    return Image.fromarray(pixels)


def show(values: npt.NDArray[Any], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """16-bit values through a window, as the View says it: the pixels that a JPEG of the same image was made of."""
    return ramp(np.arange(1 << 16), window).take(values)


def ramp(values: npt.NDArray[Any], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Values of any kind through a window of (black, white): 0 to 255, all black where the two are equal."""
    black, white = window
    if black == white:
        return np.zeros(values.shape, np.uint8)
    shares = (values.astype(np.float64) - black) / (white - black)
    return np.asarray(np.rint(255 * np.clip(shares, 0, 1)), np.uint8)
