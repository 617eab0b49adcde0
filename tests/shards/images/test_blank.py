"""A picture of nothing is no sample: one value, whichever, or constant areas inside each other."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards.build import BuildSettings, build
from shards.datasets import phantom
from shards.images import blank
from shards.images.decoding import decode
from shards.images.encoding import encode
from shards.images.raw_image import BadImage
from tests.shards.images.dicom_files import write_dicom
from tests.shards.images.pictures import RAMP, saved

pytestmark = pytest.mark.timeout(60)


def framed(inner: int, *borders: int) -> np.ndarray:
    picture = np.full((100, 120), inner, np.uint8)
    for border in borders:
        picture = np.pad(picture, ((9, 5), (3, 11)), constant_values=border)
    return picture


NOTHING = {
    "black": framed(0),
    "white": framed(255),
    "gray, with noise of a level": framed(99) + np.random.default_rng(0).integers(0, 2, (100, 120)).astype(np.uint8),
    "white border": framed(0, 255),
    "two borders": framed(30, 255, 0),
    "two halves": np.repeat(np.uint8([[0, 200]]), 50, axis=1).repeat(80, axis=0),
    "a border above": np.repeat(np.uint8([[255], [10]]), [7, 90], axis=0).repeat(80, axis=1),
}


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "colour", "16 bits"])
def test_a_picture_of_nothing_is_named(kind: str, form: str) -> None:
    pixels = NOTHING[kind]
    if form == "16 bits" and "noise" not in kind:
        data = saved(pixels.astype(np.uint16) * 200 + 50)
    elif form == "colour":
        data = saved(np.dstack([pixels, pixels // 2, 255 - pixels]))
    else:
        data = saved(pixels, "JPEG" if form == "JPEG" else "PNG", **({"quality": 95} if form == "JPEG" else {}))
    with pytest.raises(BadImage, match="picture of nothing"):
        encode(decode(data))


def test_what_shows_something_is_kept() -> None:
    radiograph = (phantom.Picture(0, 1, "PA", 256)().pixels >> 4).astype(np.uint8)
    spot = framed(0)
    spot[40, 50] = spot[60, 20] = 40
    faint = 100 + radiograph // 24  # ten levels of contrast
    for pixels in (radiograph, np.pad(radiograph, 30), np.pad(radiograph, 9, constant_values=255), spot, faint):
        assert blank.fault(pixels) is None
    assert blank.fault((RAMP >> 8).astype(np.uint8)) is None


def test_a_build_names_them_and_goes_on(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "0.png").write_bytes(saved(RAMP))
    (raw / "1.png").write_bytes(saved(np.zeros((64, 64), np.uint8)))
    write_dicom(raw / "2.dcm", RescaleSlope=0, RescaleIntercept=7, WindowCenter=100, WindowWidth=50)
    rows = [{"image": name, "text": f"Clear lungs {name[0]}.", "patient": name} for name in ("0.png", "1.png", "2.dcm")]
    (raw / "data.json").write_text(json.dumps(rows))
    result = build("image_text", raw, str(tmp_path / "out"), {}, BuildSettings(workers=1, max_skipped=2))
    assert [skip["reason"] for skip in result.skipped] == ["picture of nothing: one value"] * 2
