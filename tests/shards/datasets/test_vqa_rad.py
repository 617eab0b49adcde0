"""VQA-RAD: the official split, what it shares, and answers of all kinds."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from shards.datasets import reader, registry
from tests.shards.datasets.drawn import built, draw, listed, refusal, write_json

pytestmark = pytest.mark.timeout(60)
TABLE = "VQA_RAD Dataset Public.json"


def record(qid: Any, image: str, phrase: str = "freeform", **more: Any) -> dict[str, Any]:
    return {
        "qid": qid, "phrase_type": phrase, "qid_linked_id": f"link-{qid}", "image_case_url": "https://example.org/1",
        "image_name": image, "image_organ": "CHEST", "evaluation": "evaluated", "question": f"Question {qid}?",
        "question_rephrase": "NULL", "question_relation": "NULL", "question_frame": "NULL", "question_type": "PRES",
        "answer": "yes", "answer_type": "CLOSED", **more,
    }  # fmt: skip


ROWS = [
    record(1, "synpic1.jpg", question="Is there\na mass ?", answer_type="CLOSED "),
    record(
        2, "synpic1.jpg", "test_freeform", question_type="PRES, ABN", answer="a left  effusion\t", answer_type="OPEN"
    ),
    record(3, "synpic2 a.b.jpg", answer=2, answer_type="OPEN", image_organ="HEAD"),
    record(4, "synpic2 a.b.jpg", "para", answer=7.0),
    record(5, "synpic3.jpg", "test_para", qid_linked_id="link-3", answer="É"),
]


def write(folder: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    write_json(folder / TABLE, rows, encoding)
    for seed, name in enumerate(sorted({row["image_name"] for row in rows if row["image_name"]})):
        draw(folder / "VQA_RAD Image Folder" / name, seed)
    return folder


def test_as_published(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ROWS, "utf-8-sig")
    result, samples = built("vqa_rad", raw, tmp_path / "out")
    assert result.splits == {"train": 3, "validate": 0, "test": 2}
    assert [(sample.question, sample.answer, sample.split) for sample in samples] == [
        ("Is there a mass ?", "yes", "train"),
        ("Question 2?", "a left effusion", "test"),
        ("Question 3?", "2", "train"),
        ("Question 4?", "7", "train"),
        ("Question 5?", "É", "test"),
    ]
    assert samples[0].labels["answer type"] == {"closed": 1}
    assert samples[1].labels == {
        "answer type": {"open": 1},
        "question type": {"PRES": 1, "ABN": 1},
        "organ": {"CHEST": 1},
        "phrase type": {"freeform": 1},
    }
    assert samples[4].labels["phrase type"] == {"para": 1}
    patients = [sample.patient for sample in samples]
    assert patients[2] == patients[3], "questions on one image are of one patient"
    assert patients[0] != patients[1], "but no patient stands in two splits, even where an image does"
    assert not any(sample.report.text() for sample in samples)
    (messages,) = [text for text in result.warnings if "VQA-RAD" in text]
    assert "1 images and 1 questions with paraphrases stand in the official test set and outside it" in messages
    assert "split=disjoint" in messages
    assert "validation=0.1" in messages


def test_disjoint_keeps_the_test_set_whole(tmp_path: Path) -> None:
    with pytest.warns(reader.DatasetWarning, match="2 questions of train were left out for that"):
        studies = listed("vqa_rad", write(tmp_path, ROWS), split="disjoint")
    assert [(study.question, study.split) for study in studies] == [
        ("Question 2?", "test"),  # without question 1, on its image, and question 3, its paraphrase
        ("Question 4?", "train"),
        ("Question 5?", "test"),
    ]
    of = defaultdict(set)
    for study in studies:
        of[study.views[0][0]].add(study.split)
    assert all(len(splits) == 1 for splits in of.values())


def test_by_image_each_stands_in_one_split(tmp_path: Path) -> None:
    rows = [record(n, f"synpic{n % 12}.jpg", "test_freeform" if n % 5 == 0 else "freeform") for n in range(48)]
    raw = write(tmp_path / "raw", rows)
    result, samples = built("vqa_rad", raw, tmp_path / "out", split="image")
    assert result.samples == 48
    assert min(result.splits.values()) > 0
    by_patient = defaultdict(set)
    for sample in samples:
        by_patient[sample.patient].add(sample.split)
    assert len(by_patient) == 12
    assert all(len(splits) == 1 for splits in by_patient.values())
    assert not any("VQA-RAD" in text for text in result.warnings)


def test_whether_images_are_shared_is_known_before_the_build() -> None:
    kind = registry.reader("vqa_rad").OPTIONS
    shares = {split: kind.model_validate({"split": split}).shares_images for split in ("official", "disjoint", "image")}
    assert shares == {"official": True, "disjoint": False, "image": False}
    assert kind.model_validate({}).shares_images


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_validation_takes_whole_images_out_of_train(tmp_path: Path) -> None:
    rows = [record(n, f"synpic{n % 40}.jpg", "test_para" if n % 3 == 0 else "para") for n in range(160)]
    raw = write(tmp_path, rows)
    with pytest.warns(reader.DatasetWarning) as caught:
        studies = listed("vqa_rad", raw, validation="0.3")
    assert not any("validation=0.1" in str(warning.message) for warning in caught)
    images = {split: {s.views[0][0] for s in studies if s.split == split} for split in ("train", "validate", "test")}
    assert sum(study.split == "test" for study in studies) == 54, "the official test set stays"
    assert 4 <= len(images["validate"]) <= 16
    assert not images["train"] & images["validate"]
    assert studies == listed("vqa_rad", raw, validation="0.3")
    with pytest.raises(UserError, match=r"validation=0.3 goes with split=official or split=disjoint"):
        listed("vqa_rad", raw, validation="0.3", split="image")
    with pytest.raises(UserError, match=r"option validation=0.9: .*0 to 0.5"):
        listed("vqa_rad", raw, validation="0.9")
    with pytest.raises(UserError, match=r"option split=patient: .*'official', 'disjoint' or 'image'"):
        listed("vqa_rad", raw, split="patient")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"answer": ""}, "empty answer"),
        ({"answer": None}, "empty answer"),
        ({"answer": float("nan")}, "empty answer"),
        ({"answer": ["yes"]}, "answer is no text"),
        ({"answer": "\ud800"}, "answer is no text"),
        ({"question": " \n "}, "empty question"),
        ({"qid": None}, "empty question identifier"),
        ({"image_name": ""}, "no image named"),
        ({"image_name": 7}, "no image named"),
        ({"image_name": "a\0.jpg"}, "image path with a zero byte"),
        ({"image_name": "../secret.jpg"}, "image path that leaves the folder"),
        ({"image_name": "/etc/a.jpg"}, "image path that leaves the folder"),
        ({"phrase_type": "framed"}, "unknown phrase type"),
        ({"phrase_type": None}, "unknown phrase type"),
    ],
)
@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_unusable_records_are_named(values: dict[str, Any], fault: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / TABLE).write_text(json.dumps([record(1, "a.jpg"), {**record(2, "b.jpg"), **values}]))
    studies = listed("vqa_rad", tmp_path)
    assert [study.fault for study in studies] == [None, fault]
    assert studies[1].name == f"{TABLE} record 2"


def test_a_missing_image_is_named_and_counts(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", ROWS)
    (raw / "VQA_RAD Image Folder" / "synpic3.jpg").unlink()
    result, _ = built("vqa_rad", raw, tmp_path / "out", max_skipped=1)
    assert [(skip["name"], skip["reason"]) for skip in result.skipped] == [
        (f"{TABLE} record 5: synpic3.jpg", "missing image file")
    ]


def test_a_question_that_comes_twice_is_left_out_once(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", [*ROWS, ROWS[0]])
    result, _ = built("vqa_rad", raw, tmp_path / "out", max_skipped=1)
    assert [skip["reason"] for skip in result.skipped] == ["duplicate key"]


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    assert "--raw is missing" in refusal("vqa_rad", None)
    assert "no such file or folder" in refusal("vqa_rad", tmp_path / "nowhere")
    assert f"looked for {TABLE}" in refusal("vqa_rad", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert "Parquet copies of VQA-RAD cannot be read; expected the original release" in refusal("vqa_rad", tmp_path)
    write_json(tmp_path / TABLE, [{"qid": 1, "image_name": "a.jpg", "question": "x"}])
    assert "no phrase_type, answer in the records; found are qid, image_name, question" in refusal("vqa_rad", tmp_path)
    write_json(tmp_path / TABLE, ROWS)
    (tmp_path / "images.zip").touch()
    assert "no folder of VQA-RAD's images; looked for VQA_RAD Image Folder, images; unpack images.zip" in refusal(
        "vqa_rad", tmp_path
    )
