"""Finds what looks like text that was written into the pixels of a radiograph, near its edges.

    find_text(pixels)         # ((12, 3, 204, 35),): left, top, right, bottom in pixels; () where nothing looks like it

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


def find_text(pixels: npt.NDArray[np.uint8]) -> tuple[Box, ...]:
    """Return the places of an 8-bit image, (h, w) or (h, w, 3), that look like text: one for each quarter at most."""
    gray = pixels if pixels.ndim == 2 else pixels[..., 1]
    height, width = gray.shape
    pairs = np.concatenate([_find_at(np.ascontiguousarray(gray[::scale, ::scale]), scale) for scale in _SCALES])
    if not len(pairs):
        return ()
    below, beside = pairs[:, 1] + pairs[:, 3] > height, pairs[:, 0] + pairs[:, 2] > width
    boxes = []
    for quarter in range(4):
        if len(own := pairs[2 * below + beside == quarter]):
            (left, top), (right, bottom) = own[:, :2].min(axis=0).tolist(), own[:, 2:].max(axis=0).tolist()
            boxes.append((left, top, min(width, right), min(height, bottom)))
    return tuple(boxes)


def _find_at(gray: npt.NDArray[np.uint8], scale: int) -> npt.NDArray[np.int64]:
    """Return the boxes of suspicious pairs of tiles, (n, 4), in pixels of the full image."""
    none = np.empty((0, 4), np.int64)
    down, across = gray.shape[0] // _TILE[0], (gray.shape[1] - 1) // _TILE[1]
    if not down or across < 2:
        return none
    height, width = down * _TILE[0], across * _TILE[1]
    right, left = gray[:height, 1 : width + 1], gray[:height, :width]
    steps = ((np.maximum(right, left) - np.minimum(right, left)) >= _STEP).view(np.uint8)  # no signed copy: it is slow
    by_rows = steps.reshape(down, _TILE[0], width).sum(axis=1, dtype=np.uint8)
    counts = by_rows.reshape(down, across, _TILE[1]).sum(axis=2, dtype=np.uint16)
    suspicious = np.minimum(counts[:, 1:], counts[:, :-1]) >= _MANY  # a tile and its right neighbour
    suspicious[down // _FRAME : down - down // _FRAME, across // _FRAME : across - 1 - across // _FRAME] = False
    if not suspicious.any():
        return none
    rows, columns = np.nonzero(suspicious)
    y, x = _TILE[0] * scale, _TILE[1] * scale
    return np.stack([columns * x, rows * y, (columns + 2) * x, (rows + 1) * y], axis=1)
