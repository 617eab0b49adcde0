"""Reads the texts of a table whose column holds paths of text files, relative to the table.

files = TextFiles(folder)
files.resolve("reports/a.txt", folder)       # the text of that file
files.resolve("Clear lungs.", folder)        # "Clear lungs."
"""

import re
import stat
from pathlib import Path

from shards.datasets.reader import UnusableRecord
from shards.tabular import cells

TEXT = r"txt|text|rpt"
OTHER = r"docx?|rtf|odt|pdf|xml|html?|json|md|png|jpe?g|dcm|dicom|tiff?|gif|bmp|webp|nii(?:\.gz)?|zip|gz"
PATH = re.compile(rf"[^\n\r]{{1,1000}}\.(?:(?P<text>{TEXT})|{OTHER})", re.IGNORECASE)
MAX_BYTES = 1 << 20


class TextFiles:
    """Replaces paths by the texts of their files; `count` says how many."""

    def __init__(self, root: Path) -> None:
        """`root`: the folder that all files must lie in."""
        self._root = root.resolve()
        self.count = 0

    def resolve(self, text: str, folder: Path) -> str:
        """Return a text, or that of the file which it names. Raises UnusableRecord for a path that is not read."""
        match = PATH.fullmatch(text)
        if match is None:
            return text
        name = text if "/" in text else text.replace("\\", "/")
        path = folder / name
        if re.search(r"\s", text) and not ("/" in name and not re.search(r"[.:;]\s", text)) and not _is_file(path):
            return text  # a sentence that ends in the name of a file
        if match["text"] is None:
            raise UnusableRecord("a path in the place of the text")
        try:
            real = path.resolve(strict=True)
            facts = real.stat()
            outside, plain = not real.is_relative_to(self._root), stat.S_ISREG(facts.st_mode)
            data = real.read_bytes() if plain and not outside and facts.st_size <= MAX_BYTES else None
        except (OSError, ValueError, RuntimeError):
            raise UnusableRecord("text file that cannot be read") from None
        if outside:
            raise UnusableRecord("text file outside of the table's folder")
        if data is None:
            raise UnusableRecord("text file that is no plain file of at most a mebibyte")
        self.count += 1
        return cells.text(_decoded(data))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _decoded(data: bytes) -> str:
    encodings = ("utf-16",) if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise UnusableRecord("text file of unknown encoding")
