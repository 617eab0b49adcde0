"""Pictures that the tests of images share."""

import io

import numpy as np
from PIL import Image

RAMP = (np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 16 + 500).astype(np.uint16)  # 500 to 49,636


def saved(pixels: np.ndarray, form: str = "PNG", mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def seen(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
