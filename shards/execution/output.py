"""The output of a build: its folder or URL, the lock on it, and the private work folder of a build under way.

The shards go to a folder or an object store; beside them, while a build is under way, there is a private work folder
with its lock, its recipe, the listing of its studies, and a record of each finished shard. For a folder that is
`<out>/.build`, for a URL one in ~/.cache/radhpc/builds (XDG_CACHE_HOME) or in the folder that --work names; all nodes
of a SLURM job must see it. It is removed when the build ends.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError, first_line
from radhpc.core.manifest import FINGERPRINTS, INDEX, MANIFEST, Manifest
from radhpc.core.sample import SPLITS
from radhpc.storage.store import Store, write_atomically
from shards.raw_state import describe_change
from shards.reports.card import CARD
from shards.reports.contact_sheet import SHEET, SUSPECTS_SHEET

WORK = ".build"
RECIPE = "recipe.json"
LOCK = "lock"
_SHARD = re.compile(rf"(?:{'|'.join(SPLITS)})-\d{{6,}}\.tar")
ATTRIBUTION = "attribution.jsonl"  # the authors that the samples' licences ask to name
SIDE_FILES = (INDEX, FINGERPRINTS, CARD, SHEET, SUSPECTS_SHEET, ATTRIBUTION)  # files beside the shards and the manifest
_TEMPORARY = re.compile(rf"\.(?:{_SHARD.pattern}|{'|'.join(map(re.escape, (MANIFEST, *SIDE_FILES)))})\..+")


class BuildOutput:
    """The destination of one build."""

    def __init__(self, out: str, work: Path | None = None) -> None:
        """Raises UserError for what is neither a folder nor a URL."""
        if "://" not in out:
            if Path(out).exists() and not Path(out).is_dir():
                raise UserError(f"--out {out}: a file is in the way; allowed are a folder and a URL such as s3://...")
            out = str(Path(out).resolve())
        self.store = Store(out)
        if self.store.subset is not None:
            raise UserError(f"--out {out}: '#{self.store.subset}' would name a subset; allowed is a URL without it")
        self.url, self.folder = self.store.url, self.store.folder
        self.work = _work_folder(self.store, work).resolve()
        self.changed_files: str | None = None  # how the images differ from those that an unfinished build began with

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the output, so that two builds do not mix.

        Raises UserError where another build is under way, and for a folder of something else. Folders made for a build
        that did not begin are removed again.
        """
        names = self.store.names()
        tars = [name for name in names if name.endswith(".tar")]
        if tars and MANIFEST not in names and not (self.work / RECIPE).exists():
            raise UserError(f"{self.url}: holds {tars[0]} of something else; use another folder")
        made = self.folder is not None and not self.folder.exists()
        with self._explain_refusals():
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o750)
            self.work.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.work / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._lock(lock)
                try:
                    yield
                finally:
                    if not (self.work / RECIPE).exists():
                        shutil.rmtree(self.work, ignore_errors=True)
                        with contextlib.suppress(OSError):
                            if made and self.folder is not None:
                                self.folder.rmdir()
            finally:
                os.close(lock)

    def find_finished(self, recipe: dict[str, Any], build_hash: str, force: bool) -> Manifest | None:
        """Return the manifest of this same build if it is finished already; else prepare the output and return None.

        Raises UserError where another build is there, finished or not, and `force` does not replace it.
        """
        if force:
            for name in (MANIFEST, *SIDE_FILES):  # the manifest first: without it the rest is no finished dataset
                self.store.delete(name)
            self._clear_work()
        if MANIFEST in self.store.names():
            manifest = Manifest.load(self.store)
            if manifest.build_hash != build_hash:
                raise self._another("another build", manifest.build, recipe)
            manifest.check_sizes(self.store)
            self.clean(manifest)
            return manifest
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            begun = json.loads((self.work / RECIPE).read_bytes())
            if {**begun, "files": None} != {**json.loads(json.dumps(recipe)), "files": None}:
                raise self._another("another, unfinished build", begun, recipe)
            if begun.get("files") != recipe.get("files"):  # the user may have repaired images that it named
                self.changed_files = describe_change(begun.get("files"), recipe["files"])
        write_atomically(self.work / RECIPE, json.dumps(recipe).encode(), 0o600)
        return None

    def clean(self, manifest: Manifest) -> None:
        """Remove the work folder, temporary files of killed writers, and the shards of a build that was replaced."""
        own = {shard.name for shard in manifest.shards}
        for name in self.store.names():
            if _TEMPORARY.fullmatch(name) or (_SHARD.fullmatch(name) and name not in own):
                self.store.delete(name)
        shutil.rmtree(self.work, ignore_errors=True)

    def _clear_work(self) -> None:
        """Forget which shards are finished, and which images they exclude; lock, listings and job ids stay."""
        for path in self.work.iterdir():
            if path.suffix in (".json", ".npz", ".error"):
                path.unlink(missing_ok=True)

    def _lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.url}: another build is writing there; wait for it, or use another folder") from None
        except OSError:
            pass  # a file system without locks

    def _another(self, kind: str, theirs: dict[str, Any], ours: dict[str, Any]) -> UserError:
        differing = [key for key in ours if key != "files" and theirs.get(key) != ours[key]]
        changes = [f"other {', '.join(differing)}"] if differing else []
        if theirs.get("files") != ours.get("files"):
            changes.append(describe_change(theirs.get("files"), ours["files"]) if "files" in ours else "no files")
        return UserError(
            f"{self.url}: holds {kind} ({'; '.join(changes) or 'other format'}); "
            "use another folder, or --force to replace it"
        )

    @contextlib.contextmanager
    def _explain_refusals(self) -> Iterator[None]:
        """Turn errors of the file system into one line."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{self.url}: no space left; finished shards are kept: make room and run it again"
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(f"{self.url}: cannot be written ({first_line(error)})") from error
            raise


def _work_folder(store: Store, named: Path | None) -> Path:
    """Return the build's own work folder: below the one that the user names, whose other content is not removed."""
    if named is None and store.folder is not None:
        return store.folder / WORK
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (named or cache / "radhpc" / "builds") / hashlib.sha256(store.url.encode()).hexdigest()[:16]
