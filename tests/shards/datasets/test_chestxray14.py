"""ChestX-ray14: its odd header, its official split with patients held out to validate, and its real table."""

import csv
import gzip
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from radhpc.core.errors import UserError
from radhpc.core.sample import CHEXPERT, Report
from shards.datasets import chestxray14
from shards.datasets.reader import DatasetWarning, RawStudy
from tests.shards.datasets.drawn import built, draw, listed
from tests.shards.datasets.wheel import wheel

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")]
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS = [
    ("00000001_000.png", "Cardiomegaly", "0", "1", "PA"),
    ("00000001_001.png", "Cardiomegaly|Emphysema", "1", "1", "AP"),
    ("00000002_000.png", "No Finding", "0", "2", "PA"),
    ("00000003_000.png", "Mass|Effusion|Infiltration|Pleural_Thickening", "0", "3", "PA"),
]


def write_table(folder: Path, rows: list[tuple[str, ...]], delimiter: str = ",", header: str = HEADER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        delimiter.join((image, result, follow_up, patient, "057", "M", view, "2682", "2749", "0.143", "0.143"))
        for image, result, follow_up, patient, view in rows
    ]
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([header.replace(",", delimiter), *lines]) + "\n")


def archive(folder: Path, rows: list[tuple[str, ...]] = ROWS, test: tuple[str, ...] = ("00000003_000.png",)) -> Path:
    write_table(folder, rows)
    for number, (image, *_) in enumerate(rows):
        draw(folder / f"images_{number % 3 + 1:03d}" / "images" / Path(image).name, number)
    (folder / "train_val_list.txt").write_text("\n".join(row[0] for row in rows if row[0] not in test))
    (folder / "test_list.txt").write_text("\r\n".join(test) + "\r\n")
    return folder


def told(raw: Path, **options: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetWarning)
        listed("chestxray14", raw, **options)
    return [str(warning.message) for warning in caught]


def test_a_build_keeps_labels_views_and_the_official_split(tmp_path: Path) -> None:
    assert [chestxray14.held_out(patient, 0.1) for patient in ("1", "2", "3")] == [False, True, False]
    raw = archive(tmp_path / "raw")
    result, samples = built("chestxray14", raw, tmp_path / "out")
    assert (result.splits, result.patients) == (
        {"train": 2, "validate": 1, "test": 1},
        {"train": 1, "validate": 1, "test": 1},
    )
    assert all(sample.report == Report() and len(sample.images) == 1 for sample in samples)
    assert Counter(sample.images[0].view for sample in samples) == {"PA": 3, "AP": 1}
    test = next(sample for sample in samples if sample.split == "test")
    own, chexpert = test.labels["chestxray14"], test.labels["chexpert"]
    assert {name for name, value in own.items() if value == 1} == {
        "Mass", "Effusion", "Infiltration", "Pleural_Thickening",
    }  # fmt: skip
    assert len(own) == 15
    assert None not in own.values()
    assert {name for name, value in chexpert.items() if value == 1} == {"Lung Lesion", "Pleural Effusion"}
    assert {name for name, value in chexpert.items() if value is None} == {
        "Enlarged Cardiomediastinum", "Lung Opacity", "Pleural Other", "Fracture", "Support Devices",
    }  # fmt: skip
    assert set(chexpert) == set(CHEXPERT)
    assert not any("057" in sample.model_dump_json(exclude={"patient", "study"}) for sample in samples)


def test_labels_may_be_written_out_without_what_nobody_mentioned(tmp_path: Path) -> None:
    _, samples = built("chestxray14", archive(tmp_path / "raw"), tmp_path / "out", text="labels")
    assert {sample.report.text() for sample in samples} == {
        "Findings: Cardiomegaly.",
        "Findings: Cardiomegaly; emphysema.",
        "Findings: No finding.",
        "Findings: Effusion; infiltration; mass; pleural thickening.",
    }


@pytest.mark.parametrize("folder", ["images", "", "images/images"])
def test_images_in_one_folder(folder: str, tmp_path: Path) -> None:
    raw = archive(tmp_path)
    (raw / folder).mkdir(parents=True, exist_ok=True)
    for path in list(raw.glob("images_*/images/*.png")):
        path.rename(raw / folder / path.name)
    studies = listed("chestxray14", raw)
    assert [study.views[0][0] for study in studies] == [raw / folder / row[0] for row in ROWS]


def test_what_the_user_should_know(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw")
    (raw / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Infiltrate,1,2,3,4\n"
    )
    empty, split, boxes = told(raw)
    assert "text=labels" in empty
    assert "10% of the patients in train_val_list.txt validate" in split
    assert boxes == "BBox_List_2017.csv: its 1 boxes are not carried into the shards"
    (raw / "train_val_list.txt").unlink()
    with pytest.raises(UserError, match=r"test_list.txt is there, train_val_list.txt is not"):
        listed("chestxray14", raw)
    (raw / "test_list.txt").unlink()
    assert "not officially" in told(raw)[1]
    assert {study.split for study in listed("chestxray14", raw)} == {None}


def test_faults_are_named(tmp_path: Path) -> None:
    more = [
        ("00000004_000.png", "Cardiomegaly|Flu", "0", "4", "PA"),
        ("00000005_000.png", "No Finding|Edema", "0", "5", "PA"),
        ("00000006_000.png", "Edema", "0", "", "PA"),
        ("../00000007_000.png", "Edema", "0", "7", "PA"),
        ("00000008_000.png", "Edema", "0", "8", "PA"),
        ("00000009_000.png", "Edema", "0", "9", "PA"),
    ]
    raw = archive(tmp_path / "raw", ROWS + more)
    (raw / "train_val_list.txt").write_text("\n".join(row[0] for row in [*ROWS[:3], *more[:-1]]))
    next(raw.glob("*/images/00000008_000.png")).unlink()
    faults = {study.name: study.fault for study in listed("chestxray14", raw) if study.fault}
    assert faults == {
        "Data_Entry_2017_v2020.csv line 6": "unknown label",
        "Data_Entry_2017_v2020.csv line 7": "findings beside No Finding",
        "Data_Entry_2017_v2020.csv line 8": "patient that is no number",
        "Data_Entry_2017_v2020.csv line 9": "unknown form of image name",
        "00000008_000.png": "missing image file",
        "00000009_000.png": "in neither official list",
    }


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw", test=("00000001_001.png",))
    with pytest.raises(UserError, match="they are of the same patient"):
        built("chestxray14", raw, tmp_path / "out")
    (raw / "test_list.txt").write_text("00000001_000.png\n")
    with pytest.raises(UserError, match="1 images are listed twice in train_val_list.txt and test_list.txt"):
        listed("chestxray14", raw)


def test_the_users_mistakes_get_one_line(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw")
    studies = listed("chestxray14", raw)
    write_table(raw, ROWS, ";")
    with pytest.warns(DatasetWarning, match="read with a semicolon between the columns"):
        assert listed("chestxray14", raw) == studies
    write_table(raw, ROWS, header=HEADER.replace("Patient ID", "Subject"))
    with pytest.raises(UserError, match="no column Patient ID; found are Image Index"):
        listed("chestxray14", raw)
    with pytest.raises(UserError, match="option validate_share=1"):
        listed("chestxray14", raw, validate_share="1")
    write_table(tmp_path / "empty", ROWS)
    with pytest.raises(UserError, match="no images there; looked for files such as"):
        listed("chestxray14", tmp_path / "empty")
    with pytest.raises(UserError, match="no ChestX-ray14's table there"):
        listed("chestxray14", tmp_path)


def real(raw: Path, rows: int | None = None) -> tuple[list[dict[str, str]], list[RawStudy], list[str]]:
    """The first rows of the real table, what the reader makes of them, and its warnings.

    The official lists are not in the wheel: the patients of the 2019 relabelling's test set stand in for them.
    """
    with gzip.open(wheel("google2019_nih-chest-xray-labels.csv.gz"), "rt") as file:
        sets = [(row["Patient ID"], row["Set Id"]) for row in csv.DictReader(file)]
    tested = {patient for patient, name in sets if name == "test"}
    assert (len(sets), len(tested)) == (4_376, 860)
    assert tested.isdisjoint(patient for patient, name in sets if name == "val")
    with gzip.open(wheel("Data_Entry_2017_v2020.csv.gz"), "rt") as file:
        lines = list(islice(file, rows and rows + 1))
    (raw / "Data_Entry_2017_v2020.csv").write_text("".join(lines))
    (raw / "BBox_List_2017.csv.gz").symlink_to(wheel("BBox_List_2017.csv.gz"))
    table = list(csv.DictReader(lines))
    for name, expected in (("train_val_list.txt", False), ("test_list.txt", True)):
        images = [row["Image Index"] for row in table if (row["Patient ID"] in tested) == expected]
        (raw / name).write_text("\n".join(images))
    draw(raw / "images" / "00000001_000.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetWarning)
        studies = listed("chestxray14", raw)
    return table, studies, [str(warning.message) for warning in caught]


def test_the_start_of_the_real_table(tmp_path: Path) -> None:
    rows, studies, said = real(tmp_path, 10_000)
    assert "BBox_List_2017.csv.gz: its 984 boxes are not carried into the shards" in said
    assert len(rows) == len(studies) == len({study.study for study in studies}) == 10_000
    for row, study in zip(rows, studies, strict=True):
        assert study.fault is None
        assert (study.name, study.patient, study.views[0][1]) == (
            row["Image Index"], row["Patient ID"], row["View Position"],
        )  # fmt: skip
        present = {name for name, value in study.labels["chestxray14"].items() if value}
        assert present == set(row["Finding Labels"].split("|"))


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_the_whole_real_table(tmp_path: Path) -> None:
    _, studies, _ = real(tmp_path)
    assert len({study.study for study in studies if not study.fault}) == len(studies) == 112_120
    assert Counter(study.views[0][1] for study in studies) == {"PA": 67_310, "AP": 44_810}
    assert Counter(name for study in studies for name, value in study.labels["chestxray14"].items() if value) == {
        "No Finding": 60_361, "Infiltration": 19_894, "Effusion": 13_317, "Atelectasis": 11_559, "Nodule": 6_331,
        "Mass": 5_782, "Pneumothorax": 5_302, "Consolidation": 4_667, "Pleural_Thickening": 3_385,
        "Cardiomegaly": 2_776, "Emphysema": 2_516, "Edema": 2_303, "Fibrosis": 1_686, "Pneumonia": 1_431,
        "Hernia": 227,
    }  # fmt: skip
    patients = {study.patient: study.split for study in studies}
    assert all(patients[study.patient] == study.split for study in studies)
    split = Counter(patients.values())
    assert (len(patients), split["test"]) == (30_805, 860)
    assert 0.09 < split["validate"] / (split["validate"] + split["train"]) < 0.11


def test_shares_nest() -> None:
    """A larger share holds out the same patients and more, so that a change of mind moves few."""
    held = [{n for n in range(2000) if chestxray14.held_out(str(n), share)} for share in (0, 0.1, 0.2)]
    assert held[0] == set()
    assert held[1] < held[2]
    assert 320 < len(held[2]) < 480


def test_a_study_is_one_image_of_a_patient(tmp_path: Path) -> None:
    study: RawStudy = listed("chestxray14", archive(tmp_path))[1]
    assert (study.study, study.patient, study.name) == ("1/1", "1", "00000001_001.png")
