"""Shards, manifests and indexes that somebody forged: one line, or faults by name, never a traceback, a hang or memory.

The forger knows the format: the checksums of what was changed are made to fit.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from radhpc.core.errors import UserError
from radhpc.core.manifest import FINGERPRINTS, INDEX, MANIFEST, Manifest, SampleIndex, sha256
from radhpc.data.source import BadSample, Source, decode_study
from radhpc.storage.store import Store
from shards import duplicates
from shards.build import BuildSettings, build
from shards.verify import verify
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(120)

HOSTILE_NAMES = (
    "../train-000000.tar", "/etc/passwd", "/dev/zero", "..", ".", "", ".hidden", "a/b.tar", "a\\b", "a\n.tar",
    "a\0.tar", "s3://bucket/train.tar", "http://localhost/x.tar", "train-000000.tar#other", "\x1b]0;owned\x07",
    "x" * 500, "é.tar",
)  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 62, 1 << 200, 10**400, 1.5, float("nan"), float("inf"), "5", "", [], {}, [[]], {"a": {}},
    "x" * 10_000, *HOSTILE_NAMES,
)  # fmt: skip
SLOW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hostile") / "shards"
    build("phantom", None, str(out), {"studies": "8", "size": "32"}, BuildSettings(workers=1, shard_samples=3))
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def restored(whole: Path, copy: Path) -> None:
    for name in (MANIFEST, INDEX, FINGERPRINTS):
        shutil.copy(whole / name, copy / name)


def refusals(folder: Path) -> list[str]:
    """Do all that reads shards, and return the lines with which it is refused."""
    lines = []
    for read in (verify, duplicates.load, train):
        try:
            read(str(folder))
        except UserError as error:
            lines.append(str(error))
    return lines


def train(url: str) -> None:
    source = Source((url,), "train")
    source.check_sizes()
    for number in range(len(source)):
        with contextlib.suppress(BadSample):
            for raw in source.read_raw(np.asarray([number])):
                decode_study(raw)


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value in a tree of JSON."""
    yield before
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*before, key))


def replace(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    tree[path[0]] = replace(tree[path[0]], path[1:], value)
    return tree


@SLOW
@given(data=st.data())
def test_a_changed_manifest_is_one_line_or_faults(whole: Path, copy: Path, data: st.DataObject) -> None:
    restored(whole, copy)
    tree = json.loads((whole / MANIFEST).read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(tree))))
        tree = replace(tree, path, data.draw(st.sampled_from(HOSTILE_VALUES)))
    (copy / MANIFEST).write_text(json.dumps(tree))
    for line in refusals(copy):
        assert line.startswith(str(copy))
        assert line.isprintable()
        assert len(line) < 2000


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("key", [("shards", 0, "name"), ("index", "name"), ("fingerprints", "name")])
def test_no_name_leaves_the_folder(copy: Path, key: tuple[Any, ...], name: str) -> None:
    tree = replace(json.loads((copy / MANIFEST).read_bytes()), key, name)
    (copy / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"manifest\.json: {'.'.join(map(str, key))}: "):
        verify(str(copy))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": 1, "format": 1}', "format: there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"build": {"a": 1e999}}', "1e999"),
        ("[" * 100_000, "nested too deeply"),
        ('{"samples": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"\\u001b]0;owned\\u0007": 1, "\\u001b]0;owned\\u0007": 1}', r"x1b\]0;owned"),
    ],
)
def test_json_that_can_be_read_in_two_ways_is_refused(copy: Path, text: str, reason: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=reason) as refused:
        verify(str(copy))
    assert str(refused.value).isprintable()


def forge(folder: Path, name: str, data: bytes) -> None:
    """Write a side file, and make the manifest agree."""
    tree = json.loads((folder / MANIFEST).read_bytes())
    (folder / name).write_bytes(data)
    tree["index" if name == INDEX else "fingerprints"].update(size=len(data), sha256=sha256(data))
    (folder / MANIFEST).write_text(json.dumps(tree))


EXTREMES = (
    0,
    1,
    -1,
    127,
    255,
    511,
    513,
    1 << 31,
    (1 << 31) - 1,
    -(1 << 31),
    (1 << 63) - 1,
    -(1 << 63),
    (1 << 63) - 600,
)


@SLOW
@given(data=st.data())
def test_a_changed_index_is_one_line_or_faults(whole: Path, copy: Path, data: st.DataObject) -> None:
    restored(whole, copy)
    columns = dict(vars(Manifest.load(Store(whole)).load_index(Store(whole))))
    columns["person"] = columns["patient"]  # as in archives whose namespace is not their name
    name = data.draw(st.sampled_from(sorted(columns)))
    column = columns[name].copy()
    change = data.draw(st.sampled_from(["value", "value", "value", "shorter", "longer", "wider", "type", "shape"]))
    if change == "value" and column.dtype.kind == "S":
        column[data.draw(st.integers(0, len(column) - 1))] = data.draw(st.binary(max_size=20))
    elif change == "value":
        value = np.array(data.draw(st.sampled_from(EXTREMES))).astype(column.dtype)
        column[data.draw(st.integers(0, len(column) - 1))] = value
    elif change in ("shorter", "longer"):
        column = column[:-1] if change == "shorter" else np.concatenate([column, column[:1]])
    elif change == "wider":
        column = column.astype("S5000" if column.dtype.kind == "S" else "f8")
    elif change == "type":
        column = np.ones(len(column), data.draw(st.sampled_from(["S8", "?", "f4", "c8", ">i4", "u8"])))
    else:
        column = column.reshape(data.draw(st.sampled_from([(-1, 1), (1, -1)])))
    forge(copy, INDEX, SampleIndex(**{**columns, name: column}).to_bytes())
    for line in refusals(copy):
        assert line.startswith(str(copy))
        assert line.isprintable()
        assert INDEX in line or FINGERPRINTS in line or name in ("key", "patient", "person", "split")


@pytest.mark.parametrize(
    ("column", "edit", "reason"),
    [
        ("offset", lambda v, n: v + (1 << 40), "offset: .* outside of shard"),
        ("offset", lambda v, n: -v, "offset: .* outside of shard"),
        ("offset", lambda v, n: np.where(np.arange(len(v)) == 1, v[0], v), "offset: members of a shard that overlap"),
        ("length", lambda v, n: v + (1 << 62), "length: "),
        ("length", lambda v, n: v - (1 << 20), "length: "),
        ("shard", lambda v, n: v + n, "shard: .* there are"),
        ("shard", lambda v, n: v - 1, "shard: .* there are"),
        ("split", lambda v, n: v + 3, "split: .*; allowed are 0 to 2"),
        ("first", lambda v, n: v[::-1], "first: "),
        ("first", lambda v, n: np.where(np.arange(len(v)) == 1, 1 << 60, v), "first: "),
        ("key", lambda v, n: np.full(len(v), b"../../x"), "key: "),
        ("key", lambda v, n: np.full(len(v), b"\xff\xfe"), "key: .* is not UTF-8"),
        ("suffix", lambda v, n: np.full(len(v), b"\x1b[2J"), "suffix: "),
        ("crc32c", lambda v, n: v.astype(np.int64), "crc32c: "),
    ],
)
def test_an_index_is_checked_once_when_it_is_opened(copy: Path, column: str, edit: Any, reason: str) -> None:
    manifest = Manifest.load(Store(copy))
    columns = dict(vars(manifest.load_index(Store(copy))))
    columns[column] = edit(columns[column], len(manifest.shards))
    forge(copy, INDEX, SampleIndex(**columns).to_bytes())
    with pytest.raises(UserError, match=rf"index\.npz: {reason}") as refused:
        Source((str(copy),), "train")
    assert str(refused.value).isprintable()
    assert any(fault.shard == INDEX for fault in verify(str(copy)).faults)


def test_a_key_twice_is_refused_by_training(copy: Path) -> None:
    columns = dict(vars(Manifest.load(Store(copy)).load_index(Store(copy))))
    columns["key"] = columns["key"][[0, 0, *range(2, len(columns["key"]))]]
    forge(copy, INDEX, SampleIndex(**columns).to_bytes())
    with pytest.raises(UserError, match="is the key of several samples"):
        Source((str(copy),), "train")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
@pytest.mark.parametrize("name", [MANIFEST, INDEX, FINGERPRINTS, "train-000000.tar"])
def test_what_is_no_file_is_never_waited_for(copy: Path, name: str, kind: str) -> None:
    path = copy / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(copy)  # the name of a socket may have 107 bytes
            try:
                server.bind(name)
            finally:
                os.chdir(ROOT)
    if name == MANIFEST:
        with pytest.raises(UserError, match=rf"{name}: no regular file"):
            verify(str(copy))
    else:
        faults = verify(str(copy)).faults
        assert any("no regular file" in fault.fault and fault.shard == name for fault in faults)
    with pytest.raises(UserError, match="no regular file"):
        (duplicates.load if name == FINGERPRINTS else train)(str(copy))


def test_a_sparse_shard_of_terabytes_is_a_fault(copy: Path) -> None:
    os.truncate(copy / "train-000000.tar", 1 << 42)
    faults = [fault.fault for fault in verify(str(copy)).faults]
    assert any("bytes, but the manifest says" in fault for fault in faults)
    with pytest.raises(UserError, match="bytes, but manifest.json says"):
        train(str(copy))


BOUNDED = """
import resource, sys
from radhpc.core.errors import UserError
from shards.verify import verify
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        assert not verify(folder).ok, folder
    except UserError as error:
        print(error)
print("grown by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_bombs_take_no_memory(whole: Path, tmp_path: Path) -> None:
    """Sparse files stand for large ones, and np.savez_compressed for what inflates."""
    folders = [Path(shutil.copytree(whole, tmp_path / str(n))) for n in range(5)]
    os.truncate(folders[0] / MANIFEST, 1 << 40)
    os.truncate(folders[1] / INDEX, 1 << 40)
    os.truncate(folders[2] / FINGERPRINTS, 1 << 40)
    columns = vars(Manifest.load(Store(whole)).load_index(Store(whole)))
    with (tmp_path / "bomb.npz").open("wb") as file:
        np.savez_compressed(file, **{**columns, "crc32c": np.zeros(200_000_000, np.uint8)})
    forge(folders[3], INDEX, (tmp_path / "bomb.npz").read_bytes())
    header = (
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 32), }".ljust(118)
    )
    forge(folders[4], FINGERPRINTS, header + bytes(64))
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *map(str, folders)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert int(last.removeprefix("grown by")) < 100  # mebibytes
