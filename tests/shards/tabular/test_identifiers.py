"""Identifiers have one form, and those that were plain keep the hashes and the splits that they always had."""

import csv
import hashlib
import hmac
import json
import string
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from radhpc.core.sample import SPLITS
from shards import salt
from shards.datasets.reader import UnusableRecord
from shards.listing import Listing
from shards.settings import BuildSettings
from shards.source import open_source
from shards.tabular.identifiers import Identifiers, identifier

pytestmark = pytest.mark.timeout(60)
PLAIN = st.one_of(
    st.integers(0, 10**15),
    st.text(string.ascii_letters + string.digits, min_size=1, max_size=12).map(lambda text: f"p{text}"),
    st.uuids().map(str),
    st.text("äÖéñøłЖ山ab1", min_size=1, max_size=8).map(lambda text: unicodedata.normalize("NFC", f"x{text}")),
)


@given(st.integers(0, 10**15))
def test_a_number_is_one_identifier(number: int) -> None:
    spellings = [number, str(number), f"{number}.0", f"{number}.00", f" {number}\t", f"\ufeff{number}\u200b"]
    spellings += [f"{number},0", f"{number},00", f'="{number}"', f"{number}\u00a0", float(number)]
    assert {identifier(spelling) for spelling in spellings} == {str(number)}


@given(st.text(st.characters(categories=["L", "M", "N", "Zs", "P"]), max_size=12))
def test_the_form_of_a_form_is_itself(text: str) -> None:
    try:
        form = identifier(text)
    except UnusableRecord:
        return
    assert identifier(form) == form
    assert identifier(unicodedata.normalize("NFD", text)) == identifier(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("value", ["2.1684E+44", "2,1684e+44", "1E+11", 2.0**53, 1.2345678901234567e18])
def test_what_a_spreadsheet_rounded_is_nobody(value: Any) -> None:
    with pytest.raises(UnusableRecord, match="identifier that was rounded as a number"):
        identifier(value)


@pytest.mark.parametrize("value", ["7E5", "1e5", "3.5", "7.05", "07", "7-0", "2^3", "E+11", "p1.0", "7,000", "7,5"])
def test_others_stay_as_they_are(value: str) -> None:
    assert identifier(value) == value


def test_case_and_leading_zeros_are_said() -> None:
    people = Identifiers()
    assert [people(name) for name in ("P07", "p07", "P08", "aB3x", "ab3X", "MÜLLER", "müller")] == [
        "P07", "P07", "P08", "aB3x", "ab3X", "MÜLLER", "MÜLLER",
    ]  # fmt: skip
    assert [people(name) for name in ("7", "007", "007", "8")] == ["7", "007", "007", "8"]
    assert [people(name, within="7") for name in ("08", "s1", "S1")] == ["08", "s1", "s1"]
    case, zeros = people.messages("patient")
    assert case.startswith("3 identifiers (patient) are written in upper and in lower case")
    assert zeros.startswith("1 identifiers (patient) are written with and without leading zeros")


def old_hash(*parts: str) -> str:
    """The hash of an identifier as it has been since the first version."""
    key = salt.load(False)
    return hmac.new(key, "\x1f".join(parts).encode(), hashlib.sha256).hexdigest()[:16]


def old_split(patient: str) -> str:
    place = int(patient, 16) / 16.0**16
    return SPLITS[0] if place < 0.8 else SPLITS[1] if place < 0.9 else SPLITS[2]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_plain_identifiers_keep_their_hashes_and_splits(form: str, tmp_path: Path) -> None:
    names: list[Any] = [
        *range(1, 120), "P1001", "p2002x", "aB3x", "ab3X", "8c1f-77a2", "MÜLLER", "Nguyễn", "00999", "1e5", "A B",
        "7.5", "10000032", "patient00001", "山田", "O'Neil, J.",
    ]  # fmt: skip
    rows = [
        {"image": f"{n}.png", "text": "Clear.", "patient": name, "study": f"S{n}"}
        for n, name in enumerate(names)
        for _ in range(2)
    ]
    if form == "json":
        (tmp_path / "data.json").write_text(json.dumps(rows))
    else:
        with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    source = open_source("image_text", {"name": "hospital"})
    assert source.list_studies(tmp_path, tmp_path / "listing", BuildSettings()) == []
    expected = {
        old_hash("hospital", "study", f"{name}\x1fS{n}\x1f"): old_hash("hospital", "patient", str(name))
        for n, name in enumerate(names)
    }
    with Listing(tmp_path / "listing") as listing:
        studies = [row for plan in listing.plans for row in listing.rows(plan)]
        assert {row.study: row.patient for row in studies} == expected
        assert {row.split for row in studies} == set(SPLITS)
        assert all(row.split == old_split(row.patient) for row in studies)


@given(PLAIN)
def test_a_plain_identifier_is_what_it_was(value: Any) -> None:
    assert identifier(value) == str(value).strip()
    assert Identifiers()(value) == str(value).strip()
