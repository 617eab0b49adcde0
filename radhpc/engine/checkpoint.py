"""Write and read checkpoints: trained parameters and their optimizer state, complete or not at all.

    checkpoints/step-000120/     or, with checkpoint.url, s3://bucket/prefix/RUN/step-000120/
        state.safetensors    name, exp_avg/name, exp_avg_sq/name: one format for every engine and world size
        cursor.json          where the run stands: stage, step, samples consumed, lineage, hashes
        manifest.json        size and sha256 of the two
        COMMITTED            the sha256 of manifest.json, written last

A checkpoint without a valid marker does not count: it is skipped, by name, and never blocks a resume or a deletion.
Random numbers need no state here: every step seeds them anew (loop.py). Imports torch only when tensors are read.
"""

import contextlib
import errno
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from radhpc.core import formats
from radhpc.core.errors import UserError
from radhpc.core.ownership.lease import Lease, Superseded
from radhpc.core.run_folder import step_of
from radhpc.storage.checkpoint_storage import Buffer, CheckpointStorage, FolderStorage, ObjectStorage
from radhpc.storage.store import PART

if TYPE_CHECKING:
    from radhpc.core.recipe import Recipe
    from radhpc.models.adapters import Tensors

_STATE, _CURSOR, _MANIFEST, _MARKER = "state.safetensors", "cursor.json", "manifest.json", "COMMITTED"
_FILES = (_MARKER, _MANIFEST, _CURSOR, _STATE)  # in the order of their deletion


class SaveCancelled(Exception):
    """A save was cancelled before its commit; nothing of it is left."""


@dataclass(frozen=True)
class Cursor:
    """The position of a run. `samples` is the whole state of the data: the position in the order of this stage."""

    stage: int  # number, from 0
    step: int  # optimizer steps of the run so far
    stage_step: int  # optimizer steps of this stage so far
    samples: int  # of this stage that were trained on
    stage_done: bool  # whether this is the stage's last step; such a checkpoint is kept for good
    lineage: tuple[str, ...]  # names of the checkpoints that ended the stages before
    recipe: str  # hash of the recipe
    base: str  # hash of the base model
    data: tuple[str, ...]  # hashes of the manifests of this stage
    world: int  # ranks that wrote it
    engine: str
    format: int = formats.CHECKPOINT
    origin: str = ""  # the run and the checkpoint that it was taken over from, if it was: lineage.py


def name_of(step: int) -> str:
    return f"step-{step:06d}"


class Checkpoints:
    """The checkpoints of one run. One process writes; any may read."""

    def __init__(self, storage: CheckpointStorage) -> None:
        self.storage = storage
        self._lease: Lease | None = None

    def take(self, lease: Lease | None) -> None:
        """Write from now on only while this lease is held; in an object store, too, which another folder may share."""
        if lease is not None:
            self.storage.take(lease.token)
            self.storage.sweep()  # a life that was killed may have left half a checkpoint
        self._lease = lease

    def _check_lease(self) -> None:
        """Raise Superseded where the checkpoints are another life's by now."""
        if self._lease is not None:
            self._lease.check()
            if not self.storage.held(self._lease.token):
                raise Superseded(f"{self.storage.where('')}: another life has taken over these checkpoints")

    @classmethod
    def of(cls, run: Path, recipe: "Recipe") -> "Checkpoints":
        """Return the checkpoints of a run folder: inside it, or under its name at checkpoint.url."""
        url = recipe.checkpoint.url
        if url is not None:
            return cls(ObjectStorage(f"{url.rstrip('/')}/{run.name}"))
        (run / "checkpoints").mkdir(mode=0o700, exist_ok=True)
        return cls(FolderStorage(run / "checkpoints"))

    def save(self, tensors: "Tensors", cursor: Cursor, cancelled: threading.Event | None = None) -> tuple[str, int]:
        """Write and commit; return the name and the bytes.

        Raises UserError, SaveCancelled soon after `cancelled` is set, or Superseded where the run is another life's. In
        all cases, as after a kill, the checkpoint does not count.
        """
        name, storage = name_of(cursor.step), self.storage
        files: dict[str, dict[str, str | int]] = {}

        def put(file: str, pieces: Iterable[Buffer]) -> None:
            digest, size = hashlib.sha256(), 0

            def seen() -> Iterator[Buffer]:
                nonlocal size
                for piece in pieces:
                    if cancelled is not None and cancelled.is_set():
                        raise SaveCancelled(name)
                    digest.update(piece)
                    size += len(piece)
                    yield piece

            storage.put(name, file, seen())
            files[file] = {"size": size, "sha256": digest.hexdigest()}

        try:
            self._check_lease()
            storage.begin(name, _FILES)
            put(_STATE, _serialised(tensors, {"step": str(cursor.stage_step)}))
            put(_CURSOR, [json.dumps(asdict(cursor), indent=1).encode()])
            manifest = json.dumps(files, indent=1).encode()
            put(_MANIFEST, [manifest])
            self._check_lease()
            storage.commit(name, _MARKER, hashlib.sha256(manifest).hexdigest().encode())
        except Superseded:
            storage.discard(name, ())
            raise
        except BaseException as error:
            with contextlib.suppress(OSError, UserError):
                storage.discard(name, _FILES)
            if isinstance(error, OSError):
                problem = f"{storage.where(name)}: the checkpoint could not be written: {error.strerror or error}"
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    problem += "; free some space, then 'radhpc resume'"
                raise UserError(problem) from error
            raise
        return name, sum(int(entry["size"]) for entry in files.values())

    def names(self) -> list[str]:
        """Return the names of all of them, torn ones too, newest first."""
        return sorted(self.storage.names(), key=step_of, reverse=True)

    def committed(self) -> list[str]:
        """Return the names of those with a marker, newest first; the marker is not verified."""
        return [name for name in self.names() if self.storage.has(name, _MARKER)]

    def newest(self) -> tuple[str | None, list[tuple[str, str]]]:
        """Return the newest one that verifies, and (name, fault) of each newer one that was skipped."""
        skipped: list[tuple[str, str]] = []
        for name in self.names():
            fault = self.verify(name)
            if fault is None:
                return name, skipped
            skipped.append((name, fault))
        return None, skipped

    def prune(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` committed ones, and torn ones behind the newest; the last one of each
        stage stays. Returns the names. Raises Superseded where the run is another life's.
        """
        self._check_lease()
        committed = self.committed()
        newest = step_of(committed[0]) if committed else -1
        torn = [name for name in self.names() if name not in committed and step_of(name) < newest]
        old = [name for name in committed[keep:] if not self._ends_a_stage(name)]
        for name in old + torn:
            self.storage.remove(name, _FILES)
        self.storage.sweep()
        return old

    def _ends_a_stage(self, name: str) -> bool:
        """Return whether a checkpoint ends a stage; True also without a readable cursor, as it may be the only one."""
        try:
            return self.cursor(name).stage_done
        except (OSError, ValueError, TypeError, KeyError, UserError):
            return True

    def identity(self, name: str) -> str:
        """Return the identity of a committed checkpoint: the hash of its manifest."""
        return self._read(name, _MARKER).decode(errors="replace")

    def verify(self, name: str) -> str | None:
        """Return what is wrong with a checkpoint, or None: check the marker, then size and sha256 of every file."""
        try:
            marker = self._read(name, _MARKER).decode(errors="replace")
        except FileNotFoundError:
            return "not committed"
        file = _MANIFEST
        try:
            manifest = self._read(name, file)
            if marker != hashlib.sha256(manifest).hexdigest():
                return "manifest.json differs from the commit marker"
            for file, expected in json.loads(manifest).items():
                size, digest = 0, hashlib.sha256()
                for piece in self.storage.pieces(name, file):
                    size += len(piece)
                    digest.update(piece)
                if size != expected["size"]:
                    return f"{file} has {size} of {expected['size']} bytes"
                if digest.hexdigest() != expected["sha256"]:
                    return f"{file}: checksum differs"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror or error}"
        return None

    def cursor(self, name: str) -> Cursor:
        data = json.loads(self._read(name, _CURSOR))
        if data.get("format") != formats.CHECKPOINT:
            where = self.storage.where(name)
            raise UserError(f"{where}: format {data.get('format')}, this version reads {formats.CHECKPOINT}")
        return Cursor(**{**data, "lineage": tuple(data["lineage"]), "data": tuple(data["data"])})

    def tensors(self, name: str, moments: bool) -> "Tensors":
        """Return the parameters of a checkpoint, with the optimizer's state or without."""
        from safetensors.torch import load, load_file

        from radhpc.engine.state_layout import without_optimizer_state

        if isinstance(self.storage, FolderStorage):
            tensors: Tensors = load_file(self.storage.path / name / _STATE)
        else:
            tensors = load(self._read(name, _STATE))
        return tensors if moments else without_optimizer_state(tensors)

    def _read(self, name: str, file: str) -> bytes:
        return b"".join(self.storage.pieces(name, file))


def read_cursor(path: Path) -> Cursor:
    """Return the cursor of one checkpoint in a folder."""
    return Checkpoints(FolderStorage(path.parent)).cursor(path.name)


_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _serialised(tensors: "Tensors", metadata: dict[str, str]) -> Iterator[Buffer]:
    """Yield the safetensors format (8 bytes of the header's length, the header, the tensors), without a second copy of
    the tensors: the library's own writer makes either a file or one string of bytes, and this goes to a store and
    into a checksum.
    """
    import torch

    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            data = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
            yield from (data[start : start + PART] for start in range(0, len(data), PART))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
