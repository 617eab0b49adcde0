"""Open-i: as XML and as tables, its real reports, and XML that means harm."""

import csv
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from radhpc.core.errors import UserError
from radhpc.core.sample import Report
from shards.datasets import openi
from shards.datasets.reader import DatasetWarning
from tests.shards.datasets.drawn import built, draw, listed
from tests.shards.datasets.wheel import wheel

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")]
NORMAL = {
    "COMPARISON": "None.", "INDICATION": "Positive TB test", "FINDINGS": "Heart < 50%.\n  No XXXX of an effusion.",
    "IMPRESSION": "Normal chest x-XXXX.",
}  # fmt: skip


def write_xml(
    folder: Path,
    number: int,
    images: list[str],
    sections: dict[str, str],
    major: tuple[str, ...] = ("normal",),
    automatic: tuple[str, ...] = (),
) -> None:
    """A report as the archive has them, without what no reader needs."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = "\n".join(f'<AbstractText Label="{name}">{escape(text)}</AbstractText>' for name, text in sections.items())
    terms = "".join(f"<major>{word}</major>" for word in major) + "".join(
        f"<automatic>{word}</automatic>" for word in automatic
    )
    views = "\n".join(
        f'<parentImage id="{image}"><caption>Xray Chest PA and Lateral</caption></parentImage>' for image in images
    )
    (folder / f"{number}.xml").write_text(
        f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><meta type="rr"/><uId id="CXR{number}"/><pmcId id="{number}"/>
<articleDate>2013-08-01</articleDate>
<MedlineCitation><Article><Abstract>
{texts}
</Abstract><AuthorList><Author><LastName>Kohli</LastName></Author></AuthorList></Article></MedlineCitation>
<MeSH>{terms}</MeSH>
{views}
</eCitation>"""
    )


def archive(folder: Path, reports: str = "ecgen-radiology", images: str = "") -> Path:
    write_xml(folder / reports, 1, ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"], NORMAL)
    write_xml(
        folder / reports,
        2,
        ["CXR2_IM-0652-1001"],
        {"FINDINGS": "", "IMPRESSION": "Big heart.", "INDICATION": ""},
        ("Cardiomegaly/mild", "Catheters, Indwelling/right"),
        ("opacity",),
    )
    for seed, name in enumerate(("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001", "CXR2_IM-0652-1001")):
        draw(folder / images / f"{name}.png", seed)
    return folder


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def tables(folder: Path) -> Path:
    """The same studies as the copy in tables has them."""
    projections = [
        {"uid": "1", "filename": "1_IM-0001-4001.dcm.png", "projection": "Frontal"},
        {"uid": "1", "filename": "1_IM-0001-3001.dcm.png", "projection": "Lateral"},
        {"uid": "2", "filename": "2_IM-0652-1001.dcm.png", "projection": "Frontal"},
    ]
    for seed, row in enumerate(projections):
        draw(folder / "images" / "images_normalized" / row["filename"], seed)
    lower = {name.lower(): text for name, text in NORMAL.items()}
    head = {"uid": "1", "MeSH": "normal", "Problems": "normal", "image": "Xray Chest PA and Lateral"}
    second = {"uid": "2", "MeSH": "Cardiomegaly/mild;Catheters, Indwelling/right", "Problems": "Cardiomegaly"}
    blank = dict.fromkeys(("image", "indication", "comparison", "findings"), "")
    write_rows(folder / "indiana_projections.csv", projections)
    write_rows(folder / "indiana_reports.csv", [{**head, **lower}, {**second, **blank, "impression": "Big heart."}])
    return folder


def told(raw: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetWarning)
        listed("openi", raw)
    return [str(warning.message) for warning in caught]


def faults(raw: Path) -> dict[str, str | None]:
    return {study.name: study.fault or study.gap for study in listed("openi", raw) if study.fault or study.gap}


def test_a_build_from_xml(tmp_path: Path) -> None:
    result, samples = built("openi", archive(tmp_path / "raw"), tmp_path / "out")
    assert result.samples == 2
    assert sum(result.patients.values()) == 2
    assert len([line for line in result.warnings if "each counts as a patient" in line]) == 1
    big, normal = sorted(samples, key=lambda sample: len(sample.images))
    assert normal.report == Report(
        findings="Heart < 50%. No XXXX of an effusion.",
        impression="Normal chest x-XXXX.",
        other="INDICATION: Positive TB test COMPARISON: None.",
    )
    assert normal.labels == {"openi": {"normal": 1}}
    assert [view.view for view in normal.images] == [None, None]
    assert big.report == Report(impression="Big heart.")
    assert big.labels == {
        "openi": {"Cardiomegaly/mild": 1, "Catheters, Indwelling/right": 1},
        "openi-automatic": {"opacity": 1},
    }
    assert not any("Kohli" in sample.model_dump_json() or "2013" in sample.model_dump_json() for sample in samples)


def test_a_build_from_tables_is_of_the_same_studies(tmp_path: Path) -> None:
    _, from_tables = built("openi", tables(tmp_path / "tables"), tmp_path / "one")
    _, from_xml = built("openi", archive(tmp_path / "xml"), tmp_path / "two")
    assert {sample.study for sample in from_tables} == {sample.study for sample in from_xml}
    by_study = {sample.study: sample for sample in from_xml}
    for sample in from_tables:
        assert sample.labels["openi"] == by_study[sample.study].labels["openi"]
        assert sample.report.impression == by_study[sample.study].report.impression
        assert sample.report.other == by_study[sample.study].report.other
    views = {tuple(view.view for view in sample.images) for sample in from_tables}
    assert views == {("Frontal",), ("Frontal", "L")}


@pytest.mark.parametrize(
    ("reports", "images"), [("", ""), ("NLMCXR_reports/ecgen-radiology", "NLMCXR_png"), ("x", "a/b/c")]
)
def test_any_folders(reports: str, images: str, tmp_path: Path) -> None:
    studies = listed("openi", archive(tmp_path, reports, images))
    assert [study.study for study in studies] == ["CXR1", "CXR2"]
    assert all(path.is_file() for study in studies for path, _ in study.views)


def test_dicom_names_and_projections_from_tables(tmp_path: Path) -> None:
    raw = archive(tmp_path)
    for path in list(raw.glob("*.png")):
        name = openi.key(path.name)
        (raw / "NLMCXR_dcm" / name.split("_")[0]).mkdir(parents=True, exist_ok=True)
        path.rename(raw / "NLMCXR_dcm" / name.split("_")[0] / f"{name}.dcm")
    (raw / "nlmcxr_dicom_metadata.csv").write_text(
        "imageid,View Position\nCXR1_IM-0001-3001,LARGE LATERAL\nCXR1_IM-0001-4001,\nCXR2_IM-0652-1001,LL\n"
    )
    write_rows(
        raw / "indiana_projections.csv",
        [{"filename": f"{name}.dcm.png", "projection": "Frontal"} for name in ("1_IM-0001-4001", "2_IM-0652-1001")],
    )
    studies = listed("openi", raw)
    assert [view for study in studies for _, view in study.views] == ["L", "Frontal", "LL"]
    assert all(path.is_file() for study in studies for path, _ in study.views)
    for name in ("CXR1_1_IM-0001-3001", "a/1_IM-0001-3001.dcm", "1_IM-0001-3001.dcm.png", "CXR1_IM-0001-3001.PNG"):
        assert openi.key(name) == "1_IM-0001-3001"
    assert openi.key("CXR1021_IM-0017-1001-0001") == "1021_IM-0017-1001-0001"


def test_reports_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    raw = archive(tmp_path)
    write_xml(raw / "x", 3, [], NORMAL)
    write_xml(raw / "x", 4, ["CXR2_IM-0652-1001"], {"INDICATION": "Cough", "FINDINGS": " ", "IMPRESSION": ""})
    write_xml(raw / "x", 5, ["CXR2_IM-0652-1001", "CXR5_IM-1-1"], NORMAL)
    (raw / "x" / "6.xml").write_text("<eCitation/>")
    assert faults(raw) == {
        "x/3.xml": "no image named",
        "x/4.xml": "neither findings nor impression",
        "x/5.xml": "missing image file",
        "x/6.xml": "report without a number",
    }
    other = tables(tmp_path / "tables")
    (other / "images/images_normalized/2_IM-0652-1001.dcm.png").unlink()
    with (other / "indiana_reports.csv").open("a") as file:
        file.write(",normal,normal,,,,x,y\n3,normal,normal,,,,x,y\n4,normal\n")
    assert list(faults(other).values()) == [
        "missing image file",
        "report without a number",
        "no image named",
        "row of another length than the header",
    ]


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">]><x>&c;</x>'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (BOMB, "XML with a document type of its own"),
        ('<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>', "XML with a document type of its own"),
        ('<!DOCTYPE x SYSTEM "http://localhost:9/x.dtd"><x/>', "XML with a document type of its own"),
        ("<eCitation>", "broken XML"),
        ("", "broken XML"),
        ("\0\0", "broken XML"),
        ('<?xml version="1.0" encoding="klingon"?><x/>', "broken XML"),
        ("<a>&nbsp;</a>", "broken XML"),
        ("<x>" + "y" * (1 << 20) + "</x>", "XML too large"),
        ("<x>" * 100_000 + "</x>" * 100_000, "report without a number"),
    ],
    ids=["bomb", "file", "address", "cut", "empty", "zeros", "encoding", "entity", "large", "deep"],
)
def test_broken_and_hostile_xml_is_a_fault_and_no_crash(content: str, fault: str, tmp_path: Path) -> None:
    raw = archive(tmp_path)
    (raw / "evil.xml").write_text(content)
    assert list(faults(raw).values()) == [fault]
    assert len(listed("openi", raw)) == 3


def test_the_users_mistakes_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for raw, message in (
        (None, "--raw is missing"),
        (tmp_path / "NLMCXR_reports.tgz", "no such folder; unpack"),
        (tmp_path / "empty", "no reports there; looked for ecgen-radiology/1.xml and indiana_reports.csv"),
    ):
        with pytest.raises(UserError, match=message):
            listed("openi", raw)
    write_xml(tmp_path / "reports", 1, ["CXR1_IM-1-1"], NORMAL)
    with pytest.raises(UserError, match="no images there; looked for files such as CXR1_1_IM-0001-3001.png"):
        listed("openi", tmp_path / "reports")
    raw = tables(tmp_path / "tables")
    (raw / "indiana_projections.csv").unlink()
    with pytest.raises(UserError, match="indiana_projections.csv is missing"):
        listed("openi", raw)
    write_rows(raw / "indiana_projections.csv", [{"uid": "1", "file": "x"}])
    with pytest.raises(UserError, match="no column filename, projection"):
        listed("openi", raw)
    tables(raw)
    studies = listed("openi", raw)
    with (raw / "indiana_reports.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    with (raw / "indiana_reports.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    with pytest.warns(DatasetWarning, match="read with a semicolon between the columns"):
        assert listed("openi", raw) == studies


def test_the_real_reports(tmp_path: Path) -> None:
    with tarfile.open(wheel("NLMCXR_reports.tgz")) as packed:
        packed.extractall(tmp_path, filter="data")
    (tmp_path / "nlmcxr_dicom_metadata.csv.gz").symlink_to(wheel("nlmcxr_dicom_metadata.csv.gz"))
    names = [name for path in (tmp_path / "ecgen-radiology").iterdir() for name in _images(path)]
    assert (len(names), len({openi.key(name) for name in names})) == (7_470, 7_470)
    (tmp_path / "NLMCXR_png").mkdir()
    for name in names:
        (tmp_path / "NLMCXR_png" / f"{name}.png").touch()
    studies = listed("openi", tmp_path)
    assert len(studies) == len({study.patient for study in studies}) == 3_955
    assert Counter(study.gap for study in studies) == {
        None: 3_826, "no image named": 104, "neither findings nor impression": 25,
    }  # fmt: skip
    assert sum(bool(study.report.findings) for study in studies) == 3_425
    assert sum(bool(study.report.impression) for study in studies) == 3_921
    assert Counter(len(study.views) for study in studies) == {2: 3_208, 1: 446, 3: 181, 0: 104, 4: 15, 5: 1}
    assert Counter(view for study in studies for _, view in study.views) == {
        "PA": 3_593, None: 2_587, "LL": 717, "AP": 423, "L": 121, "RL": 29,
    }  # fmt: skip
    assert sum("normal" in study.labels["openi"] for study in studies) == 1_391
    words = [study.report.text() for study in studies]
    assert sum(text.count("XXXX") for text in words) == 9_986  # what was taken out stays marked
    assert not any("  " in text for text in words)


def _images(path: Path) -> list[str]:
    return [line.split('"')[1] for line in path.read_text().splitlines() if "<parentImage" in line]
