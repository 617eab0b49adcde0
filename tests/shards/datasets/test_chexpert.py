"""CheXpert and CheXpert Plus: unpacked in every way, official splits, and the real table of the training set."""

import csv
import gzip
import json
import shutil
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from radhpc.core.sample import CHEXPERT, Report
from shards.datasets import chexpert_plus, registry
from shards.datasets.helpers import chexpert, labels
from shards.datasets.reader import DatasetWarning, RawStudy
from tests.shards.datasets.drawn import built, draw, listed
from tests.shards.datasets.wheel import wheel

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")]
HEADER = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT)
SMALL = "CheXpert-v1.0-small"


def row(path: str, side: str = "Frontal", position: str = "AP", **values: str) -> dict[str, str]:
    names = {name.replace("_", " "): value for name, value in values.items()}
    return {
        "Path": path, "Sex": "Female", "Age": "68", "Frontal/Lateral": side, "AP/PA": position,
        **{name: names.get(name, "") for name in CHEXPERT},
    }  # fmt: skip


TRAIN = [
    row("train/patient00001/study1/view1_frontal.jpg", No_Finding="1.0", Pneumothorax="0.0", Support_Devices="1.0"),
    row("train/patient00002/study2/view1_frontal.jpg", position="LL", Edema="-1.0", Cardiomegaly="1.0", Fracture="0.0"),
    row("train/patient00002/study1/view1_frontal.jpg", position="PA", Lung_Opacity="1.0"),
    row("train/patient00002/study1/view2_lateral.jpg", "Lateral", "", Lung_Opacity="1.0"),
]
VALID = [row("valid/patient64541/study1/view1_frontal.jpg", No_Finding="0.0", Edema="1.0")]
TEST = [row("test/patient64741/study1/view1_frontal.jpg", Pneumonia="1")]


def write_table(path: Path, rows: list[dict[str, str]], prefix: str = f"{SMALL}/", delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, "Path": prefix + row["Path"]} for row in rows)


def write_images(folder: Path, rows: list[dict[str, str]], suffix: str = ".jpg") -> None:
    for seed, row in enumerate(rows):
        draw((folder / row["Path"]).with_suffix(suffix), seed + 1)


def archive(folder: Path, prefix: str = f"{SMALL}/") -> Path:
    write_table(folder / "train.csv", TRAIN, prefix)
    write_table(folder / "valid.csv", VALID, prefix)
    write_images(folder, TRAIN + VALID)
    return folder


def told(raw: Path, dataset: str = "chexpert", **options: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetWarning)
        listed(dataset, raw, **options)
    return [str(warning.message) for warning in caught]


def by_study(studies: list[RawStudy]) -> dict[str, RawStudy]:
    return {study.study: study for study in studies}


def test_a_build_keeps_labels_splits_and_views_and_writes_no_report(tmp_path: Path) -> None:
    raw = archive(tmp_path / SMALL)
    write_table(raw / "test.csv", TEST)
    write_images(raw, TRAIN + VALID + TEST)  # another picture each: near-duplicates of the test set are left out
    result, samples = built("chexpert", raw, tmp_path / "out")
    assert result.splits == {"train": 3, "validate": 1, "test": 1}
    assert result.patients == {"train": 2, "validate": 1, "test": 1}
    assert [warning for warning in result.warnings if "text=labels" in warning]
    assert not any("Female" in sample.model_dump_json() for sample in samples)
    assert all(sample.report == Report() and sample.question is None and sample.language == "en" for sample in samples)
    one = next(sample for sample in samples if len(sample.images) == 2)
    assert [view.view for view in one.images] == ["PA", "L"]
    assert one.labels == {"chexpert": {name: 1 if name == "Lung Opacity" else None for name in CHEXPERT}}
    assert Counter(view.view for sample in samples for view in sample.images) == {"AP": 3, "PA": 1, "L": 1, "LL": 1}


def test_labels_may_be_written_out(tmp_path: Path) -> None:
    _, samples = built("chexpert", archive(tmp_path / SMALL), tmp_path / "out", text="labels")
    assert {sample.report.text() for sample in samples} == {
        "Findings: No finding; no pneumothorax; support devices.",
        "Findings: Cardiomegaly; possible edema; no fracture.",
        "Findings: Lung opacity.",
        "Findings: Edema.",
    }
    assert not any("text=labels" in line for line in told(tmp_path / SMALL, text="labels"))
    assert labels.sentence({"Edema": None, "No Finding": 0}) is None
    assert labels.sentence({"Edema": 0, "Pleural_Thickening": 1}, absent=False) == "Pleural thickening."


@pytest.mark.parametrize("prefix", ["", "CheXpert-v1.0/", f"{SMALL}/", "a/b/"])
def test_any_first_part_of_the_path_will_do(prefix: str, tmp_path: Path) -> None:
    for raw in (archive(tmp_path / "renamed", prefix), tmp_path, tmp_path / "renamed" / "train.csv"):
        studies = listed("chexpert", raw)
        assert len(studies) == 4
        assert all(path.is_file() for study in studies for path, _ in study.views)


def test_tables_beside_the_folder_of_the_images(tmp_path: Path) -> None:
    raw = archive(tmp_path / SMALL)
    (tmp_path / "tables").mkdir()
    for name in ("train.csv", "valid.csv"):
        (raw / name).rename(tmp_path / "tables" / name)
    assert all(path.is_file() for study in listed("chexpert", tmp_path) for path, _ in study.views)
    (tmp_path / "tables").rename(tmp_path / "other")
    shutil.move(raw, tmp_path / "far" / SMALL)
    with pytest.raises(UserError, match="no images there; looked for folders such as train/patient00001/study1"):
        listed("chexpert", tmp_path / "other")
    shutil.move(tmp_path / "far" / SMALL, raw)  # the path is then relative to the parent of the tables' folder
    assert all(path.is_file() for study in listed("chexpert", tmp_path / "other") for path, _ in study.views)


def test_the_four_folders_of_the_full_size_release(tmp_path: Path) -> None:
    first, second, third = (
        tmp_path / f"CheXpert-v1.0 batch {n}" for n in ("1 (validate & csv)", "2 (train 1)", "3 (train 2)")
    )
    write_table(first / "train.csv", TRAIN, "CheXpert-v1.0/")
    write_table(first / "valid.csv", VALID, "CheXpert-v1.0/")
    write_images(first, VALID)
    write_images(tmp_path, TRAIN)
    for patient, batch in (("patient00001", second), ("patient00002", third)):
        shutil.move(tmp_path / "train" / patient, batch / patient)
    (tmp_path / "train").rmdir()
    studies = listed("chexpert", tmp_path)
    assert all(path.is_file() for study in studies for path, _ in study.views)
    assert {path.relative_to(tmp_path).parts[0] for study in studies for path, _ in study.views} == {
        first.name, second.name, third.name,
    }  # fmt: skip


def test_labels_of_the_test_set_without_columns_of_views(tmp_path: Path) -> None:
    raw = archive(tmp_path / SMALL)
    short = [{name: value for name, value in row.items() if name in ("Path", *CHEXPERT)} for row in TEST]
    write_table(raw / "test_labels.csv", short, "")
    study = by_study(listed("chexpert", raw))["patient64741/study1"]
    assert (study.split, study.labels["chexpert"]["Pneumonia"]) == ("test", 1)
    assert study.views == ((raw / "test/patient64741/study1/view1_frontal.jpg", "Frontal"),)
    assert told(archive(tmp_path / "none"))[-1] == "none: no test.csv, so the split 'test' is empty"


def test_faults_are_named(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    rows = [
        *TRAIN,
        row("train/patient00003/view1_frontal.jpg"),
        row("train/patient00004/study1/view1_frontal.jpg", Edema="0.5"),
        row("train/patient00005/study1/view1_frontal.jpg", Edema="1.0"),
        row("train/patient00005/study1/view2_frontal.jpg", Edema="0.0"),
        row("train/../patient00006/study1/view2_frontal.jpg"),
        row("train/patient00007/study1/../../../../../etc/passwd"),
    ]
    write_table(raw / "train.csv", rows)
    with (raw / "train.csv").open("a") as file:
        file.write(f"{SMALL}/train/patient00008/study1/view1_frontal.jpg,Male,1\n")
    write_images(raw, TRAIN)
    faults = {study.name: study.fault for study in listed("chexpert", raw) if study.fault}
    assert faults == {
        "train.csv line 6": "path without a patient and a study",
        "train.csv line 7": "a label other than 1, 0, -1 and empty",
        "train/patient00005/study1": "rows of one study with different labels",
        "train.csv line 10": "path without a patient and a study",
        "train.csv line 11": "path without a patient and a study",
        "train.csv line 12": "row of another length than the header",
    }


def test_a_missing_image_is_left_out_by_name(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw")
    (raw / "train/patient00002/study1/view2_lateral.jpg").unlink()
    result, _ = built("chexpert", raw, tmp_path / "out", max_skipped=1)
    assert result.skipped == [{"name": "train/patient00002/study1", "reason": "missing image file"}]


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw")
    write_table(raw / "valid.csv", [row("valid/patient00002/study9/view1_frontal.jpg")])
    with pytest.raises(UserError, match="they are of the same patient"):
        built("chexpert", raw, tmp_path / "out")


def test_the_users_mistakes_get_one_line(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw")
    for options, message in (
        ({"text": "label"}, "option text=label: Input should be 'none' or 'labels'"),
        ({"images": "PNG"}, "images=PNG: no such folder"),
        ({"train": "train_cheXbert.csv"}, "no CheXpert's tables there; looked for train_cheXbert.csv"),
    ):
        with pytest.raises(UserError, match=message) as error:
            listed("chexpert", raw, **options)
        assert "\n" not in str(error.value)
    write_images(raw / "copy", TRAIN)
    with pytest.raises(UserError, match=r"several sets of images: copy/train, train; choose with images=FOLDER"):
        listed("chexpert", raw)
    assert len(listed("chexpert", raw, images="copy")) == 4
    shutil.rmtree(raw / "copy")
    write_table(raw / "train.csv", TRAIN, delimiter=";")
    assert len(listed("chexpert", raw)) == 4
    assert "train.csv: read with a semicolon between the columns" in told(raw)
    write_table(raw / "train.csv", [{name: "" for name in HEADER if name != "Edema"}])
    with pytest.raises(UserError, match="no column Edema"):
        listed("chexpert", raw)
    with pytest.raises(UserError, match="--raw is missing"):
        listed("chexpert", None)


def counts(raw: Path) -> tuple[int, int, Counter[str | None], Counter[tuple[str, int | None]]]:
    """Patients, studies, views by projection, and labels by study, of a table of the training set alone."""
    draw(raw / SMALL / "train" / "patient00001" / "study1" / "view1_frontal.jpg")
    reader = registry.reader("chexpert")
    patients, studies, views, values = set(), 0, Counter[str | None](), Counter[tuple[str, int | None]]()
    for study in reader.read(raw, reader.OPTIONS()):
        assert (study.fault, study.split) == (None, "train")
        patients.add(study.patient)
        studies += 1
        views.update(view for _, view in study.views)
        values.update(study.labels["chexpert"].items())
    return len(patients), studies, views, values


def test_the_start_of_the_real_table_of_the_training_set(tmp_path: Path) -> None:
    with gzip.open(wheel("chexpert_train.csv.gz"), "rt") as file, (tmp_path / "train.csv").open("w") as copy:
        copy.writelines(islice(file, 10_001))
    with (tmp_path / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    patients, studies, views, values = counts(tmp_path)
    assert patients == len({row["Path"].split("/")[2] for row in rows})
    studied = {row["Path"].rpartition("/")[0]: row for row in rows}
    assert (studies, views.total()) == (len(studied), 10_000)
    assert views == Counter(row["AP/PA"] or "L" for row in rows)
    for name in CHEXPERT:
        for word, value in (("1.0", 1), ("0.0", 0), ("-1.0", -1), ("", None)):
            assert values[name, value] == sum(row[name] == word for row in studied.values())


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_the_whole_real_table_of_the_training_set(tmp_path: Path) -> None:
    (tmp_path / "train.csv.gz").symlink_to(wheel("chexpert_train.csv.gz"))
    patients, studies, views, values = counts(tmp_path)
    assert (patients, studies, views.total()) == (64_540, 187_641, 223_414)
    assert views == {"AP": 161_590, "L": 32_387, "PA": 29_420, "LL": 16, "RL": 1}
    assert values["No Finding", 1] == 16_627


# --- CheXpert Plus ---

PLUS = (
    "path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order",
    "report", "section_narrative", "section_findings", "section_impression", "section_accession_number", "age", "sex",
    "race", "insurance_type", "split",
)  # fmt: skip
WHOLE = """NARRATIVE:
CHEST, TWO VIEWS: 1/2/2034

FINDINGS: Clear.
IMPRESSION:

1. NO ACUTE DISEASE.

END OF IMPRESSION:

SUMMARY:1-NO SIGNIFICANT ABNORMALITY

ACCESSION NUMBER:
8765432
This report has been anonymized."""


def plus_row(path: str, findings: str = "", impression: str = "", report: str = WHOLE, **more: str) -> dict[str, str]:
    patient, split = path.split("/")[1], path.split("/")[0]
    return {
        "path_to_image": path, "path_to_dcm": path.replace(".jpg", ".dcm"), "frontal_lateral": "Frontal",
        "ap_pa": "AP", "deid_patient_id": patient, "patient_report_date_order": "1", "report": report,
        "section_narrative": "NARRATIVE", "section_findings": findings, "section_impression": impression,
        "section_accession_number": "8765432", "age": "68", "sex": "Female", "race": "Unknown",
        "insurance_type": "Private", "split": split, **more,
    }  # fmt: skip


PLUS_ROWS = [
    plus_row("train/patient00001/study1/view1_frontal.jpg", "Big heart.", "\n1. Cardiomegaly.\n"),
    plus_row("train/patient00002/study1/view1_frontal.jpg", impression="Edema.", report="IMPRESSION: Edema."),
    plus_row(
        "train/patient00002/study1/view2_lateral.jpg",
        impression="Edema.",
        report="",
        frontal_lateral="Lateral",
        ap_pa="",
    ),
    plus_row("valid/patient64541/study1/view1_frontal.jpg"),
]


def plus_archive(folder: Path, images: str = "PNG/PNG", suffix: str = ".png", rows: Any = PLUS_ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / chexpert_plus.TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, PLUS)
        writer.writeheader()
        writer.writerows(rows)
    write_images(folder / images, [{"Path": row["path_to_image"]} for row in rows], suffix)
    return folder


def write_labels(folder: Path, part: str = "impression") -> None:
    (folder / "chexbert_labels").mkdir(exist_ok=True)
    lines = [
        json.dumps({"path_to_image": row["path_to_image"], **dict.fromkeys(CHEXPERT), "Cardiomegaly": 1.0, "Edema": -1})
        for row in PLUS_ROWS[:3]
    ]
    (folder / "chexbert_labels" / f"{part}_fixed.json").write_text("\n".join(lines) + "\n")


def test_plus_sections_labels_and_nothing_else(tmp_path: Path) -> None:
    raw = plus_archive(tmp_path / "raw")
    write_labels(raw)
    result, samples = built("chexpert_plus", raw, tmp_path / "out")
    assert (result.splits, result.warnings) == ({"train": 2, "validate": 1, "test": 0}, [])
    reports = {sample.report.impression: sample for sample in samples}
    assert reports["1. Cardiomegaly."].report == Report(findings="Big heart.", impression="1. Cardiomegaly.")
    assert reports["1. Cardiomegaly."].labels["chexpert"]["Edema"] == -1
    assert [view.view for view in reports["Edema."].images] == ["AP", "L"]
    whole = reports["1. NO ACUTE DISEASE."]
    assert (whole.report.findings, whole.split, whole.labels) == ("Clear.", "validate", {})
    for sample in samples:
        for word in ("8765432", "Female", "Private", "SIGNIFICANT", "anonymized"):
            assert word not in sample.model_dump_json()


@pytest.mark.parametrize(
    ("images", "suffix"), [("", ".jpg"), ("PNG", ".png"), ("images", ".jpg"), ("DICOM", ".dcm"), ("a/b/PNGs", ".png")]
)
def test_plus_images_in_any_folder(images: str, suffix: str, tmp_path: Path) -> None:
    kind = ".png" if suffix == ".dcm" else suffix
    raw = plus_archive(tmp_path, images, kind)
    if suffix == ".dcm":
        for path in (raw / images).rglob("*.png"):
            path.rename(path.with_suffix(suffix))
    studies = listed("chexpert_plus", raw)
    assert len(studies) == 3
    assert all(path.is_file() and path.suffix == suffix for study in studies for path, _ in study.views)


def test_plus_folders_of_pngs_and_dicoms_need_a_choice(tmp_path: Path) -> None:
    raw = plus_archive(tmp_path, "PNG")
    write_images(raw / "DICOM", [{"Path": row["path_to_image"]} for row in PLUS_ROWS], ".png")
    with pytest.raises(UserError, match=r"several sets of images: DICOM/train, PNG/train; choose with images=FOLDER"):
        listed("chexpert_plus", raw)
    paths = [path for study in listed("chexpert_plus", raw, images="PNG") for path, _ in study.views]
    assert {path.relative_to(raw).parts[0] for path in paths} == {"PNG"}
    (raw / "PNG" / "train").rename(raw / "PNG_train")  # as one portal hands them out
    (raw / "PNG" / "valid").rename(raw / "PNG_valid")
    shutil.rmtree(raw / "DICOM")
    assert all(path.is_file() for study in listed("chexpert_plus", raw) for path, _ in study.views)


def test_plus_labels_are_chosen_or_missed(tmp_path: Path) -> None:
    raw = plus_archive(tmp_path)
    assert told(raw, "chexpert_plus") == [
        f"{raw.name}: no chexbert_labels/impression_fixed.json, so the samples have no labels"
    ]
    assert told(raw, "chexpert_plus", labels="none") == []
    with pytest.raises(UserError, match="labels=report: no report_fixed.json"):
        listed("chexpert_plus", raw, labels="report")
    write_labels(raw, "report")
    study = by_study(listed("chexpert_plus", raw, labels="report"))["patient00002/study1"]
    assert study.labels["chexpert"]["Cardiomegaly"] == 1
    for broken in ("[1]\n", '{"path_to_image": "x"}\n', '{"Edema": 1}\n', "{\n"):
        (raw / "chexbert_labels" / "report_fixed.json").write_text("\n" + broken)
        with pytest.raises(UserError, match="line 2: no object with path_to_image and the 14 labels"):
            listed("chexpert_plus", raw, labels="report")


def test_plus_faults_are_named(tmp_path: Path) -> None:
    rows = [
        *PLUS_ROWS,
        plus_row("train/patient00003/study1/view1_frontal.jpg", report="SUMMARY: 1"),
        plus_row("train/patient00004/study1/view1_frontal.jpg", deid_patient_id=" "),
        plus_row("train/patient00005/study1/view1_frontal.jpg", split="train2"),
        plus_row("train/patient00006/study1/view1_frontal.jpg", impression="Edema."),
        plus_row("train/patient00006/study1/view2_frontal.jpg", impression="No edema."),
        plus_row("train/patient00007/study1/view1_frontal.jpg"),
        plus_row("train/patient00007/study1/view2_frontal.jpg", deid_patient_id="patient00008"),
    ]
    faults = {
        s.name: s.fault or s.gap for s in listed("chexpert_plus", plus_archive(tmp_path, rows=rows)) if s.fault or s.gap
    }
    lines = [name for name in faults if name.startswith("df_chexpert_plus_240401.csv line ")]
    assert [faults.pop(name) for name in lines] == ["empty patient", "unknown split"]
    assert faults == {
        "train/patient00003/study1": "empty text",
        "train/patient00007/study1": "rows of one study with different patients",
    }


def test_plus_takes_the_text_of_the_frontal_image_where_rows_differ(tmp_path: Path) -> None:
    study = "train/patient00006/study1"
    rows = [
        *PLUS_ROWS,
        plus_row(f"{study}/view1_lateral.jpg", impression="Of 3/4/2009.", frontal_lateral="Lateral", ap_pa=""),
        plus_row(f"{study}/view2_frontal.jpg", impression="", report=""),
        plus_row(f"{study}/view3_frontal.jpg", impression="Of 1/2/2001."),
        plus_row(f"{study}/view4_frontal.jpg", impression="Of 5/6/2007."),
    ]
    raw = plus_archive(tmp_path, rows=rows)
    assert "1 of 4 studies have rows with different texts" in told(raw, "chexpert_plus", labels="none")[0]
    result = by_study(listed("chexpert_plus", raw))["patient00006/study1"]
    assert (result.fault, result.report.impression, len(result.views)) == (None, "Of 1/2/2001.", 4)


def test_plus_refuses_a_patient_in_two_splits(tmp_path: Path) -> None:
    raw = plus_archive(tmp_path / "raw", rows=[*PLUS_ROWS, plus_row("valid/patient00001/study7/view1_frontal.jpg")])
    with pytest.raises(UserError, match="they are of the same patient"):
        built("chexpert_plus", raw, tmp_path / "out")


def test_paths_and_labels() -> None:
    assert chexpert.parse_path("a/b/valid/patient2/study3/view1_frontal.jpg").key == "patient2/study3"
    for text in ("", "train/patient1/study1", "train/patientx/study1/a.jpg", "train/patient1/study1/a\0.jpg"):
        with pytest.raises(chexpert.UnusableRecord):
            chexpert.parse_path(text)
    assert chexpert.parse_labels({"Edema": "nan", "Fracture": -1.0})[CHEXPERT.index("Fracture")] == -1
    with pytest.raises(chexpert.UnusableRecord):
        chexpert.parse_labels({"Edema": "2"})
