"""What the model sees: as a person is shown it, and with the views of a study stitched or left out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.recipe import ImageSettings, Recipe, load
from radhpc.core.sample import Report, Sample, View
from radhpc.data.collate import StudyEncoder
from radhpc.data.source import Source
from radhpc.data.stream import Stream, StreamSpec, main, stage_sampler
from radhpc.models.family import ModelFamily
from radhpc.models.image_processors import stitch
from tests.conftest import ROOT, TINY_RECIPE, tiny_family

pytestmark = pytest.mark.timeout(120)

FOUR_TILES = [
    "model.config.vision.max_num_tiles=4",
    "model.config.vision.supported_aspect_ratios=[[1,1],[1,2],[1,3],[1,4],[2,1],[2,2],[3,1],[4,1]]",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Recipe:
    path = tmp_path_factory.mktemp("show") / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(shards=phantom_shards))
    return load(path, FOUR_TILES)


@pytest.fixture(scope="module")
def source(recipe: Recipe) -> Source:
    return Source(recipe.shards, "train")


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> ModelFamily:
    return tiny_family(recipe, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def study(views: int) -> tuple[str, Sample, list[Image.Image]]:
    """A study whose views have sizes and levels of their own."""
    pictures = [Image.new("L", (40 + 5 * n, 56 - 3 * n), 30 + 50 * n) for n in range(views)]
    sample = Sample(
        dataset="d", patient="0" * 16, study="0" * 16, split="train", report=Report(findings="Clear lungs."),
        images=tuple(View(width=one.width, height=one.height) for one in pictures),
    )  # fmt: skip
    return "k", sample, pictures


@pytest.mark.parametrize(("views", "limit"), [(1, None), (3, None), (4, 4), (6, None), (6, 2), (3, 5)])
def test_stitched_views_are_one_picture_for_training_and_generation(
    kind: ModelFamily, recipe: Recipe, views: int, limit: int | None
) -> None:
    """One image token, and the arrays of the picture that processors.stitch makes of the first views."""
    encoder = StudyEncoder(kind, recipe.text, ImageSettings(stitch=True, gap=7, views=limit))
    key, sample, pictures = study(views)
    used = pictures[: limit or 4]
    whole = stitch(used, 7, len(used))
    assert whole.width == sum(one.width for one in used) + 7 * (len(used) - 1)
    wanted = kind.encode_images([whole])
    rows = [encoder.encode(key, sample, pictures), encoder.encode_prompt(key, None, pictures)]
    for row in rows:
        assert (row.input_ids == kind.image_token_id).sum() == 1  # type: ignore[attr-defined]
        assert row.images.keys() == wanted.keys()
        assert all(np.array_equal(row.images[name], wanted[name]) for name in wanted)
    assert kind.tokenizer.decode(rows[0].input_ids).endswith("Clear lungs.<|eot_id|>")
    batch = encoder.batch([rows[0], encoder.empty()])
    assert batch["pixel_values"].shape[:2] == (2, 1)


@pytest.mark.parametrize(("views", "limit", "left"), [(6, None, 6), (6, 4, 4), (3, 4, 3)])
def test_the_first_views_are_used_and_the_others_left_out(
    kind: ModelFamily, recipe: Recipe, views: int, limit: int | None, left: int
) -> None:
    encoder = StudyEncoder(kind, recipe.text, ImageSettings(views=limit))
    key, sample, pictures = study(views)
    wanted = kind.encode_images(pictures[:left])
    for row in (encoder.encode(key, sample, pictures), encoder.encode_prompt(key, "Why?", pictures)):
        assert (row.input_ids == kind.image_token_id).sum() == left  # type: ignore[attr-defined]
        assert np.array_equal(row.images["pixel_values"], wanted["pixel_values"])


def test_a_stream_stitches_what_it_trains_on(kind: ModelFamily, recipe: Recipe, source: Source) -> None:
    encoder = StudyEncoder(kind, recipe.text, ImageSettings(stitch=True))
    stream = Stream(source, encoder, StreamSpec(recipe.stages[1], 1, recipe.stream, recipe.seed))
    try:
        steps = list(stream)
    finally:
        stream.close()
    assert {batch["pixel_values"].shape[1] for step in steps for batch in step.micro_batches} == {1}
    tiles = {int(n) for step in steps for batch in step.micro_batches for n in batch["aspect_ratio_mask"].sum((1, 2))}
    assert len(tiles) > 1, "two views are wider than one"


def test_the_first_samples_are_shown_in_the_order_of_training(
    recipe_file: Path, source: Source, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts from the token ids, pictures from the arrays."""
    out = tmp_path / "shown"
    main([str(recipe_file), "text.max_tokens=40", "--stage", "adapt", "--show", "3", "--out", str(out)])
    said = capsys.readouterr().out
    numbers = stage_sampler(source, 1, recipe.stream, recipe.seed).at(np.arange(3)).sample
    places = [said.index(key) for key in source.keys(numbers)]
    assert places == sorted(places)
    blocks = said.split("\n\n")[1:]
    for turn, (number, block) in enumerate(zip(numbers, blocks, strict=True)):
        key, sample, views = source.read(int(number))
        assert block.count("56 x 56 pixels, L") == len(views)
        assert block.count("<|image|>") == len(views)
        assert "Write the report of this chest radiograph." in block
        answer = block.split("cut at text.max_tokens 40: ")[1].split("\n")[0]
        assert len(answer) > 5
        assert sample.report.text().startswith(answer)
        with Image.open(out / f"{turn}-{key}.png") as picture:
            pixels = np.asarray(picture.convert("L")).astype(int)
        # One tile of 56 pixels for views of 56: what the model sees is what lies in the shard.
        left, right = pixels[26:, : len(views) * 520 - 8], pixels[26:, -len(views) * 520 : -8]
        assert left.shape == right.shape
        assert np.abs(left - right).max() <= 1
        assert left.std() > 10
        assert (out / f"{turn}-{key}.png").stat().st_mode & 0o077 == 0
    assert "view 0     PA" in said


def test_views_that_are_left_out_are_said(
    recipe_file: Path, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(recipe_file), "images.views=1", "--show", "1", "--out", str(tmp_path)])
    two = int((source.sizes(np.arange(len(source)))[:, 0] == 2).sum())
    assert two > 0
    assert f"{two} of them have more than 1 view(s), of which the others are left out" in capsys.readouterr().out


def test_mistakes_get_one_line_and_status_2(recipe_file: Path, tmp_path: Path) -> None:
    nowhere = ["model.tokenizer.train_vocabulary=null", f"model.tokenizer.folder={tmp_path}/none"]
    for arguments, words in (
        ([str(tmp_path / "none.yaml")], "no such file"),
        ([str(recipe_file), "--stage", "scartch"], "--stage scartch: allowed are scratch, adapt, refine"),
        ([str(recipe_file), "--show", "0"], "--show 0: allowed are numbers from 1"),
        ([str(recipe_file), "--show", "x"], "invalid int value: 'x'"),
        ([str(recipe_file), "--split", "valid"], "invalid choice: 'valid'"),
        ([str(recipe_file), "--hsow", "3"], "unrecognized arguments: --hsow"),
        ([str(recipe_file), "images.gap=3"], "'gap' 3 goes with 'stitch: true'"),
        ([str(recipe_file), "images.views=0"], "images.views"),
        ([str(recipe_file), "--out", str(recipe_file)], f"--out {recipe_file}: File exists"),
        ([str(recipe_file), *nowhere, "--out", str(tmp_path / "out")], "no tokenizer there"),
    ):
        with pytest.raises(UserError) as mistake:
            main(arguments)
        assert words in str(mistake.value)
        assert "\n" not in str(mistake.value)
    command = [sys.executable, "-m", "radhpc.data.stream", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/none.yaml: no such file")
