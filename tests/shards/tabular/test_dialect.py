"""Encodings and delimiters are found where they can be known, and refused by line where not."""

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from radhpc.core.errors import UserError
from shards.tabular import dialect, table

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")]
WESTERN = {
    "es": "Radiografía de tórax; cardiomegalia. Ángulo costofrénico izquierdo borrado, ¿neumonía?",
    "de": "Herz mäßig verbreitert, kein Erguss; Größe unverändert. Übersicht »normal«.",
    "fr": "Cœur de taille normale, pas d’épanchement ; 37°C, 5 µm… L’œdème n’est plus là.",
    "pt": "Coração aumentado, não há derrame; opacidade à esquerda.",
    "en": "No effusion — “clear” lungs–heart’s size normal, 3±1 cm×cm.",
}
OTHERS = [
    ("Zdjęcie klatki piersiowej: płuca bez zmian ogniskowych, kąty wolne.", "cp1250"),
    ("Легкие без очаговых теней. Сердце увеличено.", "cp1251"),
    ("Легкие без очаговых теней. Сердце увеличено.", "koi8-r"),
    ("Οι πνεύμονες καθαροί. Καρδιά φυσιολογική.", "cp1253"),
    ("双肺纹理清晰，未见实变影。心影增大。", "gb18030"),
    ("両肺野に異常陰影を認めない。心拡大あり。", "shift_jis"),
    ("양측 폐야에 이상 소견 없음.", "euc_kr"),
    ("الرئتان سليمتان. تضخم القلب.", "cp1256"),
    ("Radiografía de tórax, patología, pequeño derrame.", "cp850"),
    ("Röntgen: Herz verbreitert, Größe.", "mac_roman"),
]


def write(path: Path, rows: list[list[str]], encoding: str, delimiter: str = ",") -> Path:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    data = buffer.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_western_tables_are_read_as_they_were_written(encoding: str, name: str, tmp_path: Path) -> None:
    for text in WESTERN.values():
        for delimiter in dialect.DELIMITERS:
            cells = [["image", "text"], ["a.png", text], ["b.png", "Clear."], ["c.png", f"{text}\n{text}"]]
            path = write(tmp_path / name, cells, encoding, delimiter)
            records = list(table.read(path).records)
            assert [list(record.values.values()) for record in records] == cells[1:]
            message = dialect.detect(path, "\t" if name == "a.tsv" else ",").message("\t" if name == "a.tsv" else ",")
            assert ("Windows-1252" in message) == (encoding == "cp1252")
            assert ("UTF-" in message) == ("16" in encoding or "32" in encoding)


@pytest.mark.parametrize(("text", "encoding"), OTHERS)
def test_other_encodings_are_refused_by_line_and_read_where_named(text: str, encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["image", "text"], ["a.png", "Clear."], ["b.png", text]], encoding)
    with pytest.raises(UserError, match=r"a.csv: line 3, character \d+: byte 0x.* give encoding=NAME") as error:
        table.read(path)
    assert "\n" not in str(error.value)
    (_, record) = table.read(path, table.Form(encoding=encoding)).records
    assert record.values["text"] == text
    with pytest.raises(UserError, match="encoding=klingon: unknown; allowed are utf-8"):
        table.read(path, table.Form(encoding="klingon"))


def test_damaged_utf8_is_no_other_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["image", "text"], *([f"{n}.png", "pequeño"] for n in range(40))], "utf-8")
    data = path.read_bytes()
    place = data.index(b"20.png,peque") + 12
    path.write_bytes(data[: place + 1] + data[place + 2 :])
    with pytest.raises(UserError, match="a.csv: line 22, character 13: byte 0xc3 is not UTF-8, as the rest"):
        table.read(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.text(st.sampled_from("aé€😀\n\r,"), min_size=1, max_size=40), st.integers(1, 7))
def test_no_character_is_cut_in_two(tmp_path: Path, text: str, size: int) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialect, "CHUNK", size)
        chunks = list(dialect.binary(path))
    assert b"".join(chunks) == text.encode()
    assert "".join(chunk.decode() for chunk in chunks) == text
    assert dialect.encoding_of(chunks, path) == dialect.UTF8


def test_a_line_that_names_the_delimiter_decides(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sep=;\nimage;text\na.png;Clear, no, effusion\n")
    (record,) = table.read(path).records
    assert record.values == {"image": "a.png", "text": "Clear, no, effusion"}
    path.write_text("image;text\na.png;x\n")
    assert table.read(path, table.Form(delimiter="|")).columns == ("image;text",)
    with pytest.raises(UserError, match="delimiter=;;: one character is allowed"):
        table.read(path, table.Form(delimiter=";;"))
