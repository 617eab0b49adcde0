"""Decodes DICOM to a RawImage: one frame, stored values through the modality's transform, then the file's own window.

Pixel data are decoded by imagecodecs or, where uncompressed or RLE, by pydicom itself, so that the result does
not depend on which of pydicom's optional decoders happen to be installed. Of the header nothing but the modality is
handed on, and nothing reaches a shard.
"""

import dataclasses
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import encaps, uid
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

from shards.images.deflated import BoundedFile
from shards.images.frame_size import frame_size
from shards.images.raw_image import BadImage, RawImage, Window, check_size, merge_channels
from shards.images.windowing import percentile_window

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages quote the header

_IMAGECODECS = {  # transfer syntax: the decoder's name
    uid.JPEGBaseline8Bit: "jpeg_decode",
    uid.JPEGExtended12Bit: "jpeg_decode",
    uid.JPEGLossless: "ljpeg_decode",
    uid.JPEGLosslessSV1: "ljpeg_decode",
    uid.JPEGLSLossless: "jpegls_decode",
    uid.JPEGLSNearLossless: "jpegls_decode",
    uid.JPEG2000Lossless: "jpeg2k_decode",
    uid.JPEG2000: "jpeg2k_decode",
}
_NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
)
MAX_COMPONENTS = 4  # of a pixel
RESCALE = ("RescaleSlope", "RescaleIntercept")


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
    bits = int(header.BitsStored)
    stored = _pixels(header, path)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        coloured = np.asarray(apply_color_lut(stored, header))
        return RawImage(merge_channels((coloured >> (8 if coloured.max() > 255 else 0)).astype(np.uint8)), bits)
    if stored.ndim == 3:
        return RawImage(merge_channels(stored), bits)

    values = np.asarray(apply_modality_lut(stored, header))
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BadImage(path, "broken image", "values that are not numbers")
    if values.dtype.kind == "f" and all(_is_whole(header.get(name)) for name in RESCALE):
        values = values.astype(np.int64)  # pydicom returns fractions even where it adds nothing
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    if "VOILUTSequence" in header:
        return _through_table(values, header.VOILUTSequence[0], bits, inverted)
    window = _window(header)
    if window and header.get("VOILUTFunction") == "SIGMOID":
        centre, half = sum(window) / 2, (window[1] - window[0]) / 2
        shares = 1 / (1 + np.exp(-2 * (values.astype(np.float64) - centre) / half))
        return _finish(255 * shares, window, bits, inverted)
    if window is None and bits <= 8 and values.min() >= 0 and values.max() < 1 << bits:
        if bits == 8:
            plain = values.astype(np.uint8)
            return RawImage(255 - plain if inverted else plain, bits)
        window = (0.0, float((1 << bits) - 1))
    if window is None:
        image = stored != header.PixelPaddingValue if "PixelPaddingValue" in header else np.ones(stored.shape, bool)
        window = percentile_window(values[image] if image.any() else values)
    if values.dtype == np.uint8:
        values = values.astype(np.int16)  # still to be mapped, and Raw takes uint8 as done
    return RawImage(values, bits, window[::-1] if inverted else window)


def _pixels(header: pydicom.Dataset, path: Path | str) -> npt.NDArray[Any]:
    """Return the stored values: (rows, columns) or (rows, columns, 3) in RGB."""
    meta = getattr(header, "file_meta", None)
    syntax = meta.get("TransferSyntaxUID") if meta else None
    if syntax is None:  # a bare data set: nearly always this one
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = syntax = uid.ImplicitVRLittleEndian
    if syntax in _NATIVE:
        return np.asarray(header.pixel_array)
    if syntax not in _IMAGECODECS:
        raise BadImage(path, "DICOM of an unknown encoding", f"transfer syntax {syntax.name}")
    import imagecodecs

    read: Callable[..., npt.NDArray[Any]] = getattr(imagecodecs, _IMAGECODECS[syntax])
    frame = encaps.get_frame(header.PixelData, 0, number_of_frames=1)
    if (size := frame_size(frame)) and (size[:2] != (header.Columns, header.Rows) or size[2] > MAX_COMPONENTS):
        raise BadImage(path, "broken image", f"{size[0]} x {size[1]} x {size[2]} values, not as its header says")
    colours = {"colorspace": "RGB", "outcolorspace": "RGB"} if _is_plain_rgb(frame, header) else {}
    values = np.asarray(read(frame, **colours))
    if values.shape[:2] != (header.Rows, header.Columns):
        raise BadImage(path, "broken image", f"{values.shape[1]} x {values.shape[0]} pixels, not as its header says")
    if values.ndim == 3:
        return values[..., :3]
    return _signed(values, int(header.BitsStored), int(header.get("PixelRepresentation", 0)))


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
    """Read the decoders' unsigned words as two's complement of `bits` where the header says so."""
    if not signed or values.dtype.kind == "i":
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


def _through_table(values: npt.NDArray[Any], item: pydicom.Dataset, bits: int, inverted: bool) -> RawImage:
    """Apply a VOI lookup table; its lowest and highest entries become black and white."""
    length, first, depth = item.LUTDescriptor
    length = int(length) or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        table = np.frombuffer(data, np.uint8 if len(data) < 2 * length else "<u2")[:length]
    else:
        table = np.asarray(data)[:length]
    if np.issubdtype(values.dtype, np.signedinteger) and first > 0x7FFF:
        first -= 1 << 16  # the descriptor's words are unsigned, the pixels are signed
    places = np.clip(np.asarray(values, np.int64) - int(first), 0, len(table) - 1)
    low, high = float(table.min()), float(table.max())
    shown = 255 * (table[places] - low) / (high - low or 1.0)
    return _finish(shown, (float(first), float(first + len(table) - 1)), bits, inverted)


def _finish(shown: npt.NDArray[Any], window: Window, bits: int, inverted: bool) -> RawImage:
    """Round pixels that a curve has mapped to 0..255; the window is only recorded."""
    pixels = np.asarray(np.rint(255 - shown if inverted else shown), np.uint8)
    return RawImage(pixels, bits, window[::-1] if inverted else window)
