"""Perceptual hashes of pictures: 256 bits that hardly change when a picture is saved again, resized or toned.

    fingerprint(pixels)                    # 32 bytes
    near(ours, theirs, LIMIT)              # rows of (i, j): ours[i] and theirs[j] show the same picture

A bit tells whether the picture, 64 x 64 and softened, grows brighter from a point to the right (128 bits) or downwards
(128 bits). That is the difference hash of Krawetz ("Kind of like that", 2013), adapted to chest radiographs, which all
look alike to it: more bits, a finer step, and none from the rim, where there are collimators, labels and empty space
instead of a patient. All arithmetic is in integers, so each machine computes the same bits.

A picture without structure, such as a black one, has the fingerprint BLANK, which is near to nothing.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

BYTES = 32
BLANK = bytes(BYTES)
# Bits that may differ. Measured on 22 radiographs: saved again as JPEG (quality 50 to 95), resized (x0.25 to x2), toned
# (gamma 0.8 to 1.25, windows, brightness), with a label in a corner: at most 16 of 256, median 2. Cut by 1% on all
# sides: at most 18; on two sides, which also shifts: 15 of 22 within the limit; by 2%: 6 of 22. Pictures of different
# patients: 57 or more; of phantoms, which are far more alike: 28 or more among 2,000 frontal ones, 23 or more among
# lateral ones.
LIMIT = 20

_SIDE = 64  # pixels
_RIM = 10  # pixels of 64 that are ignored
_STEP = 1  # pixel to either side of a point
_FINE, _COARSE = (np.linspace(_RIM, _SIDE - 1 - _RIM, count).round().astype(np.intp) for count in (16, 8))
_SOFTENED = 16  # the sum of the weights that soften a pixel by its neighbours
_CHUNK = 1 << 15  # pairs compared at a time: as many as fit into a core's cache


def fingerprint(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return the hash of an 8-bit picture, (height, width) or (height, width, 3): 32 bytes."""
    image = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    if (factor := min(image.size) // (2 * _SIDE)) > 1:
        image = image.reduce(factor)
    small = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)).astype(np.int32)
    for _ in range(2):  # down, then across
        padded = np.pad(small, ((1, 1), (0, 0)), mode="edge")
        small = (padded[:-2] + 2 * padded[1:-1] + padded[2:]).T
    across = small[_FINE[:, None], _COARSE + _STEP] - small[_FINE[:, None], _COARSE - _STEP]
    down = small[_COARSE[:, None] + _STEP, _FINE] - small[_COARSE[:, None] - _STEP, _FINE]
    steps = np.concatenate((across, down), axis=None)
    if np.count_nonzero(np.abs(steps) >= _SOFTENED) < steps.size // 4:  # most of it is one shade
        return BLANK
    return np.packbits(steps > 0).tobytes()


def near(
    fingerprints: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8], limit: int = LIMIT
) -> npt.NDArray[np.int64]:
    """Find the pairs of fingerprints (n, 32) and others (m, 32) that differ in at most `limit` bits.

    Returns (k, 2) rows of positions (in fingerprints, in others), ascending; BLANK ones are near to nothing. Every
    pair is compared, about 70 million a second; memory does not grow with n or m, but with k.
    """
    ours, theirs = (
        np.ascontiguousarray(rows, np.uint8).reshape(-1, BYTES).view(np.uint64) for rows in (fingerprints, others)
    )
    matches = [np.empty((0, 2), np.int64)]
    height = max(1, _CHUNK // max(1, len(theirs)))
    for top in range(0, len(ours), height):
        for left in range(0, len(theirs), _CHUNK):
            block, other = ours[top : top + height], theirs[left : left + _CHUNK]
            differ = np.zeros((len(block), len(other)), np.uint16)
            for word in range(BYTES // 8):
                differ += np.bitwise_count(block[:, None, word] ^ other[None, :, word])
            pairs = np.argwhere(differ <= limit)
            solid = block[pairs[:, 0]].any(axis=1) & other[pairs[:, 1]].any(axis=1)
            matches.append(pairs[solid] + (top, left))
    pairs = np.concatenate(matches)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
