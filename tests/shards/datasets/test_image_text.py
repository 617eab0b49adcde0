"""Tables of images and texts, in every form and with every fault that users have."""

import csv
import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from radhpc.core.errors import UserError
from radhpc.core.sample import Report, Sample, View
from shards.datasets import image_text, reader
from shards.datasets.reader import RawStudy
from shards.text import sections

pytestmark = pytest.mark.timeout(60)
ROWS: list[dict[str, Any]] = [
    {"image": "images/1.2.png", "text": "Findings: Clear.\nImpression: Normal.", "patient": "7", "view": "PA"},
    {"image": "images/2.png", "text": 'Small "left" effusion, é; see\tnote.', "patient": "7", "view": "L"},
    {"image": "images/3.png", "text": "Cardiomegaly.", "patient": "8", "view": ""},
]


def listed(raw: Path, **options: str) -> list[RawStudy]:
    return list(image_text.read(raw, reader.parse_options("image_text", image_text.OPTIONS, options)))


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", **options: str) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(buffer.getvalue().encode())


def write_json(folder: Path, rows: Any, name: str = "data.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder


def write_form(form: str, folder: Path) -> dict[str, str]:
    """Write ROWS in some form; returns the options it needs."""
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    if form == "list":
        (folder / "data.json").write_text(json.dumps(ROWS))
    elif form == "object":
        (folder / "any.json").write_text(json.dumps({"about": "notes", "annotations": ROWS}))
    elif form == "lines":
        (folder / "any.jsonl").write_bytes("\n".join([*lines, ""]).encode())
    elif form == "lines called json":
        (folder / "any.json").write_bytes("\r\n".join(lines).encode())
    elif form == "bom":
        (folder / "any.json").write_bytes(b"\xef\xbb\xbf" + ("[" + ",".join(lines) + "]").encode())
    elif form == "csv":
        write_csv(folder / "any.csv", ROWS, lineterminator="\r\n")
    elif form == "csv with bom":
        write_csv(folder / "any.csv", ROWS, lineterminator="\n")
        (folder / "any.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "any.csv").read_bytes())
    elif form == "tsv":
        write_csv(folder / "any.tsv", ROWS, "\t")
    elif form == "semicolons":
        write_csv(folder / "any.csv", ROWS, ";")
        return {"delimiter": ";"}
    return {}


FORMS = ["list", "object", "lines", "lines called json", "bom", "csv", "csv with bom", "tsv", "semicolons"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str, tmp_path: Path) -> None:
    options = write_form(form, tmp_path)
    studies = listed(tmp_path, **options)
    assert [study.patient for study in studies] == ["7", "7", "8"]
    assert [study.views for study in studies] == [
        ((tmp_path / "images/1.2.png", "PA"),),
        ((tmp_path / "images/2.png", "L"),),
        ((tmp_path / "images/3.png", None),),
    ]
    assert studies[0].report == Report(findings="Clear.", impression="Normal.")
    assert studies[1].report == Report(other='Small "left" effusion, é; see\tnote.')
    assert len({study.study for study in studies}) == 3
    assert not any(study.fault for study in studies)


def test_the_file_itself_may_be_named(tmp_path: Path) -> None:
    write_form("csv", tmp_path)
    write_form("list", tmp_path)
    assert len(listed(tmp_path / "any.csv")) == 3


def test_splits_as_keys(tmp_path: Path) -> None:
    rows = {
        "train": [{"image_path": ["a.png", "b.png"], "report": "x"}],
        "val": [{"image_path": "c.png", "report": "y"}],
    }
    with pytest.warns(reader.DatasetWarning):
        studies = listed(write_json(tmp_path, rows))
    assert [(study.split, len(study.views)) for study in studies] == [("train", 2), ("validate", 1)]


def test_rows_of_a_study_are_its_views(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "report": "One.", "subject_id": 1.0, "study_id": 10, "view": "PA"},
        {"image": "b.png", "report": "Two.", "subject_id": 2.0, "study_id": 10, "view": "PA"},
        {"image": "c.png", "report": "One.", "subject_id": 1, "study_id": 10, "view": "L"},
        {"image": ["d.png", "e.png"], "report": "Three.", "subject_id": 1, "study_id": 11, "view": ["AP", None]},
        {"image": "f.png", "report": "Other.", "subject_id": 1, "study_id": 11, "view": None},
    ]
    studies = listed(write_json(tmp_path, rows))
    assert [[(path.name, view) for path, view in study.views] for study in studies] == [
        [("a.png", "PA"), ("c.png", "L")],
        [("b.png", "PA")],  # the same number, another patient
        [("d.png", "AP"), ("e.png", None), ("f.png", None)],
    ]
    assert [study.fault for study in studies] == [None, None, "rows of one study with different texts"]
    assert [study.patient for study in studies] == ["1", "2", "1"]


def test_several_images_in_a_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"images": '["a.png", "b [1].png"]', "caption": "x", "patient": "1"}])
    assert [path.name for path, _ in listed(tmp_path)[0].views] == ["a.png", "b [1].png"]


def test_questions_are_samples_of_their_own(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "question": q, "answer": a, "patient": 1} for q, a in (("Left?", True), ("Big?", "no"))]
    studies = listed(write_json(tmp_path, rows))
    assert [(study.question, study.answer, study.fault) for study in studies] == [
        ("Left?", "True", None),
        ("Big?", "no", None),
    ]
    assert len({study.study for study in studies}) == 2


def test_without_patients_each_study_is_one_and_a_line_says_so(tmp_path: Path) -> None:
    with pytest.warns(reader.DatasetWarning, match=r"data.json: no patient column.*patient=COLUMN"):
        studies = listed(write_json(tmp_path, [{"image": f"{n}.png", "text": "x"} for n in range(3)]))
    assert len({study.patient for study in studies}) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listed(write_json(tmp_path, ROWS))


def test_columns_may_be_named(tmp_path: Path) -> None:
    rows = [{"Bild": "a.png", "Befund": "Kardiomegalie.", "Beurteilung": "Herz.", "Fall": 3, "text": "not this"}]
    names = {"image": "Bild", "findings": "Befund", "impression": "Beurteilung", "patient": "Fall", "language": "de"}
    (study,) = listed(write_json(tmp_path, rows), **names)
    assert study.report == Report(findings="Kardiomegalie.", impression="Herz.")
    assert (study.patient, study.language) == ("3", "de")
    with pytest.raises(UserError, match=r"patient=Fal: no such column in .*data.json \(did you mean 'Fall'\?\); found"):
        listed(tmp_path, **{**names, "patient": "Fal"})


def test_labels(tmp_path: Path) -> None:
    def labels(value: Any, **more: Any) -> Any:
        (study,) = listed(write_json(tmp_path, [{"image": "a", "text": "x", "patient": 1, "labels": value, **more}]))
        return study.fault or study.labels

    assert labels({"Edema": 1.0, "Fracture": -1, "Pneumonia": None}) == {
        "chexpert": {"Edema": 1, "Fracture": -1, "Pneumonia": None}
    }
    assert labels(["nodule", "mass"]) == labels("nodule | mass") == {"own": {"nodule": 1, "mass": 1}}
    assert labels('{"radlex": {"nodule": true}}') == {"radlex": {"nodule": 1}}
    assert labels(None, Edema="1.0", Fracture="") == {"chexpert": {"Edema": 1, "Fracture": None}}
    assert labels({"Edema": 2}) == labels({"Edema": "yes"}) == "a label other than 1, 0, -1 and empty"
    assert labels("{broken") == "labels that are no JSON"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"image": "a.png", "text": "  "}, "empty text"),
        ({"image": "a.png", "text": None}, "empty text"),
        ({"image": "", "text": "x"}, "no image named"),
        ({"image": [], "text": "x"}, "no image named"),
        ({"image": "a\0b", "text": "x"}, "image path with a zero byte"),
        ({"image": {"path": "a"}, "text": "x"}, "image or view that is no text"),
        ({"image": "a.png", "text": ["x"]}, "text is no text"),
        ({"image": "a.png", "text": "x", "split": "holdout"}, "unknown split"),
        ({"image": "a.png", "text": "x", "patient": " "}, "empty patient"),
    ],
)
def test_unusable_rows_are_named(row: dict[str, Any], fault: str, tmp_path: Path) -> None:
    studies = listed(write_json(tmp_path, [{"patient": 1, **row}, {"image": "b.png", "text": "y", "patient": 2}]))
    assert [study.fault for study in studies] == [fault, None]
    assert "a.png" in studies[0].name or "record 1" in studies[0].name


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=4,
)


@given(st.fixed_dictionaries(dict.fromkeys(("image", "text", "patient", "study", "view", "labels", "split"), VALUES)))
def test_any_values_are_read_or_named(row: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row, {**row, "image": "a.png", "text": "\ud800"}, {"image": "b.png", "text": "y", "patient": 2}]
        studies = listed(write_json(Path(folder), rows))
    for study in studies:
        assert study.fault or Sample(
            dataset="a", patient="0" * 16, study="0" * 16, split="train", images=[View(width=9, height=9)],
            report=study.report, language=study.language, labels=study.labels,
        ).model_dump_json()  # fmt: skip


def test_short_rows_of_a_csv_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,text,patient\na.png,x,1\nb.png,y\nc.png,z,3,4\n\n")
    assert [study.fault for study in listed(tmp_path)] == [None, *["row of another length than the header"] * 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "image;text\na;b\n",
            r"a.csv: cut at each comma, the header is one column, 'image;text'; if the semi",
        ),
        ("a.csv", "image\ttext\na\tb\n", r"give delimiter='\\t'"),
        (
            "a.csv",
            "picture,words\na,b\n",
            r"no column for image and text; found are picture, words; expected image or",
        ),
        ("a.csv", "image,words\na,b\n", r"no column for text; found are image, words"),
        ("a.csv", 'image,text\na,"b\n', r"a.csv: line 2: unexpected end of data"),
        ("a.csv", "image,text\n", r"the table is empty"),
        ("a.csv", b"image,text\na,caf\xe9\n", r"a.csv: byte 0xe9 is not UTF-8"),
        ("a.json", '[{"image": "a",}]', r"a.json: line 1, column \d+: no valid JSON"),
        ("a.json", "[1, 2]", r"the records must be a list of objects"),
        ("a.json", "3", r"the records must be a list of objects"),
        ("a.json", '{"a": [{}], "b": [{}]}', r"an object with 2 lists \(a, b\); allowed are"),
        ("a.jsonl", '{"image": "a"}\n{"image"', r"a.jsonl: line 2: no valid JSON"),
        ("a.txt", "x", r"no table there; allowed is a file that ends in .json, .jsonl, .csv, .tsv"),
    ],
)
def test_unreadable_tables_get_one_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        listed(tmp_path)
    assert "\n" not in str(error.value)


def test_several_tables_and_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--raw .*/nowhere: no such file or folder"):
        listed(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--raw is missing"):
        list(image_text.read(None, image_text.OPTIONS()))
    write_json(tmp_path, ROWS, "a.json")
    write_json(tmp_path, ROWS[:1], "b.json")
    with pytest.raises(UserError, match=r"several tables: a.json, b.json; choose with table=NAME"):
        listed(tmp_path)
    assert len(listed(tmp_path, table="b.json")) == 1
    with pytest.raises(UserError, match="table=c.json: no such file"):
        listed(tmp_path, table="c.json")


def test_sections() -> None:
    report = sections.split(
        "INDICATION: cough. FINDINGS: Clear lungs. The finding is: old.\nIMPRESSION : Normal.\nRECOMMENDATION: none"
    )
    assert report.findings == "Clear lungs. The finding is: old."
    assert report.impression == "Normal."
    assert report.other == "INDICATION: cough. RECOMMENDATION: none"
    assert sections.split("Old scar. Impression: fine.") == Report(other="Old scar.", impression="fine.")
    assert sections.split("Technique: AP. Nothing found") == Report(other="Technique: AP. Nothing found")
    assert sections.split(" ") == sections.split("Findings: Impression:") == Report()


def test_real_notes(real_notes: Path) -> None:
    studies = listed(real_notes)
    assert len(studies) == 22
    assert len({study.patient for study in studies}) == 16
    assert all(study.report.text() and path.exists() for study in studies for path, _ in study.views)
