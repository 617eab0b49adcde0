"""Says what the cells of somebody's table mean: empty ones, lists as pandas writes them, identifiers in one form.

text("N/A"), text(7.0)                  # "", "7"
strings("['edema', 'nodule']")          # ["edema", "nodule"]
identifier("7.0"), identifier(" 7 ")    # "7", "7"
"""

import ast
import json
import math
import re
import unicodedata
from typing import Any

from shards.datasets.reader import UnusableRecord

EMPTY = frozenset(("nan", "NaN", "NAN", "None", "NONE", "NA", "N/A", "n/a", "NULL", "Null", "null", "<NA>", "NaT"))
WHOLE = re.compile(r"([+-]?\d+)\.0+")
# ['a' 'b'], as numpy writes a list; Python would take it for one text, 'ab'.
SPACED = re.compile(r"""\[\s*(?:'[^']*'|"[^"]*")(?:\s+(?:'[^']*'|"[^"]*"))*\s*\]""")
MAX_LITERAL = 1 << 20  # characters of a list in a cell
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad"))


def is_empty(value: Any) -> bool:
    """Return whether a cell says that nothing is known: empty, NaN, or a word that stands for it."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and (not value.strip() or value.strip() in EMPTY))


def text(value: Any) -> str:
    """Return a cell as text; some exporters write integers with a point, so 7.0 becomes 7. Raises UnusableRecord."""
    if is_empty(value):
        return ""
    result = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    try:
        result.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise UnusableRecord("text that is no Unicode") from None
    if "\0" in result:
        raise UnusableRecord("zero byte in a cell")
    return result


def strings(value: Any) -> list[str]:
    """Return a list of texts from one text or several, which a CSV holds as JSON, or as Python or numpy print them."""
    values = structure(value)
    values = values if isinstance(values, list) else [] if is_empty(values) else [values]
    if any(isinstance(item, (dict, list)) for item in values):
        raise UnusableRecord("image or view that is no text")
    return [text(item) for item in values]


def structure(value: Any) -> Any:
    """Return the list or the dictionary that a text spells, or the value itself."""
    if not isinstance(value, str) or len(value) > MAX_LITERAL:
        return value
    stripped = value.strip()
    if not stripped.startswith(("[", "{", "('", '("')):
        return value
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        pass
    if SPACED.fullmatch(stripped):
        return [first or second for first, second in re.findall(r"""'([^']*)'|"([^"]*)\"""", stripped)]
    try:
        result = ast.literal_eval(re.sub(r"(?<=[\[{,:\s])nan(?=\s*[,\]}])", "None", stripped))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value  # a file may be called so
    return list(result) if isinstance(result, (tuple, set)) else result


def identifier(value: Any) -> str:
    """Return an identifier in the one form in which it is compared."""
    result = unicodedata.normalize("NFC", text(value).translate(INVISIBLE)).strip()
    return whole[1] if (whole := WHOLE.fullmatch(result)) else result


class Identifiers:
    """Spells the identifiers of people in one way: as the first one was, where others differ only in their case.

    Identifiers in which a capital follows a small letter tell cases apart (aB3x is not ab3X), and stay as they are.
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def __call__(self, value: Any) -> str:
        """Return the identifier of a cell."""
        result = identifier(value)
        if result.lower() == result.upper() or re.search(r"[a-z].*[A-Z]", result):
            return result
        return self._first.setdefault(result.casefold(), result)
