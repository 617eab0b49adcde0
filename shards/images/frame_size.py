"""Reads the size of a compressed frame from its codestream, before a decoder makes room for all that it announces.

frame_size(frame)        # (width, height, components), or None where no header is found: the decoder names that
"""

import struct

JPEG_2000_SIZE = b"\xff\x4f\xff\x51"  # the markers of the start and of the size: ISO 15444-1, A.5.1
STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers of JPEG without a length: ISO 10918-1, B.1.1.3
FRAMES = (*(n for n in range(0xC0, 0xD0) if n not in (0xC4, 0xC8, 0xCC)), 0xF7)  # F7: JPEG-LS, ISO 14495-1, C.1.1.1


def frame_size(frame: bytes) -> tuple[int, int, int] | None:
    """Return (width, height, components) of a JPEG of any kind, or a JPEG 2000."""
    try:
        if (place := frame.find(JPEG_2000_SIZE)) >= 0 and not frame.startswith(b"\xff\xd8"):
            right, bottom, left, top = struct.unpack_from(">4I", frame, place + 8)
            return right - left, bottom - top, struct.unpack_from(">H", frame, place + 40)[0]
        return _jpeg_size(frame)
    except struct.error:
        return None


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    place = frame.find(b"\xff\xd8") + 2
    while 2 <= place < len(frame) - 1 and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker in FRAMES:
            _, height, width, components = struct.unpack_from(">BHHB", frame, place + 4)
            return width, height, components
        if marker == 0xFF:  # filling
            place += 1
        elif marker in STANDALONE:
            place += 2
        else:
            place += 2 + max(2, struct.unpack_from(">H", frame, place + 2)[0])
    return None
