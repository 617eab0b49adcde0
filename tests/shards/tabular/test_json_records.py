"""Records of JSON: what stands twice, is nested too deeply or is no number is named."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from shards.tabular.json_records import parse_json, parse_lines

pytestmark = pytest.mark.timeout(60)
PATH = Path("a.json")
ROW = {"image": "a.png", "text": "Clear."}


@pytest.mark.parametrize("value", [[ROW], {"about": 1, "rows": [ROW]}])
def test_records(value: Any) -> None:
    (record,) = parse_json(PATH, json.dumps(value))
    assert (record.where, record.values, record.fault) == ("record 1", ROW, None)
    lines = io.StringIO(f"{json.dumps(ROW)}\r\n\n{json.dumps(ROW)}")
    assert [r.values for r in parse_lines(PATH, lines)] == [ROW, ROW]
    assert [r.where for r in parse_json(PATH, f"{json.dumps(ROW)}\n{json.dumps(ROW)}")] == ["line 1", "line 2"]
    records = parse_json(PATH, json.dumps({"Train": [ROW], "dev": [ROW]}))
    assert [(r.where, r.values["split"]) for r in records] == [("Train record 1", "Train"), ("dev record 1", "dev")]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[{"text": "a", "text": "b"}, {"text": "c"}]', "record 1, 'text'"),
        ('[{"labels": {"Edema": 1, "Edema": 0}}, {}]', "record 1, 'Edema'"),
        ('{"train": [{"a": 1, "b": 2, "a": 1}], "test": [{}]}', "train record 1, 'a'"),
        ('{"a": 1, "a": 1}\n{}', "line 1, 'a'"),
    ],
)
def test_a_name_that_stands_twice_is_the_fault_of_its_record(text: str, where: str) -> None:
    broken, whole = parse_json(PATH, text)
    assert (broken.where, broken.fault) == (where, "a name that stands twice in one record")
    assert whole.fault is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a.json: the records must be a list of objects"),
        ('{"a": [], "b": []}', r"a.json: an object with 2 lists \(a, b\)"),
        ('[{"a": 1},\n{"a" 2}]', "a.json: line 2, column 6: no valid JSON"),
        ('{"a": 1}\n{"a": ', "a.json: line 2, column 7: no valid JSON"),
        ("[" * 200_000, "a.json: no usable JSON .nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_json(PATH, text)
    assert "\n" not in str(error.value)


def test_an_absurd_line_is_the_fault_of_its_record() -> None:
    whole, deep, digits = parse_json(PATH, '{"a": 1}\n{"a": ' + "[" * 200_000 + '\n{"a": ' + "9" * 5000 + "}")
    assert (whole.values, whole.fault) == ({"a": 1}, None)
    assert (deep.where, deep.fault) == ("line 2", "nested too deeply")
    assert digits.values == {"a": "9" * 5000}
