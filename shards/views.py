"""Images of somebody's own, made into what `build` makes of them, so that no view looks different to a trained model.

    studies(Path("cases/"))                       # {"a.png": [cases/a.png], "b": [cases/b/1.dcm, cases/b/2.dcm]}
    pictures, modalities = read_study("b", paths, Target(longest_side=1120))

And the file that `generate --out` appends answers to: one JSON line for each study, so that a run that was cut goes on.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.files import append_line, read_lines
from radhpc.core.image_decoding import decode as decode_member
from shards.images.decoding import decode, load
from shards.images.encoding import ImageSettings, encode
from shards.images.raw_image import BadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom", "")  # DICOM files often have none


class LoadedView(NamedTuple):
    """A picture of 8 bits, and the modality that a DICOM tells."""

    picture: Image.Image
    modality: str | None


def load_view(source: Path | bytes, target: ImageSettings, name: str = "image") -> LoadedView:
    """Read a JPEG, PNG or DICOM file, or its bytes. Raises BadImage."""
    raw = load(source) if isinstance(source, Path) else decode(source, name)
    encoded = encode(raw, target)
    return LoadedView(decode_member(encoded.data, encoded.view), raw.modality)


def load_study(name: str, paths: Sequence[Path], target: ImageSettings) -> tuple[list[Image.Image], list[str | None]]:
    """The views of a study and their modalities. Raises UserError with the file and what is wrong with it."""
    try:
        found = [load_view(path, target) for path in paths]
    except BadImage as error:
        raise UserError(str(error)) from error
    return [view.picture for view in found], [view.modality for view in found]


def load_view_bytes(data: bytes, name: str, target: ImageSettings) -> LoadedView:
    """The bytes of a file somebody has sent. Raises UserError with its name and what is wrong with it."""
    try:
        return load_view(data, target, name)
    except BadImage as error:
        raise UserError(str(error)) from error


def find_studies(folder: Path) -> dict[str, list[Path]]:
    """The images of a folder by study: each file is one, and each subfolder, with its views in the order of names.

    Raises UserError where there is none.
    """
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")

    def images(place: Path) -> list[Path]:
        files = [path for path in place.iterdir() if path.is_file() and not path.name.startswith(".")]
        return sorted(path for path in files if path.suffix.lower() in SUFFIXES)

    found = {path.name: [path] for path in images(folder)}
    for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if views := images(inside):
            found[inside.name] = views
    if not found:
        raise UserError(f"--folder {folder}: no image there; allowed are {', '.join(filter(None, SUFFIXES))}")
    return dict(sorted(found.items()))


def read_answers(out: Path, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The answers that a file has already, of the wanted studies. Raises UserError where it is another kind of file."""
    try:
        return {line["name"]: line for line in read_lines(out) if line["name"] in wanted}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out {out}: no file of answers; name a new one") from error


def append_answers(out: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    """Append, a line for each; they are on the disk when this returns. For the user's eyes alone."""
    descriptor = os.open(out, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a line that a kill has cut
            os.ftruncate(descriptor, out.read_bytes().rfind(b"\n") + 1)
        for answer in answers:
            append_line(descriptor, json.dumps(answer).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
