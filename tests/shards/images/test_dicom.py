"""DICOM in the encodings that archives use: real files that pydicom and pydicom-data carry, and made ones."""

import io
import json
from pathlib import Path

import data_store
import imagecodecs
import numpy as np
import pydicom
import pydicom.pixels
import pytest
from PIL import Image

from shards.build import BuildSettings, build
from shards.images.decoding import load
from shards.images.encoding import EncodingSettings, encode
from shards.images.raw_image import BadImage
from shards.images.windowing import apply_window
from tests.shards.images.dicom_files import RAMP, write_dicom

pytestmark = pytest.mark.timeout(60)
MORE = Path(data_store.__file__).parent / "data"
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"


def shown(path: Path) -> np.ndarray:
    raw = load(path)
    return raw.pixels if raw.pixels.dtype == np.uint8 else apply_window(raw.pixels, raw.window)[0]


def test_a_real_chest_radiograph_is_hung_bright_on_dark_in_every_encoding() -> None:
    raw = load(MORE / "RG1_UNCR.dcm")  # MONOCHROME1, with a window
    assert raw.window == (29999, 0)  # raw values: the high ones are black
    plain = shown(MORE / "RG1_UNCR.dcm").astype(int)
    spine, lung = plain[600:1200, 880:940].mean(), plain[600:1000, 450:600].mean()
    assert spine > lung + 40
    assert np.array_equal(load(MORE / "RG1_J2KR.dcm").pixels, raw.pixels)  # lossless JPEG 2000
    assert np.array_equal(load(MORE / "RG1_J2KI.dcm").pixels, load(MORE / "RG1_UNCI.dcm").pixels)
    jpeg, view, *_ = encode(raw, EncodingSettings(512))
    assert Image.open(io.BytesIO(jpeg)).mode == "L"
    assert (view.window, view.source_bits, max(view.width, view.height)) == ((29999, 0), 15, 512)


@pytest.mark.parametrize("name", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless"])
def test_lossless_encodings_agree(name: str) -> None:
    expected, result = load(BUNDLED / "MR_small.dcm"), load(BUNDLED / f"MR_small_{name}.dcm")
    assert np.array_equal(result.pixels, expected.pixels)
    assert result.window == expected.window == (-200, 1399)  # centre 600, width 1600


@pytest.mark.parametrize(
    "name",
    [
        "SC_jpeg_no_color_transform.dcm",  # RGB says the header alone
        "SC_jpeg_no_color_transform_2.dcm",  # and an Adobe segment
        "SC_rgb_jpeg.dcm",  # and a short one, which decoders pass over
        "SC_rgb_dcmtk_+eb+cr.dcm",
        "SC_rgb_dcmtk_+eb+cy+n1.dcm",
        "SC_rgb_dcmtk_+eb+cy+s2.dcm",
        "SC_rgb_jpeg_lossy_gdcm.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_colours_of_lossy_jpegs_are_those_of_pydicom(name: str) -> None:
    path = next(folder / name for folder in (BUNDLED, MORE) if (folder / name).exists())
    ours, theirs = load(path).pixels, pydicom.pixels.pixel_array(pydicom.dcmread(path))
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 2


@pytest.mark.parametrize(
    ("folder", "name", "shape"),
    [
        (MORE, "JPEG-LL.dcm", (1024, 256)),
        (MORE, "JPGLosslessP14SV1_1s_1f_8b.dcm", (768, 1024)),
        (BUNDLED, "JPGExtended.dcm", (1024, 256)),
        (BUNDLED, "SC_rgb_jpeg_dcmtk.dcm", (100, 100, 3)),
        (MORE, "SC_ybr_full_uncompressed.dcm", (100, 100, 3)),
        (BUNDLED, "examples_palette.dcm", (350, 800, 3)),
        (MORE, "vlut_04.dcm", (512, 512)),
        (MORE, "mlut_18.dcm", (512, 512)),
    ],
)
def test_other_encodings_are_read(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    picture = shown(folder / name)
    assert picture.shape == shape
    assert picture.std() > 5


@pytest.mark.parametrize(
    ("folder", "name", "reason"),
    [
        (MORE, "emri_small.dcm", r"several frames \(10 frames\)"),
        (MORE, "liver.dcm", r"several frames \(3 frames\)"),
        (BUNDLED, "rtplan.dcm", "without pixel data"),
        (BUNDLED, "reportsi.dcm", r"without pixel data \(SR\)"),
        (BUNDLED, "MR_truncated.dcm", "broken image"),
        (BUNDLED, "rtdose_1frame.dcm", "image too small"),
    ],
)
def test_what_is_no_radiograph_is_named(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        load(folder / name)


def test_inversion_without_a_window_mirrors_the_percentiles(tmp_path: Path) -> None:
    plain = load(write_dicom(tmp_path / "a.dcm"))
    inverted = load(write_dicom(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1"))
    assert plain.window == inverted.window[::-1]
    total = shown(tmp_path / "a.dcm").astype(int) + shown(tmp_path / "b.dcm")
    assert np.abs(total - 255).max() <= 1


def test_window_of_the_file_comes_after_the_modality_transform(tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "a.dcm", RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[1000.5, 1], WindowWidth=[401, 5]
    )
    assert load(path).window == (800, 1200)
    picture = shown(path)
    values = RAMP.astype(int) * 2 - 100
    assert (picture[values <= 800] == 0).all()
    assert (picture[values >= 1200] == 255).all()


@pytest.mark.parametrize("width", ["", 0, 0.5])
def test_a_window_without_sense_gives_way_to_the_percentiles(tmp_path: Path, width: object) -> None:
    raw = load(write_dicom(tmp_path / "a.dcm", WindowCenter=100, WindowWidth=width))
    assert raw.window == (20, 4072)


def test_sigmoid_and_exact_windows(tmp_path: Path) -> None:
    curve = {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"}
    picture = shown(write_dicom(tmp_path / "a.dcm", **curve))
    assert picture[RAMP == 2000] == pytest.approx(128, abs=1)
    assert picture.ravel()[0] == 0
    assert load(tmp_path / "a.dcm").window == (1500, 2500)
    exact = write_dicom(tmp_path / "b.dcm", WindowCenter=2000, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    assert load(exact).window == (1500, 2500)


def test_a_lookup_table_is_followed(tmp_path: Path) -> None:
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [1024, 1000, 16])
    item.add_new("LUTData", "US", list(range(0, 10240, 10)))
    path = write_dicom(tmp_path / "a.dcm", VOILUTSequence=pydicom.Sequence([item]))
    picture = shown(path)
    assert picture[RAMP <= 1000].max() == 0
    assert picture[RAMP >= 2023].min() == 255
    assert load(path).window == (1000, 2023)


def test_padding_does_not_count_in_the_percentiles(tmp_path: Path) -> None:
    padded = RAMP.copy()
    padded[:, :16] = 0
    plain = load(write_dicom(tmp_path / "a.dcm", padded))
    aware = load(write_dicom(tmp_path / "b.dcm", padded, PixelPaddingValue=0))
    assert plain.window[0] == 0
    assert aware.window[0] > 0


def test_eight_bits_stay_as_they_are(tmp_path: Path) -> None:
    gray = (RAMP >> 4).astype(np.uint8)
    assert np.array_equal(load(write_dicom(tmp_path / "a.dcm", gray)).pixels, gray)
    inverted = load(write_dicom(tmp_path / "b.dcm", gray, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(inverted.pixels, 255 - gray)
    windowed = load(write_dicom(tmp_path / "c.dcm", gray, WindowCenter=100.5, WindowWidth=101))
    assert windowed.window == (50, 150)
    assert encode(windowed).view.window == (50, 150)


def test_messages_do_not_quote_the_header(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="DA"):
        path = write_dicom(tmp_path / "a.dcm", PatientBirthDate="19th of May 1951")
    load(path)
    assert "1951" not in "".join(capfd.readouterr())


def test_a_rescaling_by_whole_numbers_keeps_whole_numbers(tmp_path: Path) -> None:
    raw = load(write_dicom(tmp_path / "a.dcm", RescaleSlope=2, RescaleIntercept=-100))
    assert raw.pixels.dtype.kind == "i"
    assert np.array_equal(raw.pixels, RAMP.astype(int) * 2 - 100)
    stored = imagecodecs.png_decode(encode(raw, EncodingSettings(format="png16")).data).astype(int)
    assert np.array_equal(stored - stored.min(), raw.pixels - raw.pixels.min())
    fractions = load(write_dicom(tmp_path / "b.dcm", RescaleSlope=0.5, RescaleIntercept=0))
    assert np.array_equal(fractions.pixels, RAMP * 0.5)


def test_modalities_that_are_no_radiograph_are_named_and_headers_stay_outside(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    noise = np.random.default_rng(0).integers(0, 4000, (5, 32, 32)).astype(np.uint16)
    person = {"PatientName": "Doe^Jane", "PatientID": "MRN-4711", "AccessionNumber": "ACC-08", "StudyDate": "20200229"}
    for n, modality in enumerate(("CR", "DX", "", "RG", "CT")):
        write_dicom(raw / f"{n}.dcm", noise[n], Modality=modality, PatientBirthDate="19510519", **person)
    rows = [{"image": f"{n}.dcm", "text": f"Clear lungs {n}.", "patient": n} for n in range(5)]
    (raw / "data.json").write_text(json.dumps(rows))
    result = build("image_text", raw, str(tmp_path / "out"), {}, BuildSettings(workers=1, max_skipped=1))
    assert [skip["reason"] for skip in result.skipped] == ["DICOM that is no radiograph: modality CT"]
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    for secret in (*person.values(), "Jane", "19510519", "4.dcm"):
        assert secret.encode() not in everything
