"""Reads the lines of a text file, none longer than a table can need, so that one of a gigabyte takes no memory.

for line in lines_of(file):
    if isinstance(line, LongLine):      # empty: it stands for what was skipped
        ...
"""

from collections.abc import Iterator
from typing import TextIO

MAX_LINE = 1 << 24  # characters


class LongLine(str):
    """An empty line in the place of one that is too long."""


def lines_of(file: TextIO) -> Iterator[str]:
    """Yield the lines with their ends; a LongLine for each that has more than MAX_LINE characters."""
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(("\n", "\r")):
            yield line
            continue
        while (rest := file.readline(MAX_LINE)) and not rest.endswith(("\n", "\r")):
            pass
        yield LongLine("\n")
