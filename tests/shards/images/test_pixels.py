"""Every kind of raw image gets into eight bits without losing what is seen; every broken one is named."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from radhpc.core import image_decoding
from shards.images import png
from shards.images.decoding import decode, load
from shards.images.encoding import ImageFormat, ImageSettings, encode, shrink
from shards.images.perceptual_hash import fingerprint
from shards.images.raw_image import BadImage, RawImage
from shards.images.windowing import apply_window, percentile_window

pytestmark = pytest.mark.timeout(60)
RAMP = (np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 16 + 500).astype(np.uint16)  # 500 to 49,636


def saved(pixels: np.ndarray, form: str = "PNG", mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def seen(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)


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


def test_constant_images_do_not_divide_by_zero() -> None:
    for value in (0, 700, 65535):
        jpeg, view, *_ = encode(RawImage(np.full((20, 20), value, np.uint16), 16))
        assert seen(jpeg).max() == 0
        assert view.window == (value, value)
    nearly = np.full((100, 100), 700, np.uint16)
    nearly[50, 50] = 900  # less than half a percent: the percentiles coincide
    assert apply_window(nearly)[1] == (700, 900)


def test_shrinks_to_the_longest_side_and_never_enlarges() -> None:
    jpeg, view, *_ = encode(RawImage(np.zeros((300, 200), np.uint8)), ImageSettings(100))
    assert (view.width, view.height) == (67, 100)
    assert seen(jpeg).shape == (100, 67)
    assert encode(RawImage(np.zeros((300, 200), np.uint8)), ImageSettings(1000)).view.height == 300
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 200).astype(np.uint8)
    # averages, not single pixels
    assert (
        np.abs(seen(encode(RawImage(checks), ImageSettings(16)).data) - 100).max() <= 2
    )  # averages, not single pixels


def test_the_same_pixels_give_the_same_bytes() -> None:
    raw = decode(saved(RAMP))
    assert encode(raw, ImageSettings(40)) == encode(raw, ImageSettings(40))


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from([np.uint16, np.int16, np.int32]),
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        elements=st.integers(-3000, 30000).map(abs),
    )
)
def test_the_table_gives_what_arithmetic_gives(pixels: np.ndarray) -> None:
    shown, window = apply_window(pixels)
    slow, same = apply_window(pixels.astype(np.float64))
    assert window == same
    assert np.array_equal(shown, slow)
    order = np.argsort(pixels, axis=None)
    assert (np.diff(shown.ravel()[order].astype(int)) >= 0).all()
    wanted = np.percentile(pixels, (0.5, 99.5), method="inverted_cdf")
    assert window == (tuple(wanted) if wanted[0] != wanted[1] else (pixels.min(), pixels.max()))


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.int16, (5, 7), elements=st.integers(-32768, 32767)),
    st.floats(-1e5, 1e5),
    st.floats(-1e5, 1e5),
)
def test_a_window_upside_down_inverts(pixels: np.ndarray, black: float, white: float) -> None:
    shown, window = apply_window(pixels, (black, white))
    assert window == (black, white)
    inverted, _ = apply_window(pixels, (white, black))
    if black != white:
        assert np.abs(shown.astype(int) + inverted - 255).max() <= 1


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


def test_a_16_bit_png_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = decode(saved(RAMP, exif=exif))
    assert raw.bits == 16
    assert np.array_equal(raw.pixels, np.rot90(RAMP, -1))


def before_compression(raw: RawImage, side: int) -> np.ndarray:
    """The pixels of which the JPEG path makes a JPEG, found without its code: shrink, percentiles, formula."""
    image = Image.fromarray(raw.pixels)
    height, width = raw.pixels.shape
    factor = min(1, side / max(height, width))
    small = np.asarray(image.resize((round(width * factor), round(height * factor)), Image.Resampling.BOX)).astype(
        float
    )
    black, white = raw.window or np.percentile(small, (0.5, 99.5), method="inverted_cdf")
    return np.rint(255 * np.clip((small - black) / (white - black), 0, 1)).astype(np.uint8)


@pytest.mark.parametrize("form", ["png16", "jxl16"])
@pytest.mark.parametrize("window", [None, (900.0, 30000.5), (40000.0, 2000.0)])
def test_16_bits_are_shown_as_the_jpeg_was_before_its_compression(
    form: ImageFormat, window: tuple[float, float]
) -> None:
    noisy = RAMP + np.random.default_rng(1).integers(0, 3000, RAMP.shape).astype(np.uint16)
    raw = RawImage(noisy, 16, window)
    data, view, suffix, printed = encode(raw, ImageSettings(40, 95, form))
    assert suffix == form.removesuffix("16")
    stored = imagecodecs.png_decode(data) if form == "png16" else imagecodecs.jpegxl_decode(data)
    assert stored.dtype == np.uint16
    assert len(np.unique(stored)) > 256
    shown = np.asarray(image_decoding.decode(data, view))
    assert np.array_equal(shown, before_compression(raw, 40))
    jpeg, described, *_ = encode(raw, ImageSettings(40, 100))
    assert np.abs(seen(jpeg) - shown).max() <= 2
    assert (described, fingerprint(shown)) == (view, printed)


@pytest.mark.parametrize("form", ["png16", "jxl16"])
@pytest.mark.parametrize(
    "pixels",
    [RAMP.astype(np.int32) - 30000, RAMP.astype(np.int32) * 7, RAMP * 0.37 - 1000],
    ids=["negative", "wide", "fractions"],
)
def test_values_beyond_16_bits_are_shown_as_by_the_jpeg_path(form: ImageFormat, pixels: np.ndarray) -> None:
    window = (float(np.quantile(pixels, 0.1)), float(np.quantile(pixels, 0.8)))
    for own in (None, window):
        raw = RawImage(pixels, 16, own)
        data, view, *_ = encode(raw, ImageSettings(1120, 95, form))
        shown = np.asarray(image_decoding.decode(data, view)).astype(int)
        exact, used = apply_window(pixels, own)
        assert np.abs(shown - exact).max() <= (0 if pixels.dtype.kind == "i" and np.ptp(pixels) < 65536 else 1)
        described = encode(raw).view.window
        assert described is not None
        assert np.allclose(described, used, atol=np.ptp(pixels) / 65535)  # of a JPEG: in raw values


@pytest.mark.parametrize("form", ["png16", "jxl16"])
def test_eight_bits_and_colour_are_kept_without_loss(form: ImageFormat) -> None:
    gray, colour = (RAMP >> 8).astype(np.uint8), np.dstack([RAMP, RAMP // 2, RAMP // 3])
    for pixels in (gray, (colour >> 8).astype(np.uint8)):
        data, view, *_ = encode(RawImage(pixels), ImageSettings(1120, 95, form))
        assert view.window is None
        assert np.array_equal(np.asarray(image_decoding.decode(data, view)), pixels)
    data, view, *_ = encode(RawImage(colour, 16), ImageSettings(1120, 95, form))
    assert np.array_equal(np.asarray(image_decoding.decode(data, view)), apply_window(colour)[0])
    curve = RawImage(gray, 12, (100.0, 200.0))  # a DICOM's curve has been applied: the window is for the record
    data, view, *_ = encode(curve, ImageSettings(1120, 95, form))
    assert view.window == (100, 200)
    assert np.array_equal(np.asarray(image_decoding.decode(data, view)), gray)


@pytest.mark.parametrize("form", ["png16", "jxl16"])
def test_a_damaged_16_bit_member_is_an_oserror(form: ImageFormat) -> None:
    data, view, *_ = encode(RawImage(RAMP, 16), ImageSettings(1120, 95, form))
    for broken in (data[: len(data) // 2], data[:60] + b"?" * 40 + data[100:]):
        with pytest.raises(OSError, match="broken image"):
            image_decoding.decode(broken, view)


def test_area_averages_keep_16_bits() -> None:
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 30001 + 10).astype(np.uint16)
    assert set(shrink(checks, 16).ravel()) <= {15010, 15011}  # the mean is 15,010.5
    coloured = shrink(np.dstack([checks, checks // 2, checks // 3]), 16)
    assert coloured.shape == (16, 16, 3)
    assert coloured.dtype == np.uint16
    assert abs(int(coloured[3, 3, 1]) - 7505) <= 1


def test_a_stream_shows_16_bit_shards_as_their_jpegs_were_before_compression(tmp_path: Path) -> None:
    from radhpc.data.source import Source
    from shards.build import BuildSettings, build

    shown = {}
    for form in ("jpeg", "png16", "jxl16"):
        out = str(tmp_path / form)
        build("phantom", None, out, {"studies": "8", "size": "80"}, BuildSettings(workers=1, image_format=form))
        source = Source((out,), "train")
        shown[form] = [np.asarray(view).astype(int) for n in range(len(source)) for view in source.read(n)[2]]
    assert len(shown["jpeg"]) >= 4
    for jpeg, png16, jxl16 in zip(*shown.values(), strict=True):
        assert np.array_equal(png16, jxl16)
        assert 0 < np.abs(jpeg - png16).max() < 16
        assert np.abs(jpeg - png16).mean() < 2
