"""Rows of a CSV: what is broken is named with its line and column, and what is whole is never called broken."""

import csv
import io
import random
from pathlib import Path

import pytest

from radhpc.core.errors import UserError
from shards.tabular import csv_rows
from shards.tabular.records import Record

pytestmark = pytest.mark.timeout(60)
# Reports that look like rows: commas, numbers, dates and several lines.
REPORTS = [
    "Clear.", "Small effusion, left.", 'A 5" tube, "unchanged".', "No change, compared to prior, 2010-01-02",
    "Findings: 1, the heart, big.\n2. clear, no effusion, 3\n\nImpression: none, 7, x.y",
    "Compared to 2/3/2010, no change.\nNo change, compared to prior, 2010-01-02\n1) none, 2) few, 3) 4.5 cm",
]  # fmt: skip
SHAPES = {
    "path, text, patient": lambda n: [f"images/{n}.png", None, str(n % 7)],
    "text, path": lambda n: [None, f"p{n}_1.png"],
    "number, text, split": lambda n: [str(n), None, "train"],
    "path, patient, text": lambda n: [f"{n}.png", f"P{n % 5:03d}", None],
    "long numbers": lambda n: [str(50414267 + n), str(10000032 + n // 3), None],
    "path, text, date": lambda n: [f"{n}.png", None, f"2010-01-{1 + n % 28:02d}"],
    "number, text": lambda n: [str(n), None],
}


def rows_of(text: str, delimiter: str = ",") -> list[Record]:
    rows, header = csv_rows.open_csv(Path("a.csv"), io.StringIO(text, newline=""), delimiter)
    places = [(name, place) for place, name in enumerate(header)]
    return list(csv_rows.records(rows, places, len(header), delimiter))


def faults_of(text: str, delimiter: str) -> list[str | None]:
    """The faults of all records, or the error that ends the reading."""
    try:
        return [record.fault for record in rows_of(text, delimiter)]
    except UserError as error:
        return [str(error) if "a.csv: line " in str(error) else None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_lost_or_added_quote_is_named_and_whole_tables_are_not(shape: str, delimiter: str) -> None:
    chance = random.Random(f"{shape}{delimiter}")
    for _ in range(60):
        cells = [[chance.choice(REPORTS) if c is None else c for c in SHAPES[shape](n)] for n in range(10)]
        buffer = io.StringIO(newline="")
        header = [f"column {n}" for n in range(len(cells[0]))]
        csv.writer(buffer, delimiter=delimiter).writerows([header, *cells])
        whole = buffer.getvalue()
        records = rows_of(whole, delimiter)
        assert [list(record.values.values()) for record in records] == cells
        assert [record.fault for record in records] == [None] * 10
        quotes = [place for place, character in enumerate(whole) if character == '"']
        if quotes and chance.random() < 0.5:
            place = chance.choice(quotes)
            damaged = whole[:place] + whole[place + 1 :]
        else:
            place = chance.choice([n + 1 for n, c in enumerate(whole) if c in delimiter + "\n" and n < len(whole) - 2])
            damaged = f'{whole[:place]}"{whole[place:]}'
        assert any(faults_of(damaged, delimiter)), damaged


def test_places() -> None:
    def faults(text: str) -> list[tuple[str, str]]:
        return [(record.where, record.fault) for record in rows_of("image,text,patient\n" + text) if record.fault]

    assert faults("a.png,Cle\0ar,1\nb.png,x,2\n") == [("line 2, column 2", "zero byte in a cell")]
    assert faults('a.png,"x\ny",1\nb.png,x\n') == [("line 4", "row of another length than the header")]
    assert faults('a.png,"Clear.,1\nb.png,Edema.,2\nc.png,Scar.",3\nd.png,x,4\n') == [
        ("lines 2 to 4, column 2", "a quote that swallows rows")
    ]
    assert faults('a.png,x",1\n') == [("line 2, column 2", "a quote that was never opened")]
    assert faults('a.png,5" tube,1\nb.png,"5""",1\n') == []
    with pytest.raises(UserError, match="a.csv: line 2, character 7: a quote that is opened there .* to line 3"):
        faults('a.png,"Clear.,1\nb.png,"Edema.",2\n')
    with pytest.raises(UserError, match="a.csv: line 1, column 2: zero byte in the column's name"):
        rows_of("image,te\0xt\na,b\n")
