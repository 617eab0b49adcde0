"""Encoded bytes to pictures. Shards hold images that were shrunk and windowed when they were built."""

import io

from PIL import Image


def decode(data: bytes) -> Image.Image:
    """Decode one member of a shard. Raises OSError where the bytes are no whole image."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
