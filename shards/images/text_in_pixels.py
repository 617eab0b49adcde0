"""Finds what looks like text that was written into the pixels of a radiograph, near its edges.

    find_text(pixels)         # (12, 3, 204, 35): left, top, right, bottom in pixels; None where nothing looks like it

Letters have strokes: several steps of brightness from one pixel to the next in every row, side by side, which anatomy,
noise, tubes and the letter of a side marker do not have. So steps are counted in tiles of 8 x 32 pixels, at full, half
and quarter size for letters of 10 to 80 pixels, and two neighbouring tiles with many of them are a suspicion. The
middle of the image is not looked at, and faint, tiny or turned letters are not seen: a warning, no proof of anything.
"""

import numpy as np
import numpy.typing as npt

Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels, the last two exclusive

_STEP = 40  # of 255: between neighbours in a row, for the edge of a stroke
_TILE = (8, 32)  # rows, columns
_MANY = 48  # steps in each of two neighbouring tiles: three in a row on average
_SCALES = (1, 2, 4)  # every so many pixels of a row and a column are looked at
_FRAME = 4  # a quarter of the image at each side is its frame


def find_text(pixels: npt.NDArray[np.uint8]) -> Box | None:
    """Return the box around the tiles of an 8-bit image, (h, w) or (h, w, 3), that look like text; None for none."""
    gray = pixels if pixels.ndim == 2 else pixels[..., 1]
    boxes = [box for scale in _SCALES if (box := _find_at(np.ascontiguousarray(gray[::scale, ::scale]), scale))]
    if not boxes:
        return None
    left, top, right, bottom = zip(*boxes, strict=True)
    height, width = gray.shape
    return min(left), min(top), min(width, max(right)), min(height, max(bottom))


def _find_at(gray: npt.NDArray[np.uint8], scale: int) -> Box | None:
    """Return the box of the suspicious pairs of tiles, in pixels of the full image."""
    down, across = gray.shape[0] // _TILE[0], (gray.shape[1] - 1) // _TILE[1]
    if not down or across < 2:
        return None
    height, width = down * _TILE[0], across * _TILE[1]
    right, left = gray[:height, 1 : width + 1], gray[:height, :width]
    steps = ((np.maximum(right, left) - np.minimum(right, left)) >= _STEP).view(np.uint8)  # no signed copy: it is slow
    by_rows = steps.reshape(down, _TILE[0], width).sum(axis=1, dtype=np.uint8)
    counts = by_rows.reshape(down, across, _TILE[1]).sum(axis=2, dtype=np.uint16)
    suspicious = np.minimum(counts[:, 1:], counts[:, :-1]) >= _MANY  # a tile and its right neighbour
    suspicious[down // _FRAME : down - down // _FRAME, across // _FRAME : across - 1 - across // _FRAME] = False
    if not suspicious.any():
        return None
    rows, columns = np.nonzero(suspicious)
    y, x = _TILE[0] * scale, _TILE[1] * scale
    return int(columns.min()) * x, int(rows.min()) * y, (int(columns.max()) + 2) * x, (int(rows.max()) + 1) * y
