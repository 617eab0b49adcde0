"""Parse bytes that another account may have written: JSON, .npy and .npz, each checked before memory is spent on it.

    value = parse_json(data)                          # no key twice, no NaN, no number or nesting without end
    columns = load_columns(data, ("key", "offset"))   # {"key": array, "offset": array}, no larger than `data`

Enters: bytes whose number the caller has limited. Leaves: plain data, or a ValueError of one line.
"""

import io
import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

DIGITS = 25  # of a whole number at most: 64 bits have twenty
SHOWN = 120  # characters of somebody else's text in a message
_STARTS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def printable(text: str, length: int = SHOWN) -> str:
    """Return the start of a text of somebody else in one line, without what a terminal would obey."""
    cut = text if len(text) <= length else f"{text[:length]}..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in cut)


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError.

    Python's parser accepts more than RFC 8259 does, and would keep the last one of two values of the same key, which
    other programs may read otherwise.
    """
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{printable(repeated)}: there twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; allowed are {DIGITS}")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{printable(text)}: out of range")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def load_columns(data: bytes, names: Iterable[str], optional: Iterable[str] = ()) -> dict[str, npt.NDArray[Any]]:
    """Load the arrays of an .npz of exactly these names, as np.savez writes them. Raises ValueError.

    Those of the `optional` names may be missing. The columns are not compressed there, so that what is loaded is no
    larger than what was read.
    """
    names, optional = tuple(names), tuple(optional)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            files = [entry.filename for entry in entries]
            names += tuple(name for name in optional if f"{name}.npy" in files)
            if sorted(files) != sorted(f"{name}.npy" for name in names):
                raise ValueError(f"other columns than {', '.join(names)}")
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise ValueError(f"{entry.filename}: compressed or encrypted; allowed are columns as they are")
            return {name: load_array(archive.read(f"{name}.npy"), name) for name in names}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"broken columns ({printable(str(error))})") from error


def load_array(data: bytes, name: str = "array") -> npt.NDArray[Any]:
    """Load an .npy that holds exactly the numbers or bytes that its header announces. Raises ValueError.

    The array is a view of `data`, which nobody can write to.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = _STARTS[version](file)
    except Exception as error:  # numpy's parser raises whatever a broken header leads it to
        raise ValueError(f"{name}: no array ({printable(str(error).splitlines()[0] if str(error) else '')})") from error
    if dtype.kind not in "biufS" or not dtype.itemsize:
        raise ValueError(f"{name}: an array of {printable(str(dtype))}; allowed are numbers and bytes")
    length = len(data) - file.tell()
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != length:
        raise ValueError(f"{name}: {length} bytes, but its header says {printable(str(shape))} of {dtype}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
