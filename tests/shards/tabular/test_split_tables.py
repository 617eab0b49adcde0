"""Tables of splits: one in each folder, or one file for each."""

import csv
import json
import os
import warnings
from pathlib import Path

import pytest

from radhpc.core.errors import UserError
from shards.tabular import split_tables
from shards.tabular.records import Table

pytestmark = pytest.mark.timeout(60)


def write(path: Path, *texts: str, **more: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"image": f"{text}.png", "text": text, **more} for text in texts]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def opened(raw: Path) -> tuple[Table, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return split_tables.open_folder(raw), [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "names",
    [
        ["train.csv", "val.csv", "test.csv"],
        ["metadata_train.jsonl", "metadata_dev.jsonl", "metadata_test.jsonl"],
        ["Train/metadata.csv", "validation/metadata.csv", "TEST/metadata.csv"],
        ["train/a.jsonl", "valid/b.csv", "testing/c.csv"],
    ],
)
def test_each_is_its_split(names: list[str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, name, f"{name} 2")
    (tmp_path / "images").mkdir()
    table, messages = opened(tmp_path)
    records = list(table.records)
    assert len(records) == 6
    for record in records:
        name = next(name for name in names if record.values["text"] in (name, f"{name} 2"))
        assert record.values["split"].lower() in name.lower()
        assert record.folder == (tmp_path / name).parent
        assert record.where.startswith(f"{name} line ")
    (message,) = messages
    assert all(name in message for name in names)
    assert "each as the split that its name says" in message


def test_a_split_column_of_their_own_stays(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "a", Split="test")
    write(tmp_path / "test.csv", "b", Split="train")
    table, (message,) = opened(tmp_path)
    assert [record.values for record in table.records] == [
        {"image": "b.png", "text": "b", "Split": "train"}, {"image": "a.png", "text": "a", "Split": "test"},
    ]  # fmt: skip
    assert "split that" not in message


@pytest.mark.parametrize(
    "names", [["train.csv", "training.csv"], ["train.csv", "labels.csv"], ["a_train.csv", "b_test.csv"]]
)
def test_others_are_several_tables(names: list[str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, name)
    with pytest.raises(UserError, match="several tables: .*; choose with table=NAME"):
        opened(tmp_path)


def test_a_table_of_the_folder_is_the_table(tmp_path: Path) -> None:
    write(tmp_path / "metadata.csv", "a")
    write(tmp_path / "train" / "metadata.csv", "b")
    os.mkfifo(tmp_path / "test.csv")
    table, messages = opened(tmp_path)
    assert [record.values["text"] for record in table.records] == ["a"]
    assert messages == []
