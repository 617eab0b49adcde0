"""Patients are compared across datasets: by namespace and salt, whatever the datasets are called."""

import csv
import hashlib
import hmac
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from radhpc.cli.submission import check_data
from radhpc.core import recipe as recipes
from radhpc.core.errors import UserError
from radhpc.core.manifest import INDEX, MANIFEST, Manifest, SampleIndex
from radhpc.core.people import DatasetPatients, describe_incomparable, shared_patients
from radhpc.core.sample import SPLITS
from radhpc.data.source import Source
from radhpc.storage.store import Store
from shards import salt, splits
from shards.build import BuildSettings, build
from shards.datasets.reader import ReaderOptions
from shards.people import FAMILIES, canonical
from shards.repair import repair
from shards.verify import verify, verify_all
from tests.shards.datasets import test_mimic_cxr as archive
from tests.shards.datasets.drawn import draw

pytestmark = pytest.mark.timeout(120)
SETTINGS = BuildSettings(workers=1, longest_side=32, shard_samples=8, max_skipped="50%", ratios=(0.4, 0.3, 0.3))
Rows = list[tuple[str, str]]  # patient, split


def table(folder: Path, rows: Rows, first: int = 0) -> Path:
    """A table of images, each of its own, by patient and, where there is one, split."""
    for n, _ in enumerate(rows):
        draw(folder / f"{n}.png", first + n)
    columns = ["image", "findings", "patient", *(["split"] if rows[0][1] else [])]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for n, (patient, split) in enumerate(rows):
            writer.writerow([f"{n}.png", f"Report number {n}.", patient, split][: len(columns)])
    return folder


def built(folder: Path, rows: Rows, first: int = 0, settings: BuildSettings = SETTINGS, **options: str) -> str:
    raw, out = table(folder / "raw", rows, first), str(folder / "out")
    build("image_text", raw, out, options, settings)
    return out


def patients(url: str) -> DatasetPatients:
    return DatasetPatients.load(Store(url))


def by_hand(*parts: str) -> str:
    """A salted hash as it was always made, without the project's own function."""
    return hmac.new(salt.load(), "\x1f".join(parts).encode(), hashlib.sha256).hexdigest()[:16]


NUMBERS = [(str(n), "") for n in range(24)]
TRAIN = [(f"p{n}", "train") for n in range(6)]
HELD_OUT = [*((f"p{n}", "train") for n in range(6, 12)), ("p3", "test"), ("p4", "test"), ("p20", "test")]


@pytest.mark.parametrize("options", [{}, {"name": "ours"}])
def test_the_default_keeps_the_hashes_and_the_splits(tmp_path: Path, options: dict[str, str]) -> None:
    dataset = patients(built(tmp_path, NUMBERS, **options))
    name = options.get("name", "image_text")
    assert (dataset.manifest.people, dataset.index.person, dataset.manifest.gate) == (name, None, "scrubbed")
    expected = {by_hand(name, "patient", number) for number, _ in NUMBERS}
    assert {value.decode() for value in dataset.index.patient} == expected
    for patient, split in zip(dataset.index.patient, dataset.index.split, strict=True):
        assert SPLITS[split] == splits.by_hash(patient.decode(), SETTINGS.ratios)


def test_a_chosen_namespace_decides_hashes_and_splits(tmp_path: Path) -> None:
    """Two tables without official splits put a patient into the same one."""
    one = patients(built(tmp_path / "one", NUMBERS, name="one", people="hospital"))
    two = patients(built(tmp_path / "two", NUMBERS[6:], 50, name="two", people="hospital"))
    assert {value.decode() for value in one.index.patient} == {by_hand("hospital", "patient", n) for n, _ in NUMBERS}
    assert set(two.index.patient) < set(one.index.patient)
    assert not list(shared_patients(one.index, two.index))
    assert describe_incomparable([(one, two)]) is None


def mimic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    seeds = itertools.count()
    monkeypatch.setattr(archive, "write_image", lambda path: draw(path, next(seeds)))  # no two alike
    raw, out = archive.write_tree(folder, "mimic_cxr_jpg"), str(folder / "out")
    build("mimic_cxr_jpg", raw, out, {}, SETTINGS)
    return out


def test_an_archive_and_a_table_made_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes in MIMIC's shards are those of before; its patients are compared in the namespace of the family."""
    url = mimic(tmp_path, monkeypatch)
    dataset = patients(url)
    assert dataset.manifest.people == "mimic"
    assert dataset.index.person is not None
    subjects = {subject for _, subject, *_ in archive.IMAGES}
    columns = {"mimic_cxr_jpg": dataset.index.patient, "mimic": dataset.index.person}
    for name, column in columns.items():
        assert {value.decode() for value in column} == {by_hand(name, "patient", subject) for subject in subjects}
    trained = dataset.index.patient[dataset.index.of_split("train")[0]].decode()
    subject = next(subject for subject in subjects if by_hand("mimic_cxr_jpg", "patient", subject) == trained)
    for spelling in (subject, f"p{subject}"):
        other = built(tmp_path / spelling, [(spelling, "test"), ("p19999999", "train")], 70, name="vqa", people="mimic")
        with pytest.raises(UserError, match="another split in .*: 1 of . in train are in test"):
            Source((url, other), "train")
    assert verify(url).ok
    (Path(url) / INDEX).unlink()
    assert repair(url, None, verify(url)) == [INDEX]
    assert verify(url).ok


def test_shared_patients_are_refused_at_launch(tmp_path: Path) -> None:
    one = built(tmp_path / "one", TRAIN, name="one", people="hospital")
    two = built(tmp_path / "two", HELD_OUT, 50, name="two", people="hospital")
    with pytest.raises(UserError, match="another split in .*two/out: 2 of 6 in train are in test there"):
        Source((one, two), "train")
    stages = recipes.load(Path("quickstart"), [f"shards=[{one}]"])
    first, *rest = stages.stages
    stages = stages.model_copy(
        update={"stages": (first, *(stage.model_copy(update={"shards": (two,)}) for stage in rest))}
    )
    with pytest.raises(UserError, match="2 of 6 in train are in test there"):  # each stage by itself has no leak
        check_data(stages)
    report = verify_all([one, two])
    assert [fault.fault for fault in report.faults] == [f"2 of 6 patients in train are in test of {two}"]
    assert not report.warnings


@pytest.mark.parametrize("duplicates", ["drop", "report"])
def test_build_apart_from(tmp_path: Path, duplicates: str) -> None:
    one = built(tmp_path / "one", TRAIN, name="one", people="hospital")
    raw, out = table(tmp_path / "raw", HELD_OUT, 50), str(tmp_path / "two")
    settings = BuildSettings(
        workers=1,
        longest_side=32,
        shard_samples=8,
        apart_from=(one,),
        duplicates="drop" if duplicates == "drop" else "report",
    )
    result = build("image_text", raw, out, {"name": "two", "people": "hospital"}, settings)
    report = verify_all([one, out])
    if duplicates == "drop":
        assert [skip["reason"] for skip in result.skipped] == [
            "patient who is in another split of a dataset to be apart from"
        ] * 2
        assert result.samples == 7
        assert report.ok, report.faults
    else:
        assert f"2 of 3 patients in test are in train of {one}" in result.warnings
        assert result.samples == 9
        assert len(report.faults) == 1


def test_what_cannot_be_compared_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = built(tmp_path / "one", TRAIN, name="one")
    two = built(tmp_path / "two", HELD_OUT, 50, name="two")
    third = built(tmp_path / "third", [("p50", "train"), ("p51", "test")], 80, name="third", people="two")
    for urls in ([one, two], [one, two, third]):
        report = verify_all(urls)
        assert report.ok
        assert len(report.warnings) == 1
        assert "people=one" in report.warnings[0]
        assert "people=NAME" in report.warnings[0]
    assert verify_all([two, third]).warnings == []
    settings = BuildSettings(workers=1, longest_side=32, apart_from=(one, two))
    warnings = build("image_text", tmp_path / "third/raw", str(tmp_path / "again"), {"name": "x"}, settings).warnings
    assert len([text for text in warnings if "cannot be compared" in text]) == 1
    (tmp_path / "salt").write_bytes(b"another salt for tests, of enough bytes")
    monkeypatch.setenv(salt.VARIABLE, str(tmp_path / "salt"))
    elsewhere = built(tmp_path / "elsewhere", TRAIN, 90, name="one")
    (warning,) = verify_all([one, elsewhere]).warnings
    assert "salt" in warning


def test_the_public_archives_are_of_different_people(tmp_path: Path) -> None:
    one = patients(built(tmp_path, TRAIN, name="one"))
    named = {
        name: DatasetPatients(name, one.manifest.model_copy(update={"people": name}), one.index)
        for name in ("mimic", "padchest", "vqa")
    }
    assert describe_incomparable([(named["mimic"], named["padchest"])]) is None
    assert describe_incomparable([(named["mimic"], named["vqa"])])


def test_format_1_opens_and_keeps_its_identity(tmp_path: Path) -> None:
    url = Path(built(tmp_path, TRAIN, name="one", people="hospital"))
    text = json.loads((url / MANIFEST).read_bytes())
    for key in ("people", "gate"):
        del text[key]
    text["format"] = 1
    data = (json.dumps(text, indent=1, sort_keys=True) + "\n").encode()
    (url / MANIFEST).write_bytes(data)
    manifest = Manifest.load(Store(str(url)))
    assert manifest.hash == hashlib.sha256(data).hexdigest()
    assert len(Source((str(url),), "train")) == len(TRAIN)
    assert verify(str(url)).ok
    assert patients(str(url)).people == "one"
    (url / MANIFEST).write_text(json.dumps({**text, "people": "hospital"}))
    with pytest.raises(UserError, match="people: not in format 1"):
        Manifest.load(Store(str(url)))


HASHES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 2)), max_size=40)


def index_of(rows: list[tuple[int, int, int]], person: bool) -> SampleIndex:
    n = len(rows)
    column = lambda at: np.array([f"{row[at]:016x}" for row in rows], "S16")  # noqa: E731
    return SampleIndex(
        key=np.array([f"k-{i}" for i in range(n)], "S"), patient=column(0), person=column(1) if person else None,
        split=np.array([row[2] for row in rows], np.uint8), shard=np.zeros(n, np.int32), first=np.arange(n + 1),
        suffix=np.full(n, "json", "S4"), offset=np.zeros(n, np.int64), length=np.ones(n, np.int64),
        crc32c=np.zeros(n, np.uint32),
    )  # fmt: skip


@given(HASHES, HASHES, st.booleans(), st.booleans())
def test_shared_patients_are_those_of_plain_sets(
    ours: list[tuple[int, int, int]], theirs: list[tuple[int, int, int]], our_person: bool, their_person: bool
) -> None:
    result = {
        (part.split, part.other): part.patients
        for part in shared_patients(index_of(ours, our_person), index_of(theirs, their_person))
    }
    expected = {}
    for here, there in itertools.permutations(range(3), 2):
        counts = []
        for at, other_at in ((int(our_person), int(their_person)), (0, 0)):
            in_split, in_other = (
                {row[at] for row in ours if row[2] == here},
                {row[other_at] for row in theirs if row[2] == there},
            )
            counts.append(len(in_split & in_other))
        if max(counts):
            expected[SPLITS[here], SPLITS[there]] = max(counts)
    assert result == expected


def test_forms_of_identifiers() -> None:
    assert {canonical("mimic", form) for form in ("10000032", "p10000032", "P10000032", " p10000032")} == {"10000032"}
    assert {canonical("chexpert", form) for form in ("patient00001", "00001")} == {"patient00001"}
    assert {canonical("chestxray14", form) for form in ("1", "00000001")} == {"1"}
    assert canonical("hospital", "p007") == "p007"
    assert canonical("mimic", "s10000032") == "s10000032"


def test_every_archive_has_a_family() -> None:
    from shards.datasets.registry import BUILT_IN

    assert set(BUILT_IN) - set(FAMILIES) == {"image_text", "phantom"}
    assert ReaderOptions.model_fields["people"].default is None
