"""An unpacked PNG is the same picture, and anything unusual is left to the decoder."""

import imagecodecs
import numpy as np
import pytest

from shards.images import png
from shards.images.decoding import decode
from tests.shards.images.pictures import RAMP, saved

pytestmark = pytest.mark.timeout(60)


# Every kind of PNG that unpack() meets: (mode or dtype, options)
KINDS = {
    "gray 8": saved((RAMP >> 8).astype(np.uint8)),
    "gray 16": saved(RAMP),
    "gray 1": saved((RAMP > 9000).astype(np.uint8) * 255, mode="1"),
    "palette": saved((RAMP >> 8).astype(np.uint8), mode="P"),
    "colour 8": saved(np.dstack([RAMP >> 8, RAMP & 255, RAMP >> 4 & 255]).astype(np.uint8)),
    "colour 16": imagecodecs.png_encode(np.dstack([RAMP, RAMP // 2, RAMP // 3])),
    "alpha 16": imagecodecs.png_encode(np.dstack([RAMP, RAMP, RAMP, RAMP])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_unpacked_png_holds_the_same_pixels(kind: str) -> None:
    unpacked = png.unpack(KINDS[kind])
    assert unpacked is not KINDS[kind]
    assert len(unpacked) > RAMP.size // 8  # inflated
    assert np.array_equal(imagecodecs.png_decode(unpacked), imagecodecs.png_decode(KINDS[kind]))
    assert png.unpack(unpacked) == unpacked


def test_a_large_png_is_unpacked_in_many_blocks_with_every_filter() -> None:
    smooth = np.cumsum(np.random.default_rng(0).integers(0, 50, (700, 900)), axis=1).astype(np.uint16)
    for level in (1, 9):
        packed = imagecodecs.png_encode(smooth, level=level)
        assert np.array_equal(imagecodecs.png_decode(png.unpack(packed)), smooth)
        assert np.array_equal(decode(packed).pixels, smooth)


def test_what_is_wrong_with_a_png_is_left_to_the_decoder() -> None:
    whole = KINDS["gray 16"]
    place = whole.index(b"IDAT") + 20
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for broken in (flipped, whole[:-12], whole[: len(whole) // 2], b"", png.SIGNATURE):
        assert png.unpack(broken) is broken
