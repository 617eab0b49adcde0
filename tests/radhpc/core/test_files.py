"""Small files on a disk that fills up."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bench.chaos import small_disk
from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically, write_with_reserve
from radhpc.core.run_folder import RunFolder
from tests.conftest import ROOT

WRITER = """
import resource, signal, sys
from radhpc.core.run_folder import RunFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = RunFolder(sys.argv[1])
run.record("started", life=1, world=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
try:
    run.record("interrupted", cause="x" * 200)
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run.record("finished")
print([event["event"] for event in run.events()])
"""


def test_an_event_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A limit on the size of files cuts a write as a full disk does."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", WRITER, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    number, events = done.stdout.splitlines()
    assert number == "28"
    assert events == "['started', 'finished']"


def test_a_life_that_fills_the_disk_can_still_say_so(tmp_path: Path) -> None:
    try:
        disk = small_disk(tmp_path / "disk", 4)
        folder = disk.__enter__()
    except UserError:
        pytest.skip("NO SMALL DISK CAN BE MOUNTED HERE: a full one is not tested; this needs root")
    try:
        run = RunFolder(folder)
        run.reserve_space()
        with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        with pytest.raises(OSError, match="No space left"):
            run.record("finished")
        write_with_reserve(
            run.reserve_path("ranks"), lambda: write_atomically(folder / "logs" / "end.rank-00000.json", b"full")
        )
        write_with_reserve(run.reserve_path("decision"), lambda: run.record("failed", why="No space left on device"))
        assert (folder / "logs" / "end.rank-00000.json").read_bytes() == b"full"
        assert [event["event"] for event in run.events()] == ["failed"]
    finally:
        disk.__exit__(None, None, None)
