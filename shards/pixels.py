"""Raw images -> 8-bit JPEGs: JPEG, PNG (8 and 16 bit, gray or colour) and DICOM.

    raw = load(Path("a.png"))                               # Raw: pixels with their full depth
    jpeg, view = encode(raw, longest_side=1120, quality=95, view="PA")

More than eight bits become eight through a window: the one that a DICOM brings, else from the 0.5th to the
99.5th percentile of the pixels. The window is recorded in the View, so the mapping can be repeated:
value -> round(255 * clip((value - black) / (white - black), 0, 1)). Eight bits stay as they are.
"""

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from radhpc.errors import first_line
from radhpc.sample import View

MIN_SIDE = 16  # pixels: anything smaller is an icon or a broken file
MAX_PIXELS = 100_000_000  # width x height: far above any radiograph, far below what exhausts the memory
MAX_BYTES = 1 << 30  # of a raw file
PERCENTILES = (0.5, 99.5)
WINDOW = tuple[float, float]  # raw values that become black and white; black above white inverts


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
        elif data.startswith(b"\x89PNG\r\n\x1a\n"):
            raw = _decode_png(data, path)
        elif data[128:132] == b"DICM" or data[:2] in (b"\x02\x00", b"\x08\x00"):
            from shards import dicom  # costs a third of a second to import, and most archives have none

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


def encode(raw: Raw, longest_side: int = 1120, quality: int = 95, view: str | None = None) -> tuple[bytes, View]:
    """Window to eight bits, shrink to `longest_side` pixels by area averages (never enlarge), write as JPEG."""
    pixels, window = (raw.pixels, raw.window) if raw.pixels.dtype == np.uint8 else apply_window(raw.pixels, raw.window)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) > longest_side:
        factor = longest_side / max(image.size)
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    described = View(view=view, width=image.width, height=image.height, source_bits=raw.bits, window=window)
    return buffer.getvalue(), described


def apply_window(pixels: npt.NDArray[Any], window: WINDOW | None = None) -> tuple[npt.NDArray[np.uint8], WINDOW]:
    """Map raw values to 0..255 through the window, or through the percentiles' where it is None.

    A constant image becomes black. Returns the pixels and the window that was used.
    """
    if window is None:
        window = percentile_window(pixels)
    if span := _table(pixels):
        lowest, length = span
        table = _ramp(np.arange(lowest, lowest + length), window)
        return table[pixels if lowest == 0 else pixels.astype(np.int64) - lowest], window
    return _ramp(pixels, window), window


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


def _ramp(values: npt.NDArray[Any], window: WINDOW) -> npt.NDArray[np.uint8]:
    black, white = window
    if black == white:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - black) / (white - black)
    return np.asarray(np.rint(255 * np.clip(scaled, 0, 1)), np.uint8)


def _decode_jpeg(data: bytes, path: Path | str) -> Raw:
    return Raw(_eight_bits(_open(data, path)))


def _decode_png(data: bytes, path: Path | str) -> Raw:
    depth, colour = struct.unpack_from(">BB", data, 24)
    image = _open(data, path)
    if depth < 16:
        return Raw(_eight_bits(image))
    if colour == 0:  # gray: Pillow keeps all 16 bits here, and saturates in convert("L"), so never convert
        return Raw(np.asarray(image).astype(np.uint16), bits=16)
    import imagecodecs  # Pillow would drop the lower eight bits of colour without a word

    pixels = np.asarray(imagecodecs.png_decode(data))
    return Raw(merge_channels(pixels[..., : 1 if pixels.shape[2] < 3 else 3]), bits=16)


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
