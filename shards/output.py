"""The output folder of a build: whose it is, who may write to it, and what is left there.

While a build is under way, `.build/` holds its recipe, a lock, and a record of each finished shard.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radhpc.errors import UserError, first_line
from radhpc.manifest import MANIFEST, Manifest
from radhpc.sample import SPLITS
from radhpc.store import Store, write_atomically
from shards.worker import RECORDS

RECIPE = f"{RECORDS}/recipe.json"
_SHARD = re.compile(rf"(?:{'|'.join(SPLITS)})-\d{{6,}}\.tar")
_TEMPORARY = re.compile(rf"\.(?:{_SHARD.pattern}|manifest\.json|index\.npz)\..+")


def folder_of(out: str) -> Path:
    """The folder that `--out` names. Raises UserError for what is none."""
    if "://" in out:
        raise UserError(f"--out {out}: URLs are not supported yet; allowed is a folder")
    folder = Path(out).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: a file is in the way; allowed is a folder")
    return folder


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock, so that two builds do not mix. Raises UserError where one is under way."""
    foreign = folder.is_dir() and not (folder / MANIFEST).exists() and not (folder / RECORDS).exists()
    if foreign and (tars := sorted(path.name for path in folder.glob("*.tar"))):
        raise UserError(f"{folder}: holds {tars[0]} of something else; use another folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    (folder / RECORDS).mkdir(exist_ok=True, mode=0o700)
    lock = os.open(folder / RECORDS / "lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another build is writing there; wait for it, or use another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(lock)


def earlier(folder: Path, recipe: dict[str, Any], build_hash: str, force: bool) -> Manifest | None:
    """The finished build that the folder holds, where it is this very one; else None, and the folder is ready.

    Raises UserError where the folder holds another build, finished or not, and `force` does not replace it.
    """
    if force:
        (folder / MANIFEST).unlink(missing_ok=True)  # first of all: what follows is no whole dataset
        clear_records(folder)
    if (folder / MANIFEST).exists():
        manifest = Manifest.load(Store(folder))
        if manifest.build_hash != build_hash:
            clear_records(folder)
            raise _another(folder, "another build", manifest.build, recipe)
        manifest.check_sizes(Store(folder))
        clean(folder, manifest)
        return manifest
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        begun = json.loads((folder / RECIPE).read_bytes())
        if begun != recipe:
            raise _another(folder, "another, unfinished build", begun, recipe)
    write_atomically(folder / RECIPE, json.dumps(recipe).encode(), 0o600)
    return None


def clear_records(folder: Path) -> None:
    """Forget which shards are finished; the lock stays."""
    for path in (folder / RECORDS).iterdir():
        if path.name != "lock":
            path.unlink(missing_ok=True)


def clean(folder: Path, manifest: Manifest) -> None:
    """Remove the records, what killed writers left, and the shards of a build that was replaced."""
    own = {shard.name for shard in manifest.shards}
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) or (_SHARD.fullmatch(path.name) and path.name not in own):
            path.unlink(missing_ok=True)
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


@contextlib.contextmanager
def explain_refusals(folder: Path) -> Iterator[None]:
    """Turn the file system's refusals into one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: no space left; finished shards are kept: make room and run it again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{folder}: cannot be written ({first_line(error)})") from error
        raise


def _another(folder: Path, what: str, theirs: dict[str, Any], ours: dict[str, Any]) -> UserError:
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    return UserError(
        f"{folder}: holds {what} (other {', '.join(differing) or 'format'}); "
        "use another folder, or --force to replace it"
    )
