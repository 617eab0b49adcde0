"""Hostile archives, one of every reader: a broken or forged file costs its study or ends in one line, never more.

Each file of a small archive is replaced by each thing that is no honest file; then everything is listed and loaded.
"""

import gzip
import itertools
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radhpc.core.errors import UserError
from shards import raw_files
from shards.datasets import reader as datasets, registry
from shards.images.decoding import load
from shards.images.raw_image import BadImage, RawImage
from tests.conftest import ROOT
from tests.shards import helpers
from tests.shards.datasets import (
    test_chestxray14,
    test_chexpert,
    test_mimic_cxr,
    test_openi,
    test_padchest,
    test_pathvqa,
    test_roco_v2,
    test_slake,
    test_vqa_rad,
)

pytestmark = pytest.mark.timeout(60)

SHAPE = (77, 55)  # of the image that nobody may see


def padchest(folder: Path) -> Path:
    rows = test_padchest.ROWS[:6]
    for seed, row in enumerate(rows):
        test_padchest.draw(folder / row["ImageDir"] / row["ImageID"], seed)
    return test_padchest.write(folder, rows, packed=True)


def chexpert_plus(folder: Path) -> Path:
    raw = test_chexpert.plus_archive(folder)
    test_chexpert.write_labels(raw)
    return raw


ARCHIVES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "image_text": ("image_text", lambda folder: helpers.notes(folder, 4)),
    "chestxray14": ("chestxray14", test_chestxray14.archive),
    "chexpert": ("chexpert", test_chexpert.archive),
    "chexpert_plus": ("chexpert_plus", chexpert_plus),
    "mimic_cxr": ("mimic_cxr", lambda folder: test_mimic_cxr.write_tree(folder, "mimic_cxr")),
    "mimic_cxr_jpg": ("mimic_cxr_jpg", lambda folder: test_mimic_cxr.write_tree(folder, "mimic_cxr_jpg")),
    "openi": ("openi", test_openi.archive),
    "openi tables": ("openi", test_openi.tables),
    "padchest": ("padchest", padchest),
    "pathvqa": ("pathvqa", test_pathvqa.write),
    "roco_v2": ("roco_v2", test_roco_v2.write),
    "slake": ("slake", test_slake.write),
    "vqa_rad": ("vqa_rad", lambda folder: test_vqa_rad.write(folder, test_vqa_rad.ROWS)),
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket may have 107 bytes
        try:
            server.bind(path.name if len(path.name) < 100 else "socket")
        finally:
            os.chdir(ROOT)


def outside(path: Path) -> None:
    """A link to a private file, which is of the right kind."""
    path.symlink_to(secret(path))


def secret(path: Path) -> Path:
    place = next(parent for parent in path.parents if parent.name == "case").with_name("secret") / f"s{path.suffix}"
    place.parent.mkdir(exist_ok=True)
    if path.suffix in (".png", ".jpg", ".dcm"):
        place = place.with_suffix(".png")
        Image.fromarray(np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)).save(place)
    else:
        place.write_bytes(KEPT[path])
    return place


KEPT: dict[Path, bytes] = {}  # what was replaced
HOSTILE: dict[str, Callable[[Path], object]] = {
    "fifo": fifo,
    "socket": a_socket,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "kernel": lambda path: path.symlink_to("/proc/self/mem"),
    "outside": outside,
    "loop": lambda path: path.symlink_to(path.name),
    "empty": Path.touch,
    "terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "noise": lambda path: path.write_bytes(np.random.default_rng(1).bytes(5000)),
    "brackets": lambda path: packed(path, b"[" * 200_000),
    "digits": lambda path: packed(path, b"[" + b"9" * 200_000 + b"]"),
}


def packed(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp("a") / "raw") for name, (_, write) in ARCHIVES.items()}


def read_all(dataset: str, raw: Path, outside: bool = False) -> tuple[list[RawImage], list[str]]:
    """List and load an archive as a build does. Returns the images, and the faults. Raises UserError."""
    reader = registry.reader(dataset)
    images, faults = [], []
    with warnings.catch_warnings(), raw_files.inside(raw_files.Archive((raw.resolve(),), outside)):
        warnings.simplefilter("ignore")
        for study in reader.read(raw, datasets.parse_options(dataset, reader.OPTIONS, {})):
            if study.fault:
                faults.append(study.fault)
                continue
            for source, _ in study.views:
                assert isinstance(source, Path)
                try:
                    images.append(load(source))
                except BadImage as error:
                    faults.append(error.reason)
    return images, faults


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_honest_archive_has_no_fault_but_its_own(name: str, archives: dict[str, Path]) -> None:
    images, faults = read_all(ARCHIVES[name][0], archives[name])
    assert images
    assert not {"no regular file", raw_files.OUTSIDE, raw_files.CHANGED} & set(faults)


def files_of(raw: Path) -> tuple[list[Path], list[Path]]:
    """Return the tables, and some of the other files."""
    files = sorted(path.relative_to(raw) for path in raw.rglob("*") if path.is_file())
    others = [path for path in files if path.suffix in (".png", ".jpg", ".dcm", ".txt", ".xml")]
    last = {path.suffix: path for path in others}
    return [path for path in files if path not in others], sorted({*others[:1], *last.values()})


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_file_costs_its_study_or_is_one_line(name: str, archives: dict[str, Path], tmp_path: Path) -> None:
    """Each file is a FIFO and a link to the outside, and some of the others: all of each reader, in the end."""
    dataset, honest = ARCHIVES[name][0], archives[name]
    count = len(read_all(dataset, honest)[0])
    raw = Path(shutil.copytree(honest, tmp_path / "case" / "raw"))
    tables, others = files_of(raw)
    rest = itertools.cycle(kind for kind in HOSTILE if kind not in ("fifo", "outside"))
    for file in [*tables, *others]:
        for kind in ("fifo", "outside", *itertools.islice(rest, max(2, 10 // (len(tables) + 1)))):
            path = raw / file
            KEPT[path] = path.read_bytes()
            path.unlink()
            HOSTILE[kind](path)
            try:
                images, _ = read_all(dataset, raw)
            except UserError as error:
                line = f"{kind} as {file}: {error}"
                assert file in tables or file.suffix == ".txt", line
                assert line.isprintable(), line
                assert len(line) < 2000, line
            else:
                assert file in tables or count - len(images) <= 8, f"{kind} as {file}: more than a study is gone"
                assert all(image.pixels.shape[:2] != SHAPE for image in images), f"{kind}: seen from outside"
            finally:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
                path.write_bytes(KEPT.pop(path))
