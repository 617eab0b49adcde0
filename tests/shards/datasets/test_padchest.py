"""PadChest: a small archive with each trap of the real one, and the real table where torchxrayvision brings it."""

import csv
import gzip
import importlib.util
import io
import json
import os
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.sample import CHEXPERT, Report, Sample
from shards import salt
from shards.build import BuildSettings, build
from shards.datasets import padchest, reader
from shards.datasets.helpers import padchest_facts as facts, padchest_gr
from shards.datasets.reader import RawStudy

pytestmark = pytest.mark.timeout(120)

HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
    "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,"
    "WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,"
    "labelCUIS,LocalizationsCUIS"
)
COLUMNS = next(csv.reader([HEADER]))
BORN, TAKEN, ACCESSION = "1887.5", "20990231", "98765432"
LONG = "1200000000000000000000000000000001{:05d}"  # 39 digits, as a float all of them the same


def row(study: object, patient: int, image: str, projection: str = "PA", **changes: str) -> dict[str, str]:
    """A row as the real table has it."""
    return {
        **dict.fromkeys(COLUMNS, "0"),
        "ImageID": image,
        "ImageDir": "0",
        "StudyDate_DICOM": TAKEN,
        "StudyID": str(study),
        "PatientID": LONG.format(patient),
        "PatientBirth": BORN,
        "Projection": projection,
        "Pediatric": "No",
        "PhotometricInterpretation_DICOM": "MONOCHROME2",
        "ReportID": ACCESSION,
        "Report": " sin hallazg  patolog . cifosis sever .",
        "MethodLabel": "RNN_model",
        "Labels": "['kyphosis']",
        "Localizations": "['loc right', ' loc basal']",
        "labelCUIS": "['C2115817']",
        **changes,
    }


UNUSABLE = min(facts.UNUSABLE)
ROWS = [
    # Study 1: views out of order, one of ribs and two that are none.
    row(1, 1, "1_l.png", "L"),
    row(1, 1, "1_costal.png", "COSTAL"),
    row(1, 1, "1_ap.png", "AP"),
    row(1, 1, "1_z.png"),
    row(1, 1, UNUSABLE),
    row(1, 1, "1_a.png"),
    row(1, 1, "1_supine.png", "AP_horizontal"),
    row(1, 1, "1_unk.png", "UNK"),
    # Study 2 is of two patients.
    row(2, 2, "2_a.png", ImageDir="54", Labels="['normal', '', ' unchanged']", MethodLabel="Physician"),
    row(2, 3, "2_b.png", Labels="['normal', ' cardiomegaly']", Pediatric="PED"),
    row(3, 4, "3.png", "EXCLUDE"),
    row(4, 4, "4.png", Labels="['exclude', 'cardiomegaly']"),
    row(5, 4, "5.png", Report="nan"),
    row(6, 4, "6.png", Report="nan", Labels="nan", Localizations="nan"),
    row(7, 4, "7.png", Report=" . . . ."),
    row(8, 4, "8.png", "COSTAL"),
    row(9, 4, "9.png", Labels="['pacemaker', 'normal', 'a new label']", Localizations="[]"),
    row(10, 4, "10.png", Labels="('kyphosis',"),
    row(11, 4, "11.png"),
    row(11, 4, "11_l.png", "L", Report="otr ."),
    row(12, 4, ""),
    row("nan", 4, "12.png"),
    row(13, 5, "13.png", Labels="['laminar atelectasis', 'it\\'s']"),
]


def write(folder: Path, rows: list[dict[str, str]] = ROWS, packed: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    data = buffer.getvalue().encode()
    (folder / f"{padchest.TABLE}{'.gz' * packed}").write_bytes(gzip.compress(data) if packed else data)
    return folder


def draw(path: Path, seed: int) -> None:
    """A radiograph of 16 bits whose largest value is 65535, as all of PadChest's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 4096, (6, 8)).astype(np.uint16).repeat(8, 0).repeat(8, 1) * 16
    pixels[0, 0] = 65535
    Image.fromarray(pixels).save(path)


def listed(raw: Path, **options: str) -> tuple[list[RawStudy], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        studies = list(padchest.read(raw, reader.parse_options("padchest", padchest.OPTIONS, options)))
    return studies, [str(warning.message) for warning in caught]


def by_study(studies: list[RawStudy]) -> dict[tuple[str, str], RawStudy]:
    return {(study.study.partition("\x1f")[2], study.patient[-2:]): study for study in studies if study.study}


def views(study: RawStudy) -> list[tuple[str, str | None]]:
    return [(Path(str(source)).name, view) for source, view in study.views]


@pytest.mark.parametrize("packed", [False, True])
def test_studies_views_and_faults(packed: bool, tmp_path: Path) -> None:
    studies, messages = listed(write(tmp_path, packed=packed))
    result = by_study(studies)
    assert views(result["1", "01"]) == [
        ("1_a.png", "PA"), ("1_z.png", "PA"), ("1_ap.png", "AP"), ("1_supine.png", "AP_horizontal"), ("1_l.png", "L"),
    ]  # fmt: skip
    assert result["1", "01"].report == Report(findings="sin hallazg patolog . cifosis sever .")
    assert result["1", "01"].language == "es-stemmed"
    assert result["1", "01"].patient == LONG.format(1)
    assert result["1", "01"].name == f"{padchest.TABLE}{'.gz' * packed} line 2"
    assert views(result["2", "02"]) == [("2_a.png", "PA")]
    assert views(result["2", "03"]) == [("2_b.png", "PA")]
    assert {key[0]: study.fault or study.gap for key, study in result.items() if study.fault or study.gap} == {
        "3": "no usable view",
        "4": "marked exclude by the dataset",
        "5": "no report",
        "6": "no report",
        "7": "no report",
        "10": "labels or localizations that are no list of names",
        "11": "rows of one study with different texts or labels",
    }
    assert [study.fault for study in studies if not study.study] == ["no image named", "no patient or no study named"]
    assert ("8", "04") not in result
    assert messages == [
        "padchest: 1 studies have views of other projections than PA,AP,AP_horizontal,L: left out",
        "padchest: 1 studies have an empty label, which says nothing: left out of their labels",
        "padchest: labels without a known meaning, kept in `padchest` alone (studies): 'a new label' (1), 'it's' (1)",
    ]


def test_a_row_of_another_length_is_a_study_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS[:1]) / padchest.TABLE
    path.write_text(path.read_text() + "1,2,3\n")
    studies, _ = listed(path)
    assert [(study.fault, study.name) for study in studies] == [
        (None, f"{padchest.TABLE} line 2"),
        ("row of another length than the header", f"{padchest.TABLE} line 3"),
    ]


def test_labels(tmp_path: Path) -> None:
    result = by_study(listed(write(tmp_path))[0])
    absent = dict.fromkeys(facts.PATHOLOGIES, 0)
    unsaid = dict.fromkeys(CHEXPERT)
    assert result["1", "01"].labels == {
        "chexpert": unsaid,
        "padchest": {"kyphosis": 1},
        "padchest-localizations": {"loc right": 1, "loc basal": 1},
    }
    assert result["2", "02"].labels["chexpert"] == {"No Finding": 1, **absent, "Support Devices": None}
    assert result["2", "02"].labels["padchest"] == {"normal": 1, "unchanged": 1}
    assert result["2", "03"].labels["chexpert"] == {**unsaid, "No Finding": 0, "Cardiomegaly": 1}
    assert result["9", "04"].labels == {  # what is unknown may be anything, so it is not normal
        "chexpert": {**unsaid, "Support Devices": 1},
        "padchest": {"pacemaker": 1, "normal": 1, "a new label": 1},
    }
    assert result["13", "05"].labels["chexpert"] == {**unsaid, "No Finding": 0, "Atelectasis": 1}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ({"hydropneumothorax"}, {"Pneumothorax": 1, "Pleural Effusion": 1, "No Finding": 0}),
        ({"consolidation"}, {"Consolidation": 1, "Lung Opacity": 1, "No Finding": 0}),
        ({"callus rib fracture", "dai"}, {"Fracture": 1, "Support Devices": 1, "No Finding": 0}),
        ({"pacemaker"}, {"Support Devices": 1}),
        ({"costophrenic angle blunting", "pseudonodule"}, {}),
        ({"suboptimal study", "unchanged"}, {}),
        ({"normal", "scoliosis"}, {}),
        ({"normal", "pacemaker"}, {"No Finding": 1, **dict.fromkeys(facts.PATHOLOGIES, 0), "Support Devices": 1}),
    ],
)
def test_chexpert(names: set[str], wanted: dict[str, int]) -> None:
    assert facts.chexpert(names) == {**dict.fromkeys(CHEXPERT), **wanted}


def test_tables_of_labels_are_whole() -> None:
    assert tuple(facts.COUNTERPARTS) == CHEXPERT
    mapped = {name for names in facts.COUNTERPARTS.values() for name in names}
    assert len(facts.KNOWN) == 193 == len(mapped) + len(facts.REMARKS) + len(facts.WITHOUT)
    assert len(facts.UNUSABLE) == 21


def test_options(tmp_path: Path) -> None:
    write(tmp_path)
    result = by_study(listed(tmp_path, projections="COSTAL, PA")[0])
    assert views(result["1", "01"]) == [("1_a.png", "PA"), ("1_z.png", "PA"), ("1_costal.png", "COSTAL")]
    assert views(result["8", "04"]) == [("8.png", "COSTAL")]
    result = by_study(listed(tmp_path, labels="physician")[0])
    assert result["1", "01"].labels == {}
    assert result["2", "02"].labels["padchest"] == {"normal": 1, "unchanged": 1}
    result = by_study(listed(tmp_path, reports="keep")[0])
    assert (result["5", "04"].gap, result["5", "04"].report) == (None, Report())
    assert result["6", "04"].gap == "neither report nor labels"
    studies, messages = listed(tmp_path, pediatric="drop")
    assert ("2", "03") not in by_study(studies)
    assert "padchest: 1 studies of children are left out, as pediatric=drop asks" in messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projections": "PA,APP"}, r"projections=PA,APP: .*'APP' is unknown \(did you mean 'AP'.*COSTAL"),
        ({"labels": "some"}, "labels=some"),
        ({"grounded": "en"}, f"grounded=en needs .*{padchest_gr.GROUNDED}, which is not there"),
        ({"studies": "grounded"}, "studies=grounded needs a language"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        listed(write(tmp_path), **options)
    assert "\n" not in str(error.value)


def test_wrong_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--raw is missing"):
        list(padchest.read(None, padchest.OPTIONS()))
    with pytest.raises(UserError, match=f"no table of PadChest there; looked for {padchest.TABLE}"):
        listed(tmp_path)
    write(tmp_path)
    (tmp_path / "54.zip").touch()
    with pytest.raises(UserError, match=r"54\.zip: the images are still packed; .*unzip 54\.zip -d 54"):
        listed(tmp_path)
    draw(tmp_path / "54" / "2_a.png", 0)
    listed(tmp_path)  # the zip file may stay beside its folder


@pytest.mark.parametrize(
    "layout", ["0/{}", "{}", "images/0/{}", "images/{}", "mixed", "Padchest_GR_files/{}"], ids=lambda text: text
)
def test_images_are_found_where_they_lie(layout: str, tmp_path: Path) -> None:
    names = ["1_a.png", "1_z.png", "1_ap.png", "1_supine.png", "1_l.png"]
    places = dict.fromkeys(names, layout)
    if layout == "mixed":
        places = dict(zip(names, ["0/{}", "{}", "images/{}", "images/0/{}", "0/{}"], strict=True))
    paths = [tmp_path / place.format(name) for name, place in places.items()]
    for path in paths:
        draw(path, 1)
    study, *_ = listed(write(tmp_path))[0]
    assert [source for source, _ in study.views] == paths


def test_one_folder_of_images_is_not_asked_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "0" / "1_a.png", 1)
    draw(tmp_path / "54" / "2_a.png", 2)
    asked = []
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path) or os.path.isfile(path))
    listed(write(tmp_path))
    assert [path for path in asked if path.suffix == ".png"] == []


GROUNDED: list[dict[str, Any]] = [
    {
        "StudyID": "1",
        "ImageID": "1_a.png",
        "PreviousStudyID": None,
        "findings": [
            {"sentence_en": "Severe  kyphosis.", "sentence_es": "Cifosis severa.", "abnormal": True,
             "boxes": [[0.1, 0.2, 0.3, 0.4]], "extra_boxes": [], "labels": ["kyphosis"], "locations": ["dorsal"],
             "progression": None},
            {"sentence_en": "No effusion.", "sentence_es": "Sin derrame.", "abnormal": False},
            {"abnormal": True},
        ],
    },
    {"StudyID": "2", "ImageID": "2_b.png", "findings": [{"sentence_en": "Large heart.", "sentence_es": None}]},
    {"StudyID": "5", "findings": [{"sentence_en": "Clear lungs.", "sentence_es": "Pulmones claros."}]},
    {"StudyID": "13"},
    {"StudyID": "999", "ImageID": "999.png", "findings": [{"sentence_en": "Elsewhere."}]},
]  # fmt: skip
SPLITS = "ImageID,StudyID,split\n1_a.png,1,train\n1_a.png,1,train\n2_b.png,2,test\n5.png,5,validation\n13.png,13,\n"


def write_grounded(folder: Path) -> Path:
    write(folder)
    (folder / padchest_gr.GROUNDED).write_text(json.dumps(GROUNDED))
    (folder / padchest_gr.GROUNDED_SPLITS).write_text(SPLITS)
    return folder


def test_grounded_sentences_and_splits(tmp_path: Path) -> None:
    studies, messages = listed(write_grounded(tmp_path), grounded="en")
    result = by_study(studies)
    said = {key: (s.report.findings, s.language, s.split) for key, s in result.items() if s.language == "en"}
    assert said == {
        ("1", "01"): ("Severe kyphosis. No effusion.", "en", "train"),
        ("2", "03"): ("Large heart.", "en", "test"),
        ("5", "04"): ("Clear lungs.", "en", "validate"),  # whose stemmed report is missing
    }
    assert result["5", "04"].gap is None
    assert (result["2", "02"].language, result["2", "02"].split) == ("es-stemmed", None)  # the other patient of study 2
    assert any("2 of 5 studies of" in line for line in messages)
    studies, messages = listed(tmp_path, grounded="es", studies="grounded")
    assert [(s.report.findings, s.language, views(s)) for s in studies if s.study] == [
        ("Cifosis severa. Sin derrame.", "es", [("1_a.png", "PA")]),
        ("Pulmones claros.", "es", [("5.png", "PA")]),
    ]
    assert any("are not in PadChest-GR: left out" in line for line in messages)


def test_grounded_files_unused_torn_or_in_conflict(tmp_path: Path) -> None:
    studies, messages = listed(write_grounded(tmp_path))
    assert {study.language for study in studies if study.study} == {"es-stemmed"}
    assert any("is there but not used" in line for line in messages)
    (tmp_path / padchest_gr.GROUNDED_SPLITS).write_text(SPLITS + "1_a.png,1,test\n")
    with pytest.raises(UserError, match=r"master_table\.csv: a study is in test and train"):
        listed(tmp_path, grounded="en")
    (tmp_path / padchest_gr.GROUNDED_SPLITS).write_text("StudyID,split\n1,somewhere\n")
    with pytest.raises(UserError, match=r"master_table\.csv: split: 'somewhere' is unknown"):
        listed(tmp_path, grounded="en")
    (tmp_path / padchest_gr.GROUNDED_SPLITS).rename(tmp_path / "master_table.csv.zip")
    studies, messages = listed(tmp_path, grounded="en")
    assert {study.split for study in studies} == {None}
    assert any("unpack master_table.csv.zip" in line for line in messages)


def test_build_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "salt").write_bytes(b"a salt for tests, of enough bytes")
    monkeypatch.setenv(salt.VARIABLE, str(tmp_path / "salt"))
    raw = write_grounded(tmp_path / "raw")
    for number, record in enumerate(ROWS):
        if record["ImageID"] and record["ImageID"] not in ("9.png", UNUSABLE):
            draw(raw / record["ImageDir"] / record["ImageID"], number)
    settings = BuildSettings(workers=1, longest_side=32, max_skipped=100)
    result = build("padchest", raw, str(tmp_path / "out"), {"grounded": "es"}, settings)
    samples: dict[str, tuple[Sample, dict[str, bytes]]] = {}
    everything = b""
    for path in (tmp_path / "out").iterdir():
        everything += path.read_bytes()
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for name in members:
                if name.endswith(".json"):
                    key = name.removesuffix(".json")
                    pictures = {n: data for n, data in members.items() if n.startswith(f"{key}.") and n != name}
                    samples[key] = Sample.model_validate_json(members[name]), pictures
    texts = sorted(sample.report.findings or "" for sample, _ in samples.values())
    stemmed = "sin hallazg patolog . cifosis sever ."
    assert texts == ["Cifosis severa. Sin derrame.", "Pulmones claros.", stemmed, stemmed, stemmed]
    assert result.samples == 5
    assert Counter(skip["reason"].partition(":")[0] for skip in result.skipped) == {
        "no usable view": 1,
        "marked exclude by the dataset": 1,
        "no report": 2,
        "labels or localizations that are no list of names": 1,
        "rows of one study with different texts or labels": 1,
        "no image named": 1,
        "no patient or no study named": 1,
        "missing image file": 1,
    }
    first, pictures = next(s for s in samples.values() if s[0].report.findings == texts[0])
    assert [view.view for view in first.images] == ["PA", "PA", "AP", "AP_horizontal", "L"]
    assert {view.source_bits for view in first.images} == {16}
    assert all(view.window and view.window[0] < view.window[1] <= 65535 for view in first.images)
    assert (first.language, first.split, len(pictures)) == ("es", "train", 5)
    assert first.labels["padchest"] == {"kyphosis": 1}
    for raw_word in (LONG.format(1), TAKEN, ACCESSION, BORN, "1_a.png"):
        assert raw_word.encode() not in everything


@pytest.fixture(scope="module")
def real_table() -> Path:
    """The real table, where torchxrayvision is installed; its images are nowhere near."""
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or not spec.submodule_search_locations:
        assert os.environ.get("CI") != "true", "torchxrayvision is missing under CI"
        pytest.skip("torchxrayvision is not installed")
    return Path(spec.submodule_search_locations[0]) / "data" / f"{padchest.TABLE}.gz"


def test_the_real_table(real_table: Path) -> None:
    """Every row of it is accounted for; the figures were counted apart, from the table alone."""
    faults: Counter[str | None] = Counter()
    projections: Counter[str | None] = Counter()
    names: Counter[str] = Counter()
    chexpert: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    frontal_later = longest = unlabelled = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for study in padchest.read(real_table, padchest.OPTIONS()):
            assert study.fault is None
            faults[study.gap] += 1
            if study.gap:
                continue
            order = [padchest.PROJECTIONS.index(str(view)) for _, view in study.views]
            frontal_later += order != sorted(order)
            projections.update(view for _, view in study.views)
            sizes[len(study.views)] += 1
            unlabelled += "padchest" not in study.labels
            names.update(study.labels.get("padchest", {}))
            chexpert.update(name for name, value in study.labels.get("chexpert", {}).items() if value == 1)
            longest = max(longest, len(study.patient))
            assert study.report.findings
            assert "  " not in study.report.findings
    assert faults == {None: 108708, "marked exclude by the dataset": 983, "no report": 100, "no usable view": 12}
    assert [str(warning.message) for warning in caught] == [
        "padchest: 129 studies have views of other projections than PA,AP,AP_horizontal,L: left out",
        "padchest: 1995 studies have an empty label, which says nothing: left out of their labels",
    ]  # and no label without a known meaning
    assert sum(faults.values()) + 129 == 109932  # pairs of a study and a patient
    assert (frontal_later, longest) == (0, 39)
    assert projections == {"PA": 90816, "AP": 4519, "AP_horizontal": 14207, "L": 49215}
    assert sizes == {1: 59997, 2: 47658, 3: 858, 4: 145, 5: 29, 6: 12, 7: 3, 8: 4, 9: 1, 11: 1}
    assert set(names) == facts.KNOWN - {"exclude"}
    assert unlabelled == 507
    assert chexpert == {
        "No Finding": 35614, "Enlarged Cardiomediastinum": 798, "Cardiomegaly": 9786, "Lung Opacity": 15658,
        "Lung Lesion": 3311, "Edema": 1285, "Consolidation": 1646, "Pneumonia": 5175, "Atelectasis": 6118,
        "Pneumothorax": 363, "Pleural Effusion": 6975, "Pleural Other": 3499, "Fracture": 2936,
        "Support Devices": 11942,
    }  # fmt: skip
