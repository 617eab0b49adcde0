"""Raw files: only regular ones inside the archive, as large as expected, and as they were when they were opened."""

import ast
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from shards import raw_files
from shards.build import BuildSettings, build
from shards.datasets.helpers.mimic_reports import ReportZip
from shards.datasets.reader import UnusableRecord
from shards.images import deflated
from shards.images.decoding import decode, load
from shards.images.raw_image import BadImage
from shards.reports.card import CARD
from shards.tabular import external_sort
from tests.conftest import ROOT
from tests.shards import helpers
from tests.shards.images.dicom_files import write_dicom

pytestmark = pytest.mark.timeout(60)
PRIVATE = (77, 55)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Six studies, and beside them a picture that is none of their business."""
    raw = helpers.notes(tmp_path / "raw", 6)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, PRIVATE, np.uint8)).save(tmp_path / "private.png")
    return raw


def rename(raw: Path, name: str) -> None:
    """Let the first study name another image."""
    rows = json.loads((raw / "data.json").read_text())
    rows[0]["image"] = name
    (raw / "data.json").write_text(json.dumps(rows))


SETTINGS = BuildSettings(workers=1, max_skipped=1)


@pytest.mark.parametrize("way", ["absolute", "dots", "link", "folder link", "dots inside a link", "hidden dots"])
def test_nothing_outside_the_archive_is_read_unless_allowed(archive: Path, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    (archive / "link.png").symlink_to("../private.png")
    (archive / "folder").symlink_to(tmp_path)
    (archive / "images/up").symlink_to("..")
    names = {
        "absolute": str(tmp_path / "private.png"),
        "dots": "../private.png",
        "link": "link.png",
        "folder link": "folder/private.png",
        "dots inside a link": "images/up/../private.png",
        "hidden dots": "images/../images/./../../private.png",
    }
    rename(archive, names[way])
    result = build("image_text", archive, str(out), {}, SETTINGS)
    assert (result.samples, [skip["reason"] for skip in result.skipped]) == (
        5,
        [f"{raw_files.OUTSIDE}: outside=allow reads such files"],
    )
    assert "outside=allow" not in (out / CARD).read_text()
    allowed = build("image_text", archive, str(tmp_path / "allowed"), {"outside": "allow"}, SETTINGS)
    assert (allowed.samples, allowed.skipped) == (6, [])
    assert "outside=allow" in (tmp_path / "allowed" / CARD).read_text()


def test_links_inside_the_archive_are_read_wherever_the_archive_lies(archive: Path, tmp_path: Path) -> None:
    (archive / "images").rename(archive / "moved")
    (archive / "images").symlink_to("moved")
    (tmp_path / "elsewhere").symlink_to(archive)
    (tmp_path / "table.json").symlink_to(archive / "data.json")
    for number, raw in enumerate((tmp_path / "elsewhere", tmp_path / "table.json")):
        result = build("image_text", raw, str(tmp_path / f"out{number}"), {}, SETTINGS)
        assert (result.samples, result.skipped) == (6, [])


NAMES = [b"a\nERROR b.png", b"\xff\xfe.png", b"[/x].png", b"\x1b]0;owned\x07.png", b"[red]x.png", b" .png"]


@pytest.mark.parametrize("present", [True, False])
def test_names_in_any_bytes(tmp_path: Path, present: bool) -> None:
    """The command runs as a user calls it: what it prints is printable, and each fault is a line."""
    raw = helpers.notes(tmp_path / "raw", len(NAMES) + 1)
    rows = json.loads((raw / "data.json").read_text())
    for row, name in zip(rows, NAMES, strict=False):
        path = raw / row["image"]
        row["image"] = "images/" + os.fsdecode(name)
        (raw / row["image"]).parent.mkdir(exist_ok=True)
        os.rename(path, raw / row["image"] if present else tmp_path / "missing")
    (raw / "data.json").write_text(json.dumps(rows))
    command = [sys.executable, "launch.py", "build", "image_text", "--raw", raw, "--out", tmp_path / "out"]
    done = subprocess.run(
        [*command, "--workers", "1", "--max-skipped", "6"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert all(line.isprintable() for line in printed.splitlines())
    assert not any(line.startswith("ERROR") for line in printed.splitlines())
    assert printed.count("skipped") == (2 if present else 7)  # the bytes that are no text, and the count


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    for read in (lambda: raw_files.read(path, 99), lambda: raw_files.open_file(path), lambda: load(path)):
        with pytest.raises((OSError, BadImage), match="no regular file"):
            read()


def test_a_file_without_permission_costs_its_study(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (32, 32)).save(path)
    path.chmod(0)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # root may read anything, so this is somebody else
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == os.getuid() and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        if not os.getuid():
            os.setuid(65534)
        try:
            load(path)
        except BadImage as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        assert b"unreadable image file (Permission denied)" in file.read()
    os.waitpid(child, 0)


def test_a_file_that_grows_or_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for change, size in (("grow", 3_000_000), ("shrink", 500_000)):
        path.write_bytes(b"1,2\n" * 500_000)
        with raw_files.open_table(path) as file:
            file.read(10)
            os.truncate(path, size)
            with pytest.raises(raw_files.RefusedFile, match="changed while it was read"):
                file.read()
        assert change
    with pytest.raises(raw_files.RefusedFile, match="changed while it was read"):
        raw_files.read(Path("/proc/self/status"), 1 << 20)  # the kernel says 0 bytes
    path.write_bytes(b"x" * 100)
    with raw_files.open_table(path) as file:
        path.unlink()
        assert file.read() == b"x" * 100


def test_sizes_are_known_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.touch()
    os.truncate(path, 1 << 40)
    for read in (
        lambda: raw_files.read(path, 1 << 30),
        lambda: load(path),
        lambda: raw_files.open_table(path).__enter__(),
    ):
        with pytest.raises((OSError, BadImage), match="too large"):
            read()


def test_a_gzip_bomb_ends_where_no_table_does(tmp_path: Path) -> None:
    bomb = zlib.compressobj(5, zlib.DEFLATED, 31)
    data = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(100)) + bomb.flush()
    (tmp_path / "a.csv.gz").write_bytes(data)
    with raw_files.open_table(tmp_path / "a.csv.gz") as file:
        assert sum(len(file.read(1 << 20)) for _ in range(60)) == 60 << 20
        with pytest.raises(raw_files.RefusedFile, match="times as large"):
            file.read(raw_files.MIN_LIMIT)
    table = b"".join(b"%d,a finding that is often the same,0\n" % n for n in range(200_000))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(table))
    with raw_files.open_table(tmp_path / "a.csv.gz") as file:
        assert file.read() == table


def test_an_archive_and_its_errors_reach_other_processes() -> None:
    for thing in (
        raw_files.Archive((Path("/a"),), True),
        raw_files.RefusedFile(Path("/a"), "reason", "detail"),
        raw_files.LargeFile(Path("/a"), 5, 3),
    ):
        same = pickle.loads(pickle.dumps(thing))
        assert (repr(same), vars(same)) == (repr(thing), vars(thing))


PLACE = "p10/p10000032/s5041426{}.txt"


def zipped(path: Path) -> Path:
    """Reports, of which the second to the fifth are hostile."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("files/" + PLACE.format(1), "FINDINGS: Clear.")
        with file.open("files/" + PLACE.format(2), "w") as bomb:
            for _ in range(50):
                bomb.write(bytes(1_000_000))
        for number in (3, 4, 5):
            file.writestr("files/" + PLACE.format(number), "FINDINGS: " + "Clear. " * 100)
        file.writestr("files/" + PLACE.format(6), "FINDINGS: Clear.")
    data = bytearray(path.read_bytes())
    for number, (offset, value) in {3: (8, 1), 4: (10, 97)}.items():
        place = data.rfind(b"files/" + PLACE.format(number).encode()) - 46  # of the entry in the directory
        data[place + offset] = value  # encrypted; a method that nobody has
        if number == 3:
            local = data.find(b"files/" + PLACE.format(number).encode()) - 30
            data[local + 6] = 1
    last = data.find(b"files/" + PLACE.format(5).encode())
    data[last + 40 : last + 50] = bytes(10)
    path.write_bytes(data)
    return path


def test_an_entry_of_a_zip_that_is_a_bomb_encrypted_or_broken_costs_its_study(tmp_path: Path) -> None:
    reports = ReportZip(zipped(tmp_path / "mimic-cxr-reports.zip"))
    for number in (1, 6):
        assert reports.text(PLACE.format(number)) == "FINDINGS: Clear."
    reasons = {2: "report: file too large", 3: "encrypted report", 4: "unreadable report", 5: "unreadable report"}
    for number, reason in reasons.items():
        with pytest.raises(UnusableRecord, match=f"^{reason}$"):
            reports.text(PLACE.format(number))


def deflated_dicom(tmp_path: Path, zeros: int) -> bytes:
    """A deflated DICOM with an element of so many zeros; its header says so three times."""
    meta = b"".join(b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99" for _ in range(1))
    stream = zlib.compressobj(1, zlib.DEFLATED, -15)
    body = b"".join(stream.compress(bytes(1 << 20)) for _ in range(zeros >> 20)) + stream.flush()
    return bytes(128) + b"DICM" + meta + body


def test_a_deflated_dicom_is_inflated_only_as_far_as_an_image_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deflated, "MAX_INFLATED", 50 << 20)
    bomb = deflated_dicom(tmp_path, 60 << 20)
    with pytest.raises(BadImage, match="image too large"):
        decode(bomb)
    with pytest.raises(BadImage, match="image too large"):
        decode(bomb[132:])  # without the preamble


def test_other_texts_of_a_picture_that_inflate_are_not_kept(tmp_path: Path) -> None:
    """PNG's zTXt and iCCP; libpng and Pillow have limits of their own."""
    for kind in ("zTXt", "iCCP"):
        texts = PngImagePlugin.PngInfo()
        content = zlib.compress(bytes(30_000_000), 5)
        texts.add(kind.encode(), b"a\0\0" + content)
        for depth in (np.uint8, np.uint16):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(0).integers(0, 255, (40, 40)).astype(depth)
            Image.fromarray(pixels).save(buffer, "PNG", pnginfo=texts)
            try:
                raw = decode(buffer.getvalue())
            except BadImage:
                continue
            assert np.array_equal(raw.pixels, pixels)


def test_any_text_is_a_key(tmp_path: Path) -> None:
    keys = ["a", "\udcff\udcfe.png", "\ud800", "é", "", "\0"]
    lookup = external_sort.Lookup((key, number) for number, key in enumerate(keys))
    assert [lookup.get(key) for key in keys] == list(range(6))
    assert sorted(key for key, _ in lookup.items()) == sorted(keys)
    assert [key for key, _ in external_sort.grouped((key, 0) for key in keys)] == keys


BOUNDED = """
import resource, sys, warnings
from pathlib import Path
from shards.build import BuildSettings, build
from radhpc.core.errors import UserError
warnings.simplefilter("ignore")
build("image_text", Path(sys.argv[1]), sys.argv[2] + "/honest", {}, BuildSettings(workers=1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for number, raw in enumerate(sys.argv[3:]):
    try:
        result = build("image_text", Path(raw), f"{sys.argv[2]}/{number}", {}, BuildSettings(workers=1, max_skipped=1))
        assert len(result.skipped) == 1, raw
    except UserError as error:
        print(error)
print("grown by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_the_memory_of_a_build_stays_flat(tmp_path: Path) -> None:
    """Each of these would take gigabytes if it were believed."""
    folders = []
    for kind in ("honest", "deflated", "png", "dicom", "sparse", "views"):
        raw = helpers.notes(tmp_path / kind, 3)
        folders.append(raw)
        image = raw / "images/1.2.840.0.png"
        if kind == "deflated":
            image.write_bytes(deflated_dicom(tmp_path, 420 << 20))
        elif kind == "png":
            image.write_bytes(_png(60_000, 60_000))
        elif kind == "dicom":
            write_dicom(image, Rows=65535, Columns=65535)
        elif kind == "sparse":
            os.truncate(image, 1 << 40)
        elif kind == "views":
            rename(raw, ["images/1.2.840.0.png"] * 20_000)  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *map(str, (folders[0], tmp_path / "out", *folders[1:]))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].removeprefix("grown by")) < 250  # mebibytes


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes((8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_nothing_else_opens_a_raw_file() -> None:
    """Readers, tables and images name no other way to a file than raw_files."""
    allowed = {"Image.open", "self._zip.open"}  # from bytes, and from a zip that raw_files has opened
    calls = []
    for room in ("datasets", "tabular", "images"):
        for path in sorted((ROOT / "shards" / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if name.rpartition(".")[2] in ("open", "read_bytes", "read_text", "fromfile", "memmap"):
                    calls += [] if name in allowed else [f"{path.relative_to(ROOT)}:{node.lineno}: {name}"]
    assert calls == []
