"""No picture stands in two splits, in one dataset or in several; where it must, people are told."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.storage.store import Store
from shards import duplicates
from shards.build import BuildSettings, build
from shards.datasets import phantom
from shards.verify import verify, verify_apart

pytestmark = pytest.mark.timeout(120)
SPLITS = ["train"] * 8 + ["validate"] * 2 + ["test"] * 2


def picture(number: int) -> Image.Image:
    """A drawn radiograph; another patient for each number."""
    raw = phantom.Picture(seed=5, study=6 * number, view="PA", size=160)()
    return Image.fromarray((raw.pixels >> 4).astype(np.uint8))


def archive(folder: Path, splits: list[str], first: int = 0) -> Path:
    """A study for each entry, each of a patient of its own."""
    folder.mkdir()
    rows = []
    for n, split in enumerate(splits):
        picture(first + n).save(folder / f"{n}.png")
        rows.append({"image": f"{n}.png", "text": f"Report {n}.", "patient": n, "split": split})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def built(raw: Path, out: Path, **settings: object) -> list[dict[str, str]]:
    """Build, and return what was left out."""
    return build("image_text", raw, str(out), {}, BuildSettings(workers=1, max_skipped=0, **settings)).skipped  # type: ignore[arg-type]


def splits(out: Path) -> dict[str, int]:
    return Manifest.load(Store(out)).splits


def test_copies_of_held_out_pictures_are_left_out_of_train(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw", SPLITS)
    picture(10).resize((120, 120)).convert("RGB").save(raw / "0.png")  # of the test patient 10, smaller
    Image.eval(picture(11), lambda value: min(255, int(value * 1.1))).save(raw / "8.png")  # 8 is in validate
    with (raw / "1.png").open("wb") as file:
        picture(9).save(file, "JPEG", quality=60)  # of the validate patient 9
    skipped = built(raw, tmp_path / "out")
    assert sorted(skip["name"] for skip in skipped) == ["raw: 0.png", "raw: 1.png", "raw: 8.png"]
    assert all(skip["reason"].startswith(duplicates.REASON) for skip in skipped)
    assert splits(tmp_path / "out") == {"train": 6, "validate": 1, "test": 2}
    assert Manifest.load(Store(tmp_path / "out")).skipped == {duplicates.REASON: 3}
    assert verify(str(tmp_path / "out")).ok
    images = duplicates.load(str(tmp_path / "out"))
    assert not [pair for pair in duplicates.overlaps(images, images) if pair[0] != pair[1]]


def test_they_stay_and_are_told_where_that_is_wanted(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw", SPLITS)
    picture(10).save(raw / "0.png")
    result = build("image_text", raw, str(tmp_path / "out"), {}, BuildSettings(workers=1, duplicates="report"))
    assert (result.samples, result.skipped) == (12, [])
    assert "1 of 8 images in train are near-duplicates of images in test" in result.warnings
    assert verify(str(tmp_path / "out")).ok


def test_a_leak_that_a_build_did_not_make_is_a_fault(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw", SPLITS)
    picture(10).save(raw / "0.png")
    build("image_text", raw, str(tmp_path / "out"), {}, BuildSettings(workers=1, duplicates="report"))
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"duplicates": "report"', '"duplicates": "drop"'))
    assert [fault.fault for fault in verify(str(tmp_path / "out")).faults] == [
        "1 of 8 images in train are near-duplicates of images in test"
    ]


def test_datasets_are_built_apart(tmp_path: Path) -> None:
    built(archive(tmp_path / "one", SPLITS), tmp_path / "one-shards")
    raw = archive(tmp_path / "two", SPLITS, first=20)
    picture(0).save(raw / "11.png")  # of one's train, in two's test
    picture(11).save(raw / "3.png")  # of one's test, in two's train
    picture(1).save(raw / "4.png")  # in train of both: no leak
    one, two = str(tmp_path / "one-shards"), str(tmp_path / "two-shards")
    build("image_text", raw, two, {"name": "two"}, BuildSettings(workers=1))
    assert sorted(fault.fault for fault in verify_apart(two, one)) == [
        f"1 of 2 images in test nearly repeat images in train of {one}",
        f"1 of 8 images in train nearly repeat images in test of {one}",
    ]
    apart = str(tmp_path / "apart")
    result = build("image_text", raw, apart, {"name": "two"}, BuildSettings(workers=1, apart_from=(one,)))
    assert sorted(skip["name"] for skip in result.skipped) == ["two: 11.png", "two: 3.png"]
    assert not verify_apart(apart, one)
    with pytest.raises(UserError, match=r"holds another build \(other apart_from\)"):
        build("image_text", raw, apart, {"name": "two"}, BuildSettings(workers=1))
    with pytest.raises(UserError, match="nowhere: no manifest.json there"):
        build(
            "image_text", raw, apart, {"name": "two"}, BuildSettings(workers=1, apart_from=(str(tmp_path / "nowhere"),))
        )


def test_a_question_set_that_shares_images_is_told_of_another_set(tmp_path: Path) -> None:
    """The pictures of a VQA set may come from a set that one trains on."""
    built(archive(tmp_path / "one", SPLITS), tmp_path / "one-shards")
    folder = tmp_path / "vqa"
    (folder / "VQA_RAD Image Folder").mkdir(parents=True)
    rows = []
    for n in range(4):
        picture(n).save(folder / "VQA_RAD Image Folder" / f"synpic{n}.jpg", quality=90)
        for kind in ("freeform", "test_freeform"):
            question = {"qid": f"{n}{kind}", "phrase_type": kind, "image_name": f"synpic{n}.jpg", "answer": "Yes"}
            rows.append({**question, "question": f"Is there an effusion? {kind}", "answer_type": "CLOSED"})
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    settings = BuildSettings(workers=1, apart_from=(str(tmp_path / "one-shards"),))
    result = build("vqa_rad", folder, str(tmp_path / "vqa-shards"), {}, settings)
    assert result.samples == 8
    messages = "\n".join(result.warnings)
    assert "4 of 4 images in train are near-duplicates of images in test" in messages
    assert f"4 of 4 images in test are near-duplicates of images in train of {tmp_path / 'one-shards'}" in messages
