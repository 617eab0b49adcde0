"""Decodes JPEG strictly: a file that is damaged anywhere before its end marker raises an error.

    pixels = decode(data)                # uint8, (height, width) or (height, width, 3) in RGB; raises ValueError
    check_lossless(frame, pixels)        # of lossless JPEG: raises ValueError where its length does not fit the pixels

libjpeg warns and continues where data are missing or wrong, and most of its wrappers hide the warning: Pillow returns a
picture whose lower half is displaced. simplejpeg makes an error of it. The pixels are those that Pillow decodes.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_WANTED = {
    "Gray": "GRAY",
    "YCbCr": "RGB",
    "RGB": "RGB",
    "CMYK": "CMYK",
    "YCCK": "CMYK",
}  # what it holds -> is asked for
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that begin a frame
_PROGRESSIVE = (0xC2, 0xCA)
_ZEROS = bytes(64)
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_TABLES, _SCAN, _END, _RESTART, _LOSSLESS = 0xC4, 0xDA, 0xD9, 0xDD, 0xC3


class FrameHeader(NamedTuple):
    """The header of a frame of JPEG or JPEG-LS."""

    precision: int  # bits
    height: int
    width: int
    components: int


def frame_header(data: bytes) -> FrameHeader:
    """Read the first frame's header. Raises ValueError where there is none before the pixels."""
    for marker, segment in _segments(data):
        if (marker in _FRAMES or marker == 0xF7) and len(segment) >= 6:  # 0xF7: JPEG-LS
            numbers = (segment[0], int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5]), segment[5])
            return FrameHeader(*numbers)
        if marker == _SCAN:
            break
    raise ValueError("no frame header")


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode baseline, extended or progressive JPEG of 8 bits; CMYK keeps its four channels, as they are stored.

    Raises ValueError for whatever libjpeg-turbo warns of, for a kind that it does not decode, and for what _check_scans
    finds.
    """
    import simplejpeg

    colours = simplejpeg.decode_jpeg_header(data)[2]
    pixels = np.asarray(simplejpeg.decode_jpeg(data, colorspace=_WANTED[colours]))
    _check_scans(data, colours)
    return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels


def _check_scans(data: bytes, colours: str) -> None:
    """Raise ValueError for damage that libjpeg-turbo passes over because as many blocks of pixels came out of it.

    Zeros are a code like any other, and a decoder soon falls into step again. But so many of them are written only
    where the shortest codes mean "as before" and "nothing else": in constant areas, or among the averages of a
    progressive file. Damage to a progressive file often stays in one of its scans; JPEG XL's reader looks closer.
    """
    tables: dict[int, int] = {}  # by class and number: the value of the code of zeros
    progressive = False
    for marker, segment in _segments(data):
        progressive |= marker in _PROGRESSIVE
        if marker == _TABLES:
            tables |= {
                number: min(lengths, key=lengths.__getitem__) for number, lengths in _code_lengths(segment).items()
            }
        if marker != _SCAN:
            continue
        start = len(data) - len(segment)
        place = data.find(_ZEROS, start)
        constant = all(value == 0 for value in tables.values())
        while 0 <= place < data.rfind(b"\xff\xd9"):
            scan = max(start - 4, data.rfind(b"\xff\xda", start, place))
            if data[scan + 5 + 2 * data[scan + 4]] > 0 if progressive else not constant:
                raise ValueError("zeros among the pixels")
            place = data.find(_ZEROS, place + len(_ZEROS))
    if progressive and colours != "CMYK":
        import imagecodecs

        imagecodecs.jpegxl_encode_jpeg(data)


def check_end(data: bytes) -> None:
    """Raise ValueError unless an end marker closes the file, with nothing behind it but what fills up (DICOM pads)."""
    if not data.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise ValueError("no end marker")


def check_lossless(data: bytes, pixels: npt.NDArray[Any]) -> None:
    """Raise ValueError where a lossless JPEG is not exactly as long as these pixels, which were decoded from it, need.

    Decoders of it stop when they have all pixels, however much is left. So the bits that the pixels take are
    counted by the file's own Huffman tables (ITU-T T.81, annex H): what is lost, zeroed or overwritten in the middle
    nearly always changes their number. Files with restart markers or several scans are only checked for markers.
    """
    check_end(data)
    header, predictor, transform = frame_header(data), 0, 0
    tables: dict[int, dict[int, int]] = {}  # by number: the length of the code of each category
    selected: list[int] = []
    for marker, segment in _segments(data):
        if marker == _TABLES:
            tables |= _code_lengths(segment)
        elif marker == _RESTART and any(segment):
            return
        elif marker == _SCAN:
            count = segment[0]
            selected = [segment[2 + 2 * n] >> 4 for n in range(count)]
            predictor, transform = segment[1 + 2 * count], segment[3 + 2 * count] & 15
            start = segment[4 + 2 * count :]
            break
    else:
        raise ValueError("no scan")
    scan = bytes(start)
    end = scan.rfind(b"\xff\xd9")
    scan = scan[:end].replace(b"\xff\x00", b"\xff.")  # a byte of 255 in the data is followed by a zero
    stuffed = scan.count(b"\xff.")
    if scan.rstrip(b"\xff").count(b"\xff") != stuffed:
        raise ValueError("a marker among the pixels")
    if len(selected) != header.components:
        return  # one scan for each component
    available = 8 * (len(scan) - stuffed)
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    needed = sum(
        _bits(planes[..., n].astype(np.int32) >> transform, predictor, header.precision - transform, tables[table])
        for n, table in enumerate(selected)
    )
    if not 0 <= available - needed < 8 + 8 * 2:  # the last byte is filled up; some writers add one more
        raise ValueError(f"{available} bits for pixels of {needed}")


def _bits(values: npt.NDArray[np.int32], predictor: int, precision: int, lengths: dict[int, int]) -> int:
    """Count the bits of one component. Raises ValueError for a category that the table does not have."""
    left, above, corner = values[1:, :-1], values[:-1, 1:], values[:-1, :-1]
    expected = np.empty_like(values)
    expected[0, 0] = 1 << (precision - 1)
    expected[0, 1:] = values[0, :-1]
    expected[1:, 0] = values[:-1, 0]
    predictions: dict[int, Callable[[], npt.NDArray[np.int32]]] = {
        1: lambda: left,
        2: lambda: above,
        3: lambda: corner,
        4: lambda: left + above - corner,
        5: lambda: left + ((above - corner) >> 1),
        6: lambda: above + ((left - corner) >> 1),
        7: lambda: (left + above) >> 1,
    }
    expected[1:, 1:] = predictions[predictor]()
    differences = ((values - expected + 0x8000) & 0xFFFF) - 0x8000  # modulo 2^16
    sizes = np.abs(differences)
    counts = np.bincount(np.frexp(sizes.astype(np.float32))[1].ravel(), minlength=17)  # of each category
    bits = 0
    for category, count in enumerate(counts):
        if count:
            if category not in lengths:
                raise ValueError(f"no code for differences of {category} bits")
            bits += int(count) * (lengths[category] + (category if category < 16 else 0))
    return bits


def _code_lengths(segment: memoryview) -> dict[int, dict[int, int]]:
    """Read a segment of Huffman tables: for each table, the length of the code of each value."""
    tables = {}
    while len(segment) >= 17:
        number, counts = segment[0], segment[1:17]
        values = segment[17 : 17 + sum(counts)]
        lengths = [length for length, count in enumerate(counts, 1) for _ in range(count)]
        tables[number] = dict(zip(values, lengths, strict=False))
        segment = segment[17 + sum(counts) :]
    return tables


def _segments(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Yield (marker, content) up to the first scan, whose content is all that follows. Raises ValueError."""
    view, place = memoryview(data), 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            raise ValueError("no marker where one must be")
        marker = data[place + 1]
        if marker == 0xFF:  # filled up
            place += 1
        elif marker in _BARE:
            place += 2
        elif marker == _END:
            return
        else:
            yield marker, view[place + 4 :] if marker == _SCAN else view[place + 4 : place + 2 + _length(data, place)]
            if marker == _SCAN:
                return
            place += 2 + _length(data, place)


def _length(data: bytes, place: int) -> int:
    return int.from_bytes(data[place + 2 : place + 4])
