"""Raw image files to pixels: decodes JPEG, PNG (8 and 16 bit, gray or colour) and DICOM, recognised by their content.

raw = load(Path("a.png"))                   # RawImage: pixels in their full depth
raw = decode(data, "a.png")                 # the same from bytes
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from radhpc.core.errors import first_line
from shards import raw_files
from shards.images import jpeg, png
from shards.images.raw_image import BadImage, RawImage, check_size, merge_channels

ORIENTATION = 0x0112  # the tag of EXIF
MIN_SIDE = 16  # pixels: anything smaller is an icon or a broken file
MAX_BYTES = 1 << 30  # of a raw file


def load(path: Path, check: Callable[[Path, bytes], None] | None = None) -> RawImage:
    """Load an image of any supported kind, recognised by its content. Raises BadImage.

    `check` gets its bytes before they are decoded, and may raise.
    """
    try:
        data = raw_files.read(path, MAX_BYTES)
    except raw_files.LargeFile as error:
        raise BadImage(path, "image too large", error.detail) from error
    except raw_files.RefusedFile as error:
        raise BadImage(path, error.strerror or "", error.detail) from error
    except FileNotFoundError as error:
        raise BadImage(path, "missing image file") from error
    except OSError as error:
        raise BadImage(path, "unreadable image file", error.strerror or "") from error
    if check is not None:
        check(path, data)
    return decode(data, path)


def decode(data: bytes, path: Path | str = "image") -> RawImage:
    """Decode the bytes of an image file; `path` is for messages. Raises BadImage."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            raw = _decode_jpeg(data, path)
        elif data.startswith(png.SIGNATURE):
            raw = _decode_png(data, path)
        elif data[128:132] == b"DICM" or data[:2] in (b"\x02\x00", b"\x08\x00"):
            from shards.images import dicom  # its import takes a third of a second, and most archives have no DICOM

            raw = dicom.decode(data, path)
        else:
            raise BadImage(path, "neither JPEG, PNG nor DICOM", "empty file" if not data else "")
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadImage(path, "image too large", first_line(error)) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise BadImage(path, "broken image", first_line(error)) from error
    height, width = raw.pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise BadImage(path, "image too small", f"{width} x {height} pixels")
    return raw


def _decode_jpeg(data: bytes, path: Path | str) -> RawImage:
    _, height, width, _ = jpeg.frame_header(data)
    check_size(path, width, height)
    pixels = jpeg.decode(data)
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:  # reads the header alone
        if pixels.ndim == 3 and pixels.shape[2] == 4:  # CMYK: it is whole, and Pillow knows how Adobe inverts it
            return RawImage(_eight_bits(_open(data, path)))
        image = ImageOps.exif_transpose(_with_orientation(Image.fromarray(pixels), opened))
    return RawImage(_eight_bits(image))


def _with_orientation(image: Image.Image, source: Image.Image) -> Image.Image:
    """Give an image the EXIF orientation of another."""
    if orientation := source.getexif().get(ORIENTATION):
        image.getexif()[ORIENTATION] = orientation
    return image


def _decode_png(data: bytes, path: Path | str) -> RawImage:
    check_size(path, *png.size(data))
    bits, colour = png.depth(data)
    data = png.unpack(data)
    if bits < 16 or (colour == 0 and png.has(data, b"eXIf")):
        image = _open(data, path)
        if bits < 16:
            return RawImage(_eight_bits(image))
        return RawImage(np.asarray(image).astype(np.uint16), bits=16)  # never convert("L"): that saturates
    import imagecodecs  # Pillow would silently drop the lower eight bits of colour

    pixels = np.asarray(imagecodecs.png_decode(data))
    if pixels.ndim == 3:
        pixels = merge_channels(pixels[..., : 1 if pixels.shape[2] < 3 else 3])
    return RawImage(pixels, bits=16)


def _open(data: bytes, path: Path | str) -> Image.Image:
    """Open with Pillow, and apply the EXIF orientation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        check_size(path, image.width, image.height)
        image.load()
    return ImageOps.exif_transpose(image)


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image of at most eight bits: transparency becomes black, equal channels become one."""
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), layers)
    return merge_channels(np.asarray(image.convert("RGB")))
