"""What is no radiograph is doubted, and every radiograph at hand is not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from radhpc.data.input_check import radiograph_warnings
from radhpc.data.source import Source
from shards.images.encoding import EncodingSettings
from shards.views import load_view


def words(ink: int, paper: int) -> Image.Image:
    page = Image.new("L", (500, 650), paper)
    for line in range(40):
        ImageDraw.Draw(page).text((20, 15 * line + 10), "the lungs are clear, the heart is of normal size " * 2, ink)
    return page


def photographs() -> dict[str, Image.Image]:
    from sklearn.datasets import load_sample_images

    china, flower = map(Image.fromarray, load_sample_images().images)
    return {"china": china, "flower": flower, "gray china": china.convert("L")}


def drawn() -> dict[str, Image.Image]:
    chance = np.random.default_rng(0)
    circle = Image.new("L", (400, 400))
    ImageDraw.Draw(circle).ellipse((100, 100, 300, 300), fill=255)
    chart = Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(chart).line([(9 * x, 240 + int(chance.normal() * 60)) for x in range(70)], fill="black", width=2)
    return {
        "black": Image.new("L", (300, 300)),
        "white": Image.new("RGB", (300, 300), "white"),
        "noise": Image.fromarray(chance.integers(0, 256, (300, 300), np.uint8)),
        "coloured noise": Image.fromarray(chance.integers(0, 256, (300, 300, 3), np.uint8)),
        "text": words(0, 255),
        "white text": words(255, 0),
        "circle": circle,
        "chart": chart,
        "stripe": Image.fromarray(chance.integers(100, 140, (60, 600), np.uint8)),
    }


@pytest.mark.parametrize("name", [*drawn(), "china", "flower", "gray china"])
def test_what_is_no_radiograph_is_doubted(name: str) -> None:
    assert radiograph_warnings({**drawn(), **photographs()}[name])


def test_real_radiographs_are_not(real_notes: Path) -> None:
    files = sorted((real_notes / "images").glob("*.jpg"))
    assert len(files) >= 20
    for side in (1120, 224):
        settings = EncodingSettings(longest_side=side)
        found = {path.name: radiograph_warnings(load_view(path, settings).picture) for path in files}
        assert not any(found.values()), {name: why for name, why in found.items() if why}


def test_neither_are_phantoms(phantom_shards: Path) -> None:
    source = Source((str(phantom_shards),), "train")
    for number in range(len(source)):
        _, _, views = source.read(number)
        assert [radiograph_warnings(view) for view in views] == [[]] * len(views)


def test_a_dicom_says_what_it_is() -> None:
    from pydicom.data import get_testdata_file

    ct = load_view(Path(str(get_testdata_file("CT_small.dcm"))), EncodingSettings())
    assert radiograph_warnings(ct.picture, ct.modality) == ["its DICOM header says CT"]
    chest = get_testdata_file("RG1_UNCR.dcm", download=False)
    if chest is None:
        pytest.skip("pydicom-data is not installed")
    view = load_view(Path(str(chest)), EncodingSettings())
    assert radiograph_warnings(view.picture, view.modality) == []
