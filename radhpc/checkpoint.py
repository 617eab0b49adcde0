"""Checkpoints: trained parameters and their optimizer state, whole or not at all.

    checkpoints/step-000120/
        state.safetensors    name, exp_avg/name, exp_avg_sq/name: one format for every engine and world size
        cursor.json          where the run stands: stage, step, samples consumed, lineage, hashes
        manifest.json        size and sha256 of the two
        COMMITTED            the sha256 of manifest.json, written last, after every rank has agreed

A folder without a true marker does not count: it is skipped, by name, and never blocks a resume or a deletion.
Random numbers need no state here: every step seeds them anew (loop.py).
"""

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from radhpc.adapters import Tensors
from radhpc.dist import Ranks
from radhpc.errors import UserError
from radhpc.files import sync, write_atomically

FORMAT = 1
_MARKER = "COMMITTED"


@dataclass(frozen=True)
class Cursor:
    """Where a run stands. `samples` is the whole state of the data: position in the order of this stage."""

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
    format: int = FORMAT


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, tensors: Tensors, cursor: Cursor, ranks: Ranks) -> Path:
        """Write and commit; all ranks call it, rank 0 has the tensors. Raises UserError on all ranks alike."""
        path = self.folder / f"step-{cursor.step:06d}"
        problem = None
        if ranks.first:
            try:
                self._write(path, tensors, cursor)
            except OSError as error:
                problem = f"{path}: the checkpoint could not be written: {error.strerror or error}"
                if error.errno == errno.ENOSPC:
                    problem += "; free some space, then 'launch.py resume'"
        problem = ranks.broadcast(problem)
        if problem is not None:
            raise UserError(problem)
        return path

    def _write(self, path: Path, tensors: Tensors, cursor: Cursor) -> None:
        temporary = path.with_name(f".{path.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        remove(path)  # a torn one of an earlier life
        try:
            temporary.mkdir(mode=0o700)
            _save_tensors(tensors, temporary / "state.safetensors", cursor.stage_step)
            sync(temporary / "state.safetensors")
            write_atomically(temporary / "cursor.json", json.dumps(asdict(cursor), indent=1).encode())
            files = {
                name: {"size": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
                for name in ("state.safetensors", "cursor.json")
            }
            write_atomically(temporary / "manifest.json", json.dumps(files, indent=1).encode())
            sync(temporary)
            temporary.rename(path)
            sync(self.folder)
            write_atomically(path / _MARKER, sha256(path / "manifest.json").encode())
            sync(path)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            remove(path)
            raise

    def steps(self) -> list[Path]:
        """All checkpoint folders, torn ones too, newest first."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def newest(self) -> tuple[Path | None, list[tuple[str, str]]]:
        """The newest one that verifies, and (name, fault) of each newer one that was skipped."""
        skipped = []
        for path in self.steps():
            fault = verify(path)
            if fault is None:
                return path, skipped
            skipped.append((path.name, fault))
        return None, skipped

    def prune(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` committed ones, and torn ones behind the newest; the last one of each
        stage stays. Returns the names.
        """
        committed = [path for path in self.steps() if (path / _MARKER).exists()]
        torn = [path for path in self.steps() if path not in committed and committed and path.name < committed[0].name]
        old = [path for path in committed[keep:] if not read_cursor(path).stage_done]
        for path in old + torn:
            remove(path)
        return [path.name for path in old]


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: the marker, then size and sha256 of every file."""
    try:
        marker = (path / _MARKER).read_text()
        if marker != sha256(path / "manifest.json"):
            return "manifest.json differs from the commit marker"
        for name, wanted in json.loads((path / "manifest.json").read_bytes()).items():
            if (path / name).stat().st_size != wanted["size"]:
                return f"{name} has {(path / name).stat().st_size} of {wanted['size']} bytes"
            if sha256(path / name) != wanted["sha256"]:
                return f"{name}: checksum differs"
    except FileNotFoundError as error:
        name = Path(error.filename).name
        return "not committed" if name == _MARKER else f"{name} is missing"
    return None


def read_cursor(path: Path) -> Cursor:
    data = json.loads((path / "cursor.json").read_bytes())
    if data.get("format") != FORMAT:
        raise UserError(f"{path}: format {data.get('format')}, this version reads {FORMAT}")
    return Cursor(**{**data, "lineage": tuple(data["lineage"]), "data": tuple(data["data"])})


def read_tensors(path: Path, moments: bool) -> Tensors:
    """The parameters of a checkpoint, with Adam's moments or without."""
    tensors: Tensors = load_file(path / "state.safetensors")
    return tensors if moments else {name: tensor for name, tensor in tensors.items() if "/" not in name}


def remove(path: Path) -> None:
    """Delete a checkpoint, the marker first: a deletion that is cut short leaves a torn one, never a false one."""
    (path / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _save_tensors(tensors: Tensors, path: Path, step: int) -> None:
    """safetensors reports the system's errors as its own kind, with the number in the text."""
    try:
        save_file(tensors, path, {"step": str(step)})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
