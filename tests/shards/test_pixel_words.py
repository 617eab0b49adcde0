"""Words in the pixels of finished shards are listed for their owner, markers of the image left aside."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner

from radhpc.cli.main import app
from shards.build import build
from shards.pixel_words import is_marker, load_reader, read_pixels
from shards.settings import BuildSettings
from tests.shards.helpers import notes

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    "text",
    ["AP ERECT MOBILE", "APERECTMOBILE", "L", "SUPINE", "W 2108 : L 2723", "W2229: L2824", "Thorax PA", "--", ""],
)
def test_markers(text: str) -> None:
    assert is_marker(text)


@pytest.mark.parametrize("text", ["MEIER ANNA", "L. MEIER", "ID 0048213", "12.03.2019", "AP MEIER", "St. Olaf", "ALMA"])
def test_words_of_people_are_no_markers(text: str) -> None:
    assert not is_marker(text)


def archive(folder: Path) -> Path:
    raw = notes(folder, 3)
    for n, text in enumerate(("MEIER ANNA 1951", "AP ERECT MOBILE", "")):
        picture = Image.fromarray((np.indices((600, 500)).sum(axis=0) // 5).astype(np.uint8))
        if text:
            draw = ImageDraw.Draw(picture)
            draw.rectangle((0, 0, 330, 50), fill=0)
            draw.text((14, 10), text, 255, ImageFont.load_default(28))
        picture.save(raw / f"images/1.2.840.{n}.png")
    return raw


@pytest.fixture
def out(tmp_path: Path) -> str:
    settings = BuildSettings(workers=1, duplicates="report")
    return build("image_text", archive(tmp_path / "raw"), str(tmp_path / "out"), {}, settings).url


def test_words_are_listed_for_their_owner_alone(out: str) -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    words = read_pixels(out, load_reader())
    assert (words.suspects, words.samples) == (2, 1)
    assert words.file is not None
    assert words.file.stat().st_mode & 0o777 == 0o600
    assert words.file.is_relative_to(os.environ["XDG_STATE_HOME"])
    key, image, text = words.file.read_text().rstrip("\n").split("\t")
    assert key.startswith("image_text-")
    assert image == "0"
    assert "MEIER" in text

    result = CliRunner().invoke(app, ["verify", out, "--read-pixels", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.strip().splitlines()[-1])["samples_with_words_in_pixels"] == 1
    assert "MEIER" not in result.output


def test_a_missing_reader_is_one_line(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    result = CliRunner().invoke(app, ["verify", out, "--read-pixels"])
    assert "make install EXTRAS=ocr" in str(result.exception or result.output)
