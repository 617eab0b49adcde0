"""An unpacked PNG is the same picture, and whatever is wrong with one is named."""

import zlib

import imagecodecs
import numpy as np
import pytest

from shards.images import png
from shards.images.decoding import decode
from shards.images.raw_image import BadImage
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


def _interlaced() -> bytes:
    """Write a gray PNG of 20 x 20 pixels in Adam7's seven passes."""
    gray = (np.arange(400, dtype=np.uint8).reshape(20, 20) * 7).astype(np.uint8)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(
        b"\0" + row.tobytes() for top, left, down, across in passes for row in gray[top::down, left::across]
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (20).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 1])
    return png.SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


INTERLACED = _interlaced()


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


def _rewritten(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    """Change bytes of a PNG and make the checksum of its header right again."""
    changed = bytearray(data)
    for place, content in changes:
        changed[place : place + len(content)] = content
    changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4)
    return bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_with_a_png_is_named(kind: str) -> None:
    whole = KINDS[kind]
    pixels, end = whole.index(b"IDAT"), whole.index(b"IEND")
    length = int.from_bytes(whole[pixels - 4 : pixels])
    height = int.from_bytes(whole[20:24])

    def flipped(place: int) -> bytes:
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    faults = {
        "wrong checksum of IDAT": (flipped(pixels + 20), flipped(pixels + 4 + length)),
        "wrong checksum of IHDR": (flipped(29),),
        "wrong checksum of IEND": (flipped(end + 4),),
        "no end marker": (whole[:-12], whole[:-1], whole[: len(whole) // 2], png.SIGNATURE + whole[8:33]),
        "more of them than the header says": (_rewritten(whole, (20, (height // 2).to_bytes(4))),),
        "fewer pixels than the header says": (_rewritten(whole, (20, (2 * height).to_bytes(4))),),
        "no header": (png.SIGNATURE,),
    }
    if b"PLTE" in whole:
        faults["wrong checksum of PLTE"] = (flipped(whole.index(b"PLTE") + 9),)
    for fault, files in faults.items():
        for data in files:
            with pytest.raises(ValueError, match=fault):
                png.unpack(data)
            with pytest.raises(BadImage, match="broken image"):
                decode(data)


def test_pixels_in_pieces_and_unknown_critical_chunks_are_named() -> None:
    whole = KINDS["gray 8"]
    pixels, end = whole.index(b"IDAT") - 4, whole.index(b"IEND") - 4

    def chunk(kind: bytes) -> bytes:
        return (2).to_bytes(4) + kind + b"ab" + zlib.crc32(kind + b"ab").to_bytes(4)

    for data, fault in (
        (whole[:end] + chunk(b"teXt") + chunk(b"IDAT") + whole[end:], "pixels in pieces"),
        (whole[:end] + chunk(b"ABCD") + whole[end:], "a chunk of an unknown kind"),
        (whole[:pixels] + whole[end:], "no pixels"),
    ):
        with pytest.raises(ValueError, match=fault):
            png.unpack(data)
    noted = whole[:pixels] + chunk(b"teXt") + whole[pixels:]
    assert np.array_equal(decode(noted).pixels, decode(whole).pixels)
    with pytest.raises(ValueError, match="wrong checksum of teXt"):
        png.unpack(whole[:pixels] + chunk(b"teXt")[:-4] + bytes(4) + whole[pixels:])


def test_an_interlaced_png_is_checked_and_left_to_the_decoder() -> None:
    whole = INTERLACED
    assert png.unpack(whole) is whole
    assert decode(whole).pixels.shape == (20, 20)
    place = whole.index(b"IDAT")
    with pytest.raises(ValueError, match="wrong checksum"):
        png.unpack(whole[: place + 9] + bytes([whole[place + 9] ^ 1]) + whole[place + 10 :])
    with pytest.raises(ValueError, match="header says"):
        png.unpack(_rewritten(whole, (16, (19).to_bytes(4))))
