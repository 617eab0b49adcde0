"""Text that was written into a radiograph is noticed, and radiographs without it are not."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFont

from shards.build import build
from shards.datasets import phantom
from shards.images.text_in_pixels import find_text
from shards.reports.contact_sheet import SUSPECTS_SHEET
from shards.settings import BuildSettings
from tests.shards.helpers import notes

pytestmark = pytest.mark.timeout(120)
Gray = npt.NDArray[np.uint8]

# What a person sees in the real radiographs: words or numbers near an edge; all others have none, or one letter alone.
WITH_WORDS = {f"00{n}.jpg" for n in (39, 40, 41, 47, 48, 51, 52, 53, 54, 55, 56)}


@functools.cache
def radiograph(seed: int, side: int = 1024) -> Gray:
    """A phantom with film grain."""
    pixels = phantom.Picture(0, seed, "PA", side)().pixels.astype(np.float64) / 16
    return np.clip(pixels + np.random.default_rng(seed).normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


def written(
    image: Gray, text: str, size: int, corner: str, ink: int, paper: int | None
) -> tuple[Gray, tuple[int, ...]]:
    """Write into a corner, on a box of `paper` or none, and store as JPEG. Returns the image and the text's box."""
    picture = Image.fromarray(image)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    box = draw.textbbox((0, 0), text, font)
    x = 6 if "left" in corner else picture.width - box[2] - 8
    y = 6 if "top" in corner else picture.height - box[3] - 8
    place = (x + box[0], y + box[1], x + box[2], y + box[3])
    if paper is not None:
        draw.rectangle((place[0] - 4, place[1] - 4, place[2] + 4, place[3] + 4), fill=paper)
    draw.text((x, y), text, ink, font)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return np.asarray(Image.open(buffer)), place


@pytest.mark.parametrize("size", [12, 16, 24, 40, 64])
@pytest.mark.parametrize(("ink", "paper"), [(255, 0), (0, 255), (140, 20)])
@pytest.mark.parametrize("corner", ["top left", "top right", "bottom left", "bottom right"])
def test_words_in_corners_are_noticed_where_they_are(size: int, ink: int, paper: int, corner: str) -> None:
    for text in ("MEIER ANNA 1951", "12.03.2019 14:35"):
        image, (left, top, right, bottom) = written(radiograph(len(text) % 3), text, size, corner, ink, paper)
        boxes = find_text(image)
        assert any(box[0] < right and left < box[2] and box[1] < bottom and top < box[3] for box in boxes)
        area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in boxes)
        assert area < image.size / 4


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("side", [256, 700, 1120])
def test_phantoms_and_side_markers_are_not(seed: int, side: int) -> None:
    image = radiograph(seed, side)
    assert find_text(image) == ()
    for letter in "LR":
        assert find_text(written(image, letter, max(12, side // 20), "top left", 255, None)[0]) == ()


def test_lines_wires_and_collimators_are_not() -> None:
    image = np.full((900, 800), 60, np.uint8)
    image[:, :90] = 0  # a collimator
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for n in range(5):
        draw.line((100, 40 + 170 * n, 790, 90 + 150 * n), 230, 3)
        draw.ellipse((120 + 130 * n, 20, 160 + 130 * n, 60), outline=250, width=4)
        draw.line((700 + 18 * n, 0, 700 + 18 * n, 899), 220, 2)
    assert find_text(np.asarray(picture)) == ()


def test_small_colored_and_empty_images_are_looked_at() -> None:
    for shape in ((1, 1), (7, 40), (8, 64), (8, 65), (40, 40, 3), (300, 400, 3)):
        assert find_text(np.zeros(shape, np.uint8)) == ()
    image, _ = written(np.zeros((300, 400), np.uint8), "MEIER ANNA", 20, "top left", 255, 0)
    assert find_text(np.stack([image] * 3, axis=2)) == find_text(image) != ()


def test_real_radiographs(real_notes: Path) -> None:
    """All with words are noticed, and none without."""
    rows = json.loads((real_notes / "data.json").read_text())
    names = {Path(row["image"]).name: real_notes / row["image"] for row in rows}
    noticed = {name for name, path in names.items() if find_text(np.asarray(Image.open(path).convert("L")))}
    assert noticed == WITH_WORDS & set(names)


def test_a_build_warns_and_shows_where(tmp_path: Path) -> None:
    raw = notes(tmp_path / "raw", 4)
    for n in range(4):
        image, _ = written(radiograph(n, 500), f"MEIER ANNA {n}" if n < 3 else "", 18, "bottom right", 255, 0)
        Image.fromarray(image).save(raw / f"images/1.2.840.{n}.png")
    result = build("image_text", raw, str(tmp_path / "out"), {}, BuildSettings(workers=1, duplicates="report"))
    warning = next(text for text in result.warnings if SUSPECTS_SHEET in text)
    assert warning.startswith("3 of 4 images look as if text is written into them")
    assert "3 of 4 images" in (tmp_path / "out" / "card.md").read_text()
    sheet = np.asarray(Image.open(tmp_path / "out" / SUSPECTS_SHEET).convert("RGB")).astype(int)
    frames = (sheet[..., 0] > 180) & (sheet[..., 1] < 140) & (sheet[..., 2] < 120)
    assert frames.sum() > 100
    assert sheet.shape[1] < 3 * 300
    Image.fromarray(radiograph(9, 500)).save(raw / "images/1.2.840.0.png")
    clean = build("phantom", None, str(tmp_path / "clean"), {"studies": "6", "size": "256"}, BuildSettings(workers=1))
    assert not (tmp_path / "clean" / SUSPECTS_SHEET).exists()
    assert not any(SUSPECTS_SHEET in text for text in clean.warnings)
