"""Decodes DICOM to a RawImage: one frame, stored values through the modality's transform, then the file's own window.

Pixel data are decoded by imagecodecs or, where uncompressed or RLE, by pydicom itself, so that the result does
not depend on which of pydicom's optional decoders happen to be installed; JPEG of 8 bits by jpeg.py, which is
strict. Of the header nothing but the modality is handed on, and nothing reaches a shard.
"""

import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import encaps, uid
from pydicom.pixels.processing import apply_color_lut, convert_color_space

from shards.images import jpeg
from shards.images.deflated import BoundedFile
from shards.images.frame_size import frame_size
from shards.images.raw_image import BadImage, RawImage, Window, check_size, merge_channels
from shards.images.windowing import percentile_window

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages quote the header

_LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
_LOSSLESS = (uid.JPEGLossless, uid.JPEGLosslessSV1)
_JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
_HIGH_THROUGHPUT = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, *_HIGH_THROUGHPUT)
_DECODERS = (  # transfer syntaxes, and the name of imagecodecs' decoder
    (_LOSSY, "jpeg_decode"),
    (_LOSSLESS, "ljpeg_decode"),
    (_JPEG_LS, "jpegls_decode"),
    (_JPEG_2000, "jpeg2k_decode"),
    (_HIGH_THROUGHPUT, "htj2k_decode"),
)
_IMAGECODECS = {syntax: name for syntaxes, name in _DECODERS for syntax in syntaxes}
_NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
)
MAX_COMPONENTS = 4  # of a pixel
RESCALE = ("RescaleSlope", "RescaleIntercept")
_JPEG_2000_START = b"\xff\x4f\xff\x51"  # the markers of the start and of the size
_YBR = ("YBR_FULL", "YBR_FULL_422")
_COLOURS = (*_YBR, "RGB", "YBR_ICT", "YBR_RCT")  # those that can be shown; the last two are JPEG 2000's own
REPLACED = "window replaced by percentiles"  # in View.done
CONVERTED = "colours converted from {}"
PADDING = "padding ignored"


def decode(data: bytes, path: Path | str) -> RawImage:
    """Decode a single-frame image. Raises BadImage, and whatever a decoder raises on broken data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's complaints quote the header
        header = pydicom.dcmread(BoundedFile(data), force=True)
        return dataclasses.replace(_decode(header, path), modality=str(header.get("Modality") or "") or None)


def _decode(header: pydicom.Dataset, path: Path | str) -> RawImage:
    if "PixelData" not in header:
        raise BadImage(path, "DICOM without pixel data", str(header.get("Modality", "")))
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise BadImage(path, "DICOM of several frames", f"{frames} frames")
    check_size(path, header.Columns, header.Rows)
    stored, bits, converted = _pixels(header, path)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        coloured = np.asarray(apply_color_lut(stored, header))
        return RawImage(merge_channels((coloured >> (8 if coloured.max() > 255 else 0)).astype(np.uint8)), bits)
    if stored.ndim == 3:
        return RawImage(merge_channels(stored), bits, done=converted)

    values = _modality_values(stored, header)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BadImage(path, "broken image", "values that are not numbers")
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    padding = _padding(stored, header)
    image = values if padding is None or padding.all() else values[~padding]
    lowest, highest = image.min(), image.max()
    unused = False  # the file's own mapping, because it leaves nothing to see
    if header.get("VOILUTSequence"):
        item = header.VOILUTSequence[0]
        table, first = _lookup_table(item, values, header)
        shown = _look_up(values, table.astype(np.float64), first)
        low, high = float(table.min()), float(table.max())
        if _differs(shown, padding):
            shown = 255 * (shown - low) / (high - low or 1.0)
            return _finish(shown, (float(first), float(first + len(table) - 1)), bits, inverted)
        unused = True
    window = _window(header)
    if window and header.get("VOILUTFunction") == "SIGMOID":
        centre, half = sum(window) / 2, (window[1] - window[0]) / 2
        shown = np.rint(255 / (1 + np.exp(-2 * np.clip((values.astype(np.float64) - centre) / half, -300, 300))))
        if _differs(shown, padding):
            return _finish(shown, window, bits, inverted)
        window, unused = None, True
    if window and lowest < highest and (highest <= window[0] or lowest >= window[1]):  # nothing would be left to see
        window, unused = None, True
    if window is None and not unused and bits <= 8 and values.min() >= 0 and values.max() < 1 << bits:
        if bits == 8:
            plain = values.astype(np.uint8)
            return RawImage(255 - plain if inverted else plain, bits)
        window = (0.0, float((1 << bits) - 1))
    done: tuple[str, ...] = ()
    if window is None:
        window = percentile_window(image)
        done = (REPLACED,) * unused + (PADDING,) * (image is not values)
    if values.dtype == np.uint8:
        values = values.astype(np.int16)  # still to be mapped, and Raw takes uint8 as done
    return RawImage(values, bits, window[::-1] if inverted else window, done=done)


def _differs(shown: npt.NDArray[Any], padding: npt.NDArray[np.bool_] | None) -> bool:
    """Return whether more than one value is left to see of a mapped picture, padding apart."""
    image = shown if padding is None or padding.all() else shown[~padding]
    return bool(image.min() < image.max())


def _modality_values(stored: npt.NDArray[Any], header: pydicom.Dataset) -> npt.NDArray[Any]:
    """Apply the modality's lookup table or its slope and intercept. An empty one is none: part 5, 7.4."""
    if header.get("ModalityLUTSequence"):
        return _look_up(stored, *_lookup_table(header.ModalityLUTSequence[0], stored, header))
    slope, intercept = (header.get(name) for name in RESCALE)
    if slope is None and intercept is None:
        return stored
    slope, intercept = 1 if slope is None else slope, 0 if intercept is None else intercept
    values = stored.astype(np.float64) * float(slope) + float(intercept)
    return values.astype(np.int64) if _is_whole(slope) and _is_whole(intercept) else values


def _padding(stored: npt.NDArray[Any], header: pydicom.Dataset) -> npt.NDArray[np.bool_] | None:
    """Find the pixels that fill the picture up: those of the padding's value, or of its range."""
    value, limit = (header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return None
    ends = []
    for end in (value, value if limit is None else limit):
        number = int.from_bytes(end, "little") if isinstance(end, bytes) else int(end)
        ends.append(
            number - (1 << 16) if stored.dtype.kind == "i" and number > 0x7FFF else number
        )  # a word without sign
    return np.asarray((stored >= min(ends)) & (stored <= max(ends)))


def _pixels(header: pydicom.Dataset, path: Path | str) -> tuple[npt.NDArray[Any], int, tuple[str, ...]]:
    """Decode the frame: stored values, (rows, columns) or (rows, columns, 3) in RGB; their bits; what was done."""
    meta = getattr(header, "file_meta", None)
    syntax = meta.get("TransferSyntaxUID") if meta else None
    if syntax is None:  # a bare data set: nearly always this one
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = syntax = uid.ImplicitVRLittleEndian
    bits, interpretation = int(header.BitsStored), str(header.PhotometricInterpretation)
    if syntax in _NATIVE:
        done = (CONVERTED.format(interpretation),) if interpretation in _YBR else ()
        values = np.asarray(header.pixel_array)  # pydicom has converted the colours
        if syntax != uid.RLELossless and any(header.PixelData[_native_length(header) + 1 :]):
            raise BadImage(path, "broken image", "more pixels than its header says")
        return values, bits, done
    if syntax not in _IMAGECODECS:
        raise BadImage(path, "DICOM of an unknown encoding", f"transfer syntax {syntax.name}")
    frame = encaps.get_frame(header.PixelData, 0, number_of_frames=1)
    if (size := frame_size(frame)) and (size[:2] != (header.Columns, header.Rows) or size[2] > MAX_COMPONENTS):
        raise BadImage(path, "broken image", f"{size[0]} x {size[1]} x {size[2]} values, not as its header says")
    values, precision = _decode_frame(frame, syntax, header)
    if values.shape[:2] != (header.Rows, header.Columns):
        raise BadImage(path, "broken image", f"{values.shape[1]} x {values.shape[0]} pixels, not as its header says")
    samples = 1 if values.ndim == 2 else values.shape[2]
    if samples != header.SamplesPerPixel:
        raise BadImage(path, "broken image", f"{samples} values for a pixel, not as its header says")
    if values.ndim == 3:
        done = ()
        if samples != 3 or interpretation not in _COLOURS:
            raise BadImage(path, "DICOM of an unknown encoding", f"{samples} values for a pixel, {interpretation}")
        if interpretation in _YBR and syntax not in _LOSSY and not (syntax in _JPEG_2000 and _is_mixed(frame)):
            if values.dtype != np.uint8:
                raise BadImage(path, "DICOM of an unknown encoding", f"{interpretation} of more than 8 bits")
            values, done = convert_color_space(values, interpretation, "RGB"), (CONVERTED.format(interpretation),)
        return values, precision, done
    if precision > bits and int(values.max()) < 1 << bits:
        precision = bits  # words that are wider than what is in them
    return _signed(values, precision, int(header.get("PixelRepresentation", 0))), precision, ()


def _native_length(header: pydicom.Dataset) -> int:
    """Return the bytes of a frame that is not compressed, as long as they can be: part 5, 8.1.1."""
    bits: int = header.Rows * header.Columns * header.SamplesPerPixel * header.BitsAllocated
    return -(-bits // 8)


def _decode_frame(frame: bytes, syntax: uid.UID, header: pydicom.Dataset) -> tuple[npt.NDArray[Any], int]:
    """Decode a compressed frame as strictly as can be: pixels, and the bits that the codestream says they have."""
    import imagecodecs

    read: Callable[..., npt.NDArray[Any]] = getattr(imagecodecs, _IMAGECODECS[syntax])
    if syntax in _JPEG_2000:
        jpeg.check_end(frame)
        values = _high_throughput(frame) if syntax in _HIGH_THROUGHPUT else np.asarray(read(frame))
        return values, _jpeg_2000_bits(frame)
    precision = jpeg.frame_header(frame).precision
    if syntax in _LOSSY and precision == 8:
        pixels = jpeg.decode(frame)
        plain = _is_plain_rgb(frame, header)
        return np.asarray(read(frame, colorspace="RGB", outcolorspace="RGB")) if plain else pixels, precision
    jpeg.check_end(frame)
    values = np.asarray(read(frame))
    if syntax in _LOSSLESS:
        jpeg.check_lossless(frame, values)
    return values, precision


def _high_throughput(frame: bytes) -> npt.NDArray[Any]:
    """Decode HTJ2K. Raises ValueError for an error of the decoder that its wrapper passes over."""
    import imagecodecs

    passed_over: list[str] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda error: passed_over.append(str(error.exc_value))
    try:
        values = np.asarray(imagecodecs.htj2k_decode(frame, planar=False))  # else planes that are not mixed come first
    finally:
        sys.unraisablehook = hook
    if passed_over:
        raise ValueError(passed_over[0])
    return values


def _jpeg_2000_bits(frame: bytes) -> int:
    """Read the bits of the first component: ISO 15444-1, A.5.1."""
    return (int(frame[frame.index(_JPEG_2000_START) + 42]) & 0x7F) + 1


def _is_mixed(frame: bytes) -> bool:
    """Return whether a JPEG 2000 mixes its components, so that its decoder gives RGB: ISO 15444-1, A.6.1."""
    place = frame.find(b"\xff\x52", frame.index(_JPEG_2000_START))
    return place >= 0 and frame[place + 8] == 1


def _is_whole(number: Any) -> bool:
    """Return whether 32-bit values times this number, or plus it, are still integers of 64 bits."""
    return number is None or (float(number).is_integer() and abs(number) < 1 << 30)


def _is_plain_rgb(frame: bytes, header: pydicom.Dataset) -> bool:
    """Return whether a lossy JPEG holds RGB and only the DICOM header says so: decoders then take it for YCbCr.

    The JPEG itself decides first, by a complete Adobe segment (14 bytes) or by being JFIF, which is YCbCr.
    """
    if header.file_meta.TransferSyntaxUID not in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        return False
    segments = frame[: frame.find(b"\xff\xda")]  # those before the scan
    return (
        header.PhotometricInterpretation == "RGB"
        and b"\xff\xee\0\x0eAdobe" not in segments
        and b"JFIF\0" not in segments
    )


def _signed(values: npt.NDArray[Any], bits: int, signed: int) -> npt.NDArray[Any]:
    """Read words as two's complement of `bits` where the header says that they are signed, else without a sign."""
    if not signed:
        return (
            np.asarray(values & ((1 << bits) - 1)).astype(f"u{values.itemsize}") if values.dtype.kind == "i" else values
        )
    if values.dtype.kind == "i":
        return values
    shift = 8 * values.itemsize - bits
    return np.asarray((values << shift).view(f"i{values.itemsize}") >> shift)


def _window(header: pydicom.Dataset) -> Window | None:
    """Return the values that become black and white by the file's first window, or None without a valid one."""

    def first(name: str) -> float | None:
        value = header.get(name)
        value = value[0] if isinstance(value, pydicom.multival.MultiValue) and value else value
        return None if value in (None, "") else float(value)

    centre, width = first("WindowCenter"), first("WindowWidth")
    if centre is None or width is None or not np.isfinite([centre, width]).all():
        return None
    if header.get("VOILUTFunction", "LINEAR") == "LINEAR":  # part 3, C.11.2.1.2.1: the -0.5 and -1 are intended
        centre, width = centre - 0.5, width - 1
    return (centre - width / 2, centre + width / 2) if width > 0 else None


def _lookup_table(
    item: pydicom.Dataset, values: npt.NDArray[Any], header: pydicom.Dataset
) -> tuple[npt.NDArray[np.int64], int]:
    """Read a lookup table: its entries, and the value that the first of them is for."""
    length, first, _ = (int(number) for number in item.LUTDescriptor)
    length = length or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        words = ">u2" if header.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian else "<u2"
        table = np.frombuffer(data, np.uint8 if len(data) < 2 * length else words)[:length]
    else:
        table = np.atleast_1d(np.asarray(data))[:length]
    signed = int(header.get("PixelRepresentation", 0)) == 1 or values.min() < 0
    if signed and first > max(0x7FFF, values.max()):
        first -= 1 << 16  # the descriptor's words are unsigned, the pixels are signed
    return table.astype(np.int64), first


def _look_up(values: npt.NDArray[Any], table: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
    """Map values through a table; those before and behind it become its first and its last entry."""
    return np.asarray(table[np.clip(np.asarray(values, np.int64) - first, 0, len(table) - 1)])


def _finish(shown: npt.NDArray[Any], window: Window, bits: int, inverted: bool) -> RawImage:
    """Round pixels that a curve has mapped to 0..255; the window is only recorded."""
    pixels = np.asarray(np.rint(255 - shown if inverted else shown), np.uint8)
    return RawImage(pixels, bits, window[::-1] if inverted else window)
