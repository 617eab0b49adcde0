"""Encoded bytes to pictures. Shards hold images that were shrunk when they were built, in 8 bits or in 16.

    decode(data, view)    # a member's bytes and its View (sample.py) -> a picture of 8 bits: gray (L) or colour (RGB)

Enters: the bytes of `<key>.<n>.jpg`, `.png` or `.jxl`. Leaves: a picture of Pillow's, for image_processors.py and
for people. Made for threads: the decoders work without Python's lock.
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
_WANTED = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}  # what a JPEG holds -> what simplejpeg is asked for


def decode(data: bytes | memoryview, view: View | None = None) -> Image.Image:
    """Decode one member of a shard to 8 bits. Raises OSError where the bytes are no whole image.

    What has 16 bits goes through the view's window; without one, the whole range of 16 bits is shown.
    """
    start = bytes(data[:25])
    try:
        if start.startswith(_JPEG):
            return _jpeg(data)
        if start.startswith(_JPEG_XL):
            return _sixteen_bits(lambda codecs: codecs.jpegxl_decode(data, numthreads=1), view)
        if start.startswith(_PNG) and start[24:] == b"\x10":  # Pillow has 16 bits for gray PNG alone
            return _sixteen_bits(lambda codecs: codecs.png_decode(data), view)
        return _any(data)
    except (RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"broken image: {first_line(error)}") from error


def _jpeg(data: bytes | memoryview) -> Image.Image:
    """A JPEG through libjpeg-turbo, gray in one channel. Raises ValueError where the decoder so much as warns.

    libjpeg warns and goes on where data are missing or damaged, and leaves the rest of the picture gray. Of its
    wrappers simplejpeg alone takes a warning for an error: imagecodecs returns half a picture of half a file, and
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
    """What imagecodecs decodes, through the view's window. Raises RuntimeError or ValueError, as imagecodecs does."""
    import imagecodecs

    pixels = codec(imagecodecs)
    if pixels.dtype == np.uint16:
        pixels = lookup_window(pixels, view.window if view and view.window else (0.0, 65535.0))
    return Image.fromarray(pixels)


def _any(data: bytes | memoryview) -> Image.Image:
    """Whatever else Pillow reads."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def lookup_window(values: npt.NDArray[Any], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """16-bit values through a window, as the View says it: the pixels that a JPEG of the same image was made of."""
    return scale_window(np.arange(1 << 16), window).take(values)


def scale_window(values: npt.NDArray[Any], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Values of any kind through a window of (black, white): 0 to 255, all black where the two are equal."""
    black, white = window
    if black == white:
        return np.zeros(values.shape, np.uint8)
    shares = (values.astype(np.float64) - black) / (white - black)
    return np.asarray(np.rint(255 * np.clip(shares, 0, 1)), np.uint8)
