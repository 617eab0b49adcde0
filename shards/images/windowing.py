"""Windowing: maps raw values of any depth to 8 bits, by a given window or by the percentiles of the pixels.

    shown, window = apply_window(pixels)                # uint8, and the window (black, white) that was used
    shown, _ = apply_window(pixels, (900.0, 3100.0))

A value becomes round(255 * clip((value - black) / (white - black), 0, 1)); black above white inverts.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from radhpc.core.image_decoding import scale_window
from shards.images.raw_image import Window

PERCENTILES = (0.5, 99.5)  # of the pixels: become black and white


def apply_window(pixels: npt.NDArray[Any], window: Window | None = None) -> tuple[npt.NDArray[np.uint8], Window]:
    """Map raw values to 0..255 by the window, or by that of the percentiles where it is None.

    A constant image becomes black. Returns the pixels and the window that was used.
    """
    if window is None:
        window = percentile_window(pixels)
    if span := _table_range(pixels):
        lowest, length = span
        table = scale_window(np.arange(lowest, lowest + length), window)
        return table.take(pixels if lowest == 0 else pixels.astype(np.int64) - lowest), window
    return scale_window(pixels, window), window


def percentile_window(pixels: npt.NDArray[Any]) -> Window:
    """Return the smallest values that 0.5% and 99.5% of the pixels do not exceed; the extremes if these are equal."""
    if span := _table_range(pixels):
        lowest, length = span
        values: npt.NDArray[Any] = np.arange(lowest, lowest + length)
        shifted = pixels.ravel() if lowest == 0 else pixels.ravel().astype(np.int64) - lowest
        counts = np.cumsum(np.bincount(shifted, minlength=length))
    else:
        values = np.sort(pixels, axis=None)
        counts = np.arange(1, values.size + 1)
    ranks = [np.ceil(int(counts[-1]) * percent / 100) for percent in PERCENTILES]
    black, white = (float(values[np.searchsorted(counts, rank)]) for rank in ranks)
    if black == white:  # nearly constant: the few other pixels are the content
        return float(pixels.min()), float(pixels.max())
    return black, white


def _table_range(pixels: npt.NDArray[Any]) -> tuple[int, int] | None:
    """Return (first value, length) of a lookup table over all values of integer pixels: faster than float arithmetic.

    None where the values are not integers, or their range is too wide.
    """
    if pixels.dtype.kind not in "iu":
        return None
    lowest, highest = min(int(pixels.min()), 0), int(pixels.max())
    return (lowest, highest - lowest + 1) if highest - lowest < 1 << 16 else None
