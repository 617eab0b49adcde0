"""Decode images. Shards hold images that were shrunk when they were built, in 8 bits or in 16.

    decode(data, view)    # a member's bytes and its View (sample.py) -> a picture of 8 bits: gray (L) or colour (RGB)

Enters: the bytes of `<key>.<n>.jpg`, `.png` or `.jxl`. Leaves: a Pillow image, for image_processors.py and
for people. Made for threads: the decoders release Python's lock.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from radhpc.core.errors import first_line
from radhpc.core.sample import View

_JPEG, _PNG, _JPEG_XL = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")
MAX_PIXELS = 100_000_000  # of an image: no build stores as many
_WANTED = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}  # what a JPEG holds -> what simplejpeg is asked for


def decode(data: bytes | memoryview, view: View | None = None) -> Image.Image:
    """Decode one member of a shard to 8 bits. Raises OSError unless the bytes are one complete image.

    16-bit images are mapped through the view's window; without one, through the full range of 16 bits.
    """
    start = bytes(data[:25])
    try:
        if start.startswith(_JPEG):
            return _jpeg(data)
        if start.startswith(_JPEG_XL):
            return _sixteen_bits(lambda codecs: codecs.jpegxl_decode(data, numthreads=1), view)
        if start.startswith(_PNG) and start[24:] == b"\x10":  # Pillow has 16 bits for gray PNG alone
            if int.from_bytes(start[16:20]) * int.from_bytes(start[20:24]) > MAX_PIXELS:
                raise OSError("broken image: too large")
            return _sixteen_bits(lambda codecs: codecs.png_decode(data), view)
        return _any(data)
    except (RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"broken image: {first_line(error)}") from error


def _jpeg(data: bytes | memoryview) -> Image.Image:
    """Decode a JPEG with libjpeg-turbo, gray in one channel. Raises ValueError even for a warning of the decoder.

    libjpeg warns and continues where data are missing or damaged, and leaves the rest of the picture gray. Of its
    wrappers only simplejpeg treats a warning as an error: imagecodecs returns half a picture of half a file, and
    Pillow and OpenCV return a damaged one where bytes are missing in the middle.
    """
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # a broken header, or a rare kind of file
        return _any(data)
    if colours not in _WANTED or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
        return _any(data)  # CMYK, and what Pillow warns of or refuses for its size
    pixels = simplejpeg.decode_jpeg(data, colorspace=_WANTED[colours])
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _sixteen_bits(codec: Callable[[Any], npt.NDArray[Any]], view: View | None) -> Image.Image:
    """Decode with imagecodecs, map through the view's window. Raises RuntimeError or ValueError, as imagecodecs."""
    import imagecodecs

    pixels = codec(imagecodecs)
    if pixels.dtype == np.uint16:
        pixels = lookup_window(pixels, view.window if view and view.window else (0.0, 65535.0))
    return Image.fromarray(pixels)


def _any(data: bytes | memoryview) -> Image.Image:
    """Decode any other format that Pillow reads."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def lookup_window(values: npt.NDArray[Any], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Map 16-bit values through a window (black, white), by a table: the pixels that a JPEG of the same image holds."""
    return scale_window(np.arange(1 << 16), window).take(values)


def scale_window(values: npt.NDArray[Any], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Map values of any type through a window (black, white) to 0..255; all black if the two are equal."""
    black, white = window
    if black == white:
        return np.zeros(values.shape, np.uint8)
    shares = (values.astype(np.float64) - black) / (white - black)
    return np.asarray(np.rint(255 * np.clip(shares, 0, 1)), np.uint8)
