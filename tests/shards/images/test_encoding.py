"""Images are shrunk, windowed and compressed; 16 bits keep what eight bits show."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from radhpc.core import image_decoding
from shards.images.decoding import decode
from shards.images.encoding import EncodingSettings, ImageFormat, encode, shrink
from shards.images.perceptual_hash import fingerprint
from shards.images.raw_image import RawImage
from shards.images.windowing import apply_window
from tests.shards.images.pictures import RAMP, saved, seen

pytestmark = pytest.mark.timeout(60)


def test_shrinks_to_the_longest_side_and_never_enlarges() -> None:
    tall = np.arange(300 * 200, dtype=np.uint32).reshape(300, 200).astype(np.uint8)
    jpeg, view, *_ = encode(RawImage(tall), EncodingSettings(100))
    assert (view.width, view.height) == (67, 100)
    assert seen(jpeg).shape == (100, 67)
    assert encode(RawImage(tall), EncodingSettings(1000)).view.height == 300
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 200).astype(np.uint8)
    assert np.abs(shrink(checks, 16).astype(int) - 100).max() <= 2  # averages, not single pixels


def test_the_same_pixels_give_the_same_bytes() -> None:
    raw = decode(saved(RAMP))
    assert encode(raw, EncodingSettings(40)) == encode(raw, EncodingSettings(40))


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
    data, view, suffix, printed, *_ = encode(raw, EncodingSettings(40, 95, form))
    assert suffix == form.removesuffix("16")
    stored = imagecodecs.png_decode(data) if form == "png16" else imagecodecs.jpegxl_decode(data)
    assert stored.dtype == np.uint16
    assert len(np.unique(stored)) > 256
    shown = np.asarray(image_decoding.decode(data, view))
    assert np.array_equal(shown, before_compression(raw, 40))
    jpeg, described, *_ = encode(raw, EncodingSettings(40, 100))
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
        data, view, *_ = encode(raw, EncodingSettings(1120, 95, form))
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
        data, view, *_ = encode(RawImage(pixels), EncodingSettings(1120, 95, form))
        assert view.window is None
        assert np.array_equal(np.asarray(image_decoding.decode(data, view)), pixels)
    data, view, *_ = encode(RawImage(colour, 16), EncodingSettings(1120, 95, form))
    assert np.array_equal(np.asarray(image_decoding.decode(data, view)), apply_window(colour)[0])
    curve = RawImage(gray, 12, (100.0, 200.0))  # a DICOM's curve has been applied: the window is for the record
    data, view, *_ = encode(curve, EncodingSettings(1120, 95, form))
    assert view.window == (100, 200)
    assert np.array_equal(np.asarray(image_decoding.decode(data, view)), gray)


@pytest.mark.parametrize("form", ["png16", "jxl16"])
def test_a_damaged_16_bit_member_is_an_oserror(form: ImageFormat) -> None:
    data, view, *_ = encode(RawImage(RAMP, 16), EncodingSettings(1120, 95, form))
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
