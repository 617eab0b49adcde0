"""Gives the identifiers of people and studies one form, so that nobody is two people for how a cell was written.

identifier("7.0"), identifier(" 7 ")    # "7", "7"
people = Identifiers()
people("P07"), people("p07")            # "P07", "P07": the spelling that came first
list(people.messages("patient"))        # ["1 identifiers (patient) are written in upper and in lower case, ..."]

An identifier that is written as usual (stripped, NFC, whole numbers without a point) stays as it is.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from shards.tabular import cells, external_sort
from shards.tabular.faults import UnusableRecord

WHOLE = re.compile(r"([+-]?\d+)(?:\.0+|,00?)")  # a comma where Excel's language has one; 7,000 may be seven thousand
FORMULA = re.compile(r'="(.*)"')  # keeps a spreadsheet from taking an identifier for a number
ROUNDED = re.compile(r"[+-]?\d(?:[.,]\d+)?[eE]\+\d+")  # 2.1684E+44: the digits that told people apart are gone
EXACT = 1 << 53  # a floating-point number from here on stands for several integers
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad\u200e\u200f"))


def identifier(value: Any) -> str:
    """Return an identifier in the one form in which it is compared; empty for a cell that says nothing.

    Raises UnusableRecord for a number that a spreadsheet or a program has rounded.
    """
    if isinstance(value, str) and value.isdecimal() and value.isascii():
        return value
    if isinstance(value, float) and abs(value) >= EXACT:
        raise UnusableRecord("identifier that was rounded as a number")
    result = cells.text(value)
    if not result.isascii():
        result = unicodedata.normalize("NFC", result.translate(INVISIBLE))
    if not result.isalnum():
        result = " ".join(result.split())
        if formula := FORMULA.fullmatch(result):
            result = formula[1].strip()
        if whole := WHOLE.fullmatch(result):
            result = whole[1]
        elif ROUNDED.fullmatch(result):
            raise UnusableRecord("identifier that was rounded as a number")
    return result


class Identifiers:
    """Spells identifiers in one way: as the first one was, where others differ only in their case.

    Identifiers in which a capital follows a small letter tell cases apart (aB3x is not ab3X), and stay as they are.
    The spellings lie on the disk.
    """

    def __init__(self) -> None:
        self._first = external_sort.FirstValues()
        self._numbers = external_sort.FirstValues()
        self._cased: set[str] = set()
        self._padded: set[str] = set()

    def __call__(self, value: Any, within: str = "") -> str:
        """Return the identifier of a cell, one of those `within` a patient. Raises UnusableRecord."""
        result = identifier(value)
        if result.isdecimal():
            # Leading zeros mean something in some archives, so they are kept and said.
            number = f"{within}\x1f{result.lstrip('0')}"
            if self._numbers.setdefault(number, result) != result:
                self._padded.add(number)
            return result
        if result.lower() == result.upper() or re.search(r"[a-z].*[A-Z]", result):
            return result
        folded = f"{within}\x1f{result.casefold()}"
        first = self._first.setdefault(folded, result)
        if first != result:
            self._cased.add(folded)
        return first

    def messages(self, role: str) -> Iterator[str]:
        """Yield what is to be said of identifiers of this role, `patient` or `study`, once all are read."""
        if self._cased:
            yield f"{len(self._cased)} identifiers ({role}) are written in upper and in lower case, and taken as one"
        if self._padded:
            yield (
                f"{len(self._padded)} identifiers ({role}) are written with and without leading zeros, such as 7 and "
                "007, and taken as different ones; write them in one way if they are the same"
            )
