"""Refuses deflated DICOM that would not fit into the memory, before pydicom inflates it at once.

header = pydicom.dcmread(BoundedFile(data), force=True)        # raises MemoryError for a bomb of zeros
"""

import io
import zlib

from shards.images.raw_image import MAX_PIXELS

MAX_INFLATED = 4 * MAX_PIXELS  # bytes: the largest image that is taken, in words of 32 bits
STEP = 1 << 22


class BoundedFile(io.BytesIO):
    """The bytes of a DICOM file. pydicom asks for all the rest of it in one case alone: where that is deflated."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file does. Raises MemoryError."""
        data = super().read(size)
        if size is None or size < 0:
            _check_inflated(data)
        return data


def _check_inflated(data: bytes) -> None:
    """Inflate and forget. Raises MemoryError; broken data are left to pydicom, which names them."""
    stream, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while data and not stream.eof:
        try:
            count += len(stream.decompress(data, STEP))
        except zlib.error:
            return
        if count > MAX_INFLATED:
            raise MemoryError(f"deflated data of more than {MAX_INFLATED} bytes")
        data = stream.unconsumed_tail
