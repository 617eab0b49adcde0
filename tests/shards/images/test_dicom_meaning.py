"""DICOM means what the standard says: colours, stored bits, lookup tables, padding, and windows that leave nothing."""

from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydicom import uid
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.pixels.processing import convert_color_space

from shards.images import dicom
from shards.images.decoding import load
from shards.images.encoding import encode
from shards.images.raw_image import BadImage
from tests.shards.images.dicom_files import RAMP, write_dicom, write_frame

pytestmark = pytest.mark.timeout(60)
GRAY = (RAMP >> 4).astype(np.uint8)
COLOUR = np.dstack([GRAY, GRAY.T, 255 - GRAY])


def lossless_jpeg(pixels: np.ndarray) -> bytes:
    as_they_are = {"colorspace": "RGB", "outcolorspace": "RGB"} if pixels.ndim == 3 else {}
    return imagecodecs.jpeg_encode(pixels, lossless=True, predictor=1, **as_they_are)


CODECS = {  # of whatever pixels: how they are compressed, and the transfer syntax
    "JPEG-LS": (imagecodecs.jpegls_encode, uid.JPEGLSLossless),
    "lossless JPEG": (lossless_jpeg, uid.JPEGLosslessSV1),
    "JPEG 2000": (lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", mct=False), uid.JPEG2000Lossless),
    "HTJ2K": (lambda pixels: imagecodecs.htj2k_encode(pixels, rgb=False), uid.HTJ2KLossless),
}


@pytest.mark.parametrize("interpretation", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("codec", [*CODECS, "native", "RLE"])
def test_colours_are_converted_whatever_the_codec(tmp_path: Path, codec: str, interpretation: str) -> None:
    stored = np.asarray(convert_color_space(COLOUR, "RGB", interpretation)) if interpretation != "RGB" else COLOUR
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": interpretation}
    if codec == "native":
        path = write_dicom(tmp_path / "a.dcm", stored, **tags)
    elif codec == "RLE":
        path = write_dicom(tmp_path / "a.dcm", stored, **tags)
        data = pydicom.dcmread(path)
        data.compress(uid.RLELossless, generate_instance_uid=False)
        data.save_as(path)
    else:
        compress, syntax = CODECS[codec]
        path = write_frame(
            tmp_path / "a.dcm", compress(stored), stored, syntax, PhotometricInterpretation=interpretation
        )
    raw = load(path)
    assert np.abs(raw.pixels.astype(int) - COLOUR).max() <= 2  # rounded twice
    assert raw.done == (() if interpretation == "RGB" else ("colours converted from YBR_FULL",))
    assert encode(raw).view.done == raw.done


def test_a_gray_picture_in_ybr_is_gray(tmp_path: Path) -> None:
    stored = np.asarray(convert_color_space(np.dstack([GRAY] * 3), "RGB", "YBR_FULL"))
    for codec, (compress, syntax) in CODECS.items():
        path = write_frame(tmp_path / "a.dcm", compress(stored), stored, syntax, PhotometricInterpretation="YBR_FULL")
        assert np.array_equal(load(path).pixels, GRAY), codec


@pytest.mark.parametrize("interpretation", ["YBR_RCT", "YBR_FULL"])
@pytest.mark.parametrize("codec", ["JPEG 2000", "HTJ2K"])
def test_components_that_the_codestream_mixes_are_rgb_already(tmp_path: Path, codec: str, interpretation: str) -> None:
    if codec == "JPEG 2000":
        frame = imagecodecs.jpeg2k_encode(COLOUR, codecformat="j2k", mct=True)
    else:
        frame = imagecodecs.htj2k_encode(COLOUR, rgb=True)
    path = write_frame(tmp_path / "a.dcm", frame, COLOUR, CODECS[codec][1], PhotometricInterpretation=interpretation)
    assert np.array_equal(load(path).pixels, COLOUR)


def test_colours_that_are_not_known_and_components_that_are_not_there_are_named(tmp_path: Path) -> None:
    compress, syntax = CODECS["JPEG-LS"]
    path = write_frame(tmp_path / "a.dcm", compress(COLOUR), COLOUR, syntax, PhotometricInterpretation="HSV")
    with pytest.raises(BadImage, match=r"unknown encoding \(3 values for a pixel, HSV\)"):
        load(path)
    for frame, pixels in ((compress(GRAY), COLOUR), (compress(COLOUR), GRAY)):
        with pytest.raises(BadImage, match="not as its header says"):
            load(write_frame(tmp_path / "a.dcm", frame, pixels, syntax))


@pytest.mark.parametrize("codec", ["JPEG 2000", "HTJ2K", "JPEG-LS", "native"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("header", ["the same", 16])
def test_stored_bits_are_those_of_the_codestream(
    tmp_path: Path, codec: str, signed: bool, bits: int, header: str | int
) -> None:
    values = np.linspace(0, (1 << bits) - 1, 32 * 32).astype(np.int64).reshape(32, 32) - signed * (1 << (bits - 1))
    words = values.astype(np.int16 if signed else np.uint16)
    tags = {"BitsStored": bits if header == "the same" else header}
    tags["HighBit"] = int(tags["BitsStored"]) - 1
    if codec == "native":
        path = write_dicom(tmp_path / "a.dcm", words, PixelRepresentation=int(signed), **tags)
    else:
        if codec == "JPEG 2000":
            frame = imagecodecs.jpeg2k_encode(words, bitspersample=bits, codecformat="j2k")
        elif codec == "HTJ2K":
            frame, bits = imagecodecs.htj2k_encode(words), 16
        else:  # it knows no sign, and its encoder always says 16 bits
            frame = imagecodecs.jpegls_encode(words.view(np.uint16) & ((1 << int(tags["BitsStored"])) - 1))
        path = write_frame(tmp_path / "a.dcm", frame, words, CODECS[codec][1], **tags)
    assert np.array_equal(load(path).pixels.astype(np.int64), values)


def lookup_table(first: int, length: int, signed: bool, values: list[int]) -> pydicom.Sequence:
    item = pydicom.Dataset()
    words = np.int64(first).astype(np.int16 if signed else np.uint16)
    item.add_new("LUTDescriptor", "SS" if signed else "US", [length, int(words), 16])
    item.add_new("LUTData", "US", values)
    return pydicom.Sequence([item])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.sampled_from([0, 1, 100, 32767, 32768, 40000, 65000, 65535, -1, -500, -32768]),
    rescale=st.sampled_from([None, (1, 0), (2, -7), (1, -1024)]),
)
def test_lookup_tables_may_begin_anywhere(tmp_path: Path, first: int, rescale: tuple[int, int] | None) -> None:
    signed = first < 0
    words = np.clip(np.arange(32 * 32) + first - 200, *((-32768, 32767) if signed else (0, 65535))).reshape(32, 32)
    tags = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": int(signed)}
    if rescale:
        tags |= {"RescaleSlope": rescale[0], "RescaleIntercept": rescale[1]}
    table = lookup_table(first, 500, signed, list(range(0, 50000, 100)))
    path = write_dicom(
        tmp_path / "a.dcm", words.astype(np.int16 if signed else np.uint16), VOILUTSequence=table, **tags
    )
    values = words * rescale[0] + rescale[1] if rescale else words
    index = np.clip(values - first, 0, 499)
    raw = load(path)
    if index.min() == index.max():  # the table leaves nothing to see
        assert raw.done == ("window replaced by percentiles",)
    else:
        assert np.abs(raw.pixels - 255 * index / 499).max() <= 0.5


def test_an_empty_table_and_an_empty_rescaling_are_none(tmp_path: Path) -> None:
    window = {"WindowCenter": 1000.5, "WindowWidth": 401}
    empty = write_dicom(tmp_path / "a.dcm", VOILUTSequence=pydicom.Sequence([]), **window)
    assert load(empty).window == (800, 1200)
    for slope, intercept, expected in (("", "", RAMP), ("", -100, RAMP.astype(int) - 100), (2, "", RAMP * 2)):
        path = write_dicom(tmp_path / "a.dcm", RescaleSlope=slope, RescaleIntercept=intercept, **window)
        assert np.array_equal(load(path).pixels, expected)
        assert load(path).window == (800, 1200)
    nothing = write_dicom(tmp_path / "a.dcm", ModalityLUTSequence=pydicom.Sequence([]), **window)
    assert np.array_equal(load(nothing).pixels, RAMP)


@pytest.mark.parametrize(("value", "limit"), [(0, 100), (100, 0), (-60, 40), (0, None), (4000, 4095)])
def test_padding_may_be_a_range(tmp_path: Path, value: int, limit: int | None) -> None:
    signed = value < 0
    values = np.linspace(500, 3500, 32 * 32).astype(np.int16 if signed else np.uint16).reshape(32, 32)
    values[:, :8] = value
    values[:, 24:] = value if limit is None else (value + limit) // 2
    tags = {"PixelPaddingValue": value} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    raw = load(
        write_dicom(tmp_path / "a.dcm", values, PixelRepresentation=int(signed), BitsStored=16, HighBit=15, **tags)
    )
    assert raw.done == ("padding ignored",)
    assert 500 <= raw.window[0] < raw.window[1] <= 3500


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 50000, "WindowWidth": 100},
        {"WindowCenter": -900, "WindowWidth": 100},
        {"WindowCenter": 50000, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 1e7, "WindowWidth": 10, "VOILUTFunction": "SIGMOID"},
        {"VOILUTSequence": lookup_table(0, 3, False, [7, 7, 7])},
        {"VOILUTSequence": lookup_table(60000, 3, False, [0, 7, 70])},
    ],
)
def test_a_mapping_that_leaves_nothing_gives_way_to_the_percentiles(
    tmp_path: Path, tags: dict[str, object], inverted: bool
) -> None:
    interpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    raw = load(write_dicom(tmp_path / "a.dcm", PhotometricInterpretation=interpretation, **tags))
    assert raw.done == ("window replaced by percentiles",)
    assert encode(raw).view.done == raw.done
    assert raw.window == ((4072, 20) if inverted else (20, 4072))
    if "VOILUTSequence" in tags:  # but a window beside it is taken
        raw = load(write_dicom(tmp_path / "a.dcm", WindowCenter=1000.5, WindowWidth=401, **tags))
        assert (raw.window, raw.done) == ((800, 1200), ())


def test_what_is_behind_the_pixels_is_named(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    data = pydicom.dcmread(path)
    data.PixelData += b"\1\2" * 40
    data.save_as(path)
    with pytest.raises(BadImage, match="more pixels than its header says"):
        load(path)


def test_tables_agree_with_those_of_pydicom(tmp_path: Path) -> None:
    table = lookup_table(1000, 1024, False, list(range(0, 10240, 10)))
    path = write_dicom(tmp_path / "a.dcm", VOILUTSequence=table, RescaleSlope=1, RescaleIntercept=0)
    data = pydicom.dcmread(path)
    theirs = apply_voi_lut(apply_modality_lut(data.pixel_array, data).astype(np.int64), data)
    assert np.abs(load(path).pixels - 255 * (theirs / 10230)).max() <= 0.5
    assert dicom.REPLACED not in load(path).done
