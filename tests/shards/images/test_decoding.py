"""Every kind of raw image is decoded without losing what is seen; every broken one is named."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from shards.images.decoding import decode, load
from shards.images.encoding import encode
from shards.images.raw_image import BadImage
from shards.images.windowing import percentile_window
from tests.shards.images.pictures import RAMP, saved, seen

pytestmark = pytest.mark.timeout(60)


def test_16_bit_gray_does_not_saturate() -> None:
    raw = decode(saved(RAMP))
    assert raw.pixels.dtype == np.uint16
    assert np.array_equal(raw.pixels, RAMP)
    jpeg, view, *_ = encode(raw)
    shown = seen(jpeg)
    assert (shown == 255).mean() < 0.02
    assert (shown == 0).mean() < 0.02
    assert len(np.unique(shown)) > 200
    assert view.source_bits == 16
    assert view.window == percentile_window(RAMP)
    black, white = view.window
    repeated = np.rint(255 * np.clip((RAMP - black) / (white - black), 0, 1))
    assert np.abs(repeated - shown).max() <= 4  # what JPEG changes


def test_16_bit_colour_keeps_its_lower_bits_and_equal_channels_become_gray() -> None:
    colour = np.stack([RAMP, RAMP // 2, RAMP // 3], axis=2)
    assert np.array_equal(decode(imagecodecs.png_encode(colour)).pixels, colour)
    gray = decode(imagecodecs.png_encode(np.stack([RAMP] * 3, axis=2)))
    assert np.array_equal(gray.pixels, RAMP)
    alpha = np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 65535)])
    assert np.array_equal(decode(imagecodecs.png_encode(alpha)).pixels, RAMP)
    jpeg, view, *_ = encode(decode(imagecodecs.png_encode(colour)))
    assert seen(jpeg).shape == (48, 64, 3)
    assert view.source_bits == 16


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA"])
def test_gray_in_any_dress_stays_gray_and_as_it_is(mode: str) -> None:
    gray = (RAMP >> 8).astype(np.uint8)
    raw = decode(saved(gray, mode=mode))
    assert np.array_equal(raw.pixels, gray)
    jpeg, view, *_ = encode(raw)
    assert Image.open(io.BytesIO(jpeg)).mode == "L"
    assert (view.window, view.source_bits) == (None, 8)


def test_colour_stays_colour() -> None:
    colour = np.zeros((32, 32, 3), np.uint8)
    colour[:, 16:, 0] = 255
    assert np.array_equal(decode(saved(colour)).pixels, colour)
    assert decode(saved(colour, "JPEG", quality=95)).pixels.shape == (32, 32, 3)
    assert decode(saved(colour, "JPEG", mode="CMYK")).pixels.shape == (32, 32, 3)
    assert decode(saved(colour, mode="P")).pixels.shape == (32, 32, 3)


def test_one_bit_and_transparent_images() -> None:
    checks = np.indices((32, 32)).sum(axis=0) % 2 * 255
    assert np.array_equal(decode(saved(checks.astype(np.uint8), mode="1")).pixels, checks)
    hidden = np.dstack([np.full((32, 32), 200, np.uint8)] * 3 + [np.tile(np.uint8([0, 255]), (32, 16))])
    assert set(decode(saved(hidden)).pixels.ravel()) == {0, 200}


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (20, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    raw = decode(buffer.getvalue())
    assert raw.pixels.shape == (40, 20)
    assert raw.pixels[-1, 10] > raw.pixels[0, 10]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "PNG16"])
def test_truncated_files_are_named(form: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 65536, (64, 64)).astype(np.uint16)
    whole = saved(noise) if form == "PNG16" else saved((noise >> 8).astype(np.uint8), form)
    with pytest.raises(BadImage, match="broken image|neither"):
        decode(whole[: int(len(whole) * share)], "a.png")


def test_a_flipped_byte_in_a_png_is_named() -> None:
    whole = bytearray(saved(RAMP))
    whole[len(whole) // 2] ^= 0x40
    with pytest.raises(BadImage, match="broken image"):
        decode(bytes(whole))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (11_000, 60_000):
        size = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(100)))
        with pytest.raises(BadImage, match="image too large"):
            decode(bomb)


def test_small_and_foreign_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"image too small \(15 x 40 pixels\)"):
        decode(saved(np.zeros((40, 15), np.uint8)))
    with pytest.raises(BadImage, match="empty file"):
        decode(b"")
    with pytest.raises(BadImage, match="neither JPEG, PNG nor DICOM"):
        decode(b"GIF89a and more")
    with pytest.raises(BadImage, match="missing image file"):
        load(tmp_path / "no.png")
    with pytest.raises(BadImage, match="unreadable image file"):
        load(tmp_path)


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "image.dcm"
    path.write_bytes(saved(RAMP))
    assert np.array_equal(load(path).pixels, RAMP)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "PNG16", "DICOM"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_files_are_read_or_named(form: str, damage: list[tuple[float, int]]) -> None:
    whole = bytearray(WHOLE[form])
    for place, byte in damage:
        whole[int(place * (len(whole) - 1))] = byte
    try:
        encode(decode(bytes(whole)))
        reason = None
    except BadImage as error:
        reason = error.reason
    assert reason is None or reason in REASONS


WHOLE = {
    "PNG": saved((RAMP >> 8).astype(np.uint8)),
    "JPEG": saved((RAMP >> 8).astype(np.uint8), "JPEG"),
    "PNG16": saved(RAMP),
    "DICOM": (Path(pydicom.__file__).parent / "data/test_files/MR_small_RLE.dcm").read_bytes(),
}


REASONS = {
    "broken image", "image too small", "image too large", "neither JPEG, PNG nor DICOM", "DICOM of several frames",
    "DICOM without pixel data", "DICOM of an unknown encoding",
}  # fmt: skip


def test_a_16_bit_png_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = decode(saved(RAMP, exif=exif))
    assert raw.bits == 16
    assert np.array_equal(raw.pixels, np.rot90(RAMP, -1))
