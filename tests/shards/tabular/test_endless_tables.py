"""Tables with something without end: it costs its record, and the others are read as if it were not there."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from radhpc.core.errors import UserError
from shards.tabular import json_records, lines, table

pytestmark = pytest.mark.timeout(60)

DEEP = "[" * 100_000 + "]" * 100_000
ROWS = [{"image": f"{n}.png", "text": f'Report {n}: "clear", [no] {{change}}.'} for n in range(5)]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 200)


def as_lines(rows: list[str]) -> str:
    return "\n".join(rows) + "\n"


def as_list(rows: list[str]) -> str:
    return "[" + ",\n".join(rows) + "]"


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", as_lines), ("a.json", as_list)])
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("hostile", [f'{{"image": {DEEP}}}', f'{{"a": "\\"]}}", "labels": {{"x": {DEEP}}}}}', DEEP])
def test_deep_json_costs_its_record(
    tmp_path: Path, name: str, write: Callable[[list[str]], str], place: int, hostile: str
) -> None:
    rows = [json.dumps(row) for row in ROWS]
    rows[place] = hostile
    (tmp_path / name).write_text(write(rows))
    records = list(table.read(tmp_path / name).records)
    assert [record.fault for record in records] == [json_records.DEEP if n == place else None for n in range(5)]
    assert [record.values for n, record in enumerate(records) if n != place] == ROWS[:place] + ROWS[place + 1 :]


@pytest.mark.parametrize("text", [DEEP[:-1], f'{{"x": [{DEEP}]}}', f"[{DEEP}] 5", "[" * 200_000, f'[{DEEP}, "'])
def test_deep_json_that_is_no_list_of_records_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="no usable JSON .nested too deeply.$"):
        table.read(tmp_path / "a.json")


def test_a_number_of_thousands_of_digits_is_a_text(tmp_path: Path) -> None:
    for name, write in (("a.jsonl", as_lines), ("a.json", as_list)):
        (tmp_path / name).write_text(write([f'{{"image": "a", "patient": {"9" * 5000}}}', '{"patient": -7}']))
        assert [record.values["patient"] for record in table.read(tmp_path / name).records] == ["9" * 5000, -7]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize("long", ["x" * 5000, 'a,"' + "y" * 5000, '{"image": "' + "z" * 1000])
def test_a_line_without_end_costs_its_record(tmp_path: Path, name: str, place: int, end: str, long: str) -> None:
    rows = ["1.png,one", "2.png,two", "3.png,three"]
    if name.endswith("l"):
        rows = [json.dumps(dict(zip(("image", "text"), row.split(","), strict=True))) for row in rows]
    rows.insert(place, long)
    header = ["image,text"] if name == "a.csv" else []
    (tmp_path / name).write_bytes(((end or "\n").join([*header, *rows]) + end).encode())
    records = list(table.read(tmp_path / name).records)
    assert [bool(record.fault) for record in records] == [n == place for n in range(4)]
    assert "line of more than" in str(records[place].fault)
    assert [record.values["text"] for record in records if not record.fault] == ["one", "two", "three"]


@pytest.mark.usefixtures("short")
def test_a_header_without_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x," * 5000 + "\n1,2\n")
    with pytest.raises(UserError) as refused:
        list(table.stream(tmp_path / "a.csv", ("image",)))
    assert len(str(refused.value)) < 1500


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30)))
def test_lines_are_those_of_the_file(texts: list[str]) -> None:
    text = "\n".join(texts)
    assert list(lines.lines_of(io.StringIO(text, newline=""))) == list(io.StringIO(text, newline=""))


@given(st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=8))
def test_the_items_of_a_list_are_found_as_json_has_them(value: Any) -> None:
    items = json_records._items(json.dumps(value))
    assert [json.loads(item) for item in items if item.strip()] == (value if isinstance(value, list) else [])
