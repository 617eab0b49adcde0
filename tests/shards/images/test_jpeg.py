"""A JPEG that is damaged anywhere before its end marker is named; a whole one has Pillow's pixels."""

import io
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import encaps

from shards.datasets import phantom
from shards.images import jpeg
from shards.images.decoding import decode
from shards.images.raw_image import BadImage
from tests.shards.images.pictures import saved

pytestmark = pytest.mark.timeout(60)
LOSSLESS = Path(pydicom.__file__).parent / "data/test_files/SC_rgb_jpeg_gdcm.dcm"


def radiograph(side: int = 256) -> np.ndarray:
    """Return a drawn radiograph of 8 bits, with noise."""
    drawn = phantom.Picture(0, 1, "PA", side)().pixels.astype(np.float64) / 16
    return np.clip(drawn + np.random.default_rng(0).normal(0, 4, drawn.shape), 0, 255).astype(np.uint8)


GRAY = radiograph()
COLOUR = np.dstack([GRAY, GRAY.T, 255 - GRAY])
KINDS = {
    "gray": saved(GRAY, "JPEG", quality=95),
    "progressive": saved(GRAY, "JPEG", quality=90, progressive=True),
    "restarts": saved(GRAY, "JPEG", quality=90, restart_marker_blocks=8),
    "colour": saved(COLOUR, "JPEG", quality=90),
    "colour 4:4:4": saved(COLOUR, "JPEG", quality=90, subsampling=0),
    "CMYK": saved(COLOUR, "JPEG", mode="CMYK", quality=90),
    "turned": saved(
        GRAY[:200], "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_jpeg_has_the_pixels_of_pillow(kind: str) -> None:
    image = Image.open(io.BytesIO(KINDS[kind]))
    expected = np.asarray(image.convert("RGB") if image.mode == "CMYK" else image)
    pixels = decode(KINDS[kind]).pixels
    assert np.array_equal(pixels, np.rot90(expected, -1) if kind == "turned" else expected)
    assert np.array_equal(decode(KINDS[kind] + b"more behind the end").pixels, pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_zeroed_or_overwritten_block_is_named(kind: str) -> None:
    whole, rng = KINDS[kind], np.random.default_rng(0)
    scan, unseen, overwritten = whole.index(b"\xff\xda"), 0, 0
    for place in rng.integers(scan, len(whole) - 514, 20):
        before, behind = whole[:place], whole[place + 512 :]
        for damaged in (before + bytes(512) + behind, before + behind):
            unseen += _is_read(damaged)
        overwritten += _is_read(before + rng.bytes(512) + behind)
    assert unseen <= (4 if kind == "progressive" else 0)  # of 40
    assert overwritten <= 1  # of 20: one in a hundred has as many blocks of pixels as were there


def _is_read(data: bytes) -> bool:
    try:
        decode(data)
    except BadImage:
        return False
    return True


def test_a_long_row_of_zeros_is_no_damage_where_the_picture_is_constant() -> None:
    dark = np.zeros((1024, 1024), np.uint8)
    dark[400:500, 300:700] = radiograph(512)[:100, :400]
    for options in ({"optimize": True}, {"progressive": True}, {}):
        whole = saved(dark, "JPEG", quality=95, **options)
        assert np.array_equal(decode(whole).pixels, np.asarray(Image.open(io.BytesIO(whole))))
    assert bytes(64) in saved(dark, "JPEG", quality=95, optimize=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_early_end_is_named_with_and_without_its_marker(kind: str) -> None:
    whole = KINDS[kind]
    for share in (0.5, 0.9, 0.99):
        cut = whole[: int(share * len(whole))]
        for damaged in (cut, cut + b"\xff\xd9", cut + bytes(len(whole) - len(cut)), whole[:-2]):
            with pytest.raises(BadImage, match="broken image"):
                decode(damaged)


def test_lying_dimensions_are_named() -> None:
    whole = KINDS["gray"]
    place = whole.index(b"\xff\xc0") + 5
    for height, width, reason in (
        (9000, 9000, "broken"),
        (128, 256, "broken"),
        (256, 64, "broken"),
        (60000, 60000, "too large"),
    ):
        lying = whole[:place] + height.to_bytes(2) + width.to_bytes(2) + whole[place + 4 :]
        with pytest.raises(BadImage, match=reason):
            decode(lying)


def test_the_length_of_lossless_jpeg_fits_its_pixels() -> None:
    data = pydicom.dcmread(LOSSLESS)
    colour = encaps.get_frame(data.PixelData, 0, number_of_frames=1)
    deep = imagecodecs.ljpeg_encode((GRAY.astype(np.uint16) << 4) + GRAY % 16, bitspersample=12)
    rng = np.random.default_rng(0)
    for whole in (colour, deep):
        assert jpeg.frame_header(whole).precision == (8 if whole is colour else 12)
        jpeg.check_lossless(whole, imagecodecs.ljpeg_decode(whole))
        unseen = 0
        for place in rng.integers(whole.index(b"\xff\xda") + 20, len(whole) - 520, 30):
            before, behind = whole[:place], whole[place + 512 :]
            for damaged in (before + rng.bytes(512) + behind, before + behind, before + bytes(len(behind)), before):
                try:
                    jpeg.check_lossless(damaged, imagecodecs.ljpeg_decode(damaged))
                    unseen += 1
                except (ValueError, RuntimeError):
                    pass
        assert unseen <= 2  # of 120: a chance remains that the lengths agree
