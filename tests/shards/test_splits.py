"""Patients do not stand in two splits, and do not move when others come."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from radhpc.core.errors import UserError
from radhpc.core.sample import SPLITS, salted_hash
from shards import salt, splits
from shards.datasets.reader import RawStudy
from shards.listing import Listing, write_listing
from shards.people import Pseudonyms

pytestmark = pytest.mark.timeout(60)
Official = splits.Split | None


def assign(
    studies: Iterable[tuple[str, Official]], ratios: splits.Ratios = splits.RATIOS
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The split of each patient, and which splits were filled, by a listing of (patient, official split)."""
    raw = [
        RawStudy(study=str(n), patient=patient, views=(), name=f"study {n}", split=split)
        for n, (patient, split) in enumerate(studies)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "listing"
        write_listing(path, raw, Pseudonyms("set", "set", False, b"salt"), ratios, 7, None)
        with Listing(path) as listing:
            rows = [row for plan in listing.plans for row in listing.rows(plan)]
            assert len(rows) == len(raw) == sum(plan.samples for plan in listing.plans)
            result = {row.raw.patient: row.split for row in rows}
            assert all(result[row.raw.patient] == row.split for row in rows)
            return result, listing.filled


RATIOS = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.7, 0.0, 0.3)])
PATIENTS = st.lists(st.integers(0, 400).map(str), min_size=1, max_size=60)


@given(PATIENTS, RATIOS)
def test_every_patient_has_one_split_that_is_wanted(patients: list[str], ratios: splits.Ratios) -> None:
    result, _ = assign(((patient, None) for patient in patients), ratios)
    assert result.keys() == set(patients)
    expected = {split for split, ratio in zip(SPLITS, ratios, strict=True) if ratio}
    assert set(result.values()) <= expected
    if len(set(patients)) >= len(expected):
        assert set(result.values()) == expected


@given(PATIENTS, PATIENTS, RATIOS)
def test_nobody_moves_when_studies_are_added(few: list[str], more: list[str], ratios: splits.Ratios) -> None:
    before, filled = assign(((patient, None) for patient in few), ratios)
    after, filled_later = assign(((patient, None) for patient in few + more), ratios)
    if not filled and not filled_later:
        assert all(after[patient] == split for patient, split in before.items())
    if not filled and len(set(before.values())) == sum(ratio > 0 for ratio in ratios):
        assert not filled_later


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([None, *SPLITS]))))
def test_official_splits_hold_or_are_refused(studies: list[tuple[int, splits.Split | None]]) -> None:
    rows = [(str(patient), split) for patient, split in studies]
    official: dict[str, set[str]] = {}
    for patient, split in rows:
        if split:
            official.setdefault(patient, set()).add(split)
    if any(len(named) > 1 for named in official.values()):
        with pytest.raises(UserError, match="of the same patient"):
            assign(rows)
    else:
        result, _ = assign(rows)
        assert all(result[patient] == split for patient, split in rows if split)


def test_shares_are_near_the_ratios() -> None:
    patients = [salted_hash(b"salt", str(n)) for n in range(20_000)]
    result = [splits.by_hash(patient) for patient in patients]
    assert result.count("train") / len(result) == pytest.approx(0.8, abs=0.01)
    assert result.count("test") / len(result) == pytest.approx(0.1, abs=0.01)


def test_another_salt_gives_other_splits() -> None:
    names = [str(n) for n in range(200)]
    assert [splits.by_hash(salted_hash(b"a", n)) for n in names] != [
        splits.by_hash(salted_hash(b"b", n)) for n in names
    ]


def test_names_of_splits() -> None:
    assert [splits.parse(word) for word in ("Train", "val", " validation ", "dev", "TEST")] == [
        "train", "validate", "validate", "validate", "test",
    ]  # fmt: skip
    with pytest.raises(UserError, match="split: 'holdout' is unknown; allowed are train"):
        splits.parse("holdout")


def test_the_salt_is_made_once_and_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(salt.VARIABLE, raising=False)
    first = salt.load()
    path = tmp_path / ".config" / "radhpc" / "salt"
    assert (len(first), path.read_bytes(), salt.load()) == (32, first, first)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["salt"]
    assert salt.load(synthetic=True) == salt.PUBLIC != first
    (tmp_path / "other").write_bytes(b"x" * 40)
    monkeypatch.setenv(salt.VARIABLE, str(tmp_path / "other"))
    assert salt.load() == b"x" * 40


def test_a_salt_that_is_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(salt.VARIABLE, str(tmp_path / "salt"))
    with pytest.raises(UserError, match=f"{tmp_path}/salt: the salt of patient hashes cannot be read"):
        salt.load()
    (tmp_path / "salt").write_bytes(b"short")
    with pytest.raises(UserError, match="the salt has 5 bytes, at least 32 are needed"):
        salt.load()
    monkeypatch.delenv(salt.VARIABLE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=salt.VARIABLE):
        salt.load()
