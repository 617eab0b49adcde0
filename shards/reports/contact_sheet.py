"""Draws the contact sheet of a dataset, `contact_sheet.png`: a page of its pictures for people.

    data = contact_sheet(load_pictures(store, manifest, index))     # a PNG
    data = contact_sheet([("train  PA", image), ...])

A second sheet, `text_in_pixels.png`, shows images into which text may be written, with a box around the place.
The same input gives the same bytes.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from radhpc.core.image_decoding import decode
from radhpc.core.manifest import Manifest, SampleIndex
from radhpc.core.sample import SPLITS, Sample
from radhpc.storage.store import Store
from shards.images.text_in_pixels import Box

SHEET = "contact_sheet.png"
SUSPECTS_SHEET = "text_in_pixels.png"
SHOWN = 48  # pictures on a sheet

_BACKGROUND, _CELL, _CAPTION = "#101114", "#1a1c20", "#a9b0ba"
_FRAME = "#ff5a36"
_GAP, _MARGIN, _LINE, _LETTERS = 10, 20, 22, 13  # pixels


class Suspect(NamedTuple):
    """An image that text may be written into."""

    key: str  # of the sample
    image: int  # its number in the sample
    boxes: tuple[Box, ...]  # in pixels of the stored image


def choose_samples(index: SampleIndex, count: int = SHOWN) -> list[int]:
    """Choose samples for a contact sheet: equally many of each split if possible, spread over its shards, ascending."""
    remaining = [index.of_split(split) for split in SPLITS]
    chosen: list[int] = []
    for n, positions in enumerate(sorted(remaining, key=len)):  # the larger splits fill up for the small ones
        share = min(len(positions), (count - len(chosen)) // (len(remaining) - n))
        # the middles of `share` equal intervals
        chosen += positions[((np.arange(share) + 0.5) * len(positions) / max(share, 1)).astype(np.int64)].tolist()
    return sorted(chosen)


def load_pictures(
    store: Store, manifest: Manifest, index: SampleIndex, count: int = SHOWN
) -> list[tuple[str, Image.Image]]:
    """Load (caption, first image) of the samples that `choose_samples` returns, from finished shards."""
    captioned = []
    for row in choose_samples(index, count):
        sample, picture = _load(store, manifest, index, row, 0)
        captioned.append((f"{sample.split}  {sample.images[0].view or ''}", picture))
    return captioned


def load_suspects(
    store: Store, manifest: Manifest, index: SampleIndex, suspects: Sequence[Suspect], count: int = SHOWN
) -> list[tuple[str, Image.Image]]:
    """Load (key, image with boxes around what looks like text) of up to `count` suspects, spread over them all."""
    row_of = {key: row for row, key in enumerate(index.key.tolist())}
    captioned = []
    for n in range(min(count, len(suspects))):
        suspect = suspects[n * len(suspects) // min(count, len(suspects))]
        _, picture = _load(store, manifest, index, row_of[suspect.key.encode()], suspect.image)
        framed = picture.convert("RGB")
        line = max(2, framed.width // 200)
        for left, top, right, bottom in suspect.boxes:
            place = (
                max(0, left - line),
                max(0, top - line),
                min(framed.width - 1, right),
                min(framed.height - 1, bottom),
            )
            ImageDraw.Draw(framed).rectangle(place, None, _FRAME, line)
        captioned.append((suspect.key.rsplit("-", 1)[1], framed))
    return captioned


def _load(store: Store, manifest: Manifest, index: SampleIndex, row: int, image: int) -> tuple[Sample, Image.Image]:
    """Return the description of a row's sample, and one of its images."""
    members = {member.name.split(".", 1)[1]: member for member in index.members(row)}
    shard = manifest.shards[int(index.shard[row])].name
    description, stored = members.pop("json"), list(members.values())[image]
    sample = Sample.model_validate_json(store.read_range(shard, description.offset, description.length))
    return sample, decode(store.read_range(shard, stored.offset, stored.length), sample.images[image])


def contact_sheet(pictures: Sequence[tuple[str, Image.Image]], columns: int = 8, cell: int = 224) -> bytes:
    """Draw (caption, picture) in a grid as a PNG; each picture is fitted into `cell` x `cell` pixels.

    Raises ValueError where there is no picture.
    """
    if not pictures:
        raise ValueError("a contact sheet needs a picture")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    across, down = cell + _GAP, cell + _LINE + _GAP
    sheet = Image.new("RGB", (2 * _MARGIN + columns * across - _GAP, 2 * _MARGIN + rows * down - _GAP), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LETTERS)
    for number, (caption, picture) in enumerate(pictures):
        left, top = _MARGIN + number % columns * across, _MARGIN + number // columns * down
        draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=_CELL)
        factor = min(cell / picture.width, cell / picture.height)
        size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        sheet.paste(fitted, (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2))
        draw.text((left + 2, top + cell + 4), _fit(" ".join(caption.split()), draw, font, cell - 4), _CAPTION, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=1)  # the sheet of a small build must not take longer than the build
    return buffer.getvalue()


def _fit(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """Return the text, or as much of it as fits, with an ellipsis."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text.rstrip() + "..."
