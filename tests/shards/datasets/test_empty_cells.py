"""A cell that says `nan`, `None`, `N/A` and so on is an empty cell, in every column of every reader's tables.

The test is by comparison: one column of an archive is emptied, and then filled with such a word. Both list the same.
"""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from shards.tabular import cells
from tests.shards.datasets import (
    test_chestxray14,
    test_chexpert,
    test_mimic_cxr,
    test_openi,
    test_padchest,
    test_pathvqa,
    test_roco_v2,
    test_slake,
    test_vqa_rad,
)
from tests.shards.datasets.drawn import listed, write_json

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")]
WORDS = [word for plain in sorted(cells.EMPTY) for word in (plain, plain.upper(), f" {plain.capitalize()}  ")]
MISSING = [word for word in WORDS if cells.is_missing(word)]
SAID_BY_PEOPLE = {("indiana_reports.csv", "indication"), ("indiana_reports.csv", "comparison")}
ARCHIVES: dict[str, Callable[[Path], Any]] = {
    "padchest": test_padchest.write,
    "chexpert": test_chexpert.archive,
    "chexpert_plus": test_chexpert.plus_archive,
    "mimic_cxr_jpg": lambda folder: test_mimic_cxr.write_tree(folder, "mimic_cxr_jpg", packed=False),
    "mimic_cxr": lambda folder: test_mimic_cxr.write_tree(folder, "mimic_cxr", packed=False),
    "openi": test_openi.tables,
    "roco_v2": test_roco_v2.write,
    "chestxray14": test_chestxray14.archive,
}
QUESTIONS: dict[str, Callable[[Path], Any]] = {
    "slake": test_slake.write,
    "vqa_rad": lambda folder: test_vqa_rad.write(folder, test_vqa_rad.ROWS),
    "pathvqa": lambda folder: test_pathvqa.write(folder, form="json"),
}


def studies(dataset: str, raw: Path) -> Any:
    """What a reader yields, but for the places of the rows; or the message that it refuses the archive with."""
    try:
        return [{**vars(study), "name": ""} for study in listed(dataset, raw)]
    except UserError as error:
        return str(error)


def fill_column(path: Path, rows: list[list[str]], place: int, word: str) -> None:
    filled = [[*row[:place], word, *row[place + 1 :]] for row in rows[1:]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0], *filled])


def table_columns(raw: Path) -> Iterator[tuple[Path, str, Callable[[str], None]]]:
    """Yield each column of each CSV, with a function that fills it; afterwards the file is as it was."""
    for path in sorted(raw.glob("*.csv")):
        whole = path.read_bytes()
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        for place, name in enumerate(header):
            yield path, name, partial(fill_column, path, [header, *rows], place)
        path.write_bytes(whole)


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_a_word_for_nothing_is_an_empty_cell(dataset: str, tmp_path: Path) -> None:
    ARCHIVES[dataset](tmp_path)
    raw = tmp_path / "raw" if dataset.startswith("mimic") else tmp_path
    whole = studies(dataset, raw)
    words, missing = cycle(WORDS), cycle(MISSING)
    told_apart = 0
    for path, column, fill in table_columns(raw):
        fill("")
        blank = studies(dataset, raw)
        if blank == whole:
            continue  # not read
        told_apart += 1
        for _ in range(3):
            word = next(missing if (path.name, column) in SAID_BY_PEOPLE else words)
            fill(word)
            assert studies(dataset, raw) == blank, (path.name, column, word)
    assert told_apart > 2


def test_people_say_that_there_is_no_comparison(tmp_path: Path) -> None:
    raw = test_openi.tables(tmp_path)
    fills = {column: fill for path, column, fill in table_columns(raw) if path.name == "indiana_reports.csv"}
    fills["comparison"]("None")
    assert (listed("openi", raw)[0].report.other or "").endswith("COMPARISON: None")
    fills["findings"]("None")
    assert listed("openi", raw)[0].report.findings is None


@pytest.mark.parametrize("dataset", QUESTIONS)
def test_questions_without_a_value(dataset: str, tmp_path: Path) -> None:
    """None and NA are answers here: these sets write null where a value is missing."""
    QUESTIONS[dataset](tmp_path)
    (path, *_) = sorted(tmp_path.rglob("*.json"))
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    words = cycle(MISSING)
    for column in rows[0]:
        write_json(path, [{**row, column: None} for row in rows])
        blank = studies(dataset, tmp_path)
        write_json(path, [{**row, column: next(words)} for row in rows])
        assert studies(dataset, tmp_path) == blank, column
    write_json(path, [{**row, "answer": "None"} for row in rows])
    assert {study["answer"] for study in studies(dataset, tmp_path) if study["answer"]} >= {"None"}
