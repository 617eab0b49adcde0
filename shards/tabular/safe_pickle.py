"""Reads a pickle of plain data without ever running code in it.

    records = load(Path("train_qa.pkl"))        # [{"image": "train_0000", "question": ..., "answer": ...}, ...]

A pickle is a program: whoever wrote it decides what is imported and called when it is loaded. So its instructions
are checked before any is executed, and only those that build None, booleans, numbers, texts, bytes, lists and
dictionaries are allowed. The checked and the executed bytes are the same ones in memory. Tuples and sets are refused,
too: nested tuples as dictionary keys can be written so that their hash takes forever.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from radhpc.core.errors import UserError, first_line
from shards import raw_files

MAX_BYTES = 1 << 26  # an instruction of one byte may make an object of sixty-four: at worst four gibibytes

_BUILDERS = """
    PROTO FRAME MARK STOP POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
"""
PLAIN = frozenset(_BUILDERS.split())  # instructions that build plain data, and call nothing
PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))


def load(path: Path) -> Any:
    """Return the plain data of a pickle. Raises UserError that names the file and what it may not hold."""
    try:
        data = raw_files.read(path, MAX_BYTES)
    except raw_files.LargeFile as error:
        raise UserError(f"{path}: {error.size} bytes; pickles of at most {MAX_BYTES} bytes are allowed") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error
    try:
        _check(path, data)
        return _Plain(io.BytesIO(data), encoding="utf-8").load()
    except UserError:
        raise
    except Exception as error:  # the unpickler raises whatever broken bytes lead it to: KeyError, EOFError, ...
        raise UserError(f"{path}: broken pickle ({first_line(error)})") from error


def _check(path: Path, data: bytes) -> None:
    """Raise UserError at the first instruction that does more than build plain data."""
    for opcode, argument, place in pickletools.genops(data):
        if opcode.name not in PLAIN:
            instruction = f"{opcode.name} {argument}" if isinstance(argument, str) else opcode.name
            raise UserError(
                f"{path}: byte {place}: a pickle of more than plain data ({instruction[:80]!r}); allowed are lists, "
                "dictionaries, texts and numbers; nothing of it was run"
            )
        if opcode.name in PUTS and argument is not None and not 0 <= argument <= len(data):
            # The unpickler makes room for all numbers below: one instruction would fill the memory.
            raise UserError(f"{path}: byte {place}: broken pickle (memo {argument} in a file of {len(data)} bytes)")


class _Plain(pickle.Unpickler):
    """A second safeguard: no name is ever looked up."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")

    def persistent_load(self, identifier: Any) -> NoReturn:
        raise pickle.UnpicklingError("a reference to outside is no plain data")
