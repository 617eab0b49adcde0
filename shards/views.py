"""Loads the user's own images the way `build` stores them, so that no view looks different to a trained model.

    find_studies(Path("cases/"))                  # {"a.png": [cases/a.png], "b": [cases/b/1.dcm, cases/b/2.dcm]}
    pictures, modalities = load_study("b", paths, EncodingSettings(longest_side=1120))

Also reads and extends the file of `generate --out`: one JSON line for each study, so an interrupted run continues.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.files import append_line, open_append, read_lines
from radhpc.core.image_decoding import decode as decode_member
from shards.images.decoding import decode, load
from shards.images.encoding import EncodingSettings, encode
from shards.images.raw_image import BadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom", "")  # DICOM files often have none


class LoadedView(NamedTuple):
    """A picture of 8 bits, and the modality of a DICOM."""

    picture: Image.Image
    modality: str | None


def load_view(source: Path | bytes, target: EncodingSettings, name: str = "image") -> LoadedView:
    """Load a JPEG, PNG or DICOM file, or its bytes. Raises BadImage."""
    raw = load(source) if isinstance(source, Path) else decode(source, name)
    encoded = encode(raw, target, path=source if isinstance(source, Path) else name)
    return LoadedView(decode_member(encoded.data, encoded.view), raw.modality)


def load_study(
    name: str, paths: Sequence[Path], target: EncodingSettings
) -> tuple[list[Image.Image], list[str | None]]:
    """Load the views of a study and their modalities. Raises UserError with the file and its fault."""
    try:
        views = [load_view(path, target) for path in paths]
    except BadImage as error:
        raise UserError(str(error)) from error
    return [view.picture for view in views], [view.modality for view in views]


def load_view_bytes(data: bytes, name: str, target: EncodingSettings) -> LoadedView:
    """Load the bytes of an uploaded file. Raises UserError with its name and its fault."""
    try:
        return load_view(data, target, name)
    except BadImage as error:
        raise UserError(str(error)) from error


def find_studies(folder: Path) -> dict[str, list[Path]]:
    """Find the images of a folder by study: each file is a study, and each subfolder, with its views in order of names.

    Raises UserError where there is none.
    """
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")

    def images(directory: Path) -> list[Path]:
        files = [path for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")]
        return sorted(path for path in files if path.suffix.lower() in SUFFIXES)

    studies = {path.name: [path] for path in images(folder)}
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if views := images(subfolder):
            studies[subfolder.name] = views
    if not studies:
        raise UserError(f"--folder {folder}: no image there; allowed are {', '.join(filter(None, SUFFIXES))}")
    return dict(sorted(studies.items()))


def read_answers(out: Path, studies: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the answers to these studies that a file has already. Raises UserError where it is another kind of file."""
    lines = read_lines(out, lambda line: isinstance(line.get("name"), str))
    if not lines and out.exists() and b"\n" in out.read_bytes():
        raise UserError(f"--out {out}: no file of answers; name a new one")
    return {line["name"]: line for line in lines if line["name"] in studies}


def append_answers(out: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    """Append a line for each answer; they are on the disk when this returns. Only the user may read the file."""
    descriptor = open_append(out)
    try:
        for answer in answers:
            append_line(descriptor, json.dumps(answer).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
