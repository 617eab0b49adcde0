"""Says what the cells of somebody's table mean: those that say nothing, and lists as pandas writes them.

text("N/A"), text(7.0)                  # "", "7"
strings("['edema', 'nodule']")          # ["edema", "nodule"]
"""

import ast
import json
import math
import re
from typing import Any

from shards.tabular.faults import UnusableRecord

# Programs write these for a value that is not there; compared without case. Those that begin with # are of Excel.
MISSING = frozenset(
    ("nan", "-nan", "null", "(null)", "<na>", "nat", "#n/a", "#na", "#null!", "#ref!", "#value!", "#name?", "#num!",
     "#div/0!", "1.#qnan", "-1.#ind")
)  # fmt: skip
# These, too; but people also say them: as an answer to a question, or of comparisons.
EMPTY = MISSING | {"none", "na", "n/a", "n.a.", "-", "--", "---", "–", "—"}
LONGEST_WORD = max(map(len, EMPTY))
# ['a' 'b'], as numpy writes a list; Python would take it for one text, 'ab'.
SPACED = re.compile(r"""\[\s*(?:'[^']*'|"[^"]*")(?:\s+(?:'[^']*'|"[^"]*"))*\s*\]""")
BARE_NAN = re.compile(r"(?<=[\[{,:(\s])nan(?=\s*[,\]})])")
MAX_LITERAL = 1 << 20  # characters of a list in a cell


def is_missing(value: Any) -> bool:
    """Return whether a program wrote that a cell has no value: it is empty, NaN, or a word such as NULL."""
    return _says_nothing(value, MISSING)


def is_empty(value: Any) -> bool:
    """Return whether a cell says that nothing is known: it is missing, or a word such as None, NA or a dash."""
    return _says_nothing(value, EMPTY)


def _says_nothing(value: Any, words: frozenset[str]) -> bool:
    if isinstance(value, str):
        stripped = value.strip()
        return not stripped or (len(stripped) <= LONGEST_WORD and stripped.casefold() in words)
    return value is None or (isinstance(value, float) and math.isnan(value))


def known(value: str) -> str:
    """Return a cell of a CSV without the spaces around it; empty where it says nothing."""
    stripped = value.strip()  # not by is_empty: there are many cells
    return "" if len(stripped) <= LONGEST_WORD and stripped.casefold() in EMPTY else stripped


def text(value: Any) -> str:
    """Return a cell as text; some exporters write integers with a point, so 7.0 becomes 7. Raises UnusableRecord."""
    return "" if is_empty(value) else spelled(value)


def spelled(value: Any) -> str:
    """Return a cell as text, whatever it says. Raises UnusableRecord."""
    if isinstance(value, str):
        result = value.strip()
    else:
        try:
            result = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
        except ValueError:  # thousands of digits
            raise UnusableRecord("a number of too many digits") from None
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
    if not stripped.startswith(("[", "{", "('", '("', "array(")):
        return value
    if stripped.startswith("array(") and (
        inner := re.match(r"array\((\[.*\])(?:,\s*dtype=\S+)?\)", stripped, re.DOTALL)
    ):
        stripped = inner[1]
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        pass
    if SPACED.fullmatch(stripped):
        return [first or second for first, second in re.findall(r"""'([^']*)'|"([^"]*)\"""", stripped)]
    try:
        result = ast.literal_eval(BARE_NAN.sub("None", stripped))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value  # a file may be called so
    return list(result) if isinstance(result, (tuple, set, frozenset)) else result
