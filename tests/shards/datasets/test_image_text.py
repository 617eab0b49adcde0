"""Tables of images and texts, in every form and with every fault that users have."""

import csv
import gzip
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
    with pytest.warns(reader.DatasetWarning, match="1 of 3 studies have rows with different texts"):
        studies = listed(write_json(tmp_path, rows))
    assert [[(path.name, view) for path, view in study.views] for study in studies] == [
        [("a.png", "PA"), ("c.png", "L")],
        [("b.png", "PA")],  # the same number, another patient
        [("d.png", "AP"), ("e.png", None), ("f.png", None)],
    ]
    assert not any(study.fault for study in studies)
    assert studies[2].report.other == "Three."
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
    assert labels({"Edema": "1,0", "Fracture": "-1,00"}) == {"chexpert": {"Edema": 1, "Fracture": -1}}
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", reader.DatasetWarning)
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
            "picture,words\na,b\n",
            r"no column for image and text; found are picture, words; expected image or",
        ),
        ("a.csv", "image,words\na,b\n", r"no column for text; found are image, words"),
        ("a.csv", 'image,text\na,"b\n', r"a.csv: line 2, character 3: unexpected end of data"),
        ("a.csv", "image,text\n", r"the table is empty"),
        ("a.csv", b"image,text\na,\xc3\xb3\xc3\xa9\nb,caf\xe9\n", r"line 3, character 6: byte 0xe9 is not UTF-8, as"),
        ("a.csv", b"image,text\na,\x81\n", r"line 2, character 3: byte 0x81 is neither UTF-8 nor Windows-1252"),
        ("a.json", '[{"image": "a",}]', r"a.json: line 1, column \d+: no valid JSON"),
        ("a.json", "[1, 2]", r"the records must be a list of objects"),
        ("a.json", "3", r"the records must be a list of objects"),
        ("a.json", '{"a": [{}], "b": [{}]}', r"an object with 2 lists \(a, b\); allowed are"),
        ("a.jsonl", '{"image": "a"}\n{"image"', r"a.jsonl: line 2, column \d+: no valid JSON"),
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


# Encodings, delimiters and broken rows.


def messages_of(raw: Path, **options: str) -> tuple[list[RawStudy], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return listed(raw, **options), [str(warning.message) for warning in caught]


SPANISH = "image;text;patient\na.png;Sin patología, sin derrame;1\nb.png;Cardiomegalia ñ;2\n"


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_and_delimiters_are_found_and_said(encoding: str, delimiter: str, tmp_path: Path) -> None:
    rows = [line.split(";") for line in SPANISH.splitlines()]
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    (tmp_path / "a.csv").write_bytes(buffer.getvalue().encode(encoding))
    studies, messages = messages_of(tmp_path)
    assert [study.report.other for study in studies] == ["Sin patología, sin derrame", "Cardiomegalia ñ"]
    assert not any(study.fault for study in studies)
    text = " ".join(messages)
    assert ("Windows-1252" in text) == (encoding in ("cp1252", "latin-1"))
    assert ("UTF-16" in text) == encoding.startswith("utf-16")
    assert ("between the columns" in text) == (delimiter != ",")


def test_other_files_in_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(json.dumps(ROWS, ensure_ascii=False).encode("utf-16"))
    studies, messages = messages_of(tmp_path)
    assert studies[1].report.other == ROWS[1]["text"]
    assert messages == [messages[0]]
    assert "read as UTF-16" in messages[0]
    (tmp_path / "data.json").unlink()
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(("sep=;\n" + SPANISH).encode("cp1252")))
    studies, _ = messages_of(tmp_path)
    assert studies[0].report.other == "Sin patología, sin derrame"


def test_long_tables_are_looked_at_to_the_end(tmp_path: Path) -> None:
    rows = [f"{n}.png;{'clear, ' * 40};{n}\n" for n in range(9000)]
    (tmp_path / "a.csv").write_bytes(("image;text;patient\n" + "".join(rows) + "b.png;é;b\n").encode("cp1252"))
    studies, messages = messages_of(tmp_path)
    assert studies[-1].report.other == "é"
    assert "Windows-1252, with a semicolon" in messages[0]


def test_broken_rows_are_named_with_their_places(tmp_path: Path) -> None:
    def faults(content: str) -> list[tuple[str, str | None]]:
        (tmp_path / "a.csv").write_text(content)
        return [(study.name, study.fault) for study in listed(tmp_path) if study.fault]

    head = "image,text,patient\n"
    assert faults(head + "a.png,Cle\0ar,1\nb.png,x,2\n") == [("a.csv line 2, column 2", "zero byte in a cell")]
    assert faults(head + 'a.png,"Clear.,1\nb.png,Edema.,2\nc.png,Scar.",3\nd.png,x,4\n') == [
        ("a.csv lines 2 to 4, column 2", "a quote that swallows rows")
    ]
    report = "Findings:\n1, the heart, big\n2. clear, no effusion, 3\n\nImpression: none, 7, x.y"
    assert faults(head + f'a.png,"{report}",1\nb.png,x,2\n') == []
    swallowed = "text,image,patient\n" + '"Clear.,a.png,1\nEdema.,b.png,2\nScar.",c.png,3\n'
    assert faults(swallowed) == [("a.csv lines 2 to 4, column 1", "a quote that swallows rows")]
    with pytest.raises(UserError, match=r"a.csv: line 2, character 7: a quote that is opened there .* to line 3"):
        faults(head + 'a.png,"Clear.,1\nb.png,"Edema.",2\n')


@pytest.mark.parametrize("header", ["image,report,report,patient", "image,Report,report,patient"])
def test_headers_of_the_same_name_are_refused(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\na.png,first,second,1\n")
    with pytest.raises(UserError, match=r"a.csv: line 1, columns 2 and 3 are the same"):
        listed(tmp_path)
    (tmp_path / "a.csv").write_text("image,report,Unnamed,Unnamed,patient\na.png,first,x,y,1\n")
    assert listed(tmp_path)[0].report.other == "first"


# The meaning of cells.


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NA", "N/A", "NULL", "null", " nan ", "<NA>"])
def test_words_for_nothing_are_nothing(word: str, tmp_path: Path) -> None:
    row = {"image": "a.png", "findings": word, "impression": "Clear.", "patient": "1", "labels": word, "view": word}
    (study,) = listed(write_json(tmp_path, [{**row, "language": word, "split": word, "Edema": word}]))
    assert study.report == Report(impression="Clear.")
    assert study.labels == {"chexpert": {"Edema": None}}
    assert (study.views[0][1], study.language, study.split, study.fault) == (None, "en", None, None)
    assert [s.fault for s in listed(write_json(tmp_path, [{**row, "impression": word}]))] == ["empty text"]
    assert [s.fault for s in listed(write_json(tmp_path, [{**row, "patient": word}]))] == ["empty patient"]
    (study,) = listed(write_json(tmp_path, [{**row, "impression": f"No {word}"}]))
    assert study.report.impression == f"No {word}".strip()


def test_lists_as_pandas_and_numpy_write_them(tmp_path: Path) -> None:
    def study(**cells: str) -> RawStudy:
        write_csv(tmp_path / "a.csv", [{"image": "a.png", "text": "x", "patient": "1", **cells}])
        return listed(tmp_path)[0]

    for labels in ("['edema', 'nodule']", "['edema' 'nodule']", '["edema", "nodule"]', "edema|nodule"):
        assert study(labels=labels).labels == {"own": {"edema": 1, "nodule": 1}}
    assert study(labels="['edema', nan]").labels == {"own": {"edema": 1}}
    assert study(labels="{'Edema': 1, 'Fracture': nan}").labels == {"chexpert": {"Edema": 1, "Fracture": None}}
    assert study(labels="[]").labels == {}
    assert study(labels="['edema").fault == "labels that are no list"
    assert [path.name for path, _ in study(image="['a.png', \"b's.png\"]").views] == ["a.png", "b's.png"]
    assert study(text="['Clear.', 'Normal.']").fault == "text is no text"


def test_paths_of_texts_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "raw" / "reports").mkdir(parents=True)
    (tmp_path / "outside.txt").write_text("Secret.")
    (tmp_path / "raw" / "reports" / "a.txt").write_text("Findings: Clear.")
    (tmp_path / "raw" / "reports" / "b c.txt").write_bytes("Patología.".encode("cp1252"))
    (tmp_path / "raw" / "reports" / "link.txt").symlink_to(tmp_path / "outside.txt")
    texts = [
        "reports/a.txt", "reports\\b c.txt", "reports/none.txt", "../outside.txt", "reports/link.txt", "a.pdf", "b.png",
        "Clear lungs, no change. See old.txt", str(tmp_path / "outside.txt"), "/dev/zero.txt", "reports",
    ]  # fmt: skip
    rows = [{"image": f"{n}.png", "text": text, "patient": n} for n, text in enumerate(texts)]
    studies, messages = messages_of(write_json(tmp_path / "raw", rows))
    assert [study.fault or study.report.text() or study.report.other for study in studies] == [
        "Findings: Clear.", "Patología.", "text file that cannot be read", "text file outside of the table's folder",
        "text file outside of the table's folder", "a path in the place of the text", "a path in the place of the text",
        texts[7], "text file outside of the table's folder", "text file that cannot be read", "reports",
    ]  # fmt: skip
    assert messages == ["data.json: 2 texts are paths of text files, which were read"]


# Patients, studies and splits.


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("7", "7.0", True), ("7", "7 ", True), (7, "7.00", True), (7.0, "7", True), ("7", "\ufeff7\u200b", True),
        ("M\u00fcller", "Mu\u0308ller", True), ("p07", "P07", True), ("Patient07", "PATIENT07", True),
        ("aB3x", "ab3X", False), ("7", "07", False), ("7.5", "7", False), ("p7", "p70", False),
    ],
)  # fmt: skip
def test_a_patient_is_a_person(one: Any, other: Any, same: bool, tmp_path: Path) -> None:
    rows = [{"image": f"{n}.png", "text": "x", "patient": p, "study": p} for n, p in enumerate((one, other))]
    assert len({study.patient for study in listed(write_json(tmp_path, rows))}) == (1 if same else 2)
    (tmp_path / "data.json").unlink()
    write_csv(tmp_path / "a.csv", rows)
    assert len({study.patient for study in listed(tmp_path)}) == (1 if same else 2)


@pytest.mark.parametrize("name", ["PatientID", "patient_id", "Patient ID", "PATIENT-ID", "SubjectID", "Patient"])
def test_columns_are_known_by_their_letters(name: str, tmp_path: Path) -> None:
    row = {"Image Path": "a.png", "Report": "x", name: "7", "ViewPosition": "PA", "StudyID": "3"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (study,) = listed(write_json(tmp_path, [row]))
    assert (study.patient, study.views[0][1], study.study) == ("7", "PA", "7\x1f3\x1f")


@pytest.mark.parametrize("name", ["split", "Set", "partition", "SubSet", "fold"])
def test_split_columns_of_other_names(name: str, tmp_path: Path) -> None:
    rows = [{"image": f"{n}.png", "text": "x", "patient": n, name: s} for n, s in enumerate(("Train", "val", "test"))]
    assert [study.split for study in listed(write_json(tmp_path, rows))] == ["train", "validate", "test"]


def test_columns_that_look_like_people_and_are_not_used_are_named(tmp_path: Path) -> None:
    row = {
        "image": "a.png", "text": "x", "Patientennummer": "7", "AccessionNumber": "8", "fold": "3", "PatientAge": "70",
        "Número de paciente": "7", "Partición": "A", "StudyDate": "2001", "mrn": "9", "anon_patient_key": "1",
        "offset": "3",
    }  # fmt: skip
    _, messages = messages_of(write_json(tmp_path, [row]))
    for name, role in (
        ("Patientennummer", "patient"),
        ("AccessionNumber", "study"),
        ("fold", "split"),
        ("Número de paciente", "patient"),
        ("Partición", "split"),
    ):
        assert any(
            f"column '{name}' looks like the {role} and is not used ({role}='{name}' uses it)" in m for m in messages
        )
    assert len(messages) == 8  # these, mrn, the key, and that there are no patients


@pytest.mark.parametrize("layout", ["one table", "a table each", "jsonl each"])
def test_folders_of_images_are_splits(layout: str, tmp_path: Path) -> None:
    rows = {"train": "a.png", "validation": "b.png", "test": "c.png"}
    for split, image in rows.items():
        folder = tmp_path / split
        folder.mkdir()
        row = {"file_name": image, "text": split, "patient": image}
        if layout == "a table each":
            write_csv(folder / "metadata.csv", [row])
        elif layout == "jsonl each":
            (folder / "metadata.jsonl").write_text(json.dumps(row))
    if layout == "one table":
        row_of = [{"file_name": f"{split}/{name}", "text": split, "patient": name} for split, name in rows.items()]
        write_csv(tmp_path / "metadata.csv", row_of)
    studies, messages = messages_of(tmp_path)
    by_text = {study.report.other: (study.split, study.views[0][0]) for study in studies}
    assert by_text == {
        "train": ("train", tmp_path / "train" / "a.png"),
        "validation": ("validate", tmp_path / "validation" / "b.png"),
        "test": ("test", tmp_path / "test" / "c.png"),
    }
    assert len(messages) == 1
    if layout == "one table":
        assert [study.split for study in listed(tmp_path, split="none")] == [None, None, None]


def test_images_of_the_same_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_csv(tmp_path / split / "metadata.csv", [{"file_name": "0001.png", "text": split}])
    studies, _ = messages_of(tmp_path)
    assert {(study.patient, study.split) for study in studies} == {
        ("train/0001.png", "train"), ("test/0001.png", "test"),
    }  # fmt: skip
    assert len({study.study for study in studies}) == 2
    assert {study.views[0][0] for study in studies} == {tmp_path / split / "0001.png" for split in ("train", "test")}


def test_rows_without_a_split_among_others_are_counted(tmp_path: Path) -> None:
    images = ["train/a.png", "test/b.png", "extra/c.png", "d.png"]
    rows = [{"image": image, "text": "x", "patient": n} for n, image in enumerate(images)]
    studies, messages = messages_of(write_json(tmp_path, rows))
    assert [study.split for study in studies] == ["train", "test", None, None]
    assert "data.json: 2 of 4 rows have no split, so theirs is made from the patients" in messages
    for row, word in zip(rows, ["train", "NA", "test", "n/a"], strict=True):
        row["set"] = word
    studies, messages = messages_of(write_json(tmp_path, rows))
    assert [study.split for study in studies] == ["train", None, "test", None]
    assert "data.json: 2 of 4 rows have no split, so theirs is made from the patients" in messages


def test_one_folder_called_train_is_no_split(tmp_path: Path) -> None:
    rows = [{"image": f"train/{n}.png", "text": "x", "patient": n} for n in range(3)]
    assert [study.split for study in listed(write_json(tmp_path, rows))] == [None, None, None]


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
