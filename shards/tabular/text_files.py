"""Reads the texts of a table whose column holds paths of text files, relative to the table.

files = TextFiles(folder)
files.resolve("reports/a.txt", folder)       # the text of that file
files.resolve("Clear lungs.", folder)        # "Clear lungs."

Files outside of the folder are never read, and a path that is not read is the fault of its record.
"""

import re
from pathlib import Path

from radhpc.core.errors import UserError
from radhpc.core.files import IrregularFile
from shards import raw_files
from shards.tabular import cells, dialect
from shards.tabular.faults import UnusableRecord

TEXT = r"txt|text|rpt"
OTHER = r"docx?|rtf|odt|pdf|xml|html?|json|md|png|jpe?g|dcm|dicom|tiff?|gif|bmp|webp|nii(?:\.gz)?|zip|gz"
NAMED = re.compile(rf"[^\n\r]{{1,1000}}\.(?:(?P<text>{TEXT})|{OTHER})", re.IGNORECASE)
# Without the ending of a file's name: from a root, of a URL, or of several folders, one of which has a long number.
PLAIN = re.compile(
    r"(?:~?/|\.{1,2}[/\\]|\\\\|[A-Za-z]:[/\\]|[a-z][a-z0-9]{1,9}://)\S{1,1000}|(?=\S*\d{3})(?=\S*[A-Za-z])\S+(?:[/\\]\S+){2,20}"
)
SENTENCE = re.compile(r"[.:;,]\s")
MAX_BYTES = 1 << 20
REFUSED = "a path in the place of the text"


class TextFiles:
    """Replaces paths by the texts of their files; `count` says how many."""

    def __init__(self, root: Path, encoding: str | None = None) -> None:
        """`root`: the folder that all files must lie in; `encoding`: theirs, where the user names it."""
        self._root, self._encoding = root.resolve(), encoding
        self.count = 0

    def resolve(self, text: str, folder: Path) -> str:
        """Return a text, or that of the file which it names. Raises UnusableRecord for a path that is not read."""
        named = NAMED.fullmatch(text)
        if named is None and PLAIN.fullmatch(text) is None:
            return text
        name = text if "/" in text else text.replace("\\", "/")
        path = folder / name
        if re.search(r"\s", text) and ("/" not in name or SENTENCE.search(text)) and not _is_file(path):
            return text  # a sentence that ends in the name of a file
        if named is not None and named["text"] is None:
            raise UnusableRecord(REFUSED)
        if named is None and not _is_file(path):
            raise UnusableRecord(REFUSED)
        content = cells.text(self._read(path))
        self.count += 1
        return content

    def _read(self, path: Path) -> str:
        try:
            with raw_files.inside(raw_files.Archive((self._root,), raw_files.current().outside)):
                data = raw_files.read(path, MAX_BYTES)
        except (IrregularFile, raw_files.LargeFile):
            raise UnusableRecord("text file that is no plain file of at most a mebibyte") from None
        except OSError as error:
            outside = error.strerror == raw_files.OUTSIDE
            place = "outside of the table's folder" if outside else "that cannot be read"
            raise UnusableRecord(f"text file {place}") from None
        try:
            return data.decode(self._encoding or dialect.encoding_of([data], path))
        except (UserError, UnicodeError):
            raise UnusableRecord("text file of unknown encoding") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
