"""Texts that are paths: read inside the folder, else refused; sentences stay as they are."""

import os
from pathlib import Path

import pytest

from shards.datasets.reader import UnusableRecord
from shards.tabular.text_files import MAX_BYTES, TextFiles

pytestmark = pytest.mark.timeout(20)  # nothing may wait for a pipe
TEXT = "Findings: keine Auffälligkeit.\nImpression: normal."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    (raw / "reports" / "p10").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("Secret.")
    (raw / "reports" / "p10" / "s50414267").write_text(TEXT)
    (raw / "reports" / "out.txt").symlink_to(tmp_path / "secret.txt")
    (raw / "reports" / "up").symlink_to(tmp_path)
    (raw / "reports" / "inside.txt").symlink_to(raw / "reports" / "p10" / "s50414267")
    os.mkfifo(raw / "reports" / "pipe.txt")
    (raw / "reports" / "large.txt").write_bytes(b"a" * (MAX_BYTES + 1))
    (raw / "reports" / "binary.txt").write_bytes(bytes(range(256)))
    (raw / "reports" / "folder.txt").mkdir()
    return raw


@pytest.mark.parametrize("name", ["a.txt", "A B.TXT", "c.rpt", "befund-ü.text"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_files_inside_are_read(name: str, encoding: str, folder: Path) -> None:
    (folder / "reports" / name).write_bytes(TEXT.encode(encoding))
    files = TextFiles(folder)
    for written in (f"reports/{name}", f"./reports/{name}", f"reports\\{name}", str(folder / "reports" / name)):
        assert files.resolve(written, folder) == TEXT
    assert files.resolve(name, folder / "reports") == TEXT
    assert files.count == 5


@pytest.mark.parametrize("path", ["reports/p10/s50414267", "reports/inside.txt"])
def test_paths_without_an_ending_and_links_inside(path: str, folder: Path) -> None:
    assert TextFiles(folder).resolve(path, folder) == TEXT


@pytest.mark.parametrize(
    "path",
    [
        "reports/none.txt", "../secret.txt", "reports/../../secret.txt", "reports/out.txt", "reports/up/secret.txt",
        "/etc/a.txt", "/etc/passwd", "/proc/self/environ", "~/notes.txt", "reports/pipe.txt", "reports/large.txt",
        "reports/binary.txt", "reports/folder.txt", "none.txt", "report 7/none.txt", "a.pdf", "a.docx", "images/1.png",
        "a.txt.gz", "s3://bucket/report.txt", "https://example.org/r/1234", "file:///etc/passwd", "C:\\data\\r1",
        "\\\\server\\share\\r1", "files/p10/p10000032/s50414267", "x" * 300 + "/a.txt",
    ],
)  # fmt: skip
def test_other_paths_are_refused(path: str, folder: Path) -> None:
    files = TextFiles(folder)
    with pytest.raises(UnusableRecord) as error:
        files.resolve(path, folder)
    assert "secret" not in str(error.value).lower()
    assert files.count == 0


@pytest.mark.parametrize(
    "text",
    [
        "Clear lungs.", "AP/PA/lateral", "nodule/mass", "w/o", "Compare with old.txt. See note.pdf",
        "No change. See a.txt", "Clear, no effusion", "5/6/7", "1.5", "T12/L1/L2", "See\nreports/a.txt", "3.5 cm",
        "C5/6.", "Normal.", "12/03/2010", "Findings: see a.txt",
    ],
)  # fmt: skip
def test_sentences_stay(text: str, folder: Path) -> None:
    files = TextFiles(folder)
    assert files.resolve(text, folder) == text
    assert files.count == 0
