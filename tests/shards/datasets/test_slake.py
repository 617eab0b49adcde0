"""SLAKE: two languages, the official split by image, and the copies that name their files otherwise."""

from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from shards.datasets import reader
from tests.shards.datasets.drawn import built, draw, listed, refusal, write_json

pytestmark = pytest.mark.timeout(60)


def record(qid: int, image: int, language: str = "en", **more: Any) -> dict[str, Any]:
    return {
        "img_id": image, "img_name": f"xmlab{image}/source.jpg", "question": f"Question {qid}?", "answer": "MRI",
        "q_lang": language, "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa",
        "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": qid, **more,
    }  # fmt: skip


SPLITS = {
    "train": [
        record(0, 1),
        record(1, 1, "zh", question="图像中\n有肝脏吗？", answer="是", answer_type="CLOSED", content_type="Organ"),
        record(2, 2, answer=2, base_type="kvqa", answer_type="closed ", modality="X-Ray", location="Lung"),
    ],
    "validate": [record(3, 3)],
    "test": [record(4, 4), record(5, 4, "zh", question="用的是什么模态？", answer="核磁共振")],
}


def write(folder: Path, splits: dict[str, Any] = SPLITS, validate: str = "validate.json", **options: str) -> Path:
    for split, rows in splits.items():
        write_json(folder / (validate if split == "validate" else f"{split}.json"), rows, **options)
        for row in rows:
            draw(folder / "imgs" / row["img_name"], int(row["img_id"]))
    return folder


def test_english_as_published(tmp_path: Path) -> None:
    result, samples = built("slake", write(tmp_path / "raw"), tmp_path / "out")
    assert result.splits == {"train": 2, "validate": 1, "test": 1}
    assert [(sample.question, sample.answer, sample.language, sample.split) for sample in samples] == [
        ("Question 0?", "MRI", "en", "train"),
        ("Question 2?", "2", "en", "train"),
        ("Question 3?", "MRI", "en", "validate"),
        ("Question 4?", "MRI", "en", "test"),
    ]
    assert samples[1].labels == {
        "answer type": {"closed": 1},
        "question type": {"Modality": 1},
        "organ": {"Lung": 1},
        "modality": {"X-Ray": 1},
        "base type": {"kvqa": 1},
    }
    assert len({sample.patient for sample in samples}) == 4
    assert [text for text in result.warnings if "SLAKE" in text] == [
        "SLAKE: 2 questions in another language than en were left out; languages=en,zh takes all, "
        "languages=zh those alone"
    ]


def test_chinese_and_both(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw")
    _, samples = built("slake", raw, tmp_path / "zh", unscrubbed=True, languages="zh")
    assert [(sample.question, sample.answer, sample.language) for sample in samples] == [
        ("图像中 有肝脏吗？", "是", "zh"),
        ("用的是什么模态？", "核磁共振", "zh"),
    ]
    result, samples = built("slake", raw, tmp_path / "both", unscrubbed=True, languages="en,zh")
    assert result.samples == 6
    assert [text.split(":")[0] for text in result.warnings] == ["--unscrubbed"]
    by_question = {sample.question: sample.patient for sample in samples}
    assert by_question["Question 0?"] == by_question["图像中 有肝脏吗？"], "the image stands for the patient"
    with pytest.raises(UserError, match=r"slake: option languages=de: .*en, zh or en,zh"):
        listed("slake", raw, languages="de")


@pytest.mark.parametrize(
    ("inner", "validate", "encoding"),
    [("", "validation.json", "utf-8"), ("Slake1.0", "validate.json", "utf-8-sig"), ("", "val.json", "utf-8")],
)
def test_copies_say_the_same(inner: str, validate: str, encoding: str, tmp_path: Path) -> None:
    original = listed("slake", write(tmp_path / "a"), languages="en,zh")
    write(tmp_path / "b" / inner, validate=validate, encoding=encoding)
    copy = listed("slake", tmp_path / "b", languages="en,zh")
    assert [(s.study, s.patient, s.split, s.answer) for s in copy] == [
        (s.study, s.patient, s.split, s.answer) for s in original
    ]
    assert all(path.is_file() for study in copy for path, _ in study.views if isinstance(path, Path))


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", {**SPLITS, "test": [record(6, 1)]})
    with pytest.raises(
        UserError, match=r"'train.json record 1: xmlab1/source.jpg' is in train and 'test.json record 1"
    ):
        built("slake", raw, tmp_path / "out")


def test_question_numbers_may_start_anew_in_each_file(tmp_path: Path) -> None:
    rows = {split: [record(0, n), record(1, n)] for n, split in enumerate(SPLITS)}
    assert len({study.study for study in listed("slake", write(tmp_path, rows))}) == 6
    without = {split: [{**row, "qid": None} for row in own] for split, own in rows.items()}
    assert len({study.study for study in listed("slake", write(tmp_path, without))}) == 6


def test_a_missing_split_is_told(tmp_path: Path) -> None:
    raw = write(tmp_path, {"test": SPLITS["test"]})
    with pytest.warns(reader.DatasetWarning) as caught:
        studies = listed("slake", raw, languages="en,zh")
    assert {study.split for study in studies} == {"test"}
    assert [str(warning.message).partition(": ")[2] for warning in caught] == [
        "split 'train' stays empty, for want of train.json",
        "split 'validate' stays empty, for want of validate.json or validation.json or val.json",
    ]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"answer": "  "}, "empty answer"),
        ({"answer": {"en": "x"}}, "answer is no text"),
        ({"question": None}, "empty question"),
        ({"q_lang": "fr"}, "unknown language"),
        ({"q_lang": None}, "unknown language"),
        ({"img_name": None}, "no image named"),
        ({"modality": ["MRI"]}, "modality is no text"),
    ],
)
def test_unusable_records_are_named(values: dict[str, Any], fault: str, tmp_path: Path) -> None:
    raw = write(tmp_path)
    write_json(raw / "validate.json", [record(3, 3), {**record(7, 7), **values}])
    studies = [study for study in listed("slake", raw, languages="en,zh") if study.fault]
    assert [(study.fault, study.name) for study in studies] == [(fault, "validate.json record 2")]


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    assert "--raw is missing: the folder of SLAKE" in refusal("slake", None)
    assert "no SLAKE there; looked for train.json, validate.json" in refusal("slake", tmp_path)
    (tmp_path / "a.parquet").touch()
    assert "Parquet copies of SLAKE cannot be read" in refusal("slake", tmp_path)
    assert "Parquet copies of SLAKE cannot be read" in refusal("slake", tmp_path / "a.parquet")
    write_json(tmp_path / "train.json", [{"image": "a"}])
    assert "no folder of SLAKE's images; looked for imgs, images" in refusal("slake", tmp_path)
    (tmp_path / "imgs").mkdir()
    assert "train.json: no img_name, question, answer, q_lang in the records" in refusal("slake", tmp_path)
    (tmp_path / "train.json").write_text('[{"img_name": "a",}]')
    assert "train.json: line 1, column 19: no valid JSON" in refusal("slake", tmp_path)
    assert "a file; expected the folder of SLAKE" in refusal("slake", tmp_path / "train.json")
