"""Both editions of MIMIC-CXR: trees as they are downloaded, every trap of theirs, and the sections of reports.

The expected sections were made by MIT-LCP's txt/section_parser.py from these same texts, which nobody dictated.
"""

import csv
import gzip
import io
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.core.sample import CHEXPERT, Report, Sample
from radhpc.storage.store import Store
from shards import salt
from shards.build import BuildSettings, build
from shards.datasets import mimic_cxr, mimic_cxr_jpg, reader
from shards.datasets.helpers import mimic_sections
from shards.datasets.reader import RawStudy
from tests.shards.images.dicom_files import write_dicom

pytestmark = pytest.mark.timeout(60)
READERS = {"mimic_cxr_jpg": mimic_cxr_jpg, "mimic_cxr": mimic_cxr}
METADATA = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
LABELS = tuple(sorted(CHEXPERT))
TEXT = (
    "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  ___ year old "
    "woman with cough.\n \n FINDINGS: \n \n The lungs are clear.\n Heart size is normal.\n \n"
    " IMPRESSION: \n \n No acute\n disease.\n"
)
# (dicom_id's first letter, subject, study, projection, split)
IMAGES = [
    ("c", "10000032", "50000001", "LATERAL", "train"),
    ("b", "10000032", "50000001", "AP", "train"),
    ("a", "10000032", "50000001", "", "train"),
    ("f", "10000032", "50000001", "PA", "train"),
    ("e", "10000032", "50000001", "PA", "train"),
    ("d", "10000032", "50000001", "XTABLE LATERAL", "train"),
    ("b", "10000032", "50000002", "LL", "train"),
    ("b", "11000764", "50000003", "AP AXIAL", "validate"),
    ("b", "19000935", "50000004", "PA", "test"),
]
FINDINGS, IMPRESSION = "The lungs are clear. Heart size is normal.", "No acute disease."


def dicom(letter: str, study: str) -> str:
    return "-".join([letter * 8, study, *["0a1b2c3d"] * 3])


def write_csv(path: Path, rows: list[dict[str, Any]], packed: bool = False) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = buffer.getvalue().encode()
    if packed:
        path = path.with_name(f"{path.name}.gz")
    path.write_bytes(gzip.compress(data) if packed else data)


def tables(edition: str, images: list[tuple[str, ...]] = IMAGES) -> dict[str, list[dict[str, Any]]]:
    """Every table as PhysioNet has it, by name; the test set's labels for study 50000004 alone."""
    identifiers = [{"dicom_id": dicom(i[0], i[2]), "subject_id": i[1], "study_id": i[2]} for i in images]
    rows = [(names, i) for names, i in zip(identifiers, images, strict=True)]
    if edition == "mimic_cxr":
        suffix = {"path": "files/p10/p10000032/s50414267/x.dcm"}
        return {"cxr-record-list": [{**dict(sorted(names.items(), reverse=True)), **suffix} for names in identifiers]}
    values = dict.fromkeys(LABELS, "") | {"Edema": "1.0", "Pneumonia": "-1.0", "Fracture": "0.0"}
    studies = [{"subject_id": "10000032", "study_id": "50000001"}, {"subject_id": "19000935", "study_id": "50000004"}]
    radiologist = {"Airspace Opacity" if name == "Lung Opacity" else name: "1" for name in CHEXPERT}
    return {
        "mimic-cxr-2.0.0-metadata": [
            {**dict.fromkeys(METADATA, "SECRET"), **names, "ViewPosition": i[3], "StudyDate": "21800506"}
            for names, i in rows
        ],
        "mimic-cxr-2.0.0-split": [{**names, "split": i[4]} for names, i in rows],
        "mimic-cxr-2.0.0-chexpert": [{**study, **values} for study in studies],
        "mimic-cxr-2.0.0-negbio": [{**study, **values, "Edema": ""} for study in studies],
        "mimic-cxr-2.1.0-test-set-labeled": [{"study_id": "50000004", **radiologist}],
    }


def write_image(path: Path) -> None:
    """Blocks of gray, other ones for each study and image: alike images of two splits would be left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(list(f"{path.parent.name}{path.name}".encode())).integers(0, 256, (10, 8))
    pixels = np.kron(blocks, np.ones((4, 4)))
    if path.suffix == ".dcm":
        write_dicom(path, (pixels * 16).astype(np.uint16))
    else:
        Image.fromarray(pixels.astype(np.uint8)).save(path, "JPEG")


def write_reports(folder: Path, texts: dict[str, str]) -> None:
    for _, subject, study, *_ in IMAGES:
        path = folder / f"p{subject[:2]}/p{subject}/s{study}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts.get(study, TEXT))


def write_tree(folder: Path, edition: str, texts: dict[str, str] | None = None, packed: bool = True) -> Path:
    """An edition as it is downloaded, reports unpacked into a folder of their own."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    for name, rows in tables(edition).items():
        write_csv(raw / f"{name}.csv", rows, packed)
    for letter, subject, study, *_ in IMAGES:
        suffix = ".dcm" if edition == "mimic_cxr" else ".jpg"
        write_image(raw / f"files/p{subject[:2]}/p{subject}/s{study}/{dicom(letter, study)}{suffix}")
    write_reports(raw / "mimic-cxr-reports/files", texts or {})
    return raw


def listed(raw: Path, edition: str = "mimic_cxr_jpg", **options: str) -> dict[str, RawStudy]:
    """Return the studies of a reader by study, or by name where one is a row."""
    module = READERS[edition]
    studies = list(module.read(raw, reader.parse_options(edition, module.OPTIONS, options)))
    assert len({study.study or study.name for study in studies}) == len(studies)
    return {study.study or study.name: study for study in studies}


def shown(study: RawStudy) -> list[tuple[str, str | None]]:
    return [(path.name[0], view) for path, view in study.views]  # type: ignore[union-attr]


@pytest.fixture
def jpg(tmp_path: Path) -> Path:
    return write_tree(tmp_path, "mimic_cxr_jpg")


@pytest.fixture
def own_salt(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path_factory.mktemp("salt") / "salt"
    path.write_bytes(b"a salt for tests, of enough bytes")
    monkeypatch.setenv(salt.VARIABLE, str(path))


def samples(out: Path) -> list[Sample]:
    result = []
    for shard in Manifest.load(Store(out)).shards:
        with tarfile.open(out / shard.name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            assert b"SECRET" not in data
            if name.endswith(".json"):
                sample = Sample.model_validate_json(data)
                assert all(f"{sample.key}.{n}.jpg" in members for n in range(len(sample.images)))
                result.append(sample)
    return result


# --- both editions, end to end


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.usefixtures("own_salt")
def test_jpg_end_to_end(tmp_path: Path, packed: bool) -> None:
    raw = write_tree(tmp_path, "mimic_cxr_jpg", packed=packed)
    result = build("mimic_cxr_jpg", raw, str(tmp_path / "out"), {}, BuildSettings(workers=1))
    assert (result.samples, result.skipped) == (4, [])
    assert result.splits == {"train": 2, "validate": 1, "test": 1}
    assert result.patients == {"train": 1, "validate": 1, "test": 1}
    assert sorted(result.warnings) == ["2 studies have no labels of chexpert", "2 studies have no labels of negbio"]
    by_views = {tuple(view.view for view in sample.images): sample for sample in samples(tmp_path / "out")}
    assert by_views.keys() == {
        ("PA", "PA", "AP", "LATERAL", "XTABLE LATERAL", None), ("LL",), ("AP AXIAL",), ("PA",),
    }  # fmt: skip
    assert {(s.report.findings, s.report.impression, s.report.other) for s in by_views.values()} == {
        (FINDINGS, IMPRESSION, None)
    }
    tested = by_views[("PA",)]
    assert (tested.split, tested.labels["chexpert"]["Edema"], tested.labels["negbio"]["Edema"]) == ("test", 1, None)
    assert (tested.labels["chexpert"]["Pneumonia"], tested.labels["chexpert"]["Fracture"]) == (-1, 0)
    assert tested.labels["radiologist"] == dict.fromkeys(CHEXPERT, 1)  # Airspace Opacity is Lung Opacity
    assert by_views[("LL",)].labels == {}
    written_out = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    for raw_name in ("10000032", "50000001", "21800506", "0a1b2c3d"):
        assert raw_name.encode() not in written_out


@pytest.mark.usefixtures("own_salt")
def test_dicom_end_to_end(tmp_path: Path) -> None:
    raw = write_tree(tmp_path, "mimic_cxr")
    result = build("mimic_cxr", raw, str(tmp_path / "out"), {}, BuildSettings(workers=1))
    assert (result.samples, result.skipped) == (4, [])
    assert [line.split(":")[0] for line in result.warnings[:2]] == [
        "no mimic-cxr-2.0.0-split.csv beside the images", "no mimic-cxr-2.0.0-metadata.csv beside the images",
    ]  # fmt: skip
    assert sorted(len(sample.images) for sample in samples(tmp_path / "out")) == [1, 1, 1, 6]
    assert {view.view for sample in samples(tmp_path / "out") for view in sample.images} == {None}
    assert {view.source_bits for sample in samples(tmp_path / "out") for view in sample.images} == {12}
    # with the tables of MIMIC-CXR-JPG, wherever they lie
    other = tmp_path / "tables"
    other.mkdir()
    for name, rows in tables("mimic_cxr_jpg").items():
        write_csv(other / f"{name}.csv", rows, packed=True)
    options = {"split": str(other / "mimic-cxr-2.0.0-split.csv.gz")}
    result = build("mimic_cxr", raw, str(tmp_path / "official"), options, BuildSettings(workers=1))
    assert result.splits == {"train": 2, "validate": 1, "test": 1}
    (tested,) = [sample for sample in samples(tmp_path / "official") if sample.split == "test"]
    assert (tested.images[0].view, tested.labels["radiologist"]["Lung Opacity"]) == ("PA", 1)


# --- tables


@pytest.mark.filterwarnings("ignore:. studies have no labels:shards.datasets.reader.DatasetWarning")
def test_views_stand_in_order_and_frontal_ones_can_be_chosen(jpg: Path) -> None:
    with pytest.warns(reader.DatasetWarning):
        studies = listed(jpg)
    assert shown(studies["50000001"]) == [
        ("e", "PA"), ("f", "PA"), ("b", "AP"), ("c", "LATERAL"), ("d", "XTABLE LATERAL"), ("a", None),
    ]  # fmt: skip
    assert studies["50000001"].views[0][0] == jpg / "files/p10/p10000032/s50000001" / f"{dicom('e', '50000001')}.jpg"
    with pytest.warns(reader.DatasetWarning, match="1 studies have no image that views=frontal allows"):
        studies = listed(jpg, views="frontal")
    assert {study: shown(raw) for study, raw in studies.items()} == {
        "50000001": [("e", "PA"), ("f", "PA"), ("b", "AP")], "50000003": [("b", "AP AXIAL")], "50000004": [("b", "PA")],
    }  # fmt: skip


def test_frontal_views_of_dicoms_need_the_metadata(tmp_path: Path) -> None:
    raw = write_tree(tmp_path, "mimic_cxr")
    with pytest.raises(UserError, match=r"views=frontal: the projections are in mimic-cxr-2.0.0-metadata.csv"):
        listed(raw, "mimic_cxr", views="frontal")
    write_csv(raw / "mimic-cxr-2.1.0-metadata.csv", tables("mimic_cxr_jpg")["mimic-cxr-2.0.0-metadata"])
    with pytest.warns(reader.DatasetWarning):
        studies = listed(raw, "mimic_cxr", views="frontal")
    assert shown(studies["50000001"]) == [("e", "PA"), ("f", "PA"), ("b", "AP")]
    assert {study.split for study in studies.values()} == {None}


def rewritten(raw: Path, what: str, change: Any) -> None:
    """Write a table anew, its rows changed."""
    rows = tables("mimic_cxr_jpg")[what]
    write_csv(raw / f"{what}.csv", change(rows), packed=True)


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
@pytest.mark.parametrize(
    ("what", "change", "faults"),
    [
        ("split", lambda rows: rows[:-1], {"50000004": "study without a row in the table of splits"}),
        ("split", lambda rows: [*rows[:5], *rows[6:]], {}),  # another image of the study has one
        ("split", lambda rows: [{**rows[0], "split": "test"}, *rows[1:]],
         {"50000001": "rows of one study in different splits"}),
        ("split", lambda rows: [*rows[:-1], {**rows[-1], "split": "held"}], {"50000004": "unknown split"}),
        ("metadata", lambda rows: rows[:-1], {"50000004": "study without a row in the table of images"}),
        ("metadata", lambda rows: [*rows, rows[-1]], {}),  # a row that comes twice is one image
        ("metadata", lambda rows: [*rows[:-1], {**rows[-1], "subject_id": "19000936"}],
         {"50000004": "rows of one study of different patients"}),
        ("metadata", lambda rows: [{**rows[0], "study_id": "5e7"}, *rows[1:]],
         {"mimic-cxr-2.0.0-metadata.csv.gz line 2": "study_id or subject_id that is no number"}),
        ("metadata", lambda rows: [{**rows[0], "dicom_id": "../../x"}, *rows[1:]],
         {"mimic-cxr-2.0.0-metadata.csv.gz line 2": "dicom_id that names no file"}),
        ("chexpert", lambda rows: [{**rows[0], "Edema": "2"}, rows[1]],
         {"mimic-cxr-2.0.0-chexpert.csv.gz line 2": "a label other than 1, 0, -1 and empty"}),
    ],
)  # fmt: skip
def test_what_the_tables_make_unusable(jpg: Path, what: str, change: Any, faults: dict[str, str]) -> None:
    rewritten(jpg, f"mimic-cxr-2.0.0-{what}", change)
    result = {key: study.fault for key, study in listed(jpg).items() if study.fault}
    assert result == faults


def test_identifiers_are_text(jpg: Path) -> None:
    """A study number is never a float, and the split is that of its patient."""
    with pytest.warns(reader.DatasetWarning):
        studies = listed(jpg)
    assert {(s.patient, s.study, s.split) for s in studies.values()} == {
        (subject, study, split) for _, subject, study, _, split in IMAGES
    }
    assert studies["50000004"].name == "p19/p19000935/s50000004"


def test_missing_tables_are_named(jpg: Path) -> None:
    for kind in ("chexpert", "negbio"):
        (jpg / f"mimic-cxr-2.0.0-{kind}.csv.gz").unlink()
    with pytest.warns(reader.DatasetWarning) as caught:
        studies = listed(jpg)
    assert [str(warning.message) for warning in caught] == [
        f"no mimic-cxr-2.0.0-{kind}.csv: studies have no labels of {kind}" for kind in ("chexpert", "negbio")
    ]
    assert set(studies["50000004"].labels) == {"radiologist"}
    split = (jpg / "mimic-cxr-2.0.0-split.csv.gz").rename(jpg.parent / "official.csv.gz")
    with pytest.raises(UserError, match=r"no mimic-cxr-2.0.0-split.csv \(also .gz\); put it there or give split=FILE"):
        listed(jpg)
    with pytest.raises(UserError, match=r"split=nowhere.csv: no such file"):
        listed(jpg, split="nowhere.csv")
    with pytest.warns(reader.DatasetWarning):
        assert listed(jpg, split=str(split)).keys() == studies.keys()
    (jpg / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(UserError, match=r"no table of images of MIMIC-CXR there; looked for mimic-cxr-2.1.0-metadata"):
        listed(jpg)


# --- reports


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
@pytest.mark.parametrize(
    "place",
    [
        "a/jpg/raw/files", "a/jpg/raw/mimic-cxr-reports/files", "a/jpg/raw/mimic-cxr-reports.zip",
        "a/jpg/mimic-cxr-reports/files", "a/jpg/mimic-cxr-reports.zip", "a/jpg/files", "a/jpg/mimic-cxr/files",
        "a/mimic-cxr/2.0.0/mimic-cxr-reports/files", "a/mimic-cxr/2.1.0/files", "a/mimic-cxr/files",
        "a/mimic-cxr/2.1.0/mimic-cxr-reports.zip",
    ],
)  # fmt: skip
def test_reports_are_found_in_the_usual_places(tmp_path: Path, place: str) -> None:
    raw = write_tree(tmp_path / "a/jpg", "mimic_cxr_jpg")
    unpacked = (raw / "mimic-cxr-reports").rename(tmp_path / "unpacked")
    with pytest.raises(UserError, match=r"no reports there nor beside it; .* or give reports=PATH"):
        listed(raw)
    for named in (unpacked, unpacked / "files"):
        assert listed(raw, reports=str(named))["50000001"].report.findings == FINDINGS
    with pytest.raises(UserError, match=r"reports=.*: no reports there, such as files/p10"):
        listed(raw, reports=str(raw))
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    if place.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / place, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(unpacked.rglob("*")):
                file.write(path, path.relative_to(unpacked))
        assert listed(raw, reports=str(tmp_path / place))["50000001"].report.findings == FINDINGS
    else:
        write_reports(tmp_path / place, {})
    studies = listed(raw)
    assert {study.report.impression for study in studies.values()} == {IMPRESSION}
    assert not any(study.fault for study in studies.values())


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_reports_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    windows = " FINAL REPORT\r\n INDICATION: Fall.\r\n \r\n Clear.\r\n"
    texts = {"50000001": " \n \n", "50000002": "CHEST FILM", "50000003": windows}
    raw = write_tree(tmp_path, "mimic_cxr_jpg", texts)
    reports = raw / "mimic-cxr-reports/files"
    (reports / "p19/p19000935/s50000004.txt").unlink()
    studies = listed(raw)
    assert {key: study.fault for key, study in studies.items()} == {
        "50000001": "empty text", "50000002": "no findings, impression or last paragraph", "50000003": None,
        "50000004": "missing report",
    }  # fmt: skip
    assert studies["50000003"].report == Report(other="Clear.")
    (reports / "p19/p19000935/s50000004.txt").write_bytes(b" FINDINGS: \xff")
    assert listed(raw)["50000004"].fault == "report that is not UTF-8"


def test_a_damaged_zip_is_named(tmp_path: Path, jpg: Path) -> None:
    (jpg / "mimic-cxr-reports").rename(tmp_path / "away")
    (jpg / "mimic-cxr-reports.zip").write_bytes(b"PK\3\4 cut")
    with pytest.raises(UserError, match=r"mimic-cxr-reports.zip: cannot be read \(File is not a zip file\)"):
        listed(jpg)
    with zipfile.ZipFile(jpg / "mimic-cxr-reports.zip", "w") as file:
        file.writestr("notes.txt", "x")
    with pytest.raises(UserError, match=r"mimic-cxr-reports.zip: no reports in it"):
        listed(jpg)


def test_studies_may_be_chosen_by_their_sections(tmp_path: Path) -> None:
    texts = {"50000002": "\n FINDINGS: Clear.\n", "50000003": "\n IMPRESSION: Normal.\n"}
    raw = write_tree(tmp_path, "mimic_cxr_jpg", texts)
    for require, studies in {
        "any": {"50000001", "50000002", "50000003", "50000004"},
        "findings": {"50000001", "50000002", "50000004"},
        "impression": {"50000001", "50000003", "50000004"},
    }.items():
        with pytest.warns(reader.DatasetWarning) as caught:
            assert set(listed(raw, require=require)) == studies
        messages = [str(warning.message) for warning in caught if "require" in str(warning.message)]
        assert messages == [f"1 studies have no {require} and were left out, as require= says"] * (require != "any")


# --- a part of the archive


def without_images(raw: Path, *groups: str) -> None:
    for group in groups:
        for path in sorted((raw / "files" / group).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (raw / "files" / group).rmdir()


@pytest.mark.usefixtures("own_salt")
def test_a_partial_download_is_named_before_any_image_is_opened(jpg: Path, tmp_path: Path) -> None:
    without_images(jpg, "p11", "p19")
    with pytest.raises(UserError) as caught:
        build("mimic_cxr_jpg", jpg, str(tmp_path / "out"), {}, BuildSettings(workers=1))
    assert (
        "p11/p11000764/s50000003: missing image folder; if only a part was downloaded, name it: subset=p10; p19/"
        in (str(caught.value))
    )
    result = build("mimic_cxr_jpg", jpg, str(tmp_path / "out"), {"subset": "p10"}, BuildSettings(workers=1))
    assert (result.samples, result.skipped) == (2, [])
    assert "2 images lie outside of subset=p10 and were not looked for" in result.warnings
    assert "1 studies have no labels of chexpert" in result.warnings


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_a_subset_is_one_of_groups_or_patients(jpg: Path) -> None:
    assert set(listed(jpg, subset="p10,p1100")) == {"50000001", "50000002", "50000003"}
    assert set(listed(jpg, subset="p1,p10")) == {"50000001", "50000002", "50000003", "50000004"}
    assert set(listed(jpg, subset="p11000764")) == {"50000003"}
    with pytest.raises(UserError, match=r"subset=p10,p12: no patient .* begins with p12; folders found are p10, p11"):
        listed(jpg, subset="p10,p12")
    with pytest.raises(UserError, match=r"option subset=10: "):
        listed(jpg, subset="10")


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_a_missing_study_or_image_is_a_skip_of_its_own(jpg: Path) -> None:
    folder = jpg / "files/p10/p10000032/s50000002"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert {key: study.fault for key, study in listed(jpg).items() if study.fault} == {
        "50000002": "missing image folder"
    }
    without_images(jpg, "p10", "p11", "p19")
    (jpg / "files").rmdir()
    with pytest.raises(UserError, match=r"no folder 'files' there, which holds the images"):
        listed(jpg)


def test_the_listing_is_the_same_each_time(jpg: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(listed(jpg).items()) == list(listed(jpg).items())


# --- sections

RULE = "_" * 78
REPORTS: dict[str, tuple[str, Report]] = {
    "both": (
        " FINAL REPORT\n EXAMINATION:  CHEST\n \n"
        " FINDINGS: \n \n Clear.\n Normal\n heart.\n \n IMPRESSION: \n \n No disease.\n",
        Report(findings="Clear. Normal heart.", impression="No disease."),
    ),
    "one header for both": (
        "\n INDICATION: Cough.\n \n FINDINGS AND IMPRESSION:\n No change since ___.\n",
        Report(impression="No change since ___."),
    ),
    "misprints": (
        "\n COMPARRISON: None.\n FINIDNGS: Clear.\n IMPERSSION: Normal.\n",
        Report(findings="Clear.", impression="Normal."),
    ),
    "a known oddity": ("\n NDICATION: Normal chest.\n", Report(impression="Normal chest.")),
    "views as headers": (
        "\n CHEST, PA LATERAL:\n \n INDICATION:   Fever.\n \n"
        " PORTABLE UPRIGHT FILM: Tubes in place.\n \n COMPARISON: ___.\n",
        Report(findings="Tubes in place."),
    ),
    "the last of two": (
        "\n FINDINGS: First.\n \n FINDINGS:\n Second.\n \n IMPRESSION: One.\n CONCLUSION: Two.\n",
        Report(findings="Second.", impression="Two."),
    ),
    "an empty one is none": (
        "\n FINDINGS: Clear.\n IMPRESSION: A.\n FINDINGS: \n \n IMPRESSION: \n ",
        Report(findings="Clear.", impression="A."),
    ),
    "a header further in": (
        "\n FINDINGS: Clear.\n  IMPRESSION: Normal.\n",
        Report(findings="Clear.", impression="Normal."),
    ),
    "small letters are no header": (
        "\n FINDINGS: Clear.\n Impression: Normal.\n",
        Report(findings="Clear. Impression: Normal."),
    ),
    "no space behind the colon": (
        "\n FINDINGS: Tube at 3:45 PM.\n IMPRESSION:Normal.\n",
        Report(findings="Tube at 3:45 PM. IMPRESSION:Normal."),
    ),
    "a header that ends its line eats the next": (
        "\n FINDINGS:\n IMPRESSION: Normal.\n",
        Report(findings="IMPRESSION: Normal."),
    ),
    "last paragraph": (
        " FINAL REPORT\n CHEST RADIOGRAPH\n \n INDICATION:  ___-year-old man.\n \n"
        " COMPARISON:  ___.\n \n Heart is large.\n Lungs are clear.\n \n No effusion.\n",
        Report(other="Heart is large. Lungs are clear. No effusion."),
    ),
    "no header at all": (" FINAL REPORT\n \n Lungs are clear.\n", Report(other="Lungs are clear.")),
    "report under comparison": (
        "\n INDICATION: Pain.\n COMPARISON: With ___, no change.\n",
        Report(other="With ___, no change."),
    ),
    "wet read above": (
        " WET READ: ___ 9:18 PM\n  No pneumothorax.\n "
        + RULE
        + "\n FINAL REPORT\n INDICATION: Fall.\n \n IMPRESSION: No fracture.\n",
        Report(impression="No fracture."),
    ),
    "addendum above": (
        " ADDENDUM  Discussed with Dr. ___.\n "
        + RULE
        + "\n FINAL REPORT\n FINDINGS: ___ clip.\n \n IMPRESSION: Unchanged.\n "
        + RULE
        + "\n",
        Report(findings="___ clip.", impression="Unchanged."),
    ),
    "nothing": (" FINAL REPORT\n CHEST FILM\n", Report()),
    "tail": ("\n IMPRESSION: Clear.\n \n RECOMMENDATION(S): CT.\n", Report(impression="Clear.")),
}


@pytest.mark.parametrize("what", REPORTS)
def test_sections_are_those_of_the_data_sets_authors(what: str) -> None:
    text, expected = REPORTS[what]
    assert mimic_sections.parse_report(text, "50000001") == expected


@pytest.mark.parametrize(
    ("header", "section"),
    [
        ("CLINICAL HISTORY", "history"), ("RECOMMENDATION(S)", "recommendations"),
        ("TYPE OF EXAMINATION", "examination"),
        ("REFERENCE EXAM", "comparison"), ("REFERENCE FINDINGS", "findings"), ("CHEST, TWO VIEWS", "findings"),
        ("AP CHEST, PORTABLE", "findings"), ("LEFT RIBS", "findings"), ("FAMILY HISTORY", "history"),
        ("FINDINGS/ IMPRESSION", "impression"), ("IMPRESSIONS AND FINDINGS", "impression"), ("IDICATION", "indication"),
        ("COMPARISON CHEST FILM", "comparison"), ("SECOND ADDENDUM", "addendum"), ("TECHNIQUE", "technique"),
        ("  WETREAD ", "wet read"),
    ],
)  # fmt: skip
def test_headers_are_known_by_many_spellings(header: str, section: str) -> None:
    (preamble, result) = mimic_sections.parse_sections(f"\n {header}: Clear.\n \n")[:2]
    assert (preamble.name, result.name) == ("preamble", section)


def test_the_54_exceptions_have_a_report() -> None:
    text = "\n INDICATION: Clear lungs.\n \n IMPRESSION: ___\n"
    assert mimic_sections.parse_report(text, "50058765") == Report(other="Clear lungs.")
    assert mimic_sections.parse_report(text, "50913680") == Report(impression="___")  # has no recommendations after all
    assert mimic_sections.parse_report("x" * 47 + " Clear\n lungs. " + "y" * 400, "51410602") == Report(
        other="Clear lungs. " + "y" * (320 - 47 - 15)
    )
    assert mimic_sections.parse_report(text, "58235663") == Report()  # nobody described the picture
    assert len(mimic_sections._MISPLACED) == 23
    assert len(mimic_sections._STRETCH) == 31
    assert sum(stretch == (0, 0) for stretch in mimic_sections._STRETCH.values()) == 8
    assert not mimic_sections._MISPLACED.keys() & mimic_sections._STRETCH.keys()


PIECES = st.one_of(
    st.text(),
    st.sampled_from(
        ["\n", "\n ", "\n \n ", " ", ":", ": ", ":\n", "\t", RULE, "___", "Clear.", *mimic_sections._SECTION_OF]
    ),
    st.sampled_from([f"\n {spelling.upper()}: " for spelling in mimic_sections._SECTION_OF]),
    st.text("AB ()/,-:\n", max_size=12),
)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=20).map("".join), st.sampled_from(["1", "50058765", "51410602", "58235663"]))
def test_no_text_is_lost_told_twice_or_refused(text: str, study: str) -> None:
    sections = mimic_sections.parse_sections(text)
    assert "".join(section.header + section.text for section in sections) == text
    report = mimic_sections.parse_report(text, study)
    for messages in (report.findings, report.impression, report.other):
        assert messages is None or (messages == " ".join(messages.split()) and messages)
        assert messages is None or messages.split() == [word for word in messages.split() if word in text]
    assert report.other is None or (report.findings is None and report.impression is None)
    said = " ".join(section.text for section in sections if section.name in ("findings", "impression"))
    if study == "1" and said.replace("_", "").strip():
        assert report.findings or report.impression
