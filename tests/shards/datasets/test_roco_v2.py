"""ROCO v2: captions, concepts, licences, and articles that stand in several official splits."""

import csv
import json
import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from radhpc.core.sample import Report
from shards.datasets import reader as datasets, registry
from tests.shards.datasets.drawn import built, draw, listed, refusal

pytestmark = pytest.mark.timeout(60)

CAPTIONS = {
    "train": [
        ("train_000001", 'CT, axial: "mass"\n (arrow), 5 µm.'),
        ("train_000002", "Chest X-ray."),
        ("train_000003", "MRI of the knee."),
        ("train_000004", "Ultrasound."),
    ],
    "valid": [("valid_000001", "Angiography."), ("valid_000002", "PET.")],
    "test": [("test_000001", "Naïve CT.")],
}
CONCEPTS = {
    "train": [("train_000001", "C0040405;C0577559"), ("train_000002", " C1306645 ; C9999999;"), ("train_000003", "")],
    "valid": [("valid_000001", "C0002978")],
    "test": [("test_000001", "C0040405")],
}
MANUAL = {"train": [("train_000001", "C0040405")], "valid": [], "test": [("test_000001", "C0040405")]}
MAPPING = [("C0040405", "X-Ray Computed Tomography"), ("C0577559", "Mass, nos"), ("C1306645", "Plain x-ray"),
           ("C0002978", "angiogram")]  # fmt: skip
LICENSES = [
    ("train_000001", "PMC1", "CC BY A et al. (2022)"),
    ("train_000002", "PMC1", "CC BY A et al. (2022)"),
    ("train_000003", "PMC2", "CC BY-NC B, C et al. (2021)"),  # in test, too
    ("train_000004", "PMC3", "CC BY [D et al. (2020)]"),  # in valid, too
    ("valid_000001", "PMC3", "CC BY [D et al. (2020)]"),
    ("valid_000002", "PMC2", "CC BY-NC B, C et al. (2021)"),
    ("test_000001", "PMC2", "CC BY-NC B, C et al. (2021)"),
]


def write_csv(path: Path, header: tuple[str, ...], rows: list[Any], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([header, *rows])


def full(name: str) -> str:
    return f"ROCOv2_2023_{name}"


def write(folder: Path, nested: bool = False, encoding: str = "utf-8", key: str = "ID") -> Path:
    for seed, (word, rows) in enumerate(CAPTIONS.items()):
        own = [(full(name), caption) for name, caption in rows]
        write_csv(folder / f"{word}_captions.csv", (key, "Caption"), own, encoding)
        for kind, of in (("concepts", CONCEPTS), ("concepts_manual", MANUAL)):
            listing = [(full(name), cuis) for name, cuis in of[word]] or [("none", "")]
            write_csv(folder / f"{word}_{kind}.csv", (key, "CUIs"), listing, encoding)
        for number, (name, _) in enumerate(own):
            inner = f"{word}_images/{word}" if nested else f"{word}_images"
            draw(folder / inner / f"{name}.jpg", 10 * seed + number)
    write_csv(folder / "cui_mapping.csv", ("CUI", "Canonical name"), MAPPING, encoding)
    licences = [(full(name), article, text, f"https://example.org/{article}") for name, article, text in LICENSES]
    write_csv(
        folder / "license_information.csv", (f" {key.lower()}", "PMCID ", "Attribution", "Link"), licences, encoding
    )
    return folder


def names(studies: list[datasets.RawStudy]) -> list[str]:
    return [study.study.removeprefix("ROCOv2_2023_") for study in studies]


def told(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught]


def test_the_test_set_stays_whole_and_nothing_of_its_articles_is_trained_on(tmp_path: Path) -> None:
    result, samples = built("roco_v2", write(tmp_path / "raw"), tmp_path / "out")
    assert result.splits == {"train": 2, "validate": 1, "test": 1}
    by_text = {sample.report.other: sample for sample in samples}
    mass = by_text['CT, axial: "mass" (arrow), 5 µm.']
    assert mass.report == Report(other='CT, axial: "mass" (arrow), 5 µm.')
    assert mass.labels == {
        "umls": {"X-Ray Computed Tomography": 1, "Mass, nos": 1},
        "umls-manual": {"X-Ray Computed Tomography": 1},
    }
    assert by_text["Chest X-ray."].labels == {"umls": {"Plain x-ray": 1, "C9999999": 1}}
    assert by_text["Chest X-ray."].patient == mass.patient, "the article stands for the patient"
    assert by_text["Naïve CT."].split == "test"
    assert by_text["Angiography."].split == "validate"
    assert set(by_text) == {mass.report.other, "Chest X-ray.", "Angiography.", "Naïve CT."}
    said = [json.loads(line) for line in (tmp_path / "out" / "attribution.jsonl").read_text().splitlines()]
    assert {line["key"] for line in said} == {sample.key for sample in samples}
    assert {line["attribution"] for line in said if line["key"] == mass.key} == {
        "CC BY A et al. (2022) https://example.org/PMC1"
    }
    assert [text for text in result.warnings if "ROCO" in text or ".csv" in text] == [
        "cui_mapping.csv: 1 concepts of images are not in it; they are called by their CUIs",
        "ROCO v2: 2 articles have figures in several official splits: 3 images were left out so that test, then "
        "validate, keep theirs; split=official takes all",
        "ROCO v2: 3 of 7 images, not licensed for commercial use, are in: licenses=commercial leaves them out; "
        "CC BY and CC BY-NC both ask for attribution, which goes to attribution.jsonl beside the shards",
    ]


def test_as_published(tmp_path: Path) -> None:
    result, samples = built("roco_v2", write(tmp_path / "raw"), tmp_path / "out", split="official")
    assert result.splits == {"train": 4, "validate": 2, "test": 1}
    splits_of = defaultdict(set)
    for sample in samples:
        splits_of[sample.patient].add(sample.split)
    assert len(splits_of) == 6
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert any("2 articles have figures in several official splits; split=disjoint" in text for text in result.warnings)


def test_by_article(tmp_path: Path) -> None:
    result, samples = built("roco_v2", write(tmp_path / "raw"), tmp_path / "out", split="article")
    assert result.samples == 7
    patients = {sample.report.other: sample.patient for sample in samples}
    assert len(set(patients.values())) == 3
    assert patients["MRI of the knee."] == patients["PET."] == patients["Naïve CT."]


def test_whether_images_are_shared_is_known_before_the_build() -> None:
    kind = registry.reader("roco_v2").OPTIONS
    assert not kind.model_validate({}).shares_images
    assert kind.model_validate({"split": "official"}).shares_images


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
@pytest.mark.parametrize(("nested", "encoding", "key"), [(True, "utf-8", "ID"), (False, "utf-8-sig", "id")])
def test_copies_say_the_same(nested: bool, encoding: str, key: str, tmp_path: Path) -> None:
    def said(raw: Path) -> list[Any]:
        studies = listed("roco_v2", raw, split="official")
        assert all(path.is_file() for study in studies for path, _ in study.views if isinstance(path, Path))
        return [(s.study, s.patient, s.split, s.report, s.labels) for s in studies]

    assert said(write(tmp_path / "b", nested, encoding, key)) == said(write(tmp_path / "a"))


def test_commercial_licences_alone(tmp_path: Path) -> None:
    raw = write(tmp_path)
    with pytest.warns(datasets.DatasetWarning) as caught:
        studies = listed("roco_v2", raw, split="official", licenses="commercial")
    assert names(studies) == ["train_000001", "train_000002", "train_000004", "valid_000001"]
    assert any("3 of 7 images, not licensed for commercial use, were left out" in text for text in told(caught))
    with pytest.raises(UserError, match=r"option licenses=free: .*'all' or 'commercial'"):
        listed("roco_v2", raw, licenses="free")


@pytest.mark.parametrize(
    ("attribution", "commercial"),
    [
        ("CC BY A et al. (2022)", True),
        ("CC BY [A et al. (2022)]", True),
        ("CC-BY A", True),
        ("CC0", True),
        ("CC BY-SA A", True),
        ("CC BY", True),
        ("CC BY-NC A", False),
        ("CC BY-NC-ND A", False),
        ("CC BY NC A", False),
        ("CC-BY-NC", False),
        ("CC BYNC A", False),
        ("A et al. (2022)", False),
        ("", False),
    ],
)
@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_what_allows_commercial_use(attribution: str, commercial: bool, tmp_path: Path) -> None:
    raw = write(tmp_path)
    rows = [(full("test_000001"), "PMC1", attribution, "")]
    write_csv(raw / "license_information.csv", ("ID", "PMCID", "Attribution", "Link"), rows)
    assert bool(listed("roco_v2", raw, licenses="commercial")) == commercial


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_without_licences_each_image_is_a_patient(tmp_path: Path) -> None:
    raw = write(tmp_path)
    (raw / "license_information.csv").unlink()
    with pytest.warns(datasets.DatasetWarning, match=r"no license_information.csv, so articles and licences are unkn"):
        studies = listed("roco_v2", raw)
    assert len({study.patient for study in studies}) == len(studies) == 7
    for option, value in (("licenses", "commercial"), ("split", "article")):
        with pytest.raises(UserError, match=rf"no license_information.csv; {option}={value} needs it"):
            listed("roco_v2", raw, **{option: value})


def test_an_image_without_licence_is_a_patient_of_its_own(tmp_path: Path) -> None:
    raw = write(tmp_path)
    write_csv(raw / "license_information.csv", ("ID", "PMCID", "Attribution", "Link"), [
        (full("train_000001"), "PMC1", "CC BY A", ""), (full("train_000002"), "", "CC BY A", ""),
    ])  # fmt: skip
    with pytest.warns(datasets.DatasetWarning) as caught:
        studies = listed("roco_v2", raw)
    assert [study.patient for study in studies[:2]] == ["PMC1", full("train_000002")]
    assert "license_information.csv: 6 images are not in it; each counts as a patient of its own" in told(caught)


def test_without_concepts_or_names_of_them(tmp_path: Path) -> None:
    raw = write(tmp_path)
    for word in CAPTIONS:
        (raw / f"{word}_concepts_manual.csv").unlink()
    (raw / "cui_mapping.csv").unlink()
    with pytest.warns(datasets.DatasetWarning) as caught:
        studies = listed("roco_v2", raw)
    assert studies[0].labels == {"umls": {"C0040405": 1, "C0577559": 1}}
    assert "ROCO v2: no cui_mapping.csv, so concepts are called by their CUIs" in told(caught)
    assert "ROCO v2: no test_concepts_manual.csv, so images of 'test' go without these labels" in told(caught)


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_unusable_rows_are_named(tmp_path: Path) -> None:
    raw = write(tmp_path)
    lines = ["ID,Caption", "a.b c,Fine.", "b,", 'c," \n "', ",Text.", "d,one,two", "e\0,x", "../f,x", "a.b c,Again."]
    (raw / "train_captions.csv").write_text("\n".join(lines) + "\n")
    draw(raw / "train_images" / "a.b c.jpg")
    studies = [study for study in listed("roco_v2", raw) if "train_captions" in study.name]
    assert [(study.fault, study.name) for study in studies] == [
        (None, "train_captions.csv line 2: a.b c"),
        ("empty text", "train_captions.csv line 3"),
        ("empty text", "train_captions.csv line 4"),
        ("no image named", "train_captions.csv line 6"),
        ("row of another length than the header", "train_captions.csv line 7"),
        ("zero byte in a cell", "train_captions.csv line 8, column 1"),
        ("image path that leaves the folder", "train_captions.csv line 9"),
        (None, "train_captions.csv line 10: a.b c"),
    ]
    result, _ = built("roco_v2", raw, tmp_path / "out", max_skipped=7)
    assert [skip["reason"] for skip in result.skipped if "line 10" in skip["name"]] == ["duplicate key"]


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    assert "--raw is missing: the folder of ROCO v2" in refusal("roco_v2", None)
    assert "no ROCO v2 there; looked for train_captions.csv, valid_captions.csv" in refusal("roco_v2", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-00000-of-00006.parquet").touch()
    assert "Parquet copies of ROCO v2 cannot be read; expected the original release, with train_captions.csv" in (
        refusal("roco_v2", tmp_path)
    )
    write_csv(tmp_path / "test_captions.csv", ("name", "text"), [("a", "b")])
    (tmp_path / "test_images.zip").touch()
    assert (
        "no folder of test images; looked for test_images/test, test_images, test, images; unpack test_images.zip"
        in (refusal("roco_v2", tmp_path))
    )
    (tmp_path / "test_images").mkdir()
    assert "test_captions.csv: no column ID; found are name, text" in refusal("roco_v2", tmp_path)
    write_csv(tmp_path / "test_captions.csv", ("ID", "text"), [("a", "b")])
    assert "test_captions.csv: no column Caption; found are ID, text" in refusal("roco_v2", tmp_path)
    write_csv(tmp_path / "test_captions.csv", ("ID", "Caption"), [("a", "b")])
    with pytest.warns(datasets.DatasetWarning, match=r"split 'train' stays empty, for want of train_captions.csv"):
        assert [study.split for study in listed("roco_v2", tmp_path)] == ["test"]


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_captions_are_not_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "train_images").mkdir()
    write_csv(tmp_path / "train_captions.csv", ("ID", "Caption"), [(f"{n}", "caption" * 1200) for n in range(400)])
    size = (tmp_path / "train_captions.csv").stat().st_size
    reader = registry.reader("roco_v2")
    options = datasets.parse_options("roco_v2", reader.OPTIONS, {})
    tracemalloc.start()
    count = sum(1 for _ in reader.read(tmp_path, options))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 400
    assert peak < size / 4
