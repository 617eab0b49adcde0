"""Bytes of other accounts are parsed to plain data of a limited size, or refused with one line."""

import contextlib
import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from radhpc.core.untrusted import load_array, load_columns, parse_json, printable

pytestmark = pytest.mark.timeout(60)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=9,
)  # fmt: skip


@settings(max_examples=40)
@given(JSON)
def test_what_json_can_say_is_read_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "c: there twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "1e999: out of range"),
        ("[" + "9" * 5000 + "]", "a number of 5000 digits"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, "nested too deeply"),
        ("[1,", "Expecting value"),
        ("", "Expecting value"),
    ],
)
def test_json_that_programs_read_differently_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        parse_json(text.encode())
    assert len(str(refused.value)) < 200


@given(st.binary(max_size=200))
def test_any_bytes_are_plain_data_or_a_value_error(data: bytes) -> None:
    for parse in (parse_json, load_array, lambda data: load_columns(data, ("a",))):
        with contextlib.suppress(ValueError):
            parse(data)


def columns(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


GOOD = columns(a=np.arange(50, dtype=np.int64), b=np.array([b"x", b"yy"]))


def test_columns_come_back_as_they_were_written() -> None:
    loaded = load_columns(GOOD, ("a", "b"))
    assert (loaded["a"] == np.arange(50)).all()
    assert loaded["b"].tolist() == [b"x", b"yy"]
    square = np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert (load_columns(columns(a=square), ("a",))["a"] == square).all()


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_changed_columns_are_refused_or_no_larger(changes: list[tuple[int, int]], data: st.DataObject) -> None:
    changed = bytearray(GOOD)
    for place, value in changes:
        changed[place] = value
    changed = changed[: data.draw(st.sampled_from([len(GOOD), len(GOOD) // 2, 3]))]
    with contextlib.suppress(ValueError):
        loaded = load_columns(bytes(changed), ("a", "b"))
        assert sum(column.nbytes for column in loaded.values()) < len(GOOD)


def header(shape: str, kind: str = "|u1") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("shape", ["(1 << 40,)", "(1000000000000000,)", "(-1,)", "(1000000, 1000000)", "(" * 3000, "3"])
@pytest.mark.parametrize("kind", ["|u1", "|O", "|S0", "|V9", "<U3", "<M8[s]"])
def test_an_array_of_another_size_or_kind_is_refused(shape: str, kind: str) -> None:
    for text in (shape, "(8,)"):
        if (text, kind) != ("(8,)", "|u1"):
            with pytest.raises(ValueError, match="array"):
                load_array(header(text, kind) + bytes(8))


def test_a_compressed_column_is_refused_before_it_is_inflated() -> None:
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as one,
    ):
        one.write(header("(100000000,)"))
        for _ in range(100):
            one.write(bytes(1_000_000))
    assert len(file.getvalue()) < 1_000_000
    with pytest.raises(ValueError, match="compressed"):
        load_columns(file.getvalue(), ("a",))


def test_a_text_of_somebody_else_is_one_short_line() -> None:
    shown = printable("\x1b]0;owned\x07\n\u202e" + "a" * 500)
    assert shown.isprintable()
    assert len(shown) < 200
