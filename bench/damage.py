"""How much damage to raw pictures the build notices, by codec and kind of damage.

    python -m bench.damage [--files N] [--json]

Each of N files per codec is a drawn radiograph with damage at a random place, read as `build` reads it. Undetected is
a damaged file that is read, and whose pixels differ: damage that changes no pixel harms nobody.
"""

import io
from collections import Counter
from collections.abc import Callable

import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image
from pydicom import encaps, uid
from pydicom.dataset import FileMetaDataset

from bench import report
from shards.datasets import phantom
from shards.images.decoding import decode
from shards.images.raw_image import BadImage

PROMISED = ("JPEG", "JPEG, progressive", "PNG, 8 bits", "PNG, 16 bits", "DICOM, JPEG", "DICOM, JPEG-LS")
BLOCKS = (512, 1024, 4096)  # bytes
SIDE = 512  # pixels
Damage = Callable[[bytes, int, int, np.random.Generator], bytes]  # whole, place, length of a block
KINDS: dict[str, Damage] = {
    "block zeroed": lambda whole, place, length, rng: _replaced(whole, place, bytes(length)),
    "block overwritten": lambda whole, place, length, rng: _replaced(whole, place, rng.bytes(length)),
    "block lost": lambda whole, place, length, rng: whole[:place] + whole[place + length :],
    "end lost": lambda whole, place, length, rng: whole[:place],
    "end zeroed": lambda whole, place, length, rng: whole[:place] + bytes(len(whole) - place),
    "blocks swapped": lambda whole, place, length, rng: _swapped(whole, place, length),
    "bit flipped": lambda whole, place, length, rng: _flipped(whole, place, int(rng.integers(8))),
}
GONE = tuple(KINDS)[:5]  # kinds that are named in the promised codecs
NOTES = """\
percent of damaged files that are read with other pixels. Blocks have 512, 1,024 or 4,096 bytes; damage begins
behind the header of a file and ends before its last two bytes. Uncompressed pixels and RLE hold nothing to tell by."""


def main() -> None:
    parser = report.parser("damage", __doc__, "20 files per codec")
    parser.add_argument("--files", type=int, default=2000, help="damaged files per codec (2000)")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    promised, missed = 0, 0
    for codec, whole in codecs().items():
        damaged, undetected = measure(whole, 20 if arguments.quick else arguments.files)
        figures |= {f"{codec}/{kind}": 100 * undetected[kind] / damaged[kind] for kind in KINDS}
        if codec in PROMISED:
            promised += sum(damaged[kind] for kind in GONE)
            missed += sum(undetected[kind] for kind in GONE)
    ratios = {"undetected share, blocks or ends that are gone, promised codecs": missed / promised}
    figures["files of it"] = float(promised)
    report.show("Damage to raw pictures that is not noticed, in percent", ratios, figures, NOTES, arguments.json)


def measure(whole: bytes, files: int, seed: int = 0) -> tuple[Counter[str], Counter[str]]:
    """Damage a file in all ways. Returns counts by kind: damaged files, and those that are read as another picture."""
    rng = np.random.default_rng(seed)
    pixels = decode(whole).pixels
    damaged, undetected = Counter[str](), Counter[str]()
    start = _header_length(whole)
    for n in range(files):
        kind = list(KINDS)[n % len(KINDS)]
        length = min(BLOCKS[n // len(KINDS) % len(BLOCKS)], (len(whole) - start) // 3)
        broken = KINDS[kind](whole, int(rng.integers(start, len(whole) - 2 * length - 2)), length, rng)
        damaged[kind] += 1
        try:
            undetected[kind] += not np.array_equal(decode(broken).pixels, pixels)
        except BadImage:
            continue
    return damaged, undetected


def codecs() -> dict[str, bytes]:
    """Return a drawn radiograph in every codec: as a file of its own, or inside DICOM."""
    drawn = phantom.Picture(0, 1, "PA", SIDE)().pixels.astype(np.float64)
    deep = np.clip(drawn + np.random.default_rng(0).normal(0, 40, drawn.shape), 0, 4095).astype(np.uint16)
    gray = (deep >> 4).astype(np.uint8)
    lossless = imagecodecs.jpeg_encode(deep, lossless=True, predictor=1, bitspersample=12)
    files = {
        "JPEG": _saved(gray, "JPEG", quality=95),
        "JPEG, progressive": _saved(gray, "JPEG", quality=95, progressive=True),
        "PNG, 8 bits": _saved(gray, "PNG"),
        "PNG, 16 bits": _saved(deep << 4, "PNG"),
        "DICOM, JPEG": _dicom(_saved(gray, "JPEG", quality=95), gray, uid.JPEGBaseline8Bit),
        "DICOM, JPEG of 12 bits": _dicom(
            imagecodecs.jpeg_encode(deep, level=95, bitspersample=12), deep, uid.JPEGExtended12Bit
        ),
        "DICOM, lossless JPEG": _dicom(lossless, deep, uid.JPEGLosslessSV1),
        "DICOM, JPEG-LS": _dicom(imagecodecs.jpegls_encode(deep), deep, uid.JPEGLSLossless),
        "DICOM, JPEG 2000": _dicom(
            imagecodecs.jpeg2k_encode(deep, level=0, bitspersample=12, codecformat="j2k"), deep, uid.JPEG2000Lossless
        ),
        "DICOM, HTJ2K": _dicom(imagecodecs.htj2k_encode(deep), deep, uid.HTJ2KLossless),
        "DICOM, uncompressed": _dicom(None, deep, uid.ExplicitVRLittleEndian),
    }
    data = pydicom.dcmread(io.BytesIO(files["DICOM, uncompressed"]))
    data.compress(uid.RLELossless, generate_instance_uid=False)
    buffer = io.BytesIO()
    data.save_as(buffer)
    return files | {"DICOM, RLE": buffer.getvalue()}


def _saved(pixels: npt.NDArray[np.generic], form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def _dicom(frame: bytes | None, pixels: npt.NDArray[np.generic], syntax: uid.UID) -> bytes:
    """Write a DICOM file whose pixels are compressed to `frame`, or as they are."""
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    data.Modality, data.PhotometricInterpretation = "DX", "MONOCHROME2"
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = 12 if pixels.itemsize == 2 else 8
    data.HighBit = data.BitsStored - 1
    data.PixelData = pixels.tobytes() if frame is None else encaps.encapsulate([frame])
    if frame is not None:
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _header_length(whole: bytes) -> int:
    """Return where damage may begin: behind the headers, whose damage shows in other ways."""
    return next((whole.index(mark) for mark in (b"IDAT", b"\xff\xda", b"\xff\x93") if mark in whole), 1024) + 32


def _replaced(whole: bytes, place: int, block: bytes) -> bytes:
    return whole[:place] + block + whole[place + len(block) :]


def _swapped(whole: bytes, place: int, length: int) -> bytes:
    """Swap a block and the next of the same length."""
    middle, end = place + length, place + 2 * length
    return whole[:place] + whole[middle:end] + whole[place:middle] + whole[end:]


def _flipped(whole: bytes, place: int, bit: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


if __name__ == "__main__":
    report.run(main)
