"""From shards to batches: each sample once for any number of ranks, exact labels, nothing damaged in silence."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.manifest import MANIFEST
from radhpc.core.recipe import Recipe, Stage, load
from radhpc.core.sample import Report, Sample, View
from radhpc.data.collate import IGNORE, StudyEncoder
from radhpc.data.source import BadSample, Source
from radhpc.data.stream import Stream, StreamSpec, stage_samples, stage_steps
from radhpc.models.family import ModelFamily
from radhpc.storage.store import Store
from tests.conftest import TINY_RECIPE, tiny_family


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Recipe:
    path = tmp_path_factory.mktemp("data") / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(shards=phantom_shards))
    return load(path)


@pytest.fixture(scope="module")
def source(recipe: Recipe) -> Source:
    return Source(recipe.shards, "train")


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> ModelFamily:
    return tiny_family(recipe, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def steps(
    source: Source, encoder: StudyEncoder, recipe: Recipe, stage: Stage, world: int, cursor: int = 0
) -> list[list[str]]:
    """The keys of each step over all ranks, sorted; fails where ranks differ in steps or micro-batches."""
    streams = [Stream(source, encoder, StreamSpec(stage, 0, recipe.stream, 0, r, world, cursor)) for r in range(world)]
    rows = [list(stream) for stream in streams]
    for stream in streams:
        stream.close()
    for ranks in zip(*rows, strict=True):
        assert len({tuple(b["input_ids"].shape[0] for b in step.micro_batches) for step in ranks}) == 1
        assert len({step.number for step in ranks}) == 1
    return [sorted(key for step in ranks for key in step.keys) for ranks in zip(*rows, strict=True)]


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 13),
    micro=st.none() | st.integers(1, 4),
    lives=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_every_sample_of_an_epoch_once_for_any_topology_and_interruption(
    source: Source, kind: ModelFamily, recipe: Recipe, batch: int, micro: int | None, lives: list[tuple[int, int]]
) -> None:
    """Lives of any world size, each cut after some steps: together they are one epoch, in the order of one rank."""
    encoder = StudyEncoder(kind, recipe.text)
    given = {**recipe.stages[1].model_dump(), "epochs": 1, "batch": batch, "micro_batch": micro}
    stage = Stage.model_validate(given)
    done: list[list[str]] = []
    for world, count in [*lives, (2, 10**6)]:
        cursor = min(len(done) * batch, stage_samples(stage, len(source)))
        done += steps(source, encoder, recipe, stage, world, cursor)[:count]
    keys = [key for step in done for key in step]
    assert sorted(keys) == sorted(source.key(n) for n in range(len(source)))
    assert len(done) == stage_steps(stage, len(source))
    assert done == steps(source, encoder, recipe, stage, 1)


def test_what_is_supervised_is_the_answer_and_its_end(source: Source, kind: ModelFamily, recipe: Recipe) -> None:
    encoder = StudyEncoder(kind, recipe.text)
    rows, answers = [], []
    for n in range(6):
        key, sample, views = source.read(n)
        rows.append(encoder.encode(key, sample, views))
        answers.append(encoder.reference(sample))
    batch = encoder.batch(rows)
    for ids, labels, mask, answer in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], answers, strict=True
    ):
        taught = labels != IGNORE
        assert kind.tokenizer.decode(labels[taught]) == answer + kind.tokenizer.eos_token
        assert (ids[taught] == labels[taught]).all()
        assert (mask[taught] == 1).all()
        assert kind.image_token_id not in labels  # type: ignore[attr-defined]
        assert ids[0] == kind.tokenizer.bos_token_id
        assert (ids[1:] != kind.tokenizer.bos_token_id).all()


def test_a_study_without_text_teaches_nothing(kind: ModelFamily, recipe: Recipe) -> None:
    sample = Sample(
        dataset="d", patient="0" * 16, study="0" * 16, split="train", images=(View(width=9, height=9),), report=Report()
    )
    row = StudyEncoder(kind, recipe.text).encode("k", sample, [Image.new("L", (20, 20))])
    assert row.supervised == 0


def test_a_question_is_asked_and_its_answer_taught(kind: ModelFamily, recipe: Recipe) -> None:
    sample = Sample(
        dataset="d", patient="0" * 16, study="0" * 16, split="train", images=(View(width=9, height=9),),
        question="Is there an effusion?", answer="No pleural effusion.",
    )  # fmt: skip
    row = StudyEncoder(kind, recipe.text).encode("k", sample, [Image.new("L", (20, 20))])
    text = kind.tokenizer.decode(row.input_ids)
    assert "Is there an effusion?" in text
    assert kind.tokenizer.decode(row.labels[row.labels != IGNORE]).startswith("No pleural effusion.")


def test_long_texts_are_cut_and_said_so(kind: ModelFamily, recipe: Recipe, source: Source) -> None:
    text = recipe.text.model_copy(update={"max_tokens": 50})
    row = StudyEncoder(kind, text).encode(*source.read(0))
    assert row.cut
    assert len(row.input_ids) == 50


def test_collating_equals_transformers_own_processor(kind: ModelFamily, recipe: Recipe, source: Source) -> None:
    """The image inputs and masks that transformers' processor makes of the same studies and prompts."""
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    encoder = StudyEncoder(kind, recipe.text)
    studies = [source.read(n) for n in range(8)]
    assert {len(views) for _, _, views in studies} == {1, 2}
    rows = [encoder.encode_prompt(key, None, views) for key, _, views in studies]
    ours = encoder.batch(rows)
    vision = kind.config.vision_config  # type: ignore[attr-defined]
    size = {"height": vision.image_size, "width": vision.image_size}
    images = MllamaImageProcessorPil(size=size, max_image_tiles=vision.max_num_tiles)
    processor = MllamaProcessor(images, kind.tokenizer)
    theirs = processor(
        images=[[view.convert("RGB") for view in views] for _, _, views in studies],
        text=[kind.prompt(recipe.text.prompt, len(views)) for _, _, views in studies],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert ours[name].shape == theirs[name].shape, name
        assert np.allclose(ours[name].numpy(), theirs[name].numpy(), atol=1e-5), name
    valid = ours["attention_mask"].bool()
    assert (ours["cross_attention_mask"][valid] == theirs["cross_attention_mask"][valid]).all()


def damaged(shards: Path, folder: Path) -> Path:
    shutil.copytree(shards, folder)
    return folder


def test_damage_is_named(phantom_shards: Path, tmp_path: Path) -> None:
    flipped = damaged(phantom_shards, tmp_path / "flipped")
    shard = sorted(flipped.glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    sources = [Source((str(flipped),), split) for split in ("train", "validate", "test")]
    faults = []
    for part in sources:
        for n in range(len(part)):
            try:
                part.read(n)
            except BadSample as error:
                faults.append(str(error))
    assert len(faults) == 1
    assert shard.name in faults[0]
    assert "checksum differs" in faults[0]
    shard.write_bytes(bytes(data[:-512]))
    with pytest.raises(UserError, match=shard.name):
        sources[0].check_sizes()
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing"):
        Source((str(flipped),), "train").check_sizes()


def test_a_manifest_that_is_none_is_named(phantom_shards: Path, tmp_path: Path) -> None:
    folder = damaged(phantom_shards, tmp_path / "other")
    manifest = folder / MANIFEST
    text = manifest.read_text()
    for wrong, words in (
        (text.replace('"format": 2', '"format": 3'), "format"),
        ("{", MANIFEST),
        ("{}", "Field required"),
    ):
        manifest.write_text(wrong)
        with pytest.raises(UserError, match=words):
            Source((str(folder),), "train")
    manifest.write_text(text)
    index = folder / "index.npz"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(UserError, match="index.npz: does not match"):
        Source((str(folder),), "train")


def test_a_patient_in_two_splits_is_refused(phantom_shards: Path, tmp_path: Path) -> None:
    """Across folders: the same studies, built with other ratios, put patients into other splits."""
    from shards.build import BuildSettings, build

    out = tmp_path / "again"
    settings = BuildSettings(workers=1, longest_side=56, ratios=(0.1, 0.1, 0.8))
    build("phantom", None, str(out), {"studies": "60", "size": "96"}, settings, lambda done, total: None)
    with pytest.raises(UserError, match="another split"):
        Source((str(phantom_shards), str(out)), "train")


def test_a_url_reads_the_same_bytes_as_a_folder(phantom_shards: Path) -> None:
    """Through obstore, the way object storage is read."""
    folder, url = Source((str(phantom_shards),), "train"), Source((f"file://{phantom_shards}",), "train")
    assert folder.hashes == url.hashes
    url.check_sizes()
    for n in range(0, len(folder), 7):
        assert folder.read(n)[1] == url.read(n)[1]
    with pytest.raises(FileNotFoundError):
        Store(f"file://{phantom_shards}").read("none.tar")
