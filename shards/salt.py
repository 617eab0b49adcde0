"""Keeps the salt of patient and study hashes: 32 random bytes that never leave this user's home.

Whoever holds the salt can tell which patient a hash belongs to, so it lies outside every output folder:
~/.config/radhpc/salt, or the file that RADHPC_SALT_FILE names (share it to give two sites equal hashes).
"""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from radhpc.core.errors import UserError

VARIABLE = "RADHPC_SALT_FILE"
LENGTH = 32  # bytes
PUBLIC = b"radhpc: drawn patients, no secret"  # for synthetic datasets: equal bytes on every machine


def load(synthetic: bool = False) -> bytes:
    """Return the salt; make it on first use. Raises UserError where it cannot be read, or is too short."""
    if synthetic:
        return PUBLIC
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else Path.home() / ".config" / "radhpc" / "salt"
    try:
        if not named and not path.exists():
            _create(path)
        salt = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: the salt of patient hashes cannot be read or made ({error.strerror}); "
            f"set {VARIABLE} to a file of at least {LENGTH} random bytes"
        ) from error
    if len(salt) < LENGTH:
        raise UserError(f"{path}: the salt has {len(salt)} bytes, at least {LENGTH} are needed")
    return salt


def _create(path: Path) -> None:
    """Write a new salt in full before it gets its name; where another process was first, its salt stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(prefix=".salt.", dir=path.parent)  # mode 600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(LENGTH))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
