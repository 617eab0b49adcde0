"""Raw images -> what lies in a shard: JPEG, PNG (8 and 16 bit, gray or colour) and DICOM in; JPEG, PNG or JPEG XL out.

    raw = load(Path("a.png"))                               # Raw: pixels with their full depth
    encoded = encode(raw, Target(longest_side=1120), "PA")  # Encoded: bytes, View, suffix, fingerprint

An image is shrunk first, by area averages and in its full depth, and what has more than eight bits then gets a
window: the one that a DICOM brings, else from the 0.5th to the 99.5th percentile of the shrunk pixels. (In this order
the window costs a seventh, and noise, which the averages remove, does not widen it.) The View records the window, so
the mapping can be repeated: value -> round(255 * clip((value - black) / (white - black), 0, 1)). "jpeg" holds the
pixels so mapped; "png16" and "jxl16" hold, without loss, the shrunk values themselves, to be mapped by the reader.
Eight bits stay eight bits, and are only shrunk.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from radhpc.core.errors import first_line
from radhpc.core.image_decoding import ramp
from radhpc.core.sample import View
from shards.images import png
from shards.images.perceptual_hash import fingerprint

MIN_SIDE = 16  # pixels: anything smaller is an icon or a broken file
MAX_PIXELS = 100_000_000  # width x height: far above any radiograph, far below what exhausts the memory
MAX_BYTES = 1 << 30  # of a raw file
PERCENTILES = (0.5, 99.5)
WINDOW = tuple[float, float]  # raw values that become black and white; black above white inverts
Format = Literal["jpeg", "png16", "jxl16"]
LEVELS = 1 << 16  # of a 16-bit value
PNG_LEVEL = 1  # zlib's: higher ones take many times as long for a few percent


class BadImage(ValueError):
    """An image that cannot be used. `reason` is one of few general phrases; `detail` may name the particulars."""

    def __init__(self, path: Path | str, reason: str, detail: str = "") -> None:
        super().__init__(path, reason, detail)
        self.path, self.reason, self.detail = path, reason, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Raw:
    """Pixels as they came: (height, width) gray or (height, width, 3) colour, brighter is larger."""

    pixels: npt.NDArray[Any]  # uint8, or any wider integer or float
    bits: int = 8  # per pixel and channel in the raw image
    window: WINDOW | None = None  # the image's own; where the pixels are uint8 it has been applied already
    modality: str | None = None  # as a DICOM tells it: CR, DX, CT, ...


def load(path: Path) -> Raw:
    """Read an image of any supported kind, recognised by its content. Raises BadImage."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadImage(path, "image too large", f"{path.stat().st_size} bytes")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadImage(path, "missing image file") from error
    except OSError as error:
        raise BadImage(path, "unreadable image file", error.strerror or "") from error
    return decode(data, path)


def decode(data: bytes, path: Path | str = "image") -> Raw:
    """Decode the bytes of an image file; `path` is for messages. Raises BadImage."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            raw = _decode_jpeg(data, path)
        elif data.startswith(png.SIGNATURE):
            raw = _decode_png(data, path)
        elif data[128:132] == b"DICM" or data[:2] in (b"\x02\x00", b"\x08\x00"):
            from shards.images import dicom  # costs a third of a second to import, and most archives have none

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


@dataclass(frozen=True)
class Target:
    """What images become."""

    longest_side: int = 1120  # pixels: larger images are shrunk to it, none is enlarged
    quality: int = 95  # of a JPEG, 1 to 100
    format: Format = "jpeg"  # or 16 bits without loss: "png16", and "jxl16", which is smaller and faster


class Encoded(NamedTuple):
    """An image as it goes into a shard."""

    data: bytes
    view: View
    suffix: str  # of its name in the tar: "jpg", "png" or "jxl"
    fingerprint: bytes  # 32 bytes, see shards.images.perceptual_hash


def encode(raw: Raw, target: Target = Target(), view: str | None = None) -> Encoded:
    """Shrink, window to eight bits, compress as `target` says; `view` is the projection, for the record."""
    if raw.pixels.dtype == np.uint8:
        stored = shown = shrink(raw.pixels, target.longest_side)
        window = raw.window
    else:
        words, offset, step = _words(raw.pixels)
        stored = shrink(words, target.longest_side)
        if raw.window is None:
            window = percentile_window(stored)
        else:
            window = (raw.window[0] - offset) / step, (raw.window[1] - offset) / step
        shown, _ = apply_window(stored, window)
        if target.format == "jpeg":
            window = raw.window or (window[0] * step + offset, window[1] * step + offset)
    data, suffix = _compress(shown if target.format == "jpeg" else stored, target)
    height, width = shown.shape[:2]
    described = View(view=view, width=width, height=height, source_bits=raw.bits, window=window)
    return Encoded(data, described, suffix, fingerprint(shown))


def shrink(pixels: npt.NDArray[Any], longest_side: int) -> npt.NDArray[Any]:
    """Area averages of uint8 or uint16 pixels, (h, w) or (h, w, 3); unchanged where small enough already."""
    height, width = pixels.shape[:2]
    if max(height, width) <= longest_side:
        return pixels
    factor = longest_side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    if pixels.ndim == 3 and pixels.dtype != np.uint8:  # Pillow has 16 bits for gray alone
        return np.stack([shrink(pixels[..., channel], longest_side) for channel in range(pixels.shape[2])], axis=2)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BOX))


def _words(pixels: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint16], float, float]:
    """Pixels of any kind as 16-bit words: (words, offset, step), where value = offset + step * word.

    Exact for all integers that span less than 65,536. What spans more, and fractions (a DICOM whose values were
    rescaled by one), is rounded to the 65,536 levels between its extremes.
    """
    if pixels.dtype == np.uint16:
        return pixels, 0.0, 1.0
    lowest, highest = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind in "iu" and highest - lowest < LEVELS:
        offset = 0.0 if lowest >= 0 and highest < LEVELS else lowest
        return (pixels.astype(np.int64) - int(offset)).astype(np.uint16), offset, 1.0
    step = (highest - lowest) / (LEVELS - 1) or 1.0
    return np.rint((pixels.astype(np.float64) - lowest) / step).astype(np.uint16), lowest, step


def _compress(pixels: npt.NDArray[Any], target: Target) -> tuple[bytes, str]:
    """Pixels -> (the bytes of an image file, its suffix)."""
    pixels = np.ascontiguousarray(pixels)
    if target.format == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=target.quality, subsampling=0)
        return buffer.getvalue(), "jpg"
    import imagecodecs

    if target.format == "png16":
        return bytes(imagecodecs.png_encode(pixels, level=PNG_LEVEL)), "png"
    return bytes(imagecodecs.jpegxl_encode(pixels, lossless=True, effort=1, numthreads=1)), "jxl"


def apply_window(pixels: npt.NDArray[Any], window: WINDOW | None = None) -> tuple[npt.NDArray[np.uint8], WINDOW]:
    """Map raw values to 0..255 through the window, or through the percentiles' where it is None.

    A constant image becomes black. Returns the pixels and the window that was used.
    """
    if window is None:
        window = percentile_window(pixels)
    if span := _table(pixels):
        lowest, length = span
        table = ramp(np.arange(lowest, lowest + length), window)
        return table.take(pixels if lowest == 0 else pixels.astype(np.int64) - lowest), window
    return ramp(pixels, window), window


def percentile_window(pixels: npt.NDArray[Any]) -> WINDOW:
    """The smallest values that 0.5% and 99.5% of the pixels do not exceed; the extremes where these are equal."""
    if span := _table(pixels):
        lowest, length = span
        values: npt.NDArray[Any] = np.arange(lowest, lowest + length)
        shifted = pixels.ravel() if lowest == 0 else pixels.ravel().astype(np.int64) - lowest
        counts = np.cumsum(np.bincount(shifted, minlength=length))
    else:
        values = np.sort(pixels, axis=None)
        counts = np.arange(1, values.size + 1)
    ranks = [np.ceil(int(counts[-1]) * percent / 100) for percent in PERCENTILES]
    black, white = (float(values[np.searchsorted(counts, rank)]) for rank in ranks)
    if black == white:  # nearly constant: the few other pixels are all there is to see
        return float(pixels.min()), float(pixels.max())
    return black, white


def _table(pixels: npt.NDArray[Any]) -> tuple[int, int] | None:
    """(first value, length) of a table over all values of integer pixels: faster than float arithmetic.

    None where the values are no integers, or spread too far.
    """
    if pixels.dtype.kind not in "iu":
        return None
    lowest, highest = min(int(pixels.min()), 0), int(pixels.max())
    return (lowest, highest - lowest + 1) if highest - lowest < 1 << 16 else None


def _decode_jpeg(data: bytes, path: Path | str) -> Raw:
    return Raw(_eight_bits(_open(data, path)))


def _decode_png(data: bytes, path: Path | str) -> Raw:
    check_size(path, *png.size(data))
    bits, colour = png.depth(data)
    data = png.unpack(data)
    if bits < 16 or (colour == 0 and png.has(data, b"eXIf")):
        image = _open(data, path)
        if bits < 16:
            return Raw(_eight_bits(image))
        return Raw(np.asarray(image).astype(np.uint16), bits=16)  # never convert("L"): that saturates
    import imagecodecs  # Pillow would drop the lower eight bits of colour without a word

    pixels = np.asarray(imagecodecs.png_decode(data))
    if pixels.ndim == 3:
        pixels = merge_channels(pixels[..., : 1 if pixels.shape[2] < 3 else 3])
    return Raw(pixels, bits=16)


def _open(data: bytes, path: Path | str) -> Image.Image:
    """Open with Pillow and turn upright as the EXIF orientation says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        check_size(path, image.width, image.height)
        image.load()
    return ImageOps.exif_transpose(image)


def check_size(path: Path | str, width: int, height: int) -> None:
    """Refuse a decompression bomb before it is decoded."""
    if width * height > MAX_PIXELS:
        raise BadImage(path, "image too large", f"{width} x {height} pixels")


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels of an image with at most eight bits; what is transparent becomes black, equal channels one."""
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), layers)
    return merge_channels(np.asarray(image.convert("RGB")))


def merge_channels(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Gray where all channels are equal: (height, width, channels) -> (height, width) or unchanged."""
    first = pixels[..., 0]
    return first if all(np.array_equal(first, pixels[..., c]) for c in range(1, pixels.shape[2])) else pixels
