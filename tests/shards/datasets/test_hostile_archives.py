"""Hostile archives, one of every reader: a broken or forged file costs its study or ends in one line, never more.

Each file of a small archive is replaced by each thing that is no honest file; then everything is listed and loaded.
"""

import gzip
import itertools
import os
import re
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings, strategies as st
from PIL import Image

from radhpc.core.errors import UserError
from shards import raw_files
from shards.datasets import reader as datasets, registry
from shards.datasets.helpers import images
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


def terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


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
    "terabyte": terabyte,
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
    loaded, faults = [], []
    with warnings.catch_warnings(), raw_files.inside(raw_files.Archive((raw.resolve(),), outside)):
        warnings.simplefilter("ignore")
        for study in reader.read(raw, datasets.parse_options(dataset, reader.OPTIONS, {})):
            if study.fault:
                faults.append(study.fault)
                continue
            for source, _ in study.views:
                assert isinstance(source, Path)
                try:
                    loaded.append(load(source))
                except BadImage as error:
                    faults.append(error.reason)
    return loaded, faults


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_honest_archive_has_no_fault_but_its_own(name: str, archives: dict[str, Path]) -> None:
    loaded, faults = read_all(ARCHIVES[name][0], archives[name])
    assert loaded
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
                loaded, _ = read_all(dataset, raw)
            except UserError as error:
                line = f"{kind} as {file}: {error}"
                assert file in tables or file.suffix == ".txt", line
                assert line.isprintable(), line
                assert len(line) < 2000, line
            else:
                assert file in tables or count - len(loaded) <= 8, f"{kind} as {file}: more than a study is gone"
                assert all(image.pixels.shape[:2] != SHAPE for image in loaded), f"{kind}: seen from outside"
            finally:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
                path.write_bytes(KEPT.pop(path))


STRANGERS: tuple[tuple[bytes, Callable[[Path], object]], ...] = (
    (b"fifo.png", fifo),
    (b"fifo.xml", fifo),
    (b"\xff\xfe.png", lambda path: path.write_bytes(b"x")),
    (b"\xff\xfe.dcm", fifo),
    (b"a\nb.bmp", lambda path: path.write_bytes(b"x")),
    (b"loop.png", lambda path: path.symlink_to(path.name)),
    (b"up", lambda path: path.symlink_to("..")),
    (b"patient9", fifo),
    (b"p10", lambda path: path.symlink_to("/proc")),
    (b"[red]", Path.mkdir),
)


@pytest.mark.parametrize("name", ARCHIVES)
def test_strangers_beside_the_files_change_nothing(name: str, archives: dict[str, Path], tmp_path: Path) -> None:
    dataset = ARCHIVES[name][0]
    before, faults = read_all(dataset, archives[name])
    raw = Path(shutil.copytree(archives[name], tmp_path / "raw"))
    for folder in [raw, *sorted(path for path in raw.rglob("*") if path.is_dir())][:20]:
        for stranger, make in STRANGERS:
            if name == "openi tables" and stranger.endswith(b".xml"):  # then its reports are in XML
                continue
            if not (path := Path(os.fsdecode(os.path.join(os.fsencode(folder), stranger)))).exists():
                make(path)
    loaded, others = read_all(dataset, raw)
    assert len(loaded) == len(before)
    assert set(others) <= {*faults, "unreadable XML file"}


@pytest.mark.timeout(20)
def test_folders_that_lead_into_one_another_are_gone_through_once(tmp_path: Path) -> None:
    raw = test_openi.archive(tmp_path / "raw")
    for folder in ("a", "b", "c", "d", "e"):
        (raw / folder).mkdir()
        for number in range(40):
            (raw / folder / f"{number}").symlink_to(raw / "abcde"["bcdea".index(folder)])
    assert len(list(images.files(raw, (".png", ".xml")))) == 5
    assert images.folders_with(raw, re.compile(r"CXR.*")) == [raw]
    with (
        raw_files.inside(raw_files.Archive((raw / "a",))),
        pytest.warns(datasets.DatasetWarning, match="outside=allow"),
    ):
        assert list(images.files(raw / "a", (".png",))) == []


NAMES = ("../../secret.png", "{secret}", "/dev/zero", "/proc/self/mem", "..", "a\\0.png", "\\ud800", "x" * 5000, "[/x]")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ARCHIVES)
def test_changed_bytes_of_a_table_are_named_and_lead_nowhere(
    name: str, archives: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes are overwritten, cut out or repeated, or a name of the archive becomes a path to somewhere else."""
    dataset = ARCHIVES[name][0]
    raw = tmp_path / "raw"
    if not raw.exists():
        shutil.copytree(archives[name], raw)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)).save(tmp_path / "secret.png")
    tables, others = files_of(raw)
    path = raw / data.draw(st.sampled_from([*tables, *(file for file in others if file.suffix in (".xml", ".txt"))]))
    whole = path.read_bytes()
    content = bytearray(gzip.decompress(whole) if path.suffix == ".gz" else whole)
    start = data.draw(st.integers(0, len(content)))
    stop = start + data.draw(st.integers(0, 40))
    change = data.draw(st.sampled_from(["bytes", "cut", "repeat", "name", "name"]))
    if change == "bytes":
        content[start:stop] = data.draw(st.binary(max_size=8))
    elif change == "cut":
        del content[start:stop]
    elif change == "repeat":
        content[start:start] = content[start:stop] * 20
    else:
        words = [match.span() for match in re.finditer(rb"[\w./-]{4,}", bytes(content))]
        first, last = data.draw(st.sampled_from(words))
        content[first:last] = data.draw(st.sampled_from(NAMES)).format(secret=tmp_path / "secret.png").encode()
    packed(path, bytes(content))
    try:
        loaded, _ = read_all(dataset, raw)
    except UserError as error:
        line = str(error)
        event(line[len(str(path)) :][:40])
    else:
        line = ""
        assert all(image.pixels.shape[:2] != SHAPE for image in loaded), "seen from outside"
    finally:
        path.write_bytes(whole)
    assert len(line.splitlines()) < 2
    assert len(line) < 3000
