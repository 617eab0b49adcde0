"""The files that pydicom and pydicom-data bring: the same pixels as pydicom's own, or named.

Pillow is asked for what is lossy, pydicom itself for the rest, so that whatever else is installed changes nothing.
"""

from pathlib import Path

import data_store
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, get_decoder, pixel_array

from shards.images.decoding import MIN_SIDE, load
from shards.images.raw_image import BadImage, merge_channels

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]
FOLDERS = (Path(pydicom.__file__).parent / "data/test_files", Path(data_store.__file__).parent / "data")
FILES = [path for folder in FOLDERS for path in sorted(folder.rglob("*")) if path.suffix in ("", ".dcm")]
PLUGINS = ("pydicom", "pillow")
REFUSED = ("DICOM of several frames", "DICOM without pixel data", "image too small", "neither JPEG, PNG nor DICOM")


def expected(path: Path) -> np.ndarray | None:
    """Return pydicom's pixels behind the modality's transform, colours in RGB; None without a plugin."""
    data = pydicom.dcmread(path, force=True)
    syntax = data.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    data.file_meta.TransferSyntaxUID = syntax
    plugin = next((name for name in PLUGINS if name in get_decoder(syntax).available_plugins), "")
    if syntax.is_compressed and not plugin:
        return None
    try:
        stored = pixel_array(data, decoding_plugin=plugin)
    except (RuntimeError, ValueError, NotImplementedError):  # a plugin that does not know this one, such as of 12 bits
        return None
    if data.PhotometricInterpretation == "PALETTE COLOR":
        coloured = apply_color_lut(stored, data)
        return merge_channels(coloured >> (8 if coloured.max() > 255 else 0))
    return merge_channels(stored) if stored.ndim == 3 else apply_modality_lut(stored, data)


def shown(values: np.ndarray, path: Path) -> np.ndarray:
    """Map values as the file says, where the result is no window that is still to be applied."""
    data = pydicom.dcmread(path, force=True)
    if data.get("VOILUTSequence") or data.get("VOILUTFunction"):
        table = apply_voi_lut(values, data).astype(float)
        values = 255 * (table - table.min()) / (table.max() - table.min())
    return 255 - values if data.PhotometricInterpretation == "MONOCHROME1" else values


def test_the_pixels_are_those_of_pydicom_or_the_file_is_named() -> None:
    compared, alone = 0, []
    for path in (path for path in FILES if path.is_file()):
        try:
            raw = load(path)
        except BadImage as fault:
            named = fault.reason
        else:
            named = ""
        if named:
            if named not in REFUSED:
                assert named == "broken image", path.name
                with pytest.raises((AttributeError, ValueError, RuntimeError)):
                    assert pydicom.dcmread(path, force=True).pixel_array.ndim
            continue
        assert min(raw.pixels.shape[:2]) >= MIN_SIDE
        theirs = expected(path)
        if theirs is None:
            alone.append(path.name)
            continue
        theirs = shown(theirs, path) if raw.pixels.dtype == np.uint8 and theirs.ndim == 2 else theirs
        assert theirs.shape == raw.pixels.shape, path.name
        assert np.abs(theirs.astype(float) - raw.pixels).max() <= 1, path.name
        compared += 1
    assert compared > 100
    assert len(alone) < 20  # lossless JPEG, JPEG-LS and 12 bits, for which none of pydicom's own is installed


@pytest.mark.parametrize("name", ["JPEG-lossy.dcm", "MR_small_jpeg_ls_lossless.dcm", "RG1_J2KR.dcm", "RG3_J2KI.dcm"])
def test_other_encodings_of_a_picture_are_that_picture(name: str) -> None:
    twins = {
        "JPEG-lossy.dcm": "JPGExtended.dcm",
        "MR_small_jpeg_ls_lossless.dcm": "MR_small.dcm",
        "RG1_J2KR.dcm": "RG1_UNCR.dcm",
        "RG3_J2KI.dcm": "RG3_UNCI.dcm",
    }
    ours, twin = (load(next(path for path in FILES if path.name == one)) for one in (name, twins[name]))
    assert np.array_equal(ours.pixels, twin.pixels)
    assert ours.window == twin.window
