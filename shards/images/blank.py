"""Recognises pictures of nothing: all black, all white, any one shade, and such a picture inside constant borders.

    fault(pixels)    # "one value", "constant borders only", or None for a picture

Enters: a picture of 8 bits as it will be shown, after the window. What has no more than that to show is no sample.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

REASON = "picture of nothing"
_NOISE = 3  # levels of 255 by which a picture of one value may vary: noise of one, and what JPEG makes of it
_RINGING = 8  # levels: what JPEG leaves beside the edge of a border
_BORDERS = 4  # inside each other
_STEP = 8  # pixels: what is not blank at every eighth is not blank


def fault(pixels: npt.NDArray[Any]) -> str | None:
    """Return what is wrong with a picture (height, width) or (height, width, 3), or None."""
    planes = [pixels] if pixels.ndim == 2 else [pixels[..., n] for n in range(pixels.shape[2])]
    if not all(_is_bordered(plane[::_STEP, ::_STEP]) for plane in planes):
        return None
    if all(int(plane.max()) - int(plane.min()) <= _NOISE for plane in planes):
        return "one value"
    return "constant borders only" if all(map(_is_bordered, planes)) else None


def _is_bordered(pixels: npt.NDArray[Any]) -> bool:
    """Return whether nothing remains where borders of one shade are taken off, from the outermost inwards."""
    if int(pixels.max()) - int(pixels.min()) <= _RINGING:
        return int(pixels.max()) - int(pixels.min()) <= _NOISE
    for _ in range(_BORDERS):
        content = np.abs(pixels.astype(np.int32) - int(pixels[0, 0])) > _RINGING
        rows, columns = (np.flatnonzero(content.any(axis=axis)) for axis in (1, 0))
        if not rows.size:
            return True
        inner = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if inner.shape == pixels.shape:
            return False
        pixels = inner
    return False
