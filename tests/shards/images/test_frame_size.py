"""A frame that announces more pixels than its DICOM header is refused before a decoder makes room for them."""

import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import encaps, uid

from shards.images.decoding import load
from shards.images.frame_size import frame_size
from shards.images.raw_image import MAX_PIXELS, BadImage
from tests.shards.images.dicom_files import write_dicom

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64)).astype(np.uint8)
Codec = Callable[[np.ndarray], bytes]
CODECS: dict[str, tuple[str, Codec]] = {
    "baseline": (uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode),
    "lossless": (uid.JPEGLosslessSV1, imagecodecs.ljpeg_encode),
    "JPEG-LS": (uid.JPEGLSLossless, imagecodecs.jpegls_encode),
    "JPEG 2000": (uid.JPEG2000Lossless, lambda pixels: imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k")),
}


def announce(frame: bytes, width: int, height: int) -> bytes:
    """Write another size into the codestream."""
    if frame.startswith(b"\xff\x4f"):
        return frame[:8] + struct.pack(">II", width, height) + frame[16:]
    place = next(n for n in range(len(frame)) if frame[n] == 0xFF and frame[n + 1] in (0xC0, 0xC1, 0xC3, 0xF7))
    return frame[: place + 5] + struct.pack(">HH", height, width) + frame[place + 9 :]


def written(path: Path, syntax: str, frame: bytes, **tags: Any) -> Path:
    header = pydicom.dcmread(write_dicom(path, PIXELS, **tags))
    header.file_meta.TransferSyntaxUID = uid.UID(syntax)
    header.PixelData = encaps.encapsulate([frame])
    header["PixelData"].is_undefined_length = True
    header.save_as(path)
    return path


@pytest.mark.parametrize("codec", CODECS)
def test_the_size_is_that_of_the_codestream(codec: str, tmp_path: Path) -> None:
    syntax, encode = CODECS[codec]
    frame = encode(PIXELS)
    assert frame_size(frame) == (64, 48, 1)
    assert load(written(tmp_path / "a.dcm", syntax, frame)).pixels.shape == (48, 64)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("size", [(65_000, 65_000), (64, 65_000), (40_000, 48), (63, 48), (64, 0)])
@pytest.mark.parametrize("codec", CODECS)
def test_another_size_than_the_headers_is_refused_without_memory(
    codec: str, size: tuple[int, int], tmp_path: Path
) -> None:
    syntax, encode = CODECS[codec]
    frame = announce(encode(PIXELS), *size)
    assert frame_size(frame) == (*size, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match="broken image"):
        load(written(tmp_path / "a.dcm", syntax, frame))
    if not 0 < size[0] * size[1] <= MAX_PIXELS:
        with pytest.raises(BadImage, match="image too large|broken image"):
            load(written(tmp_path / "b.dcm", syntax, frame, Columns=size[0], Rows=size[1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # kibibytes


@pytest.mark.parametrize("codec", CODECS)
def test_any_start_of_a_frame_has_a_size_or_none(codec: str) -> None:
    frame = CODECS[codec][1](PIXELS)
    for length in range(min(len(frame), 400)):
        assert frame_size(frame[:length]) in (None, (64, 48, 1))
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(frame)
        damaged[int(rng.integers(0, min(len(frame), 200)))] = int(rng.integers(0, 256))
        frame_size(bytes(damaged))
