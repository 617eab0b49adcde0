"""Cells: words for nothing, and lists as pandas and numpy write them."""

import contextlib
import json
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from shards.datasets.reader import UnusableRecord
from shards.tabular import cells

pytestmark = pytest.mark.timeout(60)
NAMES = st.lists(st.text(string.ascii_letters + " ',.-_[]äé", min_size=1, max_size=12).map(str.strip), max_size=5)


@pytest.mark.parametrize("word", sorted(cells.EMPTY))
def test_words_for_nothing(word: str) -> None:
    for written in (word, word.upper(), word.title(), f"\t{word} \n"):
        assert cells.is_empty(written)
        assert cells.text(written) == cells.known(written) == ""
    for sentence in (f"No {word}.", f"{word}{word} x", f"({word}) x"):
        assert cells.text(sentence) == cells.known(sentence) == sentence


@pytest.mark.parametrize("value", [None, "", " ", float("nan"), np.nan])
def test_values_of_nothing(value: Any) -> None:
    assert cells.is_empty(value)
    assert cells.is_missing(value)


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "no", "nano", "Nana", "normal", "un", "[]"])
def test_values_of_something(value: Any) -> None:
    assert not cells.is_empty(value)


@given(NAMES)
def test_a_list_is_a_list_in_every_spelling(names: list[str]) -> None:
    expected = [cells.text(name) for name in names]
    assert cells.strings(names) == expected
    for spelled in (json.dumps(names), str(names), str(tuple(names)) if len(names) > 1 else str(names)):
        assert cells.strings(spelled) == expected
    if names and not any(set(name) & set("[]'") for name in names):
        array = np.array(names, dtype=object)
        assert cells.strings(str(array)) == expected
        assert cells.strings(repr(array)) == expected


@given(st.dictionaries(st.text(string.ascii_letters, max_size=5), st.sampled_from([1, 0, -1, None, float("nan")])))
def test_a_dictionary_is_one_in_every_spelling(values: dict[str, Any]) -> None:
    plain = {name: None if cells.is_empty(value) else value for name, value in values.items()}
    assert cells.structure(str(values)) == plain
    assert cells.structure(json.dumps(plain)) == plain


@given(st.text(max_size=30))
def test_any_text_is_read_or_named(text: str) -> None:
    with contextlib.suppress(UnusableRecord):
        assert all(isinstance(item, str) for item in cells.strings(text))


@pytest.mark.parametrize("text", ["[Clear] lungs.", "['open", "{x", "(a) b", "[1] no", "array(", "{1: [}"])
def test_other_brackets_are_text(text: str) -> None:
    assert cells.structure(text) == text


def test_code_is_never_run() -> None:
    text = "[__import__('os').getcwd()]"
    assert cells.structure(text) == text
    assert cells.structure("[" * 100_000) == "[" * 100_000
